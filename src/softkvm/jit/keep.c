/* Which decoded blocks translations stand on: when the arena of blocks is full those stay, and the translations with them. */
#include "softkvm/jit/internal.h"

static void pages_forget(struct jit *j)
{
	for (unsigned n = 0; n < ARRAY_SIZE(j->pages); n++)
		for (struct jit_page *p = j->pages[n]; p; p = p->next)
			for (struct jit_code **at = &p->codes; *at;)
				if ((*at)->b)
					at = &(*at)->page_next;
				else
					*at = (*at)->page_next;
}

bool jit_blocks_begin(struct cpu *c)
{
	struct jit *j = c->jit;
	bool any = false;

	if (!j || j->lock)
		return false;
	for (struct jit_code **at = &j->codes, *k; (k = *at);) {
		if (!code_gone(k)) {
			at = &k->next;
			continue;
		}
		*at = k->next;
		jit_cut_incoming(j, k);
		jit_cut_outgoing(j, k);
		jit_page_hide(j, k);
		code_moves(j, k);       /* nor by the table of indirect targets: it does not move with its page any more */
		k->b = NULL;
		any = true;
	}
	if (any)
		pages_forget(j);
	c->blocks->jit_want = NULL;
	j->stale = NULL;
	return true;
}

void jit_blocks_visit(struct cpu *c, struct block *(*visit)(struct block *b))
{
	for (struct jit_code *k = c->jit->codes; k; k = k->next) {
		for (unsigned n = 0; n < k->nparts; n++)
			k->part[n] = visit(k->part[n]);
		k->b = k->part[0];
	}
}
