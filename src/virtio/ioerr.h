/* What a disk does when its back end fails: QEMU's werror= and rerror=. */
#ifndef VIRTIO_IOERR_H
#define VIRTIO_IOERR_H

#include "block/block.h"
#include "core/device.h"

/* The order of the names below. */
enum io_policy { IO_AUTO, IO_REPORT, IO_IGNORE, IO_STOP, IO_ENOSPC };
extern const char *const io_werror_names[], *const io_rerror_names[];

#define IO_ERROR_PROPS(type) \
	{ "werror", PROP_ENUM, offsetof(type, werror), .dflt_str = "auto", .values = io_werror_names, \
	  .help = "on a write error: report, ignore, stop, or enospc (auto): stop when the disk is full, else report" }, \
	{ "rerror", PROP_ENUM, offsetof(type, rerror), .dflt_str = "auto", .values = io_rerror_names, \
	  .help = "on a read error: report (auto), ignore or stop" }

/* Of a failed request: IO_REPORT, IO_IGNORE or IO_STOP; for IO_STOP the machine was asked to stop and it is logged. */
enum io_policy io_failed(const struct block_req *r, struct block *b, int werror, int rerror, struct machine_env *env);

#endif
