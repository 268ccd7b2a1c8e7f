/*
 * Whole machines with tiny guests on the provider given ("kvm" or "soft"): boot protocols, chips, PCI,
 * interrupts, power-off, reset, exit status. Skips (77) where the provider does not exist.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "board/machine.h"
#include "chr/chr.h"
#include "loop/loop.h"

static enum kvm_accel accel;
static const char *guest_mb, *guest_pvh;
static int failed, passed;
static char out_path[64];

static void sink(enum log_level l, const char *line, void *opaque)
{
	fprintf(stderr, "# %s\n", line);
}

static void *find(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	return type == PROP_CHARDEV ? opaque : NULL;
}

struct run { const char *kernel, *append, *initrd, *cpu, *type; unsigned cpus; uint64_t mem; bool no_reboot; };

/* The machine's status, or -errno from its creation. */
static int run(const struct run *t, struct err *err)
{
	static const struct machine_prop serial_props[] = { { "chardev", "c0" } };
	static const struct machine_device devs[] = { { "isa-serial", NULL, serial_props, 1 },
						      { "isa-debug-exit", NULL, NULL, 0 } };
	struct machine_config cfg = { .type = t->type, .accel = accel, .cpu_model = t->cpu, .cpus = t->cpus ? t->cpus : 1,
				      .mem_size = t->mem ? t->mem : 64 << 20, .kernel = t->kernel,
				      .initrd = t->initrd, .append = t->append, .no_reboot = t->no_reboot,
				      .devices = devs, .ndevices = 2 };
	struct chr_env env = { 0 };
	struct chardev *c = NULL;
	struct machine *m;
	char spec[128];
	int r;

	if (loop_create(&cfg.loop, err) || workers_create(&cfg.workers, cfg.loop, 2, err))
		return -1;
	env.loop = cfg.loop;
	snprintf(spec, sizeof(spec), "file,id=c0,path=%s", out_path);
	r = chr_open(&c, spec, &env, err);
	cfg.backends = (struct backend_lookup){ find, c };
	if (!r)
		r = machine_create(&m, &cfg, err);
	if (!r) {
		r = machine_run(m);
		machine_destroy(m);
	}
	if (c)
		chr_close(c);
	workers_destroy(cfg.workers);
	loop_destroy(cfg.loop);
	return r;
}

static void report(const char *name, bool ok, int got, const struct err *err)
{
	char buf[512] = { 0 };
	FILE *f = fopen(out_path, "r");

	if (f) {
		if (fread(buf, 1, sizeof(buf) - 1, f))
			buf[strcspn(buf, "\r") < sizeof(buf) ? sizeof(buf) - 1 : 0] = 0;
		fclose(f);
	}
	printf("%s %s (status %d%s%s)\n", ok ? "ok" : "not ok", name, got, err->msg[0] ? ": " : "", err->msg);
	if (!ok)
		printf("# serial: %s\n", buf);
	*(ok ? &passed : &failed) += 1;
}

static void expect(const char *name, struct run t, int want)
{
	struct err err = { 0 };
	struct timespec a, b;

	clock_gettime(CLOCK_MONOTONIC, &a);
	int r = run(&t, &err);
	clock_gettime(CLOCK_MONOTONIC, &b);
	printf("# %.1f ms\n", (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) / 1e6);
	report(name, r == want, r, &err);
}

static void expect_error(const char *name, struct run t, const char *text)
{
	struct err err = { 0 };
	int r = run(&t, &err);

	report(name, r < 0 && strstr(err.msg, text), r, &err);
}

static void truncated(const char *name, const char *from, size_t len)
{
	char path[] = "/tmp/lodge-trunc-XXXXXX", buf[65536];
	int fd = mkstemp(path);
	FILE *f = fopen(from, "r");
	size_t n = f ? fread(buf, 1, MIN(len, sizeof(buf)), f) : 0;

	if (f)
		fclose(f);
	if (fd < 0 || write(fd, buf, n) != (ssize_t)n)
		exit(1);
	close(fd);
	expect_error(name, (struct run){ .kernel = path }, "truncated");
	unlink(path);
}

static void write_file(const char *path, const char *text)
{
	FILE *f = fopen(path, "w");

	if (f) {
		fputs(text, f);
		fclose(f);
	}
}

int main(int argc, char **argv)
{
	struct err err = { 0 };
	struct kvm *k;

	if (argc != 4)
		return 1;
	accel = strcmp(argv[1], "soft") ? ACCEL_KVM : ACCEL_SOFT;
	guest_mb = argv[2];
	guest_pvh = argv[3];
	log_set_sink(sink, NULL, LOG_WARN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	snprintf(out_path, sizeof(out_path), "/tmp/lodge-serial-%d", getpid());
	if (kvm_open(&k, accel, &err)) {
		printf("skipped: %s\n", err.msg);
		return 77;
	}
	kvm_close(k);
	enum { OK = 0x21 << 1 | 1 };
	expect("multiboot", (struct run){ guest_mb, "" }, OK);
	expect("PVH", (struct run){ guest_pvh, "" }, OK);
	expect("everything on the board", (struct run){ guest_mb, "full", .cpus = 2 }, OK);
	expect("everything, PVH", (struct run){ guest_pvh, "full" }, OK);
	expect("3 GiB of memory", (struct run){ guest_mb, "full", .mem = 3ULL << 30 }, OK);
	expect("microvm", (struct run){ guest_mb, "", .type = "microvm" }, OK);
	expect("64 vCPUs", (struct run){ guest_mb, "", .cpus = 64 }, OK);
	expect("cpu model", (struct run){ guest_mb, "", .cpu = "x86-64-v2,-popcnt" }, OK);
	expect("power-off", (struct run){ guest_mb, "poweroff" }, 0);
	expect("reset, no reboot", (struct run){ guest_mb, "reset", .no_reboot = true }, 0);
	expect("keyboard reset, no reboot", (struct run){ guest_mb, "kbdreset", .no_reboot = true }, 0);
	expect("triple fault, no reboot", (struct run){ guest_mb, "triple", .no_reboot = true }, 0);
	expect("reset boots again", (struct run){ guest_mb, "twice" }, OK);
	char m1[80], m2[80], list[256];
	snprintf(m1, sizeof(m1), "%s-1", out_path);
	snprintf(m2, sizeof(m2), "%s-2", out_path);
	write_file(m1, "one");
	write_file(m2, "two");
	snprintf(list, sizeof(list), "%s a,,b,%s", m1, m2);
	expect("modules", (struct run){ guest_mb, "modules", list }, OK);
	unlink(m1);
	unlink(m2);
	expect_error("missing kernel", (struct run){ "/nonexistent" }, "No such file");
	expect_error("directory", (struct run){ "/tmp" }, "directory");
	write_file(m1, "\x1f\x8b\x08");
	expect_error("compressed kernel", (struct run){ m1 }, "zcat");
	unlink(m1);
	expect_error("not a kernel", (struct run){ "/etc/passwd" }, "not a Linux bzImage");
	expect_error("unknown feature", (struct run){ guest_mb, .cpu = "host,+nonsense" }, "nonsense");
	expect_error("unknown model", (struct run){ guest_mb, .cpu = "i486dx" }, "i486dx");
	expect_error("unknown machine", (struct run){ guest_mb, .type = "pdp11" }, "pdp11");
	expect_error("no vCPUs", (struct run){ guest_mb, .cpus = 65 }, "1 to 64");
	expect_error("tiny memory", (struct run){ guest_mb, .mem = 4096 }, "memory size");
	truncated("truncated ELF", guest_pvh, 4200);
	truncated("truncated program headers", guest_pvh, 60);
	unlink(out_path);
	printf("%d passed, %d failed\n", passed, failed);
	return failed != 0;
}
