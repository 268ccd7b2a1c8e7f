/* Flags with privilege (PUSHF, POPF, CLI, STI, CLAC, STAC), HLT and software interrupts. */
#include <stdatomic.h>

#include "softkvm/sys/sysint.h"
#include "softkvm/vm.h"

static bool pvi_or_vme(const struct cpu *c)
{
	if (c->vm86)
		return c->cr4 & CR4_VME;
	return !c->real && c->cpl == 3 && (c->cr4 & CR4_PVI);
}

static void op_pushf(struct cpu *c, const struct insn *i)
{
	uint64_t v = cpu_get_rflags(c) & ~(uint64_t)(FL_VM | FL_RF);

	if (c->vm86 && cpu_iopl(c) < 3) {
		if (i->aux != 2 || !(c->cr4 & CR4_VME))
			cpu_gp(c, 0);
		v = (v & ~(uint64_t)FL_IF) | FL_IOPL | (c->eflags & FL_VIF ? FL_IF : 0);
	}
	stack_push_n(c, &v, 1, i->aux);
}

static void popf_vme(struct cpu *c, uint64_t v)
{
	uint64_t fl;

	if ((v & FL_TF) || ((v & FL_IF) && (c->eflags & FL_VIP)))
		cpu_gp(c, 0);
	fl = flags_merge(c, v, 2, 3, false) & ~(uint64_t)FL_VIF;
	stack_set_sp(c, c->gpr[R_RSP] + 2);
	cpu_set_rflags(c, fl | (v & FL_IF ? FL_VIF : 0));
}

static void op_popf(struct cpu *c, const struct insn *i)
{
	uint64_t v = stack_peek(c, 0, i->aux);

	if (c->vm86 && cpu_iopl(c) < 3) {
		if (i->aux != 2 || !(c->cr4 & CR4_VME))
			cpu_gp(c, 0);
		popf_vme(c, v);
		return;
	}
	stack_set_sp(c, c->gpr[R_RSP] + i->aux);
	cpu_set_rflags(c, flags_merge(c, v, i->aux, c->cpl, false));
}

static void op_cli(struct cpu *c, const struct insn *i)
{
	if (c->real || c->cpl <= cpu_iopl(c)) {
		c->eflags &= ~FL_IF;
		return;
	}
	if (!pvi_or_vme(c))
		cpu_gp(c, 0);
	c->eflags &= ~FL_VIF;
}

/*
 * Interrupts stay off for one more instruction. Events are looked for between blocks only, so where another instruction
 * follows in the block and nothing waits, that is so without doing anything: what arrives from now on arrives later.
 */
static void sti_shadow(struct cpu *c, const struct insn *i)
{
	if (!(i->flags & IF_END) && !c->irq_blocked && !c->one_insn && !c->trap_db &&
	    !atomic_load_explicit(&c->requests, memory_order_relaxed))
		return;
	c->shadow |= SHADOW_STI;
	if (c->irq_blocked)
		event_unblocked(c);
	event_update_one_insn(c);
	cpu_leave_after(c);
}

static void op_sti(struct cpu *c, const struct insn *i)
{
	if (c->real || c->cpl <= cpu_iopl(c)) {
		if (!(c->eflags & FL_IF)) {
			c->eflags |= FL_IF;
			sti_shadow(c, i);
		}
		return;
	}
	if (!pvi_or_vme(c) || (c->eflags & FL_VIP))
		cpu_gp(c, 0);
	c->eflags |= FL_VIF;
}

static void op_ac(struct cpu *c, const struct insn *i)
{
	uint64_t fl = cpu_get_rflags(c);

	if (c->cpl || !c->feat || !(c->feat->f7_ebx >> 20 & 1))
		cpu_ud(c);
	cpu_set_rflags(c, i->aux ? fl | FL_AC : fl & ~(uint64_t)FL_AC);
}

static void op_hlt(struct cpu *c, const struct insn *i)
{
	need_cpl0(c);
	c->stats.halts++;
	if (c->vm && c->vm->irqchip) {
		c->halted = true;
		return;
	}
	c->run->exit_reason = KVM_EXIT_HLT;
	cpu_unwind(c, UNWIND_EXIT_NEXT);
}

static void op_int(struct cpu *c, const struct insn *i) { event_soft_int(c, (uint8_t)i->imm, EV_SOFT); }
static void op_int3(struct cpu *c, const struct insn *i) { event_soft_int(c, EXC_BP, EV_SOFT_EXC); }

static void op_into(struct cpu *c, const struct insn *i)
{
	if (c->aflags & 1)
		event_soft_int(c, EXC_OF, EV_SOFT_EXC);
}

static void op_int1(struct cpu *c, const struct insn *i) { event_soft_int(c, EXC_DB, EV_PRIV_SOFT_EXC); }

bool sys_decode_flags(struct insn *i, const struct decoded *d)
{
	i->flags |= IF_END;
	switch (d->z.mnemonic) {
	case ZYDIS_MNEMONIC_PUSHF: i->aux = 2; break;
	case ZYDIS_MNEMONIC_PUSHFD: i->aux = 4; break;
	case ZYDIS_MNEMONIC_PUSHFQ: i->aux = 8; break;
	case ZYDIS_MNEMONIC_POPF: i->aux = 2; i->fn = op_popf; break;
	case ZYDIS_MNEMONIC_POPFD: i->aux = 4; i->fn = op_popf; break;
	case ZYDIS_MNEMONIC_POPFQ: i->aux = 8; i->fn = op_popf; break;
	case ZYDIS_MNEMONIC_CLI: i->fn = op_cli; i->flags &= ~IF_END; return true;
	case ZYDIS_MNEMONIC_STI: i->fn = op_sti; i->flags = (uint16_t)((i->flags & ~IF_END) | IF_NOT_LAST); return true;
	case ZYDIS_MNEMONIC_CLAC: i->fn = op_ac; return true;
	case ZYDIS_MNEMONIC_STAC: i->fn = op_ac; i->aux = 1; return true;
	case ZYDIS_MNEMONIC_HLT: i->fn = op_hlt; return true;
	case ZYDIS_MNEMONIC_INT: i->fn = op_int; i->imm = (uint8_t)d->op[0].imm.value.u; return true;
	case ZYDIS_MNEMONIC_INT3: i->fn = op_int3; return true;
	case ZYDIS_MNEMONIC_INTO: i->fn = op_into; return true;
	case ZYDIS_MNEMONIC_INT1: i->fn = op_int1; return true;
	default: return false;
	}
	i->flags |= IF_STACK;
	if (!i->fn) {
		i->fn = op_pushf;
		i->flags &= ~IF_END;
	}
	return true;
}
