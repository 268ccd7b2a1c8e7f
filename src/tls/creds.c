/* Credentials from the files that QEMU's tls-creds-x509 and tls-creds-psk read, and the store of objects. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tls/private.h"

enum { FILE_MAX = 1 << 20 };

char *tls_read_file(const char *path, size_t *len)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY), e;
	char *s = NULL;
	ssize_t n = -1;
	if (fd < 0)
		return NULL;
	if (!fstat(fd, &st) && st.st_size < FILE_MAX && (s = malloc((size_t)st.st_size + 1)))
		n = read(fd, s, (size_t)st.st_size);
	e = s ? errno : EFBIG;
	close(fd);
	if (n < 0) {
		free(s);
		errno = e;
		return NULL;
	}
	s[n] = '\0';
	if (len)
		*len = (size_t)n;
	return s;
}

/* "dir/name"; NULL when there is no such file or no memory. */
static char *file_in(const char *dir, const char *name)
{
	char *p;
	if (asprintf(&p, "%s/%s", dir, name) < 0)
		return NULL;
	if (!access(p, R_OK))
		return p;
	free(p);
	return NULL;
}

static int tls_error(struct err *err, int r, const char *file)
{
	return err_set(err, -EINVAL, "TLS: %s: %s", file, gnutls_strerror(r));
}

static int need(struct err *err, const char *dir, const char *name)
{
	return err_set(err, -ENOENT, "TLS: %s/%s is missing or cannot be read", dir, name);
}

static int load_trust(struct tls_creds *c, const char *dir, struct err *err)
{
	char *ca = file_in(dir, "ca-cert.pem"), *crl = file_in(dir, "ca-crl.pem");
	int r = ca ? gnutls_certificate_set_x509_trust_file(c->x509, ca, GNUTLS_X509_FMT_PEM) : 0, ret = 0;
	if (ca && r < 0)
		ret = tls_error(err, r, ca);
	else if (!ca && (c->verify_peer || !c->server))
		ret = need(err, dir, "ca-cert.pem");
	r = crl && !ret ? gnutls_certificate_set_x509_crl_file(c->x509, crl, GNUTLS_X509_FMT_PEM) : 0;
	if (r < 0)
		ret = tls_error(err, r, crl);
	free(ca);
	free(crl);
	return ret;
}

static int load_dh(struct tls_creds *c, const char *dir, struct err *err)
{
	char *path = file_in(dir, "dh-params.pem");
	size_t len;
	char *text = path ? tls_read_file(path, &len) : NULL;
	int r = 0;
	if (text) {
		gnutls_datum_t d = { (unsigned char *)text, (unsigned)len };
		r = gnutls_dh_params_init(&c->dh);
		if (r >= 0)
			r = gnutls_dh_params_import_pkcs3(c->dh, &d, GNUTLS_X509_FMT_PEM);
		if (r >= 0 && c->x509)
			gnutls_certificate_set_dh_params(c->x509, c->dh);
		if (r < 0)
			tls_error(err, r, path);
	}
	free(text);
	free(path);
	return r < 0 ? -EINVAL : 0;
}

static int load_x509(struct tls_creds *c, const char *dir, const char *password, struct err *err)
{
	const char *side = c->server ? "server" : "client";
	char cert[32], key[32];
	int r = gnutls_certificate_allocate_credentials(&c->x509);
	if (r < 0)
		return tls_error(err, r, dir);
	r = load_trust(c, dir, err);
	if (!r && c->server)
		r = load_dh(c, dir, err);
	if (r)
		return r;
	snprintf(cert, sizeof cert, "%s-cert.pem", side);
	snprintf(key, sizeof key, "%s-key.pem", side);
	char *pc = file_in(dir, cert), *pk = file_in(dir, key);
	if (pc && pk) {
		r = gnutls_certificate_set_x509_key_file2(c->x509, pc, pk, GNUTLS_X509_FMT_PEM, password, 0);
		r = r < 0 ? tls_error(err, r, pc) : 0;
	} else if (c->server || pc || pk) {
		r = need(err, dir, pc ? key : cert);
	}
	free(pc);
	free(pk);
	return r;
}

/* keys.psk holds lines "user:hex". */
static int psk_client_key(struct tls_creds *c, const char *file, const char *user, struct err *err)
{
	char *text = tls_read_file(file, NULL);
	size_t n = strlen(user);
	int r = -ENOENT;
	if (!text)
		return err_set_errno(err, -errno, "TLS: %s", file);
	for (char *save = NULL, *line = strtok_r(text, "\r\n", &save); line; line = strtok_r(NULL, "\r\n", &save)) {
		if (strncmp(line, user, n) || line[n] != ':')
			continue;
		gnutls_datum_t key = { (unsigned char *)line + n + 1, (unsigned)strlen(line + n + 1) };
		r = gnutls_psk_set_client_credentials(c->psk_client, user, &key, GNUTLS_PSK_KEY_HEX);
		r = r < 0 ? tls_error(err, r, file) : 0;
		break;
	}
	free(text);
	return r == -ENOENT ? err_set(err, r, "TLS: %s has no key of user '%s'", file, user) : r;
}

static int load_psk(struct tls_creds *c, const char *dir, const char *user, struct err *err)
{
	char *keys = file_in(dir, "keys.psk");
	int r;
	if (!keys)
		return need(err, dir, "keys.psk");
	if (c->server) {
		r = gnutls_psk_allocate_server_credentials(&c->psk_server);
		if (r >= 0)
			r = gnutls_psk_set_server_credentials_file(c->psk_server, keys);
		r = r < 0 ? tls_error(err, r, keys) : load_dh(c, dir, err);
	} else {
		r = gnutls_psk_allocate_client_credentials(&c->psk_client);
		r = r < 0 ? tls_error(err, r, keys) : psk_client_key(c, keys, user ? user : "qemu", err);
	}
	free(keys);
	return r;
}

static const char *find_secret(const struct tls_store *s, const char *id)
{
	for (unsigned i = 0; id && i < s->n; i++) {
		if (s->v[i].secret && !strcmp(s->v[i].id, id))
			return s->v[i].secret;
	}
	return NULL;
}

int tls_creds_new(struct tls_creds **out, const struct tls_store *s, const char *type, struct keyvals *l, struct err *err)
{
	const char *dir = keyvals_get(l, "dir"), *side = keyvals_get(l, "endpoint"), *prio = keyvals_get(l, "priority");
	const char *user = keyvals_get(l, "username"), *pass = keyvals_get(l, "passwordid"), *secret = find_secret(s, pass);
	struct tls_creds *c = calloc(1, sizeof *c);
	bool sanity = true;
	int r = c ? 0 : err_set(err, -ENOMEM, "out of memory");
	if (r)
		return r;
	c->verify_peer = true;
	c->psk = !strcmp(type, "tls-creds-psk");
	c->server = side && !strcmp(side, "server");
	r = keyvals_bool(l, type, "verify-peer", &c->verify_peer, err);
	if (!r)
		r = keyvals_bool(l, type, "sanity-check", &sanity, err);
	if (!r && side && !c->server && strcmp(side, "client"))
		r = err_set(err, -EINVAL, "-object %s: endpoint=%s is neither client nor server", type, side);
	if (!r && !dir)
		r = err_set(err, -EINVAL, "-object %s: dir= is missing", type);
	if (!r && pass && !secret)
		r = err_set(err, -ENOENT, "-object %s: passwordid=%s names no secret", type, pass);
	if (!r && prio && !(c->priority = strdup(prio)))
		r = err_set(err, -ENOMEM, "out of memory");
	if (!r)
		r = c->psk ? load_psk(c, dir, user, err) : load_x509(c, dir, secret, err);
	if (r) {
		tls_creds_free(c);
		return r;
	}
	*out = c;
	return 0;
}

void tls_creds_free(struct tls_creds *c)
{
	if (!c)
		return;
	if (c->x509)
		gnutls_certificate_free_credentials(c->x509);
	if (c->psk_server)
		gnutls_psk_free_server_credentials(c->psk_server);
	if (c->psk_client)
		gnutls_psk_free_client_credentials(c->psk_client);
	if (c->dh)
		gnutls_dh_params_deinit(c->dh);
	free(c->priority);
	free(c);
}

/* --- the store --- */

bool tls_is_object(const char *type)
{
	static const char *const types[] = { "tls-creds-x509", "tls-creds-psk", "authz-simple", "authz-list", "authz-list-file", "secret" };
	for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
		if (!strcmp(type, types[i]))
			return true;
	}
	return false;
}

static int read_secret(char **out, struct keyvals *l, struct err *err)
{
	const char *data = keyvals_get(l, "data"), *file = keyvals_get(l, "file");
	int r = keyvals_only(l, "-object secret", "format", "raw", err);
	if (r)
		return r;
	if (!data == !file)
		return err_set(err, -EINVAL, "-object secret: give data= or file=");
	*out = data ? strdup(data) : tls_read_file(file, NULL);
	return *out ? 0 : err_set_errno(err, -errno, "-object secret: %s", file ? file : "data");
}

int tls_store_add(struct tls_store *s, struct keyvals *l, struct err *err)
{
	const char *type = keyvals_get(l, "qom-type"), *id = keyvals_get(l, "id");
	struct tls_object o = { 0 }, *v;
	int r;
	if (!type || !id)
		return err_set(err, -EINVAL, "-object: %s is missing", type ? "id=" : "the type");
	if (!strcmp(type, "secret"))
		r = read_secret(&o.secret, l, err);
	else if (!strncmp(type, "tls-creds-", 10))
		r = tls_creds_new(&o.creds, s, type, l, err);
	else
		r = tls_authz_new(&o.authz, type, l, err);
	if (!r)
		r = keyvals_end(l, "-object", err);
	o.id = strdup(id);
	v = realloc(s->v, (s->n + 1) * sizeof *v);
	if (v)
		s->v = v;
	if (!r && (!v || !o.id))
		r = err_set(err, -ENOMEM, "out of memory");
	if (!r) {
		v[s->n++] = o;
		return 0;
	}
	tls_creds_free(o.creds);
	tls_authz_free(o.authz);
	free(o.secret);
	free(o.id);
	return r;
}

void tls_store_free(struct tls_store *s)
{
	for (unsigned i = 0; i < s->n; i++) {
		tls_creds_free(s->v[i].creds);
		tls_authz_free(s->v[i].authz);
		free(s->v[i].secret);
		free(s->v[i].id);
	}
	free(s->v);
	*s = (struct tls_store){ 0 };
}

int tls_find_creds(const struct tls_store *s, const char *id, bool server, const struct tls_creds **out, struct err *err)
{
	for (unsigned i = 0; s && i < s->n; i++) {
		if (strcmp(s->v[i].id, id))
			continue;
		if (!s->v[i].creds)
			return err_set(err, -EINVAL, "Object with id '%s' is not TLS credentials", id);
		if (s->v[i].creds->server != server)
			return err_set(err, -EINVAL, "Expecting TLS credentials with a %s endpoint", server ? "server" : "client");
		*out = s->v[i].creds;
		return 0;
	}
	return err_set(err, -ENOENT, "No TLS credentials with id '%s'", id);
}

int tls_find_authz(const struct tls_store *s, const char *id, const struct tls_authz **out, struct err *err)
{
	for (unsigned i = 0; s && i < s->n; i++) {
		if (s->v[i].authz && !strcmp(s->v[i].id, id)) {
			*out = s->v[i].authz;
			return 0;
		}
	}
	return err_set(err, -ENOENT, "No authz object with id '%s'", id);
}
