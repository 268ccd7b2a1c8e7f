/*
 * Hostile qcow2 images: open, info, map, check with and without repair, reads, writes, a guest's requests, snapshots. Nothing may crash, hang
 * or take memory without bound. LLVMFuzzerTestOneInput() takes a whole image; main() mutates good ones.
 *
 * usage: fuzz-qcow2 [RUNS [SEED [IMAGE]]]; 16 with the seed and image that VERBOSE=1 printed repeats one case first
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "block/qcow2.h"
#include "fault.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct block *open_image(const uint8_t *data, size_t size, bool write, bool as_is)
{
	struct block_opts o = { .file = "fuzz", .read_only = !write, .no_backing = true, .as_is = as_is, .discard_unmap = true };
	struct block *b = block_new(&o, NULL, NULL);
	struct err e = { 0 };
	b->child = fault_new(data, size);
	if (!qcow2_open(b, &o, 0, &e))
		return b;
	block_free(b);
	return NULL;
}

static void look(const uint8_t *data, size_t size)
{
	struct block *b = open_image(data, size, false, true);
	struct image_info i;
	struct image_check c = { 0 };
	if (!b)
		return;
	if (!image_info(b, &i))
		image_info_free(&i);
	uint64_t off = 0, len = block_length(b);
	static uint8_t buf[65536];
	for (int k = 0; k < 300 && off < len; k++) {
		struct block_extent e;
		if (image_map(b, NULL, off, len - off, &e))
			break;
		image_read(b, off, buf, MIN(e.len, sizeof buf));
		off += e.len;
	}
	image_check(b, 0, &c, NULL);
	block_free(b);
}

static void change(const uint8_t *data, size_t size)
{
	struct block *b = open_image(data, size, true, false);
	static uint8_t buf[65536];
	if (!b)
		return;
	uint64_t len = block_length(b);
	for (uint64_t k = 0; k < 8 && len > sizeof buf; k++)
		image_write(b, (len - sizeof buf) / 8 * k / 512 * 512, buf, k & 1 ? sizeof buf : 512);
	if (len > 1 << 20) {
		image_zero(b, 0, 200000 / 512 * 512, true);
		image_discard(b, 262144, 262144);
	}
	guest_requests(b, (unsigned)size, 24);
	image_flush(b);
	image_snapshot_create(b, "x", NULL);
	image_write(b, 0, buf, MIN(len, 4096u));
	if (b->qcow2->nsnaps)
		image_snapshot_delete(b, b->qcow2->snaps[0].s.name, NULL);
	image_resize(b, len / 2 / 512 * 512 + 512, PREALLOC_OFF, NULL);
	block_close(b);
	/* not after a write, which takes the bitmaps */
	b = open_image(data, size, true, false);
	if (!b)
		return;
	struct image_bitmap_arg arg = { .source = b, .source_name = "off" };
	image_bitmap_change(b, BITMAP_MERGE, "on", &arg, NULL);
	image_bitmap_change(b, BITMAP_ADD, "new", NULL, NULL);
	image_bitmap_change(b, BITMAP_CLEAR, "off", NULL, NULL);
	image_bitmap_change(b, BITMAP_REMOVE, "on", NULL, NULL);
	block_close(b);
}

static void repair(const uint8_t *data, size_t size)
{
	struct block *b = open_image(data, size, true, true);
	struct image_check c = { 0 };
	if (b)
		image_check(b, CHECK_FIX_LEAKS | CHECK_FIX_ERRORS, &c, NULL);
	block_free(b);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size > 8 << 20)
		return 0;
	look(data, size);
	change(data, size);
	repair(data, size);
	return 0;
}

#ifndef LIBFUZZER
static char path[] = "/var/tmp/qcow2-fuzz-XXXXXX";

static uint8_t *make(unsigned k, size_t *size)
{
	static const uint32_t clusters[] = { 512, 4096, 65536, 16384 };
	struct image_create c;
	struct block_opts o = { .file = path, .format = "qcow2", .discard_unmap = true };
	struct block *b;
	uint8_t *buf = calloc(1, 1 << 20), *p;
	image_create_init(&c);
	c.file = path;
	c.format = "qcow2";
	c.cluster_size = clusters[k % 4];
	c.extended_l2 = k % 4 == 3;
	c.zstd = k & 4;
	c.version = k & 8 && k % 4 != 3 && !c.zstd ? 2 : 3;
	c.size = 2 << 20;
	if (image_create(&c, NULL) || block_open(&b, &o, NULL, NULL, NULL))
		exit(1);
	memset(buf, 0x42, 70000);
	image_write(b, 4096, buf, 69632);
	for (uint64_t off = 1 << 20; off < (1 << 20) + 4ull * c.cluster_size; off += c.cluster_size)
		image_write_compressed(b, off, buf, c.cluster_size);
	image_bitmap_change(b, BITMAP_ADD, "on", &(struct image_bitmap_arg){ .granularity = 512 }, NULL);
	image_bitmap_change(b, BITMAP_ADD, "off", NULL, NULL);
	image_bitmap_change(b, BITMAP_DISABLE, "off", NULL, NULL);
	image_snapshot_create(b, "one", NULL);
	image_write(b, 65536, buf, 8192);
	image_zero(b, 262144, 131072, true);
	block_close(b);
	FILE *f = fopen(path, "rb");
	fseek(f, 0, SEEK_END);
	*size = (size_t)ftell(f);
	rewind(f);
	p = malloc(*size);
	if (fread(p, 1, *size, f) != *size)
		exit(1);
	fclose(f);
	free(buf);
	return p;
}

/* Somewhere that matters: the header, or an entry of a table that is not zero. */
static void mutate(uint8_t *p, size_t size, unsigned *seed)
{
	static const uint64_t values[] = { 0, 1, 512, 65536, 0x8000000000000000ull, 0x7fffffffffffffffull, 0xffffffffffffffffull, 0x00fffffffffffe00ull,
					   0x4000000000010000ull, 0x8000000000010000ull, 1ull << 32, 0x80000000000001ffull };
	size_t at = (size_t)rand_r(seed) % 112;
	if (rand_r(seed) % 3) {
		for (int tries = 0; tries < 200; tries++) {
			at = (size_t)(((uint64_t)rand_r(seed) << 16 | (unsigned)rand_r(seed)) % (size / 8)) * 8;
			uint64_t v;
			memcpy(&v, p + at, 8);
			if (v && v != 0x4242424242424242ull)
				break;
		}
	}
	unsigned n = rand_r(seed) % 3 == 0 ? 8 : 1;
	uint64_t v = rand_r(seed) & 1 ? values[rand_r(seed) % ARRAY_SIZE(values)] : (uint64_t)rand_r(seed) << (rand_r(seed) % 33);
	uint8_t be[8];
	put64(be, v);
	if (at + 8 > size)
		return;
	if (n == 8)
		memcpy(p + at, be, 8);
	else
		p[at + rand_r(seed) % 8] = (uint8_t)v;
}

int main(int argc, char **argv)
{
	unsigned long runs = argc > 1 ? strtoul(argv[1], NULL, 0) : 1500;
	unsigned seed = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 1;
	close(mkstemp(path));
	unsigned only = argc > 3 ? (unsigned)strtoul(argv[3], NULL, 0) : 16;
	for (unsigned k = only % 16; k < (only < 16 ? only + 1 : 16); k++) {
		size_t size;
		uint8_t *good = make(k, &size), *p = malloc(size);
		for (unsigned long i = 0; i < runs / 16; i++) {
			unsigned was = seed;
			memcpy(p, good, size);
			for (unsigned m = rand_r(&seed) % 4 + 1; m; m--)
				mutate(p, size, &seed);
			alarm(100); /* a hang ends the test, with the seed known */
			if (getenv("VERBOSE"))
				fprintf(stderr, "image %u seed %u\n", k, was);
			LLVMFuzzerTestOneInput(p, i % 16 || only < 16 ? size : size * (i % 7) / 7);
		}
		free(good);
		free(p);
	}
	unlink(path);
	printf("%lu images\n", runs / 16 * 16);
	return 0;
}
#endif
