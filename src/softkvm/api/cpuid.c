/* The guest's CPUID table (KVM_SET_CPUID2), the CPUID instruction, and what follows for the engine. */
#include <asm/kvm_para.h>
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "softkvm/api/api.h"
#include "softkvm/mmu.h"

static const struct kvm_cpuid_entry2 *find(const struct cpu_features *f, uint32_t leaf, uint32_t sub)
{
	for (unsigned i = 0; i < f->n; i++) {
		const struct kvm_cpuid_entry2 *e = &f->e[i];

		if (e->function == leaf && (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == sub))
			return e;
	}
	return NULL;
}

static void derive(struct cpu_features *f)
{
	const struct kvm_cpuid_entry2 *e;

	f->phys_bits = 36;
	f->lin_bits = 48;
	if ((e = find(f, 0, 0)))
		f->amd = e->ebx == 0x68747541 || e->ebx == 0x6f677948;
	if ((e = find(f, 1, 0))) {
		f->f1_ecx = e->ecx;
		f->f1_edx = e->edx;
	}
	if ((e = find(f, 7, 0))) {
		f->f7_ebx = e->ebx;
		f->f7_ecx = e->ecx;
		f->f7_edx = e->edx;
	}
	if ((e = find(f, 7, 1)))
		f->f7_1_eax = e->eax;
	if ((e = find(f, 0xd, 0)))
		f->xcr0_mask = (e->eax | (uint64_t)e->edx << 32) & xsave_supported();
	if ((e = find(f, 0xd, 1)))
		f->fd_1_eax = e->eax;
	if ((e = find(f, 0x80000001, 0))) {
		f->f80000001_ecx = e->ecx;
		f->f80000001_edx = e->edx;
	}
	if ((e = find(f, 0x80000007, 0)))
		f->f80000007_edx = e->edx;
	if ((e = find(f, 0x80000008, 0))) {
		if ((e->eax & 0xff) >= 32 && (e->eax & 0xff) <= 52)
			f->phys_bits = e->eax & 0xff;
		f->f80000008_ebx = e->ebx;
	}
	if (f->f7_ecx & 1u << 16)
		f->lin_bits = 57;
	/* The signature may be moved when Hyper-V leaves come first. */
	for (uint32_t base = KVM_CPUID_SIGNATURE; base < 0x40010000; base += 0x100)
		if ((e = find(f, base, 0)) && e->ebx == 0x4b4d564b && e->ecx == 0x564b4d56) {
			if ((e = find(f, base + 1, 0)))
				f->kvm_features = e->eax;
			break;
		}
}

/* The supported table as features: facts of the host, built once. */
static struct kvm_cpuid_entry2 host_entries[128];
static struct cpu_features host = { .e = host_entries };

static void host_once(void)
{
	int n = cpuid_supported(host_entries, ARRAY_SIZE(host_entries), false);

	host.n = n > 0 ? (unsigned)n : 0;
	derive(&host);
}

/* No KVM_SET_CPUID2 yet: CPUID reads as zero, but instructions are those of the host, as on hardware. */
void cpuid_none(struct cpu *c)
{
	struct cpu_features *f = calloc(1, sizeof *f);

	if (!f)
		return;
	derive(f);
	c->feat = f;
}

const struct cpu_features *cpuid_host_features(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, host_once);
	return &host;
}

void cpuid_free(struct cpu *c)
{
	struct cpu_features *f = (struct cpu_features *)c->feat;

	if (f)
		free(f->e);
	free(f);
	c->feat = NULL;
}

int cpuid_set(struct cpu *c, const struct kvm_cpuid_entry2 *e, unsigned n)
{
	struct cpu_features *f = calloc(1, sizeof *f);
	const struct kvm_cpuid_entry2 *a;

	if (f && n)
		f->e = calloc(n, sizeof *e);
	if (!f || (n && !f->e)) {
		free(f);
		return -ENOMEM;
	}
	if (n)
		memcpy(f->e, e, n * sizeof *e);
	f->n = n;
	if ((a = find(f, 0x80000008, 0)) && a->eax >> 8 & 0xff && (a->eax >> 8 & 0xff) != 48 && (a->eax >> 8 & 0xff) != 57) {
		free(f->e);
		free(f);
		return -EINVAL;
	}
	derive(f);
	cpuid_free(c);
	c->feat = f;
	mmu_flush_all(c);
	cpu_request(c, REQ_BLOCKS);     /* what was decoded knows the instructions that there were */
	return 0;
}

/* A leaf above the maximum of its class: Intel answers with the highest basic leaf, AMD with zeros. */
static const struct kvm_cpuid_entry2 *out_of_range(const struct cpu_features *f, uint32_t leaf, uint32_t sub)
{
	const struct kvm_cpuid_entry2 *basic = find(f, 0, 0), *class = basic;

	if (!basic || f->amd)
		return NULL;
	if (leaf >= 0x40000000 && leaf <= 0x4fffffff)
		class = find(f, leaf & 0xffffff00, 0);
	else if (leaf >= 0xc0000000)
		class = find(f, 0xc0000000, 0);
	else if (leaf & 0x80000000)
		class = find(f, 0x80000000, 0);
	if (class && leaf <= class->eax)
		return NULL;
	return find(f, basic->eax, sub);
}

static void fix_up(struct cpu *c, const struct kvm_cpuid_entry2 *e, uint32_t sub, uint32_t out[4])
{
	uint32_t leaf = e->function;

	if (leaf == 1) {
		out[2] = (out[2] & ~(1u << 27)) | (c->cr4 & CR4_OSXSAVE ? 1u << 27 : 0);
		if (!(c->msr.apic_base & 0x800) && (c->lapic || c->msr.apic_base))
			out[3] &= ~(1u << 9);
		if (c->vm->policy.quirks_off & KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
			out[2] = (out[2] & ~8u) | (c->msr.misc_enable & BIT(18) ? 8u : 0);
	} else if (leaf == 7 && !sub) {
		out[2] = (out[2] & ~(1u << 4)) | (c->cr4 & CR4_PKE ? 1u << 4 : 0);
	} else if (leaf == 0xd && !sub) {
		out[1] = xsave_size(c->xcr0);
	} else if (leaf == 0xd && sub == 1 && out[0] & 0xa) {
		out[1] = xsave_size_compact(c->xcr0 | c->msr.xss);
	}
}

void cpuid_runtime(struct cpu *c, struct kvm_cpuid_entry2 *e)
{
	uint32_t r[4] = { e->eax, e->ebx, e->ecx, e->edx };

	fix_up(c, e, e->index, r);
	e->eax = r[0];
	e->ebx = r[1];
	e->ecx = r[2];
	e->edx = r[3];
}

void cpuid_query(struct cpu *c, uint32_t leaf, uint32_t sub, uint32_t out[4])
{
	const struct cpu_features *f = c->feat;
	const struct kvm_cpuid_entry2 *e = find(f, leaf, sub), *b;

	if (!e)
		e = out_of_range(f, leaf, sub);
	out[0] = out[1] = out[2] = out[3] = 0;
	if (e) {
		out[0] = e->eax;
		out[1] = e->ebx;
		out[2] = e->ecx;
		out[3] = e->edx;
		fix_up(c, e, e->function == leaf ? sub : e->index, out);
	} else if ((leaf == 0xb || leaf == 0x1f) && (b = find(f, leaf, 1))) {
		out[2] = sub & 0xff;
		out[3] = b->edx;
	}
}
