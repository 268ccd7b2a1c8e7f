/*
 * SCSI commands of disks and what CD drives share with them. Sections: SPC-4 (primary), SBC-3 (block).
 *
 * PERSISTENT RESERVE, FORMAT UNIT, COMPARE AND WRITE and the like are refused as unknown commands.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "virtio/scsi.h"

enum {
	TEST_UNIT_READY = 0x00, REQUEST_SENSE = 0x03, READ_6 = 0x08, WRITE_6 = 0x0a, INQUIRY = 0x12, MODE_SELECT_6 = 0x15,
	RESERVE_6 = 0x16, RELEASE_6 = 0x17, MODE_SENSE_6 = 0x1a, START_STOP = 0x1b, PREVENT_ALLOW = 0x1e, READ_CAPACITY_10 = 0x25,
	READ_10 = 0x28, WRITE_10 = 0x2a, SEEK_10 = 0x2b, WRITE_VERIFY_10 = 0x2e, VERIFY_10 = 0x2f, SYNC_CACHE_10 = 0x35,
	WRITE_SAME_10 = 0x41, UNMAP = 0x42, MODE_SELECT_10 = 0x55, MODE_SENSE_10 = 0x5a, READ_16 = 0x88, WRITE_16 = 0x8a,
	VERIFY_16 = 0x8f, SYNC_CACHE_16 = 0x91, WRITE_SAME_16 = 0x93, SERVICE_ACTION_IN_16 = 0x9e, REPORT_LUNS = 0xa0,
	READ_12 = 0xa8, WRITE_12 = 0xaa,
};

#define WRITE_SAME_MAX (1u << 22)       /* sectors, as block limits says */

void scsi_check(struct scsi_cmd *c, uint32_t sense)
{
	c->status = SCSI_CHECK_CONDITION;
	c->has_sense = true;
	memset(c->sense, 0, sizeof(c->sense));
	c->sense[0] = 0x70;
	c->sense[2] = (uint8_t)(sense >> 16);
	c->sense[7] = SCSI_SENSE - 8;
	c->sense[12] = (uint8_t)(sense >> 8);
	c->sense[13] = (uint8_t)sense;
}

void scsi_answer(struct scsi_cmd *c, const void *buf, size_t len, size_t alloc)
{
	c->expected = MIN(len, alloc);
	c->moved = iov_from_buf(c->in, c->n_in, 0, buf, c->expected);
}

uint64_t scsi_blocks(const struct scsi_unit *u)
{
	return u->drive && !u->tray_open ? block_length(u->drive) / u->block_size : 0;
}

/* 0, or why the medium cannot be used. */
static uint32_t not_ready(const struct scsi_unit *u)
{
	if (u->cd && u->tray_open)
		return SENSE_NOT_READY_TRAY_OPEN;
	if (!scsi_blocks(u))
		return SENSE_NOT_READY_NO_MEDIUM;
	return u->stopped ? SENSE_NOT_READY_STOPPED : 0;
}

static enum scsi_step fail(struct scsi_cmd *c, uint32_t sense)
{
	scsi_check(c, sense);
	return SCSI_ANSWERED;
}

/* --- reading and writing --- */

/* Address and length of a command by the size of its group. */
static void extent(const uint8_t *cdb, uint64_t *lba, uint64_t *n)
{
	switch (cdb[0] >> 5) {
	case 0:
		*lba = scsi_get(cdb + 1, 3) & 0x1fffff;
		*n = cdb[4] ? cdb[4] : 256;
		break;
	case 4:
		*lba = scsi_get(cdb + 2, 8);
		*n = scsi_get(cdb + 10, 4);
		break;
	case 5:
		*lba = scsi_get(cdb + 2, 4);
		*n = scsi_get(cdb + 6, 4);
		break;
	default:
		*lba = scsi_get(cdb + 2, 4);
		*n = scsi_get(cdb + 7, 2);
		break;
	}
}

/* Checks a range of blocks against the medium. */
static bool range_ok(struct scsi_cmd *c, uint64_t lba, uint64_t n)
{
	uint32_t sense = not_ready(c->unit);

	if (!sense && range_bad(lba, n, scsi_blocks(c->unit)))
		sense = SENSE_LBA_RANGE;
	if (sense)
		scsi_check(c, sense);
	return !sense;
}

static bool may_write(struct scsi_cmd *c)
{
	bool ok = !c->unit->cd && !block_read_only(c->unit->drive);

	if (!ok)
		scsi_check(c, SENSE_WRITE_PROTECTED);
	return ok;
}

static enum scsi_step transfer(struct scsi_cmd *c, bool write)
{
	struct scsi_unit *u = c->unit;
	uint64_t lba, n;

	extent(c->cdb, &lba, &n);
	if (!range_ok(c, lba, n) || (write && !may_write(c)))
		return SCSI_ANSWERED;
	c->expected = n * u->block_size;
	if (c->expected > (write ? c->out_len : c->in_len)) {
		c->overrun = true;
		return SCSI_ANSWERED;
	}
	if (!n)
		return SCSI_ANSWERED;
	iov_trim_to(write ? c->out : c->in, write ? &c->n_out : &c->n_in, c->expected);
	c->io.op = write ? BLOCK_WRITE : BLOCK_READ;
	c->io.off = lba * u->block_size;
	c->io.len = c->expected;
	c->io.iov = write ? c->out : c->in;
	c->io.iovcnt = (int)(write ? c->n_out : c->n_in);
	if (write && (!u->wce || (c->cdb[0] > 0x1f && c->cdb[1] & 8)))
		c->io.flags = BLOCK_REQ_FUA;
	return SCSI_BLOCK_IO;
}

/* Without a comparison nothing moves; the medium has no defects of its own. */
static enum scsi_step verify(struct scsi_cmd *c)
{
	uint64_t lba, n;

	extent(c->cdb, &lba, &n);
	if (c->cdb[1] & 6)
		return fail(c, SENSE_INVALID_FIELD);
	range_ok(c, lba, n);
	return SCSI_ANSWERED;
}

static enum scsi_step sync_cache(struct scsi_cmd *c)
{
	uint64_t lba, n;

	extent(c->cdb, &lba, &n);
	if (!range_ok(c, lba, n))
		return SCSI_ANSWERED;
	c->io.op = BLOCK_FLUSH;
	return SCSI_BLOCK_IO;
}

/* --- unmapping and filling --- */

/* The parameter list, copied; false when there is not all of it. */
static bool copy_param(struct scsi_cmd *c, size_t len)
{
	if (len > SCSI_PARAM || len > c->out_len) {
		scsi_check(c, SENSE_PARAM_LENGTH);
		return false;
	}
	c->param = calloc(1, len + 1);
	if (!c->param) {
		c->status = SCSI_BUSY;
		return false;
	}
	c->expected = c->moved = c->param_len = (unsigned)iov_to_buf(c->out, c->n_out, 0, c->param, len);
	return true;
}

/* The next descriptor that covers anything. */
static enum scsi_step unmap_next(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;

	while (c->param_at + 16 <= c->param_len) {
		uint64_t lba = scsi_get(c->param + c->param_at, 8), n = scsi_get(c->param + c->param_at + 8, 4);

		c->param_at += 16;
		if (!n)
			continue;
		if (!range_ok(c, lba, n))
			return SCSI_ANSWERED;
		c->io.op = BLOCK_DISCARD;
		c->io.off = lba * u->block_size;
		c->io.len = n * u->block_size;
		return SCSI_BLOCK_IO;
	}
	return SCSI_ANSWERED;
}

/* SBC-3 5.28. All descriptors are checked before the first is done. */
static enum scsi_step unmap(struct scsi_cmd *c)
{
	size_t len = scsi_get(c->cdb + 7, 2), list;

	if (c->cdb[1] & 1) /* anchored */
		return fail(c, SENSE_INVALID_FIELD);
	if (!len)
		return SCSI_ANSWERED;
	if (!may_write(c) || !copy_param(c, len))
		return SCSI_ANSWERED;
	list = len >= 8 ? scsi_get(c->param + 2, 2) : 0;
	if (len < 8 || scsi_get(c->param, 2) + 2 > len || list + 8 > len || list % 16)
		return fail(c, SENSE_INVALID_PARAM);
	c->param_len = 8 + (unsigned)list;
	for (unsigned at = 8; at < c->param_len; at += 16) {
		uint64_t n = scsi_get(c->param + at + 8, 4);

		if (n > WRITE_SAME_MAX / (c->unit->block_size / 512))
			return fail(c, SENSE_INVALID_PARAM);
		if (!range_ok(c, scsi_get(c->param + at, 8), n))
			return SCSI_ANSWERED;
	}
	c->param_at = 8;
	return unmap_next(c);
}

/* The rest of a fill that is no zeroes. */
static enum scsi_step fill_next(struct scsi_cmd *c)
{
	uint64_t n = MIN(c->left, (uint64_t)SCSI_PATTERN);

	if (!n)
		return SCSI_ANSWERED;
	c->pattern = (struct iovec){ c->param, n };
	c->io.op = BLOCK_WRITE;
	c->io.off = c->off;
	c->io.len = n;
	c->io.iov = &c->pattern;
	c->io.iovcnt = 1;
	c->io.flags = c->unit->wce ? 0 : BLOCK_REQ_FUA;
	c->off += n;
	c->left -= n;
	return SCSI_BLOCK_IO;
}

static bool is_zero(const uint8_t *p, size_t n)
{
	return !p[0] && !memcmp(p, p + 1, n - 1);
}

/* SBC-3 5.41, 5.43: one block's content, many times. */
static enum scsi_step write_same(struct scsi_cmd *c)
{
	uint32_t bs = c->unit->block_size;
	uint64_t lba, n;
	bool ndob = c->cdb[0] == WRITE_SAME_16 && c->cdb[1] & 1;

	extent(c->cdb, &lba, &n);
	if (c->cdb[1] & 0x10 || !n || n > WRITE_SAME_MAX / (bs / 512)) /* anchor, or without end */
		return fail(c, SENSE_INVALID_FIELD);
	if (!range_ok(c, lba, n) || !may_write(c))
		return SCSI_ANSWERED;
	c->param = calloc(1, MAX((uint32_t)SCSI_PATTERN, bs));
	if (!c->param) {
		c->status = SCSI_BUSY;
		return SCSI_ANSWERED;
	}
	if (!ndob && c->out_len < bs) {
		c->overrun = true;
		return SCSI_ANSWERED;
	}
	if (!ndob)
		c->expected = c->moved = iov_to_buf(c->out, c->n_out, 0, c->param, bs);
	c->off = lba * bs;
	c->left = n * bs;
	if (is_zero(c->param, bs)) {
		c->io.op = BLOCK_ZERO;
		c->io.off = c->off;
		c->io.len = c->left;
		c->io.flags = (c->cdb[1] & 8 ? BLOCK_REQ_MAY_UNMAP : 0) | (c->unit->wce ? 0 : BLOCK_REQ_FUA);
		c->left = 0;
		return SCSI_BLOCK_IO;
	}
	for (uint32_t at = bs; at < SCSI_PATTERN; at += bs)
		memcpy(c->param + at, c->param, bs);
	return fill_next(c);
}

/* --- the rest --- */

static enum scsi_step read_capacity_10(struct scsi_cmd *c)
{
	uint8_t b[8];
	uint64_t last = scsi_blocks(c->unit) - 1;
	uint32_t sense = not_ready(c->unit);

	if (sense)
		return fail(c, sense);
	scsi_put(b, MIN(last, (uint64_t)UINT32_MAX), 4);
	scsi_put(b + 4, c->unit->block_size, 4);
	scsi_answer(c, b, 8, 8);
	return SCSI_ANSWERED;
}

static enum scsi_step read_capacity_16(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;
	uint8_t b[32] = { 0 };
	uint32_t sense = not_ready(u), ratio = MAX((uint32_t)u->pbs, u->block_size) / u->block_size;

	if ((c->cdb[1] & 0x1f) != 0x10)
		return fail(c, SENSE_INVALID_FIELD);
	if (sense)
		return fail(c, sense);
	scsi_put(b, scsi_blocks(u) - 1, 8);
	scsi_put(b + 8, u->block_size, 4);
	b[13] = (uint8_t)__builtin_ctz(ratio);
	b[14] = u->cd ? 0 : 0x80;       /* provisioning management */
	scsi_answer(c, b, sizeof(b), scsi_get(c->cdb + 10, 4));
	return SCSI_ANSWERED;
}

static enum scsi_step request_sense(struct scsi_cmd *c)
{
	uint32_t sense = c->unit->unit_attention;
	uint8_t b[SCSI_SENSE];

	scsi_check(c, sense);
	memcpy(b, c->sense, sizeof(b));
	c->status = SCSI_GOOD;
	c->has_sense = false;
	c->unit->unit_attention = 0;
	scsi_answer(c, b, sizeof(b), c->cdb[4]);
	return SCSI_ANSWERED;
}

static enum scsi_step inquiry(struct scsi_cmd *c)
{
	uint8_t b[SCSI_ANSWER];
	uint32_t sense = 0;
	unsigned n = scsi_inquiry(c->unit, c->cdb, b, &sense);

	if (!n)
		return fail(c, sense);
	scsi_answer(c, b, n, scsi_get(c->cdb + 3, 2));
	return SCSI_ANSWERED;
}

static enum scsi_step mode_sense(struct scsi_cmd *c)
{
	uint8_t b[SCSI_ANSWER];
	uint32_t sense = 0;
	unsigned n = scsi_mode_sense(c->unit, c->cdb, b, &sense);

	if (!n)
		return fail(c, sense);
	scsi_answer(c, b, n, c->cdb[0] == MODE_SENSE_6 ? c->cdb[4] : scsi_get(c->cdb + 7, 2));
	return SCSI_ANSWERED;
}

/* SPC-4 6.9: only the write cache can be changed; switching it off makes stable what is in it. */
static enum scsi_step mode_select(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;
	bool six = c->cdb[0] == MODE_SELECT_6, flush = false;
	unsigned head = six ? 4 : 8, at;
	size_t len = six ? c->cdb[4] : scsi_get(c->cdb + 7, 2);

	if (!(c->cdb[1] & 0x10) || c->cdb[1] & 1)
		return fail(c, SENSE_INVALID_FIELD);
	if (!len)
		return SCSI_ANSWERED;
	if (!copy_param(c, len))
		return SCSI_ANSWERED;
	if (c->param_len < head)
		return fail(c, SENSE_PARAM_LENGTH);
	at = head + (unsigned)scsi_get(c->param + (six ? 3 : 6), six ? 1 : 2);
	while (at + 2 <= c->param_len) {
		unsigned page = c->param[at] & 0x3f, n = c->param[at + 1] + 2u;

		if (c->param[at] & 0x40 || at + n > c->param_len)
			return fail(c, SENSE_INVALID_PARAM);
		if (page == 0x08 && !u->cd && n >= 3) {
			bool on = c->param[at + 2] & 4;
			flush |= u->wce && !on;
			u->wce = on;
		} else if (page != 0x01 && page != 0x0a) {
			return fail(c, SENSE_INVALID_PARAM);
		}
		at += n;
	}
	c->io.op = BLOCK_FLUSH;
	return flush ? SCSI_BLOCK_IO : SCSI_ANSWERED;
}

/* SBC-3 5.24, MMC-6 6.42. */
static enum scsi_step start_stop(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;
	bool start = c->cdb[4] & 1, eject = c->cdb[4] & 2;

	if (c->cdb[4] >> 4)
		return SCSI_ANSWERED;   /* power conditions mean nothing here */
	if (!u->cd || !eject) {
		u->stopped = !start;
		return SCSI_ANSWERED;
	}
	if (!start && !u->tray_open && u->locked)
		return fail(c, SENSE_REMOVAL_PREVENTED);
	u->media_event |= u->tray_open == start;
	if (start && u->tray_open && u->drive)
		u->unit_attention = SENSE_UA_MEDIUM_CHANGED;
	u->tray_open = !start;
	return SCSI_ANSWERED;
}

static enum scsi_step execute(struct scsi_cmd *c)
{
	uint32_t sense;

	switch (c->cdb[0]) {
	case TEST_UNIT_READY:
		sense = not_ready(c->unit);
		return sense ? fail(c, sense) : SCSI_ANSWERED;
	case REQUEST_SENSE:
		return request_sense(c);
	case READ_6: case READ_10: case READ_12: case READ_16:
		return transfer(c, false);
	case WRITE_6: case WRITE_10: case WRITE_12: case WRITE_16: case WRITE_VERIFY_10:
		return transfer(c, true);
	case INQUIRY:
		return inquiry(c);
	case MODE_SENSE_6: case MODE_SENSE_10:
		return mode_sense(c);
	case MODE_SELECT_6: case MODE_SELECT_10:
		return mode_select(c);
	case RESERVE_6: case RELEASE_6:
		return SCSI_ANSWERED;   /* one initiator */
	case START_STOP:
		return start_stop(c);
	case PREVENT_ALLOW:
		c->unit->locked = c->cdb[4] & 1;
		return SCSI_ANSWERED;
	case READ_CAPACITY_10:
		return read_capacity_10(c);
	case SERVICE_ACTION_IN_16:
		return read_capacity_16(c);
	case SEEK_10:
		range_ok(c, scsi_get(c->cdb + 2, 4), 1);
		return SCSI_ANSWERED;
	case VERIFY_10: case VERIFY_16:
		return verify(c);
	case SYNC_CACHE_10: case SYNC_CACHE_16:
		return sync_cache(c);
	case WRITE_SAME_10: case WRITE_SAME_16:
		return c->unit->cd ? fail(c, SENSE_INVALID_OPCODE) : write_same(c);
	case UNMAP:
		return c->unit->cd ? fail(c, SENSE_INVALID_OPCODE) : unmap(c);
	}
	return c->unit->cd && scsi_mmc(c) ? SCSI_ANSWERED : fail(c, SENSE_INVALID_OPCODE);
}

enum scsi_step scsi_start(struct scsi_cmd *c)
{
	struct scsi_unit *u = c->unit;
	uint8_t op = c->cdb[0];

	c->status = SCSI_GOOD;
	c->has_sense = c->overrun = false;
	c->moved = c->expected = 0;
	c->io.flags = 0;
	c->io.len = c->io.off = 0;
	/* SAM-5 5.14: a unit attention goes first, except for those that ask what is there. */
	if (u->unit_attention && op != INQUIRY && op != REQUEST_SENSE && op != REPORT_LUNS && op != 0x4a) {
		uint32_t ua = u->unit_attention;
		u->unit_attention = 0;
		return fail(c, ua);
	}
	return execute(c);
}

static uint32_t error_sense(const struct block_req *io)
{
	if (io->ret == -ENOSPC)
		return SENSE_SPACE_ALLOCATION;
	if (io->ret == -EPERM || io->ret == -EROFS)
		return SENSE_WRITE_PROTECTED;
	return io->op == BLOCK_READ ? SENSE_READ_ERROR : io->op == BLOCK_WRITE || io->op == BLOCK_ZERO ? SENSE_WRITE_ERROR : SENSE_TARGET_FAILURE;
}

enum scsi_step scsi_next(struct scsi_cmd *c)
{
	if (c->io.ret == -ENOTSUP)
		return fail(c, SENSE_INVALID_FIELD);
	if (c->io.ret)
		return fail(c, error_sense(&c->io));
	if (c->cdb[0] == UNMAP)
		return unmap_next(c);
	if (c->cdb[0] == WRITE_SAME_10 || c->cdb[0] == WRITE_SAME_16)
		return fill_next(c);
	if (c->io.op == BLOCK_READ || c->io.op == BLOCK_WRITE)
		c->moved = c->expected;
	return SCSI_ANSWERED;
}

void scsi_cmd_free(struct scsi_cmd *c)
{
	free(c->param);
	c->param = NULL;
	c->param_at = c->param_len = 0;
}

void scsi_no_unit(struct scsi_cmd *c, const uint8_t *luns, unsigned luns_len)
{
	uint8_t b[SCSI_SENSE] = { 0x70, [2] = 5, [7] = SCSI_SENSE - 8, [12] = 0x25 }, nothing[36] = { 0x7f };

	c->status = SCSI_GOOD;
	c->has_sense = false;
	c->moved = c->expected = 0;
	nothing[4] = sizeof(nothing) - 5;
	if (c->cdb[0] == REPORT_LUNS)
		scsi_answer(c, luns, luns_len, scsi_get(c->cdb + 6, 4));
	else if (c->cdb[0] == INQUIRY && !(c->cdb[1] & 1))
		scsi_answer(c, nothing, sizeof(nothing), scsi_get(c->cdb + 3, 2));
	else if (c->cdb[0] == REQUEST_SENSE)
		scsi_answer(c, b, sizeof(b), c->cdb[4]);
	else
		scsi_check(c, SENSE_LUN_NOT_SUPPORTED);
}
