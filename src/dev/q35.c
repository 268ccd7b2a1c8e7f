#include "dev/q35.h"

#include <errno.h>
#include <stdlib.h>

#include <linux/pci_regs.h>

#include "base/util.h"
#include "dev/acpi_pm.h"

#define LPC_PIRQ_OFF 0x80

struct q35 {
	struct machine_env *env;
	pthread_mutex_t lock;                   /* both functions' config space */
	pthread_mutex_t pirq_lock;              /* below any device's lock */
	struct pci_device mch, lpc;
	uint8_t route[8];                       /* copies of the routing registers, under pirq_lock */
	uint8_t pirq_level[8];
	uint16_t isa_level;
};

static unsigned pirq_reg(int i)
{
	return i < 4 ? 0x60 + i : 0x68 + i - 4;
}

int q35_pirq(int dev, int pin)
{
	return dev < 25 ? 4 + (dev + pin) % 4 : pin % 4;
}

/* pirq_lock held: drive the ISA lines that the routing asks for. */
static void isa_update(struct q35 *q)
{
	uint16_t now = 0, change;

	for (int i = 0; i < 8; i++)
		if (q->pirq_level[i] && !(q->route[i] & LPC_PIRQ_OFF))
			now |= 1u << (q->route[i] & 15);
	now &= 0xdef8;                          /* 0-2, 8 and 13 can not be routed to */
	change = now ^ q->isa_level;
	q->isa_level = now;
	for (int i = 0; i < 16; i++)
		if (change & 1u << i)
			irq_set(q->env->isa_irq(q->env->opaque, i), now >> i & 1);
}

void q35_set_pirq(struct q35 *q, int pirq, int level)
{
	pthread_mutex_lock(&q->pirq_lock);
	q->pirq_level[pirq & 7] = !!level;
	isa_update(q);
	pthread_mutex_unlock(&q->pirq_lock);
}

static void routes_load(struct q35 *q)
{
	pthread_mutex_lock(&q->pirq_lock);
	for (int i = 0; i < 8; i++)
		q->route[i] = q->lpc.cfg[pirq_reg(i)];
	isa_update(q);
	pthread_mutex_unlock(&q->pirq_lock);
}

static void lpc_written(struct pci_device *p, unsigned off, unsigned len)
{
	if (ranges_overlap(off, len, 0x60, 12))
		routes_load(p->opaque);
}

static void mch_init(struct q35 *q, uint64_t ecam)
{
	static const struct pci_ids ids = { 0x8086, 0x29c0, 0x1af4, 0x1100, .class_code = 0x06 };
	struct pci_device *p = &q->mch;

	pci_device_init(p, "q35-mch", &ids, &q->lock);
	p->opaque = q;
	if (ecam)
		st_le64(p->cfg + 0x60, ecam | 1);       /* PCIEXBAR: 256 MiB, enabled */
	memset(p->wmask + 0x90, 0x33, 7);               /* PAM0-6: shadowing control, no effect here */
	p->wmask[0x90] = 0x30;
	p->cfg[0x9d] = 0x02;                            /* SMRAM: closed */
}

static void lpc_init(struct q35 *q)
{
	static const struct pci_ids ids = { 0x8086, 0x2918, 0x1af4, 0x1100, .class_code = 0x06, .subclass = 0x01,
					    .revision = 2 };
	struct pci_device *p = &q->lpc;

	pci_device_init(p, "ich9-lpc", &ids, &q->lock);
	p->opaque = q;
	p->cfg_written = lpc_written;
	p->multifunction = true;                        /* as in every ICH9; what is at 1f.2 and 1f.3 there is absent */
	st_le32(p->cfg + 0x40, ACPI_PM_BASE | 1);       /* PMBASE, an I/O address */
	p->cfg[0x44] = 0x80;                            /* ACPI_CNTL: enabled, SCI on IRQ 9 */
	for (int i = 0; i < 8; i++) {
		p->cfg[pirq_reg(i)] = LPC_PIRQ_OFF;
		p->wmask[pirq_reg(i)] = 0x8f;
	}
	p->wmask[0x64] = 0xd0;                          /* serial IRQ control */
	p->cfg[0x64] = 0x10;
}

int q35_create(struct q35 **out, struct machine_env *env, uint64_t ecam_base, struct err *err)
{
	struct q35 *q = calloc(1, sizeof(*q));
	int r;

	if (!q)
		return err_set(err, -ENOMEM, "no memory for the chipset");
	q->env = env;
	pthread_mutex_init(&q->lock, NULL);
	pthread_mutex_init(&q->pirq_lock, NULL);
	mch_init(q, ecam_base);
	lpc_init(q);
	routes_load(q);
	r = pci_device_add(env->pci, &q->mch, 0, err);
	if (!r)
		r = pci_device_add(env->pci, &q->lpc, 0x1f << 3, err);
	if (r) {
		q35_destroy(q);
		return r;
	}
	*out = q;
	return 0;
}

void q35_destroy(struct q35 *q)
{
	if (!q)
		return;
	pci_device_remove(&q->mch);
	pci_device_remove(&q->lpc);
	pthread_mutex_destroy(&q->lock);
	pthread_mutex_destroy(&q->pirq_lock);
	free(q);
}

void q35_reset(struct q35 *q)
{
	pthread_mutex_lock(&q->lock);
	memset(q->mch.cfg + 0x90, 0, 7);
	for (int i = 0; i < 8; i++)
		q->lpc.cfg[pirq_reg(i)] = LPC_PIRQ_OFF;
	routes_load(q);
	pthread_mutex_unlock(&q->lock);
}

void q35_route_legacy(struct q35 *q, struct pci_bus *bus)
{
	static const uint8_t irq[8] = { 10, 10, 11, 11, 10, 10, 11, 11 };

	pthread_mutex_lock(&q->lock);
	for (int i = 0; i < 8; i++)
		q->lpc.cfg[pirq_reg(i)] = irq[i];
	routes_load(q);
	pthread_mutex_unlock(&q->lock);
	for (unsigned devfn = 0; devfn < 256; devfn++) {
		struct pci_device *p = pci_bus_device(bus, devfn);
		int pin = p ? p->cfg[PCI_INTERRUPT_PIN] : 0;

		if (pin)
			pci_config_write(bus, devfn, PCI_INTERRUPT_LINE, irq[q35_pirq(devfn >> 3, pin - 1)], 1);
	}
}
