/*
 * The chipset's PCI functions (host bridge, LPC bridge), the reset control register that lies in the configuration address
 * port, and interrupt routing: random configuration and port accesses, PIRQs that change level, resets.
 */
#include <string.h>

#include "../pci/fuzz.h"
#include "base/util.h"
#include "dev/misc.h"
#include "dev/q35.h"
#include "fix.h"

#define ECAM 0xb0000000u

struct chipset { struct fix f; struct pc_ports *pp; struct q35 *q; };

static uint8_t rst_read(void *o) { return pc_reset_control_read(((struct chipset *)o)->pp); }
static void rst_write(void *o, uint8_t val)
{
	struct chipset *c = o;
	int before = c->f.requests;

	pc_reset_control_write(c->pp, val);
	if (c->f.requests - before != !!(val & 4) || (val & 4 && c->f.last != MACHINE_RESET))
		abort();
}
static void set_pirq(void *o, int n, int level) { q35_set_pirq(((struct chipset *)o)->q, n, level); }
static struct irq_line route(void *o, int dev, int pin) { return (struct irq_line){ set_pirq, o, q35_pirq(dev, pin) }; }

static void step(struct chipset *c, struct pci_bus *b, const uint8_t *p)
{
	static const uint8_t fn[] = { 0, 0x1f << 3, 0x1f << 3, 0xff }, reg[] = { 0, 0x40, 0x60, 0x68, 0x90, 0x9c };
	uint32_t v = ld_le32(p + 4), devfn = fn[p[1] & 3] & (p[1] & 0x80 ? 0xff : 0xf8), len = 1u << (p[3] % 3);
	uint32_t off = (p[1] & 0x40 ? p[2] * 16u : reg[p[2] % ARRAY_SIZE(reg)]) + (p[3] >> 4);

	switch (p[0] % 8) {
	case 0: case 1:
		io_write(c->f.env.mmio, ECAM + (devfn << 12) + (off & 0xfff), &v, len);
		break;
	case 2:
		io_read(c->f.env.mmio, ECAM + (devfn << 12) + (off & 0xfff), &v, len);
		break;
	case 3:
		out(&c->f, 0xcf8, 0x80000000 | devfn << 8 | (off & 0xfc), 4);
		out(&c->f, 0xcfc + (off & 3), v, len);
		in(&c->f, 0xcfc + (off & 3), len);
		break;
	case 4: /* 0xcf9 and its neighbours, at every width */
		out(&c->f, 0xcf8 + (p[1] & 7), v, len);
		in(&c->f, 0xcf8 + (p[2] & 7), len);
		break;
	case 5:
		q35_set_pirq(c->q, p[1] & 7, p[2] & 1);
		break;
	case 6:
		if (p[1] < 4)
			q35_route_legacy(c->q, b);
		break;
	default:
		if (p[1] < 4) {
			pci_bus_reset(b);
			q35_reset(c->q);
			pc_ports_reset(c->pp);
		}
	}
	for (int i = 0; i < 16; i++)    /* what PIRQs may not be routed to */
		if (0x2107 >> i & 1 && c->f.level[i])
			abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct chipset c = { 0 };
	struct pci_bus_config cfg = { .ecam_base = ECAM, .mmio32_base = 0xc0000000, .mmio32_size = 1 << 28, .route_intx = route,
				      .rst_read = rst_read, .rst_write = rst_write, .opaque = &c };
	struct pci_bus *b;

	fix_init(&c.f);
	cfg.ports = c.f.env.ports;
	cfg.mmio = c.f.env.mmio;
	if (pci_bus_create(&b, &cfg, NULL))
		abort();
	c.f.env.pci = b;
	if (pc_ports_create(&c.pp, &c.f.env, NULL) || q35_create(&c.q, &c.f.env, ECAM, NULL))
		abort();
	FUZZ_EACH(data, len, 8)
		step(&c, b, data);
	q35_destroy(c.q);
	pc_ports_destroy(c.pp);
	pci_bus_destroy(b);
	fix_done(&c.f);
	return 0;
}
