/* Threads and processes of a guest with several processors that change what others execute or touch at the same time: rights,
 * mappings, code, copies. Each test prints a line when everything was as Linux and the architecture have it, and how often not.
 *
 *   threads [ROUNDS]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, LOOK = 2000 };

static int rounds = 300, memory;
static volatile int stop;
static volatile uint64_t *seen; /* the page as it is mapped for good */
static volatile uint64_t *target; /* the page as others change it */
static __thread sigjmp_buf back;

static void on_fault(int signal)
{
    (void)signal;
    siglongjmp(back, 1);
}

static void on_processor(int n)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(n % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *map(void *at, int rights, off_t offset)
{
    void *p = mmap(at, PAGE, rights, MAP_SHARED | (at ? MAP_FIXED : 0), memory, offset);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return p;
}

/* Its word in the page goes on and on, whatever happens to the page. */
static void *writer(void *number)
{
    on_processor((int)(intptr_t)number);
    volatile uint64_t n = 0;
    for (sigsetjmp(back, 1); !stop;)
        target[8 * (intptr_t)number] = ++n;
    return NULL;
}

static int goes_on(unsigned word)
{
    uint64_t before = seen[8 * word];
    for (int i = 0; i < LOOK; i++)
        if (seen[8 * word] != before)
            return 1;
    return 0;
}
static void until_it_goes_on(unsigned word)
{
    for (uint64_t before = seen[8 * word]; seen[8 * word] == before;)
        sched_yield();
}

static void with_writers(const char *name, int (*round)(void))
{
    pthread_t threads[2];
    int wrong = 0;
    stop = 0;
    memset((void *)seen, 0, PAGE);
    target = map(NULL, PROT_READ | PROT_WRITE, 0);
    for (intptr_t i = 1; i <= 2; i++)
        pthread_create(&threads[i - 1], NULL, writer, (void *)i);
    for (int i = 0; i < rounds; i++) {
        until_it_goes_on(1);
        until_it_goes_on(2);
        wrong += round();
    }
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    munmap((void *)target, PAGE);
    printf("%s: %d wrong\n", name, wrong);
}

/* When mprotect() has returned, nobody writes. */
static int protect(void)
{
    mprotect((void *)target, PAGE, PROT_READ);
    int wrong = goes_on(1) + goes_on(2);
    mprotect((void *)target, PAGE, PROT_READ | PROT_WRITE);
    return wrong;
}
static int forbid(void)
{
    mprotect((void *)target, PAGE, PROT_NONE);
    int wrong = goes_on(1) + goes_on(2);
    mprotect((void *)target, PAGE, PROT_READ | PROT_WRITE);
    return wrong;
}
static int unmap(void)
{
    munmap((void *)target, PAGE);
    int wrong = goes_on(1) + goes_on(2);
    map((void *)target, PROT_READ | PROT_WRITE, 0);
    return wrong;
}
static int replace(void)
{
    map((void *)target, PROT_READ | PROT_WRITE, PAGE);
    int wrong = goes_on(1) + goes_on(2);
    map((void *)target, PROT_READ | PROT_WRITE, 0);
    return wrong;
}
/* The page in the file is given away: the writers begin a new one. */
static int punch(void)
{
    return fallocate(memory, 3 /* PUNCH_HOLE, KEEP_SIZE */, 0, PAGE) != 0;
}
/* A child's copy stands still while its parent's threads write; private memory is copied when either writes. */
static uint64_t private_page[PAGE / 8] __attribute__((aligned(PAGE)));
static void *private_writer(void *number)
{
    on_processor((int)(intptr_t)number);
    for (uint64_t n = 1; !stop; n++) {
        __atomic_store_n(&private_page[0], n, __ATOMIC_SEQ_CST);
        __atomic_store_n(&private_page[1], n, __ATOMIC_SEQ_CST);
    }
    return NULL;
}
static void copies(void)
{
    pthread_t thread;
    int wrong = 0;
    stop = 0;
    pthread_create(&thread, NULL, private_writer, (void *)1);
    for (int i = 0; i < rounds / 4; i++) {
        pid_t child = fork();
        if (!child) {
            on_processor(i);
            uint64_t a = private_page[0], b = private_page[1], c;
            private_page[8] = (uint64_t)i;
            for (int n = 0; n < LOOK; n++)
                if ((c = __atomic_load_n(&private_page[0], __ATOMIC_SEQ_CST)) != a)
                    _exit(1);
            _exit(a != b && a != b + 1);
        }
        int status;
        wrong += waitpid(child, &status, 0) != child || status != 0;
        wrong += private_page[8] != 0;
    }
    stop = 1;
    pthread_join(thread, NULL);
    printf("copies: %d wrong\n", wrong);
}

/* ---- code ---- */

static uint8_t *code, *way_in; /* where it is executed, and written */
static volatile int turn, answers, wrong_answers;
enum { CALLERS = 2 };

static void *caller(void *number)
{
    on_processor((int)(intptr_t)number);
    for (int next = 1; next <= rounds; next++) {
        while (turn < next)
            sched_yield();
        unsigned a = 0, b, c, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d)); /* serializes */
        if (((int (*)(void))code)() != next)
            __atomic_add_fetch(&wrong_answers, 1, __ATOMIC_SEQ_CST);
        __atomic_add_fetch(&answers, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

/* rights: of the mapping that is executed. */
static void change(const char *name, int rights, int other)
{
    pthread_t threads[CALLERS];
    code = map(NULL, rights, 2 * PAGE);
    way_in = other ? map(NULL, PROT_READ | PROT_WRITE, 2 * PAGE) : code;
    turn = answers = wrong_answers = 0;
    for (intptr_t i = 0; i < CALLERS; i++)
        pthread_create(&threads[i], NULL, caller, (void *)(i + 1));
    for (int next = 1; next <= rounds; next++) {
        way_in[0] = 0xB8; /* mov eax, next; ret */
        memcpy(way_in + 1, &next, 4);
        way_in[5] = 0xC3;
        __atomic_store_n(&turn, next, __ATOMIC_SEQ_CST);
        while (answers < CALLERS * next)
            sched_yield();
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    if (other)
        munmap(way_in, PAGE);
    munmap(code, PAGE);
    printf("%s: %d wrong\n", name, wrong_answers);
}

/* Another process changes it: it has an address space of its own. */
static void change_by_process(void)
{
    struct shared {
        volatile int turn, answers, wrong;
    } *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *page = map(NULL, PROT_READ | PROT_WRITE, 2 * PAGE);
    pid_t child = fork();
    if (!child) {
        on_processor(1);
        code = map(NULL, PROT_READ | PROT_EXEC, 2 * PAGE);
        for (int next = 1; next <= rounds; next++) {
            while (shared->turn < next)
                sched_yield();
            unsigned a = 0, b, c, d;
            __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "=c"(c), "=d"(d));
            shared->wrong += ((int (*)(void))code)() != next;
            shared->answers = next;
        }
        _exit(0);
    }
    on_processor(0);
    for (int next = 1; next <= rounds; next++) {
        page[0] = 0xB8;
        memcpy(page + 1, &next, 4);
        page[5] = 0xC3;
        __atomic_store_n(&shared->turn, next, __ATOMIC_SEQ_CST);
        while (shared->answers < next)
            sched_yield();
    }
    int status;
    waitpid(child, &status, 0);
    printf("code changed by a process: %d wrong, status %d\n", shared->wrong, status);
    munmap(page, PAGE);
}

/* ---- locks ---- */

static struct {
    uint64_t locked, split_low;
    pthread_mutex_t mutex;
    uint64_t guarded, exchanged, spins;
    uint8_t line[256];
} counts __attribute__((aligned(64))) = { .mutex = PTHREAD_MUTEX_INITIALIZER };

static void *counter(void *number)
{
    on_processor((int)(intptr_t)number);
    for (int i = 0; i < rounds * 20; i++) {
        __atomic_add_fetch(&counts.locked, 1, __ATOMIC_SEQ_CST);
        pthread_mutex_lock(&counts.mutex);
        counts.guarded++;
        pthread_mutex_unlock(&counts.mutex);
        while (__atomic_exchange_n(&counts.spins, 1, __ATOMIC_ACQUIRE))
            sched_yield();
        counts.exchanged++;
        __atomic_store_n(&counts.spins, 0, __ATOMIC_RELEASE);
        if (i % 50 == 0)
            __asm__ volatile("lock incl 62(%0)" ::"r"(counts.line) : "memory"); /* across two lines */
    }
    return NULL;
}
static void locks(void)
{
    pthread_t threads[4];
    for (intptr_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, counter, (void *)i);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    uint32_t split;
    uint64_t all = (uint64_t)rounds * 80;
    memcpy(&split, counts.line + 62, 4);
    printf("locks: %d wrong\n", (counts.locked != all) + (counts.guarded != all) + (counts.exchanged != all) + (split != all / 50));
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
    rounds = argc > 1 ? atoi(argv[1]) : rounds;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    memory = memfd_create("page", 0);
    if (memory < 0 || ftruncate(memory, 4 * PAGE) < 0)
        return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    seen = map(NULL, PROT_READ | PROT_WRITE, 0);
    on_processor(0);
    with_writers("mprotect, read", protect);
    with_writers("mprotect, none", forbid);
    with_writers("munmap", unmap);
    with_writers("mmap over it", replace);
    with_writers("a hole in the file", punch);
    copies();
    change("code in place", PROT_READ | PROT_WRITE | PROT_EXEC, 0);
    change("code, another mapping", PROT_READ | PROT_EXEC, 1);
    change_by_process();
    locks();
    puts("done");
    return 0;
}
