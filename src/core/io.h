/*
 * Port and memory windows: where a vCPU's I/O exits land.
 *
 * A window is embedded in its device. A space publishes an immutable sorted view; lookups take no
 * lock. Windows with a higher priority hide lower ones where they overlap. A device never issues
 * I/O into the view. The dispatcher takes `lock` (when not NULL) around each call, so a device's
 * handlers, and its callbacks that take the same lock, never run at once.
 *
 * Accesses arrive as the guest made them, 1 to 8 bytes; io_ops says what the device takes, and the
 * dispatcher splits wider and ignores (reads as all ones) narrower or unaligned ones it can't do.
 */
#ifndef CORE_IO_H
#define CORE_IO_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

struct io_ops {
	/* `off` is relative to the window, `size` 1, 2, 4 or 8 and off+size lies inside the window. */
	uint64_t (*read)(void *opaque, uint64_t off, unsigned size);
	void (*write)(void *opaque, uint64_t off, uint64_t val, unsigned size);
	uint8_t min_size, max_size;     /* 0: any */
};

struct io_window {
	const char *name;
	const struct io_ops *ops;
	void *opaque;
	pthread_mutex_t *lock;
	uint64_t base, size;
	int priority;
	bool mapped;                    /* owned by the space */
};

struct io_space;
int io_space_create(struct io_space **out, const char *name, uint64_t limit, struct err *err);
void io_space_destroy(struct io_space *s);

/* Map or move a window; -EBUSY (same priority overlap), -ERANGE. */
int io_map(struct io_space *s, struct io_window *w, uint64_t base, struct err *err);
/* After return no handler of `w` runs or will run, unless the caller is inside one. */
void io_unmap(struct io_space *s, struct io_window *w);

/* Dispatch; an address nobody claims reads as all ones, writes are dropped; returns false then. */
bool io_read(struct io_space *s, uint64_t addr, void *buf, unsigned len);
bool io_write(struct io_space *s, uint64_t addr, const void *buf, unsigned len);

#endif
