/*
 * Which guest registers a region keeps in memory: of 16, twelve fit into host registers. By default r11, r13, r14 and r15
 * stay out (jit_map); a region that works with them more than with others lets them change places with those at its
 * entry, and back at its exits. Links between regions of the same map go around that.
 */
#include "softkvm/jit/internal.h"

static const uint8_t outside[JIT_SWAPS] = { 11, 13, 14, 15 };
static const uint8_t inside[] = { R_RBX, R_RBP, R_RSI, R_RDI, 8, 9, 10, 12 };     /* the others have fixed uses */

/* -- counting ------------------------------------------------------------------------------------ */
static void count_reg(unsigned *w, ZydisRegister r, unsigned by)
{
	if (r >= ZYDIS_REGISTER_AL && r <= ZYDIS_REGISTER_R15)
		w[insn_reg_off(r) / 8] += by;
}

static void count_insn(unsigned *w, const struct tinsn *i, unsigned by)
{
	for (unsigned n = 0; !i->by_handler && n < i->z.operand_count; n++) {
		const ZydisDecodedOperand *o = &i->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER) {
			count_reg(w, o->reg.value, by);
			if (o->actions & ZYDIS_OPERAND_ACTION_MASK_READ && o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE)
				count_reg(w, o->reg.value, by);
		} else if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
			count_reg(w, o->mem.base, by);
			count_reg(w, o->mem.index, by);
		}
	}
}

/* How often a part runs, roughly: ten times for each jump back around it. */
static unsigned part_weight(const struct tr *t, unsigned p)
{
	uint64_t rip = t->part[p].rip;
	unsigned w = 1;

	for (unsigned q = 0; q < t->nparts; q++) {
		unsigned n = t->part[q].first + t->part[q].n - 1;

		if (t->t[n].end < END_JMP)
			continue;
		if (tr_target(t, n) <= rip && t->t[n].rip >= rip && tr_part(t, tr_target(t, n)) >= 0 && w < 100)
			w *= 10;
	}
	return w;
}

/* Bit k: outside[k] comes in; bit 4 + v: inside[v] makes room. */
static unsigned choose(const struct tr *t)
{
	unsigned w[16] = { 0 }, loops = 0, key = 0, worth;

	for (unsigned p = 0; p < t->nparts; p++) {
		unsigned by = part_weight(t, p);

		loops |= by > 1;
		for (unsigned n = 0; n < t->part[p].n; n++)
			count_insn(w, &t->t[t->part[p].first + n], by);
	}
	/* A change takes 16 bytes, at the entry and at each exit: where size is what counts, seldom. */
	worth = t->k->in_line ? (loops ? 8 : 6) : (loops ? 100 : 24);
	for (unsigned round = 0; round < JIT_SWAPS; round++) {
		unsigned in = JIT_SWAPS, out = ARRAY_SIZE(inside);

		for (unsigned k = 0; k < JIT_SWAPS; k++)
			if (!(key >> k & 1) && (in == JIT_SWAPS || w[outside[k]] > w[outside[in]]))
				in = k;
		for (unsigned v = 0; v < ARRAY_SIZE(inside); v++)
			if (!(key >> (4 + v) & 1) && (out == ARRAY_SIZE(inside) || w[inside[v]] < w[inside[out]]))
				out = v;
		if (w[outside[in]] < w[inside[out]] + worth)
			break;
		key |= 1u << in | 16u << out;
	}
	return key;
}

/* -- thunks and swaps ---------------------------------------------------------------------------- */
/* Pairs of a key: the n-th that comes in takes the place of the n-th that goes. False: no more. */
static bool next_pair(unsigned *key, unsigned *in, unsigned *out)
{
	if (!(*key & 15))
		return false;
	*in = outside[__builtin_ctz(*key)];
	*out = inside[__builtin_ctz(*key >> 4)];
	*key &= *key - 1;
	*key = (*key & 15) | ((*key >> 4) & ((*key >> 4) - 1)) << 4;
	return true;
}

void map_of(int8_t map[16], unsigned key)
{
	unsigned in, out;

	memcpy(map, jit_map, 16);
	while (next_pair(&key, &in, &out)) {
		map[in] = jit_map[out];
		map[out] = -1;
	}
}

static void swap(struct em *e, struct tr *t, bool to_map)
{
	unsigned key = t->k->map, in, out;

	while (next_pair(&key, &in, &out)) {
		unsigned h = (unsigned)jit_map[out];

		em_store(e, h, &t->c->gpr[to_map ? out : in]);
		em_load(e, h, &t->c->gpr[to_map ? in : out]);
	}
}

unsigned map_out_bytes(unsigned key) { return 14 * (unsigned)__builtin_popcount(key & 15); }

void map_in(struct em *e, struct tr *t) { swap(e, t, true); }
void map_out(struct em *e, struct tr *t) { swap(e, t, false); }

static const struct jit_map_thunks *thunks(struct jit *j, unsigned key)
{
	struct jit_map_thunks *m = &j->maps[key];
	int8_t map[16];

	if (m->gen != j->gen && key) {
		m->gen = j->gen;
		map_of(map, key);
		jit_map_thunks(j, m, map);
	}
	return m;
}

/* After the region is known, before code is made. */
void map_choose(struct tr *t)
{
	t->k->map = (uint16_t)choose(t);
	t->thunks = thunks(t->j, t->k->map);
	map_of(t->map, t->k->map);
}
