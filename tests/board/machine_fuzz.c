/*
 * A hostile guest against a whole machine on softkvm: every device class there is (the table is walked) on one board, and
 * random port, MMIO and configuration accesses as a vCPU's exits would bring them. BARs are moved anywhere: over each other,
 * over RAM, the ECAM window and the interrupt controllers. Rings and descriptors are garbage in RAM. Requests (reset,
 * power-off, exit) are acted upon, and the machine goes on.
 *
 *   machine_fuzz [RUNS [SEED]]     machine_fuzz --classes: the classes it drives, one a line; FUZZ_LOG=1 prints the log
 */
#define FUZZ_OWN_MAIN
#include "../pci/fuzz.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/block.h"
#include "board/internal.h"
#include "chr/chr.h"
#include "net/net.h"

#define RAM (16u << 20)
#define MAX_DEVICES 64

struct board {
	struct loop *loop;
	struct workers *workers;
	struct block *disk[MAX_DEVICES];
	struct net_backend *net[MAX_DEVICES];
	struct chardev *chr[MAX_DEVICES];
	struct machine_device devs[MAX_DEVICES];
	struct machine_prop props[MAX_DEVICES][4];
	char id[MAX_DEVICES][12];
	unsigned n;
	struct machine *m;
};

static int open_disk(struct board *b, unsigned i, struct err *err)
{
	char path[] = "/tmp/machine-fuzz-XXXXXX";
	int fd = mkstemp(path), r = 0;

	if (fd < 0 || ftruncate(fd, 1 << 20))
		return -1;
	r = block_open(&b->disk[i], &(struct block_opts){ .id = b->id[i], .file = path, .format = "raw" }, b->loop, b->workers, err);
	close(fd);
	unlink(path);
	return r;
}

/* One device of the class with the back ends that its properties name. */
static int add_device(struct board *b, const struct device_class *cls, struct err *err)
{
	struct machine_device *d = &b->devs[b->n];
	unsigned i = b->n++;
	char spec[64];
	int r = 0;

	if (b->n > MAX_DEVICES)
		abort();
	snprintf(b->id[i], sizeof(b->id[i]), "%u", i);
	*d = (struct machine_device){ cls->name, NULL, b->props[i], 0 };
	for (const struct prop *p = cls->props; p && p->name && !r; p++) {
		if (p->type == PROP_DRIVE)
			r = open_disk(b, i, err);
		else if (p->type == PROP_NETDEV)
			r = net_open(&b->net[i], "user,id=n,restrict=on", b->loop, err);
		else if (p->type == PROP_CHARDEV)
			snprintf(spec, sizeof(spec), "ringbuf,id=c%u,size=4096", i),
			r = chr_open(&b->chr[i], spec, &(struct chr_env){ .loop = b->loop }, err);
		else
			continue;
		b->props[i][d->nprops++] = (struct machine_prop){ p->name, b->id[i] };
	}
	return r;
}

static void *find(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	struct board *b = opaque;
	unsigned i = strtoul(id, NULL, 10);

	return type == PROP_DRIVE ? (void *)b->disk[i] : type == PROP_NETDEV ? (void *)b->net[i] : (void *)b->chr[i];
}

static void board_start(struct board *b)
{
	struct err err = { 0 };
	struct machine_config cfg = { .accel = ACCEL_SOFT, .cpus = 2, .mem_size = RAM, .devices = b->devs };
	int r;

	memset(b, 0, sizeof(*b));
	r = loop_create(&b->loop, &err) || workers_create(&b->workers, b->loop, 2, &err);
	for (unsigned i = 0; !r && device_class_at(i); i++)
		r = add_device(b, device_class_at(i), &err);
	cfg.ndevices = b->n;
	cfg.loop = b->loop;
	cfg.workers = b->workers;
	cfg.backends = (struct backend_lookup){ find, b };
	if (!r)
		r = machine_create(&b->m, &cfg, &err);
	if (r) {
		fprintf(stderr, "machine-fuzz: %s\n", err.msg);
		abort();
	}
}

static void board_stop(struct board *b)
{
	machine_destroy(b->m);
	for (unsigned i = 0; i < b->n; i++) {
		if (b->disk[i])
			block_close(b->disk[i]);
		if (b->net[i])
			net_close(b->net[i]);
		if (b->chr[i])
			chr_close(b->chr[i]);
	}
	workers_destroy(b->workers);
	loop_destroy(b->loop);
}

static void stop(void *opaque) { loop_stop(opaque, 0); }

/* Let the loop do what is due: completions, requests. What ends a machine does not end this one. */
static void turn(struct board *b)
{
	loop_post(b->loop, stop, b->loop);
	loop_run(b->loop);
	b->m->ended = false;
	machine_resume(b->m);
}

static uint64_t anywhere(struct machine *m, const uint8_t *p)
{
	static const uint64_t base[] = { 0, 0xa0000, RAM - 8, ECAM_BASE, PCI32_BASE, PCI32_BASE + 0x10000, IOAPIC_BASE, LAPIC_BASE,
					 HIGH_BASE - 8, HIGH_BASE };

	return p[0] % 12 < ARRAY_SIZE(base) ? base[p[0] % 12] + (ld_le16(p + 1) & (p[0] & 0x80 ? 0xffff : 0xff0)) :
	       p[0] & 16 ? m->pci64_base + ld_le16(p + 1) : ld_le64(p);
}

/* The n-th function there is, counted round. */
static struct pci_device *function(struct machine *m, unsigned n)
{
	struct pci_device *found[256];
	unsigned k = 0;

	for (unsigned i = 0; i < 256; i++)
		if (pci_bus_device(m->bus, i))
			found[k++] = pci_bus_device(m->bus, i);
	return found[n % k];
}

static void config(struct machine *m, const uint8_t *p)
{
	static const uint8_t regs[] = { 0x04, 0x06, 0x0c, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30, 0x3c };
	unsigned devfn = function(m, p[1])->devfn, off = p[2] & 0x80 ? ld_le16(p + 2) & 0xfff : regs[p[2] % sizeof(regs)];
	uint32_t v = p[3] & 0x40 ? (uint32_t)anywhere(m, p + 4) : ld_le32(p + 4), len = 1u << (p[3] % 3), sel = 0x80000000 | devfn << 8;

	if (off == 4 && p[3] & 0x80)
		v |= 7;
	if (p[3] & 0x20) {
		io_write(m->env.ports, 0xcf8, &(uint32_t){ sel | (off & 0xfc) }, 4);
		io_write(m->env.ports, 0xcfc + (off & 3), &v, len);
		io_read(m->env.ports, 0xcfc + (off & 3), &v, len);
	} else {
		io_write(m->env.mmio, ECAM_BASE + (devfn << 12) + off, &v, len);
		io_read(m->env.mmio, ECAM_BASE + (devfn << 12) + off, &v, len);
	}
}

static void port(struct machine *m, const uint8_t *p)
{
	static const uint16_t base[] = { 0x20, 0x40, 0x60, 0x64, 0x70, 0x71, 0x80, 0x92, 0xa0, 0xe9, 0x3f8, 0x4d0, 0x501, 0x510, 0x514,
					 0x600, 0x604, 0x620, 0xcf8, 0xcf9, 0xcfc };
	uint16_t at = p[1] < 0xe0 ? base[p[1] % ARRAY_SIZE(base)] + (p[2] & 7) : ld_le16(p + 1);
	uint32_t v = ld_le32(p + 4), len = 1u << (p[3] % 3);

	if (p[3] & 0x40)
		io_read(m->env.ports, at, &v, len);
	else
		io_write(m->env.ports, at, &v, len);
}

/* Inside a BAR, wherever that is: registers, MSI-X tables. */
static void bar(struct machine *m, const uint8_t *p)
{
	struct pci_device *d = function(m, p[1]);
	uint64_t v = ld_le64(p + 4), at = pci_bar_addr(d, p[2] & 0x80 ? p[2] % 6 : p[2] & 1 ? 4 : 1);
	unsigned off = p[2] & 0x40 ? ld_le16(p + 10) & 0x3fff : p[3] & 0x3f, len = 1u << (p[3] >> 6);

	if (!at)
		return;
	io_write(m->env.mmio, at + off, &v, len);
	io_read(m->env.mmio, at + off, &v, len);
}

/* As a driver would start a virtio device, but for what it says. */
static void driver(struct machine *m, const uint8_t *p)
{
	struct pci_device *d = function(m, p[1]);
	uint64_t at = pci_bar_addr(d, 4), ring;

	if (!at)
		return;
	pci_config_write(m->bus, d->devfn, 4, 7, 2);
	io_write(m->env.mmio, at + 20, &(uint8_t){ 0 }, 1);
	io_write(m->env.mmio, at + 20, &(uint8_t){ 3 }, 1);
	for (uint32_t i = 0, f, want = ld_le32(p + 4); i < 2; i++, want = 1 | p[3]) { /* VERSION_1, sometimes packed rings */
		io_write(m->env.mmio, at, &i, 4);
		io_read(m->env.mmio, at + 4, &f, 4);
		f &= want;
		io_write(m->env.mmio, at + 8, &i, 4);
		io_write(m->env.mmio, at + 12, &f, 4);
	}
	io_write(m->env.mmio, at + 20, &(uint8_t){ 11 }, 1);
	for (uint16_t q = 0; q < 8; q++) {
		ring = 0x100000 + p[8 + (q & 3)] * 0x400ull + q * 64;
		io_write(m->env.mmio, at + 22, &q, 2);
		io_write(m->env.mmio, at + 24, &(uint16_t){ 1 << (p[2] & 7) }, 2);
		for (unsigned i = 0; i < 3; i++, ring += p[2] & 8 ? 0x1000 : 0x800)
			io_write(m->env.mmio, at + 32 + 8 * i, &ring, 8);
		io_write(m->env.mmio, at + 28, &(uint16_t){ 1 }, 2);
	}
	io_write(m->env.mmio, at + 20, &(uint8_t){ 15 }, 1);
	for (uint16_t q = 0; q < 8; q++)
		io_write(m->env.mmio, at + 0x3000 + 4 * q, &q, 2);
}

/* Descriptor-like garbage where driver() looks for rings: small indices, addresses in RAM. */
static void garbage(struct machine *m, const uint8_t *p)
{
	uint64_t at = 0x100000 + p[1] * 0x400ull + (p[2] & 0x3f) * 16ull;
	uint8_t d[16] = { 0 };

	memcpy(d, p + 4, 3);
	memcpy(d + 8, p + 7, p[3] & 1 ? 2 : 4);
	d[12] = p[10] & 7;
	d[14] = p[11] & 15;
	if (p[3] & 0xf0)
		d[2] = 0x10 | (d[2] & 15);
	gm_write(m->env.mem, at, d, sizeof(d));
}

static void step(struct board *b, const uint8_t *p)
{
	struct machine *m = b->m;
	uint64_t v = ld_le64(p + 4);

	switch (p[0] % 16) {
	case 0: case 1: config(m, p); break;
	case 2: case 3: port(m, p); break;
	case 4: case 5: case 6: bar(m, p); break;
	case 7: driver(m, p); break;
	case 8: case 9: case 10: garbage(m, p); break;
	case 11: io_write(m->env.mmio, anywhere(m, p + 1), &v, 1u << (p[3] & 3)); break;
	case 12: io_read(m->env.mmio, anywhere(m, p + 1), &v, 1u << (p[3] & 3)); break;
	case 13:
		if (p[1] < 64)
			pci_bus_assign(m->bus, NULL);
		break;
	default: turn(b);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static struct board b;

	board_start(&b);
	pci_bus_assign(b.m->bus, NULL);
	FUZZ_EACH(data, len, 12)
		step(&b, data);
	turn(&b);
	board_stop(&b);
	return 0;
}

#ifndef LIBFUZZER
static void print_log(enum log_level level, const char *line, void *opaque) { fprintf(stderr, "%s\n", line); }

int main(int argc, char **argv)
{
	log_set_sink(getenv("FUZZ_LOG") ? print_log : NULL, NULL, LOG_DEBUG);
	if (argc > 1 && !strcmp(argv[1], "--classes")) {
		static struct board b;

		board_start(&b);
		for (struct device *d = b.m->devices; d; d = d->next)
			puts(d->cls->name);
		board_stop(&b);
		return 0;
	}
	return fuzz_main(argc, argv);
}
#endif
