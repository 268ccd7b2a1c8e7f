/*
 * Fuzz target for every virtio device: the input is a program of guest actions, register pokes at
 * any offset and width, config space writes, ring and buffer contents, kicks, resets, back-end
 * events. The first byte chooses the device. Nothing may crash, hang or grow.
 *
 * Without libFuzzer, main() runs seeds and a long life of each device, or the files given.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define FUZZ_OWN_MAIN
#include "../pci/fuzz.h"
#include "base/log.h"
#include "block/block.h"
#include "virtio/virtio.h"
#include "vt.h"

struct input { const uint8_t *p; size_t left; };

static uint64_t take(struct input *in, unsigned n)
{
	uint64_t v = 0;

	n = MIN(n, in->left);
	memcpy(&v, in->p, n);
	in->p += n;
	in->left -= n;
	return v;
}

static void *find_ptr(void *opaque, enum prop_type type, const char *id, struct err *err) { return opaque; }

struct blk_env { struct loop *loop; struct workers *w; struct block *b; };

static void blk_env_start(struct blk_env *e)
{
	struct err err;
	char path[] = "/tmp/virtio-fuzz-XXXXXX";
	int fd = mkstemp(path);

	if (fd < 0 || ftruncate(fd, 1 << 20) || loop_create(&e->loop, &err) || workers_create(&e->w, e->loop, 1, &err) ||
	    block_open(&e->b, &(struct block_opts){ .id = "b", .file = path, .format = "raw" }, e->loop, e->w, &err))
		abort();
	close(fd);
	unlink(path);
}

static void blk_env_stop(struct blk_env *e)
{
	block_close(e->b);
	workers_destroy(e->w);
	loop_destroy(e->loop);
}

/* Addresses: mostly where something is, sometimes anywhere. */
static uint64_t address(struct input *in)
{
	uint64_t v = take(in, 3), kind = v & 7;

	if (kind == 0)
		return take(in, 8);
	if (kind == 1)
		return VT_RAM / 2 - 64 + (v >> 3) % 128;
	if (kind == 2)
		return VT_RAM - 64 + (v >> 3) % 128;
	return 0x10000 + (v >> 3) % 0x8000 * 4;
}

/* A queue set up well enough that its contents matter. */
static void setup_queue(struct vt *t, struct input *in, struct vq *q)
{
	uint64_t b = take(in, 2);

	t->heap = 0x10000 + (b >> 8) * 64;
	vq_setup(q, t, b % 8, 1u << (b >> 4 & 7), b & 8, b & 128);
}

static void add_chain(struct input *in, struct vq *q)
{
	unsigned n = 1 + take(in, 1) % 5;
	struct vseg s[5];

	for (unsigned i = 0; i < n; i++) {
		uint64_t b = take(in, 2);

		s[i] = (struct vseg){ address(in), b >> 4, b & 1 };
		if (b % 4)
			s[i].write = i >= n / 2;
	}
	if (q->size >= n && q->desc)
		vq_add(q, s, n, q->size >= 8 && n > 2);
}

/* A SCSI command that gets past the adapter: known units and operation codes, anything behind. */
static void add_scsi(struct vt *t, struct input *in, struct vq *q)
{
	static const uint8_t ops[] = { 0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x35, 0x41, 0x42, 0x43,
				       0x46, 0x4a, 0x51, 0x55, 0x5a, 0x5e, 0x88, 0x8a, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa8, 0xaa, 0xbd };
	uint64_t at = 0x200000 + take(in, 1) % 8 * 0x10000, a = take(in, 8), b = take(in, 8);
	unsigned len = take(in, 2) % 0x3000, out = b >> 8 & 1;
	uint8_t *p = vt_ptr(t, at);

	memset(p, 0, 51);
	p[0] = 1;
	p[1] = a & 1;
	p[2] = 0x40;
	p[19] = ops[(a >> 8) % sizeof(ops)];
	for (unsigned i = 0; i < 15; i++)       /* small values mostly, so that they lie on the medium */
		p[20 + i] = b >> i & 1 ? (uint8_t)(a >> (i % 8 * 8)) : i % 5 == 4 ? (uint8_t)(b >> 16) & 15 : 0;
	if (len >= 24 && out) { /* a parameter list */
		uint8_t *d = vt_ptr(t, at + 0x1000);

		for (unsigned i = 0; i < 24; i++)
			d[i] = b >> (i % 32) & 1 ? (uint8_t)(a >> (i % 8 * 8)) : i == 3 ? 16 : 0;
	}
	struct vseg s[3] = { { at, 51, false }, { at + 0x1000, len, !out }, { at + 0x800, 108, true } };
	if (!out) {
		struct vseg x = s[1];

		s[1] = s[2];
		s[2] = x;
	}
	if (!len)
		s[1] = (struct vseg){ at + 0x800, 108, true };
	if (q->size >= 4 && q->desc)
		vq_add(q, s, len ? 3 : 2, false);
}

static void fill(struct vt *t, struct input *in)
{
	uint64_t at = address(in), v = take(in, 8);

	if (at & 64)            /* small numbers: commands, types, lengths */
		v &= 0x0303030303030307;
	gm_write(t->env.mem, at, &v, 8);
}

static void back_end(struct vt *t, struct input *in)
{
	static uint8_t frame[2048];
	uint8_t b = take(in, 1);

	t->net.full = b & 1;
	t->chr.room = b;
	t->chr.n_out = 0;
	if (t->net_client.receive)
		vt_net_receive(t, frame, (b & 0xf0) * 8), vt_net_can_send(t);
	if (t->chr_client.event) {
		vt_chr_event(t, b % 4);
		vt_chr_input(t, "some input");
	}
}

static void step(struct vt *t, struct input *in, struct vq *q)
{
	uint8_t op = take(in, 1), size = 1 << (op >> 6);

	switch (op % 16) {
	case 0: vt_wr(t, take(in, 2) & 0x3fff & ~(size - 1), take(in, size), size); break;
	case 1: vt_rd(t, take(in, 2) & 0x3fff & ~(size - 1), size); break;
	case 2: vt_wr(t, (take(in, 1) & 63) & ~(size - 1), take(in, size), size); break;
	case 3: pci_config_write(t->env.pci, t->pci->devfn, (take(in, 1) & 0xfc), take(in, 4), 4); break;
	case 4: pci_config_read(t->env.pci, t->pci->devfn, take(in, 1), 1); break;
	case 5: setup_queue(t, in, q); break;
	case 6: vt_negotiate(t, in->left & 1 ? UINT64_MAX : take(in, 8)); break;
	case 7: vt_driver_ok(t); break;
	case 8: case 9: case 10: (t->dev->cls == &virtio_scsi_pci_class && op & 64 ? add_scsi(t, in, q) : add_chain(in, q)); break;
	case 11: vt_wr(t, 0x3000 + take(in, 1) % 40 * 4, 0, 2); break;
	case 12: fill(t, in); break;
	case 13: clock_step(t->env.clock, 1ull << (take(in, 1) % 32)); break;
	case 14: back_end(t, in); break;
	case 15: vq_kick(q); break;
	}
	if (op % 16 == 3)
		vt_map(t);
}

static void create(struct vt *t, unsigned which, struct blk_env *be, struct device **port, struct device **port2, bool serial)
{
	static const struct device_class *const cls[] = { &virtio_rng_pci_class, &virtio_net_pci_class,
							  &virtio_serial_pci_class, &virtio_blk_pci_class, &virtio_scsi_pci_class };
	static const char *const props[] = { "packed", "on", NULL };
	static const char *const con[] = { "chardev", "x", NULL };
	static const char *const queues[] = { "num_queues", "2", NULL };
	struct backend_lookup find = { find_ptr, which >= 3 ? (void *)be->b : t };

	if (vt_device(t, cls[which], NULL, NULL, &find, which == 4 ? queues : props))
		abort();
	if (which == 4 && (vt_device(t, &scsi_hd_class, t->dev, port, &find, NULL) || vt_device(t, &scsi_cd_class, t->dev, port2, NULL, NULL)))
		abort();
	if (which == 2) { /* the back end's events go to the port that came last */
		const struct device_class *ports[] = { &virtconsole_class, &virtserialport_class };

		if (vt_device(t, ports[!serial], t->dev, port, &find, con) || vt_device(t, ports[serial], t->dev, port2, &find, con))
			abort();
	}
	vt_map(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct input in = { data, len };
	struct device *port = NULL, *port2 = NULL;
	struct blk_env be = { 0 };
	struct vq q = { 0 };
	struct vt t;
	unsigned which = take(&in, 1) % 5;

	vt_start(&t);
	if (which >= 3)
		blk_env_start(&be);
	create(&t, which, &be, &port, &port2, len & 16);
	q = (struct vq){ .t = &t, .size = 8 };
	vt_negotiate(&t, UINT64_MAX & ~(which & 1 ? BIT(34) : 0));
	for (unsigned i = 0; i < 4; i++)
		if (len & 1 << i)
			setup_queue(&t, &in, &q);
	vt_driver_ok(&t);
	for (struct fuzz_watch w = { .total = len }; fuzz_next(&w, in.left, 1); )
		step(&t, &in, &q);
	if (port2)
		device_free(port2);
	if (port)
		device_free(port);
	device_free(t.dev);
	t.dev = NULL;
	if (which >= 3)
		blk_env_stop(&be);
	vt_stop(&t);
	return 0;
}

#ifndef LIBFUZZER
static int run_file(const char *path)
{
	static uint8_t buf[1 << 16];
	FILE *f = fopen(path, "r");
	size_t n;

	if (!f)
		return 1;
	n = fread(buf, 1, sizeof(buf), f);
	fclose(f);
	return LLVMFuzzerTestOneInput(buf, n);
}

/* One long life of each device: what a guest makes it hold must not add up. */
static int long_runs(uint64_t seed)
{
	size_t len = FUZZ_LONG * 4;
	uint8_t *buf = malloc(len);

	if (!buf)
		return 2;
	for (unsigned which = 0; which < 5; which++) {
		fuzz_fill(buf, len, &seed);
		buf[0] = which;
		LLVMFuzzerTestOneInput(buf, len);
	}
	free(buf);
	return 0;
}

/* fuzz [-n rounds] [-s first seed] [file...] */
int main(int argc, char **argv)
{
	unsigned rounds = 400, seed = 1, files = 0;
	static uint8_t buf[4096];
	struct fuzz_use half = { 0 };

	log_set_sink(NULL, NULL, LOG_ERROR);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "-n") && i + 1 < argc)
			rounds = atoi(argv[++i]);
		else if (!strcmp(argv[i], "-s") && i + 1 < argc)
			seed = atoi(argv[++i]);
		else if (files++, run_file(argv[i]))
			return 1;
	}
	if (files)
		return 0;
	for (unsigned r = 0; r < rounds; r++) {
		unsigned s = seed + r;
		size_t n = 64 + rand_r(&s) % (sizeof(buf) - 64);

		for (size_t i = 0; i < n; i++)
			buf[i] = rand_r(&s) >> 8;
		LLVMFuzzerTestOneInput(buf, n);
		if (r == rounds / 2)
			half = fuzz_use();
	}
	if (rounds > 20)
		fuzz_check("from run to run", half, fuzz_use());
	return long_runs(seed);
}
#endif
