/* The soft TLB's upkeep: entering, flushing, revoking; code marks; instruction fetch. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "softkvm/low.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/mmu/tlb.h"

static void table_clear(struct cpu *c, struct tlb_full *f, int write)
{
	for (unsigned w = 0; w < TLB_WORDS; w++) {
		for (uint64_t m = f->filled[write][w]; m; m &= m - 1)
			tlb_drop(c, f, write, w * 64 + (unsigned)__builtin_ctzll(m));
		f->filled[write][w] = f->global[write][w] = 0;
	}
}

int mmu_cpu_init(struct cpu *c)
{
	for (unsigned i = 0; i < TLB_MODES; i++) {
		struct tlb_full *f = low_alloc(sizeof *f);
		if (!f)
			return -ENOMEM;
		f->t.r[0].tag = f->t.w[0].tag = tlb_empty_tag(0);
		c->tlbs[i] = &f->t;
	}
	c->itlb = calloc(1, sizeof *c->itlb);
	c->tlb = c->tlbs[TLB_KERNEL];
	if (!c->itlb)
		return -ENOMEM;
	c->itlb->pwc_gen = 1;
	return 0;
}

void mmu_cpu_free(struct cpu *c)
{
	for (unsigned i = 0; i < TLB_MODES; i++)
		if (c->tlbs[i])
			low_free(tlb_full(c->tlbs[i]), sizeof(struct tlb_full));
	free(c->itlb);
}

unsigned tlb_mode_of(const struct cpu *c, struct walk_as as)
{
	if (as.user)
		return TLB_USER;
	return as.ac && (c->cr4 & CR4_SMAP) ? TLB_KERNEL_AC : TLB_KERNEL;
}

void mmu_select(struct cpu *c)
{
	unsigned m;

	if (c->cpl == 3)
		m = (c->cr0 & CR0_AM) && (c->eflags & FL_AC) ? TLB_NONE : TLB_USER;
	else
		m = (c->cr4 & CR4_SMAP) && (c->eflags & FL_AC) ? TLB_KERNEL_AC : TLB_KERNEL;
	c->tlb = c->tlbs[m];
}

void tlb_enter(struct cpu *c, unsigned mode, bool write, uint64_t lin, uint8_t *host, const struct walk *w)
{
	tlb_put(c, tlb_full(c->tlbs[mode]), write, lin, host, w->global, w->leaf_size);
}

uint8_t *tlb_phys(struct cpu *c, uint64_t gpa, bool *ro, struct slot **slot)
{
	struct slot *s = c->itlb->slot;

	if (unlikely(!s || gpa - s->gpa >= s->size)) {
		s = phys_slot(c->vm, gpa);
		if (!s)
			return NULL;
		c->itlb->slot = s;
	}
	*ro = s->flags & KVM_MEM_READONLY;
	*slot = s;
	return s->host + (gpa - s->gpa);
}

/* -- flushing ---------------------------------------------------------------------------------- */
void pwc_flush(struct itlb *t)
{
	if (++t->pwc_gen == BIT(PWC_GEN_BITS)) {
		memset(t->pwc, 0, sizeof t->pwc);
		t->pwc_gen = 1;
	}
}

/* Code found by linear address at this privilege must be looked up again. */
static void fetch_changed(struct cpu *c, int user)
{
	c->fetch_gen[user] = ++c->itlb->last_gen;       /* an old value may come back: mmu_switch() */
	memset(c->itlb->fetched[user], 0, sizeof c->itlb->fetched[user]);
	if (!user)
		c->itlb->sup_nonglobal = false;
}

/* Code of address spaces that the guest left must be looked up again: those of this PCID, or all. */
static void left_forget(struct itlb *t, bool all, unsigned pcid)
{
	for (unsigned i = 0; i < ARRAY_SIZE(t->left); i++)
		if (all || (t->left[i].cr3 & 0xfff) == pcid)
			t->left[i].valid = false;
}

static void itlb_clear(struct cpu *c, bool global_too)
{
	struct itlb *t = c->itlb;

	for (unsigned g = 0; g <= global_too; g++)
		for (unsigned w = 0; w < ITLB_ENTRIES / 64; w++) {
			for (uint64_t m = t->filled[g][w]; m; m &= m - 1)
				t->e[w * 64 + (unsigned)__builtin_ctzll(m)].key = 0;
			t->filled[g][w] = 0;
		}
	pwc_flush(t);
	fetch_changed(c, 1);
	if (global_too || t->sup_nonglobal)
		fetch_changed(c, 0);
}

void mmu_drop_data(struct cpu *c)
{
	for (unsigned i = 0; i < TLB_NONE; i++) {
		table_clear(c, tlb_full(c->tlbs[i]), 0);
		table_clear(c, tlb_full(c->tlbs[i]), 1);
	}
	pwc_flush(c->itlb);
}

void mmu_flush_all(struct cpu *c)
{
	for (unsigned i = 0; i < TLB_NONE; i++) {
		table_clear(c, tlb_full(c->tlbs[i]), 0);
		table_clear(c, tlb_full(c->tlbs[i]), 1);
	}
	itlb_clear(c, true);
	c->itlb->slot = NULL;
	c->itlb->user_global = false;
	left_forget(c->itlb, true, 0);
	memset(c->itlb->large2m, 0, sizeof c->itlb->large2m);
	memset(c->itlb->large1g, 0, sizeof c->itlb->large1g);
	c->stats.tlb_flushes++;
}

static void table_clear_nonglobal(struct cpu *c, struct tlb_full *f, int write)
{
	for (unsigned w = 0; w < TLB_WORDS; w++) {
		uint64_t m = f->filled[write][w] & ~f->global[write][w];

		if (!m)
			continue;
		f->filled[write][w] &= f->global[write][w];
		for (; m; m &= m - 1)
			tlb_drop(c, f, write, w * 64 + (unsigned)__builtin_ctzll(m));
	}
}

void mmu_flush_nonglobal(struct cpu *c)
{
	for (unsigned i = 0; i < TLB_NONE; i++) {
		table_clear_nonglobal(c, tlb_full(c->tlbs[i]), 0);
		table_clear_nonglobal(c, tlb_full(c->tlbs[i]), 1);
	}
	itlb_clear(c, false);
	c->stats.tlb_flushes++;
}

static void left_save(struct itlb *t, uint64_t cr3, uint32_t gen)
{
	unsigned i = 0;

	while (i < ARRAY_SIZE(t->left) && !(t->left[i].valid && t->left[i].cr3 == cr3))
		i++;
	if (i == ARRAY_SIZE(t->left))
		i = t->next_left++ % ARRAY_SIZE(t->left);
	t->left[i].cr3 = cr3;
	t->left[i].gen = gen;
	t->left[i].valid = true;
	memcpy(t->left[i].fetched, t->fetched[1], sizeof t->fetched[1]);
}

void mmu_switch(struct cpu *c, uint64_t cr3, bool keep)
{
	struct itlb *t = c->itlb;
	bool pcids = c->cr4 & CR4_PCIDE;

	if (pcids && !t->user_global)
		left_save(t, c->cr3, c->fetch_gen[1]);
	if (!keep)
		left_forget(t, !pcids, cr3 & 0xfff);
	c->cr3 = cr3;
	mmu_flush_nonglobal(c);
	for (unsigned i = 0; keep && i < ARRAY_SIZE(t->left); i++)
		if (t->left[i].valid && t->left[i].cr3 == cr3) {
			c->fetch_gen[1] = t->left[i].gen;
			t->left[i].valid = false;       /* what is flushed from now on is not known there; leaving it again says so anew */
			memcpy(t->fetched[1], t->left[i].fetched, sizeof t->fetched[1]);
			break;
		}
}

void mmu_flush_pcid(struct cpu *c, unsigned pcid)
{
	left_forget(c->itlb, false, pcid);
	if (!(c->cr4 & CR4_PCIDE) || pcid == (c->cr3 & 0xfff))
		mmu_flush_nonglobal(c);
}

void mmu_flush_pcids(struct cpu *c)
{
	left_forget(c->itlb, true, 0);
	mmu_flush_nonglobal(c);
}

/* All entries for the 2 MiB around `lin`: 512 neighbours in each table. */
static void flush_2m(struct cpu *c, uint64_t lin)
{
	unsigned first = tlb_index(lin & ~(BIT(21) - 1));
	struct itlb *t = c->itlb;
	uint64_t fetched[2] = { 0, 0 };

	for (unsigned m = 0; m < TLB_NONE; m++)
		for (int w = 0; w < 2; w++) {
			struct tlb_full *f = tlb_full(c->tlbs[m]);

			for (unsigned k = first / 64; k < first / 64 + 8; k++)
				for (uint64_t b = f->filled[w][k]; b; b &= b - 1) {
					unsigned i = k * 64 + (unsigned)__builtin_ctzll(b);

					if (!((tlb_table(&f->t, w)[i].tag ^ lin) >> 21))
						tlb_drop(c, f, w, i);
				}
		}
	for (unsigned i = 0; i < ITLB_ENTRIES; i++)
		if (!((t->e[i].key ^ lin) >> 21))
			t->e[i].key = 0;
	for (unsigned u = 0; u < 2; u++) {
		for (unsigned k = 0; k < 8; k++)
			fetched[u] |= t->fetched[u][itlb_word(lin & ~(BIT(21) - 1)) + k];
		if (fetched[u])
			fetch_changed(c, (int)u);
	}
}

static void drop_page(struct cpu *c, uint64_t lin)
{
	unsigned i = tlb_index(lin);

	for (unsigned m = 0; m < TLB_NONE; m++)
		for (int w = 0; w < 2; w++)
			if (tlb_is_for(&tlb_table(c->tlbs[m], w)[i], lin))
				tlb_drop(c, tlb_full(c->tlbs[m]), w, i);
}

static void flush_4k(struct cpu *c, uint64_t lin)
{
	struct itlb_entry *e = &c->itlb->e[(lin >> 12) % ITLB_ENTRIES];

	drop_page(c, lin);
	if (!((e->key ^ lin) >> 12))
		e->key = 0;
	for (int u = 0; u < 2; u++)
		if (c->itlb->fetched[u][itlb_word(lin)] >> (lin >> 12 & 63) & 1)
			fetch_changed(c, u);
}

void mmu_flush_page(struct cpu *c, uint64_t lin)
{
	pwc_flush(c->itlb);
	if (c->itlb->user_global)
		left_forget(c->itlb, true, 0);
	if (tlb_hash_has(c->itlb->large1g, lin >> 30)) {
		mmu_flush_all(c);
	} else if (tlb_hash_has(c->itlb->large2m, lin >> 21)) {
		flush_2m(c, lin);
		if (!cpu_long(c) && !(c->cr4 & CR4_PAE))        /* 4 MiB pages */
			flush_2m(c, lin ^ BIT(21));
	} else {
		flush_4k(c, lin);
	}
}

/*
 * Systems rely on it: they change an entry without a flush, and what meets the old one here and the new one there must meet the new
 * one everywhere once it has faulted, or it is tried again for ever.
 */
void tlb_page_fault(struct cpu *c, uint64_t lin, uint32_t err, bool fetch)
{
	c->itlb->pwc[(lin >> 21) % PWC_ENTRIES].key = 0;
	if (fetch)
		flush_4k(c, lin);
	else
		drop_page(c, lin);
	cpu_raise_pf(c, lin, err & ~WALK_FAULT);
}

/* -- instruction fetch ------------------------------------------------------------------------ */

/* Canonical, or #GP(0): a fetch never raises #SS. */
static void check_fetch(struct cpu *c, uint64_t lin)
{
	if (cpu_long(c) && !cpu_canonical(c, lin))
		cpu_gp(c, 0);
}

void mmu_fetch(struct cpu *c, uint64_t lin, struct code_page *out)
{
	bool user = c->cpl == 3;
	unsigned i = itlb_index(lin);
	const struct code_page *have = itlb_fetch(c->itlb, lin, user);
	struct walk w;

	if (likely(have)) {
		*out = *have;
		return;
	}
	check_fetch(c, lin);
	uint32_t err = mmu_walk(c, lin, ACC_EXEC, (struct walk_as){ .user = user }, &w);
	if (err)
		tlb_page_fault(c, lin, err, true);
	/* Not before: what faults was not fetched, and need not change anything. */
	itlb_note(c->itlb, lin, user);

	struct slot *s;
	uint64_t gpa = w.gpa & ~4095ull;
	uint8_t *host = phys_ptr(c->vm, gpa, NULL, NULL, &s);
	*out = (struct code_page){ gpa, host, host ? &s->ver[(gpa - s->gpa) >> 12] : NULL, host ? &s->lines[(gpa - s->gpa) >> 12] : NULL };
	if (!host)
		return;
	if (!c->vm->client_tells_code)
		watch_enter(c->vm, out->ver);
	c->itlb->e[i] = (struct itlb_entry){ itlb_key(lin, user), *out };
	if (!user && !w.global)
		c->itlb->sup_nonglobal = true;
	if (user && w.global)
		c->itlb->user_global = true;
	c->itlb->filled[w.global][i / 64] |= 1ull << (i % 64);
	c->itlb->filled[!w.global][i / 64] &= ~(1ull << (i % 64));
	tlb_note_large(c, lin, w.leaf_size);
}
