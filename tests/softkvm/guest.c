/* Tiny guests: see guest.h. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define GDT 0x1000
#define TSS 0x1200
#define IDT 0x2000
#define PML4 0x3000

int gopen(struct gfile *f, enum guest_prov p)
{
	f->fd = -1;
	f->f = NULL;
	if (p == GUEST_SOFT)
		f->f = softkvm_open();
	else
		f->fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	return f->f || f->fd >= 0 ? 0 : -errno;
}

void gclose(struct gfile *f)
{
	if (f->f)
		softkvm_close(f->f);
	else if (f->fd >= 0)
		close(f->fd);
	f->f = NULL;
	f->fd = -1;
}

bool guest_have(enum guest_prov p)
{
	struct gfile f;

	if (gopen(&f, p))
		return false;
	gclose(&f);
	return true;
}

static bool makes_file(unsigned long req)
{
	return req == KVM_CREATE_VM || req == KVM_CREATE_VCPU || req == KVM_GET_STATS_FD;
}

long gioctl(struct gfile *f, unsigned long req, const void *arg, struct gfile *made)
{
	struct gfile tmp = { -1, NULL };
	long r;

	if (f->f)
		r = softkvm_ioctl(f->f, req, (uintptr_t)arg, &tmp.f);
	else
		r = ioctl(f->fd, req, arg);
	if (r < 0)
		return -errno;
	if (makes_file(req)) {
		if (!f->f)
			tmp.fd = (int)r;
		if (made)
			*made = tmp;
		else
			gclose(&tmp);
		return 0;
	}
	return r;
}

#define MUST(x) do { long r_ = (x); if (r_ < 0) fail_msg("%s: %s", #x, strerror((int)-r_)); } while (0)

static void set_cpuid(struct guest *g, unsigned v)
{
	struct { struct kvm_cpuid2 h; struct kvm_cpuid_entry2 e[256]; } *c = calloc(1, sizeof *c);

	c->h.nent = 256;
	MUST(gioctl(&g->sys, KVM_GET_SUPPORTED_CPUID, c, NULL));
	for (unsigned i = 0; i < c->h.nent; i++) {
		if (c->e[i].function == 1) {
			c->e[i].ebx = (c->e[i].ebx & 0xffffff) | v << 24;
			c->e[i].ecx |= 1u << 24;        /* the deadline timer, which KVM leaves to the client to add */
		}
		if (c->e[i].function == 0xb || c->e[i].function == 0x1f)
			c->e[i].edx = v;
	}
	MUST(gioctl(&g->vcpu[v], KVM_SET_CPUID2, c, NULL));
	free(c);
}

static void add_vcpu(struct guest *g, unsigned v, bool cpuid)
{
	MUST(gioctl(&g->vm, KVM_CREATE_VCPU, (void *)(uintptr_t)v, &g->vcpu[v]));
	if (g->prov == GUEST_SOFT)
		g->run[v] = softkvm_mmap(g->vcpu[v].f, g->run_size, 0);
	else
		g->run[v] = mmap(NULL, g->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, g->vcpu[v].fd, 0);
	if (g->run[v] == MAP_FAILED)
		fail_msg("mmap of vCPU: %s", strerror(errno));
	if (cpuid)
		set_cpuid(g, v);
}

void guest_create(struct guest *g, const struct guest_cfg *cfg)
{
	memset(g, 0, sizeof *g);
	g->prov = cfg->prov;
	g->nvcpus = cfg->nvcpus ? cfg->nvcpus : 1;
	g->mem_size = cfg->mem_size ? cfg->mem_size : 4 << 20;
	for (unsigned v = 0; v < GUEST_MAX_VCPUS; v++)
		g->vcpu[v].fd = -1;
	MUST(gopen(&g->sys, cfg->prov));
	MUST(gioctl(&g->sys, KVM_CREATE_VM, NULL, &g->vm));
	MUST(gioctl_val(&g->vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	if (cfg->irqchip)
		MUST(gioctl(&g->vm, KVM_CREATE_IRQCHIP, NULL, NULL));
	if (cfg->pit)
		MUST(gioctl(&g->vm, KVM_CREATE_PIT2, &(struct kvm_pit_config){ .flags = KVM_PIT_SPEAKER_DUMMY }, NULL));
	if (cfg->split_routes)
		MUST(gioctl(&g->vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){
			.cap = KVM_CAP_SPLIT_IRQCHIP, .args = { cfg->split_routes } }, NULL));
	if (cfg->code_bytes)
		MUST(gioctl(&g->vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){
			.cap = SOFTKVM_CAP_TRANSLATE, .args = { SOFTKVM_TRANSLATE_AS_IS, cfg->code_bytes, g->nvcpus } }, NULL));
	g->guard = cfg->guard;
	g->mem = mmap(NULL, g->mem_size + 2 * g->guard, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (g->mem == MAP_FAILED)
		fail_msg("mmap of guest memory");
	g->mem += g->guard;
	MUST(gioctl(&g->vm, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region){
		.memory_size = g->mem_size, .userspace_addr = (uintptr_t)g->mem,
		.flags = cfg->log_dirty ? KVM_MEM_LOG_DIRTY_PAGES : 0 }, NULL));
	g->run_size = (size_t)gioctl_val(&g->sys, KVM_GET_VCPU_MMAP_SIZE, 0);
	for (unsigned v = 0; v < g->nvcpus; v++)
		add_vcpu(g, v, !cfg->no_cpuid);
}

void guest_add_vcpu(struct guest *g)
{
	add_vcpu(g, g->nvcpus, true);
	g->nvcpus++;
}

void guest_destroy(struct guest *g)
{
	for (unsigned v = 0; v < g->nvcpus; v++) {
		if (g->prov == GUEST_SOFT)
			softkvm_munmap(g->vcpu[v].f, g->run[v], g->run_size);
		else
			munmap(g->run[v], g->run_size);
		gclose(&g->vcpu[v]);
	}
	gclose(&g->vm);
	gclose(&g->sys);
	munmap(g->mem - g->guard, g->mem_size + 2 * g->guard);
}

void guest_load(struct guest *g, uint64_t gpa, const void *bytes, size_t len)
{
	if (gpa + len > g->mem_size)
		fail_msg("guest_load outside memory");
	memcpy(g->mem + gpa, bytes, len);
	if (g->prov == GUEST_SOFT)
		softkvm_code_written(g->vm.f, gpa, len);
}

static void put(struct guest *g, uint64_t gpa, uint64_t v)
{
	memcpy(g->mem + gpa, &v, 8);
}

static void tables(struct guest *g, unsigned bits)
{
	put(g, GDT + 0x08, 0x00cf9b000000ffff);
	put(g, GDT + 0x10, 0x00cf93000000ffff);
	put(g, GDT + 0x18, 0x00af9b000000ffff);
	put(g, GDT + 0x20, 0x00affb000000ffff);
	put(g, GDT + 0x28, 0x00cff3000000ffff);
	put(g, GDT + 0x30, 0x0000890000000067 | (uint64_t)TSS << 16);
	put(g, GDT + 0x38, 0);
	put(g, GDT + 0x40, 0x00cffb000000ffff);
	memset(g->mem + TSS, 0, 0x68);
	if (bits == 64) {
		put(g, TSS + 4, 0x7000);
	} else {
		put(g, TSS + 4, 0x10ull << 32 | 0x7000);
	}
}

static struct kvm_segment flat(uint16_t sel, uint8_t type, unsigned dpl, unsigned bits)
{
	return (struct kvm_segment){ .limit = 0xffffffff, .selector = sel, .type = type, .present = 1, .dpl = dpl,
		.s = 1, .g = 1, .db = bits == 32 || !(type & 8), .l = bits == 64 && (type & 8) };
}

static void set_flat(struct guest *g, unsigned v, struct kvm_sregs *s, unsigned bits)
{
	tables(g, bits);
	s->cs = flat(bits == 64 ? 0x18 : 0x08, 11, 0, bits);
	s->ds = s->es = s->fs = s->gs = s->ss = flat(0x10, 3, 0, bits);
	s->tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = 0x30, .type = 11, .present = 1 };
	s->ldt = (struct kvm_segment){ .unusable = 1 };
	s->gdt = (struct kvm_dtable){ .base = GDT, .limit = 0x47 };
	s->idt = (struct kvm_dtable){ .base = IDT, .limit = bits == 64 ? 0xfff : 0x7ff };
	(void)v;
}

static void start(struct guest *g, unsigned v, uint64_t rip, uint64_t rsp)
{
	guest_set_regs(g, v, &(struct kvm_regs){ .rip = rip, .rsp = rsp, .rflags = 2 });
}

void guest_real16(struct guest *g, unsigned v, uint16_t cs, uint16_t ip)
{
	struct kvm_sregs s;

	guest_get_sregs(g, v, &s);
	s.cs.selector = cs;
	s.cs.base = (uint64_t)cs << 4;
	s.ds.selector = s.es.selector = s.fs.selector = s.gs.selector = s.ss.selector = 0;
	s.ds.base = s.es.base = s.fs.base = s.gs.base = s.ss.base = 0;
	guest_set_sregs(g, v, &s);
	start(g, v, ip, 0x8000 - v * 0x100);
}

void guest_prot32(struct guest *g, unsigned v, uint32_t eip)
{
	struct kvm_sregs s;

	guest_get_sregs(g, v, &s);
	set_flat(g, v, &s, 32);
	s.cr0 = 0x31;
	s.cr4 = 0x600;
	s.efer = 0;
	guest_set_sregs(g, v, &s);
	start(g, v, eip, 0x8000 - v * 0x100);
}

void guest_long64(struct guest *g, unsigned v, uint64_t rip)
{
	struct kvm_sregs s;

	put(g, PML4, (PML4 + 0x1000) | 7);
	put(g, PML4 + 0x1000, (PML4 + 0x2000) | 7);
	for (unsigned i = 0; i < 512; i++)
		put(g, PML4 + 0x2000 + i * 8, (uint64_t)i << 21 | 0x87);
	guest_get_sregs(g, v, &s);
	set_flat(g, v, &s, 64);
	s.cr0 = 0x80010031;
	s.cr3 = PML4;
	s.cr4 = 0x620;
	s.efer = 0xd01;
	guest_set_sregs(g, v, &s);
	start(g, v, rip, 0x8000 - v * 0x100);
}

void guest_gate(struct guest *g, unsigned bits, unsigned vector, uint64_t handler, unsigned dpl)
{
	uint64_t lo = (handler & 0xffff) | (handler & 0xffff0000) << 32 | (uint64_t)(0x8e00 | dpl << 13) << 32;

	if (bits == 64) {
		put(g, IDT + vector * 16, lo | 0x18 << 16);
		put(g, IDT + vector * 16 + 8, handler >> 32);
	} else {
		put(g, IDT + vector * 8, lo | 0x08 << 16);
	}
}

void guest_get_regs(struct guest *g, unsigned v, struct kvm_regs *r) { MUST(gioctl(&g->vcpu[v], KVM_GET_REGS, r, NULL)); }
void guest_set_regs(struct guest *g, unsigned v, const struct kvm_regs *r) { MUST(gioctl(&g->vcpu[v], KVM_SET_REGS, r, NULL)); }
void guest_get_sregs(struct guest *g, unsigned v, struct kvm_sregs *s) { MUST(gioctl(&g->vcpu[v], KVM_GET_SREGS, s, NULL)); }
void guest_set_sregs(struct guest *g, unsigned v, const struct kvm_sregs *s) { MUST(gioctl(&g->vcpu[v], KVM_SET_SREGS, s, NULL)); }

struct one_msr { struct kvm_msrs h; struct kvm_msr_entry e; };

int guest_get_msr(struct guest *g, unsigned v, uint32_t index, uint64_t *val)
{
	struct one_msr m = { .h.nmsrs = 1, .e.index = index };
	long r = gioctl(&g->vcpu[v], KVM_GET_MSRS, &m, NULL);

	MUST(r);
	*val = m.e.data;
	return (int)r;
}

int guest_set_msr(struct guest *g, unsigned v, uint32_t index, uint64_t val)
{
	struct one_msr m = { .h.nmsrs = 1, .e.index = index, .e.data = val };
	long r = gioctl(&g->vcpu[v], KVM_SET_MSRS, &m, NULL);

	MUST(r);
	return (int)r;
}

int guest_run(struct guest *g, unsigned v)
{
	long r = gioctl(&g->vcpu[v], KVM_RUN, NULL, NULL);

	return r < 0 ? (int)r : (int)g->run[v]->exit_reason;
}

static void record(struct guest *g, unsigned v, struct guest_log *log)
{
	struct kvm_run *run = g->run[v];
	struct guest_exit *e = &log->e[log->n++];
	uint64_t in;

	*e = (struct guest_exit){ .reason = run->exit_reason };
	if (e->reason == KVM_EXIT_IO) {
		uint8_t *p = (uint8_t *)run + run->io.data_offset;

		e->out = run->io.direction == KVM_EXIT_IO_OUT;
		e->size = run->io.size;
		e->count = run->io.count;
		e->addr = run->io.port;
		if (!e->out) {
			in = log->input ? log->input(g, e, log->opaque) : ~0ull;
			for (unsigned i = 0; i < e->count; i++)
				memcpy(p + i * e->size, &in, e->size);
		}
		memcpy(&e->data, p, e->size);
	} else if (e->reason == KVM_EXIT_MMIO) {
		e->out = run->mmio.is_write;
		e->size = (uint8_t)run->mmio.len;
		e->count = 1;
		e->addr = run->mmio.phys_addr;
		if (!e->out) {
			in = log->input ? log->input(g, e, log->opaque) : ~0ull;
			memcpy(run->mmio.data, &in, 8);
		}
		memcpy(&e->data, run->mmio.data, e->size > 8 ? 8 : e->size);
	} else if (e->reason == KVM_EXIT_INTERNAL_ERROR) {
		e->addr = run->internal.suberror;
	}
}

int guest_run_log(struct guest *g, unsigned v, struct guest_log *log)
{
	while (log->n < sizeof log->e / sizeof log->e[0]) {
		int r = guest_run(g, v);
		const struct guest_exit *e;

		if (r < 0)
			return r;
		record(g, v, log);
		e = &log->e[log->n - 1];
		if (r != KVM_EXIT_IO && r != KVM_EXIT_MMIO)
			return r;
		if (r == KVM_EXIT_IO && e->out && e->addr == GUEST_DONE_PORT)
			return r;
	}
	return -E2BIG;
}

void guest_log_text(const struct guest_log *log, uint16_t port, char *buf, size_t size)
{
	size_t n = 0;

	for (unsigned i = 0; i < log->n && n + 1 < size; i++)
		if (log->e[i].reason == KVM_EXIT_IO && log->e[i].out && log->e[i].addr == port)
			buf[n++] = (char)log->e[i].data;
	buf[n] = 0;
}

static void print_exit(const char *who, const struct guest_exit *e)
{
	print_message("%s: reason %u %s size %u count %u addr %#llx data %#llx\n", who, e->reason, e->out ? "out" : "in",
		      e->size, e->count, (unsigned long long)e->addr, (unsigned long long)e->data);
}

bool guest_log_equal(const struct guest_log *a, const struct guest_log *b)
{
	for (unsigned i = 0; i < a->n && i < b->n; i++) {
		const struct guest_exit *x = &a->e[i], *y = &b->e[i];

		if (x->reason != y->reason || x->out != y->out || x->size != y->size || x->count != y->count ||
		    x->addr != y->addr || x->data != y->data) {
			print_message("exit %u differs\n", i);
			print_exit("first ", x);
			print_exit("second", y);
			return false;
		}
	}
	if (a->n != b->n)
		print_message("%u exits against %u\n", a->n, b->n);
	return a->n == b->n;
}

static int run_one(enum guest_prov p, const struct guest_cfg *cfg, guest_setup_fn *setup, void *opaque,
		   struct guest_log *log, struct kvm_regs *regs)
{
	struct guest_cfg c = *cfg;
	struct guest g;
	int r;

	c.prov = p;
	guest_create(&g, &c);
	setup(&g, opaque);
	r = guest_run_log(&g, 0, log);
	guest_get_regs(&g, 0, regs);
	/* RF after an exit, and whether RIP has passed an OUT that left, differ between Linux's own paths. */
	regs->rflags &= ~(1ull << 16);
	if (r == KVM_EXIT_IO || r == KVM_EXIT_MMIO)
		regs->rip = 0;
	guest_destroy(&g);
	return r;
}

void guest_compare(const struct guest_cfg *cfg, guest_setup_fn *setup, void *opaque)
{
	struct guest_log *log = calloc(2, sizeof *log);
	struct kvm_regs regs[2];
	int r[2];

	r[0] = run_one(GUEST_SOFT, cfg, setup, opaque, &log[0], &regs[0]);
	if (guest_have(GUEST_KVM)) {
		r[1] = run_one(GUEST_KVM, cfg, setup, opaque, &log[1], &regs[1]);
		if (r[0] != r[1] || !guest_log_equal(&log[0], &log[1]))
			fail_msg("softkvm ends with %d, /dev/kvm with %d", r[0], r[1]);
		assert_memory_equal(&regs[0], &regs[1], sizeof regs[0]);
	}
	free(log);
}

/* -- what this /dev/kvm can do -------------------------------------------------------------------- */
GUEST_ASM(user_code, 64, "pushq $0x2b; pushq $0x9000; pushq $2; pushq $0x23; lea 1f(%rip), %rax; push %rax; iretq; 1: int $0x80;"
	  ".skip 64; .globl user_back; user_back: out %al, $0xf4");
extern const uint8_t user_back[];

bool guest_kvm_is_emulation(void)
{
	struct guest_log *log = calloc(1, sizeof *log);
	struct guest g;
	int r;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_KVM });
	guest_load(&g, 0x10000, user_code, (size_t)(user_code_end - user_code));
	guest_long64(&g, 0, 0x10000);
	guest_gate(&g, 64, 0x80, 0x10000 + (uint64_t)(user_back - user_code), 3);
	r = guest_run_log(&g, 0, log);
	guest_destroy(&g);
	free(log);
	return r != KVM_EXIT_IO;
}
