/*
 * String instructions with a repeat of 64-bit code. REP STOS and REP MOVS: by the host's own instruction, where the whole run is not longer than a page, goes upwards and lies in one page on
 * each side, or two that are next to each other in the host's memory, too. What is longer, faults or goes down is the handler's business. So is a run whose source begins behind its target
 * and is written while it is read: should the host trap in the middle (resume.c), all of it is done again, and the source has to be what it was.
 *
 * CMPS and SCAS run as far as the page goes, upwards; if that does not end them their handler goes on, at the next page.
 */
#include "softkvm/jit/internal.h"

/* log2 of the element's size. */
static unsigned order(const struct tinsn *i) { return !(i->z.opcode & 1) ? 0 : i->z.operand_width == 64 ? 3 : i->z.operand_width == 32 ? 2 : 1; }

static bool moves(const struct tinsn *i) { return (i->z.opcode & 0xfe) == 0xa4; }

static bool compares(const struct tinsn *i) { return (i->z.opcode & 0xf6) == 0xa6; }

bool gen_string_may(const struct tr *t, const struct tinsn *i)
{
	return tr_64(t) && i->z.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
	       (moves(i) || compares(i) || (i->z.opcode & 0xfe) == 0xaa) && (i->in->flags & (IF_REP | IF_REPNE)) && !(i->in->flags & (IF_A32 | IF_A16 | IF_NEW_IMM)) &&
	       i->in->seg != SEG_FS && i->in->seg != SEG_GS;
}

/* ST = host address of the run at guest register g. SA: its length, and afterwards still. */
static void span(struct tr *t, struct cold *k, unsigned g, bool write)
{
	struct em *e = &t->h;

	em_mov(e, ST, gen_get(t, g, ST));
	e8(e, 0xe8);
	e32(e, 0);
	if (!e->full)
		em_to(e->p - 4, t->j->rw + t->j->span[t->tlb_mode][write]);
	cold_from(k, em_jcc(e, 4));
}

/* reg = bytes in all: r14d << order. */
static void bytes(struct em *e, unsigned reg, unsigned shift)
{
	EM(e, 0x44, 0x89);                                      /* mov reg, r14d */
	e8(e, 0xf0 | reg);
	if (!shift)
		return;
	e8(e, 0xc1);                                            /* shl reg, order */
	e8(e, 0xe0 | reg);
	e8(e, shift);
}

static void host_string(struct tr *t, unsigned n, uint8_t opcode)
{
	unsigned size = order(&t->t[n]);
	struct em *e = &t->h;

	gen_point(t, n);
	if (size == 1)
		e8(e, 0x66);
	e8(e, compares(&t->t[n]) && (t->t[n].in->flags & IF_REPNE) ? 0xf2 : 0xf3);
	if (size == 3)
		e8(e, 0x48);
	e8(e, opcode | !!size);
}

static void stos(struct tr *t, unsigned n)
{
	struct em *e = &t->h;

	EM(e, 0x4c, 0x87, 0xff);                                /* xchg rdi, r15 */
	em_mov(e, H_RAX, H_R13);
	em_mov(e, H_RCX, H_R14);
	t->point_flags = POINT_RDI;
	host_string(t, n, 0xaa);
	em_mov(e, H_RDI, ST);
}

/* ST: the source's host address; SA: the length. */
static void movs(struct tr *t, unsigned n, struct cold *k)
{
	struct em *e = &t->h;

	em_mov(e, SC, ST);
	em_op_abs(e, true, 0x2b, SC, &t->j->low->string_to);    /* sub rcx, [string_to] ; cmp rcx, rax */
	EM(e, 0x48, 0x39, 0xc1);
	cold_from(k, em_jcc(e, 2));
	em_mov(e, SA, H_RSI);
	em_mov(e, H_RSI, ST);
	em_mov(e, ST, H_RDI);
	em_load(e, H_RDI, &t->j->low->string_to);
	em_mov(e, H_RCX, H_R14);
	t->point_flags = POINT_RDI | POINT_RSI;
	host_string(t, n, 0xa4);
	em_mov(e, H_RDI, ST);
	em_mov(e, H_RSI, SA);
}

/* Guest register g += SC. */
static void advance(struct tr *t, unsigned g)
{
	unsigned reg = gen_get(t, g, SA);

	em_mem(&t->h, true, 0x8d, reg, (int)reg, SC, 0, 0);
	gen_put(t, g, reg);
}

/* Jumps when the count is 0 or more than a page has; returns where the code that goes on behind the instruction if it is 0 jumps. */
static uint8_t *count(struct tr *t, struct cold *k, unsigned shift)
{
	struct em *e = &t->h, *cold = &t->cold;
	uint8_t *none;

	em_mem(e, true, 0x8d, SA, H_R14, -1, 0, -1);
	EM(e, 0x48, 0x3d);                                      /* cmp rax, imm32 */
	e32(e, (4096u >> shift) - 1);
	em_here(cold, em_jcc(e, 7));
	EM(cold, 0x4d, 0x85, 0xf6);                             /* test r14, r14 */
	none = em_jcc(cold, 4);
	cold_from(k, em_jmp(cold));
	return none;
}

/* Upwards, or else the handler's. */
static struct cold *begin(struct tr *t, unsigned n)
{
	struct cold *k;

	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	k->final = true;                                        /* the handler's way is the loop's */
	em_op_abs(&t->h, false, 0xf7, 0, &t->c->eflags);        /* test dword [eflags], DF */
	e32(&t->h, FL_DF);
	cold_from(k, em_jcc(&t->h, 5));
	return k;
}

static void over(struct tr *t)
{
	e8(&t->h, 0xc6);                                        /* mov byte [rep_begun], 0 */
	em_abs(&t->h, 0, &t->c->rep_begun);
	e8(&t->h, 0);
}

/* -- CMPS and SCAS ------------------------------------------------------------------------------- */
/* SA, and string_n: how many elements to compare, as many as there are in the pages and as are wanted; at least one. */
static void some(struct tr *t, struct cold *k, unsigned shift, bool two)
{
	struct em *e = &t->h;

	EM(e, 0x89, 0xf8, 0x0d, 0x00, 0xf0, 0xff, 0xff, 0xf7, 0xd8, 0xc1, 0xe8);        /* mov eax, edi ; or eax, ~4095 ; neg eax ; shr eax, shift */
	e8(e, shift);
	if (two) {
		EM(e, 0x41, 0x89, 0xf7, 0x41, 0x81, 0xcf, 0x00, 0xf0, 0xff, 0xff, 0x41, 0xf7, 0xdf, 0x41, 0xc1, 0xef);  /* r15d: of rsi */
		e8(e, shift);
		EM(e, 0x4c, 0x39, 0xf8, 0x49, 0x0f, 0x47, 0xc7);        /* cmp rax, r15 ; cmova rax, r15 */
	}
	EM(e, 0x4c, 0x39, 0xf0, 0x49, 0x0f, 0x47, 0xc6);                /* cmp rax, r14 ; cmova rax, r14 */
	EM(e, 0x48, 0x85, 0xc0);                                        /* test rax, rax */
	cold_from(k, em_jcc(e, 4));
	em_store(e, SA, &t->j->low->string_n);
}

static void at(struct tr *t, struct cold *k, unsigned host, unsigned shift)
{
	em_mov(&t->h, ST, host);
	gen_check(t, k, 1u << shift, false);
}

/* As cpu_charge(), one for 16 bytes of the elements in SA. Flags stay. */
static void charge(struct tr *t, unsigned shift)
{
	struct em *e = &t->h;

	em_imm(e, ST, 4 - shift);
	EM(e, 0xc4, 0xe2, 0x83, 0xf7, 0xc0);                    /* shrx rax, rax, r15 */
	em_op_abs(e, false, 0x8b, SC, &t->c->budget);
	EM(e, 0xf7, 0xd0, 0x8d, 0x4c, 0x01, 0x01);              /* not eax ; lea ecx, [rcx + rax + 1] */
	em_op_abs(e, false, 0x89, SC, &t->c->budget);
	EM(e, 0xf7, 0xd0);
	em_op_abs(e, false, 0x8b, SC, &t->c->charged);
	EM(e, 0x8d, 0x0c, 0x01);                                /* lea ecx, [rcx + rax] */
	em_op_abs(e, false, 0x89, SC, &t->c->charged);
}

/* Registers move by what was compared: string_n, less what rcx has left. Flags are the result. */
static void compared(struct tr *t, unsigned shift, bool two)
{
	struct em *e = &t->h;

	em_load(e, SA, &t->j->low->string_n);
	EM(e, 0x48, 0xf7, 0xd1, 0x48, 0x8d, 0x44, 0x08, 0x01);  /* not rcx ; lea rax, [rax + rcx + 1] */
	em_mem(e, true, 0x8d, H_RDI, H_RDI, H_RAX, shift, 0);
	if (two)
		em_mem(e, true, 0x8d, H_RSI, H_RSI, H_RAX, shift, 0);
	em_mov(e, SC, SA);
	EM(e, 0x48, 0xf7, 0xd1, 0x4d, 0x8d, 0x74, 0x0e, 0x01);  /* not rcx ; lea r14, [r14 + rcx + 1] */
	charge(t, shift);
}

/* The flags that the last comparison left are the guest's, and nothing that follows changes them. */
static void compare(struct tr *t, unsigned n, struct cold *k)
{
	const struct tinsn *i = &t->t[n];
	bool two = !(i->z.opcode & 8);
	unsigned shift = order(i);
	struct em *e = &t->h;
	uint8_t *ends;

	some(t, k, shift, two);
	at(t, k, H_RDI, shift);
	if (two) {
		em_store(e, ST, &t->j->low->string_to);
		at(t, k, H_RSI, shift);
		em_mov(e, SA, H_RSI);
		em_mov(e, H_RSI, ST);
		em_mov(e, ST, H_RDI);
		em_load(e, H_RDI, &t->j->low->string_to);
	} else {
		EM(e, 0x4c, 0x87, 0xff);                        /* xchg rdi, r15 */
		em_mov(e, SA, H_R13);
	}
	em_load(e, SC, &t->j->low->string_n);
	t->point_flags = POINT_RDI | (two ? POINT_RSI : 0);
	host_string(t, n, i->z.opcode & 0xfe);
	t->point_flags = 0;
	em_mov(e, H_RDI, ST);
	if (two)
		em_mov(e, H_RSI, SA);
	compared(t, shift, two);
	ends = em_jcc(e, i->in->flags & IF_REPNE ? 4 : 5);
	em_mov(e, SC, H_R14);
	EM(e, 0xe3, 0x05);                                      /* jrcxz, over the jump */
	cold_from(k, em_jmp(e));
	em_here(e, ends);
	over(t);
	gen_flags_after(t, n);
}

bool gen_string(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	struct em *e = &t->h;
	struct cold *k;
	uint8_t *none;

	if (!gen_string_may(t, i))
		return false;
	k = begin(t, n);
	if (compares(i)) {
		compare(t, n, k);
		return true;
	}
	none = count(t, k, order(i));
	bytes(e, SA, order(i));
	span(t, k, R_RDI, true);
	if (moves(i)) {
		em_store(e, ST, &t->j->low->string_to);
		span(t, k, R_RSI, false);
		movs(t, n, k);
	} else {
		stos(t, n);
	}
	t->point_flags = 0;
	bytes(e, SC, order(i));
	advance(t, R_RDI);
	if (moves(i))
		advance(t, R_RSI);
	EM(e, 0xc1, 0xe9, 0x04);                                /* shr ecx, 4: as cpu_charge() */
	em_op_abs(e, false, 0x29, SC, &t->c->budget);
	em_op_abs(e, false, 0x01, SC, &t->c->charged);
	EM(e, 0x45, 0x31, 0xf6);                                /* xor r14d, r14d */
	em_here(e, none);
	over(t);
	return true;
}
