/* Threads: locks, conditions, futexes, atomic operations, signals to a thread, floating point state of each. */
#define _GNU_SOURCE
#include <fenv.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "work.h"

enum { THREADS = 5 };

static void together(void *(*function)(void *), uint64_t seed, uint64_t results[THREADS])
{
    struct argument {
        uint64_t number, seed;
    } arguments[THREADS];
    pthread_t threads[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        arguments[i] = (struct argument){ i, seed };
        if (pthread_create(&threads[i], NULL, function, &arguments[i]))
            fail("pthread_create");
    }
    for (unsigned i = 0; i < THREADS; i++) {
        void *result;
        if (pthread_join(threads[i], &result))
            fail("pthread_join");
        results[i] = (uint64_t)result;
    }
}

static uint64_t all(void *(*function)(void *), uint64_t seed)
{
    uint64_t results[THREADS];
    together(function, seed, results);
    return mix_bytes(seed, results, sizeof results);
}

/* Several kinds of counters, each protected in its own way. */
static struct {
    pthread_mutex_t mutex;
    pthread_rwlock_t rwlock;
    pthread_spinlock_t spin;
    sem_t semaphore;
    uint64_t plain[4];
    uint64_t atomic[6] __attribute__((aligned(16)));
    uint8_t bytes[4];
} shared;

static void *count(void *argument)
{
    uint64_t number = ((uint64_t *)argument)[0], seen = 0;
    for (unsigned i = 0; i < 1500; i++) {
        pthread_mutex_lock(&shared.mutex);
        shared.plain[0] += number + 1;
        if (i % 64 == number)
            sched_yield();
        pthread_mutex_unlock(&shared.mutex);
        pthread_rwlock_rdlock(&shared.rwlock);
        seen += shared.plain[1] & 1;
        pthread_rwlock_unlock(&shared.rwlock);
        if (i % 4 == 0) {
            pthread_rwlock_wrlock(&shared.rwlock);
            shared.plain[1] += 1;
            shared.plain[1] += 1;
            pthread_rwlock_unlock(&shared.rwlock);
        }
        pthread_spin_lock(&shared.spin);
        shared.plain[2]++;
        pthread_spin_unlock(&shared.spin);
        sem_wait(&shared.semaphore);
        __atomic_fetch_add(&shared.plain[3], 1, __ATOMIC_RELAXED);
        sem_post(&shared.semaphore);

        __atomic_fetch_add(&shared.atomic[0], i, __ATOMIC_SEQ_CST);
        __atomic_fetch_xor(&shared.atomic[1], number << i % 32, __ATOMIC_SEQ_CST);
        uint64_t old = __atomic_load_n(&shared.atomic[2], __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(&shared.atomic[2], &old, old * 3 + 1, 1, __ATOMIC_SEQ_CST,
                                            __ATOMIC_RELAXED))
            ;
        uint64_t low = shared.atomic[4], high = shared.atomic[5];
        uint8_t done = 0;
        do { /* two words that always differ by the number of additions */
            uint64_t new_low = low + 1, new_high = high + 2;
            __asm__ volatile("lock cmpxchg16b %1; sete %0"
                             : "=q"(done), "+m"(shared.atomic[4]), "+a"(low), "+d"(high)
                             : "b"(new_low), "c"(new_high) : "memory", "cc");
        } while (!done);
        __asm__ volatile("lock incb %0" : "+m"(shared.bytes[number & 3]) : : "cc");
        __asm__ volatile("lock btsw %1, %0" : "+m"(shared.atomic[3]) : "r"((uint16_t)(i % 16)) : "cc");
    }
    return (void *)seen;
}

static uint64_t counters(uint64_t seed)
{
    pthread_mutex_init(&shared.mutex, NULL);
    pthread_rwlock_init(&shared.rwlock, NULL);
    pthread_spin_init(&shared.spin, 0);
    sem_init(&shared.semaphore, 0, 2);
    uint64_t digest = all(count, seed);
    digest = mix_bytes(digest, shared.plain, sizeof shared.plain);
    digest = mix_bytes(digest, shared.atomic, sizeof shared.atomic);
    return mix_bytes(digest, shared.bytes, sizeof shared.bytes);
}

/* A ring that goes round by a condition, then by a futex: each thread writes only when it is its turn. */
static pthread_mutex_t ring_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t ring_turned = PTHREAD_COND_INITIALIZER;
static uint64_t ring_turn, ring_digest, futex_digest;
static uint32_t futex_turn;

static void *ring(void *argument)
{
    uint64_t number = ((uint64_t *)argument)[0];
    for (unsigned i = 0; i < 120; i++) {
        pthread_mutex_lock(&ring_mutex);
        while (ring_turn % THREADS != number)
            pthread_cond_wait(&ring_turned, &ring_mutex);
        ring_digest = mix(ring_digest, number + i);
        ring_turn++;
        pthread_cond_broadcast(&ring_turned);
        pthread_mutex_unlock(&ring_mutex);
    }
    for (unsigned i = 0; i < 120; i++) {
        uint32_t turn;
        while ((turn = __atomic_load_n(&futex_turn, __ATOMIC_ACQUIRE)) % THREADS != number)
            syscall(SYS_futex, &futex_turn, FUTEX_WAIT_PRIVATE, turn, NULL, NULL, 0);
        futex_digest = mix(futex_digest, number ^ i);
        __atomic_store_n(&futex_turn, turn + 1, __ATOMIC_RELEASE);
        syscall(SYS_futex, &futex_turn, FUTEX_WAKE_PRIVATE, THREADS, NULL, NULL, 0);
    }
    return NULL;
}

static uint64_t rings(uint64_t seed)
{
    ring_digest = futex_digest = seed;
    all(ring, seed);
    return mix(ring_digest, futex_digest);
}

/* Each thread has its own rounding, x87 and SSE registers, and memory of its own; all yield in between. */
static __thread uint64_t own[16];

static void *arithmetic(void *argument)
{
    static const int roundings[] = { FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO };
    uint64_t number = ((uint64_t *)argument)[0];
    struct random r = { ((uint64_t *)argument)[1] + number };
    uint64_t digest = number;
    fesetround(roundings[number % 4]);
    for (unsigned i = 0; i < 200; i++) {
        long double x = (long double)(int64_t)next(&r);
        double y = (double)(int64_t)next(&r);
        float z = (float)(int32_t)next(&r);
        for (unsigned k = 0; k < 40; k++) {
            x = x / 3.0L + 1.0L;
            y = y / 7.0 + 1.0;
            z = z / 5.0f + 1.0f;
            if (k == 20 && i % 8 == 0)
                sched_yield();
        }
        own[i % 16] += next(&r);
        digest = mix(mix_bytes(mix_bytes(mix_bytes(digest, &x, 10), &y, 8), &z, 4), own[i % 16]);
    }
    return (void *)(mix(digest, (uint64_t)fegetround()));
}

/* Signals sent to a thread arrive there, and system calls that they interrupt go on. */
static __thread volatile uint64_t received;

static void on_signal(int number)
{
    (void)number;
    received++;
}

static void *hit(void *argument)
{
    (void)argument;
    uint64_t begin = received;
    for (unsigned i = 0; i < 50; i++) {
        pthread_kill(pthread_self(), SIGUSR2);
        if (received != begin + i + 1)
            fail("a signal to a thread itself");
    }
    return (void *)received;
}

static void *born(void *argument)
{
    uint64_t *number = argument;
    return (void *)mix(number[1], number[0]);
}

static uint64_t generations(uint64_t seed)
{
    uint64_t digest = seed;
    for (unsigned i = 0; i < 20; i++)
        digest = mix(digest, all(born, seed + i));
    return digest;
}

void work_threads(uint64_t seed)
{
    signal(SIGUSR2, on_signal);
    report("threads", "counters", counters(seed));
    report("threads", "rings", rings(seed));
    report("threads", "arithmetic", all(arithmetic, seed));
    report("threads", "signals", all(hit, seed));
    report("threads", "generations", generations(seed));
}
