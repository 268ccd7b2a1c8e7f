/*
 * Memory for translations: no mapping of the process is writable and executable, whatever runs; and the bound holds for a guest that makes
 * fresh code for ever, for several vCPUs, and for vCPUs that nobody announced. Statistics and the perf map on the way.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest.h"

#define CODE 0x10000u
#define BUF 0x200000u
#define ROUNDS 30000u

/*
 * Makes mov eax, r8d ; add ebx, eax ; ret at ever new addresses, and calls it: rbx is the sum of 1 to r9 in the end. With another register each
 * time it runs, for what differs in values only is not made anew.
 */
GUEST_ASM(fresh, 64, "4: xor %ebx, %ebx; inc %r10d; lea (,%r10,4), %ecx; and $12, %ecx; mov $0x6210, %r11d; shr %cl, %r11d; and $7, %r11d;"
	  "mov %r9, %r8; 2: mov $0x200000, %edi; 1: lea 0xb8(%r11), %eax; mov %al, (%rdi); mov %r8d, 1(%rdi);"
	  "mov %r11d, %eax; shl $11, %eax; add $0xc3c301, %eax; mov %eax, 5(%rdi);"
	  "call *%rdi; add $64, %rdi; dec %r8; jz 3f; cmp $0x3f0000, %rdi; jb 1b; jmp 2b; 3: out %al, $0x80; jmp 4b");

static void start(struct guest *g, unsigned vcpus, uint64_t bytes)
{
	guest_create(g, &(struct guest_cfg){ .prov = GUEST_SOFT, .nvcpus = vcpus, .code_bytes = bytes });
	guest_load(g, CODE, fresh, (size_t)(fresh_end - fresh));
}

static struct softkvm_stats run(struct guest *g, unsigned v, uint64_t rounds)
{
	struct softkvm_stats s;
	struct kvm_regs r;

	guest_get_regs(g, v, &r);
	r.r9 = rounds;
	guest_set_regs(g, v, &r);
	assert_int_equal(guest_run(g, v), KVM_EXIT_IO);
	guest_get_regs(g, v, &r);
	assert_int_equal((uint32_t)r.rbx, (uint32_t)(rounds * (rounds + 1) / 2));
	assert_int_equal(softkvm_vcpu_stats(g->vcpu[v].f, &s), 0);
	return s;
}

static size_t resident(void)
{
	FILE *f = fopen("/proc/self/statm", "r");
	size_t total, rss = 0;

	assert_non_null(f);
	assert_int_equal(fscanf(f, "%zu %zu", &total, &rss), 2);
	fclose(f);
	return rss * (size_t)sysconf(_SC_PAGESIZE);
}

/* Executable and writable mappings; the code areas are there under two addresses. */
static void look_at_maps(const char *name)
{
	FILE *f = fopen("/proc/self/maps", "r");
	unsigned writable = 0, executable = 0;
	char line[512], perms[8];

	assert_non_null(f);
	while (fgets(line, sizeof line, f)) {
		assert_int_equal(sscanf(line, "%*s %7s", perms), 1);
		if (strchr(perms, 'w') && strchr(perms, 'x'))
			fail_msg("writable and executable: %s", line);
		if (strstr(line, name)) {
			writable += strchr(perms, 'w') != NULL;
			executable += strchr(perms, 'x') != NULL;
		}
	}
	fclose(f);
	assert_true(executable >= 1 && writable >= executable);
}

static void test_w_xor_x(void **st)
{
	struct guest g;

	start(&g, 1, 0);
	look_at_maps("softkvm-code");
	guest_long64(&g, 0, CODE);
	assert_true(run(&g, 0, 1000).translations > 1000);
	look_at_maps("softkvm-code");
	guest_destroy(&g);
}

static void test_bound(void **st)
{
	const uint64_t bytes = 2 << 20;
	struct softkvm_stats s;
	size_t early;
	struct guest g;

	start(&g, 1, bytes);
	guest_long64(&g, 0, CODE);
	s = run(&g, 0, ROUNDS);
	assert_true(s.code_flushes >= 5 && s.translations >= ROUNDS && s.code_used <= bytes && s.code_used > 0);
	early = resident();
	for (unsigned k = 0; k < 3; k++)
		s = run(&g, 0, ROUNDS);
	assert_true(s.code_used <= bytes);
	print_message("%llu flushes, %zu KiB grown in the second to fourth round\n", (unsigned long long)s.code_flushes,
		      resident() > early ? (resident() - early) >> 10 : 0);
	assert_true(resident() < early + (8 << 20));
	guest_destroy(&g);
}

/*
 * Two have 2 MiB each, of which 1.25 MiB are for translations; six more come, and shares are 1/2 MiB, of which the least is 1 MiB: those
 * beyond the fourth are interpreted.
 */
static void test_more_vcpus(void **st)
{
	const uint64_t bytes = 4 << 20;
	uint64_t before, after;
	struct softkvm_stats s;
	struct guest g;

	start(&g, 2, bytes);
	guest_long64(&g, 0, CODE);
	run(&g, 0, ROUNDS / 2);
	before = run(&g, 0, 1).code_flushes;
	before = run(&g, 0, ROUNDS).code_flushes - before;
	for (unsigned v = 2; v < GUEST_MAX_VCPUS; v++)
		guest_add_vcpu(&g);
	after = run(&g, 0, 1).code_flushes;
	s = run(&g, 0, ROUNDS);
	after = s.code_flushes - after;
	print_message("%llu flushes with 1.25 MiB, %llu with 1\n", (unsigned long long)before, (unsigned long long)after);
	assert_true(s.code_used <= bytes / 4);
	assert_true(before > 6 && after > before + before / 8);
	guest_long64(&g, 7, CODE);
	assert_int_equal(run(&g, 7, 100).translations, 0);
	guest_destroy(&g);
}

static void test_limits(void **st)
{
	struct { uint64_t a[3]; long want; } c[] = {
		{ { 1, 1 << 20, 1 }, 0 }, { { 1, (1 << 20) - 1, 1 }, -EINVAL }, { { 1, (1ull << 30) + 1, 1 }, -EINVAL }, { { 3, 0, 0 }, -EINVAL },
		{ { SOFTKVM_TRANSLATE_AS_IS, 0, 0 }, 0 }, { { 1, 0, 1u << 20 }, -EINVAL },
	};
	struct guest g;

	start(&g, 1, 0);
	for (unsigned k = 0; k < sizeof c / sizeof *c; k++)
		assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){ .cap = SOFTKVM_CAP_TRANSLATE,
			.args = { c[k].a[0], c[k].a[1], c[k].a[2] } }, NULL), c[k].want);
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){ .cap = SOFTKVM_CAP_PROFILE, .args = { 8 } }, NULL), -EINVAL);
	guest_destroy(&g);
}

/* 90,000 functions that run once fill the arena of decoded blocks several times: the loop that makes them stays translated. */
static void test_kept(void **st)
{
	struct softkvm_stats early, late;
	struct guest g;

	setenv("LODGE_SOFT_MODE", "translate", 1);
	start(&g, 1, 0);
	setenv("LODGE_SOFT_MODE", "translate-at-once", 1);
	guest_long64(&g, 0, CODE);
	early = run(&g, 0, 100);
	for (unsigned k = 0; k < 2; k++)
		run(&g, 0, ROUNDS);
	late = run(&g, 0, ROUNDS);
	print_message("%llu collections, %llu translations\n", (unsigned long long)late.block_collections, (unsigned long long)late.translations);
	assert_true(early.translations > 0 && early.block_collections == 0);
	assert_true(late.block_collections >= 2 && late.code_flushes == early.code_flushes);
	assert_true(late.translations < early.translations + 20);
	guest_destroy(&g);
}

/* -- samples and perf map -------------------------------------------------------------------------------- */
GUEST_ASM(spin, 64, "mov $20000000, %ecx; 1: dec %rcx; jnz 1b; out %al, $0x80; hlt");

static void test_profile(void **st)
{
	char name[64], line[256];
	struct softkvm_hot hot[4];
	uint64_t total, at;
	unsigned n, found = 0;
	struct stat s;
	struct guest g;
	FILE *f;

	snprintf(name, sizeof name, "/tmp/perf-%d.map", (int)getpid());
	unlink(name);
	assert_int_equal(symlink("/nonexistent/file", name), 0);        /* is not followed */
	start(&g, 1, 0);
	assert_int_equal(softkvm_vcpu_hot(g.vcpu[0].f, hot, 4, &total), 0);
	assert_int_equal(gioctl(&g.vm, KVM_ENABLE_CAP, &(struct kvm_enable_cap){ .cap = SOFTKVM_CAP_PROFILE, .args = { 3 } }, NULL), 0);
	guest_add_vcpu(&g);
	guest_load(&g, CODE, spin, (size_t)(spin_end - spin));
	guest_long64(&g, 1, CODE);
	assert_int_equal(guest_run(&g, 1), KVM_EXIT_IO);
	n = softkvm_vcpu_hot(g.vcpu[1].f, hot, 4, &total);
	assert_true(n >= 1 && total > 100 && hot[0].samples > total / 2);
	assert_int_equal(hot[0].rip, CODE + 5);
	assert_int_equal(lstat(name, &s), 0);
	assert_true(S_ISREG(s.st_mode) && (s.st_mode & 0777) == 0600);
	f = fopen(name, "r");
	assert_non_null(f);
	while (fgets(line, sizeof line, f))
		found += sscanf(line, "%*x %*x guest:%lx", &at) == 1 && (at == CODE || at == CODE + 5);
	fclose(f);
	assert_true(found);
	look_at_maps("/dev/zero");
	guest_destroy(&g);
	unlink(name);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_w_xor_x), cmocka_unit_test(test_bound), cmocka_unit_test(test_more_vcpus), cmocka_unit_test(test_limits),
		cmocka_unit_test(test_kept),
		cmocka_unit_test(test_profile),
	};

	if (!__builtin_cpu_supports("bmi2")) {
		printf("no translator here\n");
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
