/*
 * RDMSR, WRMSR, CPUID, time stamps, and the fast system calls.
 *
 * Vendors differ (feat->amd), and user space may have chosen either:
 *   SYSCALL, SYSRET    AMD: in every protected mode; Intel: in 64-bit code only, #UD elsewhere.
 *   SYSRET to a non-canonical RCX   Intel: #GP(0) in ring 0; AMD: faults in ring 3 at the fetch.
 *   SYSENTER, SYSEXIT  AMD: #UD in long mode, compatibility mode included; Intel: everywhere in protected mode.
 */
#include "softkvm/sys/sysint.h"
#include "softkvm/vcpu.h"

static bool is_amd(const struct cpu *c) { return c->feat && c->feat->amd; }

static void op_rdmsr(struct cpu *c, const struct insn *i)
{
	uint32_t index = (uint32_t)c->gpr[R_RCX];
	uint64_t v = 0;

	need_cpl0(c);
	switch (msr_read(c, index, &v, false)) {
	case MSR_OK: break;
	case MSR_EXIT: vcpu_msr_exit(c, index, false, 0);
	default: cpu_gp(c, 0);
	}
	c->gpr[R_RAX] = (uint32_t)v;
	c->gpr[R_RDX] = v >> 32;
}

static void op_wrmsr(struct cpu *c, const struct insn *i)
{
	uint32_t index = (uint32_t)c->gpr[R_RCX];
	uint64_t v = (uint32_t)c->gpr[R_RAX] | c->gpr[R_RDX] << 32;

	need_cpl0(c);
	switch (msr_write(c, index, v, false)) {
	case MSR_OK: return;
	case MSR_EXIT: vcpu_msr_exit(c, index, true, v);
	default: cpu_gp(c, 0);
	}
}

static void op_cpuid(struct cpu *c, const struct insn *i)
{
	uint32_t r[4] = { 0 };

	if (c->cpl && (c->msr.misc_features & 1))       /* CPUID faulting */
		cpu_gp(c, 0);
	cpuid_query(c, (uint32_t)c->gpr[R_RAX], (uint32_t)c->gpr[R_RCX], r);
	c->gpr[R_RAX] = r[0];
	c->gpr[R_RBX] = r[1];
	c->gpr[R_RCX] = r[2];
	c->gpr[R_RDX] = r[3];
}

static void need_tsc(struct cpu *c)
{
	if ((c->cr4 & CR4_TSD) && c->cpl)
		cpu_gp(c, 0);
}

static void put_tsc(struct cpu *c)
{
	uint64_t t = tsc_read(c);

	c->gpr[R_RAX] = (uint32_t)t;
	c->gpr[R_RDX] = t >> 32;
}

static void op_rdtsc(struct cpu *c, const struct insn *i)
{
	need_tsc(c);
	put_tsc(c);
}

static void op_rdtscp(struct cpu *c, const struct insn *i)
{
	need_tsc(c);
	put_tsc(c);
	c->gpr[R_RCX] = (uint32_t)c->msr.tsc_aux;
}

static void op_rdpid(struct cpu *c, const struct insn *i) { REG64(c, i->dst) = (uint32_t)c->msr.tsc_aux; }

/* No performance counters are offered: none exists. */
static void op_rdpmc(struct cpu *c, const struct insn *i) { cpu_gp(c, 0); }

/* -- SYSCALL, SYSRET -------------------------------------------------------------------------- */
static void need_syscall(struct cpu *c)
{
	if (!(c->efer & EFER_SCE) || c->real || (!c->flat && !is_amd(c)))
		cpu_ud(c);
}

/* Both trap by the TF that they leave behind, not by the one that they find: a debugger's step goes on all the same. */
static void step_by_new_tf(struct cpu *c)
{
	bool tf = (c->eflags & FL_TF) || (c->dbg.enabled && c->dbg.step);

	c->step.tf = tf;
	if (tf) {
		c->trap_db = true;
		c->trap_dr6 |= 1 << 14;
	}
}

static void op_syscall(struct cpu *c, const struct insn *i)
{
	uint16_t cs = (uint16_t)(c->msr.star >> 32) & 0xfffc;
	uint64_t fl = cpu_get_rflags(c), next = c->rip;

	need_syscall(c);
	c->gpr[R_RCX] = cpu_long(c) ? next : (uint32_t)next;
	if (cpu_long(c)) {
		c->gpr[R_R8 + 3] = fl & ~(uint64_t)FL_RF;
		c->rip = c->flat ? c->msr.lstar : c->msr.cstar;
		fl &= ~(c->msr.sfmask | FL_RF);
	} else {
		c->rip = (uint32_t)c->msr.star;
		fl &= ~(uint64_t)(FL_VM | FL_IF | FL_RF);
	}
	seg_flat(&c->seg[SEG_CS], cs, true, 0, cpu_long(c));
	seg_flat(&c->seg[SEG_SS], (uint16_t)(cs + 8), false, 0, false);
	cpu_set_rflags(c, fl);
	cpu_update_mode(c);
	step_by_new_tf(c);
}

static void op_sysret(struct cpu *c, const struct insn *i)
{
	uint16_t base = (uint16_t)(c->msr.star >> 48);
	bool to64 = i->aux == 8;
	uint64_t rip = to64 ? c->gpr[R_RCX] : (uint32_t)c->gpr[R_RCX], fl;

	need_syscall(c);
	need_cpl0(c);
	if (to64 && !is_amd(c) && !cpu_canonical(c, rip))
		cpu_gp(c, 0);
	if (cpu_long(c))
		fl = (c->gpr[R_R8 + 3] & 0x3c7fd7) | FL_1;
	else
		fl = cpu_get_rflags(c) | FL_IF;
	seg_flat(&c->seg[SEG_CS], (uint16_t)((base + (to64 ? 16 : 0)) | 3), true, 3, to64);
	seg_flat(&c->seg[SEG_SS], (uint16_t)((base + 8) | 3), false, 3, false);
	c->rip = rip;
	cpu_set_rflags(c, fl);
	cpu_update_mode(c);
	step_by_new_tf(c);
}

/* -- SYSENTER, SYSEXIT ------------------------------------------------------------------------ */
static void op_sysenter(struct cpu *c, const struct insn *i)
{
	uint16_t cs = (uint16_t)c->msr.sysenter_cs & 0xfffc;
	bool l = cpu_long(c);

	if (l && is_amd(c))
		cpu_ud(c);
	if (c->real || !cs)
		cpu_gp(c, 0);
	c->rip = l ? c->msr.sysenter_eip : (uint32_t)c->msr.sysenter_eip;
	c->gpr[R_RSP] = l ? c->msr.sysenter_esp : (uint32_t)c->msr.sysenter_esp;
	seg_flat(&c->seg[SEG_CS], cs, true, 0, l);
	seg_flat(&c->seg[SEG_SS], (uint16_t)(cs + 8), false, 0, false);
	cpu_set_rflags(c, cpu_get_rflags(c) & ~(uint64_t)(FL_VM | FL_IF | FL_RF));
	cpu_update_mode(c);
}

static void op_sysexit(struct cpu *c, const struct insn *i)
{
	uint16_t cs = (uint16_t)c->msr.sysenter_cs & 0xfffc;
	bool to64 = i->aux == 8;
	uint64_t rip = c->gpr[R_RDX], rsp = c->gpr[R_RCX];

	if (cpu_long(c) && is_amd(c))
		cpu_ud(c);
	if (c->real || c->cpl || !cs)
		cpu_gp(c, 0);
	if (!to64) {
		rip = (uint32_t)rip;
		rsp = (uint32_t)rsp;
	} else if (!cpu_canonical(c, rip) || !cpu_canonical(c, rsp)) {
		cpu_gp(c, 0);
	}
	cs = (uint16_t)(cs + (to64 ? 32 : 16));
	seg_flat(&c->seg[SEG_CS], cs | 3, true, 3, to64);
	seg_flat(&c->seg[SEG_SS], (uint16_t)(cs + 8) | 3, false, 3, false);
	c->rip = rip;
	c->gpr[R_RSP] = rsp;
	cpu_update_mode(c);
}

static bool fill(struct insn *i, insn_fn *fn, uint16_t flags)
{
	i->fn = fn;
	i->flags |= flags;
	return true;
}

bool sys_decode_msr(struct insn *i, const struct decoded *d)
{
	bool rexw = d->z.attributes & ZYDIS_ATTRIB_HAS_REX && d->z.raw.rex.W;

	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_RDMSR: return fill(i, op_rdmsr, IF_END);
	case ZYDIS_MNEMONIC_WRMSR: return fill(i, op_wrmsr, IF_END);
	case ZYDIS_MNEMONIC_CPUID: return fill(i, op_cpuid, 0);
	case ZYDIS_MNEMONIC_RDTSC: return fill(i, op_rdtsc, 0);
	case ZYDIS_MNEMONIC_RDTSCP: return fill(i, op_rdtscp, 0);
	case ZYDIS_MNEMONIC_RDPMC: return fill(i, op_rdpmc, 0);
	case ZYDIS_MNEMONIC_RDPID:
		i->dst = insn_reg_off(d->op[0].reg.value);
		return fill(i, op_rdpid, 0);
	case ZYDIS_MNEMONIC_SYSCALL: return fill(i, op_syscall, IF_END);
	case ZYDIS_MNEMONIC_SYSENTER: return fill(i, op_sysenter, IF_END);
	case ZYDIS_MNEMONIC_SYSRET: i->aux = rexw ? 8 : 4; return fill(i, op_sysret, IF_END);
	case ZYDIS_MNEMONIC_SYSEXIT: i->aux = rexw ? 8 : 4; return fill(i, op_sysexit, IF_END);
	default: return false;
	}
}
