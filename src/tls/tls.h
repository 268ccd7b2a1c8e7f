/*
 * TLS for sockets, with credentials from QEMU's objects: tls-creds-x509, tls-creds-psk, and who may connect
 * (authz-simple, authz-list, authz-list-file). GnuTLS below; nobody above sees it.
 *
 * A session sits on a connected socket, which it makes non-blocking and does not own. One thread may receive while
 * others send: a lock around GnuTLS, never held while waiting.
 */
#ifndef TLS_TLS_H
#define TLS_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/err.h"
#include "base/keyvals.h"

struct tls_creds;
struct tls_authz;
struct tls_session;

/* What -object made: owned by whoever reads the command line, alive as long as anything that uses it. Zeroed is empty. */
struct tls_store {
	struct tls_object { char *id; struct tls_creds *creds; struct tls_authz *authz; char *secret; } *v;
	unsigned n;
};

/* Is this -object type one of ours (secret too)? */
bool tls_is_object(const char *type);
/* An object from its keys ("qom-type", "id", ...): reads the files it names. */
int tls_store_add(struct tls_store *s, struct keyvals *l, struct err *err);
void tls_store_free(struct tls_store *s);
/* Credentials for one side, -ENOENT or -EINVAL (the wrong side) with a message. */
int tls_find_creds(const struct tls_store *s, const char *id, bool server, const struct tls_creds **out, struct err *err);
int tls_find_authz(const struct tls_store *s, const char *id, const struct tls_authz **out, struct err *err);

/* May this identity (an x509 distinguished name, a PSK user) connect? */
bool tls_authz_allows(const struct tls_authz *a, const char *identity);

/*
 * Handshake and check of the peer, at most `timeout_ms` long. A server checks the client's name with `authz` (may be NULL), a
 * client the certificate for `hostname` (NULL: only that the authority signed it).
 */
int tls_start(struct tls_session **out, const struct tls_creds *c, int fd, const char *hostname, const struct tls_authz *authz,
	      unsigned timeout_ms, struct err *err);
/* As recv() and send(): bytes, 0 at the end, -errno. `timeout_ms` < 0 waits for ever; -ETIMEDOUT. */
ssize_t tls_recv(struct tls_session *t, void *buf, size_t len, int timeout_ms);
ssize_t tls_send(struct tls_session *t, const void *buf, size_t len, int timeout_ms);
/* Bytes that tls_recv() has without the socket. */
bool tls_pending(struct tls_session *t);
void tls_free(struct tls_session *t);

#endif
