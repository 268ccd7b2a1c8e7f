/* INQUIRY with its vital product data pages (SPC-4 6.6, 7.8; SBC-3 6.5) and MODE SENSE (SPC-4 6.11, 7.5; MMC-6 7). */
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "virtio/scsi.h"

enum { MAX_BLOCKS_SECTORS = 1u << 22, MAX_UNMAP_RANGES = 255 };

/* Left-aligned ASCII, filled with spaces. */
static void text(uint8_t *p, const char *s, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		p[i] = *s ? (uint8_t)*s++ : ' ';
}

static const char *or(const char *s, const char *other)
{
	return s ? s : other;
}

static unsigned standard(const struct scsi_unit *u, uint8_t *b)
{
	b[0] = u->cd ? 5 : 0;
	b[1] = u->cd || u->removable ? 0x80 : 0;
	b[2] = 5;               /* SPC-3 */
	b[3] = 0x12;            /* HiSup, response format 2 */
	b[4] = 36 - 5 + 60;
	b[7] = 0x02;            /* command queueing */
	text(b + 8, or(u->vendor, "LODGE"), 8);
	text(b + 16, or(u->product, u->cd ? "LODGE CD-ROM" : "LODGE HARDDISK"), 16);
	text(b + 32, or(u->ver, "1.0"), 4);
	scsi_put(b + 58, 0x00a0, 2);      /* SAM-5 */
	scsi_put(b + 60, 0x0460, 2);      /* SPC-4 */
	scsi_put(b + 62, u->cd ? 0x03a0 : 0x04c0, 2);
	return 96;
}

static unsigned designators(const struct scsi_unit *u, uint8_t *b)
{
	const char *id = u->device_id ? u->device_id : u->serial ? u->serial : u->dev.id;
	unsigned n = 4, len;

	if (id && *id) { /* vendor specific, ASCII */
		len = (unsigned)strnlen(id, 36);
		b[n] = 2;
		b[n + 3] = (uint8_t)len;
		memcpy(b + n + 4, id, len);
		n += 4 + len;
	}
	if (u->wwn) { /* NAA, binary */
		b[n] = 1;
		b[n + 1] = 3;
		b[n + 3] = 8;
		scsi_put(b + n + 4, u->wwn, 8);
		n += 12;
	}
	return n;
}

static unsigned block_limits(const struct scsi_unit *u, uint8_t *b)
{
	uint32_t per = u->block_size / 512, most = MAX_BLOCKS_SECTORS / per;

	b[4] = 1;                                       /* WSNZ */
	scsi_put(b + 6, MAX((uint32_t)u->pbs, u->block_size) / u->block_size, 2);
	scsi_put(b + 8, most, 4);                         /* maximum transfer */
	scsi_put(b + 20, most, 4);                        /* unmap */
	scsi_put(b + 24, MAX_UNMAP_RANGES, 4);
	scsi_put(b + 28, MAX((uint32_t)u->pbs, u->block_size) / u->block_size, 4);
	scsi_put(b + 36, most, 8);                        /* write same */
	return 64;
}

static unsigned vpd(const struct scsi_unit *u, uint8_t page, uint8_t *b)
{
	static const uint8_t disk_pages[] = { 0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2 };

	b[0] = u->cd ? 5 : 0;
	b[1] = page;
	switch (page) {
	case 0x00:
		memcpy(b + 4, disk_pages, u->cd ? 3 : sizeof(disk_pages));
		return 4 + (u->cd ? 3 : (unsigned)sizeof(disk_pages));
	case 0x80:
		if (u->serial)
			memcpy(b + 4, u->serial, strnlen(u->serial, 36));
		return 4 + (u->serial ? (unsigned)strnlen(u->serial, 36) : 0);
	case 0x83:
		return designators(u, b);
	case 0xb0:
		return u->cd ? 0 : block_limits(u, b);
	case 0xb1:
		if (u->cd)
			return 0;
		scsi_put(b + 4, u->rotation_rate, 2);
		return 64;
	case 0xb2:
		b[5] = 0xe0;            /* UNMAP, WRITE SAME (16) and (10) unmap */
		b[6] = 2;               /* thin */
		return u->cd ? 0 : 8;
	}
	return 0;
}

unsigned scsi_inquiry(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *buf, uint32_t *sense)
{
	unsigned n;

	memset(buf, 0, 512);
	if (cdb[1] & 1) {
		n = vpd(u, cdb[2], buf);
		scsi_put(buf + 2, n ? n - 4 : 0, 2);
	} else {
		n = cdb[2] ? 0 : standard(u, buf);
	}
	if (!n)
		*sense = SENSE_INVALID_FIELD;
	return n;
}

/* --- mode pages --- */

/* `changeable`: a mask of what MODE SELECT may change. */
static unsigned mode_page(const struct scsi_unit *u, uint8_t page, bool changeable, uint8_t *p)
{
	switch (page) {
	case 0x01:              /* error recovery */
		p[1] = 10;
		if (!changeable)
			p[2] = 0x80;
		return 12;
	case 0x08:              /* caching */
		if (u->cd)
			return 0;
		p[1] = 18;
		p[2] = changeable || u->wce ? 0x04 : 0;
		return 20;
	case 0x0a:              /* control */
		p[1] = 10;
		return 12;
	case 0x2a:              /* CD capabilities */
		if (!u->cd)
			return 0;
		p[1] = 20;
		if (changeable)
			return 22;
		p[2] = 0x3b;    /* reads CD-R, CD-RW, DVD */
		p[4] = 0x71;
		p[6] = 0x29 | (u->locked ? 2 : 0);      /* tray, ejects, locks */
		scsi_put(p + 8, 50 * 176, 2);
		scsi_put(p + 12, 2048, 2);
		scsi_put(p + 14, 16 * 176, 2);
		scsi_put(p + 18, 16 * 176, 2);
		return 22;
	}
	return 0;
}

static unsigned mode_pages(const struct scsi_unit *u, uint8_t page, bool changeable, uint8_t *p)
{
	static const uint8_t all[] = { 0x01, 0x08, 0x0a, 0x2a };
	unsigned n = 0;

	for (unsigned i = 0; i < sizeof(all); i++) {
		unsigned k = page == all[i] || page == 0x3f ? mode_page(u, all[i], changeable, p + n) : 0;

		if (k)
			p[n] = all[i];
		n += k;
	}
	return n;
}

static unsigned block_descriptor(const struct scsi_unit *u, uint8_t *p)
{
	uint64_t blocks = scsi_blocks(u);

	scsi_put(p, blocks > 0xffffff ? 0 : blocks, 4);
	scsi_put(p + 5, u->block_size, 3);
	return 8;
}

unsigned scsi_mode_sense(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *buf, uint32_t *sense)
{
	bool six = cdb[0] == 0x1a, no_descriptor = cdb[1] & 8 || u->cd;
	unsigned head = six ? 4 : 8, control = cdb[2] >> 6, descriptor = 0, n;
	uint8_t specific = u->cd ? 0 : (block_read_only(u->drive) ? 0x80 : 0) | (u->dpofua ? 0x10 : 0);

	memset(buf, 0, 512);
	if (control == 3) {
		*sense = SENSE(5, 0x39, 0);     /* saving parameters */
		return 0;
	}
	if (!no_descriptor)
		descriptor = block_descriptor(u, buf + head);
	n = mode_pages(u, cdb[2] & 0x3f, control == 1, buf + head + descriptor);
	if (!n) {
		*sense = SENSE_INVALID_FIELD;
		return 0;
	}
	n += head + descriptor;
	scsi_put(buf, n - (six ? 1 : 2), six ? 1 : 2);
	buf[six ? 2 : 3] = specific;
	buf[six ? 3 : 7] = (uint8_t)descriptor;
	return n;
}
