/*
 * Page walks. The entries are read and their A/D bits set with single atomic accesses to guest RAM,
 * as the processor does; a lost race walks again.
 */
#include <stdatomic.h>

#include "softkvm/mmu/phys.h"
#include "softkvm/mmu/tlb.h"
#include "softkvm/sys.h"

#define MAX_LEVELS 5

/* One step of a walk, remembered for the A/D update. */
struct step {
	void *pte;              /* host address */
	struct slot *slot;
	uint64_t gpa, val;
};

struct paging {
	unsigned levels;        /* of tables to read */
	bool wide;              /* 8-byte entries */
	bool nx, pae;
	uint64_t rsvd;          /* physical-address bits that must be zero */
};

uint64_t mmu_rsvd_mask(const struct cpu *c) { return walk_rsvd_mask(c); }

static struct paging paging_mode(const struct cpu *c)
{
	struct paging p = { .nx = c->efer & EFER_NXE, .rsvd = mmu_rsvd_mask(c) };

	if (cpu_long(c))
		p.levels = c->cr4 & CR4_LA57 ? 5 : 4, p.wide = true;
	else if (c->cr4 & CR4_PAE)
		p.levels = 2, p.wide = p.pae = true;   /* the PDPTEs are in registers */
	else
		p.levels = 2, p.nx = false;
	return p;
}

static bool pte_load(struct cpu *c, const struct paging *p, struct step *s)
{
	bool ro;

	s->pte = phys_ptr(c->vm, s->gpa, NULL, &ro, &s->slot);
	if (!s->pte)
		return false;
	if (ro)
		s->slot = NULL; /* no A/D updates */
	s->val = p->wide ? atomic_load_explicit((_Atomic uint64_t *)s->pte, memory_order_relaxed)
			 : atomic_load_explicit((_Atomic uint32_t *)s->pte, memory_order_relaxed);
	return true;
}

/* Set `bits` in the entry; false when somebody else changed it meanwhile. */
static bool pte_set(struct cpu *c, const struct paging *p, struct step *s, uint64_t bits)
{
	bool ok;

	if ((s->val & bits) == bits || !s->slot)
		return true;
	if (p->wide) {
		uint64_t old = s->val;
		ok = atomic_compare_exchange_strong((_Atomic uint64_t *)s->pte, &old, old | bits);
	} else {
		uint32_t old = (uint32_t)s->val;
		ok = atomic_compare_exchange_strong((_Atomic uint32_t *)s->pte, &old, old | (uint32_t)bits);
	}
	if (ok) {
		phys_mark_dirty(c->vm, c, s->slot, s->gpa);
		page_code_written(&s->slot->ver[(s->gpa - s->slot->gpa) >> 12]);
	}
	return ok;
}

/* Shift of the address bits below the entry at `level` (0 is the leaf table). */
static unsigned level_shift(const struct paging *p, unsigned level)
{
	return p->wide ? 12 + 9 * level : 12 + 10 * level;
}

/* Reserved bits of a present entry. */
static uint64_t pte_rsvd(const struct cpu *c, const struct paging *p, unsigned level, uint64_t e)
{
	bool leaf = level == 0 || (level <= 3 && (e & PTE_PS));
	uint64_t r = 0;

	if (!p->wide) {
		if (level == 1 && leaf && (c->cr4 & CR4_PSE))
			r = BIT(21) | (walk_phys_bits(c) < 40 ? (0xffull << 13) & ~((BIT(walk_phys_bits(c) - 32) - 1) << 13) : 0);
		return r;
	}
	r = p->rsvd;
	if (!p->nx)
		r |= PTE_NX;
	if (p->pae)
		r |= 0x7ffull << 52;
	if (level >= 3)
		r |= PTE_PS;
	if (level == 2 && (e & PTE_PS)) {
		if (!c->feat || !(c->feat->f80000001_edx & BIT(26)))
			r |= PTE_PS;
		r |= (BIT(30) - 1) & ~(BIT(13) - 1);
	}
	if (level == 1 && (e & PTE_PS))
		r |= (BIT(21) - 1) & ~(BIT(13) - 1);
	return r;
}

static bool is_leaf(const struct cpu *c, const struct paging *p, unsigned level, uint64_t e)
{
	if (level == 0)
		return true;
	if (!(e & PTE_PS))
		return false;
	return p->wide ? level <= 2 : level == 1 && (c->cr4 & CR4_PSE);
}

/* Error code of a fault with the P, RSVD, PK bits given. */
static uint32_t fault_code(const struct cpu *c, uint32_t bits, enum access acc, struct walk_as as)
{
	if (acc == ACC_WRITE || acc == ACC_RMW)
		bits |= PF_W;
	if (as.user)
		bits |= PF_U;
	if (acc == ACC_EXEC && ((c->cr4 & CR4_SMEP) || ((c->efer & EFER_NXE) && (c->cr4 & CR4_PAE))))
		bits |= PF_I;
	return bits | WALK_FAULT;
}

/* Where the walk starts; false: a PAE PDPTE is not present. */
static bool walk_root(const struct cpu *c, const struct paging *p, uint64_t lin, uint64_t *table)
{
	if (!p->pae) {
		*table = p->wide ? c->cr3 & 0x000ffffffffff000ull : c->cr3 & 0xfffff000u;
		return true;
	}
	uint64_t e = c->pdpte[(lin >> 30) & 3];
	*table = e & 0x000ffffffffff000ull;
	return e & PTE_P;
}

static uint64_t leaf_gpa(const struct paging *p, unsigned level, uint64_t e, uint64_t lin, uint64_t *size)
{
	uint64_t mask = (1ull << level_shift(p, level)) - 1;

	*size = mask + 1;
	if (p->wide)
		return (e & 0x000ffffffffff000ull & ~mask) | (lin & mask);
	uint64_t base = (e & 0xfffff000u) & ~mask;
	if (level == 1)
		base |= ((e >> 13) & 0xff) << 32;
	return base | (lin & mask);
}

/* Steps from the root to the leaf; `*level` is the leaf's. 0 or fault bits (PF_P, PF_RSVD). */
static uint32_t walk_down(struct cpu *c, const struct paging *p, uint64_t lin, struct step *st,
			  unsigned *level, unsigned *n, struct walk_rights *r, bool *fault)
{
	uint64_t table;

	*fault = true;
	*n = 0;
	*r = (struct walk_rights){ .w = true, .u = true };
	if (!walk_root(c, p, lin, &table))
		return 0;
	for (*level = p->levels - 1;; (*level)--) {
		struct step *s = &st[(*n)++];
		unsigned bits = p->wide ? 9 : 10;
		uint64_t idx = (lin >> level_shift(p, *level)) & ((1u << bits) - 1);

		s->gpa = table + idx * (p->wide ? 8 : 4);
		if (!pte_load(c, p, s) || !(s->val & PTE_P))
			return 0;
		if (s->val & pte_rsvd(c, p, *level, s->val))
			return PF_P | PF_RSVD;
		r->w &= !!(s->val & PTE_W);
		r->u &= !!(s->val & PTE_U);
		r->nx |= p->nx && (s->val & PTE_NX);
		if (is_leaf(c, p, *level, s->val))
			break;
		table = p->wide ? s->val & 0x000ffffffffff000ull : s->val & 0xfffff000u;
	}
	r->key = (unsigned)(st[*n - 1].val >> 59) & 15;
	*fault = false;
	return 0;
}

/* -- the page directory's entries, remembered (tlb.h) --------------------------------------------- */
static bool pwc_usable(const struct cpu *c) { return cpu_long(c) && cpu_paging(c); }

static void pwc_enter(struct cpu *c, uint64_t lin, const struct step *st, unsigned level, unsigned n, const struct walk_rights *r)
{
	struct itlb *t = c->itlb;
	uint64_t e = st[n - 1].val, gpa;
	struct pwc_entry new = { .key = pwc_key(t, lin) };
	bool leaf = level == 1, ro;

	if (level > 1)
		return;
	gpa = leaf ? e & 0x000fffffffe00000ull : st[n - 1].gpa & ~4095ull;
	new.host = tlb_phys(c, gpa, &ro, &new.slot);
	if (!new.host || ro || gpa >> 44 || (leaf && new.slot->size - (gpa - new.slot->gpa) < BIT(21)))
		return;
	new.gpa_page = (uint32_t)(gpa >> 12);
	if (leaf) {
		new.rights = (uint8_t)((r->w ? PWC_W : 0) | (r->u ? PWC_U : 0) | (r->nx ? PWC_NX : 0) | PWC_LEAF |
				       (e & PTE_D ? PWC_DIRTY : 0) | ((e & PTE_G) && (c->cr4 & CR4_PGE) ? PWC_GLOBAL : 0));
		new.pkey = (uint8_t)r->key;
	} else {
		bool wr = true, us = true, nx = false;

		for (unsigned k = 0; k + 1 < n; k++) {
			wr &= !!(st[k].val & PTE_W);
			us &= !!(st[k].val & PTE_U);
			nx |= (c->efer & EFER_NXE) && (st[k].val & PTE_NX);
		}
		new.rights = (uint8_t)((wr ? PWC_W : 0) | (us ? PWC_U : 0) | (nx ? PWC_NX : 0));
	}
	t->pwc[(lin >> 21) % PWC_ENTRIES] = new;
}

/* The page's entry is all that must be read. False: the whole walk must say. */
static bool walk_remembered(struct cpu *c, uint64_t lin, enum access acc, struct walk_as as, struct walk *w)
{
	const struct pwc_entry *e = &c->itlb->pwc[(lin >> 21) % PWC_ENTRIES];
	bool write = acc == ACC_WRITE || acc == ACC_RMW, dirty;
	struct walk_rights r = { .w = e->rights & PWC_W, .u = e->rights & PWC_U, .nx = e->rights & PWC_NX, .key = e->pkey };

	if (e->key != pwc_key(c->itlb, lin))
		return false;
	if (e->rights & PWC_LEAF) {
		dirty = e->rights & PWC_DIRTY;
		if ((write && !dirty) || walk_check(c, &r, acc, as))
			return false;
		w->gpa = ((uint64_t)e->gpa_page << 12) + (lin & (BIT(21) - 1));
		w->leaf_size = BIT(21);
		w->global = e->rights & PWC_GLOBAL;
	} else {
		struct paging p = { .levels = 4, .wide = true, .nx = c->efer & EFER_NXE, .rsvd = mmu_rsvd_mask(c) };
		unsigned off = (lin >> 12 & 511) * 8;
		struct step s = { .pte = e->host + off, .slot = e->slot, .gpa = ((uint64_t)e->gpa_page << 12) + off };

		s.val = atomic_load_explicit((_Atomic uint64_t *)s.pte, memory_order_relaxed);
		if (!(s.val & PTE_P) || (s.val & pte_rsvd(c, &p, 0, s.val)))
			return false;
		r.w &= !!(s.val & PTE_W);
		r.u &= !!(s.val & PTE_U);
		r.nx |= p.nx && (s.val & PTE_NX);
		r.key = (unsigned)(s.val >> 59) & 15;
		if (walk_check(c, &r, acc, as) || !pte_set(c, &p, &s, PTE_A | (write ? PTE_D : 0)))
			return false;
		dirty = write || (s.val & PTE_D);
		w->gpa = (s.val & 0x000ffffffffff000ull) | (lin & 4095);
		w->leaf_size = 4096;
		w->global = (s.val & PTE_G) && (c->cr4 & CR4_PGE);
	}
	w->writable = dirty && !walk_check(c, &r, ACC_WRITE, as);
	w->user = r.u;
	return true;
}

uint32_t mmu_walk(struct cpu *c, uint64_t lin, enum access acc, struct walk_as as, struct walk *w)
{
	bool write = acc == ACC_WRITE || acc == ACC_RMW;

	if (!cpu_paging(c)) {
		*w = (struct walk){ .gpa = lin & 0xffffffffu, .leaf_size = ~0ull, .writable = true, .user = true };
		return 0;
	}
	if (pwc_usable(c) && walk_remembered(c, lin, acc, as, w))
		return 0;
	struct paging p = paging_mode(c);
	struct step st[MAX_LEVELS];
	struct walk_rights r;
	unsigned level, n;
	bool fault;

again:;
	uint32_t err = walk_down(c, &p, lin, st, &level, &n, &r, &fault);
	if (fault)
		return fault_code(c, err, acc, as);
	err = walk_check(c, &r, acc, as);
	if (err)
		return fault_code(c, err, acc, as);
	for (unsigned i = 0; i < n; i++) {
		uint64_t bits = PTE_A | (write && i == n - 1 ? PTE_D : 0);
		if (!pte_set(c, &p, &st[i], bits))
			goto again;
		st[i].val |= bits;
	}
	if (pwc_usable(c))
		pwc_enter(c, lin, st, level, n, &r);
	w->gpa = leaf_gpa(&p, level, st[n - 1].val, lin, &w->leaf_size);
	w->writable = (write || (st[n - 1].val & PTE_D)) && !walk_check(c, &r, ACC_WRITE, as);
	w->user = r.u;
	w->global = (st[n - 1].val & PTE_G) && (c->cr4 & CR4_PGE);
	return 0;
}

bool mmu_translate(struct cpu *c, uint64_t lin, uint64_t *gpa, bool *writable, bool *user)
{
	uint64_t size;

	if (!cpu_paging(c)) {
		*gpa = lin & 0xffffffffu;
		*writable = *user = true;
		return true;
	}
	if (cpu_long(c) && !cpu_canonical(c, lin))
		return false;
	struct paging p = paging_mode(c);
	struct step st[MAX_LEVELS];
	struct walk_rights r;
	unsigned level, n;
	bool fault;

	walk_down(c, &p, lin, st, &level, &n, &r, &fault);
	if (fault)
		return false;
	*gpa = leaf_gpa(&p, level, st[n - 1].val, lin, &size);
	*writable = r.w;
	*user = r.u;
	return true;
}

bool mmu_load_pdptes(struct cpu *c, uint64_t cr3)
{
	uint64_t v[4], rsvd = mmu_rsvd_mask(c) | 0xfff0000000000000ull | 0x1e6;

	if (phys_read(c->vm, cr3 & 0xffffffe0u, v, sizeof v))
		return false;
	for (int i = 0; i < 4; i++)
		if ((v[i] & PTE_P) && (v[i] & rsvd))
			return false;
	memcpy(c->pdpte, v, sizeof v);
	return true;
}
