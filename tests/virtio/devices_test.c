/* The devices through their PCI BARs: block against a plain file, net, console, entropy. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>
#include <linux/virtio_blk.h>

#include "block/block.h"
#include "virtio/net_priv.h"
#include "virtio/serial.h"
#include "virtio/virtio.h"
#include "vt.h"

static struct iothread *iothread_for_test[3];
static void *find_drive_or_thread(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	return type != PROP_IOTHREAD ? opaque : *id == 'x' ? iothread_for_test[id[1] ? id[1] - '0' : 0] : NULL;
}

static void *find_ptr(void *opaque, enum prop_type type, const char *id, struct err *err) { return opaque; }

/* A loop on its own thread, workers, and an image file. */
struct disk {
	struct vt t;
	struct loop *loop;
	struct workers *workers;
	struct block *blk;
	pthread_t thread;
	char path[64];
	struct vq q;
	uint64_t buf;
};

enum { DISK = 4 << 20, SLOT = 64 * 1024 };

static void *run_loop(void *l) { loop_run(l); return NULL; }

static void disk_start(struct disk *d, const char *const *props, uint64_t features, bool read_only)
{
	struct backend_lookup find = { find_ptr };
	struct err err = { 0 };
	int fd;

	memset(d, 0, sizeof(*d));
	strcpy(d->path, "/tmp/virtio-test-XXXXXX");
	fd = mkstemp(d->path);
	assert_true(fd >= 0 && !ftruncate(fd, DISK));
	close(fd);
	vt_start(&d->t);
	assert_int_equal(loop_create(&d->loop, &err), 0);
	assert_int_equal(workers_create(&d->workers, d->loop, 2, &err), 0);
	pthread_create(&d->thread, NULL, run_loop, d->loop);
	d->t.env.loop = d->loop;
	clock_stepped_destroy(d->t.env.clock);
	d->t.env.clock = clock_host(d->loop);
	assert_int_equal(block_open(&d->blk, &(struct block_opts){ .id = "b", .file = d->path, .format = "raw",
			 .read_only = read_only }, d->loop, d->workers, &err), 0);
	find.opaque = d->blk;
	assert_int_equal(vt_device(&d->t, &virtio_blk_pci_class, NULL, NULL, &find, props), 0);
	vt_map(&d->t);
	assert_true(vt_negotiate(&d->t, features));
	vt_msix(&d->t, 2);
	vq_setup(&d->q, &d->t, 0, 64, features >> 34 & 1, features >> 29 & 1);
	vt_wr(&d->t, 26, 1, 2);
	vt_driver_ok(&d->t);
	d->buf = vt_alloc(&d->t, 66 * SLOT);
}

static void disk_stop(struct disk *d)
{
	device_free(d->t.dev);
	d->t.dev = NULL;
	block_close(d->blk);
	workers_destroy(d->workers);
	loop_stop(d->loop, 0);
	pthread_join(d->thread, NULL);
	d->t.env.clock = NULL;
	vt_stop(&d->t);
	loop_destroy(d->loop);
	unlink(d->path);
}

/* Slot n: header, data, status at fixed places. Returns the ring's id. */
static uint16_t blk_add(struct disk *d, unsigned slot, uint32_t type, uint64_t sector, uint32_t len, bool indirect)
{
	uint64_t at = d->buf + slot * SLOT;
	uint8_t *p = vt_ptr(&d->t, at);
	bool in = type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_GET_ID;
	struct vseg s[4] = { { at, 16, false } };
	unsigned n = 1;

	st_le32(p, type);
	st_le32(p + 4, 0);
	st_le64(p + 8, sector);
	p[16] = 0xaa;
	if (len > 1)
		s[n++] = (struct vseg){ at + 512, len / 2, in };
	if (len)
		s[n++] = (struct vseg){ at + 512 + len / 2, len - len / 2, in };
	s[n++] = (struct vseg){ at + 16, 1, true };
	return vq_add(&d->q, s, n, indirect);
}

static uint8_t *blk_data(struct disk *d, unsigned slot) { return (uint8_t *)vt_ptr(&d->t, d->buf + slot * SLOT) + 512; }
static uint8_t blk_status(struct disk *d, unsigned slot) { return blk_data(d, slot)[-496]; }

static void wait_used(struct disk *d, unsigned n)
{
	uint16_t id;
	uint32_t len;

	for (unsigned spin = 0; n; spin++) {
		if (vq_used(&d->q, &id, &len))
			n--;
		else
			usleep(100);
		assert_true(spin < 100000);
	}
}

static uint8_t blk_one(struct disk *d, uint32_t type, uint64_t sector, uint32_t len)
{
	blk_add(d, 0, type, sector, len, false);
	vq_kick(&d->q);
	wait_used(d, 1);
	return blk_status(d, 0);
}

static void test_blk(void **st)
{
	static const char *const props[] = { "serial", "disk-0001", NULL };
	struct disk d;
	uint8_t *p;

	disk_start(&d, props, UINT64_MAX & ~BIT(34) & ~BIT(29), false);
	assert_int_equal(vt_rd(&d.t, 0x2000, 8), DISK / 512);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_GET_ID, 0, 20), 0);
	assert_string_equal((char *)blk_data(&d, 0), "disk-0001");
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, DISK / 512, 512), VIRTIO_BLK_S_IOERR);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, DISK / 512 - 1, 1024), VIRTIO_BLK_S_IOERR);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, UINT64_MAX, 512), VIRTIO_BLK_S_IOERR);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, 0, 513), VIRTIO_BLK_S_IOERR);
	assert_int_equal(blk_one(&d, 77, 0, 512), VIRTIO_BLK_S_UNSUPP);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_FLUSH, 0, 0), 0);
	memset(blk_data(&d, 0), 0x5a, 4096);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_OUT, 8, 4096), 0);
	p = blk_data(&d, 0);
	st_le64(p, 9);
	st_le32(p + 8, 1);
	st_le32(p + 12, 0);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), 0);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, 8, 4096), 0);
	for (unsigned i = 0; i < 4096; i++)
		assert_int_equal(p[i], i / 512 == 1 ? 0 : 0x5a);
	st_le64(p, DISK / 512);
	st_le32(p + 8, 1);
	st_le32(p + 12, 0);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_DISCARD, 0, 16), VIRTIO_BLK_S_IOERR);
	st_le64(p, 0);
	st_le32(p + 12, 2);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_WRITE_ZEROES, 0, 16), VIRTIO_BLK_S_UNSUPP);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_WRITE_ZEROES, 0, 15), VIRTIO_BLK_S_IOERR);
	assert_true(__atomic_load_n(&d.t.msi[1], __ATOMIC_RELAXED) > 0);
	/* A header that is too short can not be answered. */
	vq_add(&d.q, (struct vseg[]){ { d.buf, 8, false }, { d.buf + 16, 1, true } }, 2, false);
	vq_kick(&d.q);
	assert_true(vt_status(&d.t) & 0x40);
	disk_stop(&d);
}

static void test_blk_ro(void **st)
{
	struct disk d;

	disk_start(&d, NULL, BIT(5), true);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_OUT, 0, 512), VIRTIO_BLK_S_IOERR);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, 0, 512), 0);
	disk_stop(&d);
}

/* Random batches against a model of the disk. Requests of a batch never overlap. */
static void model(uint64_t features, unsigned rounds)
{
	static const char *const props[] = { "packed", "on", NULL };
	uint8_t *m = calloc(1, DISK), *back = malloc(DISK);
	unsigned seed = 1;
	struct disk d;
	FILE *f;

	disk_start(&d, props, features, false);
	for (unsigned r = 0; r < rounds; r++) {
		unsigned n = 1 + rand_r(&seed) % 12, len[16], type[16], off[16];

		for (unsigned i = 0; i < n; i++) {
			type[i] = rand_r(&seed) % 2;
			len[i] = 512 * (1 + rand_r(&seed) % 64);
			off[i] = DISK / 16 * i + 512 * (rand_r(&seed) % 256);
			for (unsigned k = 0; type[i] && k < len[i]; k++)
				m[off[i] + k] = blk_data(&d, i)[k] = (uint8_t)(r + k * 7 + i);
			blk_add(&d, i, type[i], off[i] / 512, len[i], (features >> 28 & 1) && i % 2);
		}
		vq_kick(&d.q);
		wait_used(&d, n);
		for (unsigned i = 0; i < n; i++) {
			assert_int_equal(blk_status(&d, i), 0);
			assert_memory_equal(blk_data(&d, i), m + off[i], len[i]);
		}
	}
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_FLUSH, 0, 0), 0);
	f = fopen(d.path, "r");
	assert_int_equal(fread(back, 1, DISK, f), DISK);
	fclose(f);
	assert_memory_equal(back, m, DISK);
	disk_stop(&d);
	free(m);
	free(back);
}

static void test_blk_model(void **st)
{
	model(BIT(28) | BIT(29) | BIT(9), 60);
	model(BIT(28) | BIT(29) | BIT(34), 60);
	model(0, 30);
}

/* Resets while requests are out: nothing reaches the new ring, nothing hangs. */
static void test_blk_reset(void **st)
{
	struct disk d;
	uint16_t id;
	uint32_t len;

	disk_start(&d, NULL, 0, false);
	for (unsigned r = 0; r < 50; r++) {
		for (unsigned i = 0; i < 16; i++)
			blk_add(&d, i, i % 2, i * 128, 32768, false);
		vq_kick(&d.q);
		if (r % 3 == 0)
			d.t.dev->cls->reset(d.t.dev);
		assert_true(vt_negotiate(&d.t, r % 2 ? BIT(40) : 0));
		d.t.heap = d.buf + 66 * SLOT;
		vq_setup(&d.q, &d.t, 0, 64, false, false);
		vt_driver_ok(&d.t);
		assert_false(vq_used(&d.q, &id, &len));
		if (r % 5 == 0) {
			d.t.dev->cls->pause(d.t.dev, true);
			blk_add(&d, 0, 0, 0, 512, false);
			vq_kick(&d.q);
			usleep(100);
			assert_false(vq_used(&d.q, &id, &len));
			d.t.dev->cls->pause(d.t.dev, false);
			wait_used(&d, 1);
		}
	}
	disk_stop(&d);
}

/* A write fails while the policy is to stop: the guest hears nothing, the machine is asked to stop, and going on writes it. */
static int stops;
static void on_request(void *opaque, enum machine_request r, int status) { stops += r == MACHINE_STOP; }

static void limit_files(rlim_t bytes)
{
	struct rlimit l;

	getrlimit(RLIMIT_FSIZE, &l);
	l.rlim_cur = bytes;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &l), 0);
}

static void wait_stop(struct disk *d)
{
	pthread_mutex_t *lock = &((struct virtio_pci *)d->t.dev)->v.lock;

	for (unsigned spin = 0; spin < 100000; spin++) {
		pthread_mutex_lock(lock);
		bool stopped = stops;
		pthread_mutex_unlock(lock);
		if (stopped)
			return;
		usleep(100);
	}
	fail();
}

static void test_blk_werror(void **st)
{
	static const char *const props[] = { "werror", "stop", NULL }, *const ignore[] = { "werror", "ignore", NULL };
	struct disk d;
	uint16_t id;
	uint32_t len;

	signal(SIGXFSZ, SIG_IGN);
	disk_start(&d, props, 0, false);
	d.t.env.request = on_request;
	stops = 0;
	limit_files(DISK / 2);
	memset(blk_data(&d, 0), 0x77, 4096);
	blk_add(&d, 0, VIRTIO_BLK_T_OUT, DISK / 512 - 8, 4096, false);
	vq_kick(&d.q);
	wait_stop(&d);
	d.t.dev->cls->pause(d.t.dev, true);
	assert_false(vq_used(&d.q, &id, &len));
	/* Still failing: it stops again. */
	stops = 0;
	d.t.dev->cls->pause(d.t.dev, false);
	wait_stop(&d);
	d.t.dev->cls->pause(d.t.dev, true);
	assert_false(vq_used(&d.q, &id, &len));
	limit_files(RLIM_INFINITY);
	d.t.dev->cls->pause(d.t.dev, false);
	wait_used(&d, 1);
	assert_int_equal(blk_status(&d, 0), 0);
	memset(blk_data(&d, 0), 0, 4096);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_IN, DISK / 512 - 8, 4096), 0);
	assert_int_equal(blk_data(&d, 0)[4095], 0x77);
	/* A reset forgets what was kept. */
	limit_files(DISK / 2);
	stops = 0;
	blk_add(&d, 0, VIRTIO_BLK_T_OUT, DISK / 512 - 8, 4096, false);
	vq_kick(&d.q);
	wait_stop(&d);
	d.t.dev->cls->reset(d.t.dev);
	d.t.dev->cls->pause(d.t.dev, false);
	disk_stop(&d);
	/* Without a policy the guest sees the error; with ignore it does not. */
	limit_files(RLIM_INFINITY);
	disk_start(&d, NULL, 0, false);
	limit_files(DISK / 2);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_OUT, DISK / 512 - 8, 4096), VIRTIO_BLK_S_IOERR);
	disk_stop(&d);
	limit_files(RLIM_INFINITY);
	disk_start(&d, ignore, 0, false);
	limit_files(DISK / 2);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_OUT, DISK / 512 - 8, 4096), 0);
	disk_stop(&d);
	limit_files(RLIM_INFINITY);
}

/* The image grows while the guest has it. */
static void test_blk_resize(void **st)
{
	struct disk d;

	disk_start(&d, NULL, 0, false);
	vt_wr(&d.t, 16, 1, 2);          /* configuration changes: vector 1 */
	unsigned before = __atomic_load_n(&d.t.msi[1], __ATOMIC_RELAXED);
	uint8_t generation = vt_rd(&d.t, 21, 1);
	assert_int_equal(block_resize(d.blk, DISK * 2, NULL), 0);
	assert_int_equal(vt_rd(&d.t, 0x2000, 8), DISK * 2 / 512);
	assert_true(vt_rd(&d.t, 21, 1) != generation);
	assert_int_equal(__atomic_load_n(&d.t.msi[1], __ATOMIC_RELAXED), before + 1);
	assert_int_equal(blk_one(&d, VIRTIO_BLK_T_OUT, DISK * 2 / 512 - 8, 4096), 0);
	disk_stop(&d);
}

/* An I/O thread: the kick does a few, the thread the rest; pausing and resetting wait for both. */
static void test_blk_iothread(void **st)
{
	struct iothread *io;
	struct disk d;

	assert_int_equal(iothread_create(&io, NULL), 0);
	disk_start(&d, NULL, 0, false);
	device_free(d.t.dev);
	d.t.dev = NULL;
	d.t.pci = NULL;
	d.t.heap = 0x10000;
	iothread_for_test[0] = io;
	struct backend_lookup find = { find_drive_or_thread, d.blk };
	assert_int_equal(vt_device(&d.t, &virtio_blk_pci_class, NULL, NULL, &find, (const char *const[]){ "iothread", "x", NULL }), 0);
	vt_map(&d.t);
	assert_true(vt_negotiate(&d.t, 0));
	vt_msix(&d.t, 2);
	vq_setup(&d.q, &d.t, 0, 64 * 4, false, false);
	vt_driver_ok(&d.t);
	d.buf = vt_alloc(&d.t, 66 * SLOT);
	for (unsigned r = 0; r < 60; r++) {
		for (unsigned i = 0; i < 40; i++)
			blk_add(&d, i, i % 2, i * 100, 4096, false);
		vq_kick(&d.q);
		if (r % 7 == 0) {
			d.t.dev->cls->pause(d.t.dev, true);
			d.t.dev->cls->pause(d.t.dev, false);
		}
		wait_used(&d, 40);
	}
	disk_stop(&d);
	iothread_destroy(io);
}

/* Two vCPUs, a queue each, while the machine stops and goes. */
struct cpu { struct disk *d; struct vq q; unsigned n; uint64_t at; };

static void *cpu_run(void *opaque)
{
	struct cpu *c = opaque;
	uint16_t id;
	uint32_t len;

	for (unsigned i = 0; i < c->n; i++) {
		uint8_t *p = vt_ptr(&c->d->t, c->at);

		st_le32(p, i % 2);
		st_le64(p + 8, i * 8 % 1024);
		vq_add(&c->q, (struct vseg[]){ { c->at, 16, false }, { c->at + 512, 4096, !(i % 2) },
					       { c->at + 16, 1, true } }, 3, false);
		vq_kick(&c->q);
		for (unsigned spin = 0; !vq_used(&c->q, &id, &len); spin++) {
			usleep(50);
			if (spin > 1000000)
				return c;
		}
		if (*(uint8_t *)vt_ptr(&c->d->t, c->at + 16))
			return c;
	}
	return NULL;
}

/* More with one kick than it does by itself. */
static void *cpu_run_deep(void *opaque)
{
	enum { N = 12, STRIDE = 5120 };
	struct cpu *c = opaque;
	uint16_t id;
	uint32_t len;

	for (unsigned i = 0; i < c->n; i++) {
		for (unsigned k = 0; k < N; k++) {
			uint64_t at = c->at + k * STRIDE;
			uint8_t *p = vt_ptr(&c->d->t, at);

			st_le32(p, i % 2);
			st_le64(p + 8, (i * N + k) * 8 % 1024);
			p[16] = 0xff;
			vq_add(&c->q, (struct vseg[]){ { at, 16, false }, { at + 512, 4096, !(i % 2) }, { at + 16, 1, true } }, 3, false);
		}
		vq_kick(&c->q);
		for (unsigned k = 0, spin = 0; k < N; k += vq_used(&c->q, &id, &len)) {
			usleep(50);
			if (spin++ > 1000000)
				return c;
		}
		for (unsigned k = 0; k < N; k++)
			if (*(uint8_t *)vt_ptr(&c->d->t, c->at + k * STRIDE + 16))
				return c;
	}
	return NULL;
}

/* Three queues and two I/O threads, while the machine stops and goes; what the property takes. */
static void test_blk_iothreads(void **st)
{
	static const char *const bad[] = { "", "x:", ":x", "x:y", "x::x1", "x:x:x:x:x:x:x:x:x:x:x:x:x:x:x:x:x" };
	struct backend_lookup find = { find_drive_or_thread };
	struct err err = { 0 };
	struct cpu c[3];
	struct disk d;
	pthread_t th[3];
	void *failed;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(iothread_create(&iothread_for_test[i], NULL), 0);
	disk_start(&d, NULL, 0, false);
	device_free(d.t.dev);
	d.t.dev = NULL;
	d.t.pci = NULL;
	d.t.heap = 0x10000;
	find.opaque = d.blk;
	assert_int_equal(vt_device(&d.t, &virtio_blk_pci_class, NULL, NULL, &find, (const char *const[]){ "iothread", "x:x2", "num-queues", "3", NULL }), 0);
	vt_map(&d.t);
	assert_true(vt_negotiate(&d.t, BIT(12) | BIT(29)));
	vt_msix(&d.t, 4);
	for (unsigned i = 0; i < 3; i++)
		vq_setup(&c[i].q, &d.t, i, 64, false, true);
	vt_driver_ok(&d.t);
	d.buf = vt_alloc(&d.t, 4 * SLOT);
	for (unsigned i = 0; i < 3; i++) {
		c[i].d = &d;
		c[i].n = 100;
		c[i].at = d.buf + i * SLOT;
		pthread_create(&th[i], NULL, cpu_run_deep, &c[i]);
	}
	for (unsigned i = 0; i < 20; i++) {
		d.t.dev->cls->pause(d.t.dev, true);
		usleep(200);
		d.t.dev->cls->pause(d.t.dev, false);
		usleep(500);
	}
	for (unsigned i = 0; i < 3; i++) {
		pthread_join(th[i], &failed);
		assert_null(failed);
	}
	for (unsigned i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		assert_int_not_equal(device_set_prop(d.t.dev, "iothread", bad[i], &find, &err), 0);
	disk_stop(&d);
	for (unsigned i = 0; i < 3; i++)
		iothread_destroy(iothread_for_test[i]);
}

static void test_blk_threads(void **st)
{
	static const char *const props[] = { "num-queues", "2", NULL };
	struct cpu c[2];
	struct disk d;
	pthread_t th[2];
	void *bad;

	disk_start(&d, props, BIT(12) | BIT(29), false);
	for (unsigned i = 0; i < 2; i++) {
		c[i] = (struct cpu){ .d = &d, .n = 300, .at = d.buf + i * SLOT };
		if (i)
			vq_setup(&c[i].q, &d.t, 1, 64, false, true);
		else
			c[i].q = d.q;
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_create(&th[i], NULL, cpu_run, &c[i]);
	for (unsigned i = 0; i < 30; i++) {
		d.t.dev->cls->pause(d.t.dev, true);
		usleep(200);
		d.t.dev->cls->pause(d.t.dev, false);
		usleep(500);
	}
	for (unsigned i = 0; i < 2; i++) {
		pthread_join(th[i], &bad);
		assert_null(bad);
	}
	disk_stop(&d);
}

static void test_net(void **st)
{
	static const char *const props[] = { "mac", "52:54:00:aa:bb:cc", "host_mtu", "1400", NULL };
	struct backend_lookup find = { find_ptr };
	static const uint8_t set_mac[] = { 1, 1, 2, 3, 4, 5, 6, 7 }, promisc_off[] = { 0, 0, 0 };
	uint8_t frame[1500] = { 0x06, 3, 4, 5, 6, 7, 9, 9, 9, 9, 9, 9, 8, 0 };
	struct vq rx, tx, ctl;
	struct vt t;
	uint64_t b;
	uint16_t id;
	uint32_t len;

	vt_start(&t);
	find.opaque = &t;
	assert_int_equal(vt_device(&t, &virtio_net_pci_class, NULL, NULL, &find, props), 0);
	vt_map(&t);
	assert_true(vt_negotiate(&t, UINT64_MAX & ~BIT(34)));
	assert_int_equal(vt_rd(&t, 0x2000, 8) & 0xffffffffffff, 0xccbbaa005452);
	assert_int_equal(vt_rd(&t, 0x200a, 2), 1400);
	vq_setup(&rx, &t, 0, 16, false, true);
	vq_setup(&tx, &t, 1, 16, false, true);
	vq_setup(&ctl, &t, 2, 16, false, true);
	vt_driver_ok(&t);
	b = vt_alloc(&t, 65536);
	struct vnet *d = container_of(t.dev, struct vnet, vp.dev);

	/* Transmit, in pieces; then against a full back end. */
	memcpy(vt_ptr(&t, b + 12), frame, 100);
	vq_add(&tx, (struct vseg[]){ { b, 20, false }, { b + 20, 92, false } }, 2, false);
	vq_kick(&tx);
	assert_true(vq_used(&tx, &id, &len));
	assert_int_equal(t.net.last_len, 100);
	assert_memory_equal(t.net.last, frame, 100);
	t.net.full = true;
	vq_add(&tx, &(struct vseg){ b, 112, false }, 1, false);
	vq_kick(&tx);
	assert_false(vq_used(&tx, &id, &len));
	t.net.full = false;
	vt_net_can_send(&t);
	assert_true(vq_used(&tx, &id, &len));
	assert_int_equal(t.net.sent, 2);

	/* Receive: refused without buffers, merged over several, filter. */
	assert_int_equal(net_filter_pass(&d->f, frame, 100, true), true);
	assert_false(vt_net_receive(&t, frame, 1500));
	for (unsigned i = 0; i < 4; i++)
		vq_add(&rx, &(struct vseg){ b + 4096 * (i + 1), 512, true }, 1, false);
	vq_kick(&rx);
	assert_int_equal(t.net.resumed, 2);      /* at DRIVER_OK and now */
	assert_true(vt_net_receive(&t, frame, 1500));
	for (unsigned i = 0; i < 3; i++) {
		assert_true(vq_used(&rx, &id, &len));
		assert_int_equal(len, i < 2 ? 512 : 488);
	}
	assert_int_equal(ld_le16((uint8_t *)vt_ptr(&t, b + 4096) + 10), 3);
	assert_memory_equal((uint8_t *)vt_ptr(&t, b + 4096) + 12, frame, 500);
	/* 1512 bytes: three buffers hold 1536. The fourth waits. */
	assert_false(vq_used(&rx, &id, &len));
	memcpy(vt_ptr(&t, b), promisc_off, 3);
	memcpy(vt_ptr(&t, b + 64), set_mac, 8);
	vq_add(&ctl, (struct vseg[]){ { b, 3, false }, { b + 32, 1, true } }, 2, false);
	vq_add(&ctl, (struct vseg[]){ { b + 64, 8, false }, { b + 96, 1, true } }, 2, false);
	vq_add(&ctl, (struct vseg[]){ { b + 64, 7, false }, { b + 97, 1, true } }, 2, false);
	vq_kick(&ctl);
	assert_int_equal(*(uint8_t *)vt_ptr(&t, b + 32), 0);
	assert_int_equal(*(uint8_t *)vt_ptr(&t, b + 96), 0);
	assert_int_equal(*(uint8_t *)vt_ptr(&t, b + 97), 1);
	assert_true(vt_net_receive(&t, frame, 100));            /* dropped: not our address */
	assert_false(vq_used(&rx, &id, &len));
	memcpy(frame, set_mac + 2, 6);
	assert_true(vt_net_receive(&t, frame, 100));
	assert_true(vq_used(&rx, &id, &len));
	assert_int_equal(len, 112);
	vt_stop(&t);
}

static void test_rng_limit(void **st)
{
	static const char *const props[] = { "max-bytes", "100", "period", "1000", NULL };
	struct vt t;
	struct vq q;
	uint16_t id;
	uint32_t len;

	vt_start(&t);
	assert_int_equal(vt_device(&t, &virtio_rng_pci_class, NULL, NULL, NULL, props), 0);
	vt_map(&t);
	assert_true(vt_negotiate(&t, 0));
	vq_setup(&q, &t, 0, 8, false, false);
	vt_driver_ok(&t);
	for (unsigned i = 0; i < 3; i++)
		vq_add(&q, &(struct vseg){ 0x1000, 64, true }, 1, false);
	vq_kick(&q);
	assert_true(vq_used(&q, &id, &len) && len == 64);
	assert_true(vq_used(&q, &id, &len) && len == 36);
	assert_false(vq_used(&q, &id, &len));
	clock_step(t.env.clock, 1000000000);
	assert_true(vq_used(&q, &id, &len) && len == 64);
	vt_stop(&t);
}

static void test_props(void **st)
{
	static const char *const bad[][3] = { { "disable-legacy", "off" }, { "disable-modern", "on" }, { "vectors", "9999" } };
	static const char *const good[] = { "disable-legacy", "on", "vectors", "0", NULL };
	struct vt t;

	vt_start(&t);
	for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
		assert_true(vt_device(&t, &virtio_rng_pci_class, NULL, NULL, NULL, bad[i]) < 0);
	assert_true(vt_device(&t, &virtio_blk_pci_class, NULL, NULL, NULL, NULL) < 0);
	assert_true(vt_device(&t, &virtio_net_pci_class, NULL, NULL, NULL, NULL) < 0);
	assert_true(vt_device(&t, &virtconsole_class, NULL, NULL, NULL, NULL) < 0);
	assert_int_equal(vt_device(&t, &virtio_rng_pci_class, NULL, NULL, NULL, good), 0);
	vt_stop(&t);
}

static void say(struct vq *q, uint64_t at, uint32_t id, uint16_t event, uint16_t value)
{
	uint8_t *p = vt_ptr(q->t, at);
	uint16_t i;
	uint32_t len;

	st_le32(p, id);
	st_le16(p + 4, event);
	st_le16(p + 6, value);
	vq_add(q, &(struct vseg){ at, 8, false }, 1, false);
	vq_kick(q);
	assert_true(vq_used(q, &i, &len));
}

static void heard(struct vq *q, uint64_t base, uint32_t id, uint16_t event, uint16_t value)
{
	uint16_t i;
	uint32_t len;

	assert_true(vq_used(q, &i, &len));
	const uint8_t *p = vt_ptr(q->t, base + i * 64);

	assert_int_equal(ld_le32(p), id);
	assert_int_equal(ld_le16(p + 4), event);
	assert_int_equal(ld_le16(p + 6), value);
}

static void test_console(void **st)
{
	static const char *const con[] = { "chardev", "x", NULL };
	static const char *const port[] = { "name", "org.test.0", NULL };
	struct backend_lookup find = { find_ptr };
	struct device *c0, *p1;
	struct vq rx, tx, cin, cout;
	struct vt t;
	uint64_t b;
	uint16_t id;
	uint32_t len;

	vt_start(&t);
	find.opaque = &t;
	assert_int_equal(vt_device(&t, &virtio_serial_pci_class, NULL, NULL, NULL, NULL), 0);
	assert_int_equal(vt_device(&t, &virtconsole_class, t.dev, &c0, &find, con), 0);
	assert_int_equal(vt_device(&t, &virtserialport_class, t.dev, &p1, &find, port), 0);
	assert_int_equal(((struct serial_port *)p1)->nr, 1);
	vt_map(&t);
	assert_true(vt_negotiate(&t, BIT(1)));
	vq_setup(&rx, &t, 0, 16, false, false);
	vq_setup(&tx, &t, 1, 16, false, false);
	vq_setup(&cin, &t, 2, 16, false, false);
	vq_setup(&cout, &t, 3, 16, false, false);
	vt_driver_ok(&t);
	b = vt_alloc(&t, 8192);
	for (unsigned i = 0; i < 8; i++)
		vq_add(&cin, &(struct vseg){ b + i * 64, 64, true }, 1, false);
	vq_kick(&cin);
	say(&cout, b + 4096, 0xffffffff, 0, 1);
	heard(&cin, b, 0, 1, 1);
	heard(&cin, b, 1, 1, 1);
	say(&cout, b + 4096, 0, 3, 1);
	heard(&cin, b, 0, 4, 1);
	heard(&cin, b, 0, 6, 0);
	say(&cout, b + 4096, 1, 3, 1);
	heard(&cin, b, 1, 7, 1);
	assert_string_equal((char *)vt_ptr(&t, b + 4 * 64) + 8, "org.test.0");
	say(&cout, b + 4096, 99, 6, 1);
	say(&cout, b + 4096, 0, 6, 1);
	assert_true(t.chr.accepted > 0);

	/* Output with a short back end: held, then continued without loss. */
	memcpy(vt_ptr(&t, b + 4200), "hello, console", 14);
	t.chr.room = 5;
	vq_add(&tx, (struct vseg[]){ { b + 4200, 7, false }, { b + 4207, 7, false } }, 2, false);
	vq_kick(&tx);
	assert_false(vq_used(&tx, &id, &len));
	t.chr.room = 4;
	vt_chr_event(&t, CHR_WRITABLE);
	assert_false(vq_used(&tx, &id, &len));
	t.chr.room = 100;
	vt_chr_event(&t, CHR_WRITABLE);
	assert_true(vq_used(&tx, &id, &len));
	assert_int_equal(t.chr.n_out, 14);
	assert_memory_equal(t.chr.out, "hello, console", 14);

	/* Input: as much as there are buffers. */
	assert_int_equal(vt_chr_input(&t, "x"), 0);
	vq_add(&rx, &(struct vseg){ b + 5000, 4, true }, 1, false);
	vq_kick(&rx);
	assert_int_equal(vt_chr_input(&t, "abcdef"), 4);
	assert_true(vq_used(&rx, &id, &len) && len == 4);
	assert_memory_equal(vt_ptr(&t, b + 5000), "abcd", 4);
	device_free(p1);
	heard(&cin, b, 1, 2, 1);
	device_free(c0);
	vt_stop(&t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_blk), cmocka_unit_test(test_blk_ro), cmocka_unit_test(test_blk_model),
		cmocka_unit_test(test_blk_reset), cmocka_unit_test(test_blk_werror), cmocka_unit_test(test_blk_resize),
		cmocka_unit_test(test_blk_iothread), cmocka_unit_test(test_blk_iothreads), cmocka_unit_test(test_blk_threads),
		cmocka_unit_test(test_net), cmocka_unit_test(test_rng_limit),
		cmocka_unit_test(test_props), cmocka_unit_test(test_console),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
