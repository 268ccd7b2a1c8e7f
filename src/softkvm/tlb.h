/*
 * Soft TLB: per privilege mode a direct-mapped table of reads and one of writes.
 *
 * An entry says: linear page `tag` is plain RAM whose first byte is at `host`, and an access of this
 * kind at this privilege needs nothing but the access. A write entry exists only when the guest PTE
 * is dirty, the page's dirty-log bit is set and the page holds no decoded code. One compare checks
 * tag and page crossing: (lin ^ tag) <= 4096 - size; the byte is at host + (lin ^ tag). An empty entry at index k has a tag whose index
 * bits are not k, so it can match no address that is looked up there; zeroed memory is empty but for
 * index 0.
 */
#ifndef SOFTKVM_TLB_H
#define SOFTKVM_TLB_H

#include <stdint.h>

#define TLB_BITS 12
#define TLB_ENTRIES (1u << TLB_BITS)

/* Tables by privilege: user pages are visible to the kernel only with SMAP off or AC set. */
/* TLB_NONE stays empty: every access is slow (alignment checks). */
enum { TLB_KERNEL, TLB_KERNEL_AC, TLB_USER, TLB_NONE, TLB_MODES };

struct tlb_entry { uint64_t tag; uint64_t host; };

struct tlb {
	struct tlb_entry r[TLB_ENTRIES];
	struct tlb_entry w[TLB_ENTRIES];
};

static inline unsigned tlb_index(uint64_t lin) { return (lin >> 12) & (TLB_ENTRIES - 1); }
static inline uint64_t tlb_empty_tag(unsigned index) { return index ? 0 : 4096; }

#endif
