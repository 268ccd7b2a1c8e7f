/* Register structures of the API: KVM_GET/SET_REGS, SREGS, SREGS2, DEBUGREGS, KVM_SET_GUEST_DEBUG. */
#include <errno.h>
#include <stdatomic.h>

#include "softkvm/api/api.h"
#include "softkvm/events.h"
#include "softkvm/irqchip.h"
#include "softkvm/mmu.h"

void regs_get(struct cpu *c, struct kvm_regs *r)
{
	const uint64_t *g = c->gpr;

	*r = (struct kvm_regs){ .rax = g[0], .rcx = g[1], .rdx = g[2], .rbx = g[3], .rsp = g[4], .rbp = g[5], .rsi = g[6], .rdi = g[7],
		.r8 = g[8], .r9 = g[9], .r10 = g[10], .r11 = g[11], .r12 = g[12], .r13 = g[13], .r14 = g[14], .r15 = g[15],
		.rip = c->rip, .rflags = cpu_get_rflags(c) };
	/* The single step is the debugger's, not the guest's. */
	if (c->dbg.step)
		r->rflags &= ~(uint64_t)FL_TF;
}

void regs_set(struct cpu *c, const struct kvm_regs *r)
{
	const uint64_t g[16] = { r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
		r->r8, r->r9, r->r10, r->r11, r->r12, r->r13, r->r14, r->r15 };

	memcpy(c->gpr, g, sizeof g);
	c->rip = r->rip;
	c->rep_begun = false;
	cpu_set_rflags(c, (r->rflags & 0x3f7fd5) | FL_1);
	/* New registers: a pending exception is void; one that is being injected stays, as on Linux. */
	if (c->ev.valid && c->ev.type == EV_EXC && c->ev_pending)
		c->ev.valid = c->ev_pending = false;
}

static const uint8_t seg_order[SEG_COUNT] = { SEG_CS, SEG_DS, SEG_ES, SEG_FS, SEG_GS, SEG_SS, SEG_TR, SEG_LDTR };

/* kvm_sregs and kvm_sregs2 begin alike: eight segments, two tables. */
static void segs_get(struct cpu *c, struct kvm_segment *s, struct kvm_dtable *gdt, struct kvm_dtable *idt)
{
	for (unsigned i = 0; i < SEG_COUNT; i++)
		seg_to_kvm(&s[i], &c->seg[seg_order[i]]);
	*gdt = (struct kvm_dtable){ .base = c->gdt.base, .limit = c->gdt.limit };
	*idt = (struct kvm_dtable){ .base = c->idt.base, .limit = c->idt.limit };
}

static uint64_t cr8_get(const struct cpu *c)
{
	return c->lapic ? lapic_get_tpr(c) : c->cr8;
}

static int pending_ext(const struct cpu *c)
{
	if (c->ext_pending)
		return c->ext_vector;
	return c->ev.valid && c->ev.type == EV_EXT ? c->ev.vector : -1;
}

void sregs_get(struct cpu *c, struct kvm_sregs *s)
{
	int ext = pending_ext(c);

	*s = (struct kvm_sregs){ .cr0 = c->cr0, .cr2 = c->cr2, .cr3 = c->cr3, .cr4 = c->cr4, .cr8 = cr8_get(c), .efer = c->efer,
		.apic_base = c->msr.apic_base };
	segs_get(c, &s->cs, &s->gdt, &s->idt);
	if (ext >= 0)
		s->interrupt_bitmap[ext / 64] |= 1ull << ext % 64;
}

void sregs2_get(struct cpu *c, struct kvm_sregs2 *s)
{
	*s = (struct kvm_sregs2){ .cr0 = c->cr0, .cr2 = c->cr2, .cr3 = c->cr3, .cr4 = c->cr4, .cr8 = cr8_get(c), .efer = c->efer,
		.apic_base = c->msr.apic_base };
	segs_get(c, &s->cs, &s->gdt, &s->idt);
	if (cpu_paging(c) && c->cr4 & CR4_PAE && !cpu_long(c)) {
		memcpy(s->pdptrs, c->pdpte, sizeof s->pdptrs);
		s->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
	}
}

/* What hardware could never hold. */
static bool sregs_valid(const struct cpu *c, uint64_t cr0, uint64_t cr3, uint64_t cr4, uint64_t efer, const struct kvm_segment *cs)
{
	bool paging = cr0 & CR0_PG;

	if (cr0 >> 32 || (cr0 & CR0_PG && !(cr0 & CR0_PE)) || (cr0 & CR0_NW && !(cr0 & CR0_CD)))
		return false;
	if (efer & EFER_LME && paging) {
		if (!(cr4 & CR4_PAE) || !(efer & EFER_LMA) || cr3 & (mmu_rsvd_mask(c) | 0x7ff0000000000000ull))
			return false;
	} else if (efer & EFER_LMA || cs->l) {
		return false;
	}
	return cr4_valid(c, cr4);
}

/* CR4 bits: those of the engine, and of them what CPUID offers once it is set. */
bool cr4_valid(const struct cpu *c, uint64_t v)
{
	const struct cpu_features *f = c->feat->n ? c->feat : cpuid_host_features();
	uint64_t ok = CR4_VME | CR4_PVI | CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT;

	ok |= f->f1_ecx & 1u << 26 ? CR4_OSXSAVE : 0;
	ok |= f->f1_ecx & 1u << 17 ? CR4_PCIDE : 0;
	ok |= f->f7_ebx & 1u << 0 ? CR4_FSGSBASE : 0;
	ok |= f->f7_ebx & 1u << 7 ? CR4_SMEP : 0;
	ok |= f->f7_ebx & 1u << 20 ? CR4_SMAP : 0;
	ok |= f->f7_ecx & 1u << 2 ? CR4_UMIP : 0;
	ok |= f->f7_ecx & 1u << 3 ? CR4_PKE : 0;
	ok |= f->f7_ecx & 1u << 16 ? CR4_LA57 : 0;
	return !(v & ~ok);
}

struct common { uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base; };

static int common_set(struct cpu *c, const struct kvm_segment *seg, const struct kvm_dtable *gdt, const struct kvm_dtable *idt,
		      const struct common *n)
{
	uint64_t efer_known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR | BIT(21);

	if (!sregs_valid(c, n->cr0, n->cr3, n->cr4, n->efer, &seg[0]) || n->efer & ~efer_known || n->cr8 > 15)
		return -EINVAL;
	if (c->lapic && lapic_set_base(c, n->apic_base, true))
		return -EINVAL;
	if (!c->lapic)
		c->msr.apic_base = n->apic_base;
	for (unsigned i = 0; i < SEG_COUNT; i++)
		seg_from_kvm(&c->seg[seg_order[i]], &seg[i]);
	c->gdt = (struct dtable){ gdt->base, gdt->limit };
	c->idt = (struct dtable){ idt->base, idt->limit };
	c->cr0 = n->cr0 | CR0_ET;
	c->cr2 = n->cr2;
	c->cr3 = n->cr3;
	c->cr4 = n->cr4;
	c->efer = n->efer;
	if (c->lapic)
		lapic_set_tpr(c, n->cr8);
	else
		c->cr8 = n->cr8;
	mmu_flush_all(c);
	cpu_update_mode(c);
	/* An AP that is given the state of a CPU at its reset vector is meant to run. */
	if (c->vm->boot_cpu_id == c->id && c->rip == 0xfff0 && c->seg[SEG_CS].sel == 0xf000 && !(c->cr0 & CR0_PE))
		vcpu_set_running_state(c->vcpu, KVM_MP_STATE_RUNNABLE);
	cpu_request(c, REQ_EVENT);
	return 0;
}

static bool pae32(const struct cpu *c)
{
	return cpu_paging(c) && c->cr4 & CR4_PAE && !cpu_long(c);
}

int sregs_set(struct cpu *c, const struct kvm_sregs *s)
{
	struct common n = { s->cr0, s->cr2, s->cr3, s->cr4, s->cr8, s->efer, s->apic_base };
	int r = common_set(c, &s->cs, &s->gdt, &s->idt, &n);

	if (r)
		return r;
	if (pae32(c))
		mmu_load_pdptes(c, c->cr3);
	for (unsigned v = 0; v < 256; v++)
		if (s->interrupt_bitmap[v / 64] >> v % 64 & 1) {
			c->ev = (struct event){ .valid = true, .vector = (uint8_t)v, .type = EV_EXT };
			break;
		}
	return 0;
}

int sregs2_set(struct cpu *c, const struct kvm_sregs2 *s)
{
	struct common n = { s->cr0, s->cr2, s->cr3, s->cr4, s->cr8, s->efer, s->apic_base };
	bool pae = s->cr0 & CR0_PG && s->cr4 & CR4_PAE && !(s->efer & EFER_LMA), given = s->flags & KVM_SREGS2_FLAGS_PDPTRS_VALID;
	int r;

	if (s->flags & ~(uint64_t)KVM_SREGS2_FLAGS_PDPTRS_VALID || (given && !pae))
		return -EINVAL;
	r = common_set(c, &s->cs, &s->gdt, &s->idt, &n);
	if (r)
		return r;
	if (given)
		memcpy(c->pdpte, s->pdptrs, sizeof c->pdpte);
	else if (pae32(c))
		mmu_load_pdptes(c, c->cr3);
	return 0;
}

/* -- debugging -------------------------------------------------------------------------------- */
void debugregs_get(struct cpu *c, struct kvm_debugregs *d)
{
	*d = (struct kvm_debugregs){ .db = { c->dr[0], c->dr[1], c->dr[2], c->dr[3] }, .dr6 = c->dr[6], .dr7 = c->dr[7] };
}

long debugregs_set(struct cpu *c, const struct kvm_debugregs *d)
{
	if (d->flags || d->dr6 >> 32 || d->dr7 >> 32)
		return -EINVAL;
	for (int i = 0; i < 4; i++)
		c->dr[i] = d->db[i];
	c->dr[6] = d->dr6;
	c->dr[7] = d->dr7;
	debug_update(c);
	cpu_request(c, REQ_DEBUG);
	return 0;
}

long debug_set(struct cpu *c, const struct kvm_guest_debug *d)
{
	uint32_t inject = d->control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP);

	if (inject) {
		if (c->ev.valid)
			return -EBUSY;
		c->ev = (struct event){ .valid = true, .vector = inject & KVM_GUESTDBG_INJECT_DB ? EXC_DB : EXC_BP, .type = EV_EXC };
	}
	c->dbg.enabled = d->control & KVM_GUESTDBG_ENABLE;
	c->dbg.step = c->dbg.enabled && d->control & KVM_GUESTDBG_SINGLESTEP;
	c->dbg.sw_bp = c->dbg.enabled && d->control & KVM_GUESTDBG_USE_SW_BP;
	c->dbg.hw_bp = c->dbg.enabled && d->control & KVM_GUESTDBG_USE_HW_BP;
	c->dbg.block_irq = c->dbg.enabled && d->control & KVM_GUESTDBG_BLOCKIRQ;
	for (int i = 0; i < 4; i++)
		c->dbg.dr[i] = c->dbg.hw_bp ? d->arch.debugreg[i] : 0;
	c->dbg.dr7 = c->dbg.hw_bp ? d->arch.debugreg[7] : 0;
	/* one_insn and the breakpoint flags follow from both sets of debug registers. */
	debug_update(c);
	event_update_one_insn(c);
	cpu_request(c, REQ_DEBUG);
	return 0;
}
