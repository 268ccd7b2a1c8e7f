/*
 * NBD, the network block device (the NBD project's doc/proto.md): what the image tools and the command line need of the
 * client (as a block driver its name is all: block.h) and the server.
 *
 * The server. Clients are hostile: options, names and requests are bounded (nbd_server.c says how), and nothing they send
 * reaches an image without a check. Each connection has a thread; requests that cannot be answered from the page cache go to
 * the workers that the image was opened with.
 */
#ifndef BLOCK_NBD_H
#define BLOCK_NBD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/keyvals.h"
#include "block/block.h"
#include "tls/tls.h"

/* --- names: nbd:host:port[:exportname=x], nbd:unix:path[:...], nbd[s]://host[:port][/export], nbd[s]+unix:///export?socket=path --- */
struct nbd_config {
	char *host, *port;              /* TCP, or */
	char *path;                     /* Unix, or */
	int fd;                         /* a descriptor given by number; -1 */
	bool ipv4, ipv6, keep_alive;    /* ipv4 and ipv6 false: either */
	char *export, *tls_creds, *tls_hostname, *bitmap;
	bool tls_uri;                   /* nbds: */
	unsigned reconnect_delay, open_timeout; /* seconds */
};
bool nbd_is_name(const char *file);
int nbd_config_name(struct nbd_config *c, const char *file, struct err *err);
/* driver=nbd's keys, flat. Marks what it uses. */
int nbd_config_keys(struct nbd_config *c, struct keyvals *l, const char *what, struct err *err);
void nbd_config_free(struct nbd_config *c);
/* The name as QEMU writes it; caller frees, NULL: out of memory. */
char *nbd_config_text(const struct nbd_config *c);

/* --- asking a server what it has --- */
struct nbd_export_info {
	char *name, *desc;
	uint64_t size;
	uint16_t flags;
	uint32_t min_block, opt_block, max_block;       /* 0: not told */
	char **contexts;
	unsigned ncontexts;
};
/* NBD_OPT_LIST and what NBD_OPT_INFO and NBD_OPT_LIST_META_CONTEXT tell of each. */
int nbd_list(const struct nbd_config *c, const struct tls_store *tls, struct nbd_export_info **out, unsigned *n, struct err *err);
void nbd_list_free(struct nbd_export_info *v, unsigned n);

/* --- the server --- */
struct nbd_server;

struct nbd_server_opts {
	const struct tls_creds *tls;    /* NULL: plain; else TLS is required */
	const struct tls_authz *authz;
	unsigned max_clients;           /* 0: 1024 */
	bool verbose;
	/* A connection that had got through the handshake ended; `left` others are there. On its thread. May be NULL. */
	void (*closed)(void *opaque, unsigned left);
	void *opaque;
	/* The loop that the images' io_uring completes on, if one does: answers are then sent by `senders`, as a client that does
	 * not read must not hold up the others. Both NULL otherwise. */
	struct loop *loop;
	struct workers *senders;
};

struct nbd_export {
	const char *name, *desc;        /* desc may be NULL */
	struct block *blk;              /* opened with workers; the caller closes it after nbd_server_free() */
	uint64_t off, len;              /* the part that is shown */
	bool writable, multi_conn, depth;
	const char *bitmap;             /* NULL: none; its name, and its content: */
	const uint64_t *bits;           /* the caller's, until nbd_server_free() */
	uint64_t nbits;
	unsigned gran_bits;
	struct block *live;             /* the image whose writes still change it; NULL: it stays as `bits` */
};

int nbd_server_new(struct nbd_server **out, const struct nbd_server_opts *o, struct err *err);
/* Copies what it is given. */
int nbd_server_add(struct nbd_server *s, const struct nbd_export *e, struct err *err);
/* Accept on a listening socket, which the server owns from now; several may be added. */
int nbd_server_listen(struct nbd_server *s, int fd, struct err *err);
/* Serve one connected socket (owned from now). `negotiated`: the kernel's client, which skips the handshake. */
int nbd_server_client(struct nbd_server *s, int fd, bool negotiated, struct err *err);
/* Stop accepting, end the connections (what was begun is finished), flush the images. NULL is allowed. */
void nbd_server_free(struct nbd_server *s);
/* The transmission flags of an export. */
uint16_t nbd_export_flags(const struct nbd_export *e);

/* --- sockets, for both ends; -errno --- */
int nbd_listen_unix(const char *path, struct err *err);
/* Up to `max` sockets, an address each; returns how many. */
int nbd_listen_tcp(const char *host, const char *port, int *fds, int max, struct err *err);
int nbd_connect(const struct nbd_config *c, unsigned timeout_ms, struct err *err);

#endif
