/* What names and options say about an NBD server. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/nbd.h"
#include "block/nbd_proto.h"

static const struct { const char *prefix; bool tls, unix_socket; } schemes[] = {
	{ "nbd://", false, false }, { "nbd+tcp://", false, false }, { "nbds://", true, false }, { "nbds+tcp://", true, false },
	{ "nbd+unix://", false, true }, { "nbds+unix://", true, true },
};

bool nbd_is_name(const char *file)
{
	for (size_t i = 0; i < ARRAY_SIZE(schemes); i++) {
		if (!strncmp(file, schemes[i].prefix, strlen(schemes[i].prefix)))
			return true;
	}
	return !strncmp(file, "nbd:", 4);
}

void nbd_config_free(struct nbd_config *c)
{
	free(c->host);
	free(c->port);
	free(c->path);
	free(c->export);
	free(c->tls_creds);
	free(c->tls_hostname);
	free(c->bitmap);
	*c = (struct nbd_config){ .fd = -1 };
}

static int hex(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : tolower(c) >= 'a' && tolower(c) <= 'f' ? tolower(c) - 'a' + 10 : -1;
}

/* %41 is A; NULL for a bad escape, a zero byte, or no memory. */
static char *unescape(const char *s, size_t n)
{
	char *out = malloc(n + 1), *d = out;
	for (size_t i = 0; out && i < n; i++) {
		int v = s[i];
		if (s[i] == '%') {
			int a = n - i > 2 ? hex(s[i + 1]) : -1;
			int b = a >= 0 ? hex(s[i + 2]) : -1;
			v = b >= 0 ? a << 4 | b : 0;
			i += 2;
		}
		if (!v) {
			free(out);
			return NULL;
		}
		*d++ = (char)v;
	}
	if (out)
		*d = '\0';
	return out;
}

static char *escape(const char *s)
{
	char *out = malloc(strlen(s) * 3 + 1), *d = out;
	for (; out && *s; s++) {
		if (isalnum((unsigned char)*s) || strchr("-._~/", *s))
			*d++ = *s;
		else
			d += sprintf(d, "%%%02X", (unsigned char)*s);
	}
	if (out)
		*d = '\0';
	return out;
}

static int bad(struct err *err, const char *file, const char *why)
{
	return err_set(err, -EINVAL, "%s: %s", file, why);
}

/* "host:port", "[v6]:port", "host". */
static int authority(struct nbd_config *c, const char *s, size_t n, const char *file, struct err *err)
{
	const char *end = s + n, *host = s, *host_end, *port = NULL;
	const char *at = memchr(s, '@', n);
	if (at)
		host = s = at + 1;
	if (host < end && *host == '[') {
		host_end = memchr(host, ']', (size_t)(end - host));
		if (!host_end)
			return bad(err, file, "']' is missing");
		host++;
		port = host_end + 1;
	} else {
		host_end = memchr(host, ':', (size_t)(end - host));
		host_end = host_end ? host_end : end;
		port = host_end;
	}
	if (port < end && *port != ':')
		return bad(err, file, "the port is missing");
	c->host = host == host_end ? strdup("localhost") : unescape(host, (size_t)(host_end - host));
	c->port = port < end && port + 1 < end ? strndup(port + 1, (size_t)(end - port - 1)) : strdup("10809");
	return c->host && c->port ? 0 : bad(err, file, "bad host name");
}

/* socket=path, and nothing else that we know. */
static int query(struct nbd_config *c, const char *q, const char *file, struct err *err)
{
	while (*q) {
		size_t n = strcspn(q, "&;");
		if (strncmp(q, "socket=", 7) || c->path)
			return bad(err, file, "only socket= is known behind '?', once");
		c->path = unescape(q + 7, n - 7);
		if (!c->path || !*c->path)
			return bad(err, file, "bad socket path");
		q += n + (q[n] != '\0');
	}
	return 0;
}

static int parse_uri(struct nbd_config *c, const char *file, const char *rest, bool unix_socket, struct err *err)
{
	size_t n = strcspn(rest, "/?#"), path_len;
	const char *path = rest + n;
	int r = unix_socket ? (n ? bad(err, file, "a host name has no place in nbd+unix://") : 0) : authority(c, rest, n, file, err);
	if (r)
		return r;
	path += strspn(path, "/");
	path_len = strcspn(path, "?#");
	c->export = unescape(path, path_len);
	if (!c->export)
		return bad(err, file, "bad export name");
	path += path_len;
	if (*path == '?')
		r = query(c, path + 1, file, err);
	if (!r && unix_socket != !!c->path)
		r = bad(err, file, unix_socket ? "'?socket=PATH' is missing" : "socket= belongs to nbd+unix://");
	return r;
}

/* nbd:host:port[:exportname=x] and nbd:unix:path[:exportname=x] */
static int parse_old(struct nbd_config *c, const char *file, struct err *err)
{
	const char *s = file + 4, *name = strstr(s, ":exportname="), *end = name ? name : s + strlen(s);
	c->export = strdup(name ? name + 12 : "");
	if (!strncmp(s, "unix:", 5)) {
		c->path = strndup(s + 5, (size_t)(end - s - 5));
		return c->path && *c->path && c->export ? 0 : bad(err, file, "the socket's path is missing");
	}
	const char *colon = NULL;
	for (const char *p = s; p < end; p++)
		colon = *p == ':' ? p : colon;
	if (!colon || colon == s || colon + 1 == end)
		return bad(err, file, "is not of the form nbd:HOST:PORT[:exportname=NAME] or nbd:unix:PATH");
	const char *host_end = colon;
	if (*s == '[' && host_end[-1] == ']') {
		s++;
		host_end--;
	}
	c->host = strndup(s, (size_t)(host_end - s));
	c->port = strndup(colon + 1, (size_t)(end - colon - 1));
	return c->host && c->port && c->export ? 0 : bad(err, file, "out of memory");
}

static int check(struct nbd_config *c, const char *what, struct err *err)
{
	if (c->export && strlen(c->export) > NBD_NAME_MAX)
		return err_set(err, -EINVAL, "%s: the export's name is longer than %d bytes", what, NBD_NAME_MAX);
	if (c->bitmap && strlen(c->bitmap) > NBD_NAME_MAX)
		return err_set(err, -EINVAL, "%s: x-dirty-bitmap is longer than %d bytes", what, NBD_NAME_MAX);
	return 0;
}

int nbd_config_name(struct nbd_config *c, const char *file, struct err *err)
{
	*c = (struct nbd_config){ .fd = -1 };
	int r = -1;
	for (size_t i = 0; i < ARRAY_SIZE(schemes) && r == -1; i++) {
		size_t n = strlen(schemes[i].prefix);
		if (strncmp(file, schemes[i].prefix, n))
			continue;
		c->tls_uri = schemes[i].tls;
		r = parse_uri(c, file, file + n, schemes[i].unix_socket, err);
		if (r == -1)
			break;
	}
	if (r == -1)
		r = parse_old(c, file, err);
	if (!r)
		r = check(c, file, err);
	if (r)
		nbd_config_free(c);
	return r;
}

/* --- options --- */

static char *copy(const char *s)
{
	return s ? strdup(s) : NULL;
}

static int server_inet(struct nbd_config *c, struct keyvals *l, const char *what, struct err *err)
{
	const char *host = keyvals_get(l, "server.host"), *port = keyvals_get(l, "server.port");
	bool numeric = false;
	int r;
	if (!host || !port)
		return err_set(err, -EINVAL, "%s: server.%s= is missing", what, host ? "port" : "host");
	c->host = strdup(host);
	c->port = strdup(port);
	if ((r = keyvals_bool(l, what, "server.ipv4", &c->ipv4, err)) || (r = keyvals_bool(l, what, "server.ipv6", &c->ipv6, err)) ||
	    (r = keyvals_bool(l, what, "server.numeric", &numeric, err)) ||
	    (r = keyvals_bool(l, what, "server.keep-alive", &c->keep_alive, err)))
		return r;
	return c->host && c->port ? 0 : err_set(err, -ENOMEM, "out of memory");
}

static int server_keys(struct nbd_config *c, struct keyvals *l, const char *what, struct err *err)
{
	const char *type = keyvals_get(l, "server.type"), *path = keyvals_get(l, "server.path"), *str = keyvals_get(l, "server.str");
	uint64_t fd;
	if (!type)
		return err_set(err, -EINVAL, "%s: server.type= is missing (inet, unix, fd), or host= and port=, or path=", what);
	if (!strcmp(type, "inet"))
		return server_inet(c, l, what, err);
	if (!strcmp(type, "unix")) {
		c->path = copy(path);
		return c->path ? 0 : err_set(err, -EINVAL, "%s: server.path= is missing", what);
	}
	if (strcmp(type, "fd"))
		return err_set(err, -ENOTSUP, "%s: server.type=%s is not supported (inet, unix, fd)", what, type);
	if (!str || parse_u64(str, &fd) || fd > INT32_MAX)
		return err_set(err, -EINVAL, "%s: server.str= is no number of a descriptor", what);
	c->fd = (int)fd;
	return 0;
}

/* The short form: host=, port=, path=. */
static int short_keys(struct nbd_config *c, const char *host, const char *port, const char *path, const char *what, struct err *err)
{
	if (host && path)
		return err_set(err, -EINVAL, "%s: path and host may not be used at the same time", what);
	if (port && !host)
		return err_set(err, -EINVAL, "%s: port may not be used without host", what);
	c->path = copy(path);
	c->host = copy(host);
	c->port = host ? strdup(port ? port : "10809") : NULL;
	return (path && !c->path) || (host && (!c->host || !c->port)) ? err_set(err, -ENOMEM, "out of memory") : 0;
}

int nbd_config_keys(struct nbd_config *c, struct keyvals *l, const char *what, struct err *err)
{
	const char *host = keyvals_get(l, "host"), *port = keyvals_get(l, "port"), *path = keyvals_get(l, "path");
	const char *name = keyvals_get(l, "export");
	uint64_t delay = 0, timeout = 0;
	*c = (struct nbd_config){ .fd = -1 };
	c->export = strdup(name ? name : "");
	c->tls_creds = copy(keyvals_get(l, "tls-creds"));
	c->tls_hostname = copy(keyvals_get(l, "tls-hostname"));
	c->bitmap = copy(keyvals_get(l, "x-dirty-bitmap"));
	int r = host || port || path ? short_keys(c, host, port, path, what, err) : server_keys(c, l, what, err);
	if (!r)
		r = keyvals_u64(l, what, "reconnect-delay", 0, 1u << 30, &delay, err);
	if (!r)
		r = keyvals_u64(l, what, "open-timeout", 0, 1u << 30, &timeout, err);
	c->reconnect_delay = (unsigned)delay;
	c->open_timeout = (unsigned)timeout;
	if (!r)
		r = check(c, what, err);
	if (r)
		nbd_config_free(c);
	return r;
}

char *nbd_config_text(const struct nbd_config *c)
{
	char *out = NULL, *name = escape(c->export ? c->export : ""), *path = c->path ? strdup(c->path) : NULL;
	const char *s = c->tls_uri ? "s" : "", *slash = name && *name ? "/" : "";
	bool v6 = c->host && strchr(c->host, ':');
	int n = -1;
	if (name && path)
		n = asprintf(&out, "nbd%s+unix://%s%s?socket=%s", s, slash, name, path);
	else if (name && c->host)
		n = asprintf(&out, "nbd%s://%s%s%s:%s%s%s", s, v6 ? "[" : "", c->host, v6 ? "]" : "", c->port, slash, name);
	else if (name)
		n = asprintf(&out, "nbd (descriptor %d)%s%s", c->fd, slash, name);
	free(name);
	free(path);
	return n < 0 ? NULL : out;
}
