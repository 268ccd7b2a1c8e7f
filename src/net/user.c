/*
 * libslirp on our loop. slirp wants poll(): before sleeping it says which descriptors matter, after
 * waking it is told which are ready. Here each of them has a watch; what becomes ready in one round
 * is collected and handed over in one go at its end, and the list is taken anew. slirp is not
 * thread-safe: frames from the guest are queued and entered on the loop's thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "net/user.h"

static void schedule(struct user *u);

/* --- descriptors --- */

static void fd_ready(void *opaque, int fd, unsigned events)
{
	struct user_fd *f = opaque;
	f->revents |= (events & LOOP_IN ? SLIRP_POLL_IN : 0) | (events & LOOP_OUT ? SLIRP_POLL_OUT : 0) |
		      (events & LOOP_HUP ? SLIRP_POLL_HUP | SLIRP_POLL_ERR : 0);
	schedule(f->u);
}

static struct user_fd *find_fd(struct user *u, int fd)
{
	for (unsigned i = 0; i < u->nfd; i++) {
		if (u->fd[i]->fd == fd)
			return u->fd[i];
	}
	return NULL;
}

static struct user_fd *new_fd(struct user *u, int fd)
{
	if (u->nfd == u->fdcap) {
		unsigned cap = u->fdcap ? u->fdcap * 2 : 16;
		struct user_fd **p = realloc(u->fd, cap * sizeof(struct user_fd *));
		if (!p)
			return NULL;
		u->fd = p;
		u->fdcap = cap;
	}
	struct user_fd *f = calloc(1, sizeof *f);
	if (!f)
		return NULL;
	*f = (struct user_fd){ .fd = fd, .u = u };
	f->watch = loop_watch_fd(u->n.loop, fd, 0, fd_ready, f);
	if (!f->watch) {
		free(f);
		return NULL;
	}
	u->fd[u->nfd++] = f;
	return f;
}

static void drop_fd(struct user *u, unsigned i)
{
	loop_unwatch(u->fd[i]->watch);
	free(u->fd[i]);
	u->fd[i] = u->fd[--u->nfd];
}

/* slirp's index of a descriptor is the descriptor. */
static int add_poll(int fd, int events, void *opaque)
{
	struct user *u = opaque;
	struct user_fd *f = find_fd(u, fd);
	if (!f)
		f = new_fd(u, fd);
	if (f) {
		f->events |= events;
		f->seen = true;
	}
	return fd;
}

static int get_revents(int idx, void *opaque)
{
	struct user_fd *f = find_fd(opaque, idx);
	return f ? f->revents & (f->events | SLIRP_POLL_HUP | SLIRP_POLL_ERR) : 0;
}

/* Ask slirp what it waits for, and make the watches and the timer agree. */
static void rearm(struct user *u)
{
	uint32_t ms = UINT32_MAX;
	for (unsigned i = 0; i < u->nfd; i++) {
		u->fd[i]->seen = false;
		u->fd[i]->events = u->fd[i]->revents = 0;
	}
	u->lib->slirp_pollfds_fill(u->slirp, &ms, add_poll, u);
	for (unsigned i = 0; i < u->nfd;) {
		struct user_fd *f = u->fd[i];
		if (!f->seen) {
			drop_fd(u, i);
			continue;
		}
		loop_watch_set(f->watch, (f->events & SLIRP_POLL_IN ? LOOP_IN : 0) | (f->events & SLIRP_POLL_OUT ? LOOP_OUT : 0));
		i++;
	}
	if (ms == UINT32_MAX)
		timer_stop(&u->timeout);
	else
		timer_arm(&u->timeout, clock_now(clock_host(u->n.loop)) + ms * 1000000ull);
}

static void process(void *opaque)
{
	struct user *u = opaque;
	struct net_frame *f;
	__atomic_store_n(&u->process_posted, false, __ATOMIC_SEQ_CST);
	if (u->closing)
		return;
	for (;;) {
		pthread_mutex_lock(&u->lock);
		f = queue_take(&u->tx);
		pthread_mutex_unlock(&u->lock);
		if (!f)
			break;
		u->lib->slirp_input(u->slirp, f->data, (int)f->len);
		free(f);
	}
	u->lib->slirp_pollfds_poll(u->slirp, 0, get_revents, u);
	rearm(u);
	net_sendable(&u->n);
}

static void schedule(struct user *u)
{
	if (!__atomic_exchange_n(&u->process_posted, true, __ATOMIC_SEQ_CST))
		loop_post(u->n.loop, process, u);
}

static void timed_out(void *opaque)
{
	schedule(opaque);
}

/* --- what slirp calls --- */

static ssize_t cb_send(const void *buf, size_t len, void *opaque)
{
	struct user *u = opaque;
	if (!u->closing)
		net_deliver(&u->n, buf, len);
	return (ssize_t)len;
}

static void cb_guest_error(const char *msg, void *opaque)
{
	log_guest("netdev user: %s", msg);
}

static int64_t cb_clock(void *opaque)
{
	return (int64_t)clock_now(clock_host(((struct user *)opaque)->n.loop));
}

static void timer_fired(void *opaque)
{
	struct user_timer *t = opaque;
	struct user *u = t->u;
	t->cb(t->opaque);
	schedule(u);
}

static void *cb_timer_new(SlirpTimerCb cb, void *cb_opaque, void *opaque)
{
	struct user *u = opaque;
	struct user_timer *t = calloc(1, sizeof *t);
	if (!t)
		return NULL;
	t->cb = cb;
	t->opaque = cb_opaque;
	t->u = u;
	timer_init(&t->t, clock_host(u->n.loop), timer_fired, t);
	return t;
}

static void cb_timer_free(void *timer, void *opaque)
{
	struct user_timer *t = timer;
	if (!t)
		return;
	timer_stop(&t->t);
	free(t);
}

static void cb_timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
	struct user_timer *t = timer;
	if (t)
		timer_arm(&t->t, expire_ms > 0 ? (uint64_t)expire_ms * 1000000 : 0);
}

static void cb_register(int fd, void *opaque)
{
}

/* About to be closed: its number may come back as another socket. */
static void cb_unregister(int fd, void *opaque)
{
	struct user *u = opaque;
	for (unsigned i = 0; i < u->nfd; i++) {
		if (u->fd[i]->fd == fd) {
			drop_fd(u, i);
			return;
		}
	}
}

static void cb_notify(void *opaque)
{
	struct user *u = opaque;
	for (struct guestfwd *g = u->fwds; g; g = g->next) {
		if (g->watch)
			loop_watch_set(g->watch, LOOP_IN);
	}
	schedule(u);
}

static const SlirpCb callbacks = {
	.send_packet = cb_send, .guest_error = cb_guest_error, .clock_get_ns = cb_clock, .timer_new = cb_timer_new,
	.timer_free = cb_timer_free, .timer_mod = cb_timer_mod, .register_poll_fd = cb_register,
	.unregister_poll_fd = cb_unregister, .notify = cb_notify,
};

/* --- guestfwd to a host connection --- */

static ssize_t guestfwd_write(const void *buf, size_t len, void *opaque)
{
	struct guestfwd *g = opaque;
	return send(g->fd, buf, len, MSG_NOSIGNAL);
}

static void guestfwd_ready(void *opaque, int fd, unsigned events)
{
	struct guestfwd *g = opaque;
	struct user *u = g->u;
	uint8_t buf[4096];
	size_t room = u->lib->slirp_socket_can_recv(u->slirp, g->addr, g->port);
	if (!room) {
		loop_watch_set(g->watch, 0); /* cb_notify() looks again */
		return;
	}
	ssize_t n = recv(fd, buf, MIN(room, sizeof buf), MSG_DONTWAIT);
	if (n > 0) {
		u->lib->slirp_socket_recv(u->slirp, g->addr, g->port, buf, (int)n);
		schedule(u);
	} else if (!n || (errno != EAGAIN && errno != EINTR)) {
		loop_unwatch(g->watch);
		g->watch = NULL;
	}
}

int user_guestfwd_fd(struct user *u, struct in_addr addr, int port, int fd, struct err *err)
{
	struct guestfwd *g = calloc(1, sizeof *g);
	if (!g) {
		close(fd);
		return err_set(err, -ENOMEM, "-netdev user: out of memory");
	}
	*g = (struct guestfwd){ .next = u->fwds, .u = u, .fd = fd, .addr = addr, .port = port };
	u->fwds = g;
	if (u->lib->slirp_add_guestfwd(u->slirp, guestfwd_write, g, &addr, port) < 0)
		return err_set(err, -EINVAL, "-netdev user: guestfwd: port %d is taken or its address outside of net=", port);
	g->addr = addr; /* slirp may have filled it in */
	g->watch = loop_watch_fd(u->n.loop, fd, LOOP_IN, guestfwd_ready, g);
	return g->watch ? 0 : err_set(err, -ENOMEM, "-netdev user: out of memory");
}

/* --- the back end --- */

static int user_open(struct net_backend *n, struct optlist *o, struct err *err)
{
	struct user *u = (struct user *)n;
	struct user_config cfg;
	pthread_mutex_init(&u->lock, NULL);
	queue_init(&u->tx);
	timer_init(&u->timeout, clock_host(n->loop), timed_out, u);
	int r = user_parse(&cfg, o, err);
	if (!r)
		r = slirp_lib_load(&u->lib, err);
	if (r)
		return r;
	u->slirp = u->lib->slirp_new(&cfg.c, &callbacks, u);
	if (!u->slirp)
		return err_set(err, -EINVAL, "-netdev user: libslirp refuses this configuration");
	r = user_add_forwards(u, o, err);
	if (!r)
		schedule(u);
	return r;
}

static void user_close(struct net_backend *n)
{
	struct user *u = (struct user *)n;
	u->closing = true;
	loop_cancel(n->loop, process, u);
	timer_stop(&u->timeout);
	if (u->slirp)
		u->lib->slirp_cleanup(u->slirp);
	while (u->nfd)
		drop_fd(u, 0);
	while (u->fwds) {
		struct guestfwd *g = u->fwds;
		u->fwds = g->next;
		loop_unwatch(g->watch);
		close(g->fd);
		free(g);
	}
	loop_cancel(n->loop, process, u);
	queue_clear(&u->tx);
	pthread_mutex_destroy(&u->lock);
	free(u->fd);
}

static int user_send(struct net_backend *n, const struct iovec *iov, int iovcnt, size_t len)
{
	struct user *u = (struct user *)n;
	pthread_mutex_lock(&u->lock);
	int r = queue_put(&u->tx, iov, iovcnt, len);
	if (r == -EAGAIN)
		__atomic_store_n(&n->send_blocked, true, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&u->lock);
	schedule(u);
	return r;
}

const struct net_kind net_user = {
	.name = "user", .size = sizeof(struct user),
	.options = (const char *const[]){ "id", "net", "host", "restrict", "hostname", "dns", "dhcpstart", "dnssearch", "domainname",
					  "hostfwd", "guestfwd", "tftp", "tftp-server-name", "bootfile", "ipv4", "ipv6", "ipv6-net",
					  "ipv6-prefix", "ipv6-prefixlen", "ipv6-host", "ipv6-dns", "smb", NULL },
	.open = user_open, .close = user_close, .send = user_send,
};
