/* SMBIOS 3.0 tables (DMTF DSP0134) in the BIOS area: what dmidecode and the kernel's DMI line show. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "board/internal.h"

struct smb { uint8_t *buf; unsigned at, start, handle; };

static uint8_t *begin(struct smb *s, uint8_t type, uint8_t len)
{
	uint8_t *p = s->buf + s->at;

	s->start = s->at;
	p[0] = type;
	p[1] = len;
	st_le16(p + 2, type << 8 | (s->handle++ & 0xff));
	s->at += len;
	return p;
}

/* Strings after the formatted part, NULL ends the list; an empty list is two zero bytes. */
static void strings(struct smb *s, ...)
{
	va_list ap;
	const char *str;
	bool any = false;

	va_start(ap, s);
	while ((str = va_arg(ap, const char *))) {
		size_t n = strnlen(str, 64);

		memcpy(s->buf + s->at, str, n);
		s->at += n + 1;
		any = true;
	}
	va_end(ap);
	s->at += any ? 1 : 2;
}

static void parse_uuid(uint8_t *out, const char *u)
{
	unsigned b[16];

	if (!u || sscanf(u, "%2x%2x%2x%2x-%2x%2x-%2x%2x-%2x%2x-%2x%2x%2x%2x%2x%2x", &b[3], &b[2], &b[1], &b[0], &b[5],
			 &b[4], &b[7], &b[6], &b[8], &b[9], &b[10], &b[11], &b[12], &b[13], &b[14], &b[15]) != 16)
		return;
	for (int i = 0; i < 16; i++)
		out[i] = b[i];
}

static void system_tables(struct smb *s, struct machine *m)
{
	uint8_t *p = begin(s, 0, 24);                   /* BIOS information */

	p[4] = 1; p[5] = 2; p[8] = 3;
	st_le16(p + 6, 0xe000);
	p[10] = 8;                                      /* characteristics not supported */
	p[19] = 0x1c;                                   /* virtual machine, UEFI no */
	p[20] = 0; p[21] = 1; p[22] = 0xff; p[23] = 0xff;
	strings(s, "Lodge", "0.1", "01/01/2024", NULL);
	p = begin(s, 1, 27);                            /* system */
	p[4] = 1; p[5] = 2; p[6] = 3; p[24] = 6;
	parse_uuid(p + 8, m->cfg.uuid);
	strings(s, "Lodge", m->pci ? "Standard PC (Q35 + ICH9)" : "microvm", "lodge-0.1", NULL);
	p = begin(s, 3, 22);                            /* chassis */
	p[4] = 1; p[5] = 1;
	p[9] = p[10] = p[11] = 3;
	p[12] = 2;
	strings(s, "Lodge", NULL);
}

static void cpu_tables(struct smb *s, struct machine *m)
{
	for (unsigned i = 0; i < m->topo.sockets; i++) {
		uint8_t *p = begin(s, 4, 48);
		unsigned n = m->topo.cores, t = m->topo.cores * m->topo.threads;
		char name[16];

		snprintf(name, sizeof(name), "CPU %u", i);
		p[4] = 1; p[5] = 3; p[6] = 1; p[7] = 2;
		p[24] = 0x41; p[25] = 1;
		st_le16(p + 26, 0xffff); st_le16(p + 28, 0xffff); st_le16(p + 30, 0xffff);
		p[35] = p[36] = n; p[37] = t;
		st_le16(p + 38, 4);
		st_le16(p + 40, 1); st_le16(p + 42, n); st_le16(p + 44, n); st_le16(p + 46, t);
		strings(s, name, "Lodge", NULL);
	}
}

static void memory_tables(struct smb *s, struct machine *m)
{
	uint64_t kib = m->cfg.mem_size >> 10, mib = m->cfg.mem_size >> 20;
	uint8_t *p = begin(s, 16, 23);                  /* array */
	uint16_t array = ld_le16(p + 2);

	p[4] = 1; p[5] = 3; p[6] = 6;
	st_le32(p + 7, kib < 0x80000000u ? kib : 0x80000000u);
	if (kib >= 0x80000000u)
		st_le64(p + 15, m->cfg.mem_size);
	st_le16(p + 11, 0xfffe);
	st_le16(p + 13, 1);
	strings(s, NULL);
	p = begin(s, 17, 40);                           /* the one device in it */
	st_le16(p + 4, array);
	st_le16(p + 6, 0xfffe);
	st_le16(p + 8, 0xffff); st_le16(p + 10, 0xffff);
	st_le16(p + 12, mib < 0x7fff ? mib : 0x7fff);
	p[14] = 9; p[16] = 1; p[18] = 7; p[23] = 2;
	st_le16(p + 19, 2);
	if (mib >= 0x7fff)
		st_le32(p + 28, mib);
	strings(s, "DIMM 0", "Lodge", NULL);
	for (int i = 0; i < 2; i++) {
		uint64_t base = i ? HIGH_BASE : 0, size = i ? m->high_ram : m->low_ram;

		if (!size)
			continue;
		p = begin(s, 19, 31);
		st_le32(p + 4, 0xffffffff); st_le32(p + 8, 0xffffffff);
		st_le16(p + 12, array);
		p[14] = 1;
		st_le64(p + 15, base); st_le64(p + 23, base + size - 1);
		strings(s, NULL);
	}
}

int smbios_build(struct machine *m, struct err *err)
{
	uint8_t *e = m->acpi_low + (BOOT_SMBIOS - BOOT_ACPI), *p, c = 0;
	struct smb s = { .buf = e + 32 };

	system_tables(&s, m);
	cpu_tables(&s, m);
	memory_tables(&s, m);
	begin(&s, 32, 11);
	strings(&s, NULL);
	begin(&s, 127, 4);
	strings(&s, NULL);
	p = e;
	memcpy(p, "_SM3_", 5);
	p[6] = 24; p[7] = 3;
	p[10] = 1;
	st_le32(p + 12, s.at);
	st_le64(p + 16, BOOT_SMBIOS + 32);
	for (int i = 0; i < 24; i++)
		c += p[i];
	p[5] = -c;
	return 0;
}
