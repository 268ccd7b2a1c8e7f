/*
 * Code that is at different addresses in different programs: shared libraries, and executables that are laid out anew each
 * time. Its translations say no address of their own but add to that of their page (gen_rip()), so a page that turns
 * up somewhere else takes its translations along: they are where they ran last. What leads to
 * them from elsewhere, or from them to elsewhere, was made for the old place and is cut.
 *
 * Where two programs take turns, as those of a pipe do, that would be done at each switch. So a page that keeps coming back to where it was stays
 * there, and gets another set of translations for the other place.
 */
#include "softkvm/jit/internal.h"

#define SLOTS_FIRST 4
#define STAYS 8                 /* times that it came back to where it had been just before */
#define HOMES_MAX 4             /* of one page, for one mode */

/* Code whose address fits an immediate stays: the kernel's, and programs linked to a place. */
static bool may_move(uint32_t mode, uint64_t rip)
{
	return (mode & BM_CODE64) && (int64_t)rip != (int32_t)rip;
}

static struct jit_page **chain(struct jit *j, const _Atomic uint32_t *ver)
{
	return &j->pages[(uintptr_t)ver / 4 * 0x9e3779b97f4a7c15ull >> (64 - JIT_PAGE_BITS)];
}

static bool may_leave(const struct jit_page *p) { return p->moves && p->returns < STAYS; }

/*
 * The page at `rip`, or one that may move there; NULL: none. When as many stay as may, the one that was entered in the oldest address space is to move: its program has
 * ended, most likely.
 */
static struct jit_page *find(struct jit *j, const _Atomic uint32_t *ver, uint32_t mode, uint64_t rip, bool moves)
{
	struct jit_page *other = NULL, *stays = NULL;
	unsigned homes = 0;

	for (struct jit_page *p = *chain(j, ver); p; p = p->next) {
		if (p->ver != ver || p->mode != mode || p->moves != moves)
			continue;
		if (p->lin == (rip & ~4095ull))
			return p;
		if (!moves)
			continue;
		if (may_leave(p))
			other = p;
		else if (!stays || p->stamp < stays->stamp)
			stays = p;
		homes++;
	}
	if (other || homes < HOMES_MAX)
		return other;
	stays->returns = 0;
	return stays;
}

struct jit_code *jit_page_home(struct jit *j, struct block *b, struct jit_code *k, uint64_t rip)
{
	struct jit_page *p = k->page;

	if (p->lin == (rip & ~4095ull))
		return k;
	p = find(j, p->ver, k->mode, rip, true);
	if (!p)
		return k;
	jit_page_move(j, p, rip);
	if (p == k->page)
		return k;
	for (struct jit_code *o = p->codes; o; o = o->page_next)
		if (o->b == b && o->ver_value == b->ver_value && !b->cross && !o->wanted) {
			j->moves++;
			return b->code = o;
		}
	return k;
}

void jit_page_join(struct jit *j, struct jit_code *k)
{
	const _Atomic uint32_t *ver = block_page(k->b).ver;
	bool moves = may_move(k->mode, k->rip);
	struct jit_page *p = find(j, ver, k->mode, k->rip, moves);

	if (!p) {
		p = jit_arena(j, sizeof *p);    /* has_room() saw to it */
		*p = (struct jit_page){ .lin = k->rip & ~4095ull, .gpa = block_page(k->b).gpa, .ver = ver, .mode = k->mode, .moves = moves, .next = *chain(j, ver) };
		*chain(j, ver) = p;
	}
	jit_page_move(j, p, k->rip);
	k->page = p;
}

/* Room for one more slot, no more than three quarters of them in use; without it the lookup is the loop's. */
static bool slots_grow(struct jit *j, struct jit_page *p)
{
	struct jit_slot *old = LOW_PTR(struct jit_slot, p->slots);
	unsigned had = p->size, size = had ? had * 2 : SLOTS_FIRST;
	struct jit_slot *s;

	if (p->used + 1u <= had / 4 * 3)
		return true;
	s = jit_arena(j, size * sizeof *s);
	if (!s)
		return false;
	memset(s, 0, size * sizeof *s);
	p->slots = low_of(s);
	p->size = (uint16_t)size;
	p->used = 0;
	for (unsigned n = 0; n < had; n++)
		if (old[n].at) {
			*jit_slot_of(p, old[n].off1 - 1u) = old[n];
			p->used++;
		}
	return true;
}

void jit_page_hide(struct jit *j, const struct jit_code *k)
{
	struct jit_slot *s = jit_slot_of(k->page, k->rip);

	if (s && s->off1 && s->at == jit_entry(j, k))
		s->at = 0;
}

void jit_page_add(struct jit *j, struct jit_code *k)
{
	if (slots_grow(j, k->page)) {
		struct jit_slot *s = jit_slot_of(k->page, k->rip);

		k->page->used += !s->off1;
		*s = (struct jit_slot){ .off1 = (uint16_t)((k->rip & 4095) + 1), .at = jit_entry(j, k) };
	}
	if (!k->page->moves)
		return;
	k->page_next = k->page->codes;
	k->page->codes = k;
}

void code_moves(struct jit *j, struct jit_code *k)
{
	uint64_t rip = jit_code_rip(k);

	if (jit_ind_entry(j->low->ind, rip) == jit_entry(j, k))
		j->low->ind[jit_ind_index(rip)] = jit_ind_none(jit_ind_index(rip));
	jit_cut_far(j, k);
	k->stamp = 0;
}

bool code_gone(const struct jit_code *k)
{
	return k->b->code != k && k->ver_value != atomic_load_explicit(block_page(k->b).ver, memory_order_relaxed);
}

/* Which page, in eight bits: to be mistaken once does no harm. */
static uint8_t place(uint64_t rip) { return (uint8_t)((rip >> 12) * 0x9e3779b97f4a7c15ull >> 56); }

void jit_page_move(struct jit *j, struct jit_page *p, uint64_t rip)
{
	uint8_t from = place(p->lin), to = place(rip);

	if (p->lin == (rip & ~4095ull))
		return;
	p->returns = to == p->was[0] || to == p->was[1] ? p->returns + 1 : 0;
	p->was[1] = p->was[0];
	p->was[0] = from;
	for (struct jit_code **at = &p->codes, *k; (k = *at);) {
		code_moves(j, k);
		if (code_gone(k)) {
			*at = k->page_next;
			jit_page_hide(j, k);
			jit_cut_incoming(j, k);
		} else {
			at = &k->page_next;
		}
	}
	p->lin = rip & ~4095ull;
	j->moves++;
}
