/*
 * Runs one freestanding guest image on softkvm and, where that exists and can execute it, on /dev/kvm. The guest's own checks
 * (rt.h) are the manuals'; on /dev/kvm the same checks run and the results must agree.
 *
 *	runner SCENE IMAGE
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "guest.h"

#define IMAGE_GPA 0x100000
#define REPORT_GPA 0x200000
#define PARAM_GPA 0x20f000
#define REPORT_MAX 64
#define DEVICE_GPA 0xd0000000u          /* one page of memory behind MMIO exits */
#define DEVICE_PORT 0x5000              /* and 256 bytes of it behind ports */

struct report {
	uint32_t magic, checks, failed, n, last_line, pad;
	struct { uint32_t line, tag; uint64_t got, want; } e[REPORT_MAX];
};

struct scene {
	const char *name;
	unsigned bits, nvcpus;
	bool ring3, la57, irqchip, debug;
	uint64_t param;
	int end;                /* exit that ends it: IO (GUEST_DONE_PORT) or SHUTDOWN */
	const char *kvm_skip;   /* why /dev/kvm is not asked */
};

static const struct scene scenes[] = {
	{ .name = "exc64", .ring3 = true, .bits = 64 },
	{ .name = "exc64-triple", .ring3 = true, .bits = 64, .param = 1, .end = KVM_EXIT_SHUTDOWN },
	{ .name = "paging4", .ring3 = true, .bits = 64 },
	{ .name = "paging5", .ring3 = true, .bits = 64, .la57 = true },
	{ .name = "paging32", .ring3 = true, .bits = 32 },
	{ .name = "exc32", .ring3 = true, .bits = 32 },
	{ .name = "mmio", .bits = 64 },
	{ .name = "dbg64", .bits = 64, .debug = true },
	{ .name = "chips", .bits = 64, .irqchip = true },
	{ .name = "smp", .bits = 64, .irqchip = true, .nvcpus = 4 },
};

struct run {
	struct guest g;
	const struct scene *s;
	unsigned v;
	uint8_t *device;
	int fd, resample;       /* irqfd of GSI 13, with its resample descriptor */
	pthread_t thread;
	bool over, hung;
	int end;                /* exit reason, or -errno */
	uint64_t info;
};

/* -- a device: memory behind MMIO and ports ---------------------------------------------------- */
static void serve_mmio(struct run *r, struct kvm_run *k)
{
	uint64_t off = k->mmio.phys_addr - DEVICE_GPA;

	if (off + k->mmio.len > 8192)
		fail_msg("MMIO at %#llx", (unsigned long long)k->mmio.phys_addr);
	if (k->mmio.is_write)
		memcpy(r->device + off, k->mmio.data, k->mmio.len);
	else
		memcpy(k->mmio.data, r->device + off, k->mmio.len);
}

/* Lines, messages and NMIs that a guest orders (rt.h). */
enum { ORDER_LINE = 0x5200, ORDER_MSI_DATA = 0x5204, ORDER_MSI = 0x5208, ORDER_NMI = 0x520c, ORDER_FD = 0x5210, ORDER_ACKS = 0x5214 };

static void order(struct run *r, uint16_t port, uint32_t v)
{
	static _Thread_local uint32_t data;
	uint64_t one = 1;

	if (port == ORDER_LINE)
		gioctl(&r->g.vm, KVM_IRQ_LINE, &(struct kvm_irq_level){ .irq = v & 0xffff, .level = v >> 16 }, NULL);
	else if (port == ORDER_MSI_DATA)
		data = v;
	else if (port == ORDER_MSI)
		gioctl(&r->g.vm, KVM_SIGNAL_MSI, &(struct kvm_msi){ .address_lo = v, .data = data }, NULL);
	else if (port == ORDER_NMI)
		gioctl(&r->g.vcpu[v], KVM_NMI, NULL, NULL);
	else if (port == ORDER_FD && write(r->fd, &one, 8) != 8)
		fail_msg("irqfd");
}

static uint32_t acks(struct run *r)
{
	uint64_t n = 0;

	return read(r->resample, &n, 8) == 8 ? (uint32_t)n : 0;
}

/* Port P is byte P of the device, wide accesses too; port DEVICE_PORT + 0xff counts up. */
static void serve_io(struct run *r, struct kvm_run *k)
{
	uint8_t *p = (uint8_t *)k + k->io.data_offset;
	unsigned off = k->io.port - DEVICE_PORT;

	if (k->io.port >= ORDER_LINE && k->io.port <= ORDER_ACKS && k->io.size == 4) {
		uint32_t v;

		memcpy(&v, p, 4);
		if (k->io.direction == KVM_EXIT_IO_OUT)
			order(r, k->io.port, v);
		v = k->io.port == ORDER_ACKS ? acks(r) : 0;
		if (k->io.direction == KVM_EXIT_IO_IN)
			memcpy(p, &v, 4);
		return;
	}
	for (uint32_t i = 0; i < k->io.count; i++, p += k->io.size) {
		if (off >= 256) {
			if (k->io.direction == KVM_EXIT_IO_IN)
				memset(p, 0xff, k->io.size);
		} else if (k->io.direction == KVM_EXIT_IO_OUT) {
			memcpy(r->device + 4096 + off, p, k->io.size);
			r->device[4096 + 0x100]++;
		} else {
			if (off == 0x80)
				r->device[4096 + off]++;
			memcpy(p, r->device + 4096 + off, k->io.size);
		}
	}
}

static bool is_done(const struct run *r, const struct kvm_run *k)
{
	return k->io.direction == KVM_EXIT_IO_OUT && k->io.port == GUEST_DONE_PORT;
}

static void run_vcpu(struct run *r)
{
	struct kvm_run *k = r->g.run[r->v];

	for (;;) {
		r->end = guest_run(&r->g, r->v);
		if (r->end == KVM_EXIT_MMIO)
			serve_mmio(r, k);
		else if (r->end == KVM_EXIT_IO && !is_done(r, k))
			serve_io(r, k);
		else if (r->end == -EINTR || r->end == -EAGAIN) {
			if (__atomic_load_n(&k->immediate_exit, __ATOMIC_RELAXED))
				return;
		} else {
			break;
		}
	}
	if (r->end == KVM_EXIT_INTERNAL_ERROR)
		r->info = k->internal.suberror;
}

struct ap { struct run *main; unsigned v; pthread_t t; };
static void *ap_thread(void *opaque)
{
	struct ap *a = opaque;
	struct run r = *a->main;

	r.v = a->v;
	run_vcpu(&r);
	return NULL;
}

static void nothing(int s) { }

/* A guest that waits for ever for what its provider does not do. */
static void *watchdog(void *opaque)
{
	struct run *r = opaque;
	const char *limit = getenv("GUEST_SECONDS");
	int seconds = limit ? atoi(limit) : r->g.prov == GUEST_KVM ? 20 : 90;

	for (int i = 0; i < 10 * seconds && !__atomic_load_n(&r->over, __ATOMIC_RELAXED); i++)
		usleep(100000);
	while (!__atomic_load_n(&r->over, __ATOMIC_RELAXED)) {
		r->hung = true;
		__atomic_store_n(&r->g.run[0]->immediate_exit, 1, __ATOMIC_RELAXED);
		pthread_kill(r->thread, SIGUSR1);
		usleep(10000);
	}
	return NULL;
}

static void run_all(struct run *r)
{
	pthread_t dog;

	struct ap ap[GUEST_MAX_VCPUS];
	unsigned n = r->g.nvcpus;

	signal(SIGUSR1, nothing);
	r->thread = pthread_self();             /* before the others copy it */
	for (unsigned v = 1; v < n; v++) {
		ap[v] = (struct ap){ .main = r, .v = v };
		pthread_create(&ap[v].t, NULL, ap_thread, &ap[v]);
	}
	pthread_create(&dog, NULL, watchdog, r);
	run_vcpu(r);
	__atomic_store_n(&r->over, true, __ATOMIC_RELAXED);
	pthread_join(dog, NULL);
	for (unsigned v = 1; v < n; v++) {
		__atomic_store_n(&r->g.run[v]->immediate_exit, 1, __ATOMIC_RELAXED);
		pthread_kill(ap[v].t, SIGUSR1);
	}
	for (unsigned v = 1; v < n; v++)
		pthread_join(ap[v].t, NULL);
}

/* -- set-up ------------------------------------------------------------------------------------ */
static void load_image(struct guest *g, const char *path)
{
	FILE *f = fopen(path, "rb");
	size_t n;

	if (!f)
		fail_msg("%s: %s", path, strerror(errno));
	n = fread(g->mem + IMAGE_GPA, 1, REPORT_GPA - IMAGE_GPA, f);
	fclose(f);
	if (!n || n == REPORT_GPA - IMAGE_GPA)
		fail_msg("%s: size", path);
}

static bool kvm_has_la57(void)
{
	struct { struct kvm_cpuid2 h; struct kvm_cpuid_entry2 e[256]; } *c = calloc(1, sizeof *c);
	struct gfile f;
	bool has = false;

	c->h.nent = 256;
	if (!gopen(&f, GUEST_KVM)) {
		gioctl(&f, KVM_GET_SUPPORTED_CPUID, c, NULL);
		gclose(&f);
	}
	for (unsigned i = 0; i < c->h.nent; i++)
		has |= c->e[i].function == 7 && !c->e[i].index && (c->e[i].ecx >> 16 & 1);
	free(c);
	return has;
}

/* A fifth level on top of guest_long64()'s tables. */
static void use_la57(struct guest *g)
{
	struct kvm_sregs s;
	uint64_t e;

	guest_get_sregs(g, 0, &s);
	e = s.cr3 | 7;
	memcpy(g->mem + 0x8000, &e, 8);
	s.cr3 = 0x8000;
	s.cr4 |= 1 << 12;
	guest_set_sregs(g, 0, &s);
}

static void play(struct run *r, const struct scene *s, const char *image, enum guest_prov p)
{
	memset(r, 0, sizeof *r);
	r->s = s;
	r->device = calloc(1, 4096 + 8192);
	guest_create(&r->g, &(struct guest_cfg){ .prov = p, .nvcpus = s->nvcpus, .mem_size = 16 << 20, .irqchip = s->irqchip,
						 .pit = s->irqchip });
	r->fd = eventfd(0, EFD_CLOEXEC);
	r->resample = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (s->irqchip && gioctl(&r->g.vm, KVM_IRQFD, &(struct kvm_irqfd){ .fd = (uint32_t)r->fd, .gsi = 13,
		.flags = KVM_IRQFD_FLAG_RESAMPLE, .resamplefd = (uint32_t)r->resample }, NULL))
		fail_msg("KVM_IRQFD");
	load_image(&r->g, image);
	memcpy(r->g.mem + PARAM_GPA, &s->param, 8);
	r->g.mem[PARAM_GPA + 8] = p == GUEST_SOFT;
	if (s->bits == 32)
		guest_prot32(&r->g, 0, IMAGE_GPA);
	else
		guest_long64(&r->g, 0, IMAGE_GPA);
	if (s->la57)
		use_la57(&r->g);
	run_all(r);
}

static void close_run(struct run *r)
{
	guest_destroy(&r->g);
	close(r->fd);
	close(r->resample);
	free(r->device);
}

static const struct report *report_of(const struct run *r)
{
	return (const void *)(r->g.mem + REPORT_GPA);
}

/* Failures on this provider. */
static unsigned tell(const struct run *r, const char *who)
{
	const struct report *t = report_of(r);
	struct kvm_regs regs;
	int end = r->s->end ? r->s->end : KVM_EXIT_IO;

	printf("%s on %s: %u checks, %u failed\n", r->s->name, who, t->checks, t->failed);
	for (uint32_t i = 0; i < t->n && i < REPORT_MAX; i++)
		printf("  line %u tag %#x: got %#llx, want %#llx\n", t->e[i].line, t->e[i].tag, (unsigned long long)t->e[i].got,
		       (unsigned long long)t->e[i].want);
	if (r->end == end && t->checks)
		return t->failed;
	guest_get_regs((struct guest *)&r->g, 0, &regs);
	printf("  ended with %d (%llu), wanted %d; after line %u; rip %#llx\n", r->end, (unsigned long long)r->info, end,
	       t->last_line, (unsigned long long)regs.rip);
	return t->failed + 1;
}

/* What the guest needs that a /dev/kvm which is itself a program does not give. */
static const char *lacks(const struct scene *s)
{
	if (s->ring3)
		return "it is an emulation whose ring 3 has no gates";
	if (s->irqchip)
		return "it is an emulation whose chips do not interrupt the guest";
	return s->debug ? "it is an emulation without breakpoints" : NULL;
}

static unsigned on_kvm(const struct scene *s, const char *image, const struct run *soft)
{
	const struct report *a = report_of(soft), *b;
	struct run r;
	unsigned bad;

	const char *skip = !guest_have(GUEST_KVM) ? "there is none" : s->la57 && !kvm_has_la57() ? "it has no 5-level paging" :
		s->kvm_skip ? s->kvm_skip : !lacks(s) || !guest_kvm_is_emulation() ? NULL : lacks(s);

	if (skip) {
		printf("%s on /dev/kvm: skipped: %s\n", s->name, skip);
		return 0;
	}
	play(&r, s, image, GUEST_KVM);
	b = report_of(&r);
	if ((r.end == KVM_EXIT_INTERNAL_ERROR || r.hung) && !b->failed) {
		printf("%s on /dev/kvm: skipped after %u checks alike (line %u): %s\n", s->name, b->checks, b->last_line,
		       r.hung ? "what the guest waits for does not come" : "it cannot execute an instruction");
		close_run(&r);
		return 0;
	}
	bad = tell(&r, "/dev/kvm");
	if (a->checks != b->checks) {
		printf("%s: %u checks on softkvm, %u on /dev/kvm\n", s->name, a->checks, b->checks);
		bad++;
	}
	close_run(&r);
	return bad;
}

int main(int argc, char **argv)
{
	const struct scene *s = NULL;
	struct run r;
	unsigned bad;

	for (size_t i = 0; argc > 2 && i < sizeof scenes / sizeof *scenes; i++)
		if (!strcmp(scenes[i].name, argv[1]))
			s = &scenes[i];
	if (!s) {
		fprintf(stderr, "usage: %s SCENE IMAGE\n", argv[0]);
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	play(&r, s, argv[2], GUEST_SOFT);
	bad = tell(&r, "softkvm");
	bad += on_kvm(s, argv[2], &r);
	close_run(&r);
	return bad ? 1 : 0;
}
