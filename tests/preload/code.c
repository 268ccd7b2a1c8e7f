/*
 * A client that writes code and says nothing: functions in as many pages as are watched at once, and more; the client changes
 * what they return, where they are called from, and the memory behind their pages; two vCPUs run the same code. What the
 * guest computes is compared with what the client knows to be in its memory. usage: code [rounds]
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "client.h"

#define PAGES 128u              /* of functions */
#define BASE 0x10000u
#define MEM 0x100000u
#define FLAG 0x8000u            /* the polling guest's words: go, answer */
#define ANSWER 0x8040u
#define POLLER 0x9000u
#define CALLER(n) (0xa000u + 0x2000u * (n))

static uint8_t *mem;
static uint32_t value[PAGES];
static unsigned offset[PAGES];
static uint64_t seed = 88172645463325252ull;

static uint32_t rnd(uint32_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)(seed >> 32) % below;
}

static uint32_t function_at(unsigned n) { return BASE + n * 4096 + offset[n]; }

static void put_function(unsigned n, uint32_t v)
{
	uint8_t *p = mem + function_at(n);

	value[n] = v;
	memcpy(p, "\x48\x81\xc0", 3);   /* add rax, imm32; ret */
	memcpy(p + 3, &v, 4);
	p[7] = 0xc3;
}

/* xor eax, eax; calls; out 0x10, eax; jmp. */
static uint32_t put_caller(uint32_t at, const uint8_t *which, unsigned n)
{
	uint32_t start = at, sum = 0;

	memcpy(mem + at, "\x31\xc0", 2);
	at += 2;
	for (unsigned i = 0; i < n; i++) {
		int32_t rel = (int32_t)(function_at(which[i]) - (at + 5));

		sum += value[which[i]];
		mem[at] = 0xe8;
		memcpy(mem + at + 1, &rel, 4);
		at += 5;
	}
	memcpy(mem + at, "\xe7\x10\xe9", 3);
	int32_t rel = (int32_t)(start - (at + 7));
	memcpy(mem + at + 3, &rel, 4);
	return sum;
}

struct guest {
	int sys, vm, vcpu[2];
	struct kvm_run *run[2];
};

/* Paging one to one in 2 MiB pages, at 0x1000. */
static void put_tables(void)
{
	uint64_t e[] = { 0x2003, 0x3003, 0x83 };

	for (unsigned i = 0; i < 3; i++)
		memcpy(mem + 0x1000 * (i + 1), &e[i], 8);
}

static void enter_at(struct guest *g, int n, uint64_t rip)
{
	struct kvm_regs r = { .rip = rip, .rflags = 2, .rsp = 0x7000 + 0x400 * (unsigned)n };
	struct kvm_sregs s;

	CHECK(ioctl(g->vcpu[n], KVM_GET_SREGS, &s) == 0);
	s.cr3 = 0x1000;
	s.cr4 = 1 << 5;
	s.cr0 = 0x80000011;
	s.efer = 0x500;
	s.cs = (struct kvm_segment){ .limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	s.ss = s.ds = s.es = (struct kvm_segment){ .limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	CHECK(ioctl(g->vcpu[n], KVM_SET_SREGS, &s) == 0);
	CHECK(ioctl(g->vcpu[n], KVM_SET_REGS, &r) == 0);
}

static void slot(struct guest *g, unsigned id, uint64_t gpa, uint64_t size, void *host)
{
	struct kvm_userspace_memory_region m = { .slot = id, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host };

	CHECK(ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &m) == 0);
}

static void start(struct guest *g)
{
	CHECK((g->sys = open("/dev/kvm", O_RDWR)) >= 0);
	CHECK((g->vm = ioctl(g->sys, KVM_CREATE_VM, 0)) >= 0);
	mem = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mem != MAP_FAILED);
	slot(g, 0, 0, MEM, mem);
	put_tables();
	for (int n = 0; n < 2; n++) {
		int size = ioctl(g->sys, KVM_GET_VCPU_MMAP_SIZE, 0);

		CHECK((g->vcpu[n] = ioctl(g->vm, KVM_CREATE_VCPU, n)) >= 0);
		g->run[n] = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, g->vcpu[n], 0);
		CHECK(g->run[n] != MAP_FAILED);
	}
}

static uint32_t run(struct guest *g, int n)
{
	uint32_t v;

	CHECK(ioctl(g->vcpu[n], KVM_RUN, 0) == 0);
	CHECK(g->run[n]->exit_reason == KVM_EXIT_IO && g->run[n]->io.port == 0x10);
	memcpy(&v, (uint8_t *)g->run[n] + g->run[n]->io.data_offset, 4);
	return v;
}

static void expect(uint32_t got, uint32_t want, unsigned round)
{
	if (got == want)
		return;
	fprintf(stderr, "round %u: %#x instead of %#x: old code was run\n", round, got, want);
	exit(1);
}

/* Each exit may be followed by changes of functions, of the caller, or of nothing. */
static void changes_at_exits(struct guest *g, unsigned rounds)
{
	uint8_t which[64];
	unsigned n = 0;
	uint32_t sum = 0, change;

	for (unsigned i = 0; i < PAGES; i++) {
		offset[i] = rnd(4080);
		put_function(i, rnd(0x1000000));
	}
	enter_at(g, 0, CALLER(0));
	for (unsigned round = 0; round < rounds; round++) {
		change = rnd(round % 4000 < 2000 ? 4 : 100);    /* code gets hot in between */
		if (!n || change == 0) {
			n = 1 + rnd(rnd(4) ? 4 : 64);
			for (unsigned i = 0; i < n; i++)
				which[i] = (uint8_t)rnd(rnd(2) ? 8 : PAGES);
		}
		if (change == 1)
			put_function(which[rnd(n)], rnd(0x1000000));
		sum = put_caller(CALLER(0), which, n);
		if (change == 0)
			enter_at(g, 0, CALLER(0));
		expect(run(g, 0), sum, round);
	}
}

/* The page of a function gets other memory, with another function at the same place. */
static void changes_of_slots(struct guest *g, unsigned rounds)
{
	uint8_t which[1] = { 3 }, *old = mem, *page[2];
	uint32_t v[2] = { 5, 7 };

	put_caller(CALLER(0), which, 1);
	for (unsigned i = 0; i < 2; i++) {
		page[i] = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(page[i] != MAP_FAILED);
		mem = page[i] - (BASE + 3 * 4096);
		put_function(3, v[i]);
		mem = old;
	}
	slot(g, 0, 0, 0, NULL);
	slot(g, 0, 0, BASE + 3 * 4096, mem);
	enter_at(g, 0, CALLER(0));
	for (unsigned round = 0; round < rounds; round++) {
		slot(g, 1, BASE + 3 * 4096, 4096, page[round / 20 % 2]);
		expect(run(g, 0), v[round / 20 % 2], round);
		if (round % 20 == 19)
			slot(g, 1, 0, 0, NULL);
	}
	slot(g, 0, 0, 0, NULL);
	slot(g, 0, 0, MEM, mem);
}

static _Atomic uint32_t *word(uint32_t at) { return (_Atomic uint32_t *)(mem + at); }

static void *poller(void *arg)
{
	run(arg, 1);
	return NULL;
}

/*
 * No exits: the second vCPU waits for a word of memory to change, reloads CR3, calls a function and stores what it
 * returns; the first one exits often, or does not run.
 */
static void changes_while_running(struct guest *g, unsigned rounds)
{
	/* 1: mov eax,[FLAG]; cmp eax,ebx; je 1b; mov ebx,eax; mov rcx,cr3; mov cr3,rcx; xor eax,eax; call f; mov [ANSWER],eax;
	 * cmp ebx,-1; jne 1b; out 0x10,eax */
	static const uint8_t head[] = { 0x8b, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0x39, 0xd8, 0x74, 0xf5, 0x89, 0xc3, 0x0f, 0x20, 0xd9,
		0x0f, 0x22, 0xd9, 0x31, 0xc0, 0xe8 };
	static const uint8_t tail[] = { 0x89, 0x04, 0x25, 0x40, 0x80, 0x00, 0x00, 0x83, 0xfb, 0xff, 0x75, 0xda, 0xe7, 0x10 };
	int32_t rel = (int32_t)(function_at(1) - (POLLER + sizeof head + 4));
	uint8_t which[1] = { 2 };
	uint32_t sum, want;
	pthread_t t;

	memcpy(mem + POLLER, head, sizeof head);
	memcpy(mem + POLLER + sizeof head, &rel, 4);
	memcpy(mem + POLLER + sizeof head + 4, tail, sizeof tail);
	sum = put_caller(CALLER(0), which, 1);
	enter_at(g, 0, CALLER(0));
	enter_at(g, 1, POLLER);
	CHECK(pthread_create(&t, NULL, poller, g) == 0);
	for (unsigned round = 1; round <= rounds; round++) {
		want = 1 + rnd(0x1000000);
		atomic_store(word(ANSWER), 0);
		put_function(1, want);
		atomic_store(word(FLAG), round == rounds ? ~0u : round);
		while (!atomic_load(word(ANSWER)))
			if (round % 2)
				expect(run(g, 0), sum, round);
		expect(atomic_load(word(ANSWER)), want, round);
	}
	pthread_join(t, NULL);
}

int main(int argc, char **argv)
{
	unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 40000;
	struct guest g;

	start(&g);
	changes_at_exits(&g, rounds);
	changes_of_slots(&g, 400);
	changes_while_running(&g, rounds / 20);
	close_range((unsigned)g.sys, (unsigned)g.vcpu[1], 0);
	return 0;
}
