/*
 * Lookups of translated code that the table of indirect targets cannot answer: programs have more return addresses than it has entries. Each page
 * knows its translations. Compiled to leave the guest's vector state alone, as mmu/fill.c.
 */
#include "softkvm/jit/internal.h"
#include "softkvm/mmu/tlb.h"

struct jit_slot *jit_slot_of(struct jit_page *p, uint64_t rip)
{
	struct jit_slot *s = LOW_PTR(struct jit_slot, p->slots);
	unsigned off = rip & 4095;

	if (!p->size)
		return NULL;
	for (unsigned n = off ^ off >> 5;; n++) {
		n &= p->size - 1u;
		if (!s[n].off1 || s[n].off1 == off + 1)
			return &s[n];
	}
}

/* Is it still that page that is there? As same_page(), as long as nothing need be walked. */
static bool still_there(struct jit *j, struct jit_page *p, uint64_t rip)
{
	const struct code_page *g;

	if (p->stamp == j->low->stamp)
		return true;
	g = itlb_fetch(j->c->itlb, rip, p->mode & BM_USER);        /* cpu->cpl may be about to change */
	if (!g || !g->host || g->ver != p->ver)
		return false;
	p->stamp = j->low->stamp;
	return true;
}

uint64_t jit_find(struct jit *j, uint64_t rip)
{
	struct jit_page *p = LOW_PTR(struct jit_page, *jit_page_at(j, rip));
	const struct jit_slot *s;

	if (!p || p->lin != (rip & ~4095ull) || p->mode != jit_stamp_mode(j->low->stamp) || !still_there(j, p, rip))
		return 0;
	s = jit_slot_of(p, rip);
	if (!s || !s->at || !s->off1)
		return 0;
	jit_ind_put(j, rip, s->at);
	return s->at;
}
