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
	switch (ZydisRegisterGetClass(r)) {
	case ZYDIS_REGCLASS_GPR8: case ZYDIS_REGCLASS_GPR16: case ZYDIS_REGCLASS_GPR32: case ZYDIS_REGCLASS_GPR64:
		w[insn_reg_off(r) / 8] += by;
		break;
	default:
		break;
	}
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

/* Bits 4k..4k+3: the guest register that makes room for outside[k], 0 none. */
static uint32_t choose(const struct tr *t)
{
	unsigned w[16] = { 0 }, loops = 0;
	bool used[16] = { false };
	uint32_t key = 0;

	for (unsigned p = 0; p < t->nparts; p++) {
		unsigned by = part_weight(t, p);

		loops |= by > 1;
		for (unsigned n = 0; n < t->part[p].n; n++)
			count_insn(w, &t->t[t->part[p].first + n], by);
	}
	for (unsigned round = 0; round < JIT_SWAPS; round++) {
		unsigned best = JIT_SWAPS, victim = 0;

		for (unsigned k = 0; k < JIT_SWAPS; k++)
			if (!(key >> 4 * k & 15) && (best == JIT_SWAPS || w[outside[k]] > w[outside[best]]))
				best = k;
		for (unsigned v = 0; v < ARRAY_SIZE(inside); v++)
			if (!used[inside[v]] && (!victim || w[inside[v]] < w[victim]))
				victim = inside[v];
		if (!victim || w[outside[best]] < w[victim] + (loops ? 12 : 6))
			break;
		used[victim] = true;
		key |= (uint32_t)victim << 4 * best;
	}
	return key;
}

/* -- thunks and swaps ---------------------------------------------------------------------------- */
static void set_map(int8_t *map, uint32_t key)
{
	memcpy(map, jit_map, 16);
	for (unsigned k = 0; k < JIT_SWAPS; k++) {
		unsigned v = key >> 4 * k & 15;

		if (v) {
			map[outside[k]] = jit_map[v];
			map[v] = -1;
		}
	}
}

static void swap(struct em *e, struct tr *t, bool in)
{
	for (unsigned k = 0; k < JIT_SWAPS; k++) {
		unsigned v = t->k->map >> 4 * k & 15, h = (unsigned)jit_map[v];

		if (!v)
			continue;
		em_store(e, h, &t->c->gpr[in ? v : outside[k]]);
		em_load(e, h, &t->c->gpr[in ? outside[k] : v]);
	}
}

void map_in(struct em *e, struct tr *t) { swap(e, t, true); }
void map_out(struct em *e, struct tr *t) { swap(e, t, false); }

/* The thunks for a map; when there are too many maps, the one that needs none. */
static const struct jit_map_thunks *thunks(struct jit *j, uint32_t key)
{
	struct jit_map_thunks *m = j->maps;
	int8_t map[16];

	for (; m < j->maps + j->nmaps; m++)
		if (m->key == key)
			return m;
	if (j->nmaps == ARRAY_SIZE(j->maps))
		return j->maps;
	j->nmaps++;
	m->key = key;
	set_map(map, key);
	jit_map_thunks(j, m, map);
	return m;
}

/* After the region is known, before code is made. */
void map_choose(struct tr *t)
{
	const struct jit_map_thunks *m = thunks(t->j, choose(t));

	t->k->map = m->key;
	t->thunks = m;
	set_map(t->map, m->key);
}
