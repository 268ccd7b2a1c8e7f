/*
 * x87: arithmetic through stubs around fxrstor and fxsave of the whole x87 image, state instructions in C.
 *
 * The guest's own control word is in force while the host executes, so an unmasked exception leaves
 * exactly what the CPU would leave: fxsave does not wait, hence nothing traps, and ES is raised as
 * #MF before the guest's next waiting instruction. The pointers in the image are replaced by the guest's.
 */
#include "softkvm/vec/vec.h"

enum { ENV16 = 14, ENV32 = 28 };

/* -- checks --------------------------------------------------------------------------------------- */
void x87_check(struct cpu *c)
{
	if (c->cr0 & (CR0_EM | CR0_TS))
		cpu_raise(c, EXC_NM);
}

static bool pending(const struct fpu *f)
{
	return ld_le16(f->fx + FX_FSW) & ~ld_le16(f->fx + FX_FCW) & 0x3f;
}

/* With CR0.NE clear the CPU would signal FERR# to an external controller (IRQ 13); nothing is attached to it. */
void x87_check_pending(struct cpu *c)
{
	if (unlikely(pending(&c->fpu)) && (c->cr0 & CR0_NE))
		cpu_raise(c, EXC_MF);
}

void x87_normalise(struct fpu *f)
{
	uint16_t sw = ld_le16(f->fx + FX_FSW) & ~(FSW_ES | FSW_B);

	if (sw & ~ld_le16(f->fx + FX_FCW) & 0x3f)
		sw |= FSW_ES | FSW_B;
	st_le16(f->fx + FX_FSW, sw);
}

/* The image holds registers by stack position: when something but FRSTOR and FXRSTOR moves TOP, they change places. */
static void rotate(struct fpu *f, unsigned top)
{
	unsigned by = (top - (ld_le16(f->fx + FX_FSW) >> 11)) & 7;
	uint8_t old[128];

	if (!by)
		return;
	memcpy(old, f->fx + FX_ST, 128);
	for (unsigned r = 0; r < 8; r++)
		memcpy(f->fx + FX_ST + 16 * r, old + 16 * ((r + by) & 7), 16);
}

void x87_mmx_enter(struct fpu *f)
{
	rotate(f, 0);
	st_le16(f->fx + FX_FSW, ld_le16(f->fx + FX_FSW) & ~FSW_TOP);
	f->fx[FX_FTW] = 0xff;
}

/* -- arithmetic ----------------------------------------------------------------------------------- */
static void set_pointers(struct cpu *c, const struct insn *i, const struct vec_op *op, const uint8_t old[24])
{
	uint8_t *fx = c->fpu.fx;

	memcpy(fx + FX_FOP, old + FX_FOP, 18);
	if (op->flags & VO_NOPTR)
		return;
	st_le16(fx + FX_FOP, op->fop);
	st_le64(fx + FX_FIP, cpu_cur_rip(c));
	st_le16(fx + FX_FCS, c->seg[SEG_CS].sel);
	if (op->size) {
		st_le64(fx + FX_FDP, insn_offset(c, i));
		st_le16(fx + FX_FDS, c->seg[i->seg].sel);
	}
}

static void x87_run(struct cpu *c, const struct insn *i, const struct vec_op *op, void *mem)
{
	uint16_t cw = ld_le16(c->fpu.fx + FX_FCW);
	bool ignored = pending(&c->fpu);
	uint8_t old[24];
	enum stub_end end;

	memcpy(old, c->fpu.fx, 24);
	if (unlikely(ignored)) {                /* CR0.NE clear: a host exception must not come of it */
		st_le16(c->fpu.fx + FX_FCW, cw | 0x3f);
		x87_normalise(&c->fpu);
	}
	end = stub_run(c, op, mem);
	if (unlikely(end != STUB_DONE)) {
		memcpy(c->fpu.fx, old, 24);
		stub_refuse(c, end);
	}
	set_pointers(c, i, op, old);
	if (unlikely(ignored)) {
		st_le16(c->fpu.fx + FX_FCW, cw);
		x87_normalise(&c->fpu);
	}
}

void x87_exec(struct cpu *c, const struct insn *i)
{
	const struct vec_op *op = i->ptr;
	_Alignas(16) uint8_t buf[16] = { 0 };
	enum access acc = op->flags & VO_STORE ? ACC_WRITE : ACC_READ;
	uint64_t lin = 0;

	x87_check(c);
	x87_check_pending(c);
	if (op->size) {
		lin = insn_lin(c, i, op->size, acc);
		if (acc == ACC_READ)
			mem_read(c, lin, buf, op->size);
		else
			mem_probe(c, lin, op->size, ACC_WRITE);
	}
	x87_run(c, i, op, buf);
	/* A store with an unmasked invalid, overflow or underflow stores nothing. */
	if (acc == ACC_WRITE && !(ld_le16(c->fpu.fx + FX_FSW) & ~ld_le16(c->fpu.fx + FX_FCW) & 0x1b))
		mem_write(c, lin, buf, op->size);
}

/* -- control and status --------------------------------------------------------------------------- */
static void op_fwait(struct cpu *c, const struct insn *i)
{
	if ((c->cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
		cpu_raise(c, EXC_NM);
	x87_check_pending(c);
}

static void x87_init(struct fpu *f)
{
	rotate(f, 0);
	memset(f->fx, 0, 24);
	st_le16(f->fx + FX_FCW, 0x37f);
	st_le32(f->fx + FX_FCS, 0);
}

static void op_fninit(struct cpu *c, const struct insn *i)
{
	x87_check(c);
	x87_init(&c->fpu);
}

static void op_fnclex(struct cpu *c, const struct insn *i)
{
	x87_check(c);
	st_le16(c->fpu.fx + FX_FSW, ld_le16(c->fpu.fx + FX_FSW) & 0x7f00);
}

static void op_fnstsw_ax(struct cpu *c, const struct insn *i)
{
	x87_check(c);
	REG16(c, R_RAX * 8) = ld_le16(c->fpu.fx + FX_FSW);
}

static void op_fnstsw(struct cpu *c, const struct insn *i)
{
	x87_check(c);
	mem_st16(c, insn_lin(c, i, 2, ACC_WRITE), ld_le16(c->fpu.fx + FX_FSW));
}

static void op_fnstcw(struct cpu *c, const struct insn *i)
{
	x87_check(c);
	mem_st16(c, insn_lin(c, i, 2, ACC_WRITE), ld_le16(c->fpu.fx + FX_FCW));
}

static void op_fldcw(struct cpu *c, const struct insn *i)
{
	uint16_t v;

	x87_check(c);
	x87_check_pending(c);
	v = mem_ld16(c, insn_lin(c, i, 2, ACC_READ));
	st_le16(c->fpu.fx + FX_FCW, (v & 0x1f3f) | 0x40);
	x87_normalise(&c->fpu);
}

/* 8087 and 80287 controls that do nothing any more. */
static void op_nothing(struct cpu *c, const struct insn *i)
{
	x87_check(c);
}

/* -- environment: 16 or 32 bits, real or protected (SDM vol. 1, 8.1.10) ------------------------------ */
static uint16_t full_tags(const struct fpu *f)
{
	unsigned top = ld_le16(f->fx + FX_FSW) >> 11 & 7;
	uint16_t tags = 0;

	for (unsigned r = 0; r < 8; r++) {
		const uint8_t *st = f->fx + FX_ST + 16 * ((r - top) & 7);
		uint64_t m = ld_le64(st);
		unsigned e = ld_le16(st + 8) & 0x7fff, t;

		if (!(f->fx[FX_FTW] >> r & 1))
			t = 3;
		else if (!e && !m)
			t = 1;
		else
			t = e && e != 0x7fff && m >> 63 ? 0 : 2;
		tags |= (uint16_t)(t << 2 * r);
	}
	return tags;
}

static uint8_t abridged_tags(uint16_t tags)
{
	uint8_t a = 0;

	for (unsigned r = 0; r < 8; r++)
		if ((tags >> 2 * r & 3) != 3)
			a |= (uint8_t)(1u << r);
	return a;
}

static bool real_format(const struct cpu *c)
{
	return c->real || c->vm86;
}

static void env_put(const struct cpu *c, uint8_t *p, bool o16)
{
	const uint8_t *fx = c->fpu.fx;
	unsigned w = o16 ? 2 : 4;
	uint32_t fop = ld_le16(fx + FX_FOP) & 0x7ff, fip = ld_le32(fx + FX_FIP), fdp = ld_le32(fx + FX_FDP);
	uint32_t fcs = ld_le16(fx + FX_FCS), fds = ld_le16(fx + FX_FDS);

	memset(p, 0xff, o16 ? ENV16 : ENV32);
	st_le16(p, ld_le16(fx + FX_FCW));
	st_le16(p + w, ld_le16(fx + FX_FSW));
	st_le16(p + 2 * w, full_tags(&c->fpu));
	if (real_format(c)) {
		fip += fcs << 4;
		fdp += fds << 4;
	}
	if (o16) {
		st_le16(p + 6, (uint16_t)fip);
		st_le16(p + 8, (uint16_t)(real_format(c) ? (fip >> 16 & 15) << 12 | fop : fcs));
		st_le16(p + 10, (uint16_t)fdp);
		st_le16(p + 12, (uint16_t)(real_format(c) ? (fdp >> 16 & 15) << 12 : fds));
	} else if (real_format(c)) {
		st_le16(p + 12, (uint16_t)fip);
		st_le32(p + 16, fip >> 16 << 12 | fop);
		st_le16(p + 20, (uint16_t)fdp);
		st_le32(p + 24, fdp >> 16 << 12);
	} else {
		st_le32(p + 12, fip);
		st_le32(p + 16, fcs | fop << 16);
		st_le32(p + 20, fdp);
		st_le16(p + 24, (uint16_t)fds);
	}
}

static void env_get_pointers(struct cpu *c, const uint8_t *p, bool o16)
{
	uint32_t fip, fdp, fcs = 0, fds = 0, fop = 0;
	uint8_t *fx = c->fpu.fx;

	if (o16) {
		fip = ld_le16(p + 6);
		fdp = ld_le16(p + 10);
		if (real_format(c)) {
			fop = ld_le16(p + 8) & 0x7ff;
			fip |= (uint32_t)(ld_le16(p + 8) >> 12) << 16;
			fdp |= (uint32_t)(ld_le16(p + 12) >> 12) << 16;
		} else {
			fcs = ld_le16(p + 8);
			fds = ld_le16(p + 12);
		}
	} else if (real_format(c)) {
		fip = ld_le16(p + 12) | ld_le32(p + 16) >> 12 << 16;
		fop = ld_le32(p + 16) & 0x7ff;
		fdp = ld_le16(p + 20) | ld_le32(p + 24) >> 12 << 16;
	} else {
		fip = ld_le32(p + 12);
		fcs = ld_le16(p + 16);
		fop = ld_le16(p + 18) & 0x7ff;
		fdp = ld_le32(p + 20);
		fds = ld_le16(p + 24);
	}
	st_le16(fx + FX_FOP, (uint16_t)fop);
	st_le64(fx + FX_FIP, fip);
	st_le64(fx + FX_FDP, fdp);
	st_le16(fx + FX_FCS, (uint16_t)fcs);
	st_le16(fx + FX_FDS, (uint16_t)fds);
}

static void env_get(struct cpu *c, const uint8_t *p, bool o16)
{
	unsigned w = o16 ? 2 : 4;
	uint8_t *fx = c->fpu.fx;

	st_le16(fx + FX_FCW, (ld_le16(p) & 0x1f3f) | 0x40);
	st_le16(fx + FX_FSW, ld_le16(p + w));
	fx[FX_FTW] = abridged_tags(ld_le16(p + 2 * w));
	env_get_pointers(c, p, o16);
	x87_normalise(&c->fpu);
}

static void op_fnstenv(struct cpu *c, const struct insn *i)
{
	bool o16 = i->flags & IF_O16;
	unsigned len = o16 ? ENV16 : ENV32;
	uint8_t env[ENV32];

	x87_check(c);
	env_put(c, env, o16);
	mem_write(c, insn_lin(c, i, len, ACC_WRITE), env, len);
	st_le16(c->fpu.fx + FX_FCW, ld_le16(c->fpu.fx + FX_FCW) | 0x3f);
	x87_normalise(&c->fpu);
}

static void op_fldenv(struct cpu *c, const struct insn *i)
{
	bool o16 = i->flags & IF_O16;
	unsigned len = o16 ? ENV16 : ENV32;
	uint8_t env[ENV32];

	x87_check(c);
	x87_check_pending(c);
	mem_read(c, insn_lin(c, i, len, ACC_READ), env, len);
	rotate(&c->fpu, ld_le16(env + (o16 ? 2 : 4)) >> 11 & 7);
	env_get(c, env, o16);
}

static void op_fnsave(struct cpu *c, const struct insn *i)
{
	bool o16 = i->flags & IF_O16;
	unsigned len = o16 ? ENV16 : ENV32;
	uint8_t buf[ENV32 + 80];

	x87_check(c);
	env_put(c, buf, o16);
	for (unsigned r = 0; r < 8; r++)
		memcpy(buf + len + 10 * r, c->fpu.fx + FX_ST + 16 * r, 10);
	mem_write(c, insn_lin(c, i, len + 80, ACC_WRITE), buf, len + 80);
	x87_init(&c->fpu);
}

static void op_frstor(struct cpu *c, const struct insn *i)
{
	bool o16 = i->flags & IF_O16;
	unsigned len = o16 ? ENV16 : ENV32;
	uint8_t buf[ENV32 + 80];

	x87_check(c);
	x87_check_pending(c);
	mem_read(c, insn_lin(c, i, len + 80, ACC_READ), buf, len + 80);
	env_get(c, buf, o16);
	for (unsigned r = 0; r < 8; r++)
		memcpy(c->fpu.fx + FX_ST + 16 * r, buf + len + 10 * r, 10);
}

/* -- decoding --------------------------------------------------------------------------------------- */
static bool control_decode(struct insn *i, const struct decoded *d)
{
	bool mem = d->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY;

	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_FWAIT: i->fn = op_fwait; return true;
	case ZYDIS_MNEMONIC_FNINIT: i->fn = op_fninit; return true;
	case ZYDIS_MNEMONIC_FNCLEX: i->fn = op_fnclex; return true;
	case ZYDIS_MNEMONIC_FENI8087_NOP: case ZYDIS_MNEMONIC_FDISI8087_NOP: case ZYDIS_MNEMONIC_FSETPM287_NOP:
		i->fn = op_nothing;
		return true;
	case ZYDIS_MNEMONIC_FNSTSW: i->fn = mem ? op_fnstsw : op_fnstsw_ax; break;
	case ZYDIS_MNEMONIC_FNSTCW: i->fn = op_fnstcw; break;
	case ZYDIS_MNEMONIC_FLDCW: i->fn = op_fldcw; break;
	case ZYDIS_MNEMONIC_FNSTENV: i->fn = op_fnstenv; break;
	case ZYDIS_MNEMONIC_FLDENV: i->fn = op_fldenv; break;
	case ZYDIS_MNEMONIC_FNSAVE: i->fn = op_fnsave; break;
	case ZYDIS_MNEMONIC_FRSTOR: i->fn = op_frstor; break;
	default: return false;
	}
	if (mem)
		insn_set_mem(i, d, &d->op[0]);
	/* Zydis calls the operand size of these what the addressing of the mode would be: look at the prefix. */
	i->flags &= (uint16_t)~IF_O16;
	if ((d->code_bits == 16) != !!(d->z.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE))
		i->flags |= IF_O16;
	return true;
}

bool x87_decode(struct insn *i, const struct decoded *d)
{
	struct vec_op want = { .flags = VO_PEND, .cls = VC_X87, .dst_mm = 0xff }, *op;
	const ZydisDecodedInstruction *z = &d->z;

	if (z->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || z->opcode_map != ZYDIS_OPCODE_MAP_DEFAULT ||
	    ((z->opcode & 0xf8) != 0xd8 && z->opcode != 0x9b))
		return false;
	if (control_decode(i, d))
		return true;
	want.s.x87 = true;
	for (unsigned n = 0; n < z->operand_count; n++) {
		const ZydisDecodedOperand *o = &d->op[n];

		if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
			insn_set_mem(i, d, o);
			want.size = (uint8_t)(o->size / 8);
			want.flags |= o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE ? VO_STORE : VO_LOAD;
		} else if (o->type == ZYDIS_OPERAND_TYPE_REGISTER &&
			   ZydisRegisterGetClass(o->reg.value) == ZYDIS_REGCLASS_FLAGS) {
			want.s.fl_in |= !!(o->actions & ZYDIS_OPERAND_ACTION_MASK_READ);
			want.s.fl_out |= !!(o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
		}
	}
	want.fop = (uint16_t)((z->opcode & 7) << 8 | z->raw.modrm.mod << 6 | z->raw.modrm.reg << 3 | z->raw.modrm.rm);
	if (want.size > 10 || !stub_rewrite(&want.s, d))
		return false;
	op = stub_get((struct cpu *)d->cpu, &want);
	if (!op) {
		vec_decode_full(i);
		return true;
	}
	i->ptr = op;
	i->fn = x87_exec;
	return true;
}
