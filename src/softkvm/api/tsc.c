/* The host's TSC: its frequency, and the guest's view of it (offset and scaling, SDM vol. 3 ch. 17.17). */
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "softkvm/api/api.h"
#include "softkvm/irqchip.h"

uint64_t mono_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* CPUID 0x15 gives the exact ratio to a crystal on some CPUs. */
static uint32_t khz_from_cpuid(void)
{
	unsigned a, b, c, d;

	if (!__get_cpuid_count(0x15, 0, &a, &b, &c, &d) || !a || !b || !c)
		return 0;
	return (uint32_t)((uint64_t)c * b / a / 1000);
}

/* What the host kernel believes: bogomips is twice the TSC's MHz where the loop delay is derived from it. */
static uint32_t khz_from_bogomips(void)
{
	char buf[4096], *p;
	int fd = open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return 0;
	n = read(fd, buf, sizeof buf - 1);
	close(fd);
	if (n <= 0)
		return 0;
	buf[n] = 0;
	p = strstr(buf, "bogomips");
	p = p ? strchr(p, ':') : NULL;
	return p ? (uint32_t)(strtod(p + 1, NULL) * 500 + 0.5) : 0;
}

/* A (TSC, ns) pair read close together: the tightest of a few tries. */
static void sample(uint64_t *tsc, uint64_t *ns)
{
	uint64_t best = UINT64_MAX;

	for (int i = 0; i < 8; i++) {
		struct timespec t;
		uint64_t a = __rdtsc(), b;

		clock_gettime(CLOCK_MONOTONIC_RAW, &t);
		b = __rdtsc();
		if (b - a < best) {
			best = b - a;
			*tsc = a + (b - a) / 2;
			*ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
		}
	}
}

static uint32_t khz_measured(uint64_t wait_ns)
{
	uint64_t t0, n0, t1, n1;

	sample(&t0, &n0);
	do
		sample(&t1, &n1);
	while (n1 - n0 < wait_ns);
	return (uint32_t)((unsigned __int128)(t1 - t0) * 1000000 / (n1 - n0));
}

uint32_t tsc_khz_host(void)
{
	static _Atomic uint32_t cached; /* a fact of the host */
	uint32_t khz = atomic_load_explicit(&cached, memory_order_relaxed);

	if (khz)
		return khz;
	khz = khz_from_cpuid();
	if (!khz) {
		uint32_t m = khz_measured(500000), b = khz_from_bogomips();

		/* A measurement this short is good to some 50 ppm: enough to trust the kernel's own figure. */
		khz = b && (m > b ? m - b : b - m) < b / 5000 ? b : khz_measured(5000000);
	}
	atomic_store_explicit(&cached, khz, memory_order_relaxed);
	return khz;
}

static uint64_t scale(uint64_t tsc, uint64_t ratio)
{
	return ratio ? (uint64_t)((unsigned __int128)tsc * ratio >> 48) : tsc;
}

uint64_t tsc_read(const struct cpu *c)
{
	return scale(__rdtsc(), c->vcpu->api->tsc_ratio) + c->msr.tsc_offset;
}

uint64_t tsc_to_mono(const struct cpu *c, uint64_t tsc)
{
	uint64_t now = mono_ns(), cur = tsc_read(c);
	unsigned __int128 d;

	if (tsc <= cur)
		return now;
	d = (unsigned __int128)(tsc - cur) * 1000000 / c->vcpu->api->tsc_khz;
	return d > UINT64_MAX / 2 - now ? UINT64_MAX / 2 : now + (uint64_t)d + 1;
}

int tsc_set_khz(struct cpu *c, uint32_t khz)
{
	struct vcpu_api *a = c->vcpu->api;
	uint32_t host = tsc_khz_host(), d = khz > host ? khz - host : host - khz;
	uint64_t cur;

	if (!khz)
		khz = host;
	if ((uint64_t)khz > (uint64_t)host * 250)
		return -EINVAL;
	cur = a->tsc_khz ? tsc_read(c) : 0;
	a->tsc_khz = khz;
	/* Within 250 ppm the host's own rate serves, as on Linux. */
	a->tsc_ratio = d <= host / 4000 || khz == host ? 0 : (uint64_t)(((unsigned __int128)khz << 48) / host);
	c->tsc_scaled = a->tsc_ratio;
	if (cur)
		c->msr.tsc_offset += cur - tsc_read(c);
	cpu_request(c, REQ_CLOCK | REQ_TIMER);
	return 0;
}

void tsc_set_offset(struct cpu *c, uint64_t offset)
{
	c->msr.tsc_offset = offset;
	cpu_request(c, REQ_CLOCK | REQ_TIMER);
}

void tsc_synchronize(struct cpu *c, uint64_t value)
{
	struct vcpu_api *a = c->vcpu->api;
	struct vm_api *va = c->vm->api;
	uint64_t host, now, offset;
	bool sync;

	pthread_mutex_lock(&va->clock_lock);
	host = scale(__rdtsc(), a->tsc_ratio);
	now = mono_ns();
	offset = value - host;
	if (va->tsc_last_khz == a->tsc_khz) {
		uint64_t hz = (uint64_t)a->tsc_khz * 1000;
		uint64_t expected = va->tsc_last_write +
			(uint64_t)((unsigned __int128)(now - va->tsc_last_ns) * a->tsc_khz / 1000000);

		/* 0 is the value of a new or plugged vCPU; a second's difference is the time between two writes. */
		sync = !value || (value < expected + hz && value + hz > expected);
		if (sync)
			offset = va->tsc_last_offset;
	}
	va->tsc_last_write = host + offset;
	va->tsc_last_ns = now;
	va->tsc_last_offset = offset;
	va->tsc_last_khz = a->tsc_khz;
	pthread_mutex_unlock(&va->clock_lock);
	tsc_set_offset(c, offset);
}

void tsc_write_guest(struct cpu *c, uint64_t value)
{
	uint64_t delta = value - tsc_read(c);

	c->msr.tsc_adjust += delta;
	tsc_set_offset(c, c->msr.tsc_offset + delta);
}
