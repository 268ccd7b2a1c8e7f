/* Random configuration accesses through both mechanisms, and accesses wherever BARs ended up. */
#include <pthread.h>
#include <string.h>

#include "base/util.h"
#include "fuzz.h"
#include "pci/pci.h"

static uint64_t reg_read(void *o, uint64_t off, unsigned size)
{
	if (off + size > 0x1000)
		abort();
	return off;
}
static void reg_write(void *o, uint64_t off, uint64_t v, unsigned size)
{
	if (off + size > 0x1000)
		abort();
}
static const struct io_ops reg_ops = { reg_read, reg_write, 1, 4 };
static void send(void *o, uint64_t a, uint32_t d, uint32_t r) { }
static void set_line(void *o, int n, int level) { *(int *)o += level ? 1 : -1; }
static struct irq_line route(void *o, int dev, int pin) { return (struct irq_line){ set_line, o, pin }; }

static void step(struct pci_bus *b, struct io_space *ports, struct io_space *mmio, struct pci_device *d, const uint8_t *p)
{
	unsigned len = 1u << (p[1] & 3);
	uint64_t v = ld_le64(p + 4), a;

	switch (p[0] % 6) {
	case 0:
		a = 0xb0000000 + ((p[2] & 1) << 15) + ((p[3] << 4 | p[2] >> 4) & (p[1] & 0x80 ? 0xfff : 0x7f));
		io_write(mmio, a, &v, len);
		break;
	case 1:
		io_write(ports, 0xcf8, &v, 4);
		io_write(ports, 0xcfc + (p[3] & 3), p + 4, len);
		break;
	case 2:
		io_read(mmio, 0xb0000000 + (v & 0xfffffff), &v, len);
		break;
	case 3:
		a = pci_bar_addr(&d[p[2] & 1], p[3] % 6);
		io_write(mmio, a + (ld_le16(p + 4) & 0xfff), &v, len);
		io_read(mmio, a + (ld_le16(p + 4) & 0xfff), &v, len);
		break;
	case 4:
		msix_notify(&d[p[2] & 1], p[3]);
		pci_set_intx(&d[p[2] & 1], p[3] & 1);
		break;
	default:
		if (p[2] == 0)
			pci_bus_reset(b);
		else if (p[2] < 8)
			pci_bus_assign(b, NULL);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static const struct pci_ids ids = { 1, 2, 3, 4, 5, 6, 7, 8 };
	int lines = 0;
	struct pci_bus_config c = { .msi = { send }, .ecam_base = 0xb0000000, .mmio32_base = 0xc0000000,
				    .mmio32_size = 1 << 28, .mmio64_base = 1ULL << 33, .mmio64_size = 1ULL << 30,
				    .route_intx = route, .opaque = &lines };
	struct pci_device *d = calloc(2, sizeof(*d));
	pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	struct pci_bus *b;

	if (!d || io_space_create(&c.ports, "p", 0x10000, NULL) || io_space_create(&c.mmio, "m", UINT64_MAX, NULL) ||
	    pci_bus_create(&b, &c, NULL))
		abort();
	for (int i = 0; i < 2; i++) {
		pci_device_init(&d[i], "fuzz", &ids, &lock);
		pci_bar_init(&d[i], 0, 0x1000, false, true, false, "a", &reg_ops, NULL);
		pci_bar_init(&d[i], 3, 0x1000, false, false, false, "b", &reg_ops, NULL);
		pci_bar_init(&d[i], 4, 0x40, true, false, false, "c", &reg_ops, NULL);
		pci_set_intx_pin(&d[i], i);
		if (msix_init(&d[i], 5, 3, 0x100, 0x400, NULL) || pci_device_add(b, &d[i], -1, NULL))
			abort();
		pci_add_express_cap(&d[i], 9);
	}
	FUZZ_EACH(data, len, 12)
		step(b, c.ports, c.mmio, d, data);
	for (int i = 0; i < 2; i++) {
		pci_device_remove(&d[i]);
		msix_free(&d[i]);
	}
	if (lines)
		abort();
	pci_bus_destroy(b);
	io_space_destroy(c.ports);
	io_space_destroy(c.mmio);
	free(d);
	return 0;
}
