/* The commands of a CD drive (MMC-6): contents, configuration, events, tray. */
#include <string.h>

#include "base/util.h"
#include "virtio/scsi.h"

/* An address as block number or minute, second, frame. */
static void address(uint8_t *p, uint32_t lba, bool msf)
{
	scsi_put(p, lba, 4);
	if (!msf)
		return;
	lba += 150;
	p[0] = 0;
	p[1] = (uint8_t)(lba / (75 * 60));
	p[2] = lba / 75 % 60;
	p[3] = lba % 75;
}

/* One data track and the lead-out (6.25). */
static unsigned toc(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *b)
{
	unsigned format = cdb[2] & 0xf ? cdb[2] & 0xf : cdb[9] >> 6, start = cdb[6], n = 4;
	bool msf = cdb[1] & 2;

	b[2] = b[3] = 1;
	if (format == 1) {      /* sessions */
		b[5] = 0x14;
		b[6] = 1;
		address(b + 8, 0, msf);
		n = 12;
	} else if (format == 0 && (start <= 1 || start == 0xaa)) {
		if (start <= 1) {
			b[n + 1] = 0x14;
			b[n + 2] = 1;
			address(b + n + 4, 0, msf);
			n += 8;
		}
		b[n + 1] = 0x14;
		b[n + 2] = 0xaa;
		address(b + n + 4, (uint32_t)MIN(scsi_blocks(u), (uint64_t)UINT32_MAX), msf);
		n += 8;
	} else {
		return 0;
	}
	scsi_put(b, n - 2, 2);
	return n;
}

static unsigned feature(uint8_t *b, unsigned code, uint8_t flags, const uint8_t *data, unsigned len)
{
	scsi_put(b, code, 2);
	b[2] = flags;
	b[3] = (uint8_t)len;
	if (len)
		memcpy(b + 4, data, len);
	return 4 + len;
}

/* 6.6: profiles CD-ROM and DVD-ROM; which is current is a matter of size. */
static unsigned configuration(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *b)
{
	unsigned rt = cdb[1] & 3, from = scsi_get(cdb + 2, 2), n = 8;
	uint64_t blocks = scsi_blocks(u);
	bool dvd = blocks > 450000, any = blocks;
	uint8_t profiles[] = { 0, 0x10, any && dvd, 0, 0, 0x08, any && !dvd, 0 };
	static const uint8_t core[] = { 0, 0, 0, 1, 1, 0, 0, 0 }, removable[] = { 0x29, 0, 0, 0 };
	const uint8_t read[] = { 0, 0, 8, 0, 0, 1, 0, 0 };
	struct { unsigned code; uint8_t flags; const uint8_t *data; unsigned len; } f[] = {
		{ 0, 3, profiles, 8 }, { 1, 3 | 2 << 2, core, 8 }, { 3, 3, removable, 4 },
		{ 0x10, any, read, 8 }, { 0x1e, any && !dvd, (const uint8_t[4]){ 0 }, 4 }, { 0x1f, any && dvd, (const uint8_t[4]){ 0 }, 4 },
	};

	scsi_put(b + 6, any ? dvd ? 0x10 : 0x08 : 0, 2);
	for (unsigned i = 0; i < ARRAY_SIZE(f); i++) {
		if (rt == 2 ? f[i].code != from : f[i].code < from || (rt == 1 && !(f[i].flags & 1)))
			continue;
		n += feature(b + n, f[i].code, f[i].flags, f[i].data, f[i].len);
	}
	scsi_put(b, n - 4, 4);
	return n;
}

/* 6.7, polled only: what happened to the medium since it was last asked. */
static unsigned events(struct scsi_unit *u, const uint8_t *cdb, uint8_t *b)
{
	b[3] = 1 << 4;
	if (!(cdb[4] & 1 << 4)) {
		b[2] = 0x80;    /* none of the classes asked for */
		scsi_put(b, 2, 2);
		return 4;
	}
	b[2] = 4;
	b[4] = u->media_event ? (u->tray_open ? 3 : 2) : 0;
	b[5] = (u->tray_open ? 1 : 0) | (scsi_blocks(u) ? 2 : 0);
	u->media_event = false;
	scsi_put(b, 6, 2);
	return 8;
}

static unsigned disc_information(uint8_t *b)
{
	scsi_put(b, 32, 2);
	b[2] = 0x0e;            /* complete, last session closed */
	b[3] = b[4] = b[5] = b[6] = 1;
	b[7] = 0x20;
	return 34;
}

static unsigned mechanism(uint8_t *b, const struct scsi_unit *u)
{
	b[1] = u->tray_open ? 0x10 : 0;
	b[5] = 1;
	return 8;
}

bool scsi_mmc(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;
	const uint8_t *cdb = c->cdb;
	bool medium = scsi_blocks(u);
	uint8_t b[256] = { 0 };
	unsigned n = 0;

	switch (cdb[0]) {
	case 0x43:
		n = medium ? toc(u, cdb, b) : 0;
		break;
	case 0x46:
		n = configuration(u, cdb, b);
		break;
	case 0x4a:
		n = cdb[1] & 1 ? events(u, cdb, b) : 0;
		medium = true;
		break;
	case 0x51:
		n = medium && !(cdb[1] & 7) ? disc_information(b) : 0;
		break;
	case 0xbd:
		n = mechanism(b, u);
		scsi_answer(c, b, n, scsi_get(cdb + 8, 2));
		return true;
	default:
		return false;
	}
	if (!n)
		scsi_check(c, medium ? SENSE_INVALID_FIELD : SENSE_NOT_READY_NO_MEDIUM);
	else
		scsi_answer(c, b, n, scsi_get(cdb + 7, 2));
	return true;
}
