/*
 * TLB fills for translated code, which has the guest's vector state in the host's registers: compiled to leave those alone, and
 * without sanitizers, whose run time does not. So nothing of other files is called but fault_copy_bytes().
 *
 * Only what needs no more than an entry is done here: the page directory's entry is remembered (tlb.h), the page table's has
 * its A bit (writes: and D), access is allowed, the page is RAM of the slot that was used last, and for writes it is marked in the
 * dirty log and granted. Everything else is the slow path's (access.c), which makes it so; it is also what this is checked against.
 */
#include <stdatomic.h>

#include "softkvm/fault.h"
#include "softkvm/mmu/phys.h"
#include "softkvm/mmu/tlb.h"

/* What the page tables say of a linear page. */
struct leaf { uint64_t gpa, size; bool global; };

static bool small_page(const struct cpu *c, const struct pwc_entry *e, uint64_t lin, bool write, struct walk_as as, struct leaf *l)
{
	struct walk_rights r = { .w = e->rights & PWC_W, .u = e->rights & PWC_U, .nx = e->rights & PWC_NX };
	uint64_t need = PTE_P | PTE_A | (write ? PTE_D : 0), pte;

	/* The client may have unmapped its memory. */
	if (fault_copy_bytes(&pte, e->host + (lin >> 12 & 511) * 8, 8) || (pte & need) != need || (pte & walk_rsvd_mask(c)) ||
	    (!(c->efer & EFER_NXE) && (pte & PTE_NX)))
		return false;
	r.w &= !!(pte & PTE_W);
	r.u &= !!(pte & PTE_U);
	r.key = (unsigned)(pte >> 59) & 15;
	*l = (struct leaf){ pte & 0x000ffffffffff000ull, 4096, (pte & PTE_G) && (c->cr4 & CR4_PGE) };
	return !walk_check(c, &r, write ? ACC_WRITE : ACC_READ, as);
}

static bool large_page(const struct cpu *c, const struct pwc_entry *e, uint64_t lin, bool write, struct walk_as as, struct leaf *l)
{
	struct walk_rights r = { .w = e->rights & PWC_W, .u = e->rights & PWC_U, .nx = e->rights & PWC_NX, .key = e->pkey };

	*l = (struct leaf){ ((uint64_t)e->gpa_page << 12) + (lin & (BIT(21) - 4096)), BIT(21), e->rights & PWC_GLOBAL };
	return (!write || (e->rights & PWC_DIRTY)) && !walk_check(c, &r, write ? ACC_WRITE : ACC_READ, as);
}

/* The slot's page may be written as far as slot and dirty log go. */
static bool logged(const struct slot *s, uint64_t page)
{
	return !(s->flags & KVM_MEM_READONLY) &&
	       (!s->dirty || (atomic_load_explicit(&s->dirty[page / 64], memory_order_relaxed) >> (page & 63) & 1));
}

/*
 * A store to a page with code that touches none of its lines needs nothing but that look, as tlb_grant_write() takes it (code.c). The flag is
 * lowered when the loop or a handler is next come to.
 */
static bool beside_code(struct cpu *c, const struct slot *s, uint64_t page, uint64_t lin, uint64_t size)
{
	struct itlb *t = c->itlb;
	uint32_t v;

	if (atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed) > 1)
		atomic_exchange(&c->code_store, true);
	v = atomic_load(&s->ver[page]);
	if (!(v & VER_CODE) || (atomic_load(&s->lines[page]) & page_lines(lin & 4095, (unsigned)size)))
		return false;
	if (t->smc_ver != &s->ver[page]) {
		t->smc_ver = &s->ver[page];
		t->smc_hits = t->smc_near = 0;
	}
	return ++t->smc_near <= CODE_NEAR_MAX;
}

/* An entry for such a page: what is walked for once. */
static uint8_t *known(struct cpu *c, const struct tlb_entry *t, uint64_t lin, uint64_t size)
{
	const struct slot *s = c->itlb->slot;
	uint8_t *host = (uint8_t *)(uintptr_t)t->host;
	uint64_t at;

	if (t->tag != tlb_near_tag(lin) || !tlb_near_may(lin) || !s)
		return NULL;
	at = (uint64_t)((uintptr_t)host - (uintptr_t)s->host);
	return at < s->size && logged(s, at >> 12) && beside_code(c, s, at >> 12, lin, size) ? host : NULL;
}

/* Counts us as a writer if there will be an entry, which gets this tag. */
static bool grant(struct cpu *c, const struct slot *s, uint64_t page, const uint8_t *host, uint64_t lin, uint64_t size, uint64_t *tag)
{
	tlb_writer_comes(c, host, lin);
	*tag = lin & ~4095ull;
	if (atomic_load(&s->ver[page]) & VER_GRANTED)
		return true;
	*tag = tlb_near_tag(lin);
	if (tlb_near_may(lin) && beside_code(c, s, page, lin, size))
		return true;
	tlb_writer_gone(c, (uintptr_t)host);
	return false;
}

/* The host's page for the one at `lin`, which the TLB has then; NULL. `size` bytes there are going to be accessed. */
static uint8_t *page_at(struct cpu *c, uint64_t lin, uint64_t size, bool write)
{
	const struct tlb_entry *t = &tlb_table(c->tlb, write)[tlb_index(lin)];
	struct walk_as as = { .user = c->cpl == 3, .ac = c->eflags & FL_AC };
	const struct pwc_entry *e = &c->itlb->pwc[(lin >> 21) % PWC_ENTRIES];
	const struct slot *s = c->itlb->slot;
	uint64_t tag;
	struct leaf l;
	uint8_t *host;

	if (!((lin ^ t->tag) >> 12))
		return (uint8_t *)(uintptr_t)t->host;
	if (write && (host = known(c, t, lin, size)))
		return host;
	if (e->key != pwc_key(c->itlb, lin) || !cpu_canonical(c, lin) || !s)
		return NULL;
	if (!(e->rights & PWC_LEAF ? large_page : small_page)(c, e, lin, write, as, &l) || l.gpa - s->gpa >= s->size)
		return NULL;
	host = s->host + (l.gpa - s->gpa);
	if (write) {
		uint64_t page = (l.gpa - s->gpa) >> 12;

		if (!logged(s, page) || !grant(c, s, page, host, lin, size, &tag))
			return NULL;
		tlb_put_tag(c, tlb_full(c->tlb), true, lin, tag, host, l.global, l.size);
	}
	tlb_put(c, tlb_full(c->tlb), false, lin, host, l.global, l.size);
	return host;
}

/* Not for lockstep, nor where accesses are looked at one by one. */
static bool may(const struct cpu *c)
{
	return cpu_long(c) && cpu_paging(c) && !c->watch && !c->data_bp && c->tlb != c->tlbs[TLB_NONE];
}

/*
 * Of two pages. Where the host has them side by side, as guests' neighbouring pages often are, the access is one; an operand to be read is copied else.
 */
static uint8_t *two_pages(struct cpu *c, uint64_t lin, uint64_t size, bool write, bool copy)
{
	uint64_t first = 4096 - (lin & 4095), second = lin + first;
	uint8_t *a, *b, *to;

	if (c->code_bits != 64 && second >> 32)
		return NULL;
	a = page_at(c, lin, first, write);
	b = a ? page_at(c, second, size - first, write) : NULL;
	if (!b)
		return NULL;
	if (b == a + 4096)
		return a + (lin & 4095);
	if (!copy || size > 64)
		return NULL;
	to = (uint8_t *)ALIGN_UP((uintptr_t)c->itlb->bounce, 64) + (lin & 63);
	return !fault_copy_bytes(to, a + (lin & 4095), first) && !fault_copy_bytes(to + first, b, size - first) ? to : NULL;
}

static uint8_t *fill(struct cpu *c, uint64_t lin, uint64_t size, bool write)
{
	bool copy = !write && !(size & MMU_FILL_ITSELF);
	uint8_t *p;

	size &= ~(uint64_t)MMU_FILL_ITSELF;
	if (!may(c))
		return NULL;
	if ((lin & 4095) + size > 4096)
		return two_pages(c, lin, size, write, copy);
	p = page_at(c, lin, size, write);
	return p ? p + (lin & 4095) : NULL;
}

uint8_t *mmu_fill_w(struct cpu *c, uint64_t lin, uint64_t size) { return fill(c, lin, size, true); }
uint8_t *mmu_fill_r(struct cpu *c, uint64_t lin, uint64_t size) { return fill(c, lin, size, false); }
