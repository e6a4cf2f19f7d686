/* What the guests of tests.bench share: what their compiler may call, memory, and how they tell their result. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

/* To port 0xe9. */
static inline void put(char c) { __asm__ volatile("outb %0, %1" : : "a"(c), "Nd"((unsigned short)0xe9)); }

/* The compiler may call these. */
void *memcpy(void *to, const void *from, u64 n) { void *r = to; __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory"); return r; }
void *memset(void *to, int c, u64 n) { void *r = to; __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(c) : "memory"); return r; }

#define HEAP ((u8 *)0x4000000)   /* 64 MiB on, in large pages */
#define SMALL ((u8 *)0x40000000) /* the same in 4 KiB pages */

/* The result in hexadecimal, after the "S" of the start, and "E". */
static inline void end(u64 result)
{
    for (int shift = 60; shift >= 0; shift -= 4)
        put("0123456789abcdef"[result >> shift & 15]);
    put('E');
}

#endif
