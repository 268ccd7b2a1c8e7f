/* Between two instructions: what comes next in the architecture's order of priority (SDM vol. 3 6.9), and shadows. */
#include <errno.h>
#include <stdatomic.h>

#include "softkvm/irqchip.h"
#include "softkvm/sys/sysint.h"
#include "softkvm/vcpu.h"
#include "softkvm/vm.h"

void event_update_one_insn(struct cpu *c)
{
	c->one_insn = (c->eflags & (FL_TF | FL_RF)) || c->shadow || c->code_bp || (c->dbg.enabled && c->dbg.step);
}

void event_insn_done(struct cpu *c)
{
	uint8_t ended = c->shadow & c->step.shadow;

	/* An instruction that sets a shadow it was already under gets no second one, as on real processors. */
	c->shadow &= (uint8_t)~ended;
	if (c->step.rf && !cpu_mid_rep(c))
		c->eflags &= ~FL_RF;
	if (c->step.tf) {
		c->trap_db = true;
		c->trap_dr6 |= 1 << 14;
	}
	if (ended && !c->shadow && c->irq_blocked)
		event_unblocked(c);
	event_update_one_insn(c);
}

void event_unblocked(struct cpu *c)
{
	c->irq_blocked = false;
	atomic_fetch_or_explicit(&c->requests, REQ_EVENT, memory_order_relaxed);
}

bool event_can_interrupt(const struct cpu *c)
{
	return (c->eflags & FL_IF) && !c->shadow && !c->ev.valid && !c->ext_pending;
}

void event_completed_outside(struct cpu *c)
{
	bool tf = (c->eflags & FL_TF) || (c->dbg.enabled && c->dbg.step);

	c->shadow = 0;
	c->eflags &= ~FL_RF;
	if (tf) {
		c->trap_db = true;
		c->trap_dr6 |= 1 << 14;
	}
	event_update_one_insn(c);
}

static bool pic_in_user(const struct cpu *c)
{
	return !c->vm || !c->vm->irqchip || c->vm->split_irqchip;
}

static bool wants_window(const struct cpu *c)
{
	if (!c->run->request_interrupt_window || !pic_in_user(c))
		return false;
	return !c->lapic || lapic_accepts_pic(c);
}

static bool waits_for_sipi(const struct cpu *c)
{
	uint32_t s = c->vcpu ? atomic_load(&c->vcpu->mp_state) : KVM_MP_STATE_RUNNABLE;

	return s == KVM_MP_STATE_INIT_RECEIVED || s == KVM_MP_STATE_UNINITIALIZED;
}

bool event_eoi_exit(struct cpu *c)
{
	int eoi = c->lapic ? lapic_take_eoi_exit(c) : -1;

	if (eoi < 0)
		return false;
	event_unblocked(c);
	c->run->exit_reason = KVM_EXIT_IOAPIC_EOI;
	c->run->eoi.vector = (uint8_t)eoi;
	return true;
}

/* There is no SMM: an SMI is dropped. */
static void take_nmi(struct cpu *c)
{
	if (c->lapic && (lapic_take_nmi_smi(c) & LAPIC_NMI))
		c->nmi_pending = true;
}

/* False: leave to user space. */
static bool poll_lapic(struct cpu *c)
{
	if (!c->lapic)
		return true;
	if (event_eoi_exit(c))
		return false;
	if (c->vcpu)
		vcpu_init_sipi(c);
	take_nmi(c);
	return true;
}

/* Deliver what has just been put in cpu->ev, and look again afterwards. */
static bool deliver_and_look(struct cpu *c)
{
	bool r = event_deliver(c);

	event_unblocked(c);
	return r;
}

static bool deliver_ext(struct cpu *c, int vector)
{
	if (vector < 0)
		return true;
	c->irq_blocked = true;          /* there may be more: look again when IF comes back */
	c->ev = (struct event){ .valid = true, .vector = (uint8_t)vector, .type = EV_EXT };
	return event_deliver(c);
}

/* Maskable interrupts and the interrupt window. */
static bool boundary_intr(struct cpu *c)
{
	bool open = (c->eflags & FL_IF) && !c->shadow;

	if (c->ext_pending) {
		if (!open) {
			c->irq_blocked = true;
			return true;
		}
		c->ext_pending = false;
		return deliver_ext(c, c->ext_vector);
	}
	if (c->vm && c->vm->irqchip && irqchip_pending(c) >= 0) {
		if (!open) {
			c->irq_blocked = true;
			return true;
		}
		return deliver_ext(c, irqchip_ack(c));
	}
	if (wants_window(c)) {
		if (!open) {
			c->irq_blocked = true;
			return true;
		}
		c->run->exit_reason = KVM_EXIT_IRQ_WINDOW_OPEN;
		return false;
	}
	return true;
}

static bool would_interrupt(struct cpu *c)
{
	if (c->nmi_pending && !c->nmi_masked)
		return true;
	return (c->eflags & FL_IF) && (c->ext_pending || (c->vm && c->vm->irqchip && irqchip_pending(c) >= 0));
}

bool event_boundary(struct cpu *c)
{
	if (c->triple_fault) {
		c->triple_fault = false;
		c->run->exit_reason = KVM_EXIT_SHUTDOWN;
		return false;
	}
	if (!poll_lapic(c))
		return false;
	if (waits_for_sipi(c))
		return true;
	if (c->ev.valid)
		return deliver_and_look(c);
	if (c->trap_db && !(c->shadow & SHADOW_MOV_SS)) {
		c->ev = (struct event){ .valid = true, .vector = EXC_DB, .type = EV_EXC, .payload = c->trap_dr6,
					.has_payload = true };
		c->trap_db = false;
		c->trap_dr6 = 0;
		return deliver_and_look(c);
	}
	if (c->dbg.enabled && c->dbg.block_irq) {       /* the debugger steps over what would interrupt it */
		c->irq_blocked = true;
		if (c->halted && would_interrupt(c))    /* which ends the HLT all the same */
			c->halted = false;
		return true;
	}
	if (c->nmi_pending) {
		if (!c->nmi_masked && !c->shadow) {
			c->nmi_pending = false;
			c->ev = (struct event){ .valid = true, .vector = EXC_NMI, .type = EV_NMI };
			return deliver_and_look(c);
		}
		c->irq_blocked = true;
	}
	return boundary_intr(c);
}

/* -- KVM_GET/SET_VCPU_EVENTS, KVM_INTERRUPT --------------------------------------------------- */
/*
 * A trap that is due but not yet delivered is told as a pending #DB: the structure has no other place for it. A client that does not
 * know payloads finds their effect in DR6 already.
 */
static void trap_get(struct cpu *c, struct kvm_vcpu_events *e)
{
	e->exception.nr = EXC_DB;
	if (c->vm && c->vm->policy.exception_payload) {
		e->exception.pending = 1;
		e->exception_has_payload = 1;
		e->exception_payload = c->trap_dr6;
		return;
	}
	e->exception.injected = 1;
	event_db_payload(c, c->trap_dr6);
}

void events_get(struct cpu *c, struct kvm_vcpu_events *e)
{
	bool exc = c->ev.valid && (c->ev.type == EV_EXC || c->ev.type == EV_SOFT_EXC || c->ev.type == EV_PRIV_SOFT_EXC);

	memset(e, 0, sizeof *e);
	e->exception.injected = exc && !c->ev_pending;
	e->exception.pending = exc && c->ev_pending;
	e->exception.nr = exc ? c->ev.vector : 0;
	e->exception.has_error_code = exc && c->ev.has_error;
	e->exception.error_code = exc ? c->ev.error : 0;
	e->exception_has_payload = exc && c->ev.has_payload;
	e->exception_payload = e->exception_has_payload ? c->ev.payload : 0;
	if (c->trap_db && !c->ev.valid && !c->dbg.enabled)
		trap_get(c, e);
	take_nmi(c);
	if (c->ext_pending || (c->ev.valid && (c->ev.type == EV_EXT || c->ev.type == EV_SOFT))) {
		e->interrupt.injected = 1;
		e->interrupt.nr = c->ext_pending ? c->ext_vector : c->ev.vector;
		e->interrupt.soft = !c->ext_pending && c->ev.type == EV_SOFT;
	}
	e->interrupt.shadow = (c->shadow & SHADOW_STI ? KVM_X86_SHADOW_INT_STI : 0) |
			      (c->shadow & SHADOW_MOV_SS ? KVM_X86_SHADOW_INT_MOV_SS : 0);
	e->nmi.injected = c->ev.valid && c->ev.type == EV_NMI;
	e->nmi.pending = c->nmi_pending;
	e->nmi.masked = c->nmi_masked;
	e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
	if (c->vm && c->vm->policy.exception_payload)
		e->flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
	if (c->vm && c->vm->policy.triple_fault_event) {
		e->flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
		e->triple_fault.pending = c->triple_fault;
	}
}

int events_set(struct cpu *c, const struct kvm_vcpu_events *e)
{
	if (e->flags & ~(KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW |
			 KVM_VCPUEVENT_VALID_SMM | KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT))
		return -EINVAL;
	if (c->vm && (((e->flags & KVM_VCPUEVENT_VALID_PAYLOAD) && !c->vm->policy.exception_payload) ||
		      ((e->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !c->vm->policy.triple_fault_event)))
		return -EINVAL;
	/* There is no SMM to be in. */
	if ((e->flags & KVM_VCPUEVENT_VALID_SMM) && (e->smi.smm || e->smi.pending))
		return -EINVAL;
	if ((e->exception.injected || e->exception.pending) && (e->exception.nr > 31 || e->exception.nr == EXC_NMI))
		return -EINVAL;
	c->ev = (struct event){ 0 };
	c->ev_pending = c->ext_pending = false;
	if (!c->dbg.enabled) {
		c->trap_db = false;
		c->trap_dr6 = 0;
	}
	if (e->exception.injected || e->exception.pending) {
		bool payload = (e->flags & KVM_VCPUEVENT_VALID_PAYLOAD) && e->exception_has_payload;
		int type = e->exception.nr == EXC_BP || e->exception.nr == EXC_OF ? EV_SOFT_EXC : EV_EXC;

		c->ev = (struct event){ .valid = true, .vector = e->exception.nr, .type = type,
					.has_error = e->exception.has_error_code, .error = e->exception.error_code,
					.has_payload = payload, .payload = e->exception_payload };
		c->ev_pending = e->exception.pending && !e->exception.injected;
	} else if (e->nmi.injected) {
		c->ev = (struct event){ .valid = true, .vector = EXC_NMI, .type = EV_NMI };
	}
	if (e->interrupt.injected) {
		if (e->interrupt.soft && !c->ev.valid) {
			c->ev = (struct event){ .valid = true, .vector = e->interrupt.nr, .type = EV_SOFT };
		} else {
			c->ext_pending = true;
			c->ext_vector = e->interrupt.nr;
		}
	}
	if (e->flags & KVM_VCPUEVENT_VALID_SHADOW)
		c->shadow = (e->interrupt.shadow & KVM_X86_SHADOW_INT_STI ? SHADOW_STI : 0) |
			    (e->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS ? SHADOW_MOV_SS : 0);
	if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
		c->nmi_pending = e->nmi.pending;
	c->nmi_masked = e->nmi.masked;
	c->triple_fault = (e->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && e->triple_fault.pending;
	event_update_one_insn(c);
	event_unblocked(c);
	return 0;
}

int event_queue_ext(struct cpu *c, unsigned vector)
{
	if (vector > 255)
		return -EINVAL;
	if (c->ext_pending)
		return -EEXIST;
	c->ext_pending = true;
	c->ext_vector = (uint8_t)vector;
	event_unblocked(c);
	return 0;
}
