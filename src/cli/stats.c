/* See stats.h. */
#include "cli/stats.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/util.h"
#include "board/machine.h"

#define COUNTERS_MAX 64
#define HOT_MAX 20

int stats_open(FILE **f, const char *path, struct err *err)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	*f = fd < 0 ? NULL : fdopen(fd, "w");
	if (*f)
		return 0;
	int r = -errno;
	if (fd >= 0)
		close(fd);
	return err_set_errno(err, r, "-accel stats: cannot write %s", path);
}

static double cpu_seconds(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static uint64_t instructions(const struct kvm_counter *k, unsigned n)
{
	for (unsigned j = 0; j < n; j++)
		if (!strcmp(k[j].name, "instructions"))
			return k[j].value;
	return 0;
}

static void hot_words(struct kvm_vcpu *v, unsigned i, FILE *f)
{
	struct kvm_hot h[HOT_MAX];
	uint64_t total;
	unsigned n = kvm_vcpu_hot(v, h, HOT_MAX, &total);

	for (unsigned j = 0; j < n; j++)
		fprintf(f, "vcpu%u: %5.1f %% at 0x%016" PRIx64 " cpl %u\n", i, 100.0 * (double)h[j].samples / (double)total, h[j].addr, h[j].cpl);
}

/* One line per vCPU, what is hot on it, then the sum of instructions by the CPU time of the whole process. */
void stats_words(struct machine *m, FILE *f)
{
	struct kvm_counter k[COUNTERS_MAX];
	double t = cpu_seconds();
	uint64_t insns = 0;
	struct kvm_vcpu *v;

	for (unsigned i = 0; (v = machine_vcpu(m, i)); i++) {
		unsigned n = kvm_vcpu_counters(v, k, COUNTERS_MAX);

		fprintf(f, "vcpu%u:%s", i, n ? "" : " nothing is counted with this accelerator");
		for (unsigned j = 0; j < n; j++)
			fprintf(f, " %s=%" PRIu64, k[j].name, k[j].value);
		fputc('\n', f);
		hot_words(v, i, f);
		insns += instructions(k, n);
	}
	fprintf(f, "total: %.1f million instructions, %.3f s of CPU time, %.1f million a second\n", (double)insns / 1e6, t,
		t > 0 ? (double)insns / 1e6 / t : 0);
}

static json_t *json_vcpu(struct kvm_vcpu *v, unsigned i)
{
	json_t *o = json_object(), *list = json_array();
	struct kvm_counter k[COUNTERS_MAX];
	struct kvm_hot h[HOT_MAX];
	char addr[32];
	uint64_t total;
	unsigned n = kvm_vcpu_counters(v, k, COUNTERS_MAX);

	json_object_set_new(o, "vcpu", json_integer(i));
	for (unsigned j = 0; j < n; j++)
		json_object_set_new(o, k[j].name, json_integer((json_int_t)k[j].value));
	n = kvm_vcpu_hot(v, h, HOT_MAX, &total);
	json_object_set_new(o, "samples", json_integer((json_int_t)total));
	for (unsigned j = 0; j < n; j++) {
		snprintf(addr, sizeof addr, "0x%016" PRIx64, h[j].addr);
		json_array_append_new(list, json_pack("{s:s, s:I, s:i}", "address", addr, "samples", (json_int_t)h[j].samples, "cpl", (int)h[j].cpl));
	}
	json_object_set_new(o, "hot", list);
	return o;
}

void stats_json(struct machine *m, FILE *f)
{
	json_t *top = json_object(), *list = json_array();
	struct kvm_vcpu *v;

	for (unsigned i = 0; (v = machine_vcpu(m, i)); i++)
		json_array_append_new(list, json_vcpu(v, i));
	json_object_set_new(top, "cpu_seconds", json_real(cpu_seconds()));
	json_object_set_new(top, "vcpus", list);
	json_dumpf(top, f, JSON_INDENT(1));
	fputc('\n', f);
	json_decref(top);
}
