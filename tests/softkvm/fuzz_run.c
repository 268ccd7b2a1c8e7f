/*
 * Random guests: bytes as code, registers, control registers and tables, in every mode, run for a moment. Nothing they
 * do may crash or hang the engine or touch what is not theirs (ASan, UBSan), and KVM_RUN must leave when it is asked to.
 * Deterministic but for when it leaves: fuzz_run ROUNDS SEED.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>

#include "guest.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

struct input { const uint8_t *p; size_t left; };

static uint64_t take(struct input *in, unsigned n)
{
	uint64_t v = 0;

	n = n < in->left ? n : (unsigned)in->left;
	memcpy(&v, in->p, n);
	in->p += n;
	in->left -= n;
	return v;
}

/* Mostly addresses that mean something. */
static uint64_t value(struct input *in)
{
	switch (take(in, 1) & 7) {
	case 0: return take(in, 1);
	case 1: return take(in, 8);
	case 2: return -take(in, 2);
	case 3: return 0xfee00000 + take(in, 2);
	case 4: return 0x3ff000 + take(in, 2) % 8192;           /* the end of memory */
	default: return take(in, 3) & 0x3fffff;
	}
}

static struct kvm_run *volatile running;
static void leave(int s) { if (running) running->immediate_exit = 1; }

static void random_regs(struct guest *g, struct input *in)
{
	struct kvm_regs r;

	guest_get_regs(g, 0, &r);
	for (unsigned i = 0; i < 16; i++)
		if (take(in, 1) & 3)
			(&r.rax)[i] = value(in);
	r.rflags = (take(in, 4) & 0x3f7dd5) | 2;
	guest_set_regs(g, 0, &r);
}

/* Refused states are fine: the vCPU keeps what it had. */
static void random_sregs(struct guest *g, struct input *in)
{
	struct kvm_sregs s;

	guest_get_sregs(g, 0, &s);
	if (take(in, 1) & 1)
		s.cr4 ^= take(in, 3) & take(in, 3);
	if (take(in, 1) & 1)
		s.cr0 ^= take(in, 4) & take(in, 4) & 0x60050030;
	if (!(take(in, 1) & 7))
		s.cr3 = value(in);
	for (struct kvm_segment *p = &s.cs; p <= &s.ss; p++)
		if (!(take(in, 1) & 3)) {
			p->base = value(in);
			p->limit = (uint32_t)value(in);
			p->type = take(in, 1) & 15;
		}
	gioctl(&g->vcpu[0], KVM_SET_SREGS, &s, NULL);
}

static void debug(struct guest *g, struct input *in)
{
	struct kvm_guest_debug d = { .control = KVM_GUESTDBG_ENABLE };
	uint64_t what = take(in, 1);

	if (what & 0xf0)
		return;
	d.control |= what & 1 ? KVM_GUESTDBG_SINGLESTEP : 0;
	d.control |= what & 2 ? KVM_GUESTDBG_USE_HW_BP : 0;
	d.control |= what & 4 ? KVM_GUESTDBG_USE_SW_BP : 0;
	for (unsigned i = 0; i < 4; i++)
		d.arch.debugreg[i] = value(in);
	d.arch.debugreg[7] = take(in, 4);
	gioctl(&g->vcpu[0], KVM_SET_GUEST_DEBUG, &d, NULL);
}

static void answer(struct kvm_run *run, struct input *in)
{
	uint64_t v = take(in, 8);

	if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write)
		memcpy(run->mmio.data, &v, 8);
	else if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_IN)
		memcpy((uint8_t *)run + run->io.data_offset, &v, run->io.size);
}

static void run_some(struct guest *g, struct input *in)
{
	running = g->run[0];
	for (unsigned n = 0; n < 20; n++) {
		setitimer(ITIMER_REAL, &(struct itimerval){ .it_value.tv_usec = 2000 }, NULL);
		int r = guest_run(g, 0);

		if (r == -EINTR)
			break;
		if (r == KVM_EXIT_MMIO || r == KVM_EXIT_IO || r == KVM_EXIT_DEBUG) {
			answer(g->run[0], in);
			continue;
		}
		break;
	}
	setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
	running = NULL;
	g->run[0]->immediate_exit = 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct input in = { data, len };
	uint64_t how = take(&in, 1);
	struct guest g;
	size_t n;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = how & 1, .log_dirty = how & 2 });
	for (unsigned i = 0; i < 0x3000; i += 8)        /* whatever is not code: small numbers, which look like table entries */
		memcpy(g.mem + 0x20000 + i, &(uint64_t){ (i << 9 & 0x3ff000) | (data[i % len] & 0xff) }, 8);
	switch (how >> 2 & 3) {
	case 0: guest_real16(&g, 0, 0x1000, 0); break;
	case 1: guest_prot32(&g, 0, 0x10000); break;
	default: guest_long64(&g, 0, 0x10000);
	}
	for (unsigned v = 0; v < 256; v++)
		guest_gate(&g, how >> 2 & 2 ? 64 : 32, v, v & 1 ? 0x10000 + v * 2 : 0x10000, v & 3);
	random_regs(&g, &in);
	if (how & 0x10)
		random_sregs(&g, &in);
	debug(&g, &in);
	for (unsigned pass = 0; pass < 4 && in.left; pass++) {
		n = in.left < 256 ? in.left : 256;
		guest_load(&g, 0x10000, in.p, n);
		in.p += n;
		in.left -= n;
		run_some(&g, &in);
	}
	guest_destroy(&g);
	return 0;
}

#ifndef LIBFUZZER
int main(int argc, char **argv)
{
	unsigned rounds = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : 300;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	uint8_t buf[2048];

	sigaction(SIGALRM, &(struct sigaction){ .sa_handler = leave }, NULL);
	for (unsigned r = 0; r < rounds; r++) {
		uint64_t x = (seed + r) * 0x9e3779b97f4a7c15ull | 1;

		for (size_t i = 0; i < sizeof buf; i++) {
			x ^= x << 13; x ^= x >> 7; x ^= x << 17;
			buf[i] = (uint8_t)(x >> 24);
		}
		if (getenv("FUZZ_VERBOSE"))
			fprintf(stderr, "seed %llu\n", (unsigned long long)(seed + r));
		LLVMFuzzerTestOneInput(buf, sizeof buf);
	}
	return 0;
}
#endif
