/* The kernel's command line, read as the kernel reads it (Documentation/admin-guide/kernel-parameters.rst): words apart by
 * white space, double quotes around a value or a whole word protect it, of several the last counts, and what follows
 * " -- " is for init alone. */
#include "sys.h"

static char line[4096];

struct word { const char *name, *value; size_t name_length, value_length; };

/* The next word from *p; 0 at the end. Without "=" its value is NULL. */
static int next_word(const char **p, struct word *word)
{
    const char *at = *p;
    while (*at && *at <= ' ') at++;
    if (!*at) return 0;
    int quoted = *at == '"', inside = quoted;
    const char *start = at += quoted, *equals = NULL;
    for (; *at && (inside || *at > ' '); at++) {
        if (*at == '"') inside = !inside;
        if (*at == '=' && !equals) equals = at;
    }
    const char *end = at;
    if (quoted && end > start && end[-1] == '"') end--;
    word->name = start;
    word->name_length = (size_t)((equals ? equals : end) - start);
    word->value = NULL;
    word->value_length = 0;
    if (equals) {
        word->value = equals + 1;
        if (word->value < end && *word->value == '"') {
            word->value++;
            if (end > word->value && end[-1] == '"') end--;
        }
        word->value_length = (size_t)(end - word->value);
    }
    *p = at;
    return !(word->name_length == 2 && !word->value && !memcmp(word->name, "--", 2));
}

static int is_called(const struct word *word, const char *name)
{
    return text_length(name) == word->name_length && !memcmp(word->name, name, word->name_length);
}

int argument(const char *name, char *to, size_t size)
{
    struct word word;
    int found = 0;
    if (!line[0] && read_file("/proc/cmdline", line, sizeof line) < 0) return 0;
    for (const char *p = line; next_word(&p, &word);) {
        if (!is_called(&word, name) || !word.value || word.value_length >= size) continue;
        memcpy(to, word.value, word.value_length);
        to[word.value_length] = 0;
        found = 1;
    }
    return found;
}

int share_argument(int at, char *tag, size_t tag_size, char *place, size_t place_size)
{
    static const char prefix[] = "loopvisor.share.";
    const size_t length = sizeof prefix - 1;
    struct word word;
    if (!line[0] && read_file("/proc/cmdline", line, sizeof line) < 0) return 0;
    for (const char *p = line; next_word(&p, &word);) {
        if (word.name_length <= length || memcmp(word.name, prefix, length) || !word.value || *word.value != '/') continue;
        if (at--) continue;
        size_t named = word.name_length - length;
        if (named >= tag_size || word.value_length >= place_size) return 0;
        memcpy(tag, word.name + length, named);
        tag[named] = 0;
        memcpy(place, word.value, word.value_length);
        place[word.value_length] = 0;
        return 1;
    }
    return 0;
}

int last_of(const char *const names[], int otherwise)
{
    struct word word;
    int found = otherwise;
    if (!line[0] && read_file("/proc/cmdline", line, sizeof line) < 0) return found;
    for (const char *p = line; next_word(&p, &word);)
        for (int i = 0; names[i]; i++)
            if (!word.value && is_called(&word, names[i])) found = i;
    return found;
}
