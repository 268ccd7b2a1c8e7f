/* virtio-scsi through its BAR: a disk and a CD drive, command by command; task management, events, error policy, reset. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>
#include <linux/virtio_scsi.h>

#include "block/block.h"
#include "virtio/scsi.h"
#include "virtio/virtio.h"
#include "vt.h"

enum { DISK = 4 << 20, DATA = 64 * 1024 };

struct bed {
	struct vt t;
	struct loop *loop;
	struct workers *workers;
	struct block *disk, *iso;
	struct device *hd, *cd;
	pthread_t thread;
	char path[2][64];
	struct vq q, ctrl, event;
	uint64_t buf;
	/* of the last command */
	uint8_t response, status, key, asc, ascq;
	uint32_t resid;
};

static void *find_ptr(void *opaque, enum prop_type type, const char *id, struct err *err) { return opaque; }
static void *run_loop(void *l) { loop_run(l); return NULL; }
static int stops;
static void on_request(void *opaque, enum machine_request r, int status) { __atomic_add_fetch(&stops, r == MACHINE_STOP, __ATOMIC_RELEASE); }

static struct block *image(struct bed *b, unsigned i, bool ro)
{
	struct block *blk;
	int fd;

	strcpy(b->path[i], "/tmp/scsi-test-XXXXXX");
	fd = mkstemp(b->path[i]);
	assert_true(fd >= 0 && !ftruncate(fd, DISK));
	close(fd);
	assert_int_equal(block_open(&blk, &(struct block_opts){ .id = "b", .file = b->path[i], .format = "raw", .read_only = ro, .discard_unmap = true },
				    b->loop, b->workers, NULL), 0);
	return blk;
}

static void rings(struct bed *b)
{
	assert_true(vt_negotiate(&b->t, UINT64_MAX & ~BIT(34) & ~BIT(29)));
	vt_msix(&b->t, 4);
	vq_setup(&b->ctrl, &b->t, 0, 16, false, false);
	vq_setup(&b->event, &b->t, 1, 16, false, false);
	vq_setup(&b->q, &b->t, 2, 64, false, false);
	vt_driver_ok(&b->t);
	b->buf = vt_alloc(&b->t, 4 * DATA);
}

static void start(struct bed *b, const char *const *hd_props)
{
	struct backend_lookup find = { find_ptr, NULL };

	memset(b, 0, sizeof(*b));
	vt_start(&b->t);
	assert_int_equal(loop_create(&b->loop, NULL), 0);
	assert_int_equal(workers_create(&b->workers, b->loop, 2, NULL), 0);
	pthread_create(&b->thread, NULL, run_loop, b->loop);
	b->t.env.loop = b->loop;
	clock_stepped_destroy(b->t.env.clock);
	b->t.env.clock = clock_host(b->loop);
	b->t.env.request = on_request;
	stops = 0;
	b->disk = image(b, 0, false);
	b->iso = image(b, 1, true);
	assert_int_equal(vt_device(&b->t, &virtio_scsi_pci_class, NULL, NULL, NULL, NULL), 0);
	find.opaque = b->disk;
	assert_int_equal(vt_device(&b->t, &scsi_hd_class, b->t.dev, &b->hd, &find, hd_props), 0);
	find.opaque = b->iso;
	assert_int_equal(vt_device(&b->t, &scsi_cd_class, b->t.dev, &b->cd, &find, (const char *const[]){ "lun", "5", "scsi-id", "0", NULL }), 0);
	vt_map(&b->t);
	rings(b);
}

static void stop(struct bed *b)
{
	device_free(b->cd);
	device_free(b->hd);
	device_free(b->t.dev);
	b->t.dev = NULL;
	block_close(b->disk);
	block_close(b->iso);
	workers_destroy(b->workers);
	loop_stop(b->loop, 0);
	pthread_join(b->thread, NULL);
	b->t.env.clock = NULL;
	vt_stop(&b->t);
	loop_destroy(b->loop);
	unlink(b->path[0]);
	unlink(b->path[1]);
}

static uint8_t *data(struct bed *b) { return vt_ptr(&b->t, b->buf + DATA); }

static void post(struct bed *b, unsigned target, unsigned lun, const uint8_t *cdb, unsigned cdb_len, unsigned len, bool out)
{
	uint8_t *p = vt_ptr(&b->t, b->buf);
	struct vseg s[3] = { { b->buf, 51, false } };
	unsigned n = 1;

	memset(p, 0, 51);
	p[0] = 1;
	p[1] = (uint8_t)target;
	p[2] = 0x40;
	p[3] = (uint8_t)lun;
	memcpy(p + 19, cdb, cdb_len);
	memset(p + 256, 0xee, 108);
	if (len && out)
		s[n++] = (struct vseg){ b->buf + DATA, len, false };
	s[n++] = (struct vseg){ b->buf + 256, 108, true };
	if (len && !out)
		s[n++] = (struct vseg){ b->buf + DATA, len, true };
	vq_add(&b->q, s, n, false);
	vq_kick(&b->q);
}

static uint32_t await(struct bed *b, struct vq *q)
{
	uint16_t id;
	uint32_t len;

	for (unsigned spin = 0; !vq_used(q, &id, &len); spin++) {
		usleep(50);
		assert_true(spin < 100000);
	}
	return len;
}

static void collect(struct bed *b)
{
	uint8_t *r = (uint8_t *)vt_ptr(&b->t, b->buf) + 256;

	await(b, &b->q);
	b->response = r[11];
	b->status = r[10];
	b->resid = ld_le32(r + 4);
	b->key = b->asc = b->ascq = 0;
	if (ld_le32(r)) {
		b->key = r[12 + 2];
		b->asc = r[12 + 12];
		b->ascq = r[12 + 13];
	}
}

/* On LUN 0 (the disk) or 5 (the CD): the status. */
#define CDB(...) (const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ })
static uint8_t command(struct bed *b, unsigned lun, const uint8_t *cdb, unsigned cdb_len, unsigned len, bool out)
{
	post(b, 0, lun, cdb, cdb_len, len, out);
	collect(b);
	return b->response ? 0xff : b->status;
}

static void check_sense(struct bed *b, uint8_t status, unsigned key, unsigned asc)
{
	assert_int_equal(status, 2);
	assert_int_equal(b->key, key);
	assert_int_equal(b->asc, asc);
}

static void test_identify(void **state)
{
	struct bed b;
	uint8_t *d;

	start(&b, (const char *const[]){ "serial", "LODGE-1", "wwn", "0x5000c50015ea71ac", "physical_block_size", "4096", NULL });
	d = data(&b);
	assert_int_equal(command(&b, 0, CDB(0x12, 0, 0, 0, 96, 0), 96, false), 0);
	assert_int_equal(d[0], 0);
	assert_memory_equal(d + 8, "LODGE   LODGE HARDDISK  1.0 ", 28);
	assert_int_equal(command(&b, 5, CDB(0x12, 0, 0, 0, 36, 0), 36, false), 0);
	assert_int_equal(d[0], 5);
	assert_int_equal(d[1], 0x80);
	assert_int_equal(command(&b, 0, CDB(0x12, 1, 0x80, 0, 255, 0), 255, false), 0);
	assert_memory_equal(d, "\0\x80\0\7LODGE-1", 11);
	assert_int_equal(b.resid, 255 - 11);
	assert_int_equal(command(&b, 0, CDB(0x12, 1, 0x83, 0, 255, 0), 255, false), 0);
	assert_int_equal(scsi_get(d + 4 + 11 + 4, 8), 0x5000c50015ea71ac);
	assert_int_equal(command(&b, 0, CDB(0x12, 1, 0xb0, 0, 64, 0), 64, false), 0);
	assert_int_equal(scsi_get(d + 6, 2), 8);
	assert_int_equal(command(&b, 0, CDB(0x12, 1, 0xb2, 0, 64, 0), 64, false), 0);
	assert_int_equal(d[5], 0xe0);
	check_sense(&b, command(&b, 0, CDB(0x12, 1, 0xc7, 0, 64, 0), 64, false), 5, 0x24);
	check_sense(&b, command(&b, 0, CDB(0x12, 0, 0x80, 0, 64, 0), 64, false), 5, 0x24);
	/* an answer is cut to the smaller of allocation length and buffer */
	memset(d, 0xcc, 64);
	assert_int_equal(command(&b, 0, CDB(0x12, 0, 0, 0, 5, 0), 64, false), 0);
	assert_int_equal(d[5], 0xcc);
	assert_int_equal(b.resid, 59);
	/* who is there */
	assert_int_equal(command(&b, 0, CDB(0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0), 256, false), 0);
	assert_int_equal(scsi_get(d, 4), 16);
	assert_int_equal(d[8 + 1] + d[16 + 1], 5);
	assert_int_equal(command(&b, 1, CDB(0x12, 0, 0, 0, 36, 0), 36, false), 0);
	assert_int_equal(d[0], 0x7f);
	check_sense(&b, command(&b, 1, CDB(0, 0, 0, 0, 0, 0), 0, false), 5, 0x25);
	post(&b, 7, 0, CDB(0, 0, 0, 0, 0, 0), 0, false);
	collect(&b);
	assert_int_equal(b.response, VIRTIO_SCSI_S_BAD_TARGET);
	/* refused by name */
	check_sense(&b, command(&b, 0, CDB(0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0), 8, false), 5, 0x20);
	check_sense(&b, command(&b, 0, CDB(0x04, 0, 0, 0, 0, 0), 0, false), 5, 0x20);
	stop(&b);
}

static void test_transfer(void **state)
{
	struct bed b;
	uint8_t *d;

	start(&b, NULL);
	d = data(&b);
	assert_int_equal(command(&b, 0, CDB(0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0), 8, false), 0);
	assert_int_equal(scsi_get(d, 4), DISK / 512 - 1);
	assert_int_equal(command(&b, 0, CDB(0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0), 32, false), 0);
	assert_int_equal(d[14], 0x80);
	memset(d, 0x3c, 4096);
	assert_int_equal(command(&b, 0, CDB(0x2a, 8, 0, 0, 0, 16, 0, 0, 8, 0), 4096, true), 0);
	assert_int_equal(b.resid, 0);
	memset(d, 0, 4096);
	assert_int_equal(command(&b, 0, CDB(0x08, 0, 0, 16, 8, 0), 4096, false), 0);
	assert_int_equal(d[4095], 0x3c);
	memset(d, 0, 8192);
	assert_int_equal(command(&b, 0, CDB(0x88, 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0, 0, 2, 0, 0), 8192, false), 0);
	assert_true(d[0] == 0 && d[512] == 0x3c && d[1024] == 0);
	assert_int_equal(b.resid, 8192 - 1024);
	assert_int_equal(command(&b, 0, CDB(0xa8, 0, 0, 0, 0, 16, 0, 0, 0, 1, 0, 0), 512, false), 0);
	/* past the end, and more than there is room for */
	check_sense(&b, command(&b, 0, CDB(0x28, 0, 0, 0, 0x20, 0, 0, 0, 1, 0), 512, false), 5, 0x21);
	check_sense(&b, command(&b, 0, CDB(0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 1, 0, 0), 512, false), 5, 0x21);
	command(&b, 0, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 8, 0), 512, false);
	assert_int_equal(b.response, VIRTIO_SCSI_S_OVERRUN);
	assert_int_equal(command(&b, 0, CDB(0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0), 0, false), 0);
	assert_int_equal(command(&b, 0, CDB(0x2f, 0, 0, 0, 0, 0, 0, 0, 8, 0), 0, false), 0);
	/* the CD: 2048 bytes a block, nothing to write */
	assert_int_equal(command(&b, 5, CDB(0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0), 8, false), 0);
	assert_int_equal(scsi_get(d + 4, 4), 2048);
	assert_int_equal(command(&b, 5, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0), 4096, false), 0);
	check_sense(&b, command(&b, 5, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0), 4096, true), 7, 0x27);
	stop(&b);
}

static void put_unmap(uint8_t *d, unsigned at, uint64_t lba, uint32_t n)
{
	scsi_put(d + at, lba, 8);
	scsi_put(d + at + 8, n, 4);
	scsi_put(d + at + 12, 0, 4);
}

static void test_fill(void **state)
{
	struct bed b;
	uint8_t *d;

	start(&b, NULL);
	d = data(&b);
	/* a pattern over 300 blocks */
	for (unsigned i = 0; i < 512; i++)
		d[i] = (uint8_t)i;
	assert_int_equal(command(&b, 0, CDB(0x93, 0, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 1, 44, 0, 0), 512, true), 0);
	memset(d, 0, 1024);
	assert_int_equal(command(&b, 0, CDB(0x28, 0, 0, 0, 1, 0x8e, 0, 0, 2, 0), 1024, false), 0);
	assert_true(d[7] == 7 && d[511] == 255);
	assert_int_equal(command(&b, 0, CDB(0x28, 0, 0, 0, 1, 0x8f, 0, 0, 2, 0), 1024, false), 0);
	assert_true(d[7] == 7 && d[512 + 7] == 0);
	/* two ranges unmapped, one empty */
	memset(d, 0, 64);
	scsi_put(d, 6 + 48, 2);
	scsi_put(d + 2, 48, 2);
	put_unmap(d, 8, 100, 50);
	put_unmap(d, 24, 0, 0);
	put_unmap(d, 40, 200, 8);
	assert_int_equal(command(&b, 0, CDB(0x42, 0, 0, 0, 0, 0, 0, 0, 56, 0), 56, true), 0);
	assert_int_equal(command(&b, 0, CDB(0x28, 0, 0, 0, 0, 100, 0, 0, 60, 0), 60 * 512, false), 0);
	assert_true(d[7] == 0 && d[49 * 512 + 7] == 0 && d[50 * 512 + 7] == 7);
	/* one bad descriptor: none is done */
	memset(d, 0, 64);
	scsi_put(d, 6 + 32, 2);
	scsi_put(d + 2, 32, 2);
	put_unmap(d, 8, 150, 50);
	put_unmap(d, 24, DISK / 512, 1);
	check_sense(&b, command(&b, 0, CDB(0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0), 40, true), 5, 0x21);
	assert_int_equal(command(&b, 0, CDB(0x28, 0, 0, 0, 0, 150, 0, 0, 1, 0), 512, false), 0);
	assert_int_equal(d[7], 7);
	/* lists that lie about their length */
	scsi_put(d, 6 + 64, 2);
	check_sense(&b, command(&b, 0, CDB(0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0), 40, true), 5, 0x26);
	check_sense(&b, command(&b, 0, CDB(0x42, 0, 0, 0, 0, 0, 0, 0xff, 0, 0), 40, true), 5, 0x1a);
	/* zeroes, without data */
	assert_int_equal(command(&b, 0, CDB(0x93, 9, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 1, 44, 0, 0), 0, false), 0);
	assert_int_equal(command(&b, 0, CDB(0x28, 0, 0, 0, 0, 150, 0, 0, 1, 0), 512, false), 0);
	assert_int_equal(d[7], 0);
	check_sense(&b, command(&b, 0, CDB(0x93, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), 512, true), 5, 0x24);
	stop(&b);
}

static void test_modes(void **state)
{
	struct bed b;
	uint8_t *d;

	start(&b, NULL);
	d = data(&b);
	assert_int_equal(command(&b, 0, CDB(0x1a, 0, 0x08, 0, 255, 0), 255, false), 0);
	assert_int_equal(d[2] & 0x90, 0x10);
	assert_int_equal(d[12 + 2], 4);
	/* write cache off, seen by the next mode sense */
	memset(d, 0, 64);
	d[8] = 0x08;
	d[9] = 18;
	assert_int_equal(command(&b, 0, CDB(0x55, 0x10, 0, 0, 0, 0, 0, 0, 28, 0), 28, true), 0);
	assert_int_equal(command(&b, 0, CDB(0x5a, 8, 0x08, 0, 0, 0, 0, 0, 255, 0), 255, false), 0);
	assert_int_equal(d[8 + 2], 0);
	assert_int_equal(command(&b, 0, CDB(0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0), 512, true), 0);
	check_sense(&b, command(&b, 0, CDB(0x1a, 0, 0x1c, 0, 255, 0), 255, false), 5, 0x24);
	check_sense(&b, command(&b, 0, CDB(0x15, 0x10, 0, 0, 200, 0), 28, true), 5, 0x1a);
	/* the CD: contents, configuration, tray */
	assert_int_equal(command(&b, 5, CDB(0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0), 64, false), 0);
	assert_int_equal(scsi_get(d, 2), 18);
	assert_int_equal(scsi_get(d + 16, 4), DISK / 2048);
	assert_int_equal(command(&b, 5, CDB(0x46, 0, 0, 0, 0, 0, 0, 0, 255, 0), 255, false), 0);
	assert_int_equal(scsi_get(d + 6, 2), 8);
	assert_int_equal(command(&b, 5, CDB(0x1e, 0, 0, 0, 1, 0), 0, false), 0);
	check_sense(&b, command(&b, 5, CDB(0x1b, 0, 0, 0, 2, 0), 0, false), 5, 0x53);
	assert_int_equal(command(&b, 5, CDB(0x1e, 0, 0, 0, 0, 0), 0, false), 0);
	assert_int_equal(command(&b, 5, CDB(0x1b, 0, 0, 0, 2, 0), 0, false), 0);
	check_sense(&b, command(&b, 5, CDB(0, 0, 0, 0, 0, 0), 0, false), 2, 0x3a);
	assert_int_equal(command(&b, 5, CDB(0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0), 8, false), 0);
	assert_int_equal(d[4], 3);
	assert_int_equal(command(&b, 5, CDB(0x1b, 0, 0, 0, 3, 0), 0, false), 0);
	check_sense(&b, command(&b, 5, CDB(0, 0, 0, 0, 0, 0), 0, false), 6, 0x28);
	assert_int_equal(command(&b, 5, CDB(0, 0, 0, 0, 0, 0), 0, false), 0);
	stop(&b);
}

static uint8_t tmf(struct bed *b, unsigned subtype, unsigned target, unsigned lun)
{
	uint8_t *p = vt_ptr(&b->t, b->buf + 1024);

	memset(p, 0, 64);
	st_le32(p + 4, subtype);
	p[8] = 1;
	p[9] = (uint8_t)target;
	p[10] = 0x40;
	p[11] = (uint8_t)lun;
	p[32] = 0xee;
	vq_add(&b->ctrl, (struct vseg[]){ { b->buf + 1024, 24, false }, { b->buf + 1056, 1, true } }, 2, false);
	vq_kick(&b->ctrl);
	await(b, &b->ctrl);
	return p[32];
}

static void test_tasks_and_events(void **state)
{
	struct bed b;
	uint8_t *e;

	start(&b, NULL);
	assert_int_equal(tmf(&b, VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 0, 0), VIRTIO_SCSI_S_OK);
	check_sense(&b, command(&b, 0, CDB(0, 0, 0, 0, 0, 0), 0, false), 6, 0x29);
	assert_int_equal(command(&b, 0, CDB(0, 0, 0, 0, 0, 0), 0, false), 0);
	assert_int_equal(tmf(&b, VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 0, 3), VIRTIO_SCSI_S_INCORRECT_LUN);
	assert_int_equal(tmf(&b, VIRTIO_SCSI_T_TMF_ABORT_TASK, 9, 0), VIRTIO_SCSI_S_BAD_TARGET);
	assert_int_equal(tmf(&b, VIRTIO_SCSI_T_TMF_ABORT_TASK, 0, 0), VIRTIO_SCSI_S_OK);
	assert_int_equal(tmf(&b, 99, 0, 0), VIRTIO_SCSI_S_FUNCTION_REJECTED);
	/* an event without a buffer is missed, and told later */
	assert_int_equal(block_resize(b.disk, DISK * 2, NULL), 0);
	e = vt_ptr(&b.t, b.buf + 2048);
	vq_add(&b.event, (struct vseg[]){ { b.buf + 2048, 16, true } }, 1, false);
	vq_kick(&b.event);
	assert_int_equal(await(&b, &b.event), 16);
	assert_int_equal(ld_le32(e), VIRTIO_SCSI_T_EVENTS_MISSED);
	check_sense(&b, command(&b, 0, CDB(0, 0, 0, 0, 0, 0), 0, false), 6, 0x2a);
	vq_add(&b.event, (struct vseg[]){ { b.buf + 2048, 16, true } }, 1, false);
	vq_kick(&b.event);
	assert_int_equal(block_resize(b.disk, DISK * 3, NULL), 0);
	await(&b, &b.event);
	assert_int_equal(ld_le32(e), VIRTIO_SCSI_T_PARAM_CHANGE);
	assert_int_equal(ld_le32(e + 12), 0x2a | 9 << 8);
	/* a unit goes while the driver watches */
	vq_add(&b.event, (struct vseg[]){ { b.buf + 2048, 16, true } }, 1, false);
	vq_kick(&b.event);
	device_free(b.cd);
	b.cd = NULL;
	await(&b, &b.event);
	assert_int_equal(ld_le32(e), VIRTIO_SCSI_T_TRANSPORT_RESET);
	assert_int_equal(ld_le32(e + 12), VIRTIO_SCSI_EVT_RESET_REMOVED);
	assert_int_equal(e[7], 5);
	struct backend_lookup find = { find_ptr, b.iso };
	assert_int_equal(vt_device(&b.t, &scsi_cd_class, b.t.dev, &b.cd, &find, NULL), 0);
	stop(&b);
}

static void limit_files(rlim_t bytes)
{
	struct rlimit l;

	getrlimit(RLIMIT_FSIZE, &l);
	l.rlim_cur = bytes;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &l), 0);
}

/* A write fails and the policy is to stop: kept, tried again, and dropped by a reset of the unit. */
static void test_policy(void **state)
{
	const uint8_t write[] = { 0x2a, 0, 0, 0, 0x1f, 0xf8, 0, 0, 8, 0 };
	struct bed b;
	uint16_t id;
	uint32_t len;

	signal(SIGXFSZ, SIG_IGN);
	start(&b, (const char *const[]){ "werror", "stop", NULL });
	limit_files(DISK / 2);
	memset(data(&b), 0x66, 4096);
	post(&b, 0, 0, write, sizeof(write), 4096, true);
	for (unsigned i = 0; !__atomic_load_n(&stops, __ATOMIC_ACQUIRE); i++) {
		usleep(100);
		assert_true(i < 50000);
	}
	b.t.dev->cls->pause(b.t.dev, true);
	assert_false(vq_used(&b.q, &id, &len));
	limit_files(RLIM_INFINITY);
	b.t.dev->cls->pause(b.t.dev, false);
	collect(&b);
	assert_int_equal(b.status, 0);
	stops = 0;
	limit_files(DISK / 2);
	post(&b, 0, 0, write, sizeof(write), 4096, true);
	for (unsigned i = 0; !__atomic_load_n(&stops, __ATOMIC_ACQUIRE); i++) {
		usleep(100);
		assert_true(i < 50000);
	}
	assert_int_equal(tmf(&b, VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, 0, 0), VIRTIO_SCSI_S_OK);
	collect(&b);
	assert_int_equal(b.response, VIRTIO_SCSI_S_RESET);
	limit_files(RLIM_INFINITY);
	stop(&b);
}

/* Resets with commands out, over and over; random but deterministic. */
static void test_reset(void **state)
{
	struct bed b;
	uint64_t heap;

	start(&b, NULL);
	heap = b.t.heap;
	srand(3);
	for (unsigned i = 0; i < 60; i++) {
		for (unsigned k = 0; k < 8; k++)
			post(&b, 0, rand() % 2 * 5, (const uint8_t[]){ rand() % 2 ? 0x28 : 0x2a, 0, 0, 0, 0, (uint8_t)rand(), 0, 0, 16, 0 }, 10, 16 * 2048, rand() % 2);
		if (i % 3 == 0)
			b.t.dev->cls->reset(b.t.dev);
		b.t.heap = heap;
		rings(&b);
		assert_int_equal(command(&b, 0, CDB(0x12, 0, 0, 0, 36, 0), 36, false), 0);
	}
	/* a chain without room for a response */
	vq_add(&b.q, (struct vseg[]){ { b.buf, 51, false }, { b.buf + 256, 20, true } }, 2, false);
	vq_kick(&b.q);
	assert_true(vt_status(&b.t) & 64);
	stop(&b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_identify), cmocka_unit_test(test_transfer), cmocka_unit_test(test_fill), cmocka_unit_test(test_modes),
		cmocka_unit_test(test_tasks_and_events), cmocka_unit_test(test_policy), cmocka_unit_test(test_reset),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
