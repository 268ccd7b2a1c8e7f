/* PCI: configuration mechanisms, BAR sizing and moving, INTx sharing, MSI-X masking. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/util.h"
#include "pci/pci.h"

#define ECAM 0xb0000000u

struct fx {
	struct io_space *ports, *mmio;
	struct pci_bus *bus;
	struct pci_device d[3];
	pthread_mutex_t lock[3];
	int level, msis;
	uint64_t addr;
	uint32_t data;
	uint64_t reg;
};

static void set_line(void *o, int n, int level)
{
	((struct fx *)o)->level = level;
}

static struct irq_line route(void *o, int dev, int pin)
{
	return (struct irq_line){ set_line, o, 0 };
}

static void send(void *o, uint64_t addr, uint32_t data, uint32_t req)
{
	struct fx *f = o;

	f->msis++;
	f->addr = addr;
	f->data = data;
}

static uint64_t reg_read(void *o, uint64_t off, unsigned size) { return ((struct fx *)o)->reg + off; }
static void reg_write(void *o, uint64_t off, uint64_t v, unsigned size) { ((struct fx *)o)->reg = v; }
static const struct io_ops reg_ops = { reg_read, reg_write, 1, 4 };

static int setup(void **st)
{
	static const struct pci_ids ids = { 0x1af4, 0x1041, 0x1af4, 0x1100, 0x02, 0, 0, 1 };
	struct fx *f = calloc(1, sizeof(*f));
	struct pci_bus_config c = { .msi = { send, f }, .ecam_base = ECAM, .mmio32_base = 0xc0000000,
				    .mmio32_size = 0x3ec00000, .mmio64_base = 1ULL << 33, .mmio64_size = 1ULL << 33,
				    .route_intx = route, .opaque = f };

	assert_int_equal(io_space_create(&f->ports, "ports", 0x10000, NULL), 0);
	assert_int_equal(io_space_create(&f->mmio, "mmio", UINT64_MAX, NULL), 0);
	c.ports = f->ports;
	c.mmio = f->mmio;
	assert_int_equal(pci_bus_create(&f->bus, &c, NULL), 0);
	for (int i = 0; i < 3; i++) {
		pthread_mutex_init(&f->lock[i], NULL);
		pci_device_init(&f->d[i], "test", &ids, &f->lock[i]);
		pci_bar_init(&f->d[i], 0, 0x4000, false, true, false, "regs", &reg_ops, f);
		pci_bar_init(&f->d[i], 2, 0x20, true, false, false, "ports", &reg_ops, f);
		pci_set_intx_pin(&f->d[i], 0);
		assert_int_equal(msix_init(&f->d[i], 4, 4, 0, 0x800, NULL), 0);
		assert_int_equal(pci_device_add(f->bus, &f->d[i], i == 2 ? 2 << 3 | 1 : -1, NULL), 0);
	}
	*st = f;
	return 0;
}

static int teardown(void **st)
{
	struct fx *f = *st;

	for (int i = 0; i < 3; i++) {
		pci_device_remove(&f->d[i]);
		msix_free(&f->d[i]);
	}
	pci_bus_destroy(f->bus);
	io_space_destroy(f->ports);
	io_space_destroy(f->mmio);
	free(f);
	return 0;
}

static uint32_t rd(struct io_space *s, uint64_t a, unsigned n)
{
	uint32_t v = 0;

	io_read(s, a, &v, n);
	return v;
}

static void wr(struct io_space *s, uint64_t a, uint32_t v, unsigned n)
{
	io_write(s, a, &v, n);
}

static void mechanisms(void **st)
{
	struct fx *f = *st;

	wr(f->ports, 0xcf8, 0x80000000, 4);
	assert_int_equal(rd(f->ports, 0xcfc, 4), 0x10411af4);
	assert_int_equal(rd(f->ports, 0xcfe, 2), 0x1041);
	assert_int_equal(rd(f->ports, 0xcff, 1), 0x10);
	assert_int_equal(rd(f->mmio, ECAM, 4), 0x10411af4);
	assert_int_equal(rd(f->mmio, ECAM + (31 << 15), 4), 0xffffffff);
	assert_int_equal(rd(f->mmio, ECAM + (1 << 20), 4), 0xffffffff);
	wr(f->ports, 0xcf8, 0x80010000, 4);                     /* bus 1 */
	assert_int_equal(rd(f->ports, 0xcfc, 4), 0xffffffff);
	wr(f->mmio, ECAM, 0, 4);                                /* ids are read-only */
	assert_int_equal(rd(f->mmio, ECAM, 4), 0x10411af4);
	assert_int_equal(pci_device_add(f->bus, &f->d[1], 0, NULL), -EBUSY);
}

static void sizing_and_moving(void **st)
{
	struct fx *f = *st;
	uint64_t c = ECAM + (1 << 15);

	wr(f->mmio, c + 0x10, 0xffffffff, 4);
	wr(f->mmio, c + 0x14, 0xffffffff, 4);
	assert_int_equal(rd(f->mmio, c + 0x10, 4), 0xffffc004);
	assert_int_equal(rd(f->mmio, c + 0x14, 4), 0xffffffff);
	wr(f->mmio, c + 0x18, 0xffffffff, 4);
	assert_int_equal(rd(f->mmio, c + 0x18, 4), 0xffffffe1);
	wr(f->mmio, c + 0x10, 0xc0000000, 4);
	wr(f->mmio, c + 0x14, 0, 4);
	wr(f->mmio, c + 0x18, 0xc000, 4);
	assert_int_equal(rd(f->mmio, 0xc0000000, 4), 0xffffffff);
	wr(f->mmio, c + 4, 3, 2);
	wr(f->mmio, 0xc0000000, 0x100, 4);
	assert_int_equal(rd(f->mmio, 0xc0000004, 4), 0x104);
	assert_int_equal(rd(f->ports, 0xc004, 1), 0x04);
	wr(f->mmio, c + 0x14, 2, 4);                            /* above 4 GiB */
	assert_int_equal(rd(f->mmio, 0xc0000004, 4), 0xffffffff);
	assert_int_equal(rd(f->mmio, 0x2c0000004, 4), 0x104);
	wr(f->mmio, c + 4, 0, 2);
	assert_int_equal(rd(f->mmio, 0x2c0000004, 4), 0xffffffff);
}

static void overlap_heals(void **st)
{
	struct fx *f = *st;

	for (int i = 0; i < 2; i++) {
		wr(f->mmio, ECAM + (i << 15) + 0x10, 0xc0000000, 4);
		wr(f->mmio, ECAM + (i << 15) + 4, 2, 2);
	}
	assert_true(f->d[0].bar[0].win.mapped);
	assert_false(f->d[1].bar[0].win.mapped);
	wr(f->mmio, ECAM + 0x10, 0xd0000000, 4);
	assert_true(f->d[1].bar[0].win.mapped);
}

static void assignment(void **st)
{
	struct fx *f = *st;
	struct err err = { 0 };

	for (int again = 0; again < 2; again++) {
		assert_int_equal(pci_bus_assign(f->bus, &err), 0);
		for (int i = 0; i < 3; i++)
			for (int n = 0; n < 5; n += 2) {
				assert_true(f->d[i].bar[n].win.mapped);
				assert_int_equal(pci_bar_addr(&f->d[i], n) % f->d[i].bar[n].size, 0);
			}
		pci_bus_reset(f->bus);
		assert_false(f->d[0].bar[0].win.mapped);
	}
}

static void intx(void **st)
{
	struct fx *f = *st;

	pci_set_intx(&f->d[0], 1);
	pci_set_intx(&f->d[1], 1);
	pci_set_intx(&f->d[0], 0);
	assert_int_equal(f->level, 1);
	wr(f->mmio, ECAM + (1 << 15) + 4, 0x400, 2);            /* disabled at the device */
	assert_int_equal(f->level, 0);
	assert_true(rd(f->mmio, ECAM + (1 << 15) + 6, 2) & 8);
	wr(f->mmio, ECAM + (1 << 15) + 4, 0, 2);
	assert_int_equal(f->level, 1);
	pci_set_intx(&f->d[1], 0);
	assert_int_equal(f->level, 0);
}

static void msix(void **st)
{
	struct fx *f = *st;
	unsigned cap = f->d[0].cfg[0x34];
	uint64_t t;

	pci_bus_assign(f->bus, NULL);
	t = pci_bar_addr(&f->d[0], 4);
	assert_int_equal(rd(f->mmio, ECAM + cap + 2, 2), 3);
	assert_int_equal(rd(f->mmio, t + 12, 4), 1);
	msix_notify(&f->d[0], 0);
	assert_int_equal(f->msis, 0);
	wr(f->mmio, ECAM + 4, 6, 2);
	wr(f->mmio, ECAM + cap + 2, 0x8000, 2);
	wr(f->mmio, t + 16, 0xfee01000, 4);
	wr(f->mmio, t + 24, 0x4041, 4);
	msix_notify(&f->d[0], 1);                               /* masked: pends */
	assert_int_equal(f->msis, 0);
	assert_int_equal(rd(f->mmio, t + 0x800, 4), 2);
	wr(f->mmio, t + 0x800, 0, 4);                           /* the PBA is read-only */
	wr(f->mmio, t + 28, 0, 4);
	assert_int_equal(f->msis, 1);
	assert_int_equal(f->addr, 0xfee01000);
	assert_int_equal(f->data, 0x4041);
	assert_int_equal(rd(f->mmio, t + 0x800, 4), 0);
	wr(f->mmio, ECAM + cap + 2, 0xc000, 2);                 /* function mask */
	msix_notify(&f->d[0], 1);
	msix_notify(&f->d[0], 1);
	assert_int_equal(f->msis, 1);
	wr(f->mmio, ECAM + cap + 2, 0x8000, 2);
	assert_int_equal(f->msis, 2);
	msix_notify(&f->d[0], 1);
	assert_int_equal(f->msis, 3);
	msix_notify(&f->d[0], 4);
	msix_notify(&f->d[0], 0xffffffff);
	assert_int_equal(f->msis, 3);
}

/* As in QEMU: functions other than 0 need a function 0 that says so, in whatever order they come. */
static void multifunction(void **st)
{
	struct fx *f = *st;
	struct err err = { 0 };

	assert_int_equal(rd(f->mmio, ECAM + 0xe, 1), 0);
	pci_device_remove(&f->d[1]);                            /* slot 2 has function 1 only */
	assert_int_equal(pci_device_add(f->bus, &f->d[1], 2 << 3, &err), -EINVAL);
	assert_non_null(strstr(err.msg, "multifunction=on"));
	f->d[1].multifunction = true;
	assert_int_equal(pci_device_add(f->bus, &f->d[1], 2 << 3, NULL), 0);
	assert_int_equal(rd(f->mmio, ECAM + (2 << 15) + 0xe, 1), 0x80);
	pci_device_remove(&f->d[2]);
	assert_int_equal(rd(f->mmio, ECAM + (2 << 15) + 0xe, 1), 0x80);
	assert_int_equal(pci_device_add(f->bus, &f->d[2], 1, &err), -EINVAL);   /* function 0 there is a single one */
	assert_int_equal(pci_device_add(f->bus, &f->d[2], 2 << 3 | 7, NULL), 0);
	char path[64];

	pci_fw_path(&f->d[2], "scsi", path, sizeof(path));
	assert_string_equal(path, "/pci@i0cf8/scsi@2,7");
	pci_fw_path(&f->d[1], "scsi", path, sizeof(path));
	assert_string_equal(path, "/pci@i0cf8/scsi@2");
}

int main(void)
{
#define T(n) cmocka_unit_test_setup_teardown(n, setup, teardown)
	const struct CMUnitTest tests[] = { T(mechanisms), T(sizing_and_moving), T(overlap_heals), T(assignment), T(intx),
					    T(msix), T(multifunction) };

	return cmocka_run_group_tests(tests, NULL, NULL);
}
