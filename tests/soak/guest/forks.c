/* Processes: trees of forks, exec, pipes, exit statuses, copy on write, shared memory, stop and continue. */
#define _GNU_SOURCE
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "work.h"

extern char **environ;

/* A tree of processes: each mixes its children's digests, which come by pipe, and ends with seven bits of its own. */
static uint64_t tree(uint64_t seed, unsigned depth)
{
    struct random r = { seed };
    uint64_t digest = next(&r);
    unsigned children = depth ? 1 + (unsigned)(next(&r) % 3) : 0;
    for (unsigned i = 0; i < children; i++) {
        int ends[2], status;
        uint64_t child_seed = next(&r), theirs;
        MUST(pipe(ends));
        pid_t pid = (pid_t)MUST(fork());
        if (!pid) {
            theirs = tree(child_seed, depth - 1);
            MUST(write(ends[1], &theirs, sizeof theirs));
            _exit((int)(theirs & 0x7F));
        }
        if (MUST(read(ends[0], &theirs, sizeof theirs)) != sizeof theirs || MUST(waitpid(pid, &status, 0)) != pid)
            fail("child");
        close(ends[0]);
        close(ends[1]);
        digest = mix(mix(digest, theirs), (uint64_t)status);
    }
    return digest;
}

void work_leaf(uint64_t seed)
{
    struct random r = { seed };
    for (unsigned i = 0; i < 4; i++)
        printf("%016llx\n", (unsigned long long)next(&r));
}

/* This program again, by posix_spawn (vfork and exec), its output by pipe. */
static uint64_t spawned(uint64_t seed)
{
    uint64_t digest = seed;
    for (unsigned i = 0; i < 8; i++) {
        char number[24], output[256];
        int ends[2], status;
        pid_t pid;
        ssize_t n;
        snprintf(number, sizeof number, "%llu", (unsigned long long)(seed + i));
        char *arguments[] = { "work", "leaf", number, NULL };
        posix_spawn_file_actions_t actions;
        MUST(pipe(ends));
        posix_spawn_file_actions_init(&actions);
        posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
        posix_spawn_file_actions_addclose(&actions, ends[0]);
        posix_spawn_file_actions_addclose(&actions, ends[1]);
        if (posix_spawn(&pid, "/proc/self/exe", &actions, NULL, arguments, environ))
            fail("posix_spawn");
        posix_spawn_file_actions_destroy(&actions);
        close(ends[1]);
        while ((n = MUST(read(ends[0], output, sizeof output))) > 0)
            digest = mix_bytes(digest, output, (size_t)n);
        close(ends[0]);
        MUST(waitpid(pid, &status, 0));
        digest = mix(digest, (uint64_t)status);
    }
    return digest;
}

/* Children write to what they share with their parent: privately, then together. */
static uint64_t memory(uint64_t seed)
{
    enum { SIZE = 1 << 20, CHILDREN = 6, ADDS = 2000 };
    struct random r = { seed };
    uint8_t *private = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (private == MAP_FAILED || shared == MAP_FAILED)
        fail("mmap");
    for (size_t i = 0; i < SIZE; i += 64)
        private[i] = (uint8_t)next(&r);
    for (unsigned child = 0; child < CHILDREN; child++)
        if (!MUST(fork())) {
            for (size_t i = child; i < SIZE; i += 4096)
                private[i] = (uint8_t)child;
            for (unsigned i = 0; i < ADDS; i++)
                __atomic_fetch_add(&shared[0], child + 1, __ATOMIC_SEQ_CST);
            shared[8 + child] = mix_bytes(seed, private + child * 4096, 4096);
            _exit(0);
        }
    int status, bad = 0;
    for (unsigned child = 0; child < CHILDREN; child++) {
        MUST(wait(&status));
        bad |= status;
    }
    uint64_t digest = mix(mix_bytes(seed, private, SIZE / 16), (uint64_t)bad);
    for (unsigned i = 0; i < 8 + CHILDREN; i++)
        digest = mix(digest, shared[i]);
    munmap(private, SIZE);
    munmap(shared, 4096);
    return digest;
}

/* Stopped, continued, killed: what waitpid() says each time. */
static uint64_t stopped(uint64_t seed)
{
    uint64_t digest = seed;
    for (unsigned i = 0; i < 4; i++) {
        int ends[2], status;
        MUST(pipe(ends));
        pid_t pid = (pid_t)MUST(fork());
        if (!pid) {
            char byte;
            raise(SIGSTOP);
            MUST(read(ends[0], &byte, 1));
            _exit(40 + (int)i);
        }
        MUST(waitpid(pid, &status, WUNTRACED));
        digest = mix(digest, (uint64_t)status);
        MUST(kill(pid, SIGCONT));
        MUST(waitpid(pid, &status, WCONTINUED));
        digest = mix(digest, (uint64_t)status);
        if (i & 1)
            MUST(write(ends[1], "", 1));
        else
            MUST(kill(pid, i ? SIGTERM : SIGKILL));
        MUST(waitpid(pid, &status, 0));
        digest = mix(digest, (uint64_t)status);
        close(ends[0]);
        close(ends[1]);
    }
    return digest;
}

void work_forks(uint64_t seed)
{
    report("forks", "tree", tree(seed, 4));
    report("forks", "exec", spawned(seed));
    report("forks", "memory", memory(seed));
    report("forks", "stop", stopped(seed));
}
