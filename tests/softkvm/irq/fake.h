/* What the chips need of the rest of the engine, and a VM of a few CPUs. The clock stands until a test moves it. */
#ifndef TESTS_IRQ_FAKE_H
#define TESTS_IRQ_FAKE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include "softkvm/bus.h"
#include "softkvm/irq/internal.h"

static _Atomic uint64_t fake_now = 1000000;

uint64_t mono_ns(void) { return fake_now; }
uint64_t tsc_read(const struct cpu *c) { return fake_now * 2; }
uint64_t tsc_to_mono(const struct cpu *c, uint64_t tsc) { return tsc / 2; }
void cpu_request(struct cpu *c, uint32_t req) { atomic_fetch_or(&c->requests, req); }

static struct vm *fake_vm(unsigned ncpus, bool split)
{
	struct vm *vm = calloc(1, sizeof *vm);

	bus_create(vm);
	if (split)
		irqchip_create_split(vm, 24);
	else
		irqchip_create(vm);
	vm->ring = calloc(1, 4096);
	for (unsigned i = 0; i < ncpus; i++) {
		struct cpu *c = calloc(1, sizeof *c);

		c->id = i;
		c->vm = vm;
		lapic_create(c);
		vm->cpus[i] = c;
		vm->ncpus = i + 1;
	}
	return vm;
}

static void fake_vm_free(struct vm *vm)
{
	irqchip_destroy(vm);
	for (unsigned i = 0; i < vm->ncpus; i++) {
		lapic_destroy(vm->cpus[i]);
		free(vm->cpus[i]);
	}
	bus_destroy(vm);
	free(vm->ring);
	free(vm);
}

#endif
