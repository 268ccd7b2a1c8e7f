/* Integer instructions: the same instruction on the registers that hold the guest's. */
#include <stdio.h>

#include "softkvm/jit/slots.h"
#include "softkvm/vec/vec.h"

/* -- slots --------------------------------------------------------------------------------------- */
static int slot_of(const ZydisDecodedOperand *o)
{
	switch (o->encoding) {
	case ZYDIS_OPERAND_ENCODING_MODRM_REG: return SL_REG;
	case ZYDIS_OPERAND_ENCODING_MODRM_RM: return SL_RM;
	case ZYDIS_OPERAND_ENCODING_OPCODE: return SL_OP;
	case ZYDIS_OPERAND_ENCODING_NDSNDD: return SL_V;
	default: return -1;
	}
}

void slots_find(struct slots *s, const struct tinsn *i)
{
	memset(s, 0, sizeof *s);
	for (unsigned k = 0; k < SL_COUNT; k++)
		s->guest[k] = s->host[k] = -1;
	for (unsigned k = 0; k < i->z.operand_count; k++) {
		const ZydisDecodedOperand *o = &i->op[k];
		ZydisRegisterClass c;
		int sl;

		if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
			continue;
		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
			if (s->mem || o->encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM || o->mem.type != ZYDIS_MEMOP_TYPE_MEM)
				s->other = true;
			s->mem = o;
			continue;
		}
		if (o->type != ZYDIS_OPERAND_TYPE_REGISTER) {
			s->other = true;
			continue;
		}
		c = ZydisRegisterGetClass(o->reg.value);
		if (c == ZYDIS_REGCLASS_FLAGS)
			continue;
		if (c != ZYDIS_REGCLASS_GPR8 && c != ZYDIS_REGCLASS_GPR16 && c != ZYDIS_REGCLASS_GPR32 && c != ZYDIS_REGCLASS_GPR64) {
			s->other = true;
			continue;
		}
		sl = slot_of(o);
		if (sl < 0) {
			s->implicit = true;
			continue;
		}
		s->guest[sl] = insn_reg_off(o->reg.value) / 8;
		s->high[sl] = insn_reg_off(o->reg.value) & 1;
		s->write[sl] = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
		/* Parts of registers keep the rest; what is written on a condition keeps all. */
		/* BSF and BSR of 0 keep it as well. */
		s->read[sl] = i->z.mnemonic == ZYDIS_MNEMONIC_BSF || i->z.mnemonic == ZYDIS_MNEMONIC_BSR || (o->actions & ZYDIS_OPERAND_ACTION_MASK_READ) || o->size < 32 || o->actions != ZYDIS_OPERAND_ACTION_WRITE;
	}
	s->scratch[s->nscratch++] = SA;
	s->scratch[s->nscratch++] = SC;
	if (!s->mem)
		s->scratch[s->nscratch++] = ST;
}

/* rorx d, s, n: of 64 bits */
static void rotate(struct em *e, unsigned d, unsigned s, unsigned n)
{
	e8(e, 0xc4);
	e8(e, 0x43 | (d >> 3 ? 0 : 0x80) | (s >> 3 ? 0 : 0x20));
	e8(e, 0xfb);
	e8(e, 0xf0);
	e8(e, 0xc0 | (d & 7) << 3 | (s & 7));
	e8(e, n);
}

bool slots_load(struct tr *t, struct slots *s)
{
	unsigned used = 0;

	for (unsigned k = 0; k < SL_COUNT; k++) {
		int g = s->guest[k];

		if (g < 0)
			continue;
		if (t->map[g] >= 0 && !s->high[k]) {
			s->host[k] = t->map[g];
			continue;
		}
		for (unsigned m = 0; m < k && !s->high[k]; m++)
			if (s->guest[m] == g && !s->high[m]) {
				s->host[k] = s->host[m];
				if (s->read[k] && !s->read[m])
					em_load(&t->h, (unsigned)s->host[k], &t->c->gpr[g]);
			}
		if (s->host[k] >= 0)
			continue;
		if (used == s->nscratch)
			return false;
		s->host[k] = (int)s->scratch[used++];
		if (s->high[k]) {
			rotate(&t->h, (unsigned)s->host[k], gen_get(t, (unsigned)g, (unsigned)s->host[k]), 8);
		} else if (s->read[k]) {
			em_load(&t->h, (unsigned)s->host[k], &t->c->gpr[g]);
		}
	}
	return true;
}

/* AH..BH from the low byte of `host`; flags stay. */
static void store_high(struct tr *t, unsigned guest, unsigned host)
{
	unsigned h = (unsigned)t->map[guest];

	if (t->map[guest] < 0) {
		em_op_abs(&t->h, false, 0x88, host, (uint8_t *)&t->c->gpr[guest] + 1);
		return;
	}
	rotate(&t->h, h, h, 8);
	e8(&t->h, 0x40 | host >> 3 << 2 | h >> 3);
	e8(&t->h, 0x88);
	e8(&t->h, 0xc0 | (host & 7) << 3 | (h & 7));
	rotate(&t->h, h, h, 56);
}

void slots_store(struct tr *t, const struct slots *s)
{
	for (unsigned k = 0; k < SL_COUNT; k++)
		if (s->guest[k] >= 0 && s->write[k] && !s->high[k] && t->map[s->guest[k]] < 0)
			em_store(&t->h, (unsigned)s->host[k], &t->c->gpr[s->guest[k]]);
	for (unsigned k = 0; k < SL_COUNT; k++)
		if (s->guest[k] >= 0 && s->write[k] && s->high[k])
			store_high(t, (unsigned)s->guest[k], (unsigned)s->host[k]);
}

struct regs slots_regs(const struct slots *s)
{
	return (struct regs){ .reg = s->host[SL_REG], .rm = s->host[SL_RM], .op = s->host[SL_OP], .v = s->host[SL_V], .mem = s->mem };
}

/* -- around an instruction ----------------------------------------------------------------------- */
void gen_flags_before(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];

	if (i->tested || (i->written && (i->live & ~i->killed)))
		gen_flags_load(t);
}

struct cold *gen_access(struct tr *t, unsigned n, const struct slots *s, bool *ok)
{
	struct cold *k = NULL;

	*ok = true;
	t->mem_disp = 0;
	if (s->mem && t->row) {
		t->mem_disp = (int8_t)((s->mem->mem.disp.has_displacement ? s->mem->mem.disp.value : 0) - t->row_low);
	} else if (s->mem) {
		gen_clobber(t, n);
		k = cold_new(t, n, 1);
		*ok = s->mem->size >= 8 && s->mem->size <= 512 &&
		      gen_operand(t, n, k, s->mem->size / 8, s->mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
	}
	return k;
}

void cold_done(struct tr *t, unsigned n, struct cold *k)
{
	if (!k)
		return;
	k->back = t->h.p;
	k->need = t->live;
}

/* -- which --------------------------------------------------------------------------------------- */
static bool plain(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB: case ZYDIS_MNEMONIC_AND:
	case ZYDIS_MNEMONIC_SUB: case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST: case ZYDIS_MNEMONIC_MOV:
	case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSXD: case ZYDIS_MNEMONIC_IMUL:
	case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: case ZYDIS_MNEMONIC_NEG: case ZYDIS_MNEMONIC_NOT:
	case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR:
	case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR: case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD:
	case ZYDIS_MNEMONIC_BSF: case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_TZCNT: case ZYDIS_MNEMONIC_LZCNT:
	case ZYDIS_MNEMONIC_POPCNT: case ZYDIS_MNEMONIC_BSWAP: case ZYDIS_MNEMONIC_XCHG: case ZYDIS_MNEMONIC_XADD:
	case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_MOVBE: case ZYDIS_MNEMONIC_MOVNTI: case ZYDIS_MNEMONIC_CRC32:
	case ZYDIS_MNEMONIC_ADCX: case ZYDIS_MNEMONIC_ADOX:
	case ZYDIS_MNEMONIC_ANDN: case ZYDIS_MNEMONIC_BEXTR: case ZYDIS_MNEMONIC_BLSI: case ZYDIS_MNEMONIC_BLSMSK:
	case ZYDIS_MNEMONIC_BLSR: case ZYDIS_MNEMONIC_BZHI: case ZYDIS_MNEMONIC_PDEP: case ZYDIS_MNEMONIC_PEXT:
	case ZYDIS_MNEMONIC_RORX: case ZYDIS_MNEMONIC_SARX: case ZYDIS_MNEMONIC_SHLX: case ZYDIS_MNEMONIC_SHRX: case ZYDIS_MNEMONIC_MULX:
	case ZYDIS_MNEMONIC_CMOVB: case ZYDIS_MNEMONIC_CMOVBE: case ZYDIS_MNEMONIC_CMOVL: case ZYDIS_MNEMONIC_CMOVLE:
	case ZYDIS_MNEMONIC_CMOVNB: case ZYDIS_MNEMONIC_CMOVNBE: case ZYDIS_MNEMONIC_CMOVNL: case ZYDIS_MNEMONIC_CMOVNLE:
	case ZYDIS_MNEMONIC_CMOVNO: case ZYDIS_MNEMONIC_CMOVNP: case ZYDIS_MNEMONIC_CMOVNS: case ZYDIS_MNEMONIC_CMOVNZ:
	case ZYDIS_MNEMONIC_CMOVO: case ZYDIS_MNEMONIC_CMOVP: case ZYDIS_MNEMONIC_CMOVS: case ZYDIS_MNEMONIC_CMOVZ:
	case ZYDIS_MNEMONIC_SETB: case ZYDIS_MNEMONIC_SETBE: case ZYDIS_MNEMONIC_SETL: case ZYDIS_MNEMONIC_SETLE:
	case ZYDIS_MNEMONIC_SETNB: case ZYDIS_MNEMONIC_SETNBE: case ZYDIS_MNEMONIC_SETNL: case ZYDIS_MNEMONIC_SETNLE:
	case ZYDIS_MNEMONIC_SETNO: case ZYDIS_MNEMONIC_SETNP: case ZYDIS_MNEMONIC_SETNS: case ZYDIS_MNEMONIC_SETNZ:
	case ZYDIS_MNEMONIC_SETO: case ZYDIS_MNEMONIC_SETP: case ZYDIS_MNEMONIC_SETS: case ZYDIS_MNEMONIC_SETZ:
	case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
		return true;
	default:
		return false;
	}
}

/* A client may offer the guest what this host lacks: then the handler, which knows other ways or none, runs it. */
static bool host_has(const struct tinsn *i)
{
	switch (i->z.meta.isa_set) {
	case ZYDIS_ISA_SET_I86: case ZYDIS_ISA_SET_I186: case ZYDIS_ISA_SET_I386: case ZYDIS_ISA_SET_I486: case ZYDIS_ISA_SET_I486REAL:
	case ZYDIS_ISA_SET_LONGMODE: case ZYDIS_ISA_SET_CMOV: case ZYDIS_ISA_SET_PENTIUMREAL: case ZYDIS_ISA_SET_PPRO:
	case ZYDIS_ISA_SET_SSE2:
		return true;
	case ZYDIS_ISA_SET_BMI1: return __builtin_cpu_supports("bmi");
	case ZYDIS_ISA_SET_BMI2: return __builtin_cpu_supports("bmi2");
	case ZYDIS_ISA_SET_LZCNT: case ZYDIS_ISA_SET_MOVBE:     /* came before BMI2, and gcc and clang differ in naming them */
		return __builtin_cpu_supports("bmi2");
	case ZYDIS_ISA_SET_POPCNT: return __builtin_cpu_supports("popcnt");
	case ZYDIS_ISA_SET_SSE42: return __builtin_cpu_supports("sse4.2");
	case ZYDIS_ISA_SET_ADOX_ADCX: return host_adx();
	default: return false;
	}
}

static bool shift_by_cl(const struct tinsn *i)
{
	uint8_t op = i->z.opcode;

	if (i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	return i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT ? op == 0xd2 || op == 0xd3 :
	       i->z.opcode_map == ZYDIS_OPCODE_MAP_0F && (op == 0xa5 || op == 0xad);
}

/* Bit tests with a register index reach memory beyond the operand. */
static bool bit_string(const struct tinsn *i, const struct slots *s)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
		return s->mem && s->guest[SL_REG] >= 0;
	default:
		return false;
	}
}

/* -- forms that need more ------------------------------------------------------------------------ */
static unsigned put_prefix66(struct tr *t, const struct tinsn *i)
{
	if (i->z.operand_width == 16)
		e8(&t->h, 0x66);
	return 0x40 | (i->z.operand_width == 64) << 3;
}

/* An opcode without registers beyond the eighth. */
static void put_op(struct em *e, unsigned width, unsigned op)
{
	if (width != 32)
		e8(e, width == 64 ? 0x48 : 0x66);
	e8(e, op);
}

/* op al/ax/eax/rax, imm: by way of the modrm form on the register that holds the guest's rax. */
static bool accumulator(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	uint8_t op = i->z.opcode;
	bool test = op == 0xa8 || op == 0xa9;
	unsigned rex;

	if (i->z.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT || i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
	    (!test && (op >= 0x40 || (op & 6) != 4)))
		return false;
	gen_flags_before(t, n);
	rex = put_prefix66(t, i);
	e8(&t->h, rex | 1);
	e8(&t->h, test ? 0xf6 | (op & 1) : 0x80 | (op & 1));
	e8(&t->h, 0xc0 | (test ? 0 : op & 0x38) | (H_R13 & 7));
	for (unsigned k = i->z.raw.imm[0].offset; k < i->z.length; k++)
		e8(&t->h, tr_bytes(t, n)[k]);
	gen_flags_after(t, n);
	return true;
}

/* rax (and rdx, which is in its place) are implied: through the host's. */
static bool with_rax(const struct tinsn *i)
{
	uint8_t op = i->z.opcode;

	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_CBW: case ZYDIS_MNEMONIC_CWDE: case ZYDIS_MNEMONIC_CDQE:
	case ZYDIS_MNEMONIC_CWD: case ZYDIS_MNEMONIC_CDQ: case ZYDIS_MNEMONIC_CQO:
	case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_MUL:
		return true;
	case ZYDIS_MNEMONIC_IMUL:
		return i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (op == 0xf6 || op == 0xf7);
	default:
		return false;
	}
}

static bool lea(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	const ZydisDecodedOperandMem *m = &i->op[1].mem;
	unsigned g = insn_reg_off(i->op[0].reg.value) / 8, d = t->map[g] >= 0 ? (unsigned)t->map[g] : SA;
	int base = -1, index = -1;
	int64_t disp = m->disp.has_displacement ? m->disp.value : 0;
	bool w = i->z.operand_width == 64;

	if (i->z.operand_width == 16 || i->z.address_width == 16 || m->base == ZYDIS_REGISTER_EIP)
		return false;
	if (m->base == ZYDIS_REGISTER_RIP) {
		uint64_t v = tr_end(t, n) + (uint64_t)disp;

		gen_rip(&t->h, t, w, d, v);
	} else {
		if (m->base != ZYDIS_REGISTER_NONE)
			base = (int)gen_get(t, insn_reg_off(m->base) / 8, SC);
		if (m->index != ZYDIS_REGISTER_NONE)
			index = (int)gen_get(t, insn_reg_off(m->index) / 8, SA);
		em_mem(&t->h, w && i->z.address_width == 64, 0x8d, d, base, index,
		       m->scale == 8 ? 3 : m->scale == 4 ? 2 : m->scale == 2 ? 1 : 0, (int32_t)disp);
	}
	gen_put(t, g, d);
	return true;
}

static bool xchg_acc(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	unsigned g, h, rex;

	if (i->op[0].encoding == ZYDIS_OPERAND_ENCODING_OPCODE)
		g = insn_reg_off(i->op[0].reg.value) / 8;
	else
		g = insn_reg_off(i->op[1].reg.value) / 8;
	h = gen_get(t, g, SC);
	rex = put_prefix66(t, i);
	e8(&t->h, rex | 4 | h >> 3);
	e8(&t->h, 0x87);
	e8(&t->h, 0xc0 | (H_R13 & 7) << 3 | (h & 7));
	gen_put(t, g, h);
	return true;
}

/* mov between al, ax, eax, rax and an address in the instruction: by way of the modrm form. */
static bool moffs(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	bool store = i->z.opcode & 2;
	struct cold *k;

	gen_clobber(t, n);
	k = cold_new(t, n, 1);
	if (!gen_operand(t, n, k, i->z.opcode & 1 ? i->z.operand_width / 8 : 1, store))
		return false;
	gen_point(t, n);
	e8(&t->h, put_prefix66(t, i) | 5);
	e8(&t->h, (store ? 0x88 : 0x8a) | (i->z.opcode & 1));
	e8(&t->h, (H_R13 & 7) << 3 | (ST & 7));
	cold_done(t, n, k);
	return true;
}

bool int_row(const struct tinsn *i)
{
	return (plain(i->z.mnemonic) && host_has(i)) || i->z.mnemonic == ZYDIS_MNEMONIC_LEA || int_nothing(i) || with_rax(i);
}

bool int_nothing(const struct tinsn *i)
{
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_NOP: case ZYDIS_MNEMONIC_ENDBR64: case ZYDIS_MNEMONIC_ENDBR32:
	case ZYDIS_MNEMONIC_PREFETCH: case ZYDIS_MNEMONIC_PREFETCHNTA: case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1: case ZYDIS_MNEMONIC_PREFETCHT2: case ZYDIS_MNEMONIC_PREFETCHW:
		return true;
	default:
		return false;
	}
}

static bool small(struct tr *t, unsigned n, bool *done)
{
	const struct tinsn *i = &t->t[n];

	*done = true;
	if (int_nothing(i))
		return true;
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_LEA:
		return lea(t, n);
	case ZYDIS_MNEMONIC_MOV:
		if (i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i->z.opcode & 0xfc) == 0xa0)
			return moffs(t, n);
		break;
	case ZYDIS_MNEMONIC_CLC: case ZYDIS_MNEMONIC_STC: case ZYDIS_MNEMONIC_CMC:
		gen_flags_before(t, n);
		e8(&t->h, i->z.opcode);
		gen_flags_after(t, n);
		return true;
	case ZYDIS_MNEMONIC_SAHF: case ZYDIS_MNEMONIC_LAHF:
		gen_flags_before(t, n);
		em_mov(&t->h, SA, H_R13);
		e8(&t->h, i->z.opcode);
		em_mov(&t->h, H_R13, SA);
		gen_flags_after(t, n);
		return true;
	case ZYDIS_MNEMONIC_LFENCE: case ZYDIS_MNEMONIC_SFENCE: case ZYDIS_MNEMONIC_MFENCE: case ZYDIS_MNEMONIC_PAUSE:
		if (i->z.mnemonic == ZYDIS_MNEMONIC_PAUSE)
			return false;
		EM(&t->h, 0x0f, 0xae);
		e8(&t->h, i->z.mnemonic == ZYDIS_MNEMONIC_LFENCE ? 0xe8 : i->z.mnemonic == ZYDIS_MNEMONIC_MFENCE ? 0xf0 : 0xf8);
		return true;
	case ZYDIS_MNEMONIC_XCHG:
		if (i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i->z.opcode & 0xf8) == 0x90)
			return xchg_acc(t, n);
		break;
	default:
		break;
	}
	*done = false;
	return false;
}

/* Of dx:ax and wider by ecx, after em_mov(SA, H_R13). */
static void divide_wide(struct tr *t, struct cold *k, unsigned width, bool sign)
{
	struct em *e = &t->h;

	if (sign) {
		put_op(e, width, 0xc1);                 /* sar eax, 31 ; cmp eax, edx */
		e8(e, 0xf8);
		e8(e, width - 1);
		put_op(e, width, 0x39);
		e8(e, 0xd0);
		cold_from(k, em_jcc(e, 5));
		put_op(e, width, 0x8d);                 /* lea eax, [rcx + 1] ; cmp eax, 1: of 0 and -1 */
		EM(e, 0x41, 0x01);
		put_op(e, width, 0x83);
		EM(e, 0xf8, 0x01);
		cold_from(k, em_jcc(e, 6));
		em_mov(e, SA, H_R13);
	} else {
		put_op(e, width, 0x39);                 /* cmp edx, ecx */
		e8(e, 0xca);
		cold_from(k, em_jcc(e, 3));
	}
	put_op(e, width, 0xf7);
	e8(e, sign ? 0xf9 : 0xf1);
}

/* Of ax by cl. */
static void divide_byte(struct tr *t, struct cold *k, bool sign)
{
	struct em *e = &t->h;

	if (sign) {
		EM(e, 0x45, 0x0f, 0xbe, 0xfd, 0x66, 0x45, 0x39, 0xef);  /* movsx r15d, r13b ; cmp r15w, r13w */
		cold_from(k, em_jcc(e, 5));
		EM(e, 0x8d, 0x41, 0x01, 0x3c, 0x01);    /* lea eax, [rcx + 1] ; cmp al, 1 */
		cold_from(k, em_jcc(e, 6));
		em_mov(e, SA, H_R13);
	} else {
		EM(e, 0x38, 0xcc);                      /* cmp ah, cl */
		cold_from(k, em_jcc(e, 3));
	}
	e8(e, 0xf6);
	e8(e, sign ? 0xf9 : 0xf1);
}

/*
 * Division, after a look at what would fault: a quotient that does not fit (0 as divisor included) is the handler's. Of IDIV only
 * dividends that are a sign-extended rax run here, which is what compilers make.
 */
static bool divide(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	bool byte = !(i->z.opcode & 1), sign = i->z.mnemonic == ZYDIS_MNEMONIC_IDIV, ok;
	unsigned width = i->z.operand_width;
	struct em *e = &t->h;
	struct cold *k;
	struct slots s;

	slots_find(&s, i);
	if (!s.mem && s.guest[SL_RM] < 0)
		return false;
	gen_clobber(t, n);
	if (s.mem) {
		k = gen_access(t, n, &s, &ok);
		if (!ok)
			return false;
		gen_point(t, n);
		/* The guest may change it in memory: look at a copy. */
		if (byte)
			EM(e, 0x41, 0x0f, 0xb6, 0x0f);  /* movzx ecx, byte [r15] */
		else if (width == 16)
			EM(e, 0x41, 0x0f, 0xb7, 0x0f);
		else
			em_mem(e, width == 64, 0x8b, SC, ST, -1, 0, 0);
	} else {
		k = cold_new(t, n, 1);
		em_mov(e, SC, gen_get(t, (unsigned)s.guest[SL_RM], SC));
		if (s.high[SL_RM])
			EM(e, 0x0f, 0xb6, 0xcd);        /* movzx ecx, ch */
	}
	em_mov(e, SA, H_R13);
	if (byte)
		divide_byte(t, k, sign);
	else
		divide_wide(t, k, width, sign);
	em_mov(e, H_R13, SA);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}

/* One whose value others may wait for, and which leaves SC alone. */
static bool plain_load(const struct tr *t, const struct tinsn *i, const struct slots *s)
{
	if (!t->k->in_line || t->row || !s->mem || (s->mem->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
		return false;
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOV: case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD:
		return s->guest[SL_REG] >= 0 && t->map[s->guest[SL_REG]] >= 0 && !s->high[SL_REG];
	default:
		return false;
	}
}

bool gen_int(struct tr *t, unsigned n)
{
	const struct tinsn *i = &t->t[n];
	bool rax = with_rax(i), cl = shift_by_cl(i), apart, done, ok;
	struct slots s;
	struct cold *k;
	struct regs r;

	if (t->t[n].in->flags & IF_END)
		return false;
	ok = small(t, n, &done);
	if (done)
		return ok;
	if (i->z.mnemonic == ZYDIS_MNEMONIC_DIV || i->z.mnemonic == ZYDIS_MNEMONIC_IDIV)
		return divide(t, n);
	if ((!plain(i->z.mnemonic) && !rax) || !host_has(i))
		return false;
	slots_find(&s, i);
	if (t->row)
		s.nscratch = 2;         /* ST is taken */
	if (s.implicit && !s.mem && !rax && !cl && accumulator(t, n))
		return true;
	if (s.other || bit_string(i, &s) ||
	    (s.implicit && !rax && !cl && i->z.mnemonic != ZYDIS_MNEMONIC_MULX))
		return false;
	if (i->z.mnemonic == ZYDIS_MNEMONIC_CMPXCHG && s.guest[SL_RM] == R_RAX)
		return false;   /* both sides are one register */
	/* Scratch registers that the instruction itself wants. */
	if (rax)
		memmove(s.scratch, s.scratch + 1, sizeof s.scratch - sizeof s.scratch[0]), s.nscratch--;
	if (cl)
		s.scratch[1] = s.scratch[2], s.nscratch--;
	t->apart = plain_load(t, i, &s);
	k = gen_access(t, n, &s, &ok);
	apart = t->apart;
	t->apart = false;
	if (!ok)
		return false;
	gen_flags_before(t, n);
	if (!slots_load(t, &s))
		return false;
	if (cl)
		em_mov(&t->h, H_RCX, H_R14);
	if (rax)
		em_mov(&t->h, H_RAX, H_R13);
	r = slots_regs(&s);
	r.apart = apart;
	if (!gen_rewrite(t, i, tr_bytes(t, n), r))
		return false;
	if (rax && i->z.mnemonic != ZYDIS_MNEMONIC_CWD && i->z.mnemonic != ZYDIS_MNEMONIC_CDQ && i->z.mnemonic != ZYDIS_MNEMONIC_CQO)
		em_mov(&t->h, H_R13, H_RAX);
	slots_store(t, &s);
	gen_flags_after(t, n);
	cold_done(t, n, k);
	return true;
}
