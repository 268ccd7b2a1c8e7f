/*
 * KVM_GET_SUPPORTED_CPUID: what the engine can offer on this host. Unprivileged instructions are
 * offered when the host CPU has them (it executes or at least defines them) and the decoder knows
 * them; what only the engine emulates (paging modes, APIC modes) always. The deadline timer is not among them: it comes
 * with KVM_CREATE_IRQCHIP, which this list cannot know, so KVM_CAP_TSC_DEADLINE_TIMER tells of it (api.rst 4.46).
 */
#include <asm/kvm_para.h>
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "softkvm/api/api.h"

#define B(n) (1u << (n))

/* Masks of what may be passed from the host, and what the engine always has. SDM vol. 2 CPUID, APM vol. 3 app. E. */
#define F1_ECX_HOST (B(0) | B(1) | B(9) | B(12) | B(13) | B(19) | B(20) | B(22) | B(23) | B(25) | B(26) | B(28) | B(29) | B(30))
#define F1_ECX_OWN (B(17) /* PCID */ | B(21) /* x2APIC */ | B(31) /* hypervisor */)
#define F1_EDX_HOST (B(0) | B(15) | B(19) | B(23) | B(24) | B(25) | B(26))
#define F1_EDX_OWN (B(1) | B(2) | B(3) | B(4) | B(5) | B(6) | B(7) | B(8) | B(9) | B(11) | B(12) | B(13) | B(14) | B(16) | B(17))
#define F7_EBX_HOST (B(3) | B(5) | B(6) | B(8) | B(9) | B(13) | B(16) | B(17) | B(18) | B(19) | B(21) | B(23) | B(24) | \
		     B(28) | B(29) | B(30) | B(31))
#define F7_EBX_OWN (B(0) /* FSGSBASE */ | B(1) /* TSC_ADJUST */ | B(7) /* SMEP */ | B(10) /* INVPCID */ | B(20) /* SMAP */)
#define F7_ECX_HOST (B(1) | B(6) | B(8) | B(9) | B(10) | B(11) | B(12) | B(14) | B(22) | B(27) | B(28))
#define F7_ECX_OWN (B(2) /* UMIP */ | B(16) /* LA57 */ | B(22) /* RDPID */)
#define F7_EDX_HOST (B(4) | B(8) | B(14) | B(23))
#define F7_EDX_OWN (B(26) /* IBRS, IBPB */ | B(27) /* STIBP */ | B(29) /* ARCH_CAPABILITIES */ | B(31) /* SSBD */)
#define F7_1_EAX_HOST (B(4) /* AVX-VNNI */ | B(5) /* BF16 */ | B(10) | B(11) | B(12) /* fast short REP */)
#define E1_ECX_HOST (B(0) | B(1) | B(5) | B(6) | B(7) | B(8) | B(22))
#define E1_EDX_COMMON (F1_EDX_HOST | F1_EDX_OWN)
#define E1_EDX_AMD_COPY (E1_EDX_COMMON & 0x0183f3ff)
#define E1_EDX_OWN (B(11) /* SYSCALL */ | B(20) /* NX */ | B(26) /* 1G pages */ | B(27) /* RDTSCP */ | B(29) /* LM */)
#define E8_EBX_AMD (B(12) | B(14) | B(15) | B(16) /* IBRS always on is best */ | B(24) | B(26) | B(29) /* no BTC */)
#define KVM_FEATURES (1u << KVM_FEATURE_CLOCKSOURCE | 1u << KVM_FEATURE_NOP_IO_DELAY | 1u << KVM_FEATURE_CLOCKSOURCE2 | \
		      1u << KVM_FEATURE_STEAL_TIME | 1u << KVM_FEATURE_POLL_CONTROL | 1u << KVM_FEATURE_CLOCKSOURCE_STABLE_BIT | 1u << KVM_FEATURE_PV_SCHED_YIELD)

struct list { struct kvm_cpuid_entry2 e[128]; unsigned n; };

static struct kvm_cpuid_entry2 *add(struct list *l, uint32_t leaf, uint32_t sub, bool indexed)
{
	struct kvm_cpuid_entry2 *e;

	if (l->n == ARRAY_SIZE(l->e))
		return &l->e[l->n - 1];
	e = &l->e[l->n++];
	*e = (struct kvm_cpuid_entry2){ .function = leaf, .index = sub, .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0 };
	return e;
}

static struct kvm_cpuid_entry2 *add_host(struct list *l, uint32_t leaf, uint32_t sub, bool indexed)
{
	struct kvm_cpuid_entry2 *e = add(l, leaf, sub, indexed);

	__cpuid_count(leaf, sub, e->eax, e->ebx, e->ecx, e->edx);
	return e;
}

static void add_basic(struct list *l)
{
	struct kvm_cpuid_entry2 *e = add_host(l, 1, 0, false);

	e->ebx &= 0xff00;
	e->ecx = (e->ecx & F1_ECX_HOST) | F1_ECX_OWN;
	e->edx = (e->edx & F1_EDX_HOST) | F1_EDX_OWN;
}

/* Deterministic cache parameters: Intel's leaf 4, AMD's 8000001d; ends with a type of 0. */
static void add_caches(struct list *l, uint32_t leaf)
{
	for (unsigned i = 0; i < 8; i++)
		if (!(add_host(l, leaf, i, true)->eax & 0x1f))
			break;
}

static _Atomic bool host_state_only;    /* a property of the process, as the clients in it */

void softkvm_host_state_only(int on)
{
	atomic_store(&host_state_only, on != 0);
}

static uint64_t offered_xcr0(void)
{
	uint32_t a = 0, b, c, d = 0;

	if (!atomic_load(&host_state_only))
		return xsave_supported();
	__get_cpuid_count(0xd, 0, &a, &b, &c, &d);
	return xsave_supported() & ((uint64_t)d << 32 | a);
}

static void add_structured(struct list *l, uint64_t xcr0)
{
	struct kvm_cpuid_entry2 *e = add_host(l, 7, 0, true), *s;
	bool sub1 = e->eax >= 1;

	e->ebx = (e->ebx & F7_EBX_HOST) | F7_EBX_OWN;
	e->ecx = (e->ecx & F7_ECX_HOST) | F7_ECX_OWN | (xcr0 & XCR0_PKRU ? B(3) : 0);
	e->edx = (e->edx & F7_EDX_HOST) | F7_EDX_OWN;
	if (!(xcr0 & XCR0_ZMM_HI256)) {
		e->ebx &= ~(B(16) | B(17) | B(21) | B(28) | B(30) | B(31));
		e->ecx &= ~(B(1) | B(6) | B(11) | B(12) | B(14));
		e->edx &= ~(B(8) | B(23));
	}
	e->eax = sub1;
	if (!sub1)
		return;
	s = add_host(l, 7, 1, true);
	s->eax &= F7_1_EAX_HOST & (xcr0 & XCR0_ZMM_HI256 ? ~0u : ~B(5));
	s->ebx = s->ecx = s->edx = 0;
}

static void add_xsave(struct list *l, uint64_t xcr0)
{
	struct kvm_cpuid_entry2 *e = add(l, 0xd, 0, true);
	uint32_t off, size;

	e->eax = (uint32_t)xcr0;
	e->edx = (uint32_t)(xcr0 >> 32);
	e->ebx = e->ecx = xsave_size(xcr0);
	e = add_host(l, 0xd, 1, true);
	e->eax &= 0xf;
	e->ebx = xsave_size_compact(xcr0);
	e->ecx = e->edx = 0;
	for (unsigned n = 2; n < 63; n++) {
		if (!(xcr0 >> n & 1) || !xsave_component(n, &off, &size))
			continue;
		e = add_host(l, 0xd, n, true);
		e->eax = size;
		e->ebx = off;
		e->ecx &= 2;
		e->edx = 0;
	}
}

static void add_kvm(struct list *l)
{
	struct kvm_cpuid_entry2 *e = add(l, KVM_CPUID_SIGNATURE, 0, false);

	e->eax = KVM_CPUID_FEATURES;
	memcpy(&e->ebx, "KVMK", 4);
	memcpy(&e->ecx, "VMKV", 4);
	memcpy(&e->edx, "M\0\0\0", 4);
	add(l, KVM_CPUID_FEATURES, 0, false)->eax = KVM_FEATURES;
}

static void add_extended(struct list *l, bool amd, uint32_t host_max)
{
	uint32_t max = amd ? 0x80000021 : 0x80000008;
	struct kvm_cpuid_entry2 *e = add_host(l, 0x80000000, 0, false);

	e->eax = max;
	e = add_host(l, 0x80000001, 0, false);
	e->ecx = e->ecx & E1_ECX_HOST & (amd ? ~0u : ~B(22));
	e->edx = (e->edx & (amd ? B(22) | B(25) | (E1_EDX_AMD_COPY & F1_EDX_HOST) : 0)) | E1_EDX_OWN |
		(amd ? E1_EDX_AMD_COPY & F1_EDX_OWN : 0);
	for (uint32_t leaf = 0x80000002; leaf <= 0x80000006; leaf++)
		add_host(l, leaf, 0, false);
	add(l, 0x80000007, 0, false)->edx = B(8);       /* invariant TSC */
	e = add_host(l, 0x80000008, 0, false);
	e->eax = (e->eax & 0xff) | 57 << 8;
	e->ebx = (e->ebx & (B(0) | B(2) | B(9))) | (amd ? E8_EBX_AMD : 0);
	e->ecx = e->edx = 0;
	if (!amd)
		return;
	add(l, 0x8000001a, 0, false)->eax = host_max >= 0x8000001a ? 7 : 0;
	if (host_max >= 0x8000001d)
		add_caches(l, 0x8000001d);
	add(l, 0x8000001e, 0, false);
	e = add(l, 0x80000021, 0, false);
	e->eax = B(2) /* LFENCE serialises */ | B(6) /* null selector clears base */ | B(8) /* AutoIBRS */ | B(29) /* no SRSO */;
}

static void build(struct list *l)
{
	uint64_t xcr0 = offered_xcr0();
	unsigned max, ext, b, c, d;
	bool amd;

	__cpuid(0, max, b, c, d);
	/* "Auth", "Hygo": AMD's rules. */
	amd = b == 0x68747541 || b == 0x6f677948;
	__cpuid(0x80000000, ext, b, c, d);
	add_host(l, 0, 0, false)->eax = MIN(MAX(max, 0xdu), 0x1fu);
	add_basic(l);
	if (!amd) {
		add_host(l, 2, 0, false);
		add_caches(l, 4);
	}
	add(l, 6, 0, false)->eax = B(2);                /* ARAT */
	add_structured(l, xcr0);
	add(l, 0xa, 0, false);
	add(l, 0xb, 0, true);
	add(l, 0xb, 1, true)->ecx = 1;
	if (xcr0)
		add_xsave(l, xcr0);
	add_kvm(l);
	add_extended(l, amd, ext);
}

static struct list supported;           /* facts of the host, built once */
static void build_once(void) { build(&supported); }

static void build_emulated(struct list *l)
{
	struct kvm_cpuid_entry2 *e = add(l, 0, 0, false);

	e->eax = 7;
	add(l, 1, 0, false)->ecx = B(3) /* MONITOR */ | B(22) /* MOVBE */;
	add(l, 7, 0, true)->ecx = B(22) /* RDPID */;
}

int cpuid_supported(struct kvm_cpuid_entry2 *e, unsigned max, bool emulated)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct list own = { .n = 0 };
	const struct list *l = &supported;

	pthread_once(&once, build_once);
	if (emulated) {
		build_emulated(&own);
		l = &own;
	}
	if (l->n > max)
		return -E2BIG;
	memcpy(e, l->e, l->n * sizeof *e);
	return (int)l->n;
}
