/* The client's handshake. Private to this folder. */
#ifndef BLOCK_NBD_HELLO_H
#define BLOCK_NBD_HELLO_H

#include "block/nbd.h"
#include "block/nbd_proto.h"

enum { NBD_HELLO_MS = 30000 };

struct nbd_hello {
	uint64_t size;
	uint16_t flags;
	uint32_t min_block, opt_block, max_block;       /* 0: the server did not say */
	bool structured, has_context;
	uint32_t context;               /* the id of the one context that was asked for */
};

/* Greeting, TLS when `creds`, structured replies, the export and its `context` (NULL: none). The channel's deadline is used. */
int nbd_hello(struct nbd_chan *c, const struct nbd_config *cfg, const struct tls_creds *creds, const char *context,
	      struct nbd_hello *h, struct err *err);

#endif
