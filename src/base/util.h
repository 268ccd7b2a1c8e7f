/* Small things everybody needs and the C library lacks. */
#ifndef BASE_UTIL_H
#define BASE_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ALIGN_UP(x, a) (((x) + ((a) - 1)) & ~((__typeof__(x))(a) - 1))
#define ALIGN_DOWN(x, a) ((x) & ~((__typeof__(x))(a) - 1))
#define BIT(n) (1ULL << (n))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* True when [a, a+len) wraps or does not lie inside [0, size). */
static inline bool range_bad(uint64_t a, uint64_t len, uint64_t size)
{
	return len > size || a > size - len;
}

/* True when [a, a+alen) and [b, b+blen) share a byte. Lengths must not wrap. */
static inline bool ranges_overlap(uint64_t a, uint64_t alen, uint64_t b, uint64_t blen)
{
	return alen && blen && a <= b + (blen - 1) && b <= a + (alen - 1);
}

/* Unaligned little-endian loads and stores; the host is x86, so these are plain moves. */
#define UTIL_LE(bits)                                                                       \
	static inline uint##bits##_t ld_le##bits(const void *p)                             \
	{ uint##bits##_t v; memcpy(&v, p, sizeof v); return v; }                             \
	static inline void st_le##bits(void *p, uint##bits##_t v) { memcpy(p, &v, sizeof v); }
UTIL_LE(16)
UTIL_LE(32)
UTIL_LE(64)
#undef UTIL_LE

#endif
