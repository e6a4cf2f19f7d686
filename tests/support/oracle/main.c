/* oracle BACKEND [--mode 64|32] [--seed N] [--per-slot N] [--map M --opcode O] [--limit N] [--fpu] [--vex] [--programs N]
 *        [--rules amd|intel] [--host native|intel]
 * oracle vendors
 *
 * BACKEND: core (the software core beside native execution), kvm (the software core beside the host's KVM at CPL 3; exit
 * status 4 if there is none) or direct (the FPU's operations beside native execution). Goes through every slot of the
 * opcode maps --per-slot times (x87 and groups more often) and prints each difference, then "compared N differences M".
 * Exit status 1 if there was one. kvm: a difference is one that native execution does not contradict; the others are
 * counted as "KVM alone N". "not compared N": cases in which the vendors have nothing in common
 * (those that are #UD on the core are not counted).
 *
 * --programs: run that many short programs instead of single instructions.
 * --vex: instructions with a VEX prefix; with --programs, programs that have them.
 * --rules: compare with a host of that vendor (see vendors.h); the default is what CPUID says. Programs are made for them.
 * --host intel: native execution is changed to what an Intel processor may do (foreign.c).
 * vendors: print the table of differences.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vendors.h"

static const char *const names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                      "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
static unsigned differences, limit = 40;
static uint32_t shown[MAP_COUNT * 256 * 4];

static void print_bytes(const char *what, const uint8_t *p, unsigned n)
{
    printf("    %-8s", what);
    for (unsigned i = 0; i < n; i++)
        printf("%02x%s", p[i], i % 8 == 7 ? " " : "");
    printf("\n");
}

static void show(const struct insn *insn, const struct cpu_state *in, const struct cpu_state *want, const struct cpu_state *got,
                 const struct memory *before, const struct memory *mem_want, const struct memory *mem_got)
{
    uint64_t flags = F_STATUS | F_DF;
    uint32_t *count = &shown[(insn->map * 256u + insn->opcode) * 4u + insn->prefix];
    if ((++*count > 2 && !insn->program) || ++differences > limit)
        return;
    printf("map %u opcode %02x prefix %u modrm %02x%s\n", insn->map, insn->opcode, insn->prefix, insn->modrm, insn->mode32 ? " (32-bit)" : "");
    print_bytes("code", insn->bytes, insn->length);
    printf("    ended   host: vector %u error %x cr2 %llx rip %llx   core: vector %u error %x cr2 %llx rip %llx   (start %llx, ea %llx)\n",
           want->vector, want->error, (unsigned long long)want->cr2, (unsigned long long)want->rip, got->vector, got->error,
           (unsigned long long)got->cr2, (unsigned long long)got->rip, CODE_BASE + (unsigned long long)insn->offset,
           (unsigned long long)insn->ea);
    if ((want->rflags ^ got->rflags) & flags)
        printf("    rflags  in %06llx host %06llx core %06llx\n", (unsigned long long)in->rflags, (unsigned long long)want->rflags,
               (unsigned long long)got->rflags);
    for (unsigned i = 0; i < 16; i++)
        if (want->gpr[i] != got->gpr[i])
            printf("    %-7s in %016llx host %016llx core %016llx\n", names[i], (unsigned long long)in->gpr[i],
                   (unsigned long long)want->gpr[i], (unsigned long long)got->gpr[i]);
    for (unsigned i = 0; i < 416; i += 16)
        if (memcmp(want->fx + i, got->fx + i, 16) != 0) {
            printf("    fx+%u\n", i);
            print_bytes("in", in->fx + i, 16);
            print_bytes("host", want->fx + i, 16);
            print_bytes("core", got->fx + i, 16);
        }
    for (unsigned i = 0; i < 16; i++)
        if (memcmp(want->high[i], got->high[i], 16) != 0) {
            printf("    upper half of ymm%u\n", i);
            print_bytes("in", in->high[i], 16);
            print_bytes("host", want->high[i], 16);
            print_bytes("core", got->high[i], 16);
        }
    const uint8_t *b = (const uint8_t *)before, *w = (const uint8_t *)mem_want, *g = (const uint8_t *)mem_got;
    unsigned lines = 0;
    for (unsigned i = 0; i < sizeof *before && lines < 4; i += 16)
        if (memcmp(w + i, g + i, 16) != 0) {
            lines++;
            printf("    memory %08x\n", i < DATA_SIZE ? DATA_BASE + i : STACK_BASE + i - DATA_SIZE);
            print_bytes("in", b + i, 16);
            print_bytes("host", w + i, 16);
            print_bytes("core", g + i, 16);
        }
    print_bytes("in fx", in->fx, 32);
    for (unsigned i = 0; i < 16; i++)
        printf("%s%s=%llx", i % 8 ? " " : "\n    ", names[i], (unsigned long long)in->gpr[i]);
    printf("\n");
}

static enum rules rules;
static bool kvm, foreign;
static unsigned long compared, different, alone, not_compared;

/* The core did `got`: is it what `other` does? */
static bool agrees(void (*other)(const struct insn *, struct cpu_state *, struct memory *), const struct insn *insn,
                   const struct cpu_state *in, const struct cpu_state *got, const struct memory *before, const struct memory *memory,
                   struct cpu_state *host, struct memory *host_memory)
{
    struct freedom f;
    *host = *in;
    *host_memory = *before;
    other(insn, host, host_memory);
    struct event e = {insn, form_of(insn->bytes, insn->mode32), in, host, got, before, host_memory, memory};
    freedom_of(rules, &e, &f);
    not_compared += f.everything && got->vector != 6;
    return outcomes_equal(&e, &f);
}

static void judge(const struct insn *insn, const struct cpu_state *in, const struct cpu_state *got, const struct memory *before,
                  const struct memory *memory)
{
    static struct cpu_state host, native;
    static struct memory host_memory, native_memory;
    compared++;
    if (agrees(kvm ? kvm_run : foreign ? foreign_run : native_run, insn, in, got, before, memory, &host, &host_memory))
        return;
    /* A KVM without hardware virtualization emulates some instructions itself, and not all as the processor does. */
    if (kvm && agrees(native_run, insn, in, got, before, memory, &native, &native_memory)) {
        alone++;
        return;
    }
    different++;
    show(insn, in, &host, got, before, &host_memory, memory);
}

int main(int argc, char **argv)
{
    kvm = argc > 1 && strcmp(argv[1], "kvm") == 0;
    bool core = kvm || (argc > 1 && strcmp(argv[1], "core") == 0), mode32 = false, fpu = false, vex = false;
    unsigned long seed = 1, per_slot = 2, only_map = 99, only_opcode = 256, programs = 0;
    rules = vendors_host_rules();
    if (argc == 2 && strcmp(argv[1], "vendors") == 0) {
        vendors_print();
        return 0;
    }
    if (argc < 2 || (!core && strcmp(argv[1], "direct") != 0)) {
        fprintf(stderr, "usage: oracle core|kvm|direct [--mode 64|32] [--seed N] [--per-slot N] [--map M] [--opcode O] [--limit N] [--fpu] [--vex] [--programs N]"
                        " [--rules amd|intel] [--host native|intel]\n       oracle vendors\n");
        return 2;
    }
    for (int i = 2; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "0";
        if (strcmp(argv[i], "--fpu") == 0) {
            fpu = true;
            continue;
        }
        if (strcmp(argv[i], "--vex") == 0) {
            vex = true;
            continue;
        }
        if (strcmp(argv[i], "--mode") == 0)
            mode32 = strcmp(value, "32") == 0;
        else if (strcmp(argv[i], "--seed") == 0)
            seed = strtoul(value, NULL, 0);
        else if (strcmp(argv[i], "--per-slot") == 0)
            per_slot = strtoul(value, NULL, 0);
        else if (strcmp(argv[i], "--map") == 0)
            only_map = strtoul(value, NULL, 0);
        else if (strcmp(argv[i], "--opcode") == 0)
            only_opcode = strtoul(value, NULL, 0);
        else if (strcmp(argv[i], "--programs") == 0)
            programs = strtoul(value, NULL, 0);
        else if (strcmp(argv[i], "--rules") == 0)
            rules = strcmp(value, "amd") == 0 ? RULES_AMD : RULES_COMMON;
        else if (strcmp(argv[i], "--host") == 0)
            foreign = strcmp(value, "intel") == 0;
        else if (strcmp(argv[i], "--limit") == 0)
            limit = (unsigned)strtoul(value, NULL, 0);
        i++;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    native_init();
    if (core)
        core_init();
    if (kvm && !kvm_init()) {
        printf("no KVM\n");
        return 4;
    }

    static struct memory before, memory;
    struct rng r = {seed};
    fill_memory(&r, &before);
    for (unsigned long n = 0; n < programs && core; n++) {
        struct insn insn;
        static struct cpu_state in, got;
        struct rng one = {seed * 0x100000001B3 + n};
        generate_program(&one, mode32, rules == RULES_COMMON, vex, &insn, &in);
        got = in;
        memory = before;
        core_run(&insn, &got, &memory);
        judge(&insn, &in, &got, &before, &memory);
    }
    /* With a VEX prefix a bit more: L. */
    for (unsigned slot = programs ? UINT32_MAX : 0; slot < MAP_COUNT * 256u * 8 << vex; slot++) {
        unsigned map = slot >> vex >> 11, opcode = slot >> vex >> 3 & 255, prefix = slot >> vex & 3;
        bool rex_w = slot >> vex >> 2 & 1, l = vex && slot & 1, x87 = map == MAP_ONE && (opcode & 0xF8) == 0xD8;
        if ((only_map != 99 && map != only_map) || (only_opcode != 256 && opcode != only_opcode) || (fpu && map == MAP_ONE && !x87))
            continue;
        unsigned long count = x87 && (rex_w || prefix > 1) ? per_slot : x87 ? per_slot * 24 : per_slot;
        for (unsigned long n = 0; n < count; n++) {
            struct insn insn;
            static struct cpu_state in, got;
            struct rng one = {seed * 0x100000001B3 + ((uint64_t)slot << 32) + n};
            if ((compared & 1023) == 0) {
                struct rng fill = {seed + compared};
                fill_memory(&fill, &before);
            }
            if (vex ? !generate_vex(&one, map, opcode, prefix, rex_w, l, mode32, &insn, &in, &before)
                    : !generate(&one, map, opcode, prefix, rex_w, mode32, -1, &insn, &in, &before))
                continue;
            got = in;
            memory = before;
            if (core)
                core_run(&insn, &got, &memory);
            else if (!direct_run(&insn, &got, &memory))
                continue;
            judge(&insn, &in, &got, &before, &memory);
        }
    }
    if (kvm)
        printf("KVM alone %lu\n", alone);
    printf("not compared %lu\n", not_compared);
    printf("compared %lu differences %lu\n", compared, different);
    return different != 0;
}
