/* Provider choice, slots, and vCPU threads with a tiny real-mode guest, on PROVIDER ("kvm" or "soft"). */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "kvm/kvm.h"
#include "kvm/vcpus.h"

struct guest {
	struct kvm *k;
	struct kvm_vm *vm;
	struct vcpus *cpus;
	uint8_t *ram;
	pthread_mutex_t lock;
	pthread_cond_t cond;
	char log[512];
	int shutdowns, spins;
};

static void note(struct guest *g, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	pthread_mutex_lock(&g->lock);
	size_t n = strlen(g->log);
	vsnprintf(g->log + n, sizeof g->log - n, fmt, ap);
	pthread_cond_broadcast(&g->cond);
	pthread_mutex_unlock(&g->lock);
	va_end(ap);
}

static void on_pio(void *opaque, uint16_t port, void *data, unsigned size, bool write)
{
	uint32_t v = 0;
	memcpy(&v, data, size);
	if (port == 0x99) {
		pthread_mutex_lock(&((struct guest *)opaque)->lock);
		((struct guest *)opaque)->spins++;
		pthread_cond_broadcast(&((struct guest *)opaque)->cond);
		pthread_mutex_unlock(&((struct guest *)opaque)->lock);
		return;
	}
	if (write)
		note(opaque, "o%x.%u=%x ", port, size, v);
	else
		memset(data, 0x41 + (int)size, size);
}

static void on_mmio(void *opaque, uint64_t gpa, void *data, unsigned len, bool write)
{
	uint64_t v = 0;
	memcpy(&v, data, len);
	if (write)
		note(opaque, "m%llx.%u=%llx ", (unsigned long long)gpa, len, (unsigned long long)v);
	else
		memset(data, 0x77, len);
}

static enum vcpu_action on_internal(void *opaque, unsigned cpu, struct kvm_run *run, int error)
{
	note(opaque, "error%d.%u ", error, run->exit_reason);
	return VCPU_STOP;
}

static const struct vcpu_handlers handlers = { .pio = on_pio, .mmio = on_mmio, .internal_error = on_internal };

static void guest_open(struct guest *g, const uint8_t *code, size_t len, unsigned cpus)
{
	struct err e = { 0 };
	memset(g, 0, sizeof *g);
	pthread_mutex_init(&g->lock, NULL);
	pthread_cond_init(&g->cond, NULL);
	if (kvm_open(&g->k, !strcmp(PROVIDER, "kvm") ? ACCEL_KVM : ACCEL_SOFT, &e)) {
		print_message("%s\n", e.msg);
		_exit(77);
	}
	assert_string_equal(kvm_provider_name(g->k), PROVIDER);
	assert_int_equal(kvm_vm_create(&g->vm, g->k, &e), 0);
	g->ram = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(g->ram + 0x1000, code, len);
	assert_int_equal(kvm_vm_set_slot(g->vm, 0, 0, 0x10000, g->ram, 0, &e), 0);
	assert_int_equal(vcpus_create(&g->cpus, g->vm, cpus, &handlers, g, &e), 0);
	for (unsigned i = 0; i < cpus; i++) {
		struct kvm_vcpu *v = vcpus_get(g->cpus, i);
		struct kvm_sregs s;
		struct kvm_regs r = { .rip = 0x1000, .rflags = 2, .rsp = 0x8000 };
		assert_int_equal(kvm_vcpu_ioctl(v, KVM_GET_SREGS, &s), 0);
		s.cs.base = s.cs.selector = 0;
		assert_int_equal(kvm_vcpu_ioctl(v, KVM_SET_SREGS, &s), 0);
		assert_int_equal(kvm_vcpu_ioctl(v, KVM_SET_REGS, &r), 0);
	}
	assert_int_equal(vcpus_start(g->cpus, &e), 0);
}

static void guest_close(struct guest *g)
{
	vcpus_destroy(g->cpus);
	kvm_vm_destroy(g->vm);
	kvm_close(g->k);
	munmap(g->ram, 0x10000);
}

static void wait_log(struct guest *g, const char *what)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += 10;
	pthread_mutex_lock(&g->lock);
	int r = 0;
	while (!r && !strstr(g->log, what))
		r = pthread_cond_timedwait(&g->cond, &g->lock, &ts);
	pthread_mutex_unlock(&g->lock);
	if (r)
		fail_msg("waited for '%s', have '%s'", what, g->log);
}

static void test_exits(void **state)
{
	static const uint8_t code[] = {
		0xb0, 0x5a, 0xe6, 0x80,                         /* mov $0x5a,%al; out %al,$0x80 */
		0xe5, 0x10, 0xe7, 0x82,                         /* in $0x10,%ax; out %ax,$0x82 */
		0xbe, 0x00, 0x20, 0xb9, 0x03, 0x00,             /* mov $0x2000,%si; mov $3,%cx */
		0xba, 0x84, 0x00, 0xfc, 0xf3, 0x6e,             /* mov $0x84,%dx; cld; rep outsb */
		0xb8, 0x00, 0xa0, 0x8e, 0xc0,                   /* mov $0xa000,%ax; mov %ax,%es */
		0x26, 0xa1, 0x10, 0x00,                         /* mov %es:0x10,%ax */
		0x26, 0xa3, 0x12, 0x00,                         /* mov %ax,%es:0x12 */
		0xe6, 0x90, 0xf4,                               /* out %al,$0x90; hlt */
	};
	struct guest g;
	guest_open(&g, code, sizeof code, 1);
	memcpy(g.ram + 0x2000, "xyz", 3);
	assert_string_equal(g.log, "");
	vcpus_resume(g.cpus);
	wait_log(&g, "o90");
	assert_string_equal(g.log, "o80.1=5a o82.2=4343 o84.1=78 o84.1=79 o84.1=7a ma0012.2=7777 o90.1=77 ");
	guest_close(&g);
}

static void get_rip(struct kvm_vcpu *v, void *opaque)
{
	struct kvm_regs r;
	kvm_vcpu_ioctl(v, KVM_GET_REGS, &r);
	*(uint64_t *)opaque = r.rip;
}

static void test_pause(void **state)
{
	static const uint8_t code[] = { 0x40, 0xe6, 0x99, 0xeb, 0xfb }; /* 1: inc %ax; out %al,$0x99; jmp 1b */
	static const uint8_t spin[] = { 0xeb, 0xfe };
	for (int which = 0; which < 2; which++) {
		struct guest g;
		guest_open(&g, which ? spin : code, which ? sizeof spin : sizeof code, 2);
		for (int i = 0; i < 20; i++) {
			uint64_t rip = 0;
			vcpus_resume(g.cpus);
			usleep(500);
			vcpus_run_on(g.cpus, (unsigned)i & 1, get_rip, &rip); /* running */
			assert_in_range(rip, 0x1000, 0x1004);
			vcpus_kick(g.cpus, 0);
			vcpus_pause(g.cpus);
			assert_true(vcpus_paused(g.cpus));
			pthread_mutex_lock(&g.lock);
			int seen = g.spins;
			pthread_mutex_unlock(&g.lock);
			vcpus_run_on(g.cpus, 1, get_rip, &rip); /* paused */
			assert_in_range(rip, 0x1000, 0x1004);
			usleep(200);
			pthread_mutex_lock(&g.lock);
			assert_int_equal(g.spins, seen);
			pthread_mutex_unlock(&g.lock);
		}
		assert_true(which || g.spins > 0);
		guest_close(&g);
	}
}

static void test_shutdown(void **state)
{
	static const uint8_t code[] = { 0x0f, 0x01, 0x1e, 0x00, 0x30, 0x0f, 0x0b }; /* lidt 0x3000 (limit 0); ud2 */
	struct guest g;
	guest_open(&g, code, sizeof code, 1);
	vcpus_resume(g.cpus);
	usleep(20000);
	vcpus_pause(g.cpus); /* no handler: the vCPU stopped by itself */
	guest_close(&g);
}

static void test_open_errors(void **state)
{
	struct guest g;
	static const uint8_t hlt[] = { 0xf4 };
	struct err e = { 0 };
	struct kvm_vcpu *v;
	guest_open(&g, hlt, 1, 1);
	assert_int_equal(kvm_vcpu_create(&v, g.vm, 0, &e), -EEXIST);
	err_clear(&e);
	assert_true(kvm_vm_set_slot(g.vm, 1, 0x8000, 0x1000, g.ram, 0, &e) < 0); /* overlaps slot 0 */
	assert_non_null(strstr(e.msg, "slot 1"));
	assert_true(kvm_vm_ioctl(g.vm, 0xdeadbeef, NULL) < 0);
	guest_close(&g);
	err_clear(&e);
	struct kvm *k;
	assert_int_equal(kvm_open(&k, ACCEL_AUTO, &e), 0);
	kvm_close(k);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_exits), cmocka_unit_test(test_pause), cmocka_unit_test(test_shutdown), cmocka_unit_test(test_open_errors),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
