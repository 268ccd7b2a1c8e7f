/* One TLS connection over a socket. */
#include <errno.h>
#include <fcntl.h>
#include <gnutls/x509.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "tls/private.h"

enum { HANDSHAKE_STEPS = 1000 };

struct tls_session {
	gnutls_session_t s;
	pthread_mutex_t lock;
	int fd;
};

static ssize_t push(gnutls_transport_ptr_t p, const void *buf, size_t len)
{
	struct tls_session *t = p;
	ssize_t n = send(t->fd, buf, len, MSG_NOSIGNAL);
	if (n < 0)
		gnutls_transport_set_errno(t->s, errno);
	return n;
}

static ssize_t pull(gnutls_transport_ptr_t p, void *buf, size_t len)
{
	struct tls_session *t = p;
	ssize_t n = recv(t->fd, buf, len, 0);
	if (n < 0)
		gnutls_transport_set_errno(t->s, errno);
	return n;
}

static int wait_for(int fd, short events, int timeout_ms)
{
	struct pollfd p = { fd, events, 0 };
	int n;
	do
		n = poll(&p, 1, timeout_ms);
	while (n < 0 && errno == EINTR);
	return n > 0 ? 0 : n ? -errno : -ETIMEDOUT;
}

static int setup(struct tls_session *t, const struct tls_creds *c, const char *hostname)
{
	const char *prio = c->priority, *bad;
	int r = gnutls_init(&t->s, (c->server ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL);
	if (r < 0)
		return r;
	if (prio)
		r = gnutls_priority_set_direct(t->s, prio, &bad);
	else if (c->psk)
		r = gnutls_set_default_priority_append(t->s, "+ECDHE-PSK:+DHE-PSK:+PSK", &bad, 0);
	else
		r = gnutls_set_default_priority(t->s);
	if (r >= 0 && c->x509)
		r = gnutls_credentials_set(t->s, GNUTLS_CRD_CERTIFICATE, c->x509);
	if (r >= 0 && c->psk)
		r = gnutls_credentials_set(t->s, GNUTLS_CRD_PSK, c->server ? (void *)c->psk_server : (void *)c->psk_client);
	if (r < 0)
		return r;
	if (c->server && c->x509)
		gnutls_certificate_server_set_request(t->s, c->verify_peer ? GNUTLS_CERT_REQUIRE : GNUTLS_CERT_IGNORE);
	if (!c->server && hostname)
		gnutls_server_name_set(t->s, GNUTLS_NAME_DNS, hostname, strlen(hostname));
	gnutls_transport_set_ptr(t->s, t);
	gnutls_transport_set_push_function(t->s, push);
	gnutls_transport_set_pull_function(t->s, pull);
	return 0;
}

static uint64_t now_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

static int handshake(struct tls_session *t, unsigned timeout_ms, struct err *err)
{
	uint64_t end = now_ms() + timeout_ms;
	for (unsigned i = 0; i < HANDSHAKE_STEPS; i++) {
		int r = gnutls_handshake(t->s);
		if (r == GNUTLS_E_SUCCESS)
			return 0;
		if (r < 0 && gnutls_error_is_fatal(r))
			return err_set(err, -EPROTO, "TLS handshake failed: %s", gnutls_strerror(r));
		uint64_t now = now_ms();
		r = now < end ? wait_for(t->fd, gnutls_record_get_direction(t->s) ? POLLOUT : POLLIN, (int)(end - now)) : -ETIMEDOUT;
		if (r)
			return err_set_errno(err, r, "TLS handshake");
	}
	return err_set(err, -EPROTO, "TLS handshake failed: too many messages");
}

/* The client's distinguished name, or PSK user. */
static int peer_name(struct tls_session *t, const struct tls_creds *c, char name[1024])
{
	if (c->psk) {
		const char *user = gnutls_psk_server_get_username(t->s);
		if (!user || strlen(user) >= 1024)
			return -EACCES;
		strcpy(name, user);
		return 0;
	}
	unsigned n = 0;
	const gnutls_datum_t *list = gnutls_certificate_get_peers(t->s, &n);
	gnutls_x509_crt_t crt;
	size_t len = 1024;
	if (!n || gnutls_x509_crt_init(&crt) < 0)
		return -EACCES;
	int r = gnutls_x509_crt_import(crt, &list[0], GNUTLS_X509_FMT_DER);
	if (r >= 0)
		r = gnutls_x509_crt_get_dn(crt, name, &len);
	gnutls_x509_crt_deinit(crt);
	return r < 0 ? -EACCES : 0;
}

static int check_peer(struct tls_session *t, const struct tls_creds *c, const char *hostname, const struct tls_authz *authz,
		      struct err *err)
{
	unsigned status = 0;
	char name[1024];
	if (c->x509 && c->verify_peer) {
		if (!c->server && !hostname) /* a certificate for anything would do */
			return err_set(err, -EINVAL, "TLS: no host name to check the certificate against (give tls-hostname)");
		int r = gnutls_certificate_verify_peers3(t->s, c->server ? NULL : hostname, &status);
		if (r < 0)
			return err_set(err, -EACCES, "TLS: cannot verify the peer: %s", gnutls_strerror(r));
		gnutls_datum_t why;
		if (status && gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &why, 0) >= 0) {
			err_set(err, -EACCES, "TLS: %s", (char *)why.data);
			gnutls_free(why.data);
		}
		if (status)
			return err_set(err, -EACCES, "TLS: the peer's certificate is not valid");
	}
	if (!c->server || !authz)
		return 0;
	if (peer_name(t, c, name))
		return err_set(err, -EACCES, "TLS: the client has no name to authorize");
	return tls_authz_allows(authz, name) ? 0 : err_set(err, -EACCES, "TLS authz check for %s is denied", name);
}

int tls_start(struct tls_session **out, const struct tls_creds *c, int fd, const char *hostname, const struct tls_authz *authz,
	      unsigned timeout_ms, struct err *err)
{
	struct tls_session *t = calloc(1, sizeof *t);
	if (!t)
		return err_set(err, -ENOMEM, "out of memory");
	t->fd = fd;
	pthread_mutex_init(&t->lock, NULL);
	int fl = fcntl(fd, F_GETFL), r = setup(t, c, hostname);
	if (fl >= 0)
		fcntl(fd, F_SETFL, fl | O_NONBLOCK);
	r = r < 0 ? err_set(err, -EPROTO, "TLS: %s", gnutls_strerror(r)) : handshake(t, timeout_ms, err);
	if (!r)
		r = check_peer(t, c, hostname, authz, err);
	if (r) {
		tls_free(t);
		return r;
	}
	*out = t;
	return 0;
}

/* What GnuTLS says, as -errno; 0: wait and call again. */
static int map_error(ssize_t n)
{
	if (n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED)
		return 0;
	return n == GNUTLS_E_PREMATURE_TERMINATION ? -ECONNRESET : -EIO;
}

ssize_t tls_recv(struct tls_session *t, void *buf, size_t len, int timeout_ms)
{
	for (;;) {
		pthread_mutex_lock(&t->lock);
		ssize_t n = gnutls_record_recv(t->s, buf, len);
		pthread_mutex_unlock(&t->lock);
		if (n >= 0)
			return n;
		int r = map_error(n);
		if (!r)
			r = wait_for(t->fd, POLLIN, timeout_ms);
		if (r)
			return r;
	}
}

ssize_t tls_send(struct tls_session *t, const void *buf, size_t len, int timeout_ms)
{
	for (;;) {
		pthread_mutex_lock(&t->lock);
		ssize_t n = gnutls_record_send(t->s, buf, len);
		pthread_mutex_unlock(&t->lock);
		if (n >= 0)
			return n;
		int r = map_error(n);
		if (!r)
			r = wait_for(t->fd, POLLOUT, timeout_ms);
		if (r)
			return r;
	}
}

bool tls_pending(struct tls_session *t)
{
	pthread_mutex_lock(&t->lock);
	bool p = gnutls_record_check_pending(t->s);
	pthread_mutex_unlock(&t->lock);
	return p;
}

void tls_free(struct tls_session *t)
{
	if (!t)
		return;
	if (t->s) {
		gnutls_bye(t->s, GNUTLS_SHUT_WR);
		gnutls_deinit(t->s);
	}
	pthread_mutex_destroy(&t->lock);
	free(t);
}
