/* KVM_RUN with small guests on both providers: exits and their completion, HLT and waking, signals, SMP start, clocks. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

GUEST_ASM(io_code, 64, "mov $0x41, %al; out %al, $0x80; in $0x81, %al; out %al, $0x82; mov $0x3f8, %dx; in %dx, %eax;"
	  "mov $0x30000000, %rbx; mov %eax, (%rbx); mov 4(%rbx), %ecx; addl $5, 8(%rbx); hlt");
GUEST_ASM(loop_code, 64, "1: inc %rax; jmp 1b");
GUEST_ASM(hlt_code, 64, "1: cli; hlt; jmp 1b");
GUEST_ASM(msr_code, 64, "mov $0x1234, %ecx; rdmsr; mov %eax, %ebx; mov $0x1234, %ecx; mov $7, %eax; xor %edx, %edx; wrmsr; hlt");
GUEST_ASM(real_code, 16, "mov $0x1234, %ax; mov %ax, 0x600; mov $0x42, %al; out %al, $0xf4");
GUEST_ASM(cli_code, 64, "cli; mov $0x2000, %esi; xor %eax, %eax; lock incl 0x6000; 1: pause; jmp 1b");

static uint64_t input(struct guest *g, const struct guest_exit *e, void *opaque) { return 0x11223344 + e->addr; }

static void setup_io(struct guest *g, void *opaque)
{
	guest_load(g, 0x10000, io_code, (size_t)(io_code_end - io_code));
	guest_long64(g, 0, 0x10000);
}

static void io_exits(void **state)
{
	struct guest_log *log = calloc(1, sizeof *log);
	struct kvm_regs r;
	struct guest g;

	guest_compare(&(struct guest_cfg){ 0 }, setup_io, NULL);
	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	setup_io(&g, NULL);
	log->input = input;
	assert_int_equal(guest_run_log(&g, 0, log), KVM_EXIT_HLT);
	assert_int_equal(log->n, 9);
	assert_int_equal(log->e[2].data, 0xc5);                 /* what IN gave */
	assert_int_equal(log->e[4].addr, 0x30000000);
	assert_int_equal(log->e[6].addr, 0x30000008);
	assert_int_equal(log->e[7].data, log->e[6].data + 5);   /* read-modify-write */
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rcx, 0x11223344 + 0x30000004);
	guest_destroy(&g);
	free(log);
}

static void setup_real(struct guest *g, void *opaque)
{
	guest_load(g, 0x1000, real_code, (size_t)(real_code_end - real_code));
	guest_real16(g, 0, 0, 0x1000);
}

static void real_mode(void **state) { guest_compare(&(struct guest_cfg){ 0 }, setup_real, NULL); }

/* -- signals ---------------------------------------------------------------------------------- */
static struct kvm_run *volatile target;
static void set_exit(int s) { if (target) target->immediate_exit = 1; }
static void nothing(int s) { }

struct kick { pthread_t vcpu; atomic_bool left; };

/* Again and again: on a busy host the first may come before KVM_RUN was called, and be lost. */
static void *kick(void *opaque)
{
	struct kick *k = opaque;

	do {
		usleep(20000);
		pthread_kill(k->vcpu, SIGUSR1);
	} while (!atomic_load(&k->left));
	return NULL;
}

static void leave(struct guest *g, void (*handler)(int))
{
	struct sigaction sa = { .sa_handler = handler };
	struct kick k = { .vcpu = pthread_self() };
	pthread_t t;

	sigaction(SIGUSR1, &sa, NULL);
	pthread_create(&t, NULL, kick, &k);
	assert_int_equal(guest_run(g, 0), -EINTR);
	atomic_store(&k.left, true);
	pthread_join(t, NULL);
	g->run[0]->immediate_exit = 0;
}

/* -- how soon immediate_exit and signals are seen ----------------------------------------------- */
GUEST_ASM(busy_jump, 64, "1: jmp 1b");
GUEST_ASM(busy_cpuid, 64, "1: xor %eax, %eax; cpuid; jmp 1b");
GUEST_ASM(busy_fxsave, 64, "1: fxsave (0x100000); fxrstor (0x100000); jmp 1b");
GUEST_ASM(busy_stos, 64, "1: mov $0x100000, %edi; mov $0x200000, %ecx; rep stosb; jmp 1b");
GUEST_ASM(busy_cmps, 64, "1: mov $0x100000, %edi; mov $0x200000, %esi; mov $0x100000, %ecx; repe cmpsb; jmp 1b");
GUEST_ASM(busy_fill, 64, "1: invlpg (0x100000); mov (0x100000), %eax; lock incl (0x100000); jmp 1b");
GUEST_ASM(busy_patch, 64, "1: incb 2f+1(%rip); 2: mov $0, %al; jmp 1b");

GUEST_ASM(busy_linked, 64, "1: call 2f; lea 3f(%rip), %rax; jmp *%rax; .skip 5000, 0x90; 2: mov $9, %ecx; 4: push %rcx; pop %rdx; dec %ecx; jnz 4b; ret;"
	  ".skip 5000, 0x90; 3: jmp 1b");
/* No jump but those of SYSCALL and SYSRET, to themselves. */
GUEST_ASM(busy_rings, 64, "movq $0x200087, 0x5008; invlpg 0x200000; movw $0x050f, 0x200000; mov $0xc0000082, %ecx; xor %edx, %edx; lea 1f(%rip), %rax; wrmsr;"
	  "mov $0xc0000081, %ecx; mov $0x00330010, %edx; xor %eax, %eax; wrmsr; mov $0x200000, %ecx; mov $2, %r11d; sysretq; 1: sub $2, %rcx; sysretq");
GUEST_ASM(busy_div, 64, "mov $3, %ecx; 1: mov $2, %edx; mov $-1, %rax; div %rcx; lock incl (0x100000); jmp 1b");
GUEST_ASM(busy_fsin, 64, "fninit; fldpi; 1: fsin; fld1; fpatan; jmp 1b");
GUEST_ASM(busy_fsin_row, 64, "fninit; fldpi; 1: .rept 40; fsin; fcos; fptan; fstp %st; .endr; jmp 1b");
/* Few instructions by count, but each waits for memory. */
GUEST_ASM(busy_chase, 64, "mov $0x100000, %ebx; 1: imul $0x19660d, %eax, %eax; add (%rbx,%rcx), %eax; lea 0x3c6ef35f(%rax), %eax; mov %eax, %ecx; shr $9, %ecx;"
	  "and $0x1ffffc0, %ecx; jmp 1b");
/* Thousands of instructions, and one jump back. */
GUEST_ASM(busy_road, 64, "1: .rept 12000; inc %eax; .endr; jmp 1b");

struct kicker { clockid_t clock; struct timespec at; struct kvm_run *run; pthread_t vcpu; bool signal; atomic_bool left; };

/* The time that the vCPU's thread has used is what counts: this host may be busy. */
static void *exit_soon(void *opaque)
{
	struct kicker *k = opaque;

	usleep(3000);
	clock_gettime(k->clock, &k->at);
	if (!k->signal)
		__atomic_store_n(&k->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	/* On a busy host the first may come before KVM_RUN was called, and be lost. */
	while (k->signal && !atomic_load(&k->left)) {
		pthread_kill(k->vcpu, SIGUSR1);
		usleep(2000);
	}
	return NULL;
}

static int64_t exit_latency(struct guest *g, bool by_signal)
{
	struct kicker k = { .run = g->run[0], .vcpu = pthread_self(), .signal = by_signal };
	struct timespec end;
	pthread_t t;

	pthread_getcpuclockid(pthread_self(), &k.clock);
	pthread_create(&t, NULL, exit_soon, &k);
	assert_int_equal(guest_run(g, 0), -EINTR);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
	atomic_store(&k.left, true);
	pthread_join(t, NULL);
	g->run[0]->immediate_exit = 0;
	return (end.tv_sec - k.at.tv_sec) * 1000000000LL + end.tv_nsec - k.at.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

/* A host that others use at the same time slows the vCPU's thread down too, by its caches and its other half of the core. */
static bool host_is_busy(void)
{
	double load[1];

	return getloadavg(load, 1) != 1 || load[0] > 1.5;
}

/* The best third of 15 tries, in nanoseconds; the best of a few rounds, until one is within the limit. */
static int64_t best_latency(struct guest *g, bool by_signal, int64_t limit, int64_t *median)
{
	int64_t ns[15], best = INT64_MAX;

	for (unsigned round = 0; round < 6 && best > limit; round++) {
		for (unsigned n = 0; n < 15; n++)
			ns[n] = exit_latency(g, by_signal);
		qsort(ns, 15, sizeof *ns, by_value);
		if (ns[5] < best) {
			best = ns[5];
			*median = ns[7];
		}
	}
	return best;
}

/* Within 100 microseconds; ten times that on a busy host. */
static void exit_in_time(void **state)
{
	static const struct { const char *name; const uint8_t *code, *end; } loops[] = {
		{ "jmp", busy_jump, busy_jump_end }, { "cpuid", busy_cpuid, busy_cpuid_end }, { "fxsave", busy_fxsave, busy_fxsave_end },
		{ "rep stosb", busy_stos, busy_stos_end }, { "repe cmpsb", busy_cmps, busy_cmps_end }, { "TLB fill", busy_fill, busy_fill_end },
		{ "self-modifying", busy_patch, busy_patch_end }, { "linked blocks", busy_linked, busy_linked_end }, { "rings", busy_rings, busy_rings_end },
		{ "div and lock", busy_div, busy_div_end }, { "fsin", busy_fsin, busy_fsin_end }, { "rows of fsin", busy_fsin_row, busy_fsin_row_end },
		{ "pointers", busy_chase, busy_chase_end }, { "a long road", busy_road, busy_road_end },
	};
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
	const int64_t limit = 100000;
#else
	const int64_t limit = 1000000000; /* no figure of a slowed build means anything: it leaves at all */
#endif

	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = nothing }, NULL);
	for (unsigned l = 0; l < 2 * sizeof loops / sizeof *loops; l++) {
		int64_t ns, median = 0;
		struct guest g;

		guest_create(&g, &(struct guest_cfg){ .mem_size = 64 << 20 });
		guest_load(&g, 0x10000, loops[l / 2].code, (size_t)(loops[l / 2].end - loops[l / 2].code));
		guest_long64(&g, 0, 0x10000);
		ns = best_latency(&g, l & 1, limit, &median);
		print_message("%s, %s: %lld, median %lld ns\n", loops[l / 2].name, l & 1 ? "signal" : "immediate_exit", (long long)ns, (long long)median);
		assert_true(ns <= (host_is_busy() ? 10 * limit : limit));
		guest_destroy(&g);
	}
}

static void signals(void **state)
{
	struct kvm_regs r;
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	guest_load(&g, 0x10000, loop_code, (size_t)(loop_code_end - loop_code));
	guest_long64(&g, 0, 0x10000);
	target = g.run[0];
	leave(&g, set_exit);
	leave(&g, nothing);
	guest_get_regs(&g, 0, &r);
	assert_true(r.rax > 1000);
	target = NULL;
	guest_destroy(&g);
}

static void idle(void **state)
{
	struct timespec a, b;
	struct guest g;
	double ms;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true });
	guest_load(&g, 0x10000, hlt_code, (size_t)(hlt_code_end - hlt_code));
	guest_long64(&g, 0, 0x10000);
	leave(&g, nothing);                             /* the engine's tables are there, which sanitizers make dear */
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
	leave(&g, nothing);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
	ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
	print_message("HLT until a signal: %.2f ms of a CPU\n", ms);
	assert_true(ms < 5);
	guest_destroy(&g);
}

/* -- a guest at rest --------------------------------------------------------------------------- */
#define REST_BLOCKS 24000

/* Runs all the blocks and halts; returns how many were decoded. */
static uint64_t run_blocks(struct guest *g)
{
	struct kvm_mp_state runnable = { .mp_state = KVM_MP_STATE_RUNNABLE };
	struct softkvm_stats before, after;
	struct kvm_regs r;

	assert_int_equal(softkvm_vcpu_stats(g->vcpu[0].f, &before), 0);
	assert_int_equal(gioctl(&g->vcpu[0], KVM_SET_MP_STATE, &runnable, NULL), 0);
	guest_get_regs(g, 0, &r);
	r.rip = 0x100000;
	guest_set_regs(g, 0, &r);
	assert_int_equal(guest_run(g, 0), KVM_EXIT_IO);
	assert_int_equal(g->run[0]->io.port, 0x80);
	assert_int_equal(softkvm_vcpu_stats(g->vcpu[0].f, &after), 0);
	leave(g, nothing);
	return after.blocks_decoded - before.blocks_decoded;
}

/* What was decoded and translated is kept from one piece of work to the next, and given back once after a while without any. */
static void rest(void **state)
{
	static const uint8_t jump[] = { 0xeb, 0 }, end[] = { 0xe6, 0x80, 0xf4, 0xeb, 0xfd };
	time_t until = time(NULL) + 60;
	struct guest g;
	uint64_t n;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .irqchip = true });
	for (unsigned k = 0; k < REST_BLOCKS; k++)
		guest_load(&g, 0x100000 + 2 * k, jump, sizeof jump);
	guest_load(&g, 0x100000 + 2 * REST_BLOCKS, end, sizeof end);
	guest_long64(&g, 0, 0x100000);
	assert_true(run_blocks(&g) >= REST_BLOCKS);
	while ((n = run_blocks(&g)) < REST_BLOCKS && time(NULL) < until) {
		assert_true(n < 100);
		usleep(50000);
	}
	assert_true(n >= REST_BLOCKS);
	for (unsigned i = 0; i < 4; i++) {              /* once only, so soon */
		usleep(500000);
		assert_true(run_blocks(&g) < 100);
	}
	guest_destroy(&g);
}

/* -- MWAIT ------------------------------------------------------------------------------------- */
GUEST_ASM(mwait_code, 64, "1: mov $0x20000, %eax; xor %ecx, %ecx; xor %edx, %edx; monitor; mov 0x20008, %rbx; xor %eax, %eax; mwait\n"
	  "incl 0x21000; test %rbx, %rbx; jz 1b; hlt");

static void *store_later(void *opaque)
{
	struct guest *g = opaque;

	usleep(600000);
	__atomic_store_n((uint64_t *)(g->mem + 0x20008), 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void mwait_setup(struct guest *g, bool waits)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_X86_DISABLE_EXITS, .args = { KVM_X86_DISABLE_EXITS_MWAIT } };

	guest_create(g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	if (waits)
		assert_int_equal(gioctl(&g->vm, KVM_ENABLE_CAP, &cap, NULL), 0);
	guest_load(g, 0x10000, mwait_code, (size_t)(mwait_code_end - mwait_code));
	guest_long64(g, 0, 0x10000);
}

static void mwait_waits(void **state)
{
	struct timespec a, b;
	struct kvm_mp_state mp;
	struct guest g;
	pthread_t t;
	double ms;

	mwait_setup(&g, false);                         /* by itself a NOP */
	leave(&g, nothing);
	assert_true(__atomic_load_n((uint32_t *)(g.mem + 0x21000), __ATOMIC_RELAXED) > 1000);
	guest_destroy(&g);

	mwait_setup(&g, true);
	pthread_create(&t, NULL, store_later, &g);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
	pthread_join(t, NULL);
	ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6;
	print_message("MWAIT for 600 ms: %.2f ms of a CPU, %u times round\n", ms, *(uint32_t *)(g.mem + 0x21000));
	assert_true(*(uint32_t *)(g.mem + 0x21000) < 30);
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
	assert_true(ms < 600 * 0.1);                    /* 1 to 2 % is usual; system calls are slow on some hosts */
#endif
	guest_destroy(&g);

	mwait_setup(&g, true);                          /* a signal ends it, and nothing of it stays */
	leave(&g, nothing);
	assert_int_equal(gioctl(&g.vcpu[0], KVM_GET_MP_STATE, &mp, NULL), 0);
	assert_int_equal(mp.mp_state, KVM_MP_STATE_RUNNABLE);
	guest_destroy(&g);
}

/* -- user-space MSRs -------------------------------------------------------------------------- */
static void user_msr(void **state)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_X86_USER_SPACE_MSR, .args = { KVM_MSR_EXIT_REASON_UNKNOWN } };
	struct kvm_regs r;
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT });
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &cap, NULL), 0);
	guest_load(&g, 0x10000, msr_code, (size_t)(msr_code_end - msr_code));
	guest_long64(&g, 0, 0x10000);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_X86_RDMSR);
	assert_int_equal(g.run[0]->msr.index, 0x1234);
	assert_int_equal(g.run[0]->msr.reason, KVM_MSR_EXIT_REASON_UNKNOWN);
	g.run[0]->msr.data = 0x55;
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_X86_WRMSR);
	assert_int_equal(g.run[0]->msr.data, 7);
	assert_int_equal(guest_run(&g, 0), KVM_EXIT_HLT);
	guest_get_regs(&g, 0, &r);
	assert_int_equal(r.rbx, 0x55);
	guest_destroy(&g);
}

/* -- stop the world --------------------------------------------------------------------------- */
struct runner { struct guest *g; unsigned v; };
static void *run_thread(void *opaque)
{
	struct runner *r = opaque;

	while (guest_run(r->g, r->v) == -EINTR && !__atomic_load_n(&r->g->run[r->v]->immediate_exit, __ATOMIC_RELAXED))
		;
	return NULL;
}

static void slots_while_running(void **state)
{
	struct kvm_userspace_memory_region m = { .slot = 5, .guest_phys_addr = 0x20000000 };
	struct runner r[2];
	pthread_t t[2];
	struct guest g;

	guest_create(&g, &(struct guest_cfg){ .prov = GUEST_SOFT, .nvcpus = 2 });
	guest_load(&g, 0x10000, cli_code, (size_t)(cli_code_end - cli_code));
	m.userspace_addr = (uintptr_t)g.mem;
	guest_long64(&g, 0, 0x10000);
	guest_long64(&g, 1, 0x10000);
	for (unsigned v = 0; v < 2; v++) {
		r[v] = (struct runner){ &g, v };
		pthread_create(&t[v], NULL, run_thread, &r[v]);
	}
	/* Both are under way. */
	for (int i = 0; i < 5000 && __atomic_load_n((uint32_t *)(g.mem + 0x6000), __ATOMIC_RELAXED) != 2; i++)
		usleep(1000);
	for (int i = 0; i < 100; i++) {
		m.memory_size = i & 1 ? 0 : 0x10000;
		assert_int_equal(gioctl(&g.vm, KVM_SET_USER_MEMORY_REGION, &m, NULL), 0);
	}
	for (unsigned v = 0; v < 2; v++)
		__atomic_store_n(&g.run[v]->immediate_exit, 1, __ATOMIC_RELAXED);
	for (unsigned v = 0; v < 2; v++)
		pthread_join(t[v], NULL);
	assert_int_equal(*(uint32_t *)(g.mem + 0x6000), 2);
	guest_destroy(&g);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(io_exits), cmocka_unit_test(real_mode), cmocka_unit_test(signals), cmocka_unit_test(exit_in_time), cmocka_unit_test(idle), cmocka_unit_test(rest), cmocka_unit_test(mwait_waits),
		cmocka_unit_test(user_msr), cmocka_unit_test(slots_while_running),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
