/* What the server's files share. Private to this folder. */
#ifndef BLOCK_NBD_PRIV_H
#define BLOCK_NBD_PRIV_H

#include <pthread.h>
#include <stdatomic.h>

#include "block/image.h"
#include "block/nbd.h"
#include "block/nbd_proto.h"

enum nbd_context { CTX_ALLOCATION, CTX_DEPTH, CTX_BITMAP, CTX_N };

/* An export as the server keeps it. */
struct nbd_ex {
	struct nbd_export e;            /* strings owned */
	uint16_t flags;
	/* A write that covers part of a block reads the rest first, alone. */
	pthread_mutex_t lock;
	pthread_cond_t calm;
	unsigned writes;
	bool alone;
	_Atomic bool dirty;             /* written since the last flush */
};

struct nbd_server {
	struct nbd_server_opts o;
	struct nbd_ex **ex;
	unsigned nex;
	pthread_mutex_t lock;
	pthread_cond_t change;
	bool stop;
	unsigned clients, max, listeners;       /* listeners: threads that use this */
	struct nbd_client *list;
	int wake[2];                    /* a pipe that ends the listeners */
};

struct nbd_job;

struct nbd_client {
	struct nbd_server *s;
	struct nbd_client *next;
	struct nbd_chan chan;
	struct nbd_ex *ex;
	bool structured, negotiated;
	bool ctx[CTX_N];                /* chosen contexts, of the export `ctx_of` */
	const struct nbd_ex *ctx_of;
	pthread_mutex_t send, lock;
	pthread_cond_t room;
	unsigned jobs;                  /* in flight */
	uint64_t bytes;                 /* their buffers */
	_Atomic bool broken;            /* nothing can be sent any more */
	pthread_t thread;
	struct nbd_job *done, *spare;   /* answered while the client's own thread looks | to use again */
	unsigned ndone, nspare;
	uint64_t kept;                  /* bytes in the spare jobs' buffers */
};

/* nbd_talk.c: the server's handshake. 0: c->ex is chosen; else the connection ends. */
int nbd_talk(struct nbd_client *c);
/* nbd_serve.c: requests until the client leaves. */
void nbd_serve(struct nbd_client *c);
/* By number, NULL past the end; by name. */
struct nbd_ex *nbd_server_at(struct nbd_server *s, unsigned i);
struct nbd_ex *nbd_server_find(struct nbd_server *s, const char *name, size_t len);

#endif
