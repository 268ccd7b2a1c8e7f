/*
 * ACPI tables (ACPI 6.4): RSDP, RSDT, XSDT, FADT, FACS, DSDT, MADT, MCFG, in the BIOS area where the
 * guest looks for them. Contents follow what the machine really has.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/aml.h"
#include "board/internal.h"
#include "dev/acpi_pm.h"
#include "dev/q35.h"

#define HDR 36u
#define RSDP_LEN 36u

struct tables {
	struct machine *m;
	uint8_t *buf;           /* image of BOOT_ACPI.. */
	uint32_t at;
	uint32_t list[8];       /* what RSDT and XSDT point to */
	unsigned n;
	bool full;
};

static uint8_t sum(const uint8_t *p, size_t n)
{
	uint8_t s = 0;

	while (n--)
		s += *p++;
	return s;
}

static void header(uint8_t *p, const char *sig, uint8_t rev, uint32_t len)
{
	memcpy(p, sig, 4);
	st_le32(p + 4, len);
	p[8] = rev;
	memcpy(p + 10, "LODGE ", 6);
	memcpy(p + 16, "LODGEPC ", 8);
	st_le32(p + 24, 1);
	memcpy(p + 28, "LODG", 4);
	st_le32(p + 32, 1);
}

/* Copy a finished body behind a header; returns the table's guest address. */
static uint32_t add(struct tables *t, const char *sig, uint8_t rev, const void *body, uint32_t len)
{
	uint32_t at = ALIGN_UP(t->at, 64u), total = HDR + len;
	uint8_t *p = t->buf + at;

	if (range_bad(at, total, BOOT_SMBIOS - BOOT_ACPI)) {
		t->full = true;
		return 0;
	}
	header(p, sig, rev, total);
	memcpy(p + HDR, body, len);
	p[9] = 0;
	p[9] = -sum(p, total);
	t->at = at + total;
	return BOOT_ACPI + at;
}

/* --- DSDT --- */

static void hid(struct aml *a, const char *id)
{
	aml_name(a, "_HID");
	aml_eisaid(a, id);
}

static void simple_device(struct aml *a, const char *name, const char *id, uint16_t io, uint16_t len, int irq)
{
	size_t d = aml_device(a, name);

	hid(a, id);
	aml_name(a, "_CRS");
	struct aml_res r = aml_res_begin(a);
	aml_res_io(a, io, len);
	if (irq >= 0)
		aml_res_irq(a, irq);
	aml_res_end(a, r);
	aml_end(a, d);
}

static bool port_used(struct machine *m, uint16_t port)
{
	uint8_t v = 0;

	return io_read(m->env.ports, port, &v, 1);
}

/* A COM port is announced when something answers at its line status register. */
static void com_devices(struct aml *a, struct machine *m)
{
	static const struct { uint16_t io; uint8_t irq; } com[] = { { 0x3f8, 4 }, { 0x2f8, 3 }, { 0x3e8, 4 }, { 0x2e8, 3 } };

	for (unsigned i = 0; i < ARRAY_SIZE(com); i++) {
		char name[8];
		size_t d;

		if (!port_used(m, com[i].io + 5))
			continue;
		snprintf(name, sizeof(name), "COM%u", i + 1);
		d = aml_device(a, name);
		hid(a, "PNP0501");
		aml_name_int(a, "_UID", i + 1);
		aml_name(a, "_CRS");
		struct aml_res r = aml_res_begin(a);
		aml_res_io(a, com[i].io, 8);
		aml_res_irq(a, com[i].irq);
		aml_res_end(a, r);
		aml_end(a, d);
	}
}

static void fw_cfg_device(struct aml *a)
{
	size_t d = aml_device(a, "FWCF");

	aml_name(a, "_HID");
	aml_string(a, "QEMU0002");
	aml_name_int(a, "_STA", 0xb);
	aml_name(a, "_CRS");
	struct aml_res r = aml_res_begin(a);
	aml_res_io(a, 0x510, 12);
	aml_res_end(a, r);
	aml_end(a, d);
}

static void isa_devices(struct aml *a, struct machine *m)
{
	com_devices(a, m);
	simple_device(a, "RTC", "PNP0B00", 0x70, 2, 8);
	simple_device(a, "TIMR", "PNP0100", 0x40, 4, -1);
	fw_cfg_device(a);
}

/* Ports and memory that belong to the board, so that nothing else is placed there. */
static void motherboard(struct aml *a, struct machine *m)
{
	size_t d = aml_device(a, "MBRD");

	hid(a, "PNP0C02");
	aml_name(a, "_CRS");
	struct aml_res r = aml_res_begin(a);
	aml_res_io(a, 0x80, 1);
	aml_res_io(a, 0x92, 1);
	aml_res_io(a, ACPI_PM_BASE, ACPI_PM_SIZE);
	if (m->pci)
		aml_res_memory(a, ECAM_BASE, ECAM_SIZE);
	aml_res_end(a, r);
	aml_end(a, d);
}

static void link_name(char *s, int pirq)
{
	snprintf(s, 8, "GSI%c", 'A' + pirq);
}

/* PIRQ n is hard-wired to GSI 16 + n: a link device that says so, level and active high. */
static void link_devices(struct aml *a)
{
	for (int i = 0; i < 8; i++) {
		char name[8];

		link_name(name, i);
		size_t d = aml_device(a, name);
		hid(a, "PNP0C0F");
		aml_name_int(a, "_UID", 16 + i);
		for (int k = 0; k < 2; k++) {
			aml_name(a, k ? "_CRS" : "_PRS");
			struct aml_res r = aml_res_begin(a);
			aml_res_interrupt(a, 16 + i);
			aml_res_end(a, r);
		}
		size_t s = aml_method(a, "_SRS", 1, false);
		aml_end(a, s);
		aml_end(a, d);
	}
}

/* One table for the I/O APIC, one for the PIC, where PIRQs are routed to 10 and 11. */
static void prt_table(struct aml *a, const char *name, bool apic)
{
	static const uint8_t pic[8] = { 10, 10, 11, 11, 10, 10, 11, 11 };

	aml_name(a, name);
	size_t p = aml_package(a, 32 * 4 - 4);
	for (unsigned dev = 1; dev < 32; dev++)
		for (unsigned pin = 0; pin < 4; pin++) {
			size_t e = aml_package(a, 4);
			int pirq = q35_pirq(dev, pin);
			char link[8];

			aml_int(a, dev << 16 | 0xffff);
			aml_int(a, pin);
			link_name(link, pirq);
			if (apic)
				aml_name_path(a, link);
			else
				aml_int(a, 0);
			aml_int(a, apic ? 0 : pic[pirq]);
			aml_end(a, e);
		}
	aml_end(a, p);
}

static void prt_method(struct aml *a)
{
	size_t f, m = aml_method(a, "_PRT", 0, false);

	f = aml_if(a);
	aml_name_path(a, "\\PICF");
	aml_u8(a, 0xa4);                                        /* Return */
	aml_name_path(a, "PRTA");
	aml_end(a, f);
	aml_u8(a, 0xa4);
	aml_name_path(a, "PRTP");
	aml_end(a, m);
}

/* The system may have what it asks for of hot plug, PME, AER and capability control, minus SHPC. */
static void osc_method(struct aml *a)
{
	size_t m = aml_method(a, "_OSC", 4, true);

	aml_u8(a, 0x8a);                                        /* CreateDWordField (Arg3, 8, CDW3) */
	aml_u8(a, 0x6b);
	aml_int(a, 8);
	aml_name_path(a, "CDW3");
	aml_u8(a, 0x7b);                                        /* And (CDW3, 0x1d, CDW3) */
	aml_name_path(a, "CDW3");
	aml_int(a, 0x1d);
	aml_name_path(a, "CDW3");
	aml_u8(a, 0xa4);                                        /* Return (Arg3) */
	aml_u8(a, 0x6b);
	aml_end(a, m);
}

static void pci_crs(struct aml *a, struct machine *m)
{
	aml_name(a, "_CRS");
	struct aml_res r = aml_res_begin(a);
	aml_res_bus(a, 0, 255);
	aml_res_io(a, 0xcf8, 8);
	aml_res_io_window(a, 0, 0xcf7);
	aml_res_io_window(a, 0xd00, 0xffff);
	aml_res_mem_window(a, 0xa0000, 0xbffff, false);
	aml_res_mem_window(a, PCI32_BASE, PCI32_BASE + PCI32_SIZE - 1, false);
	aml_res_mem_window(a, m->pci64_base, m->pci64_base + PCI64_SIZE - 1, true);
	aml_res_end(a, r);
}

static void pci_root(struct aml *a, struct machine *m)
{
	size_t d = aml_device(a, "PCI0"), l;

	hid(a, "PNP0A08");
	aml_name(a, "_CID");
	aml_eisaid(a, "PNP0A03");
	aml_name_int(a, "_UID", 0);
	aml_name_int(a, "_SEG", 0);
	aml_name_int(a, "_BBN", 0);
	pci_crs(a, m);
	prt_table(a, "PRTA", true);
	prt_table(a, "PRTP", false);
	prt_method(a);
	osc_method(a);
	l = aml_device(a, "ISA");
	aml_name_int(a, "_ADR", 0x1f0000);
	isa_devices(a, m);
	aml_end(a, l);
	aml_end(a, d);
}

static void cpu_devices(struct aml *a, unsigned cpus)
{
	for (unsigned i = 0; i < cpus; i++) {
		char name[8];

		snprintf(name, sizeof(name), "C%03X", i & 0xfff);
		size_t d = aml_device(a, name);
		aml_name(a, "_HID");
		aml_string(a, "ACPI0007");
		aml_name_int(a, "_UID", i);
		aml_end(a, d);
	}
}

static void globals(struct aml *a)
{
	size_t p, m;

	aml_name_int(a, "PICF", 0);
	m = aml_method(a, "_PIC", 1, false);
	aml_u8(a, 0x70);                                        /* Store (Arg0, PICF) */
	aml_u8(a, 0x68);
	aml_name_path(a, "PICF");
	aml_end(a, m);
	aml_name(a, "_S5");
	p = aml_package(a, 4);
	for (int i = 0; i < 4; i++)
		aml_int(a, i < 2 ? ACPI_SLP_TYP_S5 : 0);
	aml_end(a, p);
}

static uint32_t add_dsdt(struct tables *t)
{
	struct aml a = { 0 };
	uint32_t at = 0;
	size_t s;

	globals(&a);
	s = aml_scope(&a, "\\_SB");
	motherboard(&a, t->m);
	cpu_devices(&a, t->m->cfg.cpus);
	if (t->m->pci) {
		link_devices(&a);
		pci_root(&a, t->m);
	} else {
		isa_devices(&a, t->m);
	}
	aml_end(&a, s);
	if (a.oom)
		t->full = true;
	else
		at = add(t, "DSDT", 2, a.buf, a.len);
	free(a.buf);
	return at;
}

/* --- fixed tables --- */

static void gas(uint8_t *p, uint8_t bits, uint8_t access, uint16_t port)
{
	p[0] = 1;                                               /* system I/O */
	p[1] = bits;
	p[3] = access;
	st_le64(p + 4, port);
}

static void add_fadt(struct tables *t, uint32_t facs, uint32_t dsdt)
{
	uint8_t b[276] = { 0 }, *f = b;
	enum { WBINVD = 1, PROC_C1 = 4, SLP_BUTTON = 1 << 5, RTC_S4 = 1 << 7, RESET_REG = 1 << 10,
	       PLATFORM_CLOCK = 1 << 15 };

	st_le32(f + 36, facs);
	st_le32(f + 40, dsdt);
	st_le16(f + 46, ACPI_SCI_GSI);
	st_le32(f + 56, ACPI_PM_BASE + ACPI_PM1_EVT);
	st_le32(f + 64, ACPI_PM_BASE + ACPI_PM1_CNT);
	st_le32(f + 76, ACPI_PM_BASE + ACPI_PM_TMR);
	st_le32(f + 80, ACPI_PM_BASE + ACPI_GPE0);
	f[88] = 4;                                              /* lengths: PM1 event, control, timer, GPE0 */
	f[89] = 2;
	f[91] = 4;
	f[92] = ACPI_GPE0_LEN;
	st_le16(f + 96, 0xfff);                                 /* C2 and C3: not supported */
	st_le16(f + 98, 0xfff);
	f[108] = 0x32;                                          /* CMOS century */
	st_le16(f + 109, 1 | 4);                                /* legacy devices, no VGA, no 8042 */
	st_le32(f + 112, WBINVD | PROC_C1 | SLP_BUTTON | RTC_S4 | RESET_REG | PLATFORM_CLOCK);
	gas(f + 116, 8, 1, t->m->pci ? 0xcf9 : 0x92);
	f[128] = t->m->pci ? 0x0f : 0x01;
	f[131] = 3;                                             /* FADT minor version: 6.3 */
	st_le64(f + 132, facs);
	st_le64(f + 140, dsdt);
	gas(f + 148, 32, 0, ACPI_PM_BASE + ACPI_PM1_EVT);
	gas(f + 172, 16, 0, ACPI_PM_BASE + ACPI_PM1_CNT);
	gas(f + 208, 32, 0, ACPI_PM_BASE + ACPI_PM_TMR);
	gas(f + 220, ACPI_GPE0_LEN * 8, 0, ACPI_PM_BASE + ACPI_GPE0);
	memcpy(f + 268, "LODGE   ", 8);                         /* hypervisor vendor */
	t->list[t->n++] = add(t, "FACP", 6, b + HDR, sizeof(b) - HDR);
}

static uint32_t add_facs(struct tables *t)
{
	uint32_t at = ALIGN_UP(t->at, 64u);

	memcpy(t->buf + at, "FACS", 4);
	st_le32(t->buf + at + 4, 64);
	t->buf[at + 32] = 2;
	t->at = at + 64;
	return BOOT_ACPI + at;
}

static uint8_t *iso(uint8_t *p, uint8_t irq, uint32_t gsi, uint16_t flags)
{
	p[0] = 2;
	p[1] = 10;
	p[3] = irq;
	st_le32(p + 4, gsi);
	st_le16(p + 8, flags);
	return p + 10;
}

static void add_madt(struct tables *t)
{
	static const uint8_t level[] = { 5, 9, 10, 11 };        /* level, active high */
	uint8_t b[8 + 64 * 8 + 12 + 5 * 10 + 6] = { 0 }, *p = b;

	st_le32(p, LAPIC_BASE);
	st_le32(p + 4, 1);                                      /* there is a PIC as well */
	p += 8;
	for (unsigned i = 0; i < t->m->cfg.cpus; i++, p += 8) {
		p[1] = 8;
		p[2] = p[3] = i;
		st_le32(p + 4, 1);
	}
	p[0] = 1;
	p[1] = 12;
	st_le32(p + 4, IOAPIC_BASE);
	p += 12;
	p = iso(p, 0, 2, 0);
	for (unsigned i = 0; i < ARRAY_SIZE(level); i++)
		p = iso(p, level[i], level[i], 0xd);
	p[0] = 4;                                               /* NMI on LINT1 of every CPU */
	p[1] = 6;
	p[2] = 0xff;
	p[5] = 1;
	p += 6;
	t->list[t->n++] = add(t, "APIC", 3, b, p - b);
}

static void add_mcfg(struct tables *t)
{
	uint8_t b[8 + 16] = { 0 };

	st_le64(b + 8, ECAM_BASE);
	b[8 + 11] = 255;                                        /* last bus */
	t->list[t->n++] = add(t, "MCFG", 1, b, sizeof(b));
}

static void add_roots(struct tables *t)
{
	uint8_t r[8 * 4], x[8 * 8], *p = t->buf;
	uint32_t rsdt, xsdt;

	for (unsigned i = 0; i < t->n; i++) {
		st_le32(r + 4 * i, t->list[i]);
		st_le64(x + 8 * i, t->list[i]);
	}
	rsdt = add(t, "RSDT", 1, r, 4 * t->n);
	xsdt = add(t, "XSDT", 1, x, 8 * t->n);
	memcpy(p, "RSD PTR ", 8);
	memcpy(p + 9, "LODGE ", 6);
	p[15] = 2;
	st_le32(p + 16, rsdt);
	st_le32(p + 20, RSDP_LEN);
	st_le64(p + 24, xsdt);
	p[8] = -sum(p, 20);
	p[32] = -sum(p, RSDP_LEN);
}

int acpi_build(struct machine *m, struct err *err)
{
	struct tables t = { .m = m, .at = RSDP_LEN };
	uint32_t facs, dsdt;

	m->acpi_low = calloc(1, TABLES_SIZE);
	if (!m->acpi_low)
		return err_set(err, -ENOMEM, "no memory for ACPI tables");
	t.buf = m->acpi_low;
	facs = add_facs(&t);
	dsdt = add_dsdt(&t);
	add_fadt(&t, facs, dsdt);
	add_madt(&t);
	if (m->pci)
		add_mcfg(&t);
	add_roots(&t);
	if (t.full)
		return err_set(err, -ENOSPC, "ACPI tables do not fit");
	m->boot.rsdp = BOOT_ACPI;
	return 0;
}
