/* Control and debug registers, EFER, XCR0: every check and what a change flushes (SDM vol. 3 ch. 2, 4.1, 10.8.5). */
#include <stdatomic.h>

#include "softkvm/irqchip.h"
#include "softkvm/sys/sysint.h"

#define CR0_VALID (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)

/* Paging goes on: long mode when EFER.LME says so. */
static bool paging_on(struct cpu *c, uint64_t v)
{
	/* 10.8.5.3: not with a 16-bit TSS in TR either. */
	if (c->efer & EFER_LME)
		return (c->cr4 & CR4_PAE) && !c->seg[SEG_CS].l && (c->seg[SEG_TR].type & 8);
	return true;
}

static bool cr0_check(struct cpu *c, uint64_t v)
{
	if (v >> 32 || ((v & CR0_PG) && !(v & CR0_PE)) || ((v & CR0_NW) && !(v & CR0_CD)))
		return false;
	if ((v & CR0_PG) && !(c->cr0 & CR0_PG) && !paging_on(c, v))
		return false;
	/* Not in 64-bit mode, and not with PCIDs. */
	if (!(v & CR0_PG) && (c->cr0 & CR0_PG) && (c->flat || (c->cr4 & CR4_PCIDE)))
		return false;
	return true;
}

bool cr0_write(struct cpu *c, uint64_t v)
{
	uint64_t diff;

	if (!cr0_check(c, v))
		return false;
	v = (v & CR0_VALID) | CR0_ET;
	diff = v ^ c->cr0;
	if ((v & CR0_PG) && (c->cr4 & CR4_PAE) && !(c->efer & EFER_LME) && (diff & (CR0_PG | CR0_CD | CR0_NW)) &&
	    !mmu_load_pdptes(c, c->cr3))
		return false;
	c->cr0 = v;
	if (diff & CR0_PG) {
		c->efer &= ~(uint64_t)EFER_LMA;
		if ((v & CR0_PG) && (c->efer & EFER_LME))
			c->efer |= EFER_LMA;
	}
	if (diff & (CR0_PG | CR0_PE | CR0_WP))
		mmu_flush_all(c);
	cpu_update_mode(c);
	return true;
}

bool cr3_write(struct cpu *c, uint64_t v)
{
	bool keep = (c->cr4 & CR4_PCIDE) && v >> 63;

	if (keep)
		v &= ~(1ull << 63);
	if (cpu_long(c)) {
		if (v & (mmu_rsvd_mask(c) | 0xfff0000000000000ull))
			return false;
	} else {
		v = (uint32_t)v;
		if (cpu_paging(c) && (c->cr4 & CR4_PAE) && !mmu_load_pdptes(c, v))
			return false;
	}
	mmu_switch(c, v, keep);
	return true;
}

/* CR4 bits this guest's CPUID allows. */
static uint64_t cr4_valid(const struct cpu *c)
{
	static const struct { uint8_t word, bit; uint32_t cr4; } need[] = {
		{ 1, 17, CR4_PCIDE }, { 2, 0, CR4_FSGSBASE }, { 2, 7, CR4_SMEP }, { 2, 20, CR4_SMAP }, { 3, 2, CR4_UMIP },
		{ 3, 3, CR4_PKE }, { 3, 16, CR4_LA57 }, { 1, 26, CR4_OSXSAVE },
	};
	uint64_t v = CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR |
		     CR4_OSXMMEXCPT;

	if (!c->feat)
		return v;
	for (unsigned k = 0; k < ARRAY_SIZE(need); k++) {
		uint32_t w = need[k].word == 1 ? c->feat->f1_ecx : need[k].word == 2 ? c->feat->f7_ebx : c->feat->f7_ecx;

		if (w >> need[k].bit & 1)
			v |= need[k].cr4;
	}
	return v;
}

static bool cr4_check(struct cpu *c, uint64_t v)
{
	uint64_t diff = v ^ c->cr4;

	if (v & ~cr4_valid(c))
		return false;
	if (cpu_long(c) && (!(v & CR4_PAE) || (diff & CR4_LA57)))
		return false;
	if ((diff & v & CR4_PCIDE) && (!cpu_long(c) || (c->cr3 & 0xfff)))
		return false;
	return !((v & CR4_PCIDE) && !cpu_long(c));
}

bool cr4_write(struct cpu *c, uint64_t v)
{
	const uint64_t paging = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_LA57 | CR4_PCIDE;
	uint64_t diff = v ^ c->cr4;

	if (!cr4_check(c, v))
		return false;
	if (cpu_paging(c) && !cpu_long(c) && (v & CR4_PAE) && (diff & (CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP)) &&
	    !mmu_load_pdptes(c, c->cr3))
		return false;
	c->cr4 = v;
	if (diff & paging)
		mmu_flush_all(c);
	if (diff & CR4_DE)
		debug_update(c);
	cpu_update_mode(c);
	return true;
}

bool cr8_write(struct cpu *c, uint64_t v)
{
	if (v & ~15ull)
		return false;
	c->cr8 = v;
	if (c->lapic)
		lapic_set_tpr(c, v);
	event_unblocked(c);
	return true;
}

static uint64_t efer_valid(struct cpu *c, bool host)
{
	uint64_t v = EFER_SCE;
	uint32_t r[4] = { 0 };

	if (host || !c->feat)
		return EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR | EFER_SVME | EFER_LMSLE | 1u << 15 | 1u << 21;
	if (c->feat->f80000001_edx >> 29 & 1)
		v |= EFER_LME | EFER_LMA;
	if (c->feat->f80000001_edx >> 20 & 1)
		v |= EFER_NXE;
	if (c->feat->f80000001_edx >> 25 & 1)
		v |= EFER_FFXSR;
	if (c->feat->f80000001_ecx >> 2 & 1)
		v |= EFER_SVME;
	if (c->feat->f80000001_ecx >> 17 & 1)
		v |= 1u << 15;          /* translation cache extension */
	cpuid_query(c, 0x80000021, 0, r);
	if (r[0] >> 8 & 1)
		v |= 1u << 21;          /* automatic IBRS */
	return v;
}

bool efer_write(struct cpu *c, uint64_t v, bool host)
{
	uint64_t diff;

	if (v & ~efer_valid(c, host))
		return false;
	if (!host && cpu_paging(c) && ((v ^ c->efer) & EFER_LME))
		return false;
	v = (v & ~(uint64_t)EFER_LMA) | (c->efer & EFER_LMA);
	diff = v ^ c->efer;
	c->efer = v;
	if (diff & (EFER_NXE | EFER_LME))
		mmu_flush_all(c);
	cpu_update_mode(c);
	return true;
}

bool xcr0_write(struct cpu *c, uint64_t v)
{
	const uint64_t avx512 = XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM;

	/* A processor without XSAVE has the x87 bit all the same: clients save and restore it. */
	if (!(v & XCR0_X87) || (v & ~((c->feat ? c->feat->xcr0_mask : 7ull) | XCR0_X87)))
		return false;
	if ((v & XCR0_AVX) && !(v & XCR0_SSE))
		return false;
	if ((v & avx512) && ((v & avx512) != avx512 || !(v & XCR0_AVX)))
		return false;
	c->xcr0 = v;
	return true;
}

/* -- MOV CR ------------------------------------------------------------------------------------ */
static uint64_t gpr_operand(const struct cpu *c, uint8_t off)
{
	uint64_t v = REG64(c, off);

	return c->flat ? v : (uint32_t)v;
}

static void set_gpr(struct cpu *c, uint8_t off, uint64_t v) { REG64(c, off) = c->flat ? v : (uint32_t)v; }

static void op_mov_from_cr(struct cpu *c, const struct insn *i)
{
	need_cpl0(c);
	switch (i->aux) {
	case 0: set_gpr(c, i->dst, c->cr0); break;
	case 2: set_gpr(c, i->dst, c->cr2); break;
	case 3: set_gpr(c, i->dst, c->cr3); break;
	case 4: set_gpr(c, i->dst, c->cr4); break;
	default: set_gpr(c, i->dst, c->lapic ? lapic_get_tpr(c) : c->cr8); break;
	}
}

static void op_mov_to_cr(struct cpu *c, const struct insn *i)
{
	uint64_t v = gpr_operand(c, i->src), old_cr8 = c->cr8;
	bool ok = true;

	need_cpl0(c);
	switch (i->aux) {
	case 0: ok = cr0_write(c, v); break;
	case 2: c->cr2 = v; break;
	case 3: ok = cr3_write(c, v); break;
	case 4: ok = cr4_write(c, v); break;
	default: ok = cr8_write(c, v); break;
	}
	if (!ok)
		cpu_gp(c, 0);
	/* KVM tells user space about a lowered CR8 when the interrupt controller is there. */
	if (i->aux == 8 && !c->lapic && v < old_cr8) {
		c->run->exit_reason = KVM_EXIT_SET_TPR;
		c->run->cr8 = v;
		cpu_unwind(c, UNWIND_EXIT_NEXT);
	}
}

/* -- MOV DR ------------------------------------------------------------------------------------ */
#define DR6_FIXED 0xffff0ff0u

/* #UD, #GP, or #DB by general detect; returns the register after the aliases of CR4.DE. */
static unsigned check_dr(struct cpu *c, unsigned n)
{
	if (n == 4 || n == 5) {
		if (c->cr4 & CR4_DE)
			cpu_ud(c);
		n += 2;
	}
	need_cpl0(c);
	/* A debugger's DR7 stands in for the guest's; event_deliver() hands the trap to it then. */
	if ((c->dbg.enabled && c->dbg.hw_bp ? c->dbg.dr7 : c->dr[7]) & (1 << 13)) {
		c->ev = (struct event){ .valid = true, .vector = EXC_DB, .type = EV_EXC, .payload = 1 << 13, .has_payload = true };
		cpu_unwind(c, UNWIND_EVENT);
	}
	return n & 7;
}

static void op_mov_from_dr(struct cpu *c, const struct insn *i)
{
	unsigned n = check_dr(c, i->aux);
	uint64_t v = c->dr[n];

	if (n == 6)
		v |= DR6_FIXED;
	else if (n == 7)
		v |= 1 << 10;
	set_gpr(c, i->dst, v);
}

static void op_mov_to_dr(struct cpu *c, const struct insn *i)
{
	uint64_t v = gpr_operand(c, i->src);
	unsigned n = check_dr(c, i->aux);

	if (n >= 6 && v >> 32)
		cpu_gp(c, 0);
	if (n == 6)
		v = (v & 0xe00f) | DR6_FIXED;
	else if (n == 7)
		v = (v & 0xffff2bff) | 1 << 10;
	c->dr[n & 7] = v;
	if (n != 6)
		debug_update(c);
}

/* -- LMSW, SMSW, CLTS, XGETBV, XSETBV ----------------------------------------------------------- */
static void op_clts(struct cpu *c, const struct insn *i)
{
	need_cpl0(c);
	c->cr0 &= ~(uint64_t)CR0_TS;
}

static void lmsw(struct cpu *c, uint16_t v)
{
	/* Sets PE but cannot clear it. */
	if (!cr0_write(c, (c->cr0 & ~14ull) | (v & 15)))
		cpu_gp(c, 0);
}

static void op_lmsw_reg(struct cpu *c, const struct insn *i)
{
	need_cpl0(c);
	lmsw(c, REG16(c, i->src));
}

static void op_lmsw_mem(struct cpu *c, const struct insn *i)
{
	need_cpl0(c);
	lmsw(c, mem_ld16(c, insn_lin(c, i, 2, ACC_READ)));
}

static void op_smsw_reg(struct cpu *c, const struct insn *i)
{
	need_no_umip(c);
	if (i->aux == 2)
		REG16(c, i->dst) = (uint16_t)c->cr0;
	else
		REG64(c, i->dst) = (uint32_t)c->cr0;
}

static void op_smsw_mem(struct cpu *c, const struct insn *i)
{
	need_no_umip(c);
	mem_st16(c, insn_lin(c, i, 2, ACC_WRITE), (uint16_t)c->cr0);
}

static void need_osxsave(struct cpu *c)
{
	if (!(c->cr4 & CR4_OSXSAVE))
		cpu_ud(c);
}

static void op_xgetbv(struct cpu *c, const struct insn *i)
{
	uint64_t v = c->xcr0;
	uint32_t n = (uint32_t)c->gpr[R_RCX];

	need_osxsave(c);
	if (n == 1 && c->feat && (c->feat->fd_1_eax >> 2 & 1))
		v &= c->fpu.xstate_bv;
	else if (n)
		cpu_gp(c, 0);
	c->gpr[R_RAX] = (uint32_t)v;
	c->gpr[R_RDX] = v >> 32;
}

static void op_xsetbv(struct cpu *c, const struct insn *i)
{
	uint64_t v = (uint32_t)c->gpr[R_RAX] | c->gpr[R_RDX] << 32;

	need_osxsave(c);
	need_cpl0(c);
	if ((uint32_t)c->gpr[R_RCX] || !xcr0_write(c, v))
		cpu_gp(c, 0);
}

/* -- decoding --------------------------------------------------------------------------------- */
static bool reg_range(const ZydisDecodedOperand *op, ZydisRegister lo, ZydisRegister hi)
{
	return op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->reg.value >= lo && op->reg.value <= hi;
}

static bool decode_mov(struct insn *i, const struct decoded *d)
{
	for (unsigned n = 0; n < 2; n++) {
		const ZydisDecodedOperand *op = &d->op[n], *other = &d->op[!n];
		bool cr = reg_range(op, ZYDIS_REGISTER_CR0, ZYDIS_REGISTER_CR15);

		if (!cr && !reg_range(op, ZYDIS_REGISTER_DR0, ZYDIS_REGISTER_DR15))
			continue;
		i->aux = (uint8_t)(op->reg.value - (cr ? ZYDIS_REGISTER_CR0 : ZYDIS_REGISTER_DR0));
		i->dst = i->src = insn_reg_off(other->reg.value);
		if (n == 0) {
			i->flags |= IF_END;
			i->fn = cr ? op_mov_to_cr : op_mov_to_dr;
		} else {
			i->fn = cr ? op_mov_from_cr : op_mov_from_dr;
		}
		if (cr ? !(i->aux == 0 || (i->aux >= 2 && i->aux <= 4) || i->aux == 8) : i->aux > 7)
			i->fn = op_ud;
		return true;
	}
	return false;
}

static bool decode_rm(struct insn *i, const struct decoded *d, insn_fn *reg, insn_fn *mem)
{
	i->aux = d->z.operand_width / 8;
	if (d->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY) {
		insn_set_mem(i, d, &d->op[0]);
		i->fn = mem;
	} else {
		i->src = i->dst = insn_reg_off(d->op[0].reg.value);
		i->aux = d->op[0].size / 8;
		i->fn = reg;
	}
	return true;
}

bool sys_decode_cr(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_MOV: return decode_mov(i, d);
	case ZYDIS_MNEMONIC_CLTS: i->fn = op_clts; i->flags |= IF_END; return true;
	case ZYDIS_MNEMONIC_LMSW: i->flags |= IF_END; return decode_rm(i, d, op_lmsw_reg, op_lmsw_mem);
	case ZYDIS_MNEMONIC_SMSW: return decode_rm(i, d, op_smsw_reg, op_smsw_mem);
	case ZYDIS_MNEMONIC_XGETBV: i->fn = op_xgetbv; return true;
	case ZYDIS_MNEMONIC_XSETBV: i->fn = op_xsetbv; i->flags |= IF_END; return true;
	default: return false;
	}
}
