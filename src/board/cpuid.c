/*
 * What CPU the guest sees: the provider's KVM_GET_SUPPORTED_CPUID, narrowed by the model, changed by
 * +feature and -feature, with topology and APIC ids filled in for each vCPU.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "board/internal.h"

enum { EAX, EBX, ECX, EDX };
#define MAX_ENTRIES 256

struct cpuid { struct kvm_cpuid2 h; struct kvm_cpuid_entry2 e[MAX_ENTRIES]; };

struct feature { const char *name; uint32_t leaf, sub; uint8_t reg, bit; };

#define F1C(n, b) { n, 1, 0, ECX, b }
#define F1D(n, b) { n, 1, 0, EDX, b }
#define F7B(n, b) { n, 7, 0, EBX, b }
#define F7C(n, b) { n, 7, 0, ECX, b }
#define F7D(n, b) { n, 7, 0, EDX, b }
#define F71(n, b) { n, 7, 1, EAX, b }
#define FXA(n, b) { n, 0xd, 1, EAX, b }
#define F8C(n, b) { n, 0x80000001, 0, ECX, b }
#define F8D(n, b) { n, 0x80000001, 0, EDX, b }
#define FAB(n, b) { n, 0x80000008, 0, EBX, b }
#define F8P(n, b) { n, 0x80000007, 0, EDX, b }
#define FKV(n, b) { n, 0x40000001, 0, EAX, b }

static const struct feature features[] = {
	F1D("fpu", 0), F1D("vme", 1), F1D("de", 2), F1D("pse", 3), F1D("tsc", 4), F1D("msr", 5), F1D("pae", 6),
	F1D("mce", 7), F1D("cx8", 8), F1D("apic", 9), F1D("sep", 11), F1D("mtrr", 12), F1D("pge", 13),
	F1D("mca", 14), F1D("cmov", 15), F1D("pat", 16), F1D("pse36", 17), F1D("clflush", 19), F1D("mmx", 23),
	F1D("fxsr", 24), F1D("sse", 25), F1D("sse2", 26), F1D("ss", 27), F1D("ht", 28),
	F1C("sse3", 0), F1C("pni", 0), F1C("pclmulqdq", 1), F1C("monitor", 3), F1C("vmx", 5), F1C("ssse3", 9),
	F1C("fma", 12), F1C("cx16", 13), F1C("pcid", 17), F1C("sse4.1", 19), F1C("sse4_1", 19), F1C("sse4.2", 20),
	F1C("sse4_2", 20), F1C("x2apic", 21), F1C("movbe", 22), F1C("popcnt", 23), F1C("tsc-deadline", 24),
	F1C("aes", 25), F1C("xsave", 26), F1C("osxsave", 27), F1C("avx", 28), F1C("f16c", 29), F1C("rdrand", 30),
	F1C("hypervisor", 31),
	F7B("fsgsbase", 0), F7B("tsc-adjust", 1), F7B("bmi1", 3), F7B("hle", 4), F7B("avx2", 5), F7B("smep", 7),
	F7B("bmi2", 8), F7B("erms", 9), F7B("invpcid", 10), F7B("rtm", 11), F7B("avx512f", 16),
	F7B("avx512dq", 17), F7B("rdseed", 18), F7B("adx", 19), F7B("smap", 20), F7B("avx512ifma", 21),
	F7B("clflushopt", 23), F7B("clwb", 24), F7B("avx512cd", 28), F7B("sha-ni", 29), F7B("avx512bw", 30),
	F7B("avx512vl", 31),
	F7C("avx512vbmi", 1), F7C("umip", 2), F7C("pku", 3), F7C("ospke", 4), F7C("waitpkg", 5),
	F7C("avx512vbmi2", 6), F7C("gfni", 8), F7C("vaes", 9), F7C("vpclmulqdq", 10), F7C("avx512vnni", 11),
	F7C("avx512bitalg", 12), F7C("avx512-vpopcntdq", 14), F7C("la57", 16), F7C("rdpid", 22),
	F7C("bus-lock-detect", 24), F7C("cldemote", 25), F7C("movdiri", 27), F7C("movdir64b", 28),
	F7D("fsrm", 4), F7D("avx512-vp2intersect", 8), F7D("md-clear", 10), F7D("serialize", 14),
	F7D("tsx-ldtrk", 16), F7D("amx-bf16", 22), F7D("avx512-fp16", 23), F7D("amx-tile", 24), F7D("amx-int8", 25),
	F7D("spec-ctrl", 26), F7D("stibp", 27), F7D("arch-capabilities", 29), F7D("ssbd", 31),
	F71("avx-vnni", 4), F71("avx512-bf16", 5), F71("fzrm", 10), F71("fsrs", 11), F71("fsrc", 12),
	FXA("xsaveopt", 0), FXA("xsavec", 1), FXA("xgetbv1", 2), FXA("xsaves", 3), FXA("xfd", 4),
	F8D("syscall", 11), F8D("nx", 20), F8D("mmxext", 22), F8D("fxsr-opt", 25), F8D("pdpe1gb", 26),
	F8D("rdtscp", 27), F8D("lm", 29), F8D("3dnowext", 30), F8D("3dnow", 31),
	F8C("lahf-lm", 0), F8C("lahf_lm", 0), F8C("cmp-legacy", 1), F8C("svm", 2), F8C("extapic", 3),
	F8C("cr8legacy", 4), F8C("abm", 5), F8C("lzcnt", 5), F8C("sse4a", 6), F8C("misalignsse", 7),
	F8C("3dnowprefetch", 8), F8C("osvw", 9), F8C("xop", 11), F8C("fma4", 16), F8C("tbm", 21),
	F8C("topoext", 22), F8C("perfctr-core", 23),
	F8P("invtsc", 8),
	FAB("clzero", 0), FAB("xsaveerptr", 2), FAB("wbnoinvd", 9), FAB("ibpb", 12), FAB("ibrs", 14),
	FAB("amd-stibp", 15), FAB("amd-ssbd", 24), FAB("virt-ssbd", 25),
	FKV("kvmclock", 3), FKV("kvm-nopiodelay", 1), FKV("kvm-asyncpf", 4), FKV("kvm-steal-time", 5),
	FKV("kvm-pv-eoi", 6), FKV("kvm-pv-unhalt", 7), FKV("kvm-pv-tlb-flush", 9), FKV("kvm-pv-ipi", 11),
	FKV("kvm-poll-control", 12), FKV("kvm-pv-sched-yield", 13), FKV("kvmclock-stable-bit", 24),
};

/* Named models are lists of what they add to the one before; the psABI's levels for v2 to v4. */
#define BASE "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 " \
	"ht syscall nx lm x2apic tsc-deadline hypervisor pni cx16 rdtscp kvmclock kvm-nopiodelay kvm-steal-time "   \
	"kvm-pv-eoi kvm-pv-ipi kvm-pv-tlb-flush kvmclock-stable-bit kvm-asyncpf kvm-pv-unhalt"
#define V2 " cx16 lahf-lm popcnt ssse3 sse4.1 sse4.2"
#define V3 " avx avx2 bmi1 bmi2 f16c fma lzcnt movbe xsave xsaveopt xgetbv1 osxsave fsgsbase"
#define V4 " avx512f avx512bw avx512cd avx512dq avx512vl"

static const struct { const char *name, *list; } models[] = {
	{ "host", NULL }, { "max", NULL },
	{ "qemu64", BASE " svm lahf-lm cr8legacy abm sse4a 3dnowprefetch" },
	{ "kvm64", BASE },
	{ "x86-64-v2", BASE V2 }, { "x86-64-v3", BASE V2 V3 }, { "x86-64-v4", BASE V2 V3 V4 },
};

const char *cpu_model_at(unsigned i)
{
	return i < ARRAY_SIZE(models) ? models[i].name : NULL;
}

const char *cpu_feature_at(unsigned i)
{
	return i < ARRAY_SIZE(features) ? features[i].name : NULL;
}

static uint32_t *reg_of(struct kvm_cpuid_entry2 *e, int reg)
{
	return reg == EAX ? &e->eax : reg == EBX ? &e->ebx : reg == ECX ? &e->ecx : &e->edx;
}

static struct kvm_cpuid_entry2 *find(struct cpuid *c, uint32_t leaf, uint32_t sub)
{
	for (unsigned i = 0; i < c->h.nent; i++)
		if (c->e[i].function == leaf &&
		    (!(c->e[i].flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || c->e[i].index == sub))
			return &c->e[i];
	return NULL;
}

static struct kvm_cpuid_entry2 *find_or_add(struct cpuid *c, uint32_t leaf, uint32_t sub, bool indexed)
{
	struct kvm_cpuid_entry2 *e = find(c, leaf, sub);

	if (e || c->h.nent == MAX_ENTRIES)
		return e;
	e = &c->e[c->h.nent++];
	*e = (struct kvm_cpuid_entry2){ .function = leaf, .index = sub,
					.flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0 };
	return e;
}

static void remove_leaf(struct cpuid *c, uint32_t leaf)
{
	unsigned n = 0;

	for (unsigned i = 0; i < c->h.nent; i++)
		if (c->e[i].function != leaf)
			c->e[n++] = c->e[i];
	c->h.nent = n;
}

/* QEMU takes '_' for '-' in names. */
static bool same_name(const char *a, const char *b, size_t len)
{
	for (size_t i = 0; i < len; i++)
		if (a[i] != b[i] && !((a[i] == '-' || a[i] == '_') && (b[i] == '-' || b[i] == '_')))
			return false;
	return !a[len];
}

static const struct feature *feature_find(const char *s, size_t len)
{
	for (unsigned i = 0; i < ARRAY_SIZE(features); i++)
		if (same_name(features[i].name, s, len))
			return &features[i];
	return NULL;
}

static bool in_list(const char *list, const struct feature *f)
{
	while (*list) {
		size_t len = strcspn(list, " ");
		const struct feature *o = feature_find(list, len);

		if (o && o->leaf == f->leaf && o->sub == f->sub && o->reg == f->reg && o->bit == f->bit)
			return true;
		list += len + (list[len] == ' ');
	}
	return false;
}

/* Clear every feature in the table's words that the model does not list. */
static void apply_model(struct cpuid *c, const char *list)
{
	for (unsigned i = 0; i < c->h.nent; i++)
		for (int reg = EAX; reg <= EDX; reg++) {
			uint32_t keep = 0;
			bool word = false;

			for (unsigned k = 0; k < ARRAY_SIZE(features); k++) {
				const struct feature *f = &features[k];

				if (f->leaf != c->e[i].function || f->sub != c->e[i].index || f->reg != reg)
					continue;
				word = true;
				if (in_list(list, f))
					keep |= 1u << f->bit;
			}
			if (word && c->e[i].function != 0x80000008)
				*reg_of(&c->e[i], reg) &= keep;
		}
}

/* A feature that the guest should have and the provider lacks. */
static int lacking(struct machine *m, const char *s, size_t len, struct err *err)
{
	if (m->cpu_enforce)
		return err_set(err, -ENOTSUP, "-cpu: %s cannot provide '%.*s', and enforce=on", kvm_provider_name(m->kvm), (int)len, s);
	if (m->cpu_check)
		log_warn("-cpu: %s cannot provide '%.*s'", kvm_provider_name(m->kvm), (int)len, s);
	return 0;
}

/* With enforce a model is more than a wish, too. */
static int check_model(struct machine *m, const struct cpuid *all, const char *list, struct err *err)
{
	for (size_t len; m->cpu_enforce && *list; list += len + (list[len] == ' ')) {
		len = strcspn(list, " ");
		const struct feature *f = feature_find(list, len);
		struct kvm_cpuid_entry2 *e = f ? find((struct cpuid *)all, f->leaf, f->sub) : NULL;
		int r = !f || (e && *reg_of(e, f->reg) >> f->bit & 1) ? 0 : lacking(m, list, len, err);

		if (r)
			return r;
	}
	return 0;
}

static int apply_feature(struct machine *m, struct cpuid *c, const struct cpuid *all, const char *s, size_t len, bool on,
			 struct err *err)
{
	const struct feature *f = feature_find(s, len);
	struct kvm_cpuid_entry2 *e, *host;

	if (!f)
		return err_set(err, -EINVAL, "-cpu: unknown feature '%.*s' (see -cpu help)", (int)len, s);
	host = find((struct cpuid *)all, f->leaf, f->sub);
	if (on && !(host && (*reg_of(host, f->reg) >> f->bit & 1))) {
		return lacking(m, s, len, err);
	}
	e = find(c, f->leaf, f->sub);
	if (e)
		*reg_of(e, f->reg) = (*reg_of(e, f->reg) & ~(1u << f->bit)) | (uint32_t)on << f->bit;
	return 0;
}

/* check and enforce say what to do about the other items, so they are looked for before those. */
static void find_knobs(struct machine *m, const char *s)
{
	static const struct { const char *text; bool enforce, on; } knobs[] = {
		{ "check", false, true }, { "check=on", false, true }, { "check=off", false, false },
		{ "enforce", true, true }, { "enforce=on", true, true }, { "enforce=off", true, false },
	};

	m->cpu_check = true;
	m->cpu_enforce = false;
	for (size_t len = 0; *s; s += len + (s[len] == ',')) {
		len = strcspn(s, ",");
		for (unsigned i = 0; i < ARRAY_SIZE(knobs); i++)
			if (same_name(knobs[i].text, s, len))
				*(knobs[i].enforce ? &m->cpu_enforce : &m->cpu_check) = knobs[i].on;
	}
}

/* QEMU's words for what is so anyway: the address width and the caches are the host's, and all features are there. */
static const char *const fixed[] = { "host-phys-bits", "host-phys-bits=on", "host-cache-info", "host-cache-info=on", "migratable=off",
				     "check", "check=on", "check=off", "enforce", "enforce=on", "enforce=off" };

/* One item after the model: +x, -x, x, x=on, x=off. */
static int apply_item(struct machine *m, struct cpuid *c, const struct cpuid *all, const char *s, size_t len,
		      struct err *err)
{
	const char *eq = memchr(s, '=', len);
	size_t n = eq ? (size_t)(eq - s) : len, vlen = eq ? len - n - 1 : 0;
	bool on = true;

	if (!n)
		return err_set(err, -EINVAL, "-cpu: empty feature name");
	if (*s == '+' || *s == '-') {
		if (eq)
			return err_set(err, -EINVAL, "-cpu: '%.*s': either +name or name=on", (int)len, s);
		return apply_feature(m, c, all, s + 1, len - 1, *s == '+', err);
	}
	for (unsigned i = 0; i < ARRAY_SIZE(fixed); i++)
		if (same_name(fixed[i], s, len))
			return 0;
	if (same_name("migratable", s, len) || same_name("migratable=on", s, len))      /* the rate of the next host's TSC is another */
		return apply_feature(m, c, all, "invtsc", 6, false, err);
	if (eq && ((vlen == 3 && !memcmp(eq + 1, "off", 3)) || (vlen == 2 && !memcmp(eq + 1, "no", 2))))
		on = false;
	else if (eq && !((vlen == 2 && !memcmp(eq + 1, "on", 2)) || (vlen == 3 && !memcmp(eq + 1, "yes", 3))))
		return err_set(err, -EINVAL, "-cpu: '%.*s': on or off expected", (int)len, s);
	return apply_feature(m, c, all, s, n, on, err);
}

static int apply_spec(struct machine *m, struct cpuid *c, struct err *err)
{
	const char *s = m->cfg.cpu_model ? m->cfg.cpu_model : "host";
	size_t len = strcspn(s, ",");
	struct cpuid *all;
	unsigned i;
	int r = 0;

	for (i = 0; i < ARRAY_SIZE(models); i++)
		if (strlen(models[i].name) == len && !memcmp(models[i].name, s, len))
			break;
	if (i == ARRAY_SIZE(models))
		return err_set(err, -EINVAL, "-cpu: unknown model '%.*s' (see -cpu help)", (int)len, s);
	all = malloc(sizeof(*all));
	if (!all)
		return err_set(err, -ENOMEM, "no memory for CPUID");
	*all = *c;
	find_knobs(m, s + len);
	if (models[i].list) {
		r = check_model(m, all, models[i].list, err);
		apply_model(c, models[i].list);
	}
	for (s += len; *s == ',' && !r; s += len) {
		len = strcspn(++s, ",");
		r = apply_item(m, c, all, s, len, err);
	}
	free(all);
	return r;
}

int cpuid_topology(const struct machine_config *c, struct topology *t, struct err *err)
{
	unsigned s = c->sockets, co = c->cores, th = c->threads;

	if (s > 64 || co > 64 || th > 64)
		return err_set(err, -ERANGE, "CPU topology: at most 64 sockets, cores or threads");
	if (!th)
		th = s && co ? c->cpus / (s * co) : 1;
	if (!co)
		co = s && th ? c->cpus / (s * th) : th ? c->cpus / th : 0;
	if (!s)
		s = co && th ? c->cpus / (co * th) : 0;
	if ((uint64_t)s * co * th != c->cpus)
		return err_set(err, -EINVAL, "CPU topology: %u sockets, %u cores and %u threads do not make %u vCPUs", s,
			       co, th, c->cpus);
	*t = (struct topology){ s, co, th };
	return 0;
}

static unsigned bits_for(unsigned n)
{
	unsigned b = 0;

	while ((1u << b) < n)
		b++;
	return b;
}

/* Levels of leaves 0xb and 0x1f: threads of a core, then logical CPUs of a package. */
static void topo_leaf(struct cpuid *c, uint32_t leaf, const struct topology *t, unsigned id)
{
	unsigned tb = bits_for(t->threads), pb = tb + bits_for(t->cores);
	const uint32_t lv[3][3] = { { tb, t->threads, 1 << 8 }, { pb, t->threads * t->cores, 2 << 8 }, { 0, 0, 0 } };

	remove_leaf(c, leaf);
	for (unsigned i = 0; i < 3; i++) {
		struct kvm_cpuid_entry2 *e = find_or_add(c, leaf, i, true);

		if (!e)
			return;
		e->eax = lv[i][0];
		e->ebx = lv[i][1];
		e->ecx = lv[i][2] | i;
		e->edx = id;
	}
}

static void cache_leaves(struct cpuid *c, const struct topology *t)
{
	for (unsigned i = 0; i < c->h.nent; i++) {
		struct kvm_cpuid_entry2 *e = &c->e[i];
		unsigned level = e->eax >> 5 & 7, share = level >= 3 ? t->cores * t->threads : t->threads;

		if ((e->function != 4 && e->function != 0x8000001d) || !(e->eax & 0x1f))
			continue;
		e->eax = (e->eax & 0x3fff) | ((1u << bits_for(share)) - 1) << 14;
		if (e->function == 4)
			e->eax |= ((1u << bits_for(t->cores)) - 1) << 26;
	}
}

static void amd_leaves(struct cpuid *c, const struct topology *t, unsigned id)
{
	unsigned tb = bits_for(t->threads), n = t->cores * t->threads;
	struct kvm_cpuid_entry2 *e = find(c, 0x80000008, 0);

	if (e)
		e->ecx = n > 1 ? (n - 1) | (tb + bits_for(t->cores)) << 12 : 0;
	e = find(c, 0x8000001e, 0);
	if (e) {
		e->eax = id;
		e->ebx = (id >> tb & 0xff & ((1u << bits_for(t->cores)) - 1)) | (t->threads - 1) << 8;
		e->ecx = id >> (tb + bits_for(t->cores)) & 0xff;
	}
}

static void fill_vcpu(struct machine *m, struct cpuid *c, const struct topology *t, unsigned id)
{
	unsigned logical = 1u << (bits_for(t->threads) + bits_for(t->cores));
	struct kvm_cpuid_entry2 *e = find(c, 1, 0), *max = find(c, 0, 0), *amd = find(c, 0x80000001, 0);

	if (e) {
		e->ebx = (e->ebx & 0xffff) | MIN(logical, 255u) << 16 | id << 24;
		e->edx = (e->edx & ~(1u << 28)) | (t->cores * t->threads > 1 ? 1u << 28 : 0);
	}
	if (amd && max && max->ebx == 0x68747541)       /* "Auth": leaf 0x80000001's CmpLegacy is AMD's */
		amd->ecx = (amd->ecx & ~2u) | (t->cores * t->threads > 1 ? 2 : 0);
	if (max && max->eax >= 0xb)
		topo_leaf(c, 0xb, t, id);
	if (max && max->eax >= 0x1f)
		topo_leaf(c, 0x1f, t, id);
	cache_leaves(c, t);
	amd_leaves(c, t, id);
}

/* Bits that KVM_GET_SUPPORTED_CPUID leaves to the caller: a hypervisor is there, the APIC's deadline timer. */
static void add_implied(struct machine *m, struct cpuid *c)
{
	struct kvm_cpuid_entry2 *e = find(c, 1, 0);

	if (!e)
		return;
	e->ecx |= 1u << 31;
	e->ecx |= 1u << 21;
	e->edx |= 1u << 28;     /* until the topology decides */
	if (kvm_check_extension(m->kvm, KVM_CAP_TSC_DEADLINE_TIMER) > 0)
		e->ecx |= 1u << 24;
}

/*
 * vCPU n has APIC id n. Sizes that are no power of two would need gaps in the ids when there are
 * several packages: such a machine shows its CPUs as single-core packages.
 */
static struct topology effective(const struct topology *t)
{
	bool pow2 = (t->cores & (t->cores - 1)) == 0 && (t->threads & (t->threads - 1)) == 0;
	bool ok = pow2 || (t->sockets == 1 && (t->threads & (t->threads - 1)) == 0);

	if (ok)
		return *t;
	log_warn("CPU topology %u:%u:%u needs APIC ids with gaps; the guest sees %u packages", t->sockets, t->cores,
		 t->threads, t->sockets * t->cores * t->threads);
	return (struct topology){ t->sockets * t->cores * t->threads, 1, 1 };
}

int machine_set_cpuid(struct machine *m, struct err *err)
{
	struct cpuid *base = calloc(2, sizeof(*base)), *own = base + 1;
	struct topology t = effective(&m->topo);
	int r;

	if (!base)
		return err_set(err, -ENOMEM, "no memory for CPUID");
	base->h.nent = MAX_ENTRIES;
	r = kvm_ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, base);
	if (r < 0)
		r = err_set_errno(err, r, "KVM_GET_SUPPORTED_CPUID");
	if (r >= 0) {
		base->h.nent = MIN(base->h.nent, (uint32_t)MAX_ENTRIES);
		add_implied(m, base);
		r = apply_spec(m, base, err);
	}
	for (unsigned i = 0; i < m->cfg.cpus && r >= 0; i++) {
		memcpy(own, base, sizeof(*own));
		fill_vcpu(m, own, &t, i);
		r = kvm_vcpu_ioctl(vcpus_get(m->vcpus, i), KVM_SET_CPUID2, own);
		if (r < 0)
			r = err_set_errno(err, r, "vCPU %u: KVM_SET_CPUID2", i);
	}
	free(base);
	return r < 0 ? r : 0;
}
