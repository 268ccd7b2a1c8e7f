/* What the files of this folder share. */
#ifndef CHR_INTERNAL_H
#define CHR_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>

#include "base/optlist.h"
#include "chr/chr.h"
#include "loop/loop.h"

enum { CHR_CLIENTS = 8, CHR_FIFO = 1024 };

/* One front end, with what came in for it and it could not take yet (loop thread only). */
struct chr_port {
	struct chr_client cl;
	char *owner;
	uint8_t fifo[CHR_FIFO];
	unsigned head, used;
};

struct chr_kind {
	const char *name;
	const char *const *options;     /* besides id, mux, logfile: for hints */
	int (*open)(struct chardev *c, struct optlist *o, struct err *err);
	void (*close)(struct chardev *c);               /* may be NULL; descriptors are closed after it */
	void (*hangup)(struct chardev *c);              /* loop thread: the peer went away; NULL: end of input */
	size_t (*write)(struct chardev *c, const uint8_t *buf, size_t len);     /* instead of a descriptor */
};

struct chardev {
	const struct chr_kind *kind;
	char *id, label[160];
	struct chr_env env;
	pthread_mutex_t lock;           /* descriptors, watches, want_out; never held in a callback */
	int rfd, wfd;                   /* -1: none; may be the same */
	bool own_fds, is_tty, poll_first, is_socket, is_pty;
	struct loop_watch *rwatch, *wwatch;
	bool want_out, throttled, eof;
	bool eof_closes;                /* the end of input is CHR_CLOSED, once all of it was taken */
	bool accept_posted;             /* atomic: one is on its way */
	struct chr_port *port[CHR_CLIENTS];
	unsigned nports, focus;
	bool mux, escape, timestamps, line_start;
	uint64_t start_ns;
	void (*on_eof)(void *opaque);
	void *eof_opaque;

	/* socket */
	int listen_fd;
	struct loop_watch *lwatch;
	struct timer retry;             /* reconnecting, or looking whether a pty has a reader */
	uint64_t retry_ns;
	char *unix_path;                /* to remove at the end */
	struct chr_addr *addr;

	/* ringbuf */
	uint8_t *ring;
	size_t ring_size;
	uint64_t ring_prod, ring_cons;
};

/* Take these descriptors as the stream, start watching, tell the clients. Loop thread or before it runs. */
int chr_connect(struct chardev *c, int rfd, int wfd, struct err *err);
/* Forget the stream and tell the clients. Loop thread. */
void chr_disconnect(struct chardev *c);
/* Bytes that arrived: through the escapes of a mux into the fifo of the port in focus. */
void chr_input(struct chardev *c, const uint8_t *buf, size_t len);
void chr_event_all(struct chardev *c, enum chr_event e);
size_t chr_raw_write(struct chardev *c, const uint8_t *buf, size_t len);

/* mux.c: one byte; true when it was part of an escape. */
bool mux_escape(struct chardev *c, uint8_t byte);
/* Output with a time at the start of each line. */
size_t mux_write_timed(struct chardev *c, const uint8_t *buf, size_t len);

extern const struct chr_kind chr_stdio, chr_null, chr_file, chr_pipe, chr_pty, chr_socket, chr_ringbuf;

#endif
