/*
 * `lodge io`: qemu-io's words, output and exit statuses (qemu-io 7.2), for tests of images. io.c has the program and the commands about
 * which image is open, io_cmds.c those that read and write it. Requests are done one after the other; aio_ commands, too.
 */
#ifndef CLI_IO_H
#define CLI_IO_H

#include "cli/img.h"

struct io_image { char *file, *format, *options, *cache; bool read_only, snapshot, shared, discard_ignore, copy_on_read; };

struct io_aio;
struct io {
	struct block *b;                /* NULL: none is open */
	struct io_image as;             /* how it was opened; strings owned */
	bool misalign, quit;
	bool breaks;                    /* breakpoints were set: aio_ requests have threads */
	struct io_aio *aio;
};

struct io_command {
	const char *name, *alt;
	int (*fn)(struct io *io, int argc, char **argv);        /* below 0: the program's exit status is 1 */
	int min, max;                   /* arguments; max -1: any number */
	bool no_file;                   /* works without an open image */
	const char *args, *line, *more;
};
extern const struct io_command io_commands[];   /* ends with a NULL name */

/* "qemu-io: message" on standard error; -1. */
int io_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* The line of `help NAME`; -1. */
int io_usage(const char *name);
/* Size or offset of an argument: 0, or -1 after telling why. */
int io_number(const char *text, uint64_t *out);
/* "1.500 KiB", "512 bytes". */
const char *io_bytes(double v, char buf[32]);

/* --- io_break.c --- */
/* fn(io, a copy of args) on a thread; -1 after telling why not. */
int io_aio_start(struct io *io, void (*fn)(struct io *io, const void *args), const void *args, size_t size);
/* Until all are done: -1 when one stands at a breakpoint. */
int io_aio_wait(struct io *io);
void io_aio_end(struct io *io); /* stopped ones go on */
int io_break(struct io *io, int argc, char **argv);
int io_remove_break(struct io *io, int argc, char **argv);
int io_resume(struct io *io, int argc, char **argv);
int io_wait_break(struct io *io, int argc, char **argv);

int io_open(struct io *io, int argc, char **argv);
int io_close(struct io *io, int argc, char **argv);
int io_reopen(struct io *io, int argc, char **argv);
int io_help(struct io *io, int argc, char **argv);
int io_quit(struct io *io, int argc, char **argv);

#endif
