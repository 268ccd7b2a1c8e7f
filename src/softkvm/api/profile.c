/* SOFTKVM_CAP_PROFILE: samples of where vCPUs are, and the map for perf(1). */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "softkvm/api/api.h"
#include "softkvm/profile.h"

/* Anybody may put a link into /tmp: it is not followed, and a file of somebody else's is not taken. */
static int perf_map_open(struct vm_policy *p)
{
	char name[64];
	int fd;

	if (p->perf_fd >= 0)
		return 0;
	snprintf(name, sizeof name, "/tmp/perf-%d.map", (int)getpid());
	if (unlink(name) && errno != ENOENT)
		return -errno;
	fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		return -errno;
	p->perf_fd = fd;
	return 0;
}

long profile_start(struct vm *vm, uint64_t bits)
{
	struct vm_policy *p = &vm->policy;

	if (bits & ~(uint64_t)(SOFTKVM_PROFILE_SAMPLE | SOFTKVM_PROFILE_PERF_MAP))
		return -EINVAL;
	p->sample = bits & SOFTKVM_PROFILE_SAMPLE;
	return bits & SOFTKVM_PROFILE_PERF_MAP ? perf_map_open(p) : 0;
}

int profile_vcpu(struct cpu *c)
{
	if (!c->vm->policy.sample)
		return 0;
	c->profile = calloc(1, sizeof *c->profile);
	return c->profile ? 0 : -ENOMEM;
}

/* Into the list of `n`, most frequent first, of which `max` are kept. */
static unsigned insert(struct softkvm_hot *out, unsigned n, unsigned max, struct softkvm_hot new)
{
	unsigned at = n;

	while (at && out[at - 1].samples < new.samples)
		at--;
	if (at == max)
		return n;
	n = MIN(n + 1, max);
	memmove(out + at + 1, out + at, (n - at - 1) * sizeof *out);
	out[at] = new;
	return n;
}

unsigned softkvm_vcpu_hot(struct softkvm_file *f, struct softkvm_hot *out, unsigned max, uint64_t *total)
{
	const struct profile *p = f->kind == FILE_VCPU ? f->vcpu->cpu.profile : NULL;
	unsigned n = 0;

	*total = p ? __atomic_load_n(&p->total, __ATOMIC_RELAXED) : 0;
	for (unsigned k = 0; p && k < PROFILE_SETS * 4; k++) {
		struct softkvm_hot h = { p->e[k / 4][k % 4].rip, p->e[k / 4][k % 4].samples, p->e[k / 4][k % 4].cpl };

		if (h.samples)
			n = insert(out, n, max, h);
	}
	return n;
}
