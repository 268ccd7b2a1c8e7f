/* Caches and TLB, protection keys, MONITOR and MWAIT, hypercalls, and what is #UD because it is not offered. */
#include "softkvm/irqchip.h"
#include "softkvm/sys/sysint.h"
#include "softkvm/vm.h"
#include <errno.h>
#include <linux/kvm_para.h>

/* Linear address of the operand without any check: INVLPG does not access it. */
static uint64_t plain_lin(const struct cpu *c, const struct insn *i)
{
	uint64_t off = insn_offset(c, i);

	if (c->flat)
		return i->seg == SEG_FS || i->seg == SEG_GS ? c->seg[i->seg].base + off : off;
	return (uint32_t)(c->seg[i->seg].base + off);
}

static void op_invlpg(struct cpu *c, const struct insn *i)
{
	uint64_t lin = plain_lin(c, i);

	need_cpl0(c);
	if (cpu_canonical(c, lin))
		mmu_flush_page(c, lin);
}

/* dst: register with the type. */
static void op_invpcid(struct cpu *c, const struct insn *i)
{
	uint64_t type, d[2];

	need_cpl0(c);
	type = c->flat ? REG64(c, i->dst) : REG32(c, i->dst);
	mem_read(c, insn_lin(c, i, 16, ACC_READ), d, 16);
	if (type > 3 || (type < 2 && ((d[0] >> 12) || (!(c->cr4 & CR4_PCIDE) && d[0]))))
		cpu_gp(c, 0);
	if (type == 0 && !cpuid_canonical(c, d[1]))
		cpu_gp(c, 0);
	if (type == 0 && d[0] == (c->cr4 & CR4_PCIDE ? c->cr3 & 0xfff : 0))
		mmu_flush_page(c, d[1]);
	else if (type < 2)
		mmu_flush_pcid(c, (unsigned)d[0]);
	else if (type == 2)
		mmu_flush_all(c);
	else
		mmu_flush_pcids(c);
}

/* The guest's memory is coherent: nothing to write back. */
static void op_cpl0_nop(struct cpu *c, const struct insn *i) { need_cpl0(c); }
static void op_nop(struct cpu *c, const struct insn *i) { }

/* -- protection keys -------------------------------------------------------------------------- */
static void need_pke(struct cpu *c)
{
	if (!(c->cr4 & CR4_PKE))
		cpu_ud(c);
	if ((uint32_t)c->gpr[R_RCX])
		cpu_gp(c, 0);
}

static void op_rdpkru(struct cpu *c, const struct insn *i)
{
	need_pke(c);
	c->gpr[R_RAX] = c->pkru;
	c->gpr[R_RDX] = 0;
}

static void op_wrpkru(struct cpu *c, const struct insn *i)
{
	need_pke(c);
	if ((uint32_t)c->gpr[R_RDX])
		cpu_gp(c, 0);
	if (c->pkru == (uint32_t)c->gpr[R_RAX])
		return;
	c->pkru = (uint32_t)c->gpr[R_RAX];
	mmu_flush_all(c);       /* rights of user pages, global ones too, are folded into the TLB */
}

/* -- MONITOR, MWAIT --------------------------------------------------------------------------- */
/* Where CPUID does not offer them they are no-ops, unless the client switched that habit of KVM's off. */
static void need_mwait(struct cpu *c)
{
	bool offered = c->feat && (c->feat->f1_ecx >> 3 & 1);

	if (c->vm && (c->vm->policy.quirks_off & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT))
		offered = c->msr.misc_enable >> 18 & 1;         /* as CPUID shows it then */
	if (c->cpl || (!offered && c->vm && (c->vm->policy.quirks_off & KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)))
		cpu_ud(c);
}

#define MWAIT_SLEEP_MIN 50000   /* ns; each sleep is twice the last, up to MWAIT_SLEEP_MAX (softkvm/sys.h) */
#define MWAIT_LONGEST 100000000 /* ns: a store of the same bytes, or two that cancel each other, are not seen */

static uint8_t *monitor_host(struct cpu *c)
{
	uint64_t left;
	struct slot *s;
	bool ro;

	return phys_ptr(c->vm, c->monitor.gpa, &left, &ro, &s);
}

/* Remember the line; false when it is not in memory. */
static bool monitor_line(struct cpu *c, uint64_t lin)
{
	bool w, u;
	uint8_t *p;

	if (!mmu_translate(c, lin, &c->monitor.gpa, &w, &u))
		return false;
	c->monitor.gpa &= ~63ull;
	p = monitor_host(c);
	if (p)
		ram_copy(c->monitor.copy, p, sizeof c->monitor.copy);
	return p;
}

static void op_monitor(struct cpu *c, const struct insn *i)
{
	uint64_t off = c->gpr[R_RAX];
	uint8_t b;

	need_mwait(c);
	if ((uint32_t)c->gpr[R_RCX])
		cpu_gp(c, 0);
	if (i->flags & IF_A16)
		off = (uint16_t)off;
	else if (!c->flat || (i->flags & IF_A32))
		off = (uint32_t)off;
	off = seg_lin(c, i->seg, off, 1, ACC_READ);
	mem_read(c, off, &b, 1);
	c->monitor.armed = c->vm && (c->vm->policy.disabled_exits & KVM_X86_DISABLE_EXITS_MWAIT) && monitor_line(c, off);
}

/*
 * Where the client leaves MWAIT to the guest it waits: run.c sleeps, and between its sleeps the loop compares the line with
 * what MONITOR saw (mwait_goes_on()). Otherwise a NOP, as KVM's.
 */
static void op_mwait(struct cpu *c, const struct insn *i)
{
	need_mwait(c);
	if ((uint32_t)c->gpr[R_RCX] & ~3u)
		cpu_gp(c, 0);
	if (!c->monitor.armed)
		return;
	c->monitor.armed = false;
	c->monitor.any_irq = c->gpr[R_RCX] & 1;
	c->monitor.sleep = MWAIT_SLEEP_MIN;
	c->monitor.until = mono_ns() + MWAIT_LONGEST;
	c->monitor.waiting = c->halted = true;
}

bool mwait_goes_on(struct cpu *c)
{
	uint8_t *p;

	if (mono_ns() >= c->monitor.until || !(p = monitor_host(c)) || !ram_same(p, c->monitor.copy, sizeof c->monitor.copy))
		return false;
	return !c->monitor.any_irq ||
	       !(c->nmi_pending || c->ext_pending || (c->vm->irqchip && irqchip_pending(c) >= 0));
}

/* -- hypercalls ------------------------------------------------------------------------------- */
/* KVM_HC_SEND_IPI: a bitmap of APIC ids from `min` up, and an ICR. */
static int64_t hc_send_ipi(struct cpu *c, uint64_t lo, uint64_t hi, uint64_t min, uint64_t icr, bool w64)
{
	unsigned bits = w64 ? 64 : 32;
	int64_t n = 0;

	if (!c->lapic || !c->vm || (icr & ~0x4dffull) || (icr & 0x700) == 0x500 || (icr & 0x700) == 0x600)
		return -KVM_EINVAL;
	for (unsigned k = 0; k < 2 * bits; k++) {
		uint64_t word = k < bits ? lo : hi, id = min + k;

		if (!(word >> (k % bits) & 1) || id > 0xffffff)
			continue;
		/* Ids above 255 go where Linux puts them when x2APIC routing is on: address bits 63:40. */
		if (irqchip_msi(c->vm, 0xfee00000u | (id & 255) << 12 | (id >> 8) << 40, (uint32_t)icr & 0x7ff) > 0)
			n++;
	}
	return n;
}

/* KVM_HC_MAP_GPA_RANGE: user space's, where it asked for it (KVM_CAP_EXIT_HYPERCALL). */
static void hc_map_gpa_range(struct cpu *c, uint64_t mask)
{
	uint64_t gpa = c->gpr[R_RBX] & mask, pages = c->gpr[R_RCX] & mask, attrs = c->gpr[R_RDX] & mask;
	struct kvm_run *r = c->run;

	if ((gpa & 4095) || !pages || gpa + pages * 4096 <= gpa || pages > UINT64_MAX / 4096) {
		c->gpr[R_RAX] = (uint64_t)-KVM_EINVAL & mask;
		return;
	}
	memset(&r->hypercall, 0, sizeof r->hypercall);
	r->exit_reason = KVM_EXIT_HYPERCALL;
	r->hypercall.nr = KVM_HC_MAP_GPA_RANGE;
	r->hypercall.args[0] = gpa;
	r->hypercall.args[1] = pages;
	r->hypercall.args[2] = attrs;
	r->hypercall.longmode = c->flat;
	memset(&c->pio, 0, sizeof c->pio);
	c->pio.active = true;
	c->pio.kind = PIO_HYPERCALL;
	c->pio.lin_rip = c->flat ? cpu_cur_rip(c) : (uint32_t)(cpu_cur_rip(c) + c->seg[SEG_CS].base);
	c->pio.next_rip = cpu_next_rip(c);
	cpu_unwind(c, UNWIND_EXIT);
}

/*
 * The other vendor's hypercall instruction. KVM replaces it in the guest's memory by the right one and executes that,
 * unless user space switched this habit off; then it is undefined.
 */
static void fix_hypercall(struct cpu *c, bool amd)
{
	const uint8_t insn[3] = { 0x0f, 0x01, amd ? 0xd9 : 0xc1 };
	uint64_t rip = cpu_cur_rip(c);

	if (c->vm && (c->vm->policy.quirks_off & KVM_X86_QUIRK_FIX_HYPERCALL_INSN))
		cpu_ud(c);
	mem_write(c, c->flat ? rip : (uint32_t)(c->seg[SEG_CS].base + rip), insn, sizeof insn);
	cpu_unwind(c, UNWIND_RETRY);
}

/* aux: VMMCALL rather than VMCALL. */
static void op_hypercall(struct cpu *c, const struct insn *i)
{
	uint64_t mask = c->flat ? ~0ull : 0xffffffff, nr = c->gpr[R_RAX] & mask;
	bool amd = c->feat && c->feat->amd;
	int64_t r = -KVM_ENOSYS;

	if (c->feat && c->feat->n && i->aux != amd)
		fix_hypercall(c, amd);
	if (!c->cpl && nr == KVM_HC_MAP_GPA_RANGE && c->vm && (c->vm->policy.hypercall_exits >> nr & 1)) {
		hc_map_gpa_range(c, mask);
		return;
	}
	if (c->cpl)
		r = -KVM_EPERM;
	else if (nr == KVM_HC_VAPIC_POLL_IRQ)
		r = 0;
	else if (nr == KVM_HC_SEND_IPI && c->feat && (c->feat->kvm_features >> KVM_FEATURE_PV_SEND_IPI & 1))
		r = hc_send_ipi(c, c->gpr[R_RBX] & mask, c->gpr[R_RCX] & mask, c->gpr[R_RDX] & mask, c->gpr[R_RSI] & mask, c->flat);
	else if (nr == KVM_HC_SCHED_YIELD && c->feat && (c->feat->kvm_features >> KVM_FEATURE_PV_SCHED_YIELD & 1))
		r = 0;
	c->gpr[R_RAX] = (uint64_t)r & mask;
}

/* -- decoding --------------------------------------------------------------------------------- */
static bool decode_mem(struct insn *i, const struct decoded *d, unsigned n, insn_fn *fn)
{
	if (d->op[n].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return false;
	insn_set_mem(i, d, &d->op[n]);
	i->flags |= IF_END;
	i->fn = fn;
	return true;
}

static bool decode_monitor(struct insn *i, const struct decoded *d)
{
	for (unsigned n = 0; n < d->z.operand_count; n++)
		if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
			insn_set_mem(i, d, &d->op[n]);
	i->flags &= ~IF_MEM;
	i->fn = op_monitor;
	return true;
}

bool sys_decode_misc(struct insn *i, const struct decoded *d)
{
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_INVLPG: return decode_mem(i, d, 0, op_invlpg);
	case ZYDIS_MNEMONIC_INVPCID:
		i->dst = insn_reg_off(d->op[0].reg.value);
		return decode_mem(i, d, 1, op_invpcid);
	case ZYDIS_MNEMONIC_INVD: case ZYDIS_MNEMONIC_WBINVD: /* F3: WBNOINVD */
		i->fn = op_cpl0_nop;
		return true;
	case ZYDIS_MNEMONIC_SERIALIZE: i->fn = op_nop; i->flags |= IF_END; return true;
	case ZYDIS_MNEMONIC_RDPKRU: i->fn = op_rdpkru; return true;
	case ZYDIS_MNEMONIC_WRPKRU: i->fn = op_wrpkru; i->flags |= IF_END; return true;
	case ZYDIS_MNEMONIC_MONITOR: case ZYDIS_MNEMONIC_MONITORX: return decode_monitor(i, d);
	case ZYDIS_MNEMONIC_MWAIT: case ZYDIS_MNEMONIC_MWAITX: i->fn = op_mwait; i->flags |= IF_END; return true;
	case ZYDIS_MNEMONIC_VMCALL: case ZYDIS_MNEMONIC_VMMCALL:
		i->aux = d->z.mnemonic == ZYDIS_MNEMONIC_VMMCALL;
		/* Either vendor's instruction is taken: Linux patches in the host's, other guests guess. */
		i->fn = op_hypercall;
		i->flags |= IF_END;
		return true;
	case ZYDIS_MNEMONIC_RSM:        /* there is no SMM to leave */
	case ZYDIS_MNEMONIC_VMXON: case ZYDIS_MNEMONIC_VMXOFF: case ZYDIS_MNEMONIC_VMLAUNCH: case ZYDIS_MNEMONIC_VMRESUME:
	case ZYDIS_MNEMONIC_VMCLEAR: case ZYDIS_MNEMONIC_VMPTRLD: case ZYDIS_MNEMONIC_VMPTRST: case ZYDIS_MNEMONIC_VMREAD:
	case ZYDIS_MNEMONIC_VMWRITE: case ZYDIS_MNEMONIC_VMFUNC: case ZYDIS_MNEMONIC_INVEPT: case ZYDIS_MNEMONIC_INVVPID:
	case ZYDIS_MNEMONIC_VMRUN: case ZYDIS_MNEMONIC_VMLOAD: case ZYDIS_MNEMONIC_VMSAVE: case ZYDIS_MNEMONIC_STGI:
	case ZYDIS_MNEMONIC_CLGI: case ZYDIS_MNEMONIC_SKINIT: case ZYDIS_MNEMONIC_INVLPGA: case ZYDIS_MNEMONIC_GETSEC:
		i->fn = op_ud;
		i->flags |= IF_END;
		return true;
	default:
		return false;
	}
}

bool sys_decode(struct insn *i, const struct decoded *d)
{
	static insn_family *const families[] = {
		sys_decode_far, sys_decode_seg, sys_decode_flags, sys_decode_io, sys_decode_cr, sys_decode_desc, sys_decode_msr,
		sys_decode_misc,
	};
	const struct insn blank = *i;

	for (unsigned n = 0; n < ARRAY_SIZE(families); n++) {
		if (families[n](i, d))
			return true;
		*i = blank;
	}
	return false;
}
