/*
 * Character back ends: the stream every kind shares.
 *
 * Input: the watch reads what the fifo of the port in focus has room for, then the client is offered
 * what it can take. A full fifo pauses the watch, except on a terminal with a mux: there Ctrl-A x must
 * work however stuck the guest is, so what does not fit is dropped.
 */
#include "chr/chr.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "chr/internal.h"

/* --- watches --- */

static unsigned room_in_focus(const struct chardev *c)
{
	return c->nports ? CHR_FIFO - c->port[c->focus]->used : 0;
}

/* The lock is held. */
static void update_watches(struct chardev *c)
{
	bool in = c->nports && !c->throttled && !c->eof;
	unsigned r = in ? LOOP_IN : 0, w = c->want_out ? LOOP_OUT : 0;
	if (c->rwatch && c->rfd == c->wfd)
		loop_watch_set(c->rwatch, r | w);
	else if (c->rwatch)
		loop_watch_set(c->rwatch, r);
	if (c->wwatch)
		loop_watch_set(c->wwatch, w);
}

static void refresh(struct chardev *c)
{
	pthread_mutex_lock(&c->lock);
	update_watches(c);
	pthread_mutex_unlock(&c->lock);
}

void chr_event_all(struct chardev *c, enum chr_event e)
{
	for (unsigned i = 0; i < c->nports; i++) {
		if (c->port[i]->cl.event)
			c->port[i]->cl.event(c->port[i]->cl.opaque, e);
	}
}

/* --- input --- */

static void tell_eof(void *opaque)
{
	struct chardev *c = opaque;
	if (c->on_eof)
		c->on_eof(c->eof_opaque);
}

/* Offer what waits to the port's client. */
static void pump(struct chardev *c, struct chr_port *p)
{
	while (p->used && p->cl.receive) {
		size_t can = p->cl.can_receive ? p->cl.can_receive(p->cl.opaque) : p->used;
		size_t run = MIN(p->used, CHR_FIFO - p->head);
		size_t n = MIN(can, run);
		if (!n)
			return;
		uint8_t *at = p->fifo + p->head;
		p->head = (p->head + (unsigned)n) % CHR_FIFO;
		p->used -= (unsigned)n;
		p->cl.receive(p->cl.opaque, at, n);
	}
}

static void pump_all(struct chardev *c)
{
	for (unsigned i = 0; i < c->nports; i++)
		pump(c, c->port[i]);
	bool drained = !c->nports || !c->port[c->focus]->used;
	c->throttled = c->nports && !room_in_focus(c) && !(c->mux && c->is_tty);
	if (c->eof && drained && c->eof_closes && c->nports) {
		c->eof_closes = false;
		chr_event_all(c, CHR_CLOSED);
	}
	if (c->eof && drained && c->on_eof) {
		void (*fn)(void *) = c->on_eof;
		c->on_eof = NULL;
		fn(c->eof_opaque);
	}
}

static void push(struct chr_port *p, uint8_t byte)
{
	if (p->used == CHR_FIFO)
		return;
	p->fifo[(p->head + p->used) % CHR_FIFO] = byte;
	p->used++;
}

void chr_input(struct chardev *c, const uint8_t *buf, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		if (c->mux && mux_escape(c, buf[i]))
			continue;
		if (c->nports)
			push(c->port[c->focus], buf[i]);
	}
	pump_all(c);
	refresh(c);
}

static void input_ended(struct chardev *c)
{
	if (c->kind->hangup) {
		c->kind->hangup(c);
		return;
	}
	c->eof = true;
	pump_all(c);
	refresh(c);
}

static void on_readable(struct chardev *c)
{
	uint8_t buf[CHR_FIFO];
	size_t room = room_in_focus(c);
	if (!room && c->mux && c->is_tty)
		room = 64;
	if (!room) {
		c->throttled = true;
		refresh(c);
		return;
	}
	ssize_t n = read(c->rfd, buf, room);
	if (n > 0)
		chr_input(c, buf, (size_t)n);
	else if (!n || (errno != EAGAIN && errno != EINTR))
		input_ended(c);
}

static void on_ready(void *opaque, int fd, unsigned events)
{
	struct chardev *c = opaque;
	if (events & LOOP_OUT && fd == c->wfd) {
		pthread_mutex_lock(&c->lock);
		bool told = c->want_out;
		c->want_out = false;
		update_watches(c);
		pthread_mutex_unlock(&c->lock);
		if (told)
			chr_event_all(c, CHR_WRITABLE);
	}
	if (events & LOOP_IN && fd == c->rfd)
		on_readable(c);
}

static void accept_on_loop(void *opaque)
{
	struct chardev *c = opaque;
	__atomic_store_n(&c->accept_posted, false, __ATOMIC_SEQ_CST);
	pump_all(c);
	refresh(c);
}

void chr_accept_input(struct chardev *c)
{
	if (!__atomic_exchange_n(&c->accept_posted, true, __ATOMIC_SEQ_CST))
		loop_post(c->env.loop, accept_on_loop, c);
}

void chr_on_eof(struct chardev *c, void (*fn)(void *opaque), void *opaque)
{
	c->on_eof = fn;
	c->eof_opaque = opaque;
	if (c->eof && fn)
		loop_post(c->env.loop, tell_eof, c);
}

/* --- output --- */

/* Bytes written, -EAGAIN, or -errno. */
static ssize_t try_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	struct pollfd p = { .fd = c->wfd, .events = POLLOUT };
	if (c->poll_first || c->is_pty) {
		poll(&p, 1, 0);
		if (c->is_pty && p.revents & POLLHUP)
			return (ssize_t)len; /* nobody has it open: gone, as on a wire */
		if (!(p.revents & (POLLOUT | POLLERR | POLLHUP)))
			return -EAGAIN;
		len = MIN(len, (size_t)512);
	}
	ssize_t n = c->is_socket ? send(c->wfd, buf, len, MSG_NOSIGNAL | MSG_DONTWAIT) : write(c->wfd, buf, len);
	return n < 0 ? -errno : n;
}

size_t chr_raw_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	size_t done = 0;
	pthread_mutex_lock(&c->lock);
	while (done < len) {
		if (c->wfd < 0) {
			done = len; /* not connected: dropped */
			break;
		}
		ssize_t n = try_write(c, buf + done, len - done);
		if (n == -EINTR)
			continue;
		if (n == -EAGAIN) {
			c->want_out = true;
			update_watches(c);
			break;
		}
		if (n < 0) {
			done = len; /* the reading side notices and says so */
			break;
		}
		done += (size_t)n;
	}
	pthread_mutex_unlock(&c->lock);
	return done;
}

size_t chr_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	if (c->kind->write)
		return c->kind->write(c, buf, len);
	if (__atomic_load_n(&c->timestamps, __ATOMIC_RELAXED))
		return mux_write_timed(c, buf, len);
	return chr_raw_write(c, buf, len);
}

/* --- connecting --- */

int chr_connect(struct chardev *c, int rfd, int wfd, struct err *err)
{
	struct loop_watch *r = NULL, *w = NULL;
	pthread_mutex_lock(&c->lock);
	c->rfd = rfd;
	c->wfd = wfd;
	if (rfd >= 0)
		r = loop_watch_fd(c->env.loop, rfd, 0, on_ready, c);
	if (wfd >= 0 && wfd != rfd)
		w = loop_watch_fd(c->env.loop, wfd, 0, on_ready, c);
	c->rwatch = r;
	c->wwatch = w;
	c->want_out = c->throttled = false;
	update_watches(c);
	pthread_mutex_unlock(&c->lock);
	if ((rfd >= 0 && !r) || (wfd >= 0 && wfd != rfd && !w))
		return err_set_errno(err, -ENOMEM, "-chardev %s: cannot watch", c->kind->name);
	chr_event_all(c, CHR_OPENED);
	return 0;
}

static void drop_stream(struct chardev *c)
{
	pthread_mutex_lock(&c->lock);
	struct loop_watch *r = c->rwatch, *w = c->wwatch;
	int rfd = c->rfd, wfd = c->wfd;
	c->rwatch = c->wwatch = NULL;
	c->rfd = c->wfd = -1;
	pthread_mutex_unlock(&c->lock);
	loop_unwatch(r);
	loop_unwatch(w);
	if (!c->own_fds)
		return;
	if (rfd >= 0)
		close(rfd);
	if (wfd >= 0 && wfd != rfd)
		close(wfd);
}

void chr_disconnect(struct chardev *c)
{
	drop_stream(c);
	chr_event_all(c, CHR_CLOSED);
}

/* --- opening --- */

static const struct chr_kind *const kinds[] = {
	&chr_stdio, &chr_null, &chr_file, &chr_pipe, &chr_pty, &chr_socket, &chr_ringbuf,
};

static const struct chr_kind *find_kind(const char *name, struct err *err)
{
	static const char *const later[] = { "udp", "vc", "msmouse", "wctablet", "braille", "testdev", "serial", "tty", "parallel",
					     "parport", "spicevmc", "spiceport", "qemu-vdagent", "dbus", "hub" };
	for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
		if (!strcmp(kinds[i]->name, name))
			return kinds[i];
	}
	if (!strcmp(name, "memory"))
		return &chr_ringbuf;
	for (size_t i = 0; i < ARRAY_SIZE(later); i++) {
		if (!strcmp(later[i], name)) {
			err_set(err, -ENOTSUP, "-chardev %s: not supported yet; valid: stdio, null, file, pipe, pty, socket, ringbuf", name);
			return NULL;
		}
	}
	err_set(err, -EINVAL, "-chardev %s: no such kind; valid: stdio, null, file, pipe, pty, socket, ringbuf", name);
	return NULL;
}

static int open_kind(struct chardev *c, struct optlist *o, struct err *err)
{
	bool mux = false;
	const char *id = optlist_get(o, "id");
	int r = optlist_bool(o, "mux", &mux, err);
	if (!r && optlist_get(o, "logfile"))
		r = err_set(err, -ENOTSUP, "-chardev %s: logfile= is not supported yet", c->kind->name);
	c->mux = mux;
	c->id = id ? strdup(id) : NULL;
	if (id && !c->id)
		r = err_set(err, -ENOMEM, "-chardev: out of memory");
	snprintf(c->label, sizeof c->label, "%s", c->kind->name);
	return r ? r : c->kind->open(c, o, err);
}

int chr_open(struct chardev **out, const char *spec, const struct chr_env *env, struct err *err)
{
	struct optlist o;
	struct chardev *c = calloc(1, sizeof *c);
	if (!c)
		return err_set(err, -ENOMEM, "-chardev: out of memory");
	int r = optlist_parse(&o, spec, "backend", "-chardev", err);
	const char *name = r ? NULL : optlist_get(&o, "backend");
	c->env = *env;
	c->rfd = c->wfd = c->listen_fd = -1;
	c->line_start = true;
	pthread_mutex_init(&c->lock, NULL);
	if (!r && !name)
		r = err_set(err, -EINVAL, "-chardev: no kind given; valid: stdio, null, file, pipe, pty, socket, ringbuf");
	if (!r && !(c->kind = find_kind(name, err)))
		r = -EINVAL;
	if (!r)
		r = open_kind(c, &o, err);
	if (!r)
		r = optlist_unused(&o, c->kind->options, err);
	optlist_free(&o);
	if (r) {
		chr_close(c);
		return r;
	}
	c->start_ns = clock_now(clock_host(env->loop));
	*out = c;
	return 0;
}

void chr_close(struct chardev *c)
{
	if (!c)
		return;
	if (c->kind && c->kind->close)
		c->kind->close(c);
	drop_stream(c);
	loop_cancel(c->env.loop, accept_on_loop, c);
	loop_cancel(c->env.loop, tell_eof, c);
	for (unsigned i = 0; i < c->nports; i++) {
		free(c->port[i]->owner);
		free(c->port[i]);
	}
	pthread_mutex_destroy(&c->lock);
	free(c->ring);
	free(c->unix_path);
	free(c->id);
	free(c);
}

const char *chr_id(const struct chardev *c)
{
	return c->id;
}

const char *chr_label(const struct chardev *c)
{
	return c->label;
}

int chr_attach(struct chardev *c, const struct chr_client *cl, const char *owner, struct err *err)
{
	const char *name = c->id ? c->id : c->kind->name;
	if (c->nports && !c->mux)
		return err_set(err, -EBUSY, "chardev '%s' is already used by %s (mux=on lets several share it)", name,
			       c->port[0]->owner);
	if (c->nports == CHR_CLIENTS)
		return err_set(err, -EBUSY, "chardev '%s': at most %d devices can share it", name, CHR_CLIENTS);
	struct chr_port *p = calloc(1, sizeof *p);
	if (!p || !(p->owner = strdup(owner))) {
		free(p);
		return err_set(err, -ENOMEM, "chardev '%s': out of memory", name);
	}
	p->cl = *cl;
	c->port[c->nports] = p;
	c->focus = c->nports++;
	if (c->nports > 1)
		c->focus = 0; /* the first one, as a rule the serial port, keeps the keyboard */
	refresh(c);
	if (cl->event && (c->wfd >= 0 || c->rfd >= 0 || c->kind->write))
		cl->event(cl->opaque, CHR_OPENED);
	return 0;
}

void chr_detach(struct chardev *c, const void *opaque)
{
	for (unsigned i = 0; i < c->nports; i++) {
		if (c->port[i]->cl.opaque != opaque)
			continue;
		free(c->port[i]->owner);
		free(c->port[i]);
		memmove(&c->port[i], &c->port[i + 1], (c->nports - i - 1) * sizeof c->port[0]);
		c->nports--;
		if (c->focus >= c->nports)
			c->focus = 0;
		break;
	}
	refresh(c);
}
