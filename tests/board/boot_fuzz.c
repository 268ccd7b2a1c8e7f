/* Kernel images with damaged headers: the boot protocols read them, or refuse them with a message. boot_fuzz ROUNDS SEED IMAGE... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/boot.h"

#define RAM (32 << 20)
#define MAX_IMAGE (1 << 16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static int load(struct boot *b, struct err *err)
{
	struct boot_entry e;
	uint8_t initrd[100] = "initrd";
	char cmdline[] = "module", path[] = "initrd";
	struct boot_module m = { { path, initrd, sizeof(initrd) }, cmdline, path };

	b->cmdline = "console=ttyS0";
	b->modules = &m;
	b->nmodules = 1;
	if (boot_is_multiboot(&b->kernel))
		return boot_load_multiboot(b, &e, err);
	if (boot_is_bzimage(&b->kernel))
		return boot_load_bzimage(b, &e, err);
	return boot_is_elf(&b->kernel) ? boot_load_elf(b, &e, err) : err_set(err, -1, "not a kernel");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct boot b = { .low_ram = RAM, .nmap = 1, .map = { { 0, RAM, E820_TYPE_RAM } } };
	struct err err = { 0 };
	uint8_t *copy;

	if (!len || guest_mem_create(&b.mem, NULL, &err) || guest_mem_add_ram(b.mem, "ram", 0, RAM, NULL, &err))
		abort();
	copy = malloc(len);             /* of its exact size, so that ASan sees the end */
	memcpy(copy, data, len);
	b.kernel = (struct boot_file){ "kernel", copy, len };
	if (load(&b, &err) && !err.msg[0])
		abort();
	free(copy);
	guest_mem_destroy(b.mem);
	return 0;
}

#ifndef LIBFUZZER
static uint64_t x;

static uint64_t rnd(void)
{
	x ^= x << 13; x ^= x >> 7; x ^= x << 17;
	return x * 0x2545f4914f6cdd1dull >> 8;
}

/* The smallest head of a bzImage. */
static size_t bzimage(uint8_t *p)
{
	memset(p, 0, 8192);
	p[0x1f1] = 1;
	p[0x1f4] = 0x100 - 0x40;
	memcpy(p + 0x1fe, "\x55\xaa\xeb\x66HdrS\x0f\x02", 10);
	p[0x211] = 1;
	p[0x236] = 1;
	p[0x239] = 8;
	p[0x25a] = 16;
	p[0x262] = 0x10;
	return 8192;
}

static size_t pick(uint8_t *p, int n, char **names)
{
	unsigned which = (unsigned)(rnd() % (unsigned)(n + 1));
	size_t len;
	FILE *f;

	if (!which)
		return bzimage(p);
	f = fopen(names[which - 1], "rb");
	if (!f)
		exit(2);
	len = fread(p, 1, MAX_IMAGE, f);
	fclose(f);
	return len;
}

static void damage(uint8_t *p, size_t len)
{
	for (unsigned n = rnd() % 6; n; n--) {
		size_t at = rnd() % (rnd() & 1 ? MIN(len, (size_t)0x280) : MIN(len, (size_t)0x2000)), w = 1u << (rnd() & 3);
		uint64_t v = rnd() & 1 ? rnd() : rnd() & 1 ? 1ull << (rnd() & 63) : ~0ull << (rnd() & 63);

		memcpy(p + at, &v, MIN(w, len - at));
	}
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : 1000;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
	static uint8_t image[MAX_IMAGE];

	for (unsigned long r = 0; r < rounds; r++) {
		x = (seed + r) * 0x9e3779b97f4a7c15ull | 1;
		size_t len = pick(image, MAX(argc - 3, 0), argv + 3);

		damage(image, len);
		LLVMFuzzerTestOneInput(image, rnd() & 3 ? len : 1 + rnd() % len);
	}
	return 0;
}
#endif
