/*
 * x87 instructions, on the host's x87 registers (live.c). What would show where it ran (the pointers of FSTENV, FSAVE,
 * FXSAVE) or replaces the state goes to its handler; so does a control word that unmasks an exception.
 */
#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

static bool native(const struct tinsn *i, const struct insn *in)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_FNSTSW: case ZYDIS_MNEMONIC_FNSTCW: case ZYDIS_MNEMONIC_FNCLEX: case ZYDIS_MNEMONIC_FLDCW:
	case ZYDIS_MNEMONIC_FWAIT:
		return true;
	default:
		/* Through a stub that ran once on this host. */
		return in->fn == x87_exec && ((const struct vec_op *)in->ptr)->proven;
	}
}

/* The value is looked at where the guest cannot change it any more. */
static void fldcw(struct tr *t, unsigned n, struct cold *k)
{
	struct em *e = &t->h;
	const void *p = &t->j->low->fcw;

	gen_point(t, n);
	EM(e, 0x41, 0x0f, 0xb7, 0x0f);                  /* movzx ecx, word [r15] */
	e8(e, 0x66);
	em_op_abs(e, false, 0x89, H_RCX, p);
	EM(e, 0xf7, 0xd1, 0xf6, 0xc1, 0x3f);            /* not ecx ; test cl, 0x3f */
	cold_from(k, em_jcc(e, 5));
	em_op_abs(e, false, 0xd9, 5, p);
}

#define SLOW 32         /* instructions' worth of time, as a handler's call (run.c) */

static bool slow(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_FSIN: case ZYDIS_MNEMONIC_FCOS: case ZYDIS_MNEMONIC_FSINCOS: case ZYDIS_MNEMONIC_FPTAN: case ZYDIS_MNEMONIC_FPATAN:
	case ZYDIS_MNEMONIC_F2XM1: case ZYDIS_MNEMONIC_FYL2X: case ZYDIS_MNEMONIC_FYL2XP1: case ZYDIS_MNEMONIC_FPREM: case ZYDIS_MNEMONIC_FPREM1:
	case ZYDIS_MNEMONIC_FBLD: case ZYDIS_MNEMONIC_FBSTP:
		return true;
	default:
		return false;
	}
}

/* cpu_charge(): a row of these would keep requests waiting for more than they may. Destroys flags. */
static void charge(struct tr *t, unsigned n)
{
	gen_clobber(t, n);
	em_op_abs(&t->h, false, 0x81, 5, &t->c->budget);        /* sub dword [budget], SLOW ; add dword [charged], SLOW */
	e32(&t->h, SLOW);
	em_op_abs(&t->h, false, 0x81, 0, &t->c->charged);
	e32(&t->h, SLOW);
}

bool gen_x87(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const struct insn *in = t->t[n].in;
	struct cold *k = NULL;
	struct slots s;

	if (i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || i->z.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT ||
	    ((i->z.opcode & 0xf8) != 0xd8 && i->z.opcode != 0x9b) || (in->flags & IF_END) || !host_avx() || !native(i, in))
		return false;
	slots_find(&s, i);
	if (!(t->live & JV_X87) || s.mem) {
		gen_clobber(t, n);
		k = cold_new(t, n, 1);
		if (!(t->live & JV_X87))
			gen_live(t, k, JV_X87);
	}
	if (s.mem) {
		if (s.mem->size < 16 || s.mem->size > 80 ||
		    !gen_operand(t, n, k, s.mem->size / 8, s.mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
			return false;
	}
	t->live |= JV_X87;
	if (slow(i->z.mnemonic))
		charge(t, n);
	t->mem_disp = 0;
	if (i->z.mnemonic == ZYDIS_MNEMONIC_FLDCW) {
		fldcw(t, n, k);
	} else if (i->z.mnemonic != ZYDIS_MNEMONIC_FWAIT) {
		gen_flags_before(t, n);
		if (!gen_rewrite(t, i, tr_bytes(t, n), (struct regs){ -1, -1, -1, -1, s.mem, false }))
			return false;
		if (i->z.mnemonic == ZYDIS_MNEMONIC_FNSTSW && !s.mem)
			EM(&t->h, 0x66, 0x41, 0x89, 0xc5);      /* mov r13w, ax */
		gen_flags_after(t, n);
	}
	cold_done(t, n, k);
	return true;
}
