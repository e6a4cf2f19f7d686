/* Programs that use x86-64-v3, for guests and for the host: the results must be the same. programs NAME
 *
 * results: digests of what AVX2, FMA, F16C, BMI, AES and PCLMULQDQ compute on generated values.
 * strings: glibc's own, which chooses AVX2 versions by CPUID, on strings of many lengths at ends of pages.
 * switches: processes with different YMM registers that give each other the processor, and find their registers as they were.
 * live FILE ROUNDS: three processes keep YMM registers and MXCSR until FILE is there; how often each looked stands in ROUNDS. At
 *   last it says whether they are as they were.
 */
#include <fcntl.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t digest = 0xCBF29CE484222325, seed = 1;

static void add(const void *p, size_t size)
{
    const uint8_t *b = p;
    for (size_t i = 0; i < size; i++)
        digest = (digest ^ b[i]) * 0x100000001B3;
}
static uint64_t any(void) /* splitmix64 */
{
    uint64_t z = seed += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}
static __m256i vector(void) { return _mm256_set_epi64x((long long)any(), (long long)any(), (long long)any(), (long long)any()); }
/* Numbers from 2^-30 to 2^33. */
static __m256 singles(void)
{
    __m256i bits = _mm256_and_si256(vector(), _mm256_set1_epi32((int)0x9FFFFFFF));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x30000000)));
}
#define ADD(value) do { __m256i v_ = (value); add(&v_, sizeof v_); } while (0)
#define ADD_PS(value) ADD(_mm256_castps_si256(value))

static void results(void)
{
    static const int table[64] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3};
    for (unsigned n = 0; n < 3000; n++) {
        __m256i a = vector(), b = vector();
        __m256 x = singles(), y = singles(), z = singles();
        uint64_t q = any(), r = any();
        ADD(_mm256_add_epi32(a, b));
        ADD(_mm256_mullo_epi16(a, b));
        ADD(_mm256_shuffle_epi8(a, b));
        ADD(_mm256_permutevar8x32_epi32(a, b));
        ADD(_mm256_permute4x64_epi64(a, 0x1B));
        ADD(_mm256_sllv_epi32(a, _mm256_and_si256(b, _mm256_set1_epi32(31))));
        ADD(_mm256_sad_epu8(a, b));
        ADD(_mm256_alignr_epi8(a, b, 5));
        ADD(_mm256_blendv_epi8(a, b, _mm256_cmpgt_epi8(a, b)));
        ADD(_mm256_i32gather_epi32(table, _mm256_and_si256(a, _mm256_set1_epi32(63)), 4));
        ADD(_mm256_maskload_epi32(table, a));
        ADD_PS(_mm256_fmadd_ps(x, y, z));
        ADD_PS(_mm256_div_ps(x, y));
        ADD_PS(_mm256_sqrt_ps(_mm256_mul_ps(x, x)));
        ADD_PS(_mm256_hadd_ps(x, y));
        ADD_PS(_mm256_dp_ps(x, y, 0xF1));
        ADD_PS(_mm256_cvtph_ps(_mm256_cvtps_ph(x, 0)));
        __m128i c = _mm256_castsi256_si128(a), key = _mm256_castsi256_si128(b);
        c = _mm_aesenclast_si128(_mm_aesenc_si128(c, key), _mm_aeskeygenassist_si128(key, 0x1B));
        ADD(_mm256_castsi128_si256(_mm_clmulepi64_si128(c, key, 0x10)));
        uint64_t bits[] = {_andn_u64(q, r), _blsr_u64(q), _blsi_u64(q), _blsmsk_u64(q), _tzcnt_u64(q), _lzcnt_u64(q >> (r & 63)),
                           _bextr_u64(q, 5, 23), _bzhi_u64(q, (unsigned)r & 63), _pdep_u64(q, r), _pext_u64(q, r)};
        add(bits, sizeof bits);
    }
    printf("%016llx\n", (unsigned long long)digest);
}

static void strings(void)
{
    enum { PAGE = 4096 };
    char *p = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *q = p + PAGE;
    if (p == MAP_FAILED || mprotect(p + 2 * PAGE, PAGE, PROT_NONE))
        abort();
    for (unsigned length = 0; length < 300; length++) {
        char *end = p + 2 * PAGE - 1, *from = end - length;
        for (unsigned i = 0; i < length; i++)
            from[i] = (char)('a' + any() % 26);
        *end = 0;
        char *at = strchr(from, 'q'), *last = strrchr(from, 'e');
        uint64_t found[] = {strlen(from), at ? (uint64_t)(at - from) : 999, last ? (uint64_t)(last - from) : 999,
                            (uint64_t)((char *)memchr(from, 0, length + 1) - from), strnlen(from, 77)};
        add(found, sizeof found);
        memmove(q - 13, from, length + 1 < PAGE ? length + 1 : PAGE);
        int order = strcmp(q - 13, from) | memcmp(q - 13, from, length + 1);
        add(&order, sizeof order);
        memset(q + 100, (int)length, length);
        add(q + 100, length);
    }
    printf("%016llx\n", (unsigned long long)digest);
}

/* Sixteen registers from `in`, system calls `call` while they are there, and the registers to `out`. */
static __attribute__((noinline)) void hold(const __m256i in[16], __m256i out[16], long call, long argument, unsigned times)
{
    __asm__ volatile(
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu 32*\\n(%[in]), %%ymm\\n\n .endr\n"
        "1: mov %[call], %%rax\n mov %[argument], %%rdi\n xor %%esi, %%esi\n xor %%edx, %%edx\n syscall\n dec %[times]\n jnz 1b\n"
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu %%ymm\\n, 32*\\n(%[out])\n .endr\n"
        : [times] "+r"(times)
        : [in] "r"(in), [out] "r"(out), [call] "r"(call), [argument] "r"(argument)
        : "rax", "rdi", "rsi", "rdx", "rcx", "r11", "memory");
    _mm256_zeroall();
}

static void switches(void)
{
    enum { PROCESSES = 3, ROUNDS = 50, YIELD = 24 };
    for (unsigned n = 0; n < PROCESSES; n++)
        if (fork() == 0) {
            __m256i in[16], out[16];
            seed = 1000 + n;
            for (unsigned round = 0; round < ROUNDS; round++) {
                for (unsigned i = 0; i < 16; i++)
                    in[i] = n == 2 ? _mm256_setr_epi64x((long long)any(), 1, 0, 0) : vector(); /* one of them without upper halves */
                hold(in, out, YIELD, 0, 20);
                if (memcmp(in, out, sizeof in))
                    _exit(1);
            }
            _exit(0);
        }
    int status, bad = 0;
    for (unsigned n = 0; n < PROCESSES; n++)
        bad |= wait(&status) < 0 || status;
    printf("%s\n", bad ? "registers changed" : "kept");
}

/* hold() without calls: the registers are there while the program computes, so that it is stopped with full ones. */
static __attribute__((noinline)) void compute(const __m256i in[16], __m256i out[16], unsigned times)
{
    __asm__ volatile(
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu 32*\\n(%[in]), %%ymm\\n\n .endr\n"
        "1: dec %[times]\n jnz 1b\n"
        ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqu %%ymm\\n, 32*\\n(%[out])\n .endr\n"
        : [times] "+r"(times)
        : [in] "r"(in), [out] "r"(out)
        : "memory");
    _mm256_zeroall();
}

/* One of three: full registers; without upper halves, which are then in their initial state; all in their initial state but
 * MXCSR. Each has an MXCSR of its own, without flags, and computes nothing that would raise one. */
static int keep(unsigned n, const char *file, volatile unsigned *rounds)
{
    enum { ACCESS = 21 };
    static const unsigned controls[3] = {0x1F80, 0x3F80 /* rounds down */, 0xFFC0 /* flushes to zero, and denormals are; rounds to zero */};
    __m256i in[16], out[16];
    seed = 7 + n;
    _mm_setcsr(controls[n]);
    do {
        for (unsigned i = 0; i < 16; i++)
            in[i] = n == 0 ? vector() : n == 1 ? _mm256_setr_epi64x((long long)any(), 1, 0, 0) : _mm256_setzero_si256();
        hold(in, out, ACCESS, (long)file, 1);
        if (memcmp(in, out, sizeof in) || _mm_getcsr() != controls[n])
            return 1;
        compute(in, out, 100000);
        if (memcmp(in, out, sizeof in) || _mm_getcsr() != controls[n])
            return 1;
        ++*rounds;
    } while (access(file, F_OK) != 0);
    return 0;
}

static int live(const char *file, const char *told)
{
    enum { PROCESSES = 3 };
    volatile unsigned *rounds = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int out = open(told, O_WRONLY | O_CREAT | O_TRUNC, 0600), bad = 0, ended = 0;
    if (rounds == MAP_FAILED || out < 0)
        return 1;
    for (unsigned n = 0; n < PROCESSES; n++)
        if (fork() == 0)
            _exit(keep(n, file, rounds + n));
    while (ended < PROCESSES) {
        char text[64];
        int size = snprintf(text, sizeof text, "%010u %010u %010u\n", rounds[0], rounds[1], rounds[2]), status;
        if (pwrite(out, text, (size_t)size, 0) != size)
            return 1;
        pid_t pid;
        while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
            ended++;
            if (status && !bad)
                puts("registers changed");
            fflush(stdout);
            bad |= status;
        }
        usleep(20000);
    }
    if (!bad)
        puts("kept");
    return 0;
}

int main(int count, char **arguments)
{
    const char *name = count > 1 ? arguments[1] : "";
    if (!strcmp(name, "results"))
        results();
    else if (!strcmp(name, "strings"))
        strings();
    else if (!strcmp(name, "switches"))
        switches();
    else if (!strcmp(name, "live") && count > 3)
        return live(arguments[2], arguments[3]);
    else
        return 2;
    return 0;
}
