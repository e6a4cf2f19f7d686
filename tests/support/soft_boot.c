/* Boot a kernel or run a firmware image on the software core, without Python: the smallest machine that does.
 *
 * RAM, a 16550 at 0x3F8, ACPI tables for the processors and power-off, the exit port 0xF4; everything else reads as ones.
 * The console goes to stdout, the summary to stderr. See usage() for the options. Exit status: 0 the guest shut down or
 * --until was seen, (v << 1) | 1 the guest wrote v to port 0xF4, 3 triple fault, 5 halted for ever, 124 timeout, 2 usage.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "soft/soft.h"

enum { EXIT_TRIPLE = 3, EXIT_HALTED = 5, EXIT_TIMEOUT = 124 };
enum { START_INFO = 0x6000, MODULES = 0x6100, MEMMAP = 0x6200, CMDLINE = 0x7000, ACPI_AT = 0xE0000, GDT_AT = 0x6500 };

struct machine {
    struct soft_vm *vm;
    struct soft_config config;
    const struct soft_host *host;
    uint8_t *rom;
    size_t rom_size;
    uint64_t hop_ns;
    unsigned hops;
    uint8_t *ram;
    uint64_t ram_size;
    int exit_status; /* -1: runs on */
    bool timed_out;
    uint64_t random_state;
    const char *until;
    size_t until_matched;
    struct {
        uint8_t ier, lcr, mcr, fcr, dll, dlm, scr;
        bool thre, line;
    } uart;
    uint8_t cmos_index;
    pthread_mutex_t devices; /* with --parallel vCPUs come at once */
};

static void die(const char *what)
{
    fprintf(stderr, "soft_boot: %s: %s\n", what, errno ? strerror(errno) : "failed");
    exit(2);
}

static void stop(struct machine *m, int status)
{
    if (m->exit_status < 0)
        __atomic_store_n(&m->exit_status, status, __ATOMIC_SEQ_CST);
    soft_vm_wake(m->vm);
}

/* ---- 16550 ---- */

static void uart_update(struct machine *m)
{
    bool line = (m->uart.ier & 2) && m->uart.thre;
    if (line != m->uart.line) {
        m->uart.line = line;
        soft_vm_set_irq(m->vm, 4, line);
    }
}

static void console_byte(struct machine *m, uint8_t byte)
{
    putchar(byte);
    if (byte == '\n')
        fflush(stdout);
    if (m->until) {
        if (byte == (uint8_t)m->until[m->until_matched])
            m->until_matched++;
        else
            m->until_matched = byte == (uint8_t)m->until[0];
        if (!m->until[m->until_matched])
            stop(m, 0);
    }
}

static void uart_write(struct machine *m, unsigned reg, uint8_t value)
{
    bool dlab = m->uart.lcr & 0x80;
    switch (reg) {
    case 0:
        if (dlab) {
            m->uart.dll = value;
        } else {
            if (!(m->uart.mcr & 0x10))
                console_byte(m, value);
            m->uart.thre = true;
        }
        break;
    case 1:
        if (dlab) {
            m->uart.dlm = value;
        } else {
            if (!(m->uart.ier & 2) && (value & 2))
                m->uart.thre = true;
            m->uart.ier = value & 15;
        }
        break;
    case 2: m->uart.fcr = value; break;
    case 3: m->uart.lcr = value; break;
    case 4: m->uart.mcr = value & 0x1F; break;
    case 7: m->uart.scr = value; break;
    default: break;
    }
    uart_update(m);
}

static uint8_t uart_read(struct machine *m, unsigned reg)
{
    bool dlab = m->uart.lcr & 0x80;
    uint8_t fifo = m->uart.fcr & 1 ? 0xC0 : 0;
    switch (reg) {
    case 0: return dlab ? m->uart.dll : 0;
    case 1: return dlab ? m->uart.dlm : m->uart.ier;
    case 2:
        if (m->uart.line) {
            m->uart.thre = false;
            uart_update(m);
            return fifo | 2;
        }
        return fifo | 1;
    case 3: return m->uart.lcr;
    case 4: return m->uart.mcr;
    case 5: return 0x60;
    case 6:
        if (m->uart.mcr & 0x10) /* loopback: DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD */
            return (uint8_t)((m->uart.mcr & 1) << 5 | (m->uart.mcr & 2) << 3 | (m->uart.mcr & 4) << 4 | (m->uart.mcr & 8) << 4);
        return 0xB0;
    default: return m->uart.scr;
    }
}

/* ---- the bus ---- */

static uint64_t access_bus(void *ctx, const struct soft_access *a)
{
    struct machine *m = ctx;
    if (!a->port)
        return ~0ull;
    if (a->address >= 0x3F8 && a->address < 0x400) {
        if (!a->write)
            return uart_read(m, a->address & 7);
        uart_write(m, a->address & 7, (uint8_t)a->value);
        return 0;
    }
    switch (a->address) {
    case 0xF4:
        if (a->write)
            stop(m, (int)(a->value << 1 | 1) & 0xFF);
        return ~0ull;
    case 0xE9:
        if (a->write)
            putchar((int)a->value & 0xFF);
        return 0xE9;
    case 0x64:
        if (a->write && a->value == 0xFE)
            stop(m, 0);
        return ~0ull;
    case 0x70:
        if (a->write)
            m->cmos_index = a->value & 0x7F;
        return ~0ull;
    case 0x71:
        return m->cmos_index == 10 ? 0x26 : m->cmos_index == 11 ? 2 : m->cmos_index == 13 ? 0x80 : 0x01;
    case 0x600: case 0x602:
        return 0;
    case 0x604:
        if (a->write && a->value & 1 << 13)
            stop(m, 0);
        return 1; /* SCI_EN */
    default:
        return ~0ull;
    }
}

static void random_bytes(void *ctx, void *buffer, size_t size)
{
    struct machine *m = ctx;
    uint8_t *out = buffer;
    for (size_t i = 0; i < size; i++) { /* splitmix64 */
        uint64_t z = (m->random_state += 0x9E3779B97F4A7C15ull);
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        out[i] = (uint8_t)(z ^ (z >> 31));
    }
}

/* ---- ACPI: RSDP, XSDT, FADT, MADT, and a DSDT that knows S5 ---- */

static void put(uint8_t **p, uint64_t value, unsigned size)
{
    memcpy(*p, &value, size);
    *p += size;
}

static void checksum(uint8_t *table, size_t size, size_t at)
{
    uint8_t sum = 0;
    table[at] = 0;
    for (size_t i = 0; i < size; i++)
        sum = (uint8_t)(sum + table[i]);
    table[at] = (uint8_t)-sum;
}

static uint8_t *table_begin(uint8_t *at, const char *signature, uint8_t revision)
{
    memset(at, 0, 256);
    memcpy(at, signature, 4);
    at[8] = revision;
    memcpy(at + 10, "LPVSR SOFTBOOT", 14);
    at[24] = 1;
    memcpy(at + 28, "LPVS", 4);
    at[32] = 1;
    return at + 36;
}

static void table_end(uint8_t *at, const uint8_t *end)
{
    uint32_t size = (uint32_t)(end - at);
    memcpy(at + 4, &size, 4);
    checksum(at, size, 9);
}

static void build_acpi(struct machine *m, uint32_t cpus)
{
    uint8_t *base = m->ram + ACPI_AT;
    const uint32_t xsdt = ACPI_AT + 0x100, fadt = ACPI_AT + 0x200, madt = ACPI_AT + 0x400, dsdt = ACPI_AT + 0x800;
    memset(base, 0, 0x1000);
    memcpy(base, "RSD PTR LPVSR ", 15);
    memcpy(base + 9, "LPVSR ", 6);
    base[15] = 2;
    base[20] = 36;
    memcpy(base + 24, &xsdt, 4);
    checksum(base, 20, 8);
    checksum(base, 36, 32);

    uint8_t *p = table_begin(m->ram + dsdt, "DSDT", 2);
    static const uint8_t s5[] = { 0x08, '_', 'S', '5', '_', 0x12, 0x06, 0x04, 0x0A, 0x05, 0x00, 0x00, 0x00 };
    memcpy(p, s5, sizeof s5);
    table_end(m->ram + dsdt, p + sizeof s5);

    p = table_begin(m->ram + fadt, "FACP", 5);
    uint8_t *f = m->ram + fadt;
    memcpy(f + 40, &dsdt, 4);
    f[46] = 9;                /* SCI_INT */
    f[57] = 0x06;             /* PM1a_EVT_BLK 0x600 */
    f[64] = 0x04, f[65] = 0x06;
    f[88] = 4, f[89] = 2;     /* lengths of the event and control blocks */
    f[108] = 0;               /* no RTC century */
    f[109] = 0x01;            /* IAPC_BOOT_ARCH: legacy devices, no 8042 */
    f[112] = 0x01 | 0x04 | 0x30; /* WBINVD, C1; no fixed power and sleep buttons */
    memcpy(f + 140, &dsdt, 4);
    memset(f + 256, 0, 12);
    table_end(f, f + 268);

    p = table_begin(m->ram + madt, "APIC", 3);
    put(&p, 0xFEE00000, 4);
    put(&p, 1, 4); /* PCAT_COMPAT */
    for (uint32_t i = 0; i < cpus; i++) {
        put(&p, 0x0800, 2);
        put(&p, i | i << 8, 2);
        put(&p, 1, 4);
    }
    put(&p, 0x0C01, 2);
    put(&p, cpus, 2);
    put(&p, 0xFEC00000, 4);
    put(&p, 0, 4);
    put(&p, 0x0A02, 2); /* ISA IRQ 0 is GSI 2 */
    put(&p, 0x0000, 2);
    put(&p, 2, 4);
    put(&p, 0, 2);
    put(&p, 0x0A02, 2); /* ISA IRQ 9: level, high */
    put(&p, 0x0900, 2);
    put(&p, 9, 4);
    put(&p, 0x000D, 2);
    table_end(m->ram + madt, p);

    p = table_begin(m->ram + xsdt, "XSDT", 1);
    put(&p, fadt, 8);
    put(&p, madt, 8);
    table_end(m->ram + xsdt, p);
}

/* ---- loading ---- */

static uint8_t *map_file(const char *path, size_t *size)
{
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0)
        die(path);
    void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        die(path);
    close(fd);
    *size = (size_t)st.st_size;
    return data;
}

static void to_ram(struct machine *m, uint64_t at, const void *from, size_t size)
{
    if (at > m->ram_size || size > m->ram_size - at) {
        fprintf(stderr, "soft_boot: image does not fit into memory\n");
        exit(2);
    }
    memcpy(m->ram + at, from, size);
}

/* XEN_ELFNOTE_PHYS32_ENTRY in a note segment, or 0. */
static uint64_t pvh_entry(const uint8_t *notes, size_t size)
{
    size_t at = 0;
    while (at + 12 <= size) {
        uint32_t n[3];
        memcpy(n, notes + at, 12);
        size_t name = at + 12, desc = name + ((n[0] + 3) & ~3u);
        if (n[2] == 18 && n[0] == 4 && !memcmp(notes + name, "Xen", 4) && desc + 4 <= size) {
            uint32_t entry;
            memcpy(&entry, notes + desc, 4);
            return entry;
        }
        at = desc + ((n[1] + 3) & ~3u);
    }
    return 0;
}

static uint64_t load_elf(struct machine *m, const char *path, uint64_t *top)
{
    size_t size;
    uint8_t *file = map_file(path, &size);
    uint64_t entry = 0;
    *top = 0;
    if (size > sizeof(Elf64_Ehdr) && file[EI_CLASS] == ELFCLASS64) {
        const Elf64_Ehdr *e = (const void *)file;
        const Elf64_Phdr *ph = (const void *)(file + e->e_phoff);
        for (unsigned i = 0; i < e->e_phnum; i++) {
            if (ph[i].p_type == PT_LOAD) {
                to_ram(m, ph[i].p_paddr, file + ph[i].p_offset, ph[i].p_filesz);
                if (ph[i].p_paddr + ph[i].p_memsz > *top)
                    *top = ph[i].p_paddr + ph[i].p_memsz;
            } else if (ph[i].p_type == PT_NOTE && !entry) {
                entry = pvh_entry(file + ph[i].p_offset, ph[i].p_filesz);
            }
        }
    } else {
        const Elf32_Ehdr *e = (const void *)file;
        const Elf32_Phdr *ph = (const void *)(file + e->e_phoff);
        for (unsigned i = 0; i < e->e_phnum; i++) {
            if (ph[i].p_type == PT_LOAD) {
                to_ram(m, ph[i].p_paddr, file + ph[i].p_offset, ph[i].p_filesz);
                if (ph[i].p_paddr + ph[i].p_memsz > *top)
                    *top = ph[i].p_paddr + ph[i].p_memsz;
            } else if (ph[i].p_type == PT_NOTE && !entry) {
                entry = pvh_entry(file + ph[i].p_offset, ph[i].p_filesz);
            }
        }
    }
    munmap(file, size);
    if (!entry)
        die("no PVH entry note in the kernel");
    return entry;
}

static void set_state(struct machine *m, enum soft_state kind, const void *data, size_t size)
{
    if (soft_vcpu_set(m->vm, 0, kind, data, size)) {
        errno = EINVAL;
        die("set state");
    }
}

/* PVH (xen/include/public/arch-x86/hvm/start_info.h): 32-bit flat protected mode, EBX = start info. */
static void boot_pvh(struct machine *m, const char *kernel, const char *initrd, const char *cmdline)
{
    uint64_t top, entry = load_elf(m, kernel, &top);
    to_ram(m, CMDLINE, cmdline, strlen(cmdline) + 1);
    uint64_t info[7] = { 0x336EC578ull | 1ull << 32, 0, 0, CMDLINE, ACPI_AT, MEMMAP, 3 };
    if (initrd) {
        size_t size;
        uint8_t *data = map_file(initrd, &size);
        uint64_t at = (m->ram_size - size) & ~0xFFFull;
        to_ram(m, at, data, size);
        munmap(data, size);
        uint64_t module[4] = { at, size, 0, 0 };
        to_ram(m, MODULES, module, sizeof module);
        info[1] = 1ull << 32; /* flags 0, one module */
        info[2] = MODULES;
    }
    uint64_t map[9] = { 0, 0xA0000, 1, ACPI_AT, 0x10000, 3, 0x100000, m->ram_size - 0x100000, 1 };
    to_ram(m, MEMMAP, map, sizeof map);
    to_ram(m, START_INFO, info, sizeof info);

    struct kvm_sregs s;
    struct kvm_regs r = { .rip = entry, .rflags = 2, .rbx = START_INFO };
    soft_vcpu_get(m->vm, 0, SOFT_STATE_SREGS, &s, sizeof s);
    struct kvm_segment data = { .limit = 0xFFFFFFFF, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
    s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cs = data;
    s.cs.selector = 0x10;
    s.cs.type = 11;
    s.tr = (struct kvm_segment){ .limit = 0x67, .selector = 0x20, .type = 11, .present = 1 };
    const uint64_t gdt[5] = { 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00008B0000000067 };
    to_ram(m, GDT_AT, gdt, sizeof gdt);
    s.gdt.base = GDT_AT;
    s.gdt.limit = sizeof gdt - 1;
    s.cr0 = 0x11;
    set_state(m, SOFT_STATE_SREGS, &s, sizeof s);
    set_state(m, SOFT_STATE_REGS, &r, sizeof r);
}

/* A firmware image of at most 128 KiB: below 1 MiB (writable copy) and below 4 GiB; starts at the reset vector. */
static void boot_bios(struct machine *m, const char *path)
{
    size_t size;
    uint8_t *data = map_file(path, &size);
    if (size > 0x20000 || size & 0xFFF) {
        fprintf(stderr, "soft_boot: a firmware image is a multiple of 4 KiB, at most 128 KiB\n");
        exit(2);
    }
    to_ram(m, 0x100000 - size, data, size);
    void *rom = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(rom, data, size);
    munmap(data, size);
    m->rom = rom;
    m->rom_size = size;
}

static void set_slots(struct machine *m)
{
    if (soft_vm_set_slot(m->vm, 0, 0, m->ram_size, m->ram, false, false)
        || (m->rom && soft_vm_set_slot(m->vm, 1, 0x100000000ull - m->rom_size, m->rom_size, m->rom, true, false)))
        die("memory slots");
}

/* ---- moving to a fresh VM, as a snapshot does ---- */

struct vcpu_state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    uint8_t xsave[4096];
    struct kvm_xcrs xcrs;
    struct kvm_lapic_state lapic;
    struct kvm_vcpu_events events;
    struct kvm_debugregs debugregs;
    struct kvm_mp_state mp;
    _Alignas(8) uint8_t extra[SOFT_EXTRA_STATE_SIZE];
    struct {
        struct kvm_msrs header;
        struct kvm_msr_entry entries[128];
    } msrs;
};

static const struct {
    enum soft_state kind;
    size_t offset, size;
} parts[] = { /* in the order of restoring */
#define PART(kind, field) { kind, offsetof(struct vcpu_state, field), sizeof ((struct vcpu_state *)0)->field }
    PART(SOFT_STATE_SREGS, sregs), PART(SOFT_STATE_REGS, regs), PART(SOFT_STATE_XCRS, xcrs), PART(SOFT_STATE_XSAVE, xsave),
    PART(SOFT_STATE_LAPIC, lapic), PART(SOFT_STATE_MSRS, msrs), PART(SOFT_STATE_EVENTS, events),
    PART(SOFT_STATE_DEBUGREGS, debugregs), PART(SOFT_STATE_MP, mp), PART(SOFT_STATE_EXTRA, extra),
#undef PART
};
enum { PARTS = sizeof parts / sizeof parts[0] };
static const struct {
    enum soft_vm_state kind;
    size_t size;
} vm_parts[] = {
    { SOFT_VM_CORE, SOFT_CORE_STATE_SIZE }, { SOFT_VM_CLOCK, sizeof(struct kvm_clock_data) },
    { SOFT_VM_PIC_MASTER, sizeof(struct kvm_irqchip) }, { SOFT_VM_PIC_SLAVE, sizeof(struct kvm_irqchip) },
    { SOFT_VM_IOAPIC, sizeof(struct kvm_irqchip) }, { SOFT_VM_PIT, sizeof(struct kvm_pit_state2) },
};
enum { VM_PARTS = sizeof vm_parts / sizeof vm_parts[0] };

static void hop(struct machine *m)
{
    static struct vcpu_state states[SOFT_MAX_VCPUS];
    static uint8_t vm_states[VM_PARTS][1024];
    uint32_t indices[128];
    for (unsigned i = 0; i < VM_PARTS; i++)
        if (soft_vm_get(m->vm, vm_parts[i].kind, vm_states[i], vm_parts[i].size))
            die("get VM state");
    for (uint32_t n = 0; n < m->config.vcpus; n++) {
        struct vcpu_state *s = &states[n];
        s->msrs.header.nmsrs = soft_msr_list(indices, 128);
        for (uint32_t i = 0; i < s->msrs.header.nmsrs; i++)
            s->msrs.entries[i] = (struct kvm_msr_entry){ .index = indices[i] };
        for (unsigned i = 0; i < PARTS; i++)
            if (soft_vcpu_get(m->vm, n, parts[i].kind, (uint8_t *)s + parts[i].offset, parts[i].size))
                die("get vCPU state");
    }
    soft_vm_destroy(m->vm);
    m->vm = soft_vm_create(&m->config, m->host);
    if (!m->vm)
        die("create");
    set_slots(m);
    for (unsigned i = 0; i < VM_PARTS; i++)
        if (soft_vm_set(m->vm, vm_parts[i].kind, vm_states[i], vm_parts[i].size))
            die("set VM state");
    for (uint32_t n = 0; n < m->config.vcpus; n++)
        for (unsigned i = 0; i < PARTS; i++)
            if (soft_vcpu_set(m->vm, n, parts[i].kind, (uint8_t *)&states[n] + parts[i].offset, parts[i].size))
                die("set vCPU state");
    m->hops++;
}

static uint64_t hash_ram(const struct machine *m)
{
    uint64_t h = 0xCBF29CE484222325ull, word;
    for (uint64_t i = 0; i < m->ram_size; i += 8) {
        memcpy(&word, m->ram + i, 8);
        h = (h ^ word) * 0x100000001B3ull;
        h ^= h >> 29;
    }
    return h;
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct {
    struct machine *m;
    unsigned seconds;
} timeout;

static void *timeout_thread(void *arg)
{
    (void)arg;
    struct timespec t = { .tv_sec = timeout.seconds };
    nanosleep(&t, NULL);
    __atomic_store_n(&timeout.m->timed_out, true, __ATOMIC_SEQ_CST);
    if (!timeout.m->hop_ns) /* else the next hop notices */
        soft_vm_wake(timeout.m->vm);
    return NULL;
}

/* One vCPU, on a thread of its own. */
struct worker {
    pthread_t thread;
    struct machine *m;
    uint32_t vcpu;
};
static void *run_vcpu(void *arg)
{
    struct worker *w = arg;
    struct machine *m = w->m;
    while (__atomic_load_n(&m->exit_status, __ATOMIC_SEQ_CST) < 0 && !__atomic_load_n(&m->timed_out, __ATOMIC_SEQ_CST)) {
        switch (soft_vcpu_run(m->vm, w->vcpu)) {
        case SOFT_STOP_SHUTDOWN: stop(m, EXIT_TRIPLE); break;
        case SOFT_STOP_HALTED: stop(m, EXIT_HALTED); break;
        case SOFT_STOP_ERROR: stop(m, 4); break;
        default: break;
        }
    }
    return NULL;
}
static uint64_t access_bus_alone(void *ctx, const struct soft_access *access)
{
    struct machine *m = ctx;
    soft_vcpu_outside(m->vm, access->vcpu);
    pthread_mutex_lock(&m->devices);
    uint64_t value = access_bus(ctx, access);
    pthread_mutex_unlock(&m->devices);
    soft_vcpu_inside(m->vm, access->vcpu);
    return value;
}
static void random_bytes_alone(void *ctx, void *buffer, size_t size)
{
    struct machine *m = ctx;
    pthread_mutex_lock(&m->devices);
    random_bytes(ctx, buffer, size);
    pthread_mutex_unlock(&m->devices);
}

static void usage(void)
{
    fprintf(stderr, "soft_boot [--cpus N] [--memory MIB] [--virtual IPS] [--quantum N] [--seed N] [--timeout SECONDS] [--parallel]\n"
                    "          [--until TEXT] [--state] [--hop NS] (--bios IMAGE | --kernel ELF [--initrd FILE] [--cmdline TEXT])\n");
    exit(2);
}

static void print_state(struct machine *m, uint32_t cpus)
{
    for (uint32_t i = 0; i < cpus; i++) {
        struct kvm_regs r;
        struct kvm_sregs s;
        soft_vcpu_get(m->vm, i, SOFT_STATE_REGS, &r, sizeof r);
        soft_vcpu_get(m->vm, i, SOFT_STATE_SREGS, &s, sizeof s);
        fprintf(stderr,
                "cpu %u rip %04x:%016llx rflags %llx cpl %u\n rax %016llx rbx %016llx rcx %016llx rdx %016llx\n"
                " rsi %016llx rdi %016llx rbp %016llx rsp %04x:%016llx\n"
                " r8 %016llx r9 %016llx r10 %016llx r11 %016llx r12 %016llx r13 %016llx r14 %016llx r15 %016llx\n"
                " cr0 %llx cr2 %llx cr3 %llx cr4 %llx efer %llx cs.base %llx gs.base %llx\n",
                i, s.cs.selector, r.rip, r.rflags, s.ss.dpl, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, s.ss.selector,
                r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.cs.base,
                s.gs.base);
    }
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "cpus", 1, 0, 'c' },   { "memory", 1, 0, 'm' },  { "virtual", 1, 0, 'v' }, { "seed", 1, 0, 's' },
        { "timeout", 1, 0, 't' }, { "until", 1, 0, 'u' },  { "bios", 1, 0, 'b' },    { "kernel", 1, 0, 'k' },
        { "hop", 1, 0, 'h' },    { "initrd", 1, 0, 'i' }, { "cmdline", 1, 0, 'l' }, { "quantum", 1, 0, 'q' }, { "state", 0, 0, 'S' },
        { "parallel", 0, 0, 'p' }, { 0 },
    };
    struct machine m = { .exit_status = -1, .random_state = 1 };
    struct soft_config config = { .vcpus = 1, .tsc_khz = 1000000, .virtual_ips = 1000000000, .quantum = 100000 };
    const char *bios = NULL, *kernel = NULL, *initrd = NULL, *cmdline = "console=ttyS0";
    uint64_t memory = 512;
    bool state = false;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'c': config.vcpus = (uint32_t)atoi(optarg); break;
        case 'm': memory = strtoull(optarg, NULL, 0); break;
        case 'v': config.virtual_clock = true; config.virtual_ips = strtoull(optarg, NULL, 0); break;
        case 'q': config.quantum = (uint32_t)strtoul(optarg, NULL, 0); break;
        case 's': m.random_state = strtoull(optarg, NULL, 0); break;
        case 't': timeout.seconds = (unsigned)atoi(optarg); break;
        case 'u': m.until = optarg; break;
        case 'b': bios = optarg; break;
        case 'k': kernel = optarg; break;
        case 'i': initrd = optarg; break;
        case 'l': cmdline = optarg; break;
        case 'S': state = true; break;
        case 'p': config.parallel = true; break;
        case 'h': m.hop_ns = strtoull(optarg, NULL, 0); break;
        default: usage();
        }
    }
    if (!bios == !kernel || memory < 2 || (config.parallel && (config.virtual_clock || m.hop_ns)))
        usage();
    config.epoch_ns = config.virtual_clock ? 1700000000ull * 1000000000 : (uint64_t)time(NULL) * 1000000000;
    double start = seconds();
    const struct soft_host host = { .ctx = &m, .access = config.parallel ? access_bus_alone : access_bus,
                                    .random = config.parallel ? random_bytes_alone : random_bytes };
    pthread_mutex_init(&m.devices, NULL);
    m.config = config;
    m.host = &host;
    m.vm = soft_vm_create(&config, &host);
    m.ram_size = memory << 20;
    m.ram = mmap(NULL, m.ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!m.vm || m.ram == MAP_FAILED)
        die("create");
    set_slots(&m);
    m.uart.thre = true;
    if (bios) {
        boot_bios(&m, bios);
        set_slots(&m);
    } else {
        build_acpi(&m, config.vcpus);
        boot_pvh(&m, kernel, initrd, cmdline);
    }
    pthread_t thread;
    timeout.m = &m;
    if (timeout.seconds && pthread_create(&thread, NULL, timeout_thread, NULL))
        die("thread");
    uint32_t vcpu = 0;
    uint64_t hop_at = m.hop_ns;
    struct worker workers[SOFT_MAX_VCPUS];
    for (uint32_t i = 0; config.parallel && i < config.vcpus; i++) {
        workers[i] = (struct worker){ .m = &m, .vcpu = i };
        if (pthread_create(&workers[i].thread, NULL, run_vcpu, &workers[i]))
            die("thread");
    }
    for (uint32_t i = 0; config.parallel && i < config.vcpus; i++)
        pthread_join(workers[i].thread, NULL);
    while (!config.parallel && m.exit_status < 0 && !m.timed_out) {
        if (m.hop_ns)
            soft_vm_set_alarm(m.vm, hop_at);
        switch (soft_vm_run(m.vm, &vcpu)) {
        case SOFT_STOP_SHUTDOWN: m.exit_status = EXIT_TRIPLE; break;
        case SOFT_STOP_HALTED: m.exit_status = EXIT_HALTED; break;
        case SOFT_STOP_ERROR: m.exit_status = 4; break;
        case SOFT_STOP_ALARM:
            hop(&m);
            hop_at = soft_vm_now(m.vm) + m.hop_ns;
            break;
        default: break;
        }
    }
    int status = m.exit_status >= 0 ? m.exit_status : EXIT_TIMEOUT;
    fflush(stdout);
    struct soft_stats stats;
    soft_vm_stats(m.vm, &stats);
    double wall = seconds() - start;
    if (state || status == EXIT_TRIPLE || status == EXIT_TIMEOUT || status == EXIT_HALTED)
        print_state(&m, config.vcpus);
    fprintf(stderr,
            "status %d hops %u vcpu %u instructions %llu now_ns %llu ram %016llx\n"
            "wall %.3f s, %.1f MIPS; decoded %llu invalidated %llu tlb-flushes %llu tlb-fills %llu exceptions %llu "
            "interrupts %llu halts %llu accesses %llu icache-misses %llu\n",
            status, m.hops, vcpu, (unsigned long long)stats.instructions, (unsigned long long)soft_vm_now(m.vm),
            (unsigned long long)hash_ram(&m), wall, (double)stats.instructions / wall * 1e-6,
            (unsigned long long)stats.blocks_decoded, (unsigned long long)stats.blocks_invalidated,
            (unsigned long long)stats.tlb_flushes, (unsigned long long)stats.tlb_fills, (unsigned long long)stats.exceptions,
            (unsigned long long)stats.interrupts, (unsigned long long)stats.halts, (unsigned long long)stats.accesses,
            (unsigned long long)stats.icache_misses);
    return status;
}
