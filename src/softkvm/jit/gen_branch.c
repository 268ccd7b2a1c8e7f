/* Near branches, calls, returns and the stack, of the code's natural width. */
#include "softkvm/jit/internal.h"

uint64_t tr_target(const struct tr *t, unsigned n)
{
	uint64_t to = tr_end(t, n) + (uint64_t)t->t[n].op[0].imm.value.s;

	return tr_64(t) ? to : (uint32_t)to;
}

/* Bytes of a stack slot. */
static int32_t word(const struct tr *t) { return t->bits / 8; }

static void lea_rsp(struct tr *t, int32_t d) { em_mem(&t->h, tr_64(t), 0x8d, H_R12, H_R12, -1, 0, d); }

/* ST = host address of the slot at guest rsp + d. */
static void stack(struct tr *t, struct cold *k, int32_t d, bool write) { gen_stack(t, k, d, (unsigned)word(t), write); }

/* Slot at ST + d to or from a host register, for instruction n. */
static void load(struct tr *t, unsigned n, unsigned reg, int32_t d)
{
	gen_point(t, n);
	em_mem(&t->h, tr_64(t), 0x8b, reg, ST, -1, 0, d);
}

static void store(struct tr *t, unsigned n, unsigned reg, int32_t d)
{
	gen_point(t, n);
	em_mem(&t->h, tr_64(t), 0x89, reg, ST, -1, 0, d);
}

static void store_imm(struct tr *t, unsigned n, uint64_t v)
{
	if (!tr_64(t) || (int64_t)v == (int32_t)v) {
		gen_point(t, n);
		e8(&t->h, tr_64(t) ? 0x49 : 0x41);      /* mov slot [r15], imm32 */
		EM(&t->h, 0xc7, 0x07);
		e32(&t->h, (uint32_t)v);
	} else {
		em_imm(&t->h, SC, v);
		store(t, n, SC, 0);
	}
}

/* The address behind instruction n there. */
static void store_rip(struct tr *t, unsigned n)
{
	if (!t->k->page->moves) {
		store_imm(t, n, tr_end(t, n));
		return;
	}
	gen_rip(&t->h, t, true, SC, tr_end(t, n));
	store(t, n, SC, 0);
}

static void back(struct tr *t, unsigned n, struct cold *k)
{
	k->back = t->h.p;
	k->need = t->live;
}

/* -- push, pop ----------------------------------------------------------------------------------- */
static bool push(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const ZydisDecodedOperand *o = &i->op[0];
	struct cold *k;

	if (o->type == ZYDIS_OPERAND_TYPE_REGISTER && !tr_full_reg(t, o->reg.value))
		return false;
	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER && o->type != ZYDIS_OPERAND_TYPE_IMMEDIATE && o->type != ZYDIS_OPERAND_TYPE_MEMORY)
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (!gen_operand(t, n, k, (unsigned)word(t), false))
			return false;
		load(t, n, SA, 0);
	}
	stack(t, k, -word(t), true);
	if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		store_imm(t, n, (uint64_t)o->imm.value.s);
	else
		store(t, n, o->type == ZYDIS_OPERAND_TYPE_MEMORY ? SA : gen_get(t, insn_reg_off(o->reg.value) / 8, SA), 0);
	lea_rsp(t, -word(t));
	back(t, n, k);
	return true;
}

static bool pop(struct tr *t, unsigned n)
{
	const ZydisDecodedOperand *o = &t->t[n].op[0];
	struct cold *k;
	unsigned g;

	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER || !tr_full_reg(t, o->reg.value))
		return false;
	g = insn_reg_off(o->reg.value) / 8;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	stack(t, k, 0, false);
	load(t, n, t->map[g] >= 0 ? (unsigned)t->map[g] : SA, 0);
	if (g != R_RSP)
		lea_rsp(t, word(t));
	if (t->map[g] < 0)
		gen_put(t, g, SA);
	back(t, n, k);
	return true;
}

static bool leave(struct tr *t, unsigned n)
{
	struct cold *k;
	unsigned bp;

	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	bp = gen_get(t, R_RBP, SA);
	em_mem(&t->h, tr_64(t), 0x8d, ST, (int)bp, -1, 0, 0);
	gen_stack_at(t, k, (unsigned)word(t), false);
	load(t, n, SC, 0);
	em_mem(&t->h, tr_64(t), 0x8d, H_R12, (int)bp, -1, 0, word(t));
	gen_put(t, R_RBP, SC);
	back(t, n, k);
	return true;
}

/* -- transfers ----------------------------------------------------------------------------------- */
static struct cold *cold_last(struct tr *t, unsigned n)
{
	struct cold *k = cold_new(t, n, 1);

	k->final = true;
	return k;
}

void gen_lookup(struct tr *t, unsigned n, struct cold *k)
{
	uint8_t *none, *on;

	if (!t->k->in_line) {
		gen_call_check(t, k, t->j->lookup);
		return;
	}
	gen_charge(t, k, tr_count(t, n));
	none = em_lookup(&t->h, t->j);
	gen_point_behind(t, k);
	em_here(&t->cold, none);
	tr_swap(t);
	gen_call(t, t->j->lookup);
	on = em_jmp(&t->h);
	if (!t->h.full)
		em_to(on, t->cold.p);
	tr_swap(t);
}

static void go(struct tr *t)
{
	map_out(&t->h, t);
	EM(&t->h, 0xff, 0xe0);
}

/*
 * Calls are calls of the host's, and returns its returns: its prediction of them is what makes calls cheap, and nothing is looked up. So they are in code that
 * does not run much, too: a return there that is none of the host's would leave its prediction of those behind it off by one. A
 * call pushes two words on the host's stack, the guest's return address and, by CALL, where the host goes on; both are popped if the guest returns
 * there. Otherwise (a switch of stacks, a call by another way) the next entry may be meant, when the last was of a call that never returned; else the target is looked up.
 * Whenever code is left all entries go; so what they lead to is there, and whether it is still good is looked at when they are used.
 */
static void call_push(struct tr *t, unsigned n)
{
	uint64_t rip = tr_end(t, n);
	struct em *e = &t->h;
	uint8_t *deep, *on;

	EM(e, 0x48, 0x3b, 0x24, 0x25);                          /* cmp rsp, [calls_limit] */
	e32(e, (uint32_t)(uintptr_t)&t->j->low->calls_limit);
	deep = em_jcc(e, 2);                                    /* jb */
	em_here(&t->cold, deep);
	em_load(&t->cold, H_RSP, &t->j->low->calls_base);
	on = em_jmp(&t->cold);
	if (!e->full)
		em_to(on, e->p);
	if (!t->k->page->moves && (tr_64(t) || rip <= INT32_MAX) && (int64_t)rip == (int32_t)rip) {
		e8(e, 0x68);                                    /* push imm32 */
		e32(e, (uint32_t)rip);
		return;
	}
	if (!t->k->page->moves && !tr_64(t))
		em_imm(e, SC, rip);
	e8(e, 0x51);                                            /* push rcx: store_rip() */
}

static void call_behind(struct tr *t, unsigned n)
{
	EM(&t->h, 0x48, 0x8d, 0x64, 0x24, 0x08);                /* lea rsp, [rsp + 8] */
	gen_return_edge(t, n);
}

static void ret_to_call(struct tr *t, unsigned n, struct cold *k, int32_t more)
{
	struct em *e = &t->h;
	uint8_t *other, *far, *j, *hit;

	if (t->k->in_line)
		gen_charge(t, k, tr_count(t, n));
	EM(e, 0x48, 0x3b, 0x44, 0x24, 0x08);                    /* cmp rax, [rsp + 8] */
	other = em_jcc(e, 5);
	hit = e->p;
	lea_rsp(t, more);
	map_out(e, t);
	e8(e, 0xc3);
	gen_point_behind(t, k);
	tr_swap(t);
	em_here(e, other);
	EM(e, 0x48, 0x3b, 0x44, 0x24, 0x18);                    /* cmp rax, [rsp + 24] */
	far = em_jcc(e, 5);
	EM(e, 0x48, 0x8d, 0x64, 0x24, 0x10);                    /* lea rsp, [rsp + 16] */
	j = em_jmp(e);
	if (!e->full)
		em_to(j, hit);
	em_here(e, far);
	gen_call(t, t->j->lookup);
	j = em_jmp(e);
	if (!e->full)
		em_to(j, t->cold.p);                            /* where the other part is now */
	tr_swap(t);
	lea_rsp(t, more);
	go(t);
}

/* Its slot is at ST + at already when `at` is not negative. */
static void ret_from(struct tr *t, unsigned n, int32_t at)
{
	const struct tinsn *i = &t->t[n];
	int32_t more = i->z.raw.imm[0].size ? (uint16_t)i->z.raw.imm[0].value.u : 0;
	struct cold *k = cold_last(t, n);

	if (at < 0)
		stack(t, k, 0, false);
	load(t, n, SA, MAX(at, 0));
	more += word(t);
	ret_to_call(t, n, k, more);
}

static bool ret(struct tr *t, unsigned n)
{
	gen_flags_save(t);
	ret_from(t, n, -1);
	return true;
}

/* -- runs of pushes; of pops, and the return behind them: one check ----------------------------------- */
#define GROUP_MAX 8             /* as many as struct jit_point's `rsp` tells apart */

static int moves_reg(const struct tr *t, const struct tinsn *i, ZydisMnemonic m)
{
	const ZydisDecodedOperand *o = &i->op[0];

	if (i->by_handler || i->z.mnemonic != m || o->type != ZYDIS_OPERAND_TYPE_REGISTER ||
	    !tr_full_reg(t, o->reg.value) || insn_reg_off(o->reg.value) / 8 == R_RSP)
		return -1;
	return insn_reg_off(o->reg.value) / 8;
}

static bool plain_ret(const struct tr *t, const struct tinsn *i)
{
	return !i->by_handler && i->z.mnemonic == ZYDIS_MNEMONIC_RET && (i->z.opcode == 0xc2 || i->z.opcode == 0xc3) && i->z.operand_width == t->bits;
}

static unsigned push_group(struct tr *t, unsigned n, unsigned count)
{
	struct cold *k;

	gen_clobber(t, n);
	k = cold_new(t, n, count);
	gen_stack(t, k, -word(t) * (int32_t)count, (unsigned)word(t) * count, true);
	for (unsigned m = 0; m < count; m++, t->rsp_off = (int8_t)(t->rsp_off - word(t)))
		store(t, n + m, gen_get(t, (unsigned)moves_reg(t, &t->t[n + m], ZYDIS_MNEMONIC_PUSH), SA), word(t) * (int32_t)(count - 1 - m));
	t->rsp_off = 0;
	lea_rsp(t, -word(t) * (int32_t)count);
	back(t, n + count - 1, k);
	return count;
}

static unsigned pop_group(struct tr *t, unsigned n, unsigned count, bool returns)
{
	unsigned all = count + returns;
	struct cold *k;

	gen_clobber(t, n);
	if (returns)
		gen_flags_save(t);
	k = cold_new(t, n, all);
	k->final = returns;
	gen_stack(t, k, 0, (unsigned)word(t) * all, false);
	for (unsigned m = 0; m < count; m++, t->rsp_off = (int8_t)(t->rsp_off + word(t))) {
		unsigned g = (unsigned)moves_reg(t, &t->t[n + m], ZYDIS_MNEMONIC_POP), h = t->map[g] >= 0 ? (unsigned)t->map[g] : SA;

		load(t, n + m, h, word(t) * (int32_t)m);
		if (t->map[g] < 0)
			gen_put(t, g, SA);
	}
	t->rsp_off = 0;
	lea_rsp(t, word(t) * (int32_t)count);
	if (returns)
		ret_from(t, n + count, word(t) * (int32_t)count);
	else
		back(t, n + count - 1, k);
	return all;
}

unsigned gen_stack_group(struct tr *t, unsigned n, unsigned end)
{
	unsigned push = 0, pop = 0;
	bool returns;

	if (t->k->apart)
		return 0;
	while (push < GROUP_MAX && n + push < end && moves_reg(t, &t->t[n + push], ZYDIS_MNEMONIC_PUSH) >= 0)
		push++;
	if (push > 1)
		return push_group(t, n, push);
	while (pop < GROUP_MAX && n + pop < end && moves_reg(t, &t->t[n + pop], ZYDIS_MNEMONIC_POP) >= 0)
		pop++;
	returns = pop && pop < GROUP_MAX && n + pop < end && plain_ret(t, &t->t[n + pop]);
	return pop + returns > 1 ? pop_group(t, n, pop, returns) : 0;
}

static bool indirect(struct tr *t, unsigned n, bool call)
{
	const ZydisDecodedOperand *o = &t->t[n].op[0];
	struct cold *k;

	gen_flags_save(t);
	k = cold_last(t, n);
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (!gen_operand(t, n, k, (unsigned)word(t), false))
			return false;
		load(t, n, SA, 0);
	} else {
		em_mem(&t->h, tr_64(t), 0x8d, SA, (int)gen_get(t, insn_reg_off(o->reg.value) / 8, SA), -1, 0, 0);
	}
	if (call) {
		gen_lookup(t, n, k);
		struct cold *k2 = cold_last(t, n);

		stack(t, k2, -word(t), true);
		store_rip(t, n);
		lea_rsp(t, -word(t));
		call_push(t, n);
		map_out(&t->h, t);
		EM(&t->h, 0xff, 0xd0);                  /* call rax */
		call_behind(t, n);
		return true;
	}
	gen_lookup(t, n, k);
	go(t);
	return true;
}

static bool direct(struct tr *t, unsigned n, bool call)
{
	uint64_t to = tr_target(t, n);
	struct cold *k;

	if (!call) {
		gen_edge(t, to, n, true);
		return true;
	}
	gen_flags_save(t);
	k = cold_last(t, n);
	stack(t, k, -word(t), true);
	store_rip(t, n);
	lea_rsp(t, -word(t));
	call_push(t, n);
	gen_call_edge(t, to, n);
	call_behind(t, n);
	return true;
}

/* Leave for `rip` if condition cc holds; what does not happen often is out of the way. */
static void branch_if(struct tr *t, unsigned n, unsigned cc, uint64_t rip)
{
	int p = tr_part(t, rip);
	bool mem = t->in_mem, host = t->in_host, back = rip <= t->t[n].rip;
	uint8_t *j;

	if (p >= 0 && back) {           /* a loop: straight on */
		j = em_jcc(&t->h, cc ^ 1);
		gen_edge(t, rip, n, false);
		em_here(&t->h, j);
	} else if (p >= 0 && !(t->part[p].live && !mem)) {
		gen_jcc_part(t, (unsigned)p, cc);
	} else if (!gen_jcc_link(t, n, cc, rip)) {
		j = em_jcc(&t->h, cc);
		em_here(&t->cold, j);
		tr_swap(t);
		gen_edge(t, rip, n, false);
		tr_swap(t);
	}
	t->in_mem = mem;
	t->in_host = host;
}

/* Condition cc of the host's flags, whether these are the guest's or not. */
static bool branch(struct tr *t, unsigned n, unsigned cc)
{
	uint64_t to = tr_target(t, n), fall = tr_end(t, n);

	if (tr_part(t, to) == (int)t->now + 1 && to > t->t[n].rip && tr_part(t, fall) != (int)t->now + 1) {
		branch_if(t, n, cc ^ 1, fall);
		gen_edge(t, to, n, true);
	} else {
		branch_if(t, n, cc, to);
		gen_edge(t, fall, n, true);
	}
	return true;
}

static bool conditional(struct tr *t, unsigned n)
{
	gen_flags_load(t);
	return branch(t, n, t->t[n].z.opcode & 15);
}

bool gen_counts(const struct tr *t, const struct tinsn *i)
{
	return i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i->z.opcode == 0xe2 || i->z.opcode == 0xe3) && i->z.address_width == t->bits;
}

/* The guest's flags stay, which the host's do not. */
static bool counting(struct tr *t, unsigned n)
{
	bool loop = t->t[n].z.opcode == 0xe2;

	gen_clobber(t, n);
	e8(&t->h, loop ? 0x41 | tr_64(t) << 3 : 0x45 | tr_64(t) << 3);
	if (loop)
		EM(&t->h, 0x83, 0xee, 0x01);            /* sub r14, 1 */
	else
		EM(&t->h, 0x85, 0xf6);                  /* test r14, r14 */
	return branch(t, n, loop ? 5 : 4);
}

static bool near(const struct tr *t, const struct tinsn *i)
{
	return i->z.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR && i->z.operand_width == t->bits &&
	       i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
}

static bool is_jcc(const struct tinsn *i)
{
	return (i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i->z.opcode & 0xf0) == 0x70) ||
	       (i->z.opcode_map == ZYDIS_OPCODE_MAP_0F && (i->z.opcode & 0xf0) == 0x80);
}

bool gen_branch(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const ZydisDecodedOperand *o = &i->op[0];

	if (!near(t, i))
		return false;
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH: return push(t, n);
	case ZYDIS_MNEMONIC_POP: return pop(t, n);
	case ZYDIS_MNEMONIC_LEAVE: return leave(t, n);
	case ZYDIS_MNEMONIC_RET: return i->z.opcode == 0xc2 || i->z.opcode == 0xc3 ? ret(t, n) : false;
	case ZYDIS_MNEMONIC_JMP:
	case ZYDIS_MNEMONIC_CALL:
		if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
			return direct(t, n, i->z.mnemonic == ZYDIS_MNEMONIC_CALL);
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER || (o->type == ZYDIS_OPERAND_TYPE_MEMORY && o->size == t->bits))
			return indirect(t, n, i->z.mnemonic == ZYDIS_MNEMONIC_CALL);
		return false;
	default:
		if (i->z.meta.category != ZYDIS_CATEGORY_COND_BR)
			return false;
		return is_jcc(i) ? conditional(t, n) : gen_counts(t, i) ? counting(t, n) : false;
	}
}
