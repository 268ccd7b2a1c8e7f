/*
 * SCSI host device (virtio 1.2, 5.6): "virtio-scsi-pci" is the bus, "scsi-hd" and "scsi-cd" are logical units on it.
 *
 * scsi.c moves requests between rings and units; scsi_unit.c is the units' devices; scsi_cmd.c executes commands (SAM-5,
 * SPC-4, SBC-3, MMC-6) and knows no ring: it fills a small answer, or names a block request to be made next.
 *
 * Security: CDBs and parameter lists are copied out of guest memory before they are looked at; lengths in them are checked
 * against what was copied and against the medium; answers are built in a bounded buffer and cut to what the guest gave room for.
 */
#ifndef VIRTIO_SCSI_H
#define VIRTIO_SCSI_H

#include "block/block.h"
#include "virtio/ioerr.h"
#include "virtio/pci.h"

enum { SCSI_CDB = 32, SCSI_SENSE = 18, SCSI_ANSWER = 4096, SCSI_PARAM = 4096, SCSI_MAX_TARGET = 255, SCSI_MAX_LUN = 16383,
       SCSI_PATTERN = 64 * 1024 };
enum { SCSI_GOOD = 0, SCSI_CHECK_CONDITION = 2, SCSI_BUSY = 8 };

/* Sense key, additional code and qualifier in one number. */
#define SENSE(key, asc, ascq) ((uint32_t)(key) << 16 | (asc) << 8 | (ascq))
enum {
	SENSE_NONE = 0,
	SENSE_NOT_READY_NO_MEDIUM = SENSE(2, 0x3a, 0), SENSE_NOT_READY_TRAY_OPEN = SENSE(2, 0x3a, 2), SENSE_NOT_READY_STOPPED = SENSE(2, 4, 2),
	SENSE_READ_ERROR = SENSE(3, 0x11, 0), SENSE_WRITE_ERROR = SENSE(3, 0x0c, 0), SENSE_TARGET_FAILURE = SENSE(4, 0x44, 0),
	SENSE_INVALID_OPCODE = SENSE(5, 0x20, 0), SENSE_LBA_RANGE = SENSE(5, 0x21, 0), SENSE_INVALID_FIELD = SENSE(5, 0x24, 0),
	SENSE_INVALID_PARAM = SENSE(5, 0x26, 0), SENSE_PARAM_LENGTH = SENSE(5, 0x1a, 0), SENSE_LUN_NOT_SUPPORTED = SENSE(5, 0x25, 0),
	SENSE_REMOVAL_PREVENTED = SENSE(5, 0x53, 2),
	SENSE_UA_MEDIUM_CHANGED = SENSE(6, 0x28, 0), SENSE_UA_RESET = SENSE(6, 0x29, 0), SENSE_UA_CAPACITY = SENSE(6, 0x2a, 9),
	SENSE_UA_LUNS_CHANGED = SENSE(6, 0x3f, 0x0e),
	SENSE_WRITE_PROTECTED = SENSE(7, 0x27, 0), SENSE_SPACE_ALLOCATION = SENSE(7, 0x27, 7), SENSE_MISCOMPARE = SENSE(14, 0x1d, 0),
};

struct scsi_hba;

/* SCSI's numbers are big endian, 1 to 8 bytes long. */
static inline uint64_t scsi_get(const uint8_t *p, unsigned n)
{
	uint64_t v = 0;
	while (n--)
		v = v << 8 | *p++;
	return v;
}
static inline void scsi_put(uint8_t *p, uint64_t v, unsigned n)
{
	for (; n--; v >>= 8)
		p[n] = (uint8_t)v;
}

/* A logical unit; under the HBA's lock. */
struct scsi_unit {
	struct device dev;              /* first */
	struct scsi_hba *hba;
	bool cd, attached, plugged;
	uint32_t in_flight;             /* atomic: commands the back end has */
	uint32_t unit_attention;        /* a SENSE() to report first, or 0 */
	bool stopped, tray_open, locked, media_event;
	bool wce;                       /* the guest's view of the write cache: off makes every write stable */
	uint32_t block_size;
	/* properties */
	struct block *drive;
	char *serial, *product, *vendor, *ver, *device_id;
	uint32_t target, lun, channel;
	int32_t bootindex;
	uint64_t lbs, pbs, wwn;
	uint32_t rotation_rate;
	int werror, rerror, write_cache;
	bool removable, dpofua;
};

/*
 * A command. The caller fills unit, cdb, the data buffers (`out`: from the guest, `in`: to it) and calls scsi_start().
 * SCSI_ANSWERED: status, sense and `moved` are final. SCSI_BLOCK_IO: submit `io`, then call scsi_next(), which says the same again.
 */
enum scsi_step { SCSI_ANSWERED, SCSI_BLOCK_IO };
struct scsi_cmd {
	struct scsi_unit *unit;
	uint8_t cdb[SCSI_CDB];
	struct iovec *out, *in;
	unsigned n_out, n_in;
	uint64_t out_len, in_len;
	struct block_req io;            /* .done is the caller's */
	uint8_t status, sense[SCSI_SENSE];
	bool has_sense;
	uint64_t moved;                 /* bytes of data that were transferred */
	uint64_t expected;              /* what the CDB asks for */
	bool overrun;                   /* more than there is room for */
	/* unmap, write same */
	uint8_t *param;                 /* owned */
	unsigned param_at, param_len;
	struct iovec pattern;
	uint64_t off, left;
};
enum scsi_step scsi_start(struct scsi_cmd *c);
enum scsi_step scsi_next(struct scsi_cmd *c);
void scsi_cmd_free(struct scsi_cmd *c);
/* For an address without a unit: INQUIRY, REPORT LUNS, REQUEST SENSE are still answered. */
void scsi_no_unit(struct scsi_cmd *c, const uint8_t *luns, unsigned luns_len);
void scsi_check(struct scsi_cmd *c, uint32_t sense);
/* Copy an answer to the guest, cut to `alloc` and to the room there is. */
void scsi_answer(struct scsi_cmd *c, const void *buf, size_t len, size_t alloc);
uint64_t scsi_blocks(const struct scsi_unit *u);        /* 0: no medium */

/* scsi_inquiry.c: lengths of what they wrote into buf[SCSI_ANSWER], or a SENSE() with *sense set. */
unsigned scsi_inquiry(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *buf, uint32_t *sense);
unsigned scsi_mode_sense(const struct scsi_unit *u, const uint8_t *cdb, uint8_t *buf, uint32_t *sense);
/* scsi_mmc.c: CD commands; false: not one. */
bool scsi_mmc(struct scsi_cmd *c);

/* scsi.c, for units. */
struct scsi_hba *scsi_hba_of(struct device *d);
int scsi_plug(struct scsi_hba *h, struct scsi_unit *u, struct err *err);
void scsi_unplug(struct scsi_hba *h, struct scsi_unit *u);
/* Lock held: an event for the driver (VIRTIO_SCSI_T_*), or a note that one was missed. */
void scsi_event(struct scsi_hba *h, const struct scsi_unit *u, uint32_t event, uint32_t reason);
struct virtio_dev *scsi_vdev(struct scsi_hba *h);
const struct pci_device *scsi_pci(struct scsi_hba *h);
void scsi_retry(struct scsi_hba *h);

#endif
