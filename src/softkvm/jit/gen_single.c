/*
 * What compilers make seldom, and people who write assembly more often: MOVS, CMPS, STOS, LODS and SCAS of one element, XLAT, CMPXCHG8B, EMMS. As a call of
 * the handler each would take ten times as long as elsewhere.
 */
#include "softkvm/jit/slots.h"

/* op al, [r15] and its kin of other sizes, by the opcode for bytes; with `reg` in al's place. */
static void on_slot(struct em *e, unsigned size, unsigned op, unsigned reg)
{
	if (size == 2)
		e8(e, 0x66);
	e8(e, 0x41 | (size == 8) << 3 | (reg >> 3) << 2);
	e8(e, op | (size > 1));
	e8(e, (reg & 7) << 3 | (ST & 7));
}

/* ST: the host's address of the element at guest register g. */
static void reach(struct tr *t, struct cold *k, unsigned g, unsigned size, bool write)
{
	em_mem(&t->h, tr_64(t), 0x8d, ST, (int)gen_get(t, g, ST), -1, 0, 0);
	gen_check(t, k, size, write);
}

static void advance(struct tr *t, unsigned g, unsigned size)
{
	unsigned reg = gen_get(t, g, SC);

	em_mem(&t->h, tr_64(t), 0x8d, reg, (int)reg, -1, 0, (int32_t)size);
	gen_put(t, g, reg);
}

enum { MOVS = 0xa4, CMPS = 0xa6, STOS = 0xaa, LODS = 0xac, SCAS = 0xae };

static bool may(const struct tr *t, const struct tinsn *i, unsigned op)
{
	return i->z.address_width == t->bits && !(i->in->flags & (IF_REP | IF_REPNE | IF_END | IF_NEW_IMM)) &&
	       (op == STOS || op == SCAS || tr_seg_flat(t, i->in->seg)) && (op == LODS || tr_seg_flat(t, SEG_ES));
}

/* Upwards; the other direction is the handler's. Nothing changes before both sides were reached. */
static bool element(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	unsigned op = i->z.opcode & 0xfe, size = i->z.opcode & 1 ? i->z.operand_width / 8u : 1;
	struct cold *k;

	if (i->z.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT || i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || !may(t, i, op))
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	em_op_abs(&t->h, false, 0xf7, 0, &t->c->eflags);        /* test dword [eflags], DF */
	e32(&t->h, FL_DF);
	cold_from(k, em_jcc(&t->h, 5));
	if (op == MOVS || op == CMPS || op == LODS) {
		reach(t, k, R_RSI, size, false);
		gen_point(t, n);
		on_slot(&t->h, size, 0x8a, op == LODS ? H_R13 : SA);
	}
	if (op != LODS) {
		reach(t, k, R_RDI, size, op == MOVS || op == STOS);
		gen_point(t, n);
		on_slot(&t->h, size, op == MOVS || op == STOS ? 0x88 : 0x3a, op == STOS || op == SCAS ? H_R13 : SA);
	}
	gen_flags_after(t, n);
	if (op == MOVS || op == CMPS || op == LODS)
		advance(t, R_RSI, size);
	if (op != LODS)
		advance(t, R_RDI, size);
	cold_done(t, n, k);
	return true;
}

static bool xlat(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	struct em *e = &t->h;
	struct cold *k;

	if (i->z.address_width != t->bits || !tr_seg_flat(t, i->in->seg))
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	EM(e, 0x41, 0x0f, 0xb6, 0xc5);                          /* movzx eax, r13b */
	em_mem(e, tr_64(t), 0x8d, ST, (int)gen_get(t, R_RBX, ST), H_RAX, 0, 0);
	gen_check(t, k, 1, false);
	gen_point(t, n);
	on_slot(e, 1, 0x8a, H_R13);
	cold_done(t, n, k);
	return true;
}

/* All registers but the guest's rax and rcx are where the host's instruction wants them. */
static bool cmpxchg8b(struct tr *t, unsigned n)
{
	struct em *e = &t->h;
	struct cold *k;

	if (t->map[R_RBX] != H_RBX || t->map[R_RDX] != H_RDX)
		return false;
	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	if (!gen_operand(t, n, k, 8, true))
		return false;
	gen_flags_before(t, n);
	em_mov(e, H_RAX, H_R13);
	em_mov(e, H_RCX, H_R14);
	gen_point(t, n);
	if (t->t[n].z.attributes & ZYDIS_ATTRIB_HAS_LOCK)
		e8(e, 0xf0);
	EM(e, 0x41, 0x0f, 0xc7, 0x0f);                          /* cmpxchg8b [r15] */
	em_mov(e, H_R13, H_RAX);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}

static bool emms(struct tr *t, unsigned n)
{
	struct cold *k;

	if (!(t->live & JV_X87)) {
		gen_clobber(t, n);
		k = cold_new(t, n, 1);
		gen_live(t, k, JV_X87);
		t->live |= JV_X87;
		cold_done(t, n, k);
	}
	EM(&t->h, 0x0f, 0x77);
	return true;
}

bool gen_single(struct tr *t, unsigned n)
{
	if (t->row)
		return false;
	switch (t->t[n].z.mnemonic) {
	case ZYDIS_MNEMONIC_MOVSB: case ZYDIS_MNEMONIC_MOVSW: case ZYDIS_MNEMONIC_MOVSD: case ZYDIS_MNEMONIC_MOVSQ:
	case ZYDIS_MNEMONIC_CMPSB: case ZYDIS_MNEMONIC_CMPSW: case ZYDIS_MNEMONIC_CMPSD: case ZYDIS_MNEMONIC_CMPSQ:
	case ZYDIS_MNEMONIC_STOSB: case ZYDIS_MNEMONIC_STOSW: case ZYDIS_MNEMONIC_STOSD: case ZYDIS_MNEMONIC_STOSQ:
	case ZYDIS_MNEMONIC_LODSB: case ZYDIS_MNEMONIC_LODSW: case ZYDIS_MNEMONIC_LODSD: case ZYDIS_MNEMONIC_LODSQ:
	case ZYDIS_MNEMONIC_SCASB: case ZYDIS_MNEMONIC_SCASW: case ZYDIS_MNEMONIC_SCASD: case ZYDIS_MNEMONIC_SCASQ:
		return element(t, n);
	case ZYDIS_MNEMONIC_XLAT: return xlat(t, n);
	case ZYDIS_MNEMONIC_CMPXCHG8B: return cmpxchg8b(t, n);
	case ZYDIS_MNEMONIC_EMMS: return emms(t, n);
	default: return false;
	}
}
