/* `lodge kvm-info [--json]`: what /dev/kvm is on this host, and what softkvm offers. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "cli/options.h"
#include "kvm/kvm.h"
#include "softkvm/softkvm.h"

/* A plain loop runs at billions a second on hardware; a CPU emulated in software stays far below this. */
#define HARDWARE_RATE 400000000u

/* What KVM_CHECK_EXTENSION is asked; the names are those of <linux/kvm.h>. */
static const struct cap { const char *name; long nr; bool value; } caps[] = {
#define FLAG(n) { #n, KVM_CAP_##n, false }
#define NUM(n) { #n, KVM_CAP_##n, true }
	FLAG(IRQCHIP), FLAG(SPLIT_IRQCHIP), FLAG(PIT2), FLAG(IRQFD), FLAG(IRQFD_RESAMPLE), FLAG(IOEVENTFD), FLAG(SIGNAL_MSI),
	FLAG(IRQ_ROUTING), FLAG(USER_MEMORY), FLAG(READONLY_MEM), FLAG(SYNC_MMU), FLAG(COALESCED_PIO), FLAG(IMMEDIATE_EXIT),
	FLAG(SET_GUEST_DEBUG), FLAG(DEBUGREGS), FLAG(VCPU_EVENTS), FLAG(XSAVE), FLAG(XCRS), FLAG(TSC_CONTROL), FLAG(TSC_DEADLINE_TIMER),
	FLAG(X86_SMM), FLAG(SREGS2), FLAG(BINARY_STATS_FD), FLAG(EXCEPTION_PAYLOAD), FLAG(X86_MSR_FILTER), FLAG(MSR_PLATFORM_INFO),
	FLAG(GET_MSR_FEATURES), FLAG(SET_BOOT_CPU_ID), FLAG(EXIT_ON_EMULATION_FAILURE), FLAG(X86_TRIPLE_FAULT_EVENT),
	FLAG(ENFORCE_PV_FEATURE_CPUID), FLAG(STEAL_TIME), FLAG(NESTED_STATE), FLAG(HYPERV), FLAG(XEN_HVM), FLAG(PMU_CAPABILITY),
	FLAG(X86_NOTIFY_VMEXIT), FLAG(X86_BUS_LOCK_EXIT),
	NUM(X86_DISABLE_EXITS), NUM(X86_USER_SPACE_MSR), NUM(EXIT_HYPERCALL), NUM(SYNC_REGS), NUM(MANUAL_DIRTY_LOG_PROTECT2),
	NUM(DIRTY_LOG_RING), NUM(ADJUST_CLOCK), NUM(X2APIC_API), NUM(MCE), NUM(XSAVE2), NUM(DISABLE_QUIRKS2), NUM(SET_GUEST_DEBUG2),
#undef FLAG
#undef NUM
};

static const struct cap limits[] = {
	{ "vcpus recommended", KVM_CAP_NR_VCPUS, true }, { "vcpus at most", KVM_CAP_MAX_VCPUS, true }, { "vcpu ids below", KVM_CAP_MAX_VCPU_ID, true },
	{ "memory slots", KVM_CAP_NR_MEMSLOTS, true }, { "address spaces", KVM_CAP_MULTI_ADDRESS_SPACE, true },
};

/* Feature bits by leaf and register (0 EAX .. 3 EDX); NULL: not worth a name. */
static const struct feature_word { uint32_t leaf, sub; unsigned reg; const char *names[32]; } words[] = {
	{ 1, 0, 3, { "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", 0, "sep", "mtrr", "pge", "mca", "cmov", "pat", "pse36",
		0, "clflush", 0, 0, 0, "mmx", "fxsr", "sse", "sse2", "ss", "ht" } },
	{ 1, 0, 2, { "sse3", "pclmulqdq", 0, "monitor", 0, "vmx", 0, 0, 0, "ssse3", 0, 0, "fma", "cx16", 0, 0, 0, "pcid", 0, "sse4.1", "sse4.2",
		"x2apic", "movbe", "popcnt", "tsc-deadline", "aes", "xsave", 0, "avx", "f16c", "rdrand", "hypervisor" } },
	{ 7, 0, 1, { "fsgsbase", "tsc-adjust", 0, "bmi1", 0, "avx2", 0, "smep", "bmi2", "erms", "invpcid", 0, 0, 0, 0, 0, "avx512f", "avx512dq",
		"rdseed", "adx", "smap", "avx512ifma", 0, "clflushopt", "clwb", 0, 0, 0, "avx512cd", "sha-ni", "avx512bw", "avx512vl" } },
	{ 7, 0, 2, { 0, "avx512vbmi", "umip", "pku", 0, "waitpkg", "avx512vbmi2", 0, "gfni", "vaes", "vpclmulqdq", "avx512vnni", "avx512bitalg", 0,
		"avx512vpopcntdq", 0, "la57", 0, 0, 0, 0, 0, "rdpid", 0, 0, "cldemote", 0, "movdiri", "movdir64b" } },
	{ 0x80000001, 0, 2, { "lahf", 0, "svm", 0, "cr8legacy", "abm", "sse4a", "misalignsse", "3dnowprefetch", 0, 0, "xop", 0, 0, 0, 0, "fma4" } },
	{ 0x80000001, 0, 3, { [11] = "syscall", [20] = "nx", [25] = "fxsr-opt", [26] = "pdpe1gb", [27] = "rdtscp", [29] = "lm" } },
};

/* -- /dev/kvm --------------------------------------------------------------------------------- */
static json_t *probe_device(void)
{
	json_t *o = json_object();
	struct err err = { 0 };
	struct kvm *k;
	uint64_t rate;

	if (access("/dev/kvm", F_OK))
		json_object_set_new(o, "state", json_string("absent"));
	else if (access("/dev/kvm", R_OK | W_OK))
		json_object_set_new(o, "state", json_string("no permission"));
	else if (kvm_open(&k, ACCEL_KVM, &err)) {
		json_object_set_new(o, "state", json_string("unusable"));
		json_object_set_new(o, "reason", json_string(err.msg));
	} else {
		rate = kvm_speed(k);
		json_object_set_new(o, "state", json_string(!rate ? "unusable" : rate >= HARDWARE_RATE ? "hardware" : "software-emulated"));
		if (!rate)
			json_object_set_new(o, "reason", json_string("a guest does not run"));
		json_object_set_new(o, "instructions-per-second", json_integer((json_int_t)rate));
		kvm_close(k);
	}
	return o;
}

/* -- softkvm ---------------------------------------------------------------------------------- */
static json_t *list_caps(struct kvm *k, bool present)
{
	json_t *o = present ? json_object() : json_array();

	for (unsigned i = 0; i < ARRAY_SIZE(caps); i++) {
		int v = kvm_check_extension(k, caps[i].nr);

		if (present && v > 0)
			json_object_set_new(o, caps[i].name, caps[i].value ? json_integer(v) : json_true());
		else if (!present && v <= 0)
			json_array_append_new(o, json_string(caps[i].name));
	}
	return o;
}

static json_t *list_limits(struct kvm *k)
{
	json_t *o = json_object();

	for (unsigned i = 0; i < ARRAY_SIZE(limits); i++) {
		int v = kvm_check_extension(k, limits[i].nr);

		json_object_set_new(o, limits[i].name, json_integer(v > 0 ? v : 1));
	}
	return o;
}

static void add_features(json_t *list, const struct kvm_cpuid2 *c, const struct feature_word *w)
{
	for (unsigned i = 0; i < c->nent; i++) {
		const struct kvm_cpuid_entry2 *e = &c->entries[i];
		uint32_t regs[4] = { e->eax, e->ebx, e->ecx, e->edx };

		if (e->function != w->leaf || e->index != w->sub)
			continue;
		for (unsigned b = 0; b < 32; b++)
			if (w->names[b] && regs[w->reg] >> b & 1)
				json_array_append_new(list, json_string(w->names[b]));
	}
}

static json_t *list_features(struct kvm *k)
{
	json_t *list = json_array();
	struct kvm_cpuid2 *c = calloc(1, sizeof *c + 256 * sizeof c->entries[0]);

	if (!c)
		return list;
	c->nent = 256;
	if (kvm_ioctl(k, KVM_GET_SUPPORTED_CPUID, c) >= 0)
		for (unsigned i = 0; i < ARRAY_SIZE(words); i++)
			add_features(list, c, &words[i]);
	free(c);
	return list;
}

static json_t *probe_softkvm(void)
{
	json_t *o = json_object();
	struct err err = { 0 };
	struct kvm *k;

	if (kvm_open(&k, ACCEL_SOFT, &err)) {
		json_object_set_new(o, "error", json_string(err.msg));
		return o;
	}
	json_object_set_new(o, "api-version", json_integer(KVM_API_VERSION));
	json_object_set_new(o, "instructions-per-second", json_integer((json_int_t)kvm_speed(k)));
	json_object_set_new(o, "limits", list_limits(k));
	json_object_set_new(o, "capabilities", list_caps(k, true));
	json_object_set_new(o, "absent", list_caps(k, false));
	json_object_set_new(o, "cpu-features", list_features(k));
	kvm_close(k);
	return o;
}

/* -- in words --------------------------------------------------------------------------------- */
static void print_wrapped(const char *title, json_t *list)
{
	size_t col = (size_t)printf("  %-14s", title), i;
	const char *key;
	json_t *v;

	if (json_is_array(list)) {
		json_array_foreach(list, i, v) {
			if (col + json_string_length(v) > 110)
				col = (size_t)printf("\n  %-14s", "") - 1;
			col += (size_t)printf(" %s", json_string_value(v));
		}
	} else {
		json_object_foreach(list, key, v) {
			char item[96];

			snprintf(item, sizeof item, json_is_integer(v) ? "%s=%" JSON_INTEGER_FORMAT : "%s", key, json_integer_value(v));
			if (col + strlen(item) > 110)
				col = (size_t)printf("\n  %-14s", "") - 1;
			col += (size_t)printf(" %s", item);
		}
	}
	puts("");
}

static double millions(json_t *o)
{
	return (double)json_integer_value(json_object_get(o, "instructions-per-second")) / 1e6;
}

static void print_words(json_t *dev, json_t *soft)
{
	const char *state = json_string_value(json_object_get(dev, "state")), *why = json_string_value(json_object_get(dev, "reason"));

	printf("/dev/kvm: %s", state);
	if (why)
		printf(" (%s)", why);
	else if (json_object_get(dev, "instructions-per-second"))
		printf(", a plain loop runs at %.1f million instructions a second", millions(dev));
	if (json_object_get(soft, "error")) {
		printf("\nsoftkvm: %s\n", json_string_value(json_object_get(soft, "error")));
		return;
	}
	printf("\nsoftkvm: KVM API version %d in user space, a plain loop runs at %.1f million instructions a second\n", KVM_API_VERSION, millions(soft));
	print_wrapped("limits:", json_object_get(soft, "limits"));
	print_wrapped("capabilities:", json_object_get(soft, "capabilities"));
	print_wrapped("absent:", json_object_get(soft, "absent"));
	print_wrapped("CPU features:", json_object_get(soft, "cpu-features"));
}

int verb_kvm_info(int argc, char **argv)
{
	bool json = argc == 1 && !strcmp(argv[0], "--json"), help = argc == 1 && !strcmp(argv[0], "--help");
	json_t *dev, *soft, *all;

	if (help) {
		puts("Usage: lodge kvm-info [--json]\n\nWhat /dev/kvm is on this host and what Lodge's own implementation offers.");
		return 0;
	}
	if (argc && !json)
		return fprintf(stderr, "lodge: kvm-info: '%s' is no option; usage: lodge kvm-info [--json]\n", argv[0]), 2;
	dev = probe_device();
	soft = probe_softkvm();
	if (json) {
		all = json_pack("{s:O,s:O}", "dev-kvm", dev, "softkvm", soft);
		json_dumpf(all, stdout, JSON_INDENT(2));
		puts("");
		json_decref(all);
	} else {
		print_words(dev, soft);
	}
	json_decref(dev);
	json_decref(soft);
	return 0;
}
