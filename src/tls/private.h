/* What the files of this folder share. */
#ifndef TLS_PRIVATE_H
#define TLS_PRIVATE_H

#include <gnutls/gnutls.h>

#include "tls/tls.h"

struct tls_creds {
	bool server, psk, verify_peer;
	char *priority;                 /* NULL: GnuTLS's default */
	gnutls_certificate_credentials_t x509;
	gnutls_psk_server_credentials_t psk_server;
	gnutls_psk_client_credentials_t psk_client;
	gnutls_dh_params_t dh;
};

int tls_creds_new(struct tls_creds **out, const struct tls_store *s, const char *type, struct keyvals *l, struct err *err);
void tls_creds_free(struct tls_creds *c);
int tls_authz_new(struct tls_authz **out, const char *type, struct keyvals *l, struct err *err);
void tls_authz_free(struct tls_authz *a);
/* A whole small file with a zero behind it; NULL with errno. */
char *tls_read_file(const char *path, size_t *len);

#endif
