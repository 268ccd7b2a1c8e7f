/* The page-walk rules of SDM vol. 3 4.6 and 4.7, as the paging guests expect them: one flat statement for all modes. */
#ifndef PAGING_H
#define PAGING_H
#include "rt.h"

enum { P = 1, W = 2, U = 4, PWT = 8, PCD = 0x10, A = 0x20, D = 0x40, PS = 0x80, G = 0x100 };
#define NX (1ull << 63)
enum { RD, WR, EX };

struct rules { int wp, smep, smap, ac, nxe, pke, ad, wd; };

/* Error code of an access by rights that the levels combine to, or -1. `present`: to the leaf, no reserved bit. */
static int expect(const struct rules *r, int present, int rsvd, int w, int u, int nx, int how, int user)
{
	int fetch = how == EX && (r->smep || r->nxe);
	int base = (how == WR ? 2 : 0) | (user ? 4 : 0) | (fetch ? 0x10 : 0), bad = 0, pk = 0;

	if (!present)
		return base;
	if (rsvd)
		return base | 9;
	if (how == EX) {
		bad = (nx && r->nxe) || (user ? !u : u && r->smep);
		return bad ? base | 1 : -1;
	}
	if (user)
		bad = !u || (how == WR && !w);
	else
		bad = (u && r->smap && !r->ac) || (how == WR && !w && r->wp);
	/* Keys concern data accesses to user pages, by both rings. */
	if (r->pke && u)
		pk = r->ad || (how == WR && r->wd && (user || r->wp));
	return bad || pk ? base | 1 | (pk ? 0x20 : 0) : -1;
}
#endif
