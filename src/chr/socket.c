/* Unix and TCP stream sockets, as server (one peer at a time) or client (with reconnect). */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/parse.h"
#include "base/log.h"
#include "chr/internal.h"

struct chr_addr {
	struct sockaddr_storage sa;
	socklen_t len;
	bool nodelay;
};

static int unix_addr(struct chr_addr *a, const char *path, bool abstract, struct err *err)
{
	struct sockaddr_un *un = (struct sockaddr_un *)&a->sa;
	if (strlen(path) + 1 >= sizeof un->sun_path)
		return err_set(err, -ENAMETOOLONG, "-chardev socket: path '%s' is longer than the %zu bytes a socket may have", path,
			       sizeof un->sun_path - 2);
	un->sun_family = AF_UNIX;
	memcpy(un->sun_path + abstract, path, strlen(path));
	a->len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path) + 1);
	return 0;
}

static int inet_addr_of(struct chr_addr *a, const char *host, const char *port, bool server, struct err *err)
{
	struct addrinfo hint = { .ai_socktype = SOCK_STREAM, .ai_flags = server ? AI_PASSIVE : 0 }, *res;
	int r = parse_port_ok(port) ? getaddrinfo(host && *host ? host : NULL, port, &hint, &res) : EAI_SERVICE;
	if (r)
		return err_set(err, -EINVAL, "-chardev socket: %s:%s: %s", host ? host : "", port, gai_strerror(r));
	memcpy(&a->sa, res->ai_addr, res->ai_addrlen);
	a->len = res->ai_addrlen;
	freeaddrinfo(res);
	return 0;
}

static void set_label(struct chardev *c, bool server)
{
	char host[64] = "";
	const struct sockaddr_storage *sa = &c->addr->sa;
	const char *tail = server ? ",server=on" : "";
	if (sa->ss_family == AF_UNIX) {
		const struct sockaddr_un *un = (const void *)sa;
		snprintf(c->label, sizeof c->label, "unix:%s%s%s", un->sun_path[0] ? "" : "@", un->sun_path + !un->sun_path[0], tail);
		return;
	}
	unsigned port = 0;
	if (sa->ss_family == AF_INET) {
		port = ntohs(((const struct sockaddr_in *)sa)->sin_port);
		inet_ntop(AF_INET, &((const struct sockaddr_in *)sa)->sin_addr, host, sizeof host);
	} else {
		port = ntohs(((const struct sockaddr_in6 *)sa)->sin6_port);
		inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)sa)->sin6_addr, host, sizeof host);
	}
	snprintf(c->label, sizeof c->label, "tcp:%s:%u%s", host, port, tail);
}

static int take_peer(struct chardev *c, int fd, struct err *err)
{
	int one = 1;
	fcntl(fd, F_SETFL, O_NONBLOCK);
	if (c->addr->sa.ss_family != AF_UNIX && c->addr->nodelay)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	return chr_connect(c, fd, fd, err);
}

static void on_listen(void *opaque, int fd, unsigned events)
{
	struct chardev *c = opaque;
	int peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
	if (peer < 0)
		return;
	if (c->rfd >= 0) {
		close(peer); /* taken */
		return;
	}
	if (c->lwatch)
		loop_watch_set(c->lwatch, 0); /* the next one waits in the backlog */
	take_peer(c, peer, NULL);
}

static int try_connect(struct chardev *c)
{
	int fd = socket(c->addr->sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (connect(fd, (struct sockaddr *)&c->addr->sa, c->addr->len)) {
		int r = -errno;
		close(fd);
		return r;
	}
	return fd;
}

static void retry(void *opaque)
{
	struct chardev *c = opaque;
	int fd = try_connect(c);
	if (fd >= 0)
		take_peer(c, fd, NULL);
	else
		timer_arm(&c->retry, clock_now(clock_host(c->env.loop)) + c->retry_ns);
}

static void socket_hangup(struct chardev *c)
{
	chr_disconnect(c);
	if (c->lwatch)
		loop_watch_set(c->lwatch, LOOP_IN);
	else if (c->retry_ns)
		timer_arm(&c->retry, clock_now(clock_host(c->env.loop)) + c->retry_ns);
}

static int start_server(struct chardev *c, bool wait, struct err *err)
{
	int one = 1;
	bool is_unix = c->addr->sa.ss_family == AF_UNIX;
	const struct sockaddr_un *un = (const void *)&c->addr->sa;
	int fd = socket(c->addr->sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return err_set_errno(err, -errno, "-chardev socket");
	c->listen_fd = fd;
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (is_unix && un->sun_path[0]) {
		int probe = try_connect(c);
		if (probe >= 0) {
			close(probe);
			return err_set(err, -EADDRINUSE, "-chardev socket: %s: another program listens there", un->sun_path);
		}
		if (probe == -ECONNREFUSED)
			unlink(un->sun_path); /* left behind by a program that is gone */
	}
	if (bind(fd, (struct sockaddr *)&c->addr->sa, c->addr->len) || listen(fd, 1))
		return err_set_errno(err, -errno, "-chardev socket: cannot listen on %s", c->label);
	if (is_unix && un->sun_path[0])
		c->unix_path = strdup(un->sun_path);
	socklen_t len = sizeof c->addr->sa;
	getsockname(fd, (struct sockaddr *)&c->addr->sa, &len); /* port 0: which one it became */
	set_label(c, true);
	if (wait) {
		log_warn("waiting for a connection on %s (wait=off does not)", c->label);
		int peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
		if (peer < 0)
			return err_set_errno(err, -errno, "-chardev socket: %s", c->label);
		int r = take_peer(c, peer, err);
		if (r)
			return r;
	}
	fcntl(fd, F_SETFL, O_NONBLOCK);
	c->lwatch = loop_watch_fd(c->env.loop, fd, wait ? 0 : LOOP_IN, on_listen, c);
	return c->lwatch ? 0 : err_set(err, -ENOMEM, "-chardev socket: out of memory");
}

static int start_client(struct chardev *c, struct err *err)
{
	int fd = try_connect(c);
	if (fd >= 0)
		return take_peer(c, fd, err);
	if (!c->retry_ns)
		return err_set_errno(err, fd, "-chardev socket: cannot connect to %s", c->label);
	timer_arm(&c->retry, clock_now(clock_host(c->env.loop)) + c->retry_ns);
	return 0;
}

static int refuse_unsupported(struct optlist *o, struct err *err)
{
	static const char *const off_only[] = { "telnet", "websocket", "tn3270" };
	for (int i = 0; i < 3; i++) {
		bool on = false;
		int r = optlist_bool(o, off_only[i], &on, err);
		if (r)
			return r;
		if (on)
			return err_set(err, -ENOTSUP, "-chardev socket: %s=on is not supported yet", off_only[i]);
	}
	if (optlist_get(o, "tls-creds") || optlist_get(o, "fd"))
		return err_set(err, -ENOTSUP, "-chardev socket: tls-creds= and fd= are not supported yet");
	return 0;
}

static int socket_open(struct chardev *c, struct optlist *o, struct err *err)
{
	const char *path = optlist_get(o, "path"), *host = optlist_get(o, "host"), *port = optlist_get(o, "port");
	bool server = false, wait = true, nodelay = false, abstract = false;
	uint64_t reconnect = 0;
	int r = refuse_unsupported(o, err);
	if (!r)
		r = optlist_bool(o, "server", &server, err);
	if (!r)
		r = optlist_bool(o, "wait", &wait, err);
	if (!r)
		r = optlist_bool(o, "nodelay", &nodelay, err);
	if (!r)
		r = optlist_bool(o, "abstract", &abstract, err);
	if (!r)
		r = optlist_u64(o, "reconnect", 86400, &reconnect, err);
	if (optlist_get(o, "nowait"))
		wait = false;
	if (!r && !path == !port)
		r = err_set(err, -EINVAL, "-chardev socket: give either path= or host= and port=");
	if (!r && server && reconnect)
		r = err_set(err, -EINVAL, "-chardev socket: reconnect= is for clients (server=off)");
	if (r)
		return r;
	c->addr = calloc(1, sizeof *c->addr);
	if (!c->addr)
		return err_set(err, -ENOMEM, "-chardev socket: out of memory");
	c->addr->nodelay = nodelay;
	c->own_fds = c->is_socket = true;
	c->retry_ns = reconnect * 1000000000u;
	timer_init(&c->retry, clock_host(c->env.loop), retry, c);
	r = path ? unix_addr(c->addr, path, abstract, err) : inet_addr_of(c->addr, host, port, server, err);
	if (r)
		return r;
	set_label(c, server);
	return server ? start_server(c, wait, err) : start_client(c, err);
}

static void socket_close(struct chardev *c)
{
	timer_stop(&c->retry);
	loop_unwatch(c->lwatch);
	if (c->listen_fd >= 0)
		close(c->listen_fd);
	if (c->unix_path)
		unlink(c->unix_path);
	free(c->addr);
}

const struct chr_kind chr_socket = {
	.name = "socket",
	.options = (const char *const[]){ "id", "mux", "path", "host", "port", "server", "wait", "reconnect", "nodelay", "abstract",
					  "telnet", NULL },
	.open = socket_open, .close = socket_close, .hangup = socket_hangup,
};
