/*
 * The MMU: guest linear memory. Fast paths are inline TLB hits; everything else is in access.c,
 * walk.c, tlb.c and phys.c.
 *
 * Unless said otherwise, functions raise the architectural fault (never returning) when the access
 * is not allowed: #PF from the page tables, #GP/#SS for non-canonical addresses (#SS when
 * cpu->cur is a stack access), #AC, #DB traps for data breakpoints are recorded. Sizes: 1..64 for
 * single accesses. Accesses that hit MMIO go through the MMIO log (cpu.h) and may leave KVM_RUN.
 * Linear addresses outside 64-bit mode are already truncated to 32 bits by the caller (seg_lin).
 */
#ifndef SOFTKVM_MMU_H
#define SOFTKVM_MMU_H

#include "softkvm/cpu.h"
#include "softkvm/ram.h"

enum access { ACC_READ, ACC_WRITE, ACC_EXEC, ACC_RMW /* read, then written: needs write permission */ };

/* -- slow paths (access.c) -------------------------------------------------------------------- */
void mem_read_slow(struct cpu *c, uint64_t lin, void *buf, unsigned size);
void mem_write_slow(struct cpu *c, uint64_t lin, const void *buf, unsigned size);
/* Any length up to 4096; may cross a page. */
void mem_read(struct cpu *c, uint64_t lin, void *buf, unsigned len);
void mem_write(struct cpu *c, uint64_t lin, const void *buf, unsigned len);
/* Implicit supervisor accesses: GDT, IDT, LDT, TSS, stack of an inner ring during delivery (`user` false). */
void mem_read_sys(struct cpu *c, uint64_t lin, void *buf, unsigned len);
void mem_write_sys(struct cpu *c, uint64_t lin, const void *buf, unsigned len);
/* Access as CPL `cpl` would make it (inner-ring stacks, far returns). */
void mem_read_cpl(struct cpu *c, unsigned cpl, uint64_t lin, void *buf, unsigned len);
void mem_write_cpl(struct cpu *c, unsigned cpl, uint64_t lin, const void *buf, unsigned len);
/* Fault if [lin, lin+len) is not accessible; no other effect than A/D bits. */
void mem_probe(struct cpu *c, uint64_t lin, unsigned len, enum access acc);
/*
 * Host address of [lin, lin+len) when it lies in one page of plain RAM with this access (writes:
 * no code in it), else NULL with no fault raised: then use mem_read/mem_write, which raise it.
 * The pointer is good until the next instruction boundary.
 */
void *mem_host(struct cpu *c, uint64_t lin, unsigned len, enum access acc);
/* As mem_host(ACC_RMW) for a locked operation, but raises faults; NULL: MMIO or page-split, then use mem_lock(). */
void *mem_rmw(struct cpu *c, uint64_t lin, unsigned size);
/* Serialise page-split or MMIO locked read-modify-writes against every vCPU; pairs; a fault in between unlocks. */
void mem_lock(struct cpu *c);
void mem_unlock(struct cpu *c);

/*
 * For translated code whose TLB check failed (fill.c): what mostly helps, without a look at the rest of the vCPU's state. Host address of
 * [lin, lin + size), size 1 to 4096, for a read or a write at the current privilege; the TLB has the page then, or both pages: where the host has them
 * side by side the address is the first one's. An operand to be read, of 64 bytes at most, is copied else: the address is the copy's, as much aligned, and good until the
 * next call; not with MMU_FILL_ITSELF added to the size. NULL: the slow path has to look. Leaves vector, x87 and MXCSR registers alone.
 */
#define MMU_FILL_ITSELF 0x2000u
uint8_t *mmu_fill_r(struct cpu *c, uint64_t lin, uint64_t size);
uint8_t *mmu_fill_w(struct cpu *c, uint64_t lin, uint64_t size);

/* -- fast paths ------------------------------------------------------------------------------- */
static inline void *tlb_hit_r(struct cpu *c, uint64_t lin, unsigned size)
{
	const struct tlb_entry *e = &c->tlb->r[tlb_index(lin)];
	uint64_t in_page = lin ^ e->tag;
	uintptr_t p = e->host + in_page;

	if (unlikely(in_page > 4096 - size))
		return NULL;
	if (!p)
		__builtin_unreachable();        /* spares the caller's second test */
	return (void *)p;
}

static inline void *tlb_hit_w(struct cpu *c, uint64_t lin, unsigned size)
{
	const struct tlb_entry *e = &c->tlb->w[tlb_index(lin)];
	uint64_t in_page = lin ^ e->tag;
	uintptr_t p = e->host + in_page;

	if (unlikely(in_page > 4096 - size))
		return NULL;
	if (!p)
		__builtin_unreachable();        /* spares the caller's second test */
	return (void *)p;
}

#define MMU_LDST(bits)                                                                              \
	static inline uint##bits##_t mem_ld##bits(struct cpu *c, uint64_t lin)                      \
	{                                                                                           \
		uint##bits##_t v;                                                                   \
		void *p = tlb_hit_r(c, lin, bits / 8);                                              \
		if (likely(p)) v = ram_ld##bits(p);                                       \
		else mem_read_slow(c, lin, &v, bits / 8);                                           \
		return v;                                                                           \
	}                                                                                           \
	static inline void mem_st##bits(struct cpu *c, uint64_t lin, uint##bits##_t v)              \
	{                                                                                           \
		void *p = tlb_hit_w(c, lin, bits / 8);                                              \
		if (likely(p)) ram_st##bits(p, v);                                        \
		else mem_write_slow(c, lin, &v, bits / 8);                                          \
	}
MMU_LDST(8)
MMU_LDST(16)
MMU_LDST(32)
MMU_LDST(64)

/* -- instruction fetch (walk.c) --------------------------------------------------------------- */
/* Page of code for a fetch at `lin` at the current CPL; raises #PF etc. `host` is NULL for MMIO or no memory. */
struct code_page { uint64_t gpa; const uint8_t *host; _Atomic uint32_t *ver; _Atomic uint64_t *lines; };
void mmu_fetch(struct cpu *c, uint64_t lin, struct code_page *out);
/*
 * Code versions: `ver` of a page is even while nothing is decoded from it. mmu_code_mark() makes it
 * odd, revokes every vCPU's write entries for the page and returns the value a block must remember;
 * call it BEFORE reading the bytes. It may stop the world, so no lock may be held. Any later store to
 * lines given to mmu_code_lines() changes the value. A block is good while *ver equals what it remembers.
 */
uint32_t mmu_code_mark(struct cpu *c, const struct code_page *p);
/*
 * Something was made of the bytes [off, off + len) of a marked page, or is about to be: stores there change the version,
 * those to other lines of 64 bytes need not. True: some of that is new, or a store was under way, so bytes that were read before the call
 * have to be compared. It may stop the world.
 */
bool mmu_code_lines(struct cpu *c, const struct code_page *p, unsigned off, unsigned len);

/* -- TLB maintenance (tlb.c) ------------------------------------------------------------------ */
int mmu_cpu_init(struct cpu *c);
void mmu_cpu_free(struct cpu *c);
void mmu_flush_all(struct cpu *c);              /* global entries too; own thread */
void mmu_flush_nonglobal(struct cpu *c);
void mmu_drop_data(struct cpu *c);              /* the TLB of data only, own thread: not architectural, for lockstep */
/* A CR3 write; `keep`: bit 63 was set, so what is known of the new PCID still stands. Sets cpu->cr3. */
void mmu_switch(struct cpu *c, uint64_t cr3, bool keep);
void mmu_flush_pcid(struct cpu *c, unsigned pcid);      /* INVPCID of one, any kind: not its global entries */
void mmu_flush_pcids(struct cpu *c);                    /* of all, but global entries */
void mmu_flush_page(struct cpu *c, uint64_t lin);
void mmu_select(struct cpu *c);                 /* set cpu->tlb from cpl, SMAP, AC */
/* Linear to physical without faults or A/D updates, for KVM_TRANSLATE and the debugger: false if not mapped. */
bool mmu_translate(struct cpu *c, uint64_t lin, uint64_t *gpa, bool *writable, bool *user);
/* PAE: load the four PDPTEs from CR3; false (load nothing) when reserved bits are set. */
bool mmu_load_pdptes(struct cpu *c, uint64_t cr3);
/* Bits of a guest physical address that must be zero (from CPUID MAXPHYADDR). */
uint64_t mmu_rsvd_mask(const struct cpu *c);

/*
 * The running instruction (or one iteration of a string instruction) is complete and cpu->rip settled: forget
 * the log. True: a posted write must be handed to user space, kvm_run is filled in, leave KVM_RUN with
 * RUN_EXIT. A string instruction stops iterating when mmio_pending() after an iteration.
 */
bool mmio_commit(struct cpu *c);
static inline void mmio_reset(struct cpu *c) { c->mmio.n = c->mmio.replay = 0; c->mmio.waiting = c->mmio.of_event = false; }
static inline bool mmio_pending(const struct cpu *c) { return c->mmio.n != 0; }
/* On entry to KVM_RUN: take the result of the MMIO exit from kvm_run. True when another posted write must
 * be handed out first (kvm_run is filled in). */
bool mmio_complete(struct cpu *c);

#endif
