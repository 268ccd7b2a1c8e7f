/*
 * Hostile VDI, VHD, VHDX and VMDK images: open, info, map, reads, a guest's requests. Nothing may crash, hang or take memory without bound.
 * LLVMFuzzerTestOneInput() takes a format's number and a whole image; main() makes a small good image of each kind, reads
 * it, and then mutates it (with checksums put right again, so that what lies behind them is reached).
 *
 * usage: fuzz-foreign [RUNS [SEED]]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>

#include "block/foreign.h"
#include "fault.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { DISK = 4 << 20, IMAGE = 5 << 20, AT = 1 << 20, PATTERN = 0x5a };
static const char *const names[] = { "vdi", "vpc", "vhdx", "vmdk" };

static struct block *open_image(unsigned format, const uint8_t *data, size_t size)
{
	struct block_opts o = { .file = "fuzz", .read_only = true, .no_backing = true };
	struct block *b = block_new(&o, NULL, NULL);
	struct err e = { 0 };
	b->child = fault_new(data, size);
	if (!foreign_open(b, names[format], &o, 0, &e))
		return b;
	if (getenv("VERBOSE"))
		fprintf(stderr, "%s\n", e.msg);
	block_free(b);
	return NULL;
}

static void look(struct block *b)
{
	static uint8_t buf[65536];
	struct image_info i;
	uint64_t off = 0, len = block_length(b);
	if (!image_info(b, &i))
		image_info_free(&i);
	for (int k = 0; k < 300 && off < len; k++) {
		struct block_extent e;
		if (image_map(b, NULL, off, len - off, &e))
			break;
		image_read(b, off, buf, MIN(e.len, sizeof buf));
		off += e.len;
	}
	if (len > sizeof buf)
		image_read(b, len - sizeof buf, buf, sizeof buf);
	guest_requests(b, (unsigned)len, 16);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size || size > IMAGE + 1)
		return 0;
	struct block *b = open_image(data[0] % 4, data + 1, size - 1);
	if (b)
		look(b);
	block_free(b);
	return 0;
}

#ifndef LIBFUZZER
static void be(uint8_t *p, uint64_t v, int n)
{
	for (int i = 0; i < n; i++)
		p[i] = (uint8_t)(v >> 8 * (n - 1 - i));
}

static void le(uint8_t *p, uint64_t v, int n)
{
	memcpy(p, &v, (size_t)n);
}

/* --- the images: DISK bytes, PATTERN in the second MiB --- */

static void make_vdi(uint8_t *p)
{
	le(p + 64, 0xbeda107f, 4), le(p + 68, 0x10001, 4), le(p + 76, 1, 4);
	le(p + 340, 512, 4), le(p + 344, 4096, 4), le(p + 360, 512, 4), le(p + 368, DISK, 8), le(p + 376, 1 << 20, 4), le(p + 384, 4, 4);
	memset(p + 512, 0xff, 16);
	le(p + 516, 0, 4);
	memset(p + 4096, PATTERN, 1 << 20);
}

static void sum_vpc(uint8_t *p, size_t len, size_t at)
{
	uint32_t sum = 0;
	memset(p + at, 0, 4);
	for (size_t i = 0; i < len; i++)
		sum += p[i];
	be(p + at, ~sum, 4);
}

static void fix_vpc(uint8_t *p)
{
	sum_vpc(p, 512, 64);
	sum_vpc(p + 512, 1024, 36);
}

static void make_vpc(uint8_t *p)
{
	memcpy(p, "conectix", 8), memcpy(p + 28, "win ", 4), memcpy(p + 512, "cxsparse", 8);
	be(p + 16, 512, 8), be(p + 48, DISK, 8), be(p + 60, 3, 4);
	be(p + 512 + 16, 2048, 8), be(p + 512 + 28, 4, 4), be(p + 512 + 32, 1 << 20, 4);
	memset(p + 2048, 0xff, 16);
	be(p + 2052, 8, 4);
	memset(p + 4096, 0xff, 512);
	memset(p + 4608, PATTERN, 1 << 20);
}

static void sum_vhdx(uint8_t *p, size_t len)
{
	uint32_t crc = ~0u;
	memset(p + 4, 0, 4);
	for (size_t i = 0; i < len; i++) {
		crc ^= p[i];
		for (int k = 0; k < 8; k++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	le(p + 4, ~crc, 4);
}

static void fix_vhdx(uint8_t *p)
{
	sum_vhdx(p + 65536, 4096);
	sum_vhdx(p + 3 * 65536, 65536);
}

static void vhdx_item(uint8_t *table, unsigned n, const char *guid, uint64_t v, unsigned len)
{
	uint8_t *e = table + 32 + 32 * n;
	for (int i = 0; i < 16; i++) {
		unsigned byte;
		sscanf(guid + 2 * i, "%2x", &byte);
		e[i] = (uint8_t)byte;
	}
	le(e + 16, 65536 + 64 * n, 4), le(e + 20, len, 4), le(e + 24, 4, 4);
	le(table + 65536 + 64 * n, v, (int)len);
}

static void make_vhdx(uint8_t *p)
{
	uint8_t *h = p + 65536, *region = p + 3 * 65536, *meta = p + (1 << 20), *bat = p + (2 << 20);
	static const uint8_t guids[2][16] = { { 0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08 },
					      { 0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e } };
	memcpy(p, "vhdxfile", 8), memcpy(h, "head", 4), memcpy(region, "regi", 4), memcpy(meta, "metadata", 8);
	le(h + 66, 1, 2), le(h + 68, 1 << 20, 4), le(h + 72, 1 << 20, 8);
	le(region + 8, 2, 4);
	for (int i = 0; i < 2; i++) {
		memcpy(region + 16 + 32 * i, guids[i], 16);
		le(region + 32 + 32 * i, i ? 1 << 20 : 2 << 20, 8), le(region + 40 + 32 * i, 1 << 20, 4), le(region + 44 + 32 * i, 1, 4);
	}
	le(meta + 10, 3, 2);
	vhdx_item(meta, 0, "3767a1ca36fa434db3b633f0aa44e76b", 1 << 20, 8);
	vhdx_item(meta, 1, "2442a52f1bcd7648b2115dbed83bf4b8", DISK, 8);
	vhdx_item(meta, 2, "1dbf41816fa90947ba47f233a8faab5f", 512, 4);
	le(bat + 8, (3 << 20) | 6, 8);
	memset(p + (3 << 20), PATTERN, 1 << 20);
}

static void vmdk_header(uint8_t *p, uint32_t flags)
{
	memcpy(p, "KDMV", 4);
	le(p + 4, 1, 4), le(p + 8, flags, 4), le(p + 12, DISK / 512, 8), le(p + 20, 128, 8), le(p + 28, 1, 8), le(p + 36, 1, 8);
	le(p + 44, 64, 4), le(p + 56, 8, 8), memcpy(p + 73, "\n \r\n", 4);
	strcpy((char *)p + 512, "version=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 8192 SPARSE \"x\"\n");
	le(p + 4096, 16, 4); /* one directory entry: table at sector 16 */
}

static void make_vmdk(uint8_t *p)
{
	vmdk_header(p, 3 | 4);
	for (unsigned i = 0; i < 16; i++)
		le(p + 8192 + 4 * (16 + i), 128 + 128 * i, 4);
	le(p + 8192, 1, 4); /* zeroes */
	memset(p + 65536, PATTERN, 1 << 20);
}

static void make_stream(uint8_t *p)
{
	uint8_t grain[65536];
	memset(grain, PATTERN, sizeof grain);
	vmdk_header(p, 3 | 3 << 16);
	le(p + 77, 1, 2);
	for (unsigned i = 0; i < 16; i++) {
		uLongf n = 4000;
		uint8_t *at = p + 65536 + 4096 * i;
		compress(at + 12, &n, grain, sizeof grain);
		le(at, 2048 + 128 * i, 8), le(at + 8, n, 4);
		le(p + 8192 + 4 * (16 + i), 128 + 8 * i, 4);
	}
}

/* Alone: what names other files must name good ones, or fail. */
static void make_descriptor(uint8_t *p)
{
	strcpy((char *)p, "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 2048 ZERO\n"
			  "RW 2048 FLAT \"/dev/zero\" 0\nRW 4096 ZERO\nddb.adapterType = \"ide\"\n");
}

static const struct kind { unsigned format; void (*make)(uint8_t *p), (*fix)(uint8_t *p); bool good; size_t head; } kinds[] = {
	{ 0, make_vdi, NULL, true, 528 }, { 1, make_vpc, fix_vpc, true, 2064 }, { 2, make_vhdx, fix_vhdx, true, 0 },
	{ 3, make_vmdk, NULL, true, 8448 }, { 3, make_stream, NULL, true, 8448 }, { 3, make_descriptor, NULL, false, 200 },
};

/* The good image reads as it should. */
static int check_good(const struct kind *k, const uint8_t *p)
{
	static uint8_t disk[DISK], want[DISK];
	struct block *b = open_image(k->format, p, IMAGE);
	int r = 1;
	if (!k->good)
		return b ? 1 : 0;
	memset(want + AT, PATTERN, 1 << 20);
	if (b && block_length(b) == DISK && !image_read(b, 0, disk, DISK) && !memcmp(disk, want, DISK))
		r = 0;
	block_free(b);
	return r;
}

static void mutate(const struct kind *k, uint8_t *p, unsigned *seed)
{
	static const size_t parts[] = { 65536, 3 * 65536, 1 << 20, (1 << 20) + 65536, 2 << 20 };
	static const uint64_t values[] = { 0, 1, 2, 7, 512, 4096, 1 << 20, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffffffffffeull,
					   0x7fffffffffffffffull, 0x8000000000000000ull, 0xffffffffffffffffull };
	size_t at = k->head ? (unsigned)rand_r(seed) % k->head : parts[rand_r(seed) % 5] + (unsigned)rand_r(seed) % 256;
	uint64_t v = rand_r(seed) & 1 ? values[rand_r(seed) % ARRAY_SIZE(values)] : (uint64_t)rand_r(seed) << rand_r(seed) % 33;
	int n = 1 << rand_r(seed) % 4;
	if (k->format == 1)
		be(p + at, v, n);
	else
		le(p + at, v, n);
}

int main(int argc, char **argv)
{
	unsigned long runs = argc > 1 ? strtoul(argv[1], NULL, 0) : 600;
	unsigned seed = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 1;
	uint8_t *good = malloc(IMAGE), *p = malloc(IMAGE + 1);
	for (size_t k = 0; k < ARRAY_SIZE(kinds); k++) {
		memset(good, 0, IMAGE);
		kinds[k].make(good);
		if (kinds[k].fix)
			kinds[k].fix(good);
		if (check_good(&kinds[k], good)) {
			printf("FAIL: image %zu (%s) does not read as it was made\n", k, names[kinds[k].format]);
			return 1;
		}
		for (unsigned long i = 0; i < runs / ARRAY_SIZE(kinds); i++) {
			memcpy(p + 1, good, IMAGE);
			p[0] = (uint8_t)kinds[k].format;
			for (unsigned m = (unsigned)rand_r(&seed) % 4 + 1; m; m--)
				mutate(&kinds[k], p + 1, &seed);
			if (kinds[k].fix && i % 8)
				kinds[k].fix(p + 1);
			alarm(100); /* a hang ends the test */
			LLVMFuzzerTestOneInput(p, i % 16 ? IMAGE + 1 : IMAGE * (i / 16 % 7) / 7);
		}
	}
	free(good);
	free(p);
	printf("%lu images\n", runs / ARRAY_SIZE(kinds) * ARRAY_SIZE(kinds));
	return 0;
}
#endif
