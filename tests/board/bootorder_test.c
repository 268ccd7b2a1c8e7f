/* What bootindex= and -boot strict=on come to: the fw_cfg file "bootorder" of a whole machine, read through the ports. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "block/block.h"
#include "board/internal.h"
#include "dev/fw_cfg.h"
#include "net/net.h"

struct back { struct block *disk[4]; struct net_backend *net; };

static void *find(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	struct back *b = opaque;

	return type == PROP_DRIVE ? (void *)b->disk[id[1] - '0'] : (void *)b->net;
}

static uint32_t get(struct machine *m, unsigned n)
{
	uint32_t v = 0;

	for (unsigned i = 0; i < n; i++) {
		uint8_t b;

		io_read(m->env.ports, 0x511, &b, 1);
		v = v << 8 | b;
	}
	return v;
}

static void choose(struct machine *m, uint16_t key) { io_write(m->env.ports, 0x510, &key, 2); }

/* The file's bytes, -1 when it is not there. */
static int read_file(struct machine *m, const char *name, char *buf, size_t max)
{
	choose(m, FW_CFG_FILE_DIR);
	for (unsigned n = get(m, 4); n; n--) {
		uint32_t size = get(m, 4), key = get(m, 4) >> 16;
		char is[56];

		for (unsigned i = 0; i < sizeof(is); i++)
			is[i] = (char)get(m, 1);
		if (strcmp(is, name))
			continue;
		choose(m, (uint16_t)key);
		for (uint32_t i = 0; i < size && i < max; i++)
			buf[i] = (char)get(m, 1);
		return (int)size;
	}
	return -1;
}

static const char *current;
static int failed;

static void check(bool ok, const char *what)
{
	failed += !ok;
	printf("%s %s%s%s\n", ok ? "ok" : "not ok", current, ok ? "" : ": ", ok ? "" : what);
}

/* `want`: the file with its NUL, `len` bytes; or, with `len` -1, a piece of the error. */
static void expect(const char *name, struct machine_config cfg, const char *want, int len)
{
	struct back b = { 0 };
	struct err err = { 0 };
	struct machine *m;
	char buf[512];

	current = name;
	if (loop_create(&cfg.loop, &err) || workers_create(&cfg.workers, cfg.loop, 1, &err) ||
	    net_open(&b.net, "user,id=n,restrict=on", cfg.loop, &err)) {
		printf("skipped: %s\n", err.msg);
		exit(77);
	}
	for (unsigned i = 0; i < ARRAY_SIZE(b.disk); i++) {
		char path[] = "/tmp/bootorder-XXXXXX";
		int fd = mkstemp(path);

		if (fd < 0 || ftruncate(fd, 1 << 20) ||
		    block_open(&b.disk[i], &(struct block_opts){ .id = "d", .file = path, .format = "raw" }, cfg.loop, cfg.workers, &err))
			exit(2);
		close(fd);
		unlink(path);
	}
	cfg.accel = ACCEL_SOFT;
	cfg.cpus = 1;
	cfg.mem_size = 16 << 20;
	cfg.backends = (struct backend_lookup){ find, &b };
	if (machine_create(&m, &cfg, &err)) {
		check(len < 0 && strstr(err.msg, want), err.msg);
	} else {
		int n = read_file(m, "bootorder", buf, sizeof(buf));

		check(len >= 0 && n == len && !memcmp(buf, want, (size_t)len), n > 0 ? buf : "(empty or absent)");
		machine_destroy(m);
	}
	for (unsigned i = 0; i < ARRAY_SIZE(b.disk); i++)
		block_close(b.disk[i]);
	net_close(b.net);
	workers_destroy(cfg.workers);
	loop_destroy(cfg.loop);
}

#define P(...) (const struct machine_prop[]){ __VA_ARGS__ }, sizeof((const struct machine_prop[]){ __VA_ARGS__ }) / sizeof(struct machine_prop)

int main(void)
{
	static const char all[] = "/pci@i0cf8/ethernet@5,1/ethernet-phy@0\n/pci@i0cf8/scsi@6/channel@0/disk@3,0\n"
				  "/pci@i0cf8/scsi@5/disk@0,0\n/pci@i0cf8/scsi@6/channel@0/disk@0,2",
			  strict[] = "/pci@i0cf8/scsi@3/disk@0,0\nHALT";
	const struct machine_device devs[] = {
		{ "virtio-blk-pci", "a", P({ "drive", "d0" }, { "addr", "5" }, { "multifunction", "on" }, { "bootindex", "7" }) },
		{ "virtio-net-pci", "b", P({ "netdev", "n" }, { "addr", "5.1" }, { "bootindex", "0" }) },
		{ "virtio-scsi-pci", "s", P({ "addr", "6" }) },
		{ "scsi-hd", "c", P({ "drive", "d1" }, { "scsi-id", "3" }, { "bootindex", "1" }) },
		{ "scsi-cd", "d", P({ "drive", "d2" }, { "scsi-id", "0" }, { "lun", "2" }, { "bootindex", "2147483647" }) },
		{ "virtio-blk-pci", "e", P({ "drive", "d3" }, { "bootindex", "-1" }) },
	};
	const struct machine_device one[] = { { "virtio-blk-pci", NULL, P({ "drive", "d0" }, { "addr", "3" }, { "bootindex", "1" }) },
					      { "virtio-net-pci", NULL, P({ "netdev", "n" }, { "bootindex", "1" }) },
					      { "virtio-net-pci", NULL, P({ "netdev", "n" }, { "romfile", "efi.rom" }) } };

	expect("by bootindex, whatever the order on the command line", (struct machine_config){ .devices = devs, .ndevices = 6 }, all,
	       sizeof(all));
	expect("strict", (struct machine_config){ .devices = one, .ndevices = 1, .boot_strict = true }, strict, sizeof(strict));
	expect("strict without any", (struct machine_config){ .boot_strict = true }, "HALT", 5);
	expect("no order", (struct machine_config){ .ndevices = 0 }, "", 0);
	expect("twice", (struct machine_config){ .devices = one, .ndevices = 2 }, "bootindex 1", -1);
	expect("option ROM", (struct machine_config){ .devices = one + 2, .ndevices = 1 }, "romfile=efi.rom", -1);
	return failed != 0;
}
