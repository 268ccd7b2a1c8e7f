/*
 * Code and stores: page versions, lines of 64 bytes, and who holds write entries.
 *
 * Of a page with VER_CODE no vCPU has a write entry, so every store to it comes by tlb_grant_write(). It changes the
 * version only where it touches a line that something was decoded from (slot->lines): data beside code costs a look
 * at the bits (translated code: fill.c), no more. Which lines count is said before the bytes are read, or the bytes are compared afterwards
 * (mmu_code_lines()). A page that is written again and again without being executed is granted, its code forgotten.
 *
 * Two vCPUs. One decodes or compares: it takes the version, sets the lines' bits, then compares the bytes. One stores: it
 * raises cpu->code_store, looks at the bits, changes the version if they are set, stores, and lowers the flag some time
 * after the instruction. So the version may be the new one while the bytes are still the old. Whoever finds the flag of
 * another vCPU raised, be the bits new or not, stops the world once: then that store is done, and the comparison sees it.
 */
#include <stdatomic.h>

#include "softkvm/mmu/phys.h"
#include "softkvm/mmu/tlb.h"

#define HITS_MAX 3              /* stores over code before the page is granted */

/* -- write entries ------------------------------------------------------------------------------ */
static bool revoke_at(struct cpu *c, unsigned mode, unsigned i, uintptr_t host)
{
	struct tlb_entry *e = &c->tlbs[mode]->w[i];

	if (e->tag == tlb_empty_tag(i) || e->host != host)
		return false;
	e->tag = tlb_empty_tag(i);
	tlb_writer_gone(c, host);
	return true;
}

/* None of this host page, for sure: none with its hash, or as many as were counted. */
static bool none_left(struct cpu *c, uintptr_t host)
{
	const uint64_t *known = tlb_writers_known(c, host);

	return !(uint32_t)atomic_load_explicit(tlb_writers_of(c, host), memory_order_relaxed) || (known && !(*known & 4095));
}

static void revoke_everywhere(struct cpu *c, uintptr_t host)
{
	for (unsigned m = 0; m < TLB_NONE; m++)
		for (unsigned k = 0; k < TLB_WORDS; k++)
			for (uint64_t b = tlb_full(c->tlbs[m])->filled[1][k]; b; b &= b - 1)
				if (revoke_at(c, m, k * 64 + (unsigned)__builtin_ctzll(b), host) && none_left(c, host))
					return;
}

void tlb_revoke_write(struct cpu *c, const uint8_t *host_page)
{
	uintptr_t host = (uintptr_t)host_page;
	uint64_t v = atomic_load(tlb_writers_of(c, host));

	for (unsigned m = 0; m < TLB_NONE; m++)         /* mostly it is where it was entered last */
		revoke_at(c, m, (unsigned)(v >> 32), host);
	if (!none_left(c, host))
		revoke_everywhere(c, host);
	c->itlb->writers.known[tlb_writer_hash(host)] = host;
}

static bool has_writers(struct cpu *c, const uint8_t *host_page)
{
	return (uint32_t)atomic_load(tlb_writers_of(c, (uintptr_t)host_page));
}

/* No vCPU keeps a write entry for the page, which has just become code. */
static void revoke_all(struct cpu *c, const uint8_t *host_page)
{
	struct vm *vm = c->vm;
	unsigned n = atomic_load(&vm->ncpus);
	bool others = false;

	tlb_revoke_write(c, host_page);
	for (unsigned i = 0; i < n; i++) {
		struct cpu *o = atomic_load(&vm->cpus[i]);

		others |= o && o != c && has_writers(o, host_page);
	}
	if (!others)
		return;
	vm_pause_all(vm, c);
	for (unsigned i = 0; i < n; i++) {
		struct cpu *o = atomic_load(&vm->cpus[i]);

		if (o)
			tlb_revoke_write(o, host_page);
	}
	vm_resume_all(vm, c);
}

/* -- stores ------------------------------------------------------------------------------------- */
/* What a store to a page with code does to its version `v`: v itself where it touches none of the code. */
static uint32_t after_store(struct cpu *c, struct slot *s, uint64_t page, uint32_t v, uint64_t lines, unsigned len)
{
	struct itlb *t = c->itlb;

	if (t->smc_ver != &s->ver[page]) {
		t->smc_ver = &s->ver[page];
		t->smc_hits = t->smc_near = 0;
	}
	if (atomic_load_explicit(&s->lines[page], memory_order_relaxed) & lines) {
		if (++t->smc_hits > HITS_MAX || len >= 512)
			return ver_granted(ver_next(v));
		return ver_next(v) | VER_CODE;
	}
	t->smc_near += CODE_NEAR_SLOW;
	return t->smc_near > CODE_NEAR_MAX ? ver_granted(ver_next(v)) : v;
}

bool tlb_grant_write(struct cpu *c, struct slot *s, uint64_t gpa, unsigned len, bool counted)
{
	uint64_t page = (gpa - s->gpa) >> 12, lines = page_lines(gpa & 4095, len);
	bool several = atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed) > 1;
	_Atomic uint32_t *ver = &s->ver[page];
	uint32_t v, next;

	if (several && !counted)        /* nobody would wait for us otherwise */
		atomic_exchange(&c->code_store, true);
	v = atomic_load(ver);
	do {
		if (several && (v & VER_CODE))
			atomic_exchange(&c->code_store, true);
		if (v & VER_GRANTED)
			return true;
		next = v & VER_CODE ? after_store(c, s, page, v, lines, len) : ver_granted(v);
		if (next == v)
			return false;
	} while (!atomic_compare_exchange_weak(ver, &v, next));
	/* Nobody decodes from the page yet: who does must wait for us, who have been counted. */
	if ((v & VER_CODE) && (next & VER_GRANTED) && counted)
		atomic_store(&s->lines[page], 0);
	if (v & VER_CODE) {
		c->stats.code_invalidations++;
		if (c->cur)
			cpu_leave_after(c);
	}
	return next & VER_GRANTED;
}

/* -- decoding ----------------------------------------------------------------------------------- */
uint32_t mmu_code_mark(struct cpu *c, const struct code_page *p)
{
	uint32_t v = atomic_load_explicit(p->ver, memory_order_acquire);

	if (c->itlb->smc_ver == p->ver)
		c->itlb->smc_hits = c->itlb->smc_near = 0;
	for (;;) {
		if (v & VER_ASLEEP) {
			watch_wake(c->vm, p->ver);
			v = atomic_load_explicit(p->ver, memory_order_acquire);
			continue;
		}
		if (!(v & VER_CODE)) {
			if (!atomic_compare_exchange_weak(p->ver, &v, ver_code(v)))
				continue;
			v = ver_code(v);
		}
		if (!(v & VER_REVOKING))
			return v;
		/* Write entries may be left, whoever began with them: stores by those would go unnoticed. */
		revoke_all(c, p->host);
		if (atomic_compare_exchange_strong(p->ver, &v, v & ~VER_REVOKING))
			return v & ~VER_REVOKING;
	}
}

/* Has another vCPU a store under way? Then wait until it is done. */
static bool wait_for_stores(struct cpu *c)
{
	unsigned n = atomic_load(&c->vm->ncpus);
	bool storing = false;

	for (unsigned i = 0; i < n; i++) {
		struct cpu *o = atomic_load(&c->vm->cpus[i]);

		storing |= o && o != c && atomic_load(&o->code_store);
	}
	if (storing) {
		vm_pause_all(c->vm, c);
		vm_resume_all(c->vm, c);
	}
	return storing;
}

bool mmu_code_lines(struct cpu *c, const struct code_page *p, unsigned off, unsigned len)
{
	uint64_t lines = page_lines(off, len);
	bool compare = false;

	do {
		if (~atomic_load(p->lines) & lines)
			compare |= (~atomic_fetch_or(p->lines, lines) & lines) != 0;
		compare |= wait_for_stores(c);
		/* That store may have been the one which forgot the page's code, after somebody else made it code again. */
	} while (~atomic_load(p->lines) & lines);
	return compare;
}
