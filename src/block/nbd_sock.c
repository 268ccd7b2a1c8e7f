/* Sockets of both ends: connecting within a time, listening. */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/nbd.h"
#include "block/nbd_proto.h"

/* connect() that gives up; the socket is blocking again afterwards. */
static int connect_within(int fd, const struct sockaddr *a, socklen_t len, unsigned timeout_ms)
{
	int fl = fcntl(fd, F_GETFL), e = 0, r = 0;
	socklen_t n = sizeof e;
	fcntl(fd, F_SETFL, fl | O_NONBLOCK);
	/* A Unix socket whose queue is full says EAGAIN and cannot be waited for. */
	uint64_t end = nbd_now_ms() + timeout_ms;
	while (connect(fd, a, len)) {
		if (errno == EAGAIN && nbd_now_ms() < end) {
			poll(NULL, 0, 10);
			continue;
		}
		r = -errno;
		break;
	}
	if (r == -EINPROGRESS) {
		struct pollfd p = { fd, POLLOUT, 0 };
		int k;
		do
			k = poll(&p, 1, (int)timeout_ms);
		while (k < 0 && errno == EINTR);
		r = k > 0 ? 0 : k ? -errno : -ETIMEDOUT;
		if (!r && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &n))
			r = -e;
	}
	fcntl(fd, F_SETFL, fl);
	return r;
}

static int unix_address(struct sockaddr_un *a, socklen_t *len, const char *path, struct err *err)
{
	size_t n = strlen(path);
	*a = (struct sockaddr_un){ .sun_family = AF_UNIX };
	if (n >= sizeof a->sun_path)
		return err_set(err, -ENAMETOOLONG, "UNIX socket path '%s' is too long: it must be less than %zu bytes", path, sizeof a->sun_path);
	memcpy(a->sun_path, path, n);
	*len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + 1);
	return 0;
}

static int connect_unix(const struct nbd_config *c, unsigned timeout_ms, struct err *err)
{
	struct sockaddr_un a;
	socklen_t len;
	int r = unix_address(&a, &len, c->path, err);
	if (r)
		return r;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	r = fd < 0 ? -errno : connect_within(fd, (struct sockaddr *)&a, len, timeout_ms);
	if (!r)
		return fd;
	if (fd >= 0)
		close(fd);
	return err_set_errno(err, r, "Failed to connect to '%s'", c->path);
}

static int family(const struct nbd_config *c)
{
	return c->ipv4 == c->ipv6 ? AF_UNSPEC : c->ipv4 ? AF_INET : AF_INET6;
}

static int connect_tcp(const struct nbd_config *c, unsigned timeout_ms, struct err *err)
{
	struct addrinfo hint = { .ai_family = family(c), .ai_socktype = SOCK_STREAM }, *list = NULL;
	int r = parse_port_ok(c->port) ? getaddrinfo(c->host, c->port, &hint, &list) : EAI_SERVICE, fd = -1, one = 1;
	if (r)
		return err_set(err, -EHOSTUNREACH, "address resolution failed for %s:%s: %s", c->host, c->port, gai_strerror(r));
	r = -EHOSTUNREACH;
	for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
		fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
		r = fd < 0 ? -errno : connect_within(fd, a->ai_addr, a->ai_addrlen, timeout_ms);
		if (r && fd >= 0) {
			close(fd);
			fd = -1;
		}
	}
	freeaddrinfo(list);
	if (fd < 0)
		return err_set_errno(err, r, "Failed to connect to '%s:%s'", c->host, c->port);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	/* Always: a server's host that vanished must not hang a request for ever. */
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
	return fd;
}

int nbd_connect(const struct nbd_config *c, unsigned timeout_ms, struct err *err)
{
	if (c->path)
		return connect_unix(c, timeout_ms, err);
	if (c->host)
		return connect_tcp(c, timeout_ms, err);
	int fd = fcntl(c->fd, F_DUPFD_CLOEXEC, 3);
	return fd < 0 ? err_set_errno(err, -errno, "descriptor %d", c->fd) : fd;
}

/* What a server that died left behind: nobody answers there. */
static void remove_stale(const struct sockaddr_un *a, socklen_t len)
{
	struct stat st;
	if (lstat(a->sun_path, &st) || !S_ISSOCK(st.st_mode))
		return;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd >= 0 && connect(fd, (const struct sockaddr *)a, len) && errno == ECONNREFUSED)
		unlink(a->sun_path);
	if (fd >= 0)
		close(fd);
}

int nbd_listen_unix(const char *path, struct err *err)
{
	struct sockaddr_un a;
	socklen_t len;
	int r = unix_address(&a, &len, path, err);
	if (r)
		return r;
	remove_stale(&a, len);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&a, len) || listen(fd, 128)) {
		r = -errno;
		if (fd >= 0)
			close(fd);
		return err_set_errno(err, r, "Failed to bind socket to %s", path);
	}
	return fd;
}

static int listen_one(const struct addrinfo *a)
{
	int one = 1, fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (a->ai_family == AF_INET6)
		setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
	if (!bind(fd, a->ai_addr, a->ai_addrlen) && !listen(fd, 128))
		return fd;
	int r = -errno;
	close(fd);
	return r;
}

int nbd_listen_tcp(const char *host, const char *port, int *fds, int max, struct err *err)
{
	struct addrinfo hint = { .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE }, *list = NULL;
	int r = parse_port_ok(port) ? getaddrinfo(host && *host ? host : NULL, port, &hint, &list) : EAI_SERVICE, n = 0;
	if (r)
		return err_set(err, -EINVAL, "address resolution failed for %s:%s: %s", host ? host : "", port, gai_strerror(r));
	for (struct addrinfo *a = list; a && n < max; a = a->ai_next) {
		int fd = listen_one(a);
		if (fd >= 0)
			fds[n++] = fd;
		else
			r = fd;
	}
	freeaddrinfo(list);
	return n ? n : err_set_errno(err, r ? r : -EADDRNOTAVAIL, "Failed to find an available port: %s:%s", host ? host : "", port);
}
