/* What the files of mmu/ share about guest physical memory. */
#ifndef SOFTKVM_MMU_PHYS_H
#define SOFTKVM_MMU_PHYS_H

#include <stdatomic.h>

#include "softkvm/vm.h"

/*
 * A page's code version. VER_CODE: a block was decoded from it. VER_GRANTED: some vCPU may hold a
 * write entry for it; never set together with VER_CODE. VER_ASLEEP, only with VER_CODE: what was decoded may be used again
 * once the bytes were compared (watch.c). VER_REVOKING, never with VER_GRANTED: the page became code a moment ago, and write
 * entries may be left. The rest counts invalidations. A version with one of the last two bits is no block's.
 */
enum { VER_CODE = 1, VER_GRANTED = 2, VER_ASLEEP = 4, VER_REVOKING = 8, VER_STEP = 16 };

/* The version after the page was written. */
static inline uint32_t ver_next(uint32_t v) { return (v & ~(uint32_t)(VER_CODE | VER_ASLEEP)) + VER_STEP; }
/* The version where write entries may exist: not before the one that was code has been counted up. */
static inline uint32_t ver_granted(uint32_t v) { return (v & ~(uint32_t)VER_REVOKING) | VER_GRANTED; }
/* The version of a page that becomes code. */
static inline uint32_t ver_code(uint32_t v)
{
	return (v & ~(uint32_t)VER_GRANTED) | VER_CODE | (v & VER_GRANTED ? VER_REVOKING : 0);
}

/* The 64-byte lines of a page that [off, off + len) touches; len is not 0. */
static inline uint64_t page_lines(unsigned off, unsigned len)
{
	return (~0ull >> (63 - ((off + len - 1) >> 6))) & (~0ull << (off >> 6));
}

struct slot *phys_slot(struct vm *vm, uint64_t gpa);
/* The page was or is about to be written: blocks decoded from it die. */
void page_code_written(_Atomic uint32_t *ver);

/* The slot of that number (address space in the upper half), under vm->lock; NULL. */
struct slot *phys_slot_by_id(struct vm *vm, uint32_t id);
/* A page was marked in its slot's bitmap that was not before; `c` is the vCPU that wrote it, or NULL. */
void ring_push(struct vm *vm, struct cpu *c, const struct slot *s, uint64_t page);

/* -- watch.c: code of clients that write it without a word ------------------------------------------------------ */
/* The page is asleep: compare, and wake it up or change its version. */
void watch_wake(struct vm *vm, _Atomic uint32_t *ver);
/* The page enters an instruction TLB: compare. */
void watch_enter(struct vm *vm, _Atomic uint32_t *ver);
/* The slots change, with the world stopped: forget all pages. */
void watch_forget(struct vm *vm);
void watch_free(struct vm *vm);

#endif
