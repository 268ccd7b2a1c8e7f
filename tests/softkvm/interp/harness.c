/* See harness.h. HLT ends a run; every event ends a run, too. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "harness.h"
#include "softkvm/bus.h"
#include "softkvm/events.h"
#include "softkvm/irqchip.h"
#include "softkvm/vcpu.h"
#include "softkvm/vec/vec.h"

struct harness h;
static const struct cpu_features feat = { .phys_bits = 40, .f80000001_edx = BIT(26), .f80000001_ecx = BIT(5), .f7_ebx = BIT(3), .amd = true };

static void page_tables(void)
{
	uint64_t *l4 = (uint64_t *)(h.ram + 0x1000), *l3 = (uint64_t *)(h.ram + 0x2000), *l2 = (uint64_t *)(h.ram + 0x3000);
	uint64_t *l1 = (uint64_t *)(h.ram + 0x4000);

	l4[0] = l4[2] = 0x2000 | PTE_P | PTE_W;
	l3[0] = 0x3000 | PTE_P | PTE_W;
	for (unsigned n = 0; n < 512; n++)
		l2[n] = (uint64_t)n << 21 | PTE_P | PTE_W | PTE_PS;
	l2[2] = 0x4000 | PTE_P | PTE_W;         /* 4 MiB: small pages, every second one missing */
	for (unsigned n = 0; n < 512; n += 2)
		l1[n] = (0x400000u + n * 4096u) | PTE_P | PTE_W;

	/* The aliases that are shifted. */
	l4[1] = l4[3] = 0x5000 | PTE_P | PTE_W;
	memcpy(h.ram + 0x5000, l3, 4096);
	memcpy(h.ram + 0x6000, l2, 4096);
	st_le64(h.ram + 0x5000, 0x6000 | PTE_P | PTE_W);
	st_le64(h.ram + 0x6000, 0x7000 | PTE_P | PTE_W);
	for (unsigned n = 1; n < 512; n++)
		st_le64(h.ram + 0x7000 + 8 * n, (n - 1) * 4096u | PTE_P | PTE_W);
}

void harness_mode(unsigned bits)
{
	struct cpu *c = &h.cpu;

	c->cr0 = bits == 16 ? 0 : CR0_PE | (bits == 64 ? CR0_PG | CR0_WP : 0);
	c->cr4 = bits == 64 ? CR4_PAE : 0;
	c->efer = bits == 64 ? EFER_LMA | EFER_LME | EFER_NXE : 0;
	c->cr3 = 0x1000;
	c->code_bits = c->stack_bits = (uint8_t)bits;
	c->flat = bits == 64;
	c->real = bits == 16;
	c->eflags = 0;
	for (unsigned n = 0; n < 6; n++)
		c->seg[n] = (struct seg){ .limit = bits == 16 ? 0xffff : UINT32_MAX, .type = n == SEG_CS ? 11 : 3, .s = 1, .present = 1,
					  .base = bits == 16 ? H_CODE : 0 };
	mmu_flush_all(c);
	mmu_select(c);
}

void harness_compat(void)
{
	struct cpu *c = &h.cpu;

	harness_mode(64);
	c->code_bits = c->stack_bits = 32;
	c->flat = false;
	for (unsigned n = 0; n < 6; n++)
		c->seg[n].db = 1;
}

void harness_start(void)
{
	struct cpu *c = &h.cpu;

	memset(&h, 0, sizeof h);
	pthread_mutex_init(&h.vm.lock, NULL);
	pthread_mutex_init(&h.vm.split_lock, NULL);
	h.run = calloc(1, sizeof *h.run);
	h.ram = mmap(NULL, H_RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	h.vm.client_tells_code = true;
	h.vm.policy.code_bytes = 64 << 20;
	c->vm = &h.vm;
	c->run = h.run;
	c->feat = &feat;
	atomic_store(&h.vm.cpus[0], c);
	atomic_store(&h.vm.ncpus, 1);
	struct kvm_userspace_memory_region r = { 0, 0, 0, H_RAM, (uintptr_t)h.ram };
	if (phys_set_region(&h.vm, &r) || mmu_cpu_init(c) || engine_cpu_init(c))
		abort();
	page_tables();
	harness_mode(64);
}

void harness_stop(void)
{
	engine_cpu_free(&h.cpu);
	mmu_cpu_free(&h.cpu);
	phys_free(&h.vm);
	munmap(h.ram, H_RAM);
	free(h.run);
}

void harness_code(const void *bytes, size_t n)
{
	memcpy(h.ram + H_CODE, bytes, n);
	phys_code_written(&h.vm, H_CODE, n);
}

enum run_result harness_run(void)
{
	h.cpu.halted = false;
	h.cpu.ev.valid = h.got.valid = false;
	h.cpu.rip = h.cpu.real ? 0 : H_CODE + h.alias;
	if (!h.cpu.gpr[R_RSP])
		h.cpu.gpr[R_RSP] = h.cpu.real ? 0x8000 : H_STACK;
	return engine_run(&h.cpu);
}

/* -- what the rest of the engine does ----------------------------------------------------------- */
static void op_hlt(struct cpu *c, const struct insn *i) { c->halted = true; }

bool sys_decode(struct insn *i, const struct decoded *d)
{
	if (d->z.mnemonic != ZYDIS_MNEMONIC_HLT)
		return false;
	i->fn = op_hlt;
	i->flags |= IF_END;
	return true;
}

#ifndef HARNESS_VEC
bool vec_op_build(struct vec_op *op, const struct decoded *d) { return false; }
bool vec_op_unproven(const struct insn *i) { return true; }
bool host_avx512(void) { return false; }
bool host_adx(void) { return false; }
bool host_avx(void) { return false; }
bool host_is_intel(void) { return false; }
uint32_t mxcsr_mask(void) { return 0xffff; }
void x87_exec(struct cpu *c, const struct insn *i) { }
bool vec_decode(struct insn *i, const struct decoded *d) { return false; }
void vec_flush(struct cpu *c) { }
#endif
void cpu_request(struct cpu *c, uint32_t req) { atomic_fetch_or(&c->requests, req); }
bool cpuid_has_isa(const struct cpu *c, int isa) { return true; }

bool event_deliver(struct cpu *c)
{
	h.got = c->ev;
	h.got_rip = c->rip;
	c->ev.valid = false;
	return false;
}
bool event_boundary(struct cpu *c) { return true; }
bool mwait_goes_on(struct cpu *c) { return false; }
/* RF, the one thing that the tests step for, holds to the end of a repeated instruction. */
void event_insn_done(struct cpu *c)
{
	if (!cpu_mid_rep(c))
		c->eflags &= ~(uint64_t)FL_RF;
	c->one_insn = c->eflags & FL_RF;
}

void event_update_one_insn(struct cpu *c) { }
void event_unblocked(struct cpu *c) { }
void lapic_timer_poll(struct cpu *c) { }
void clock_update(struct cpu *c) { }
void vm_park(struct cpu *c) { }
bool vcpu_poll(struct cpu *c)
{
	c->budget = 16384;
	return c->run->immediate_exit || (h.polls_left && !--h.polls_left);
}
void vm_pause_all(struct vm *vm, struct cpu *self) { }
void vm_resume_all(struct vm *vm, struct cpu *self) { }
void vm_request_all(struct vm *vm, uint32_t req, struct cpu *except) { }
bool bus_mmio(struct cpu *c, uint64_t gpa, unsigned len, bool write, void *data) { return false; }
