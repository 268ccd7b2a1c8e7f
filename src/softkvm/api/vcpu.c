/* vCPU objects: creation, reset, requests from other threads. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "softkvm/api/api.h"
#include "softkvm/jit/jit.h"
#include "softkvm/low.h"
#include "softkvm/events.h"
#include "softkvm/irqchip.h"
#include "softkvm/mmu.h"

void cpu_request(struct cpu *c, uint32_t req)
{
	atomic_fetch_or(&c->requests, req);
	if (req & REQ_WAKE && c->vcpu && atomic_load(&c->vcpu->sleeping)) {
		uint64_t one = 1;

		while (write(c->vcpu->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
			;
	}
}

/* -- reset (SDM vol. 3 table 10-1) ------------------------------------------------------------- */
static void reset_segments(struct cpu *c)
{
	for (unsigned i = 0; i < SEG_COUNT; i++)
		c->seg[i] = (struct seg){ .limit = 0xffff, .type = 3, .s = 1, .present = 1 };
	c->seg[SEG_CS].sel = 0xf000;
	c->seg[SEG_CS].base = 0xffff0000;
	c->seg[SEG_CS].type = 11;
	c->seg[SEG_TR].type = 11;
	c->seg[SEG_TR].s = 0;
	c->seg[SEG_LDTR].type = 2;
	c->seg[SEG_LDTR].s = 0;
	c->gdt = c->idt = (struct dtable){ 0, 0xffff };
}

void cpu_reset(struct cpu *c, bool init)
{
	uint32_t id[4] = { 0 };

	memset(c->gpr, 0, sizeof c->gpr);
	cpuid_query(c, 1, 0, id);
	c->gpr[R_RDX] = id[0] ? id[0] : 0x600;
	c->rip = 0xfff0;
	c->cr0 = CR0_ET | (init ? c->cr0 & (CR0_CD | CR0_NW) : CR0_CD | CR0_NW);
	c->cr2 = c->cr3 = c->cr4 = c->cr8 = c->efer = 0;
	memset(c->pdpte, 0, sizeof c->pdpte);
	memset(c->dr, 0, sizeof c->dr);
	c->dr[6] = 0xffff0ff0;
	c->dr[7] = 0x400;
	reset_segments(c);
	if (!init) {
		c->xcr0 = XCR0_X87;
		c->pkru = 0;
		fpu_reset(&c->fpu);
	}
	c->ev = (struct event){ 0 };
	mmio_reset(c);
	c->pio.active = false;
	c->halted = c->nmi_pending = c->nmi_masked = c->smi_pending = c->smm = c->nmi_window_iret = c->trap_db = false;
	c->ext_pending = c->ev_pending = c->triple_fault = c->irq_blocked = c->rep_begun = false;
	c->shadow = 0;
	c->monitor.armed = c->monitor.waiting = false;
	msr_reset(c, init);
	if (c->lapic)
		lapic_reset(c, init);
	cpu_set_rflags(c, FL_1);
	cpu_update_mode(c);
	debug_update(c);
	mmu_flush_all(c);
}

/* -- INIT and SIPI ---------------------------------------------------------------------------- */
void vcpu_set_running_state(struct vcpu *v, uint32_t mp_state)
{
	atomic_store(&v->mp_state, mp_state);
	v->cpu.halted = mp_state == KVM_MP_STATE_HALTED;
}

bool vcpu_init_sipi(struct cpu *c)
{
	struct vcpu *v = c->vcpu;
	uint8_t vector = 0;
	unsigned got = c->lapic ? lapic_take_init_sipi(c, &vector) : 0;

	if (got & LAPIC_INIT) {
		cpu_reset(c, true);
		vcpu_set_running_state(v, c->msr.apic_base & BIT(8) ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_INIT_RECEIVED);
	}
	if (got & LAPIC_SIPI && atomic_load(&v->mp_state) == KVM_MP_STATE_INIT_RECEIVED) {
		c->seg[SEG_CS].sel = (uint16_t)(vector << 8);
		c->seg[SEG_CS].base = (uint64_t)vector << 12;
		c->rip = 0;
		cpu_update_mode(c);
		vcpu_set_running_state(v, KVM_MP_STATE_RUNNABLE);
	}
	switch (atomic_load(&v->mp_state)) {
	case KVM_MP_STATE_UNINITIALIZED:
	case KVM_MP_STATE_INIT_RECEIVED:
		return true;
	default:
		return false;
	}
}

/* -- life ------------------------------------------------------------------------------------- */
/* Memory for translations is shared out among the vCPUs that were announced, or as if there were as many as there are processors. */
static void translator(struct cpu *c)
{
	const struct vm_policy *p = &c->vm->policy;
	uint64_t n = p->code_vcpus, made = atomic_load(&c->vm->ncpus) + 1;
	struct jit_config cfg = { .mode = p->jit_mode, .perf_fd = p->perf_fd };
	int r;

	if (!p->translate)
		return;
	if (!n)
		n = (uint64_t)MAX(sysconf(_SC_NPROCESSORS_ONLN), 1);
	cfg.bytes = jit_share(p->code_bytes, MAX(n, made));
	r = jit_cpu_init(c, &cfg);
	if (r)
		log_warn("softkvm: vCPU %u is interpreted: %s", c->id, strerror(-r));
}

static int vcpu_init_parts(struct vcpu *v, struct vm *vm, unsigned id)
{
	struct cpu *c = &v->cpu;
	bool bsp = id == vm->boot_cpu_id;
	int r;

	c->run = mmap(NULL, 2 * API_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (c->run == MAP_FAILED) {
		c->run = NULL;
		return -ENOMEM;
	}
	cpuid_none(c);
	if (!c->feat)
		return -ENOMEM;
	if ((r = ring_new(vm, &v->ring)) || (r = mmu_cpu_init(c)) || (r = engine_cpu_init(c)) || (r = profile_vcpu(c)))
		return r;
	translator(c);
	v->api->tsc_khz = vm->api->tsc_khz;
	tsc_set_khz(c, vm->api->tsc_khz);
	if (vm->irqchip) {
		/* lapic_reset() keeps the BSP bit. */
		c->msr.apic_base = 0xfee00800 | (bsp ? BIT(8) : 0);
		if ((r = lapic_create(c)))
			return r;
	}
	cpu_reset(c, false);
	tsc_synchronize(c, 0);
	v->api->poll_control = 1;
	v->api->mcg_cap = 0;
	atomic_store(&v->mp_state, !vm->irqchip || bsp ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_UNINITIALIZED);
	return 0;
}

int vcpu_new(struct vm *vm, unsigned long id, struct vcpu **out)
{
	struct vcpu *v = low_alloc(sizeof *v);
	int r;

	if (!v)
		return -ENOMEM;
	pthread_mutex_init(&v->lock, NULL);
	v->cpu.vm = vm;
	v->cpu.vcpu = v;
	v->cpu.id = (unsigned)id;
	v->run_size = RUN_PAGES * API_PAGE;
	v->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	v->api = calloc(1, sizeof *v->api);
	if (v->api)
		v->api->steal_fd = v->api->signal_fd = -1;
	r = v->wake_fd < 0 ? -errno : v->api ? vcpu_init_parts(v, vm, (unsigned)id) : -ENOMEM;
	if (r) {
		vcpu_free(v);
		return r;
	}
	*out = v;
	return 0;
}

void vcpu_free(struct vcpu *v)
{
	struct cpu *c = &v->cpu;

	if (c->lapic)
		lapic_destroy(c);
	jit_cpu_free(c);
	free(c->profile);
	engine_cpu_free(c);
	vec_cpu_free(c);
	mmu_cpu_free(c);
	cpuid_free(c);
	if (c->run)
		munmap(c->run, 2 * API_PAGE);
	if (v->wake_fd >= 0)
		close(v->wake_fd);
	if (v->api && v->api->steal_fd >= 0)
		close(v->api->steal_fd);
	if (v->api && v->api->signal_fd >= 0)
		close(v->api->signal_fd);
	ring_free(c->vm, v->ring);
	free(v->api);
	pthread_mutex_destroy(&v->lock);
	low_free(v, sizeof *v);
}
