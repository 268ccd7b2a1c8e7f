/* Four CPUs send each other IPIs while a device raises a level line: nothing is lost, and TSan finds nothing. */
#include "fake.h"

#include <stdio.h>

enum { CPUS = 4, ROUNDS = 2000 };
static struct vm *vm;
static _Atomic unsigned sent[CPUS], got[CPUS], level_got;
static _Atomic bool stop;

static void drain(struct cpu *c)
{
	int v;

	if (!atomic_exchange(&c->requests, 0))
		return;
	lapic_timer_poll(c);
	while ((v = irqchip_pending(c)) >= 0) {
		v = irqchip_ack(c);
		if (v == 0x31) {
			irqchip_line(vm, 20, 0, 0);
			level_got++;
		} else {
			got[c->id]++;
		}
		lapic_msr_write(c, 0x80b, 0);
	}
}

static void *cpu_main(void *arg)
{
	struct cpu *c = arg;

	/* One vector per sender, waited for before it is sent again: each must arrive. */
	for (unsigned i = 0; i < ROUNDS; i++) {
		unsigned to = (c->id + 1 + i % (CPUS - 1)) % CPUS;
		struct lapic *l = vm->cpus[to]->lapic;
		unsigned v = 0x40 + c->id;

		while (atomic_load(&l->r[AR_IRR + (v >> 5)]) >> (v & 31) & 1)
			drain(c);
		sent[to]++;
		lapic_msr_write(c, 0x830, i & 1 ? (uint64_t)to << 32 | v : (uint64_t)1 << (32 + to) | 0x800 | v);
		drain(c);
	}
	while (!stop) {
		drain(c);
		usleep(50);
	}
	drain(c);
	return NULL;
}

int main(void)
{
	pthread_t t[CPUS];
	bool done = false;
	uint32_t v;
	int bad = 0;

	vm = fake_vm(CPUS, false);
	for (unsigned i = 0; i < CPUS; i++) {
		lapic_set_base(vm->cpus[i], 0xfee00c00, false);
		lapic_msr_write(vm->cpus[i], 0x80f, 0x1ff);
	}
	v = 0x10 + 40; bus_mmio(vm->cpus[0], 0xfec00000, 4, true, &v);
	v = 0x8031; bus_mmio(vm->cpus[0], 0xfec00010, 4, true, &v);
	for (unsigned i = 0; i < CPUS; i++)
		pthread_create(&t[i], NULL, cpu_main, vm->cpus[i]);
	for (int i = 0; i < 500; i++) {
		irqchip_line(vm, 20, 1, 0);
		usleep(20);
	}
	for (int i = 0; i < 20000 && !done; i++) {
		done = true;
		for (unsigned k = 0; k < CPUS; k++)
			done &= got[k] == sent[k];
		done &= sent[0] + sent[1] + sent[2] + sent[3] == CPUS * ROUNDS;
		usleep(1000);
	}
	stop = true;
	for (unsigned i = 0; i < CPUS; i++)
		pthread_join(t[i], NULL);
	for (unsigned i = 0; i < CPUS; i++) {
		printf("cpu %u: sent %u got %u\n", i, sent[i], got[i]);
		bad |= sent[i] != got[i];
	}
	printf("level %u\n", level_got);
	bad |= !level_got;
	fake_vm_free(vm);
	return bad;
}
