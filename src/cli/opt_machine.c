/* Options about the machine itself: type, accelerator, CPUs, memory, boot files. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/parse.h"
#include "base/util.h"
#include "cli/options.h"

static int set_accel(struct vm_opts *o, const char *what, const char *list, struct err *err)
{
	/* QEMU's "kvm:tcg": the first that works. With auto in Lodge that is "auto". */
	if (!strcmp(list, "auto") || !strcmp(list, "kvm:tcg") || !strcmp(list, "kvm:soft"))
		o->accel = ACCEL_AUTO;
	else if (!strcmp(list, "kvm"))
		o->accel = ACCEL_KVM;
	else if (!strcmp(list, "soft") || !strcmp(list, "tcg"))
		o->accel = ACCEL_SOFT;
	else if (!strcmp(list, "help"))
		return puts("kvm    Linux KVM (/dev/kvm)\nsoft   softkvm, in user space ('tcg' is taken for it)\nauto   the faster of the two on this host"), OPT_DONE;
	else
		return err_set(err, -EINVAL, "%s: '%s' is no accelerator; use kvm, soft or auto", what, list);
	return 0;
}

static int accel_mode(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	const char *v = keyvals_get(l, "mode");

	if (!v)
		return 0;
	if (!strcmp(v, "interp"))
		o->soft.mode = SOFT_INTERP;
	else if (!strcmp(v, "translate"))
		o->soft.mode = SOFT_TRANSLATE;
	else if (!strcmp(v, "lockstep"))
		o->soft.mode = SOFT_LOCKSTEP;
	else
		return err_set(err, -EINVAL, "-accel mode: '%s' is none of interp, translate, lockstep", v);
	return 0;
}

static int accel_code_memory(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	const char *v = keyvals_get(l, "code-memory");

	if (v && (parse_size(v, 1, &o->soft.code_bytes) || o->soft.code_bytes < 1 << 20 || o->soft.code_bytes > 1 << 30))
		return err_set(err, -EINVAL, "-accel code-memory: '%s' is no size from 1M to 1G", v);
	return 0;
}

/* on, off, or a file for JSON. */
static int accel_stats(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	const char *v = keyvals_get(l, "stats");
	bool on;

	if (!v)
		return 0;
	if (!*v)
		return err_set(err, -EINVAL, "-accel stats: on, off or a file's name");
	if (parse_bool(v, &on)) {
		o->stats_file = vmopts_printf(o, "%s", v);
		on = true;
	} else {
		o->stats = on;
	}
	o->soft.sample = on;
	return 0;
}

static int accel_soft(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	static const char *const keys[] = { "mode", "code-memory", "stats", "perf-map" };
	int ret;

	for (unsigned i = 0; o->accel == ACCEL_KVM && i < ARRAY_SIZE(keys); i++)
		if (keyvals_get(l, keys[i]))
			return err_set(err, -EINVAL, "-accel %s: only softkvm has that; say 'soft'", keys[i]);
	ret = accel_mode(o, l, err);
	if (!ret)
		ret = accel_code_memory(o, l, err);
	if (!ret)
		ret = accel_stats(o, l, err);
	return ret ? ret : keyvals_bool(l, "-accel", "perf-map", &o->soft.perf_map, err);
}

int opt_accel(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-accel", arg, "accel", err);

	if (ret)
		return ret;
	const char *a = keyvals_get(&l, "accel");
	ret = a ? set_accel(o, "-accel", a, err) : err_set(err, -EINVAL, "-accel: name an accelerator: kvm, soft or auto");
	if (!ret)
		ret = accel_soft(o, &l, err);
	if (!ret)
		ret = keyvals_only(&l, "-accel", "thread", "multi", err);
	if (!ret)
		ret = keyvals_only(&l, "-accel", "kernel-irqchip", "on", err);
	if (!ret)
		ret = keyvals_end(&l, "-accel", err);
	keyvals_free(&l);
	return ret;
}

int opt_enable_kvm(struct vm_opts *o, const char *arg, struct err *err)
{
	o->accel = ACCEL_KVM;
	return 0;
}

static int machine_keys(struct vm_opts *o, struct keyvals *l, struct err *err)
{
	/* What the machine does anyway may be said; anything else is an error. */
	static const char *const only[][2] = {
		{ "kernel-irqchip", "on" }, { "usb", "off" }, { "vmport", "off|auto" }, { "smm", "off|auto" },
		{ "hpet", "off" }, { "graphics", "off" }, { "mem-merge", "off" },
		{ "nvdimm", "off" }, { "pic", "on" }, { "pit", "on" }, { "acpi", "on|auto" }, { "i8042", "on" },
		{ "sata", "off" }, { "smbus", "off" }, { "pcspk-audiodev", "" },
	};
	const char *v = keyvals_get(l, "type");

	if (v && strcmp(v, "q35") && strcmp(v, "pc") && strcmp(v, "microvm") && strncmp(v, "pc-q35-", 7))
		return err_set(err, -EINVAL, "-machine: unknown type '%s'; there are q35 (also called pc) and microvm", v);
	if (v)
		o->type = vmopts_printf(o, "%s", !strcmp(v, "microvm") ? v : "q35");
	if ((v = keyvals_get(l, "accel"))) {
		int ret = set_accel(o, "-machine accel", v, err);
		if (ret)
			return ret;
	}
	if ((v = keyvals_get(l, "memory-backend")))
		o->mem_backend = vmopts_printf(o, "%s", v);
	int dump = keyvals_bool(l, "-machine", "dump-guest-core", &o->dump_guest_core, err);
	if (dump)
		return dump;
	for (unsigned i = 0; i < ARRAY_SIZE(only); i++) {
		int ret = keyvals_only(l, "-machine", only[i][0], only[i][1], err);
		if (ret)
			return ret;
	}
	return keyvals_end(l, "-machine", err);
}

int opt_machine(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-machine", arg, "type", err);

	if (ret)
		return ret;
	if (keyvals_wants_help(&l)) {
		puts("Supported machines are:\n"
		     "q35                  PC with PCI Express, ACPI and legacy chips (default; alias pc)\n"
		     "microvm              the same without PCI and ACPI power management");
		ret = OPT_DONE;
	} else {
		ret = machine_keys(o, &l, err);
	}
	keyvals_free(&l);
	return ret;
}

int opt_cpu(struct vm_opts *o, const char *arg, struct err *err)
{
	const char *s;

	if (!strcmp(arg, "help") || !strcmp(arg, "?")) {
		puts("Available CPUs:");
		for (unsigned i = 0; (s = cpu_model_at(i)); i++)
			printf("  %s\n", s);
		puts("\nRecognized features:");
		for (unsigned i = 0; (s = cpu_feature_at(i)); i++)
			printf("%s%s", i % 10 ? " " : i ? "\n  " : "  ", s);
		puts("");
		return OPT_DONE;
	}
	o->cpu_model = vmopts_printf(o, "%s", arg);
	return 0;
}

static int check_topology(struct vm_opts *o, uint64_t cpus, uint64_t s, uint64_t c, uint64_t t, struct err *err)
{
	if (!cpus)
		cpus = (s ? s : 1) * (c ? c : 1) * (t ? t : 1);
	if (cpus < 1 || cpus > 64)
		return err_set(err, -EINVAL, "-smp: %llu CPUs; Lodge has 1 to 64", (unsigned long long)cpus);
	if (s || c || t) {
		uint64_t known = (s ? s : 1) * (c ? c : 1) * (t ? t : 1);

		if (cpus % known || (s && c && t && known != cpus))
			return err_set(err, -EINVAL, "-smp: sockets (%llu) * cores (%llu) * threads (%llu) do not make %llu CPUs",
				       (unsigned long long)s, (unsigned long long)c, (unsigned long long)t,
				       (unsigned long long)cpus);
		/* QEMU fills the first that is missing: sockets, then cores, then threads. */
		if (!s)
			s = cpus / known;
		else if (!c)
			c = cpus / known;
		else if (!t)
			t = cpus / known;
	}
	o->cpus = (unsigned)cpus;
	o->sockets = (unsigned)s;
	o->cores = (unsigned)(s && !c ? 1 : c);
	o->threads = (unsigned)(s && !t ? 1 : t);
	return 0;
}

int opt_smp(struct vm_opts *o, const char *arg, struct err *err)
{
	uint64_t cpus = 0, max = 0, s = 0, c = 0, t = 0;
	struct keyvals l;
	int ret = keyvals_parse(&l, "-smp", arg, "cpus", err);

	if (ret)
		return ret;
	if ((ret = keyvals_u64(&l, "-smp", "cpus", 1, 64, &cpus, err)) ||
	    (ret = keyvals_u64(&l, "-smp", "maxcpus", 1, 64, &max, err)) ||
	    (ret = keyvals_u64(&l, "-smp", "sockets", 1, 64, &s, err)) ||
	    (ret = keyvals_u64(&l, "-smp", "cores", 1, 64, &c, err)) ||
	    (ret = keyvals_u64(&l, "-smp", "threads", 1, 64, &t, err)) ||
	    (ret = keyvals_only(&l, "-smp", "dies", "1", err)) || (ret = keyvals_only(&l, "-smp", "clusters", "1", err)) ||
	    (ret = keyvals_end(&l, "-smp", err)))
		goto out;
	if (!cpus && !s && !c && !t)
		cpus = max;
	ret = check_topology(o, cpus, s, c, t, err);
	if (!ret && max && max != o->cpus)
		ret = err_set(err, -ENOTSUP, "-smp: maxcpus=%llu: CPU hotplug is not supported, maxcpus must equal cpus",
			      (unsigned long long)max);
out:
	keyvals_free(&l);
	return ret;
}

int opt_cpus(struct vm_opts *o, const char *arg, struct err *err)
{
	uint64_t n;

	if (parse_u64(arg, &n) || n < 1 || n > 64)
		return err_set(err, -EINVAL, "--cpus: '%s' is not a number from 1 to 64", arg);
	o->cpus = (unsigned)n;
	return 0;
}

int opt_memory(struct vm_opts *o, const char *arg, struct err *err)
{
	const char *what = o->qemu ? "-m" : "--memory", *v;
	struct keyvals l;
	uint64_t size;
	int ret = keyvals_parse(&l, what, arg, "size", err);

	if (ret)
		return ret;
	v = keyvals_get(&l, "size");
	if (!v || parse_size(v, 1 << 20, &size))
		ret = err_set(err, -EINVAL, "%s: '%s' is no size; write 512M or 2G", what, v ? v : arg);
	else if (size < 1 << 20 || size > 1ull << 40)
		ret = err_set(err, -EINVAL, "%s: %s is out of range; Lodge takes 1M to 1T", what, v);
	else if (size & 4095)
		ret = err_set(err, -EINVAL, "%s: %s is not a multiple of 4K", what, v);
	else if (!(ret = keyvals_only(&l, what, "slots", "0", err)) && (v = keyvals_get(&l, "maxmem"))) {
		uint64_t max;
		if (parse_size(v, 1 << 20, &max) || max != size)
			ret = err_set(err, -ENOTSUP, "%s: maxmem=%s: memory hotplug is not supported", what, v);
	}
	if (!ret)
		ret = keyvals_end(&l, what, err);
	if (!ret)
		o->mem_size = size;
	keyvals_free(&l);
	return ret;
}

static int rtc_date(struct vm_opts *o, const char *base, struct err *err)
{
	struct tm tm = { 0 };
	const char *end = strptime(base, "%Y-%m-%dT%H:%M:%S", &tm);

	if (!end)
		end = strptime(base, "%Y-%m-%d", memset(&tm, 0, sizeof tm));
	if (!end || *end)
		return err_set(err, -EINVAL, "-rtc: base=%s is none of utc, localtime, 2026-01-31, 2026-01-31T23:59:59", base);
	o->rtc_offset = (int64_t)timegm(&tm) - (int64_t)time(NULL);
	return 0;
}

int opt_rtc(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-rtc", arg, "base", err);

	if (ret)
		return ret;
	const char *base = keyvals_get(&l, "base");
	if (base && !strcmp(base, "localtime"))
		o->localtime = true;
	else if (base && strcmp(base, "utc"))
		ret = rtc_date(o, base, err);
	if (!ret)
		ret = keyvals_only(&l, "-rtc", "clock", "host", err);
	if (!ret)
		ret = keyvals_only(&l, "-rtc", "driftfix", "none", err);
	if (!ret)
		ret = keyvals_end(&l, "-rtc", err);
	keyvals_free(&l);
	return ret;
}

int opt_boot(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-boot", arg, "order", err);

	if (ret)
		return ret;
	if (!(ret = keyvals_bool(&l, "-boot", "strict", &o->boot_strict, err)) &&
	    !(ret = keyvals_only(&l, "-boot", "menu", "off", err)) &&
	    !(ret = keyvals_only(&l, "-boot", "order", "c", err)))
		ret = keyvals_end(&l, "-boot", err);
	keyvals_free(&l);
	return ret;
}

int opt_name(struct vm_opts *o, const char *arg, struct err *err)
{
	struct keyvals l;
	int ret = keyvals_parse(&l, "-name", arg, "guest", err);

	if (ret)
		return ret;
	const char *v = keyvals_get(&l, "guest");
	if (v)
		o->name = vmopts_printf(o, "%s", v);
	if (!(ret = keyvals_only(&l, "-name", "debug-threads", "on|off", err)))
		ret = keyvals_end(&l, "-name", err);
	keyvals_free(&l);
	return ret;
}

int opt_uuid(struct vm_opts *o, const char *arg, struct err *err)
{
	unsigned b[16];
	int n = 0;

	if (strlen(arg) != 36 ||
	    sscanf(arg, "%2x%2x%2x%2x-%2x%2x-%2x%2x-%2x%2x-%2x%2x%2x%2x%2x%2x%n", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5],
		   &b[6], &b[7], &b[8], &b[9], &b[10], &b[11], &b[12], &b[13], &b[14], &b[15], &n) != 16 || n != 36)
		return err_set(err, -EINVAL, "-uuid: '%s' is no UUID (like 550e8400-e29b-41d4-a716-446655440000)", arg);
	o->uuid = vmopts_printf(o, "%s", arg);
	return 0;
}

#define SETTER(name, field, value)                                                                 \
	int name(struct vm_opts *o, const char *arg, struct err *err) { o->field = value; return 0; }
SETTER(opt_no_reboot, no_reboot, true)
SETTER(opt_no_shutdown, no_shutdown, true)
SETTER(opt_hugepages, hugepages, true)
SETTER(opt_mem_prealloc, prealloc, true)
SETTER(opt_kernel, kernel, vmopts_printf(o, "%s", arg))
SETTER(opt_initrd, initrd, vmopts_printf(o, "%s", arg))
SETTER(opt_append, append, vmopts_printf(o, "%s", arg))
SETTER(opt_bios, bios, vmopts_printf(o, "%s", arg))
