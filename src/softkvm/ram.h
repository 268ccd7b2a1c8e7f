/*
 * Guest RAM at its host address, as a vCPU touches it. The one place that says how.
 *
 * Guests race: two vCPUs may load and store the same bytes at the same time, at any alignment, and what they see is
 * what the host CPU gives, which has the same memory model as the guest's (TSO). So an access of 1 to 8 bytes is one
 * volatile access of its size (one instruction, never torn where the architecture says so, never repeated or
 * merged), through types that promise no alignment and may alias anything. ThreadSanitizer must not see these races,
 * which are the guest's own affair, but has to see everything else in the engine: there the accessors are functions
 * without instrumentation. Locked and read-modify-write instructions are inline assembly, which it does not look at.
 */
#ifndef SOFTKVM_RAM_H
#define SOFTKVM_RAM_H

#ifdef __SSE2__
#include <emmintrin.h>
#endif
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__SANITIZE_THREAD__)
#define RAM_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RAM_TSAN 1
#endif
#endif
#ifdef RAM_TSAN
#define RAM_FN static __attribute__((noinline, unused, no_sanitize("thread")))
#else
#define RAM_FN static inline __attribute__((always_inline))
#endif

typedef uint8_t ram_u8 __attribute__((may_alias));
typedef uint16_t ram_u16 __attribute__((aligned(1), may_alias));
typedef uint32_t ram_u32 __attribute__((aligned(1), may_alias));
typedef uint64_t ram_u64 __attribute__((aligned(1), may_alias));

#define RAM_ACCESS(bits)                                                                        \
	RAM_FN uint##bits##_t ram_ld##bits(const void *p) { return *(const volatile ram_u##bits *)p; } \
	RAM_FN void ram_st##bits(void *p, uint##bits##_t v) { *(volatile ram_u##bits *)p = v; }
RAM_ACCESS(8)
RAM_ACCESS(16)
RAM_ACCESS(32)
RAM_ACCESS(64)
#undef RAM_ACCESS

#ifdef __SSE2__ /* not in what is compiled to leave vector registers alone (mmu/fill.c) */
RAM_FN __m128i ram_ld128(const void *p) { return _mm_loadu_si128(p); }
RAM_FN void ram_st128(void *p, __m128i v) { _mm_storeu_si128(p, v); }
#endif

/* Any length; overlap as memmove(); in no particular order. */
RAM_FN void ram_copy(void *to, const void *from, size_t len)
{
#ifdef RAM_TSAN
	if ((uintptr_t)to - (uintptr_t)from < len) {
		to = (char *)to + len - 1;
		from = (const char *)from + len - 1;
		__asm__ volatile("std\n\trep movsb\n\tcld" : "+D"(to), "+S"(from), "+c"(len) : : "memory", "cc");
	} else {
		__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(len) : : "memory");
	}
#else
	memmove(to, from, len);
#endif
}

RAM_FN bool ram_same(const void *ram, const void *own, size_t len)
{
#ifdef RAM_TSAN
	bool same;

	__asm__ volatile("cmpb %%al, %%al\n\trepe cmpsb" : "+D"(ram), "+S"(own), "+c"(len), "=@ccz"(same) : : "memory");
	return same;
#else
	return !memcmp(ram, own, len);
#endif
}

#endif
