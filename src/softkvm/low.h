/*
 * Memory below 2 GiB for what translated code addresses by 32-bit displacements: a vCPU's context and TLB.
 * Where there is no room it comes from elsewhere, and that vCPU is not translated.
 */
#ifndef SOFTKVM_LOW_H
#define SOFTKVM_LOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zeroed pages, or NULL. */
void *low_alloc(size_t size);
void low_free(void *p, size_t size);
static inline bool low_is(const void *p, size_t size)
{
	return (uintptr_t)p < 0x7fffffff && size < 0x7fffffff - (uintptr_t)p;
}

#endif
