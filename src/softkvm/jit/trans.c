/* From a decoded block to code: decoding again, flag liveness, and the walk over its instructions. */
#include <inttypes.h>
#include <stdio.h>

#include "softkvm/jit/internal.h"

#define HOT_MAX (24u << 10)
#define COLD_MAX (96u << 10)
#define ARENA_MAX (sizeof(struct jit_code) + 64 + BLOCK_MAX_INSNS * 3 * sizeof(struct jit_site))

void gen_colds(struct tr *t);
insn_fn op_fetch_gp;

/* -- flags --------------------------------------------------------------------------------------- */
/* Shifts and rotates by zero write nothing. */
static bool may_not_write(const struct tinsn *i)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR:
		return i->op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(i->op[1].imm.value.u & (i->z.operand_width == 64 ? 63 : 31)) ||
		       i->z.operand_width < 32;
	case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD:
		return i->op[2].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(i->op[2].imm.value.u & (i->z.operand_width == 64 ? 63 : 31));
	default:
		return false;
	}
}

static void set_flags(struct tinsn *i)
{
	const ZydisAccessedFlags *f = i->z.cpu_flags;

	i->tested = i->written = i->killed = 0;
	if (f) {
		i->tested = f->tested & JIT_ALL_FLAGS;
		i->written = (f->modified | f->set_0 | f->set_1 | f->undefined) & JIT_ALL_FLAGS;
		i->killed = may_not_write(i) ? 0 : i->written;
	}
	/* Branches look at flags even where they leave: their own business. */
}

/* Nobody looks at the flags that hold when the code at `rip`, in the same page, is reached. */
bool flags_dead_at(struct tr *t, uint64_t rip)
{
	static const uint16_t all = JIT_ALL_FLAGS;
	const struct code_page page_of = block_page(t->b);
	const uint8_t *page = page_of.host;
	uint16_t left = all;
	ZydisDecoder z;
	struct tinsn i;

	if ((rip ^ t->k->rip) >> 12)
		return false;
	/* What is looked at here is not part of the block: a store to it must count as one to the block. */
	mmu_code_lines(t->c, &page_of, rip & 4095, MIN(4 * 15, 4096 - (unsigned)(rip & 4095)));
	decode_init(&z, t->c, t->b->mode);
	for (unsigned n = 0; n < 4; n++) {
		unsigned off = rip & 4095, avail = 4096 - off;

		if (ZYAN_FAILED(ZydisDecoderDecodeFull(&z, page + off, MIN(avail, 15u), &i.z, i.op)))
			return false;
		switch (i.z.meta.category) {
		case ZYDIS_CATEGORY_BINARY: case ZYDIS_CATEGORY_LOGICAL: case ZYDIS_CATEGORY_DATAXFER: case ZYDIS_CATEGORY_SHIFT:
		case ZYDIS_CATEGORY_PUSH: case ZYDIS_CATEGORY_POP: case ZYDIS_CATEGORY_MISC: case ZYDIS_CATEGORY_CMOV:
		case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_BITBYTE:
			break;
		default:
			return false;
		}
		set_flags(&i);
		if (i.tested & left)
			return false;
		left &= (uint16_t)~i.killed;
		if (!left)
			return true;
		if (off + i.z.length >= 4096)
			return false;
		rip += i.z.length;
	}
	return false;
}

static void liveness(struct tr *t)
{
	uint16_t live = JIT_ALL_FLAGS;

	for (unsigned n = t->n; n--;) {
		struct tinsn *i = &t->t[n];

		i->live = live;
		live = i->tested | (live & ~i->killed);
	}
}

/* -- decoding ------------------------------------------------------------------------------------ */
static bool decode_all(struct tr *t)
{
	struct block *b = t->b;
	ZydisDecoder z;

	decode_init(&z, t->c, b->mode);
	t->n = b->n;
	for (unsigned n = 0; n < t->n; n++) {
		struct tinsn *i = &t->t[n];
		const struct insn *in = &b->insn[n];

		i->by_handler = in->fn == op_ud || in->fn == op_fetch_gp ||
				ZYAN_FAILED(ZydisDecoderDecodeFull(&z, tr_bytes(t, n), in->len, &i->z, i->op)) ||
				i->z.length != in->len;
		if (i->by_handler) {
			i->tested = JIT_ALL_FLAGS;
			i->written = i->killed = 0;
			i->z.mnemonic = ZYDIS_MNEMONIC_INVALID;
			continue;
		}
		set_flags(i);
		if (in->flags & IF_END)
			i->tested = JIT_ALL_FLAGS, i->killed = 0;
	}
	return true;
}

/* -- the walk ------------------------------------------------------------------------------------ */
/* An instruction that is not translated looks at all flags. Known only when it was tried: a dry run decides. */
static bool gen_one(struct tr *t, unsigned n)
{
	if (t->t[n].by_handler)
		return false;
	return gen_int(t, n) || gen_vec(t, n) || gen_x87(t, n) || gen_branch(t, n);
}

static void reset(struct tr *t, const struct em *h, const struct em *cold)
{
	t->h = *h;
	t->cold = *cold;
	t->in_mem = true;
	t->in_host = false;
	t->live = 0;
	t->ncold = 0;
	t->k->nlinks = 0;
}

static void entry(struct tr *t)
{
	struct em *e = &t->h;

	t->k->entry = (uint32_t)(e->p - t->j->rw);
	em_imm(e, SC, (uintptr_t)t->b->ver);
	EM(e, 0x8b, 0x09);                              /* mov ecx, [rcx] */
	em_op_abs(e, false, 0x3b, SC, &t->k->ver_value);
	em_here(&t->cold, em_jcc(e, 5));
	gen_leave(&t->cold, t, t->k->rip, NULL);
	t->k->body = (uint32_t)(e->p - t->j->rw);
}

/* False: some instruction turned out to need its handler, and liveness must be worked out anew. */
static bool walk(struct tr *t)
{
	bool again = false;
	unsigned n;

	entry(t);
	for (n = 0; n < t->n && !t->failed; n++) {
		struct em h = t->h, cold = t->cold;
		unsigned ncold = t->ncold;

		if (t->t[n].by_handler) {
			gen_handler(t, n);
			continue;
		}
		if (gen_one(t, n))
			continue;
		t->h = h;
		t->cold = cold;
		t->ncold = ncold;
		t->t[n].by_handler = true;
		t->t[n].tested = JIT_ALL_FLAGS;
		t->t[n].written = t->t[n].killed = 0;
		again = true;
	}
	if (again || t->failed)
		return false;
	if (!(t->b->insn[n - 1].flags & IF_END)) {
		gen_flags_save(t);
		gen_goto(t, t->k->rip + t->b->bytes, n - 1, 0);
	}
	gen_colds(t);
	return true;
}

static void note(struct tr *t, const uint8_t *start)
{
	if (t->j->perf_map)
		fprintf(t->j->perf_map, "%" PRIxPTR " %zx guest:%" PRIx64 "\n", (uintptr_t)(t->j->rx + (start - t->j->rw)),
			(size_t)(t->h.p - start), t->k->rip);
}

static void room(struct jit *j)
{
	if (j->hot_size - j->hot < HOT_MAX || j->size - j->hot_size - j->cold < COLD_MAX || j->arena_size - j->arena < ARENA_MAX)
		jit_flush(j->c);
}

struct jit_code *jit_translate(struct jit *j, struct block *b, uint64_t rip, uint32_t mode)
{
	struct tr *t = j->tr;
	struct jit_code *k;
	struct em h, cold;
	size_t arena;
	unsigned tries = 0;

	room(j);
	k = jit_arena(j, sizeof *k);
	h = (struct em){ j->rw + j->hot, j->rw + j->hot + HOT_MAX, false };
	cold = (struct em){ j->rw + j->hot_size + j->cold, j->rw + j->hot_size + j->cold + COLD_MAX, false };
	*k = (struct jit_code){ .b = b, .c = j->c, .rip = rip, .mode = mode, .ver_value = b->ver_value };
	t->j = j;
	t->c = j->c;
	t->b = b;
	t->k = k;
	t->tlb = j->c->tlb;
	t->failed = false;
	decode_all(t);
	arena = j->arena;
	do {
		j->arena = arena;
		reset(t, &h, &cold);
		liveness(t);
		if (++tries > BLOCK_MAX_INSNS + 1)
			t->failed = true;
	} while (!t->failed && !walk(t));
	if (t->failed || t->h.full || t->cold.full) {
		b->runs = 0;
		return NULL;
	}
	note(t, h.p);
	j->hot = ALIGN_UP((size_t)(t->h.p - j->rw), 16);
	j->cold = (size_t)(t->cold.p - j->rw) - j->hot_size;
	b->code = k;
	b->code_gen = j->gen;
	return k;
}
