/* null, file, pipe, pty and ringbuf. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "base/parse.h"
#include "base/util.h"
#include "chr/internal.h"

static int null_open(struct chardev *c, struct optlist *o, struct err *err)
{
	return 0;
}

static size_t null_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	return len;
}

const struct chr_kind chr_null = {
	.name = "null", .options = (const char *const[]){ "id", "mux", NULL }, .open = null_open, .write = null_write,
};

static int need_path(struct chardev *c, struct optlist *o, const char **path, struct err *err)
{
	*path = optlist_get(o, "path");
	return *path && **path ? 0 : err_set(err, -EINVAL, "-chardev %s: path= is missing", c->kind->name);
}

/*
 * A file by name. /dev/stdin, /dev/stdout and /dev/stderr mean the descriptors themselves: opened anew a
 * regular file would start over at its beginning, and a socket could not be opened at all.
 */
static int open_named(const char *path, int flags)
{
	static const char *const std[] = { "/dev/stdin", "/dev/stdout", "/dev/stderr" };

	for (int i = 0; i < 3; i++)
		if (!strcmp(path, std[i]))
			return fcntl(i, F_DUPFD_CLOEXEC, 3);
	return open(path, flags | O_CLOEXEC | O_NOCTTY, 0666);
}

static int file_open(struct chardev *c, struct optlist *o, struct err *err)
{
	const char *path, *in_path = optlist_get(o, "input-path");
	bool append = false;
	int in = -1, r = need_path(c, o, &path, err);
	if (!r)
		r = optlist_bool(o, "append", &append, err);
	if (r)
		return r;
	if (in_path) {
		in = open_named(in_path, O_RDONLY | O_NONBLOCK);
		if (in < 0)
			return err_set_errno(err, -errno, "-chardev file: input-path=%s", in_path);
	}
	int fd = open_named(path, O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC));
	if (fd < 0) {
		r = -errno;
		if (in >= 0)
			close(in);
		return err_set_errno(err, r, "-chardev file: %s", path);
	}
	c->own_fds = true;
	c->eof_closes = true;
	snprintf(c->label, sizeof c->label, "file: %.128s", path);
	return chr_connect(c, in, fd, err);
}

const struct chr_kind chr_file = {
	.name = "file", .options = (const char *const[]){ "id", "mux", "path", "input-path", "append", NULL }, .open = file_open,
};

/* path.in and path.out where both exist, else one that serves both ways. O_RDWR never blocks on a FIFO. */
static int pipe_open(struct chardev *c, struct optlist *o, struct err *err)
{
	const char *path;
	char name[PATH_MAX];
	int r = need_path(c, o, &path, err), flags = O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
	if (r)
		return r;
	signal(SIGPIPE, SIG_IGN);
	snprintf(name, sizeof name, "%s.in", path);
	int in = open(name, flags);
	snprintf(name, sizeof name, "%s.out", path);
	int out = open(name, flags);
	if (in < 0 || out < 0) {
		if (in >= 0)
			close(in);
		if (out >= 0)
			close(out);
		in = out = open(path, flags);
	}
	if (in < 0)
		return err_set_errno(err, -errno, "-chardev pipe: %s (make it, or both %s.in and %s.out, with mkfifo)", path, path, path);
	c->own_fds = true;
	snprintf(c->label, sizeof c->label, "pipe: %.128s", path);
	return chr_connect(c, in, out, err);
}

const struct chr_kind chr_pipe = {
	.name = "pipe", .options = (const char *const[]){ "id", "mux", "path", NULL }, .open = pipe_open,
};

/*
 * A pty whose other side nobody has open reports a hang-up for ever. So while that lasts nothing is
 * watched, output is dropped, and a timer looks once in a while.
 */
#define PTY_LOOK_NS 250000000u

static void pty_look(void *opaque)
{
	struct chardev *c = opaque;
	struct pollfd p = { .fd = c->listen_fd, .events = POLLIN };
	poll(&p, 1, 0);
	if (p.revents & POLLHUP)
		timer_arm(&c->retry, clock_now(clock_host(c->env.loop)) + PTY_LOOK_NS);
	else
		chr_connect(c, c->listen_fd, c->listen_fd, NULL);
}

static void pty_hangup(struct chardev *c)
{
	chr_disconnect(c);
	timer_arm(&c->retry, clock_now(clock_host(c->env.loop)) + PTY_LOOK_NS);
}

static int pty_open(struct chardev *c, struct optlist *o, struct err *err)
{
	int master, slave;
	char name[128];
	struct termios t;
	if (openpty(&master, &slave, NULL, NULL, NULL))
		return err_set_errno(err, -errno, "-chardev pty");
	if (!tcgetattr(slave, &t)) {
		cfmakeraw(&t);
		tcsetattr(slave, TCSANOW, &t);
	}
	if (ttyname_r(slave, name, sizeof name))
		snprintf(name, sizeof name, "?");
	close(slave); /* from here on the master reports a hang-up until somebody opens it */
	fcntl(master, F_SETFL, O_NONBLOCK);
	fcntl(master, F_SETFD, FD_CLOEXEC);
	snprintf(c->label, sizeof c->label, "pty: %s", name);
	c->listen_fd = master;
	c->is_pty = true;
	timer_init(&c->retry, clock_host(c->env.loop), pty_look, c);
	timer_arm(&c->retry, clock_now(clock_host(c->env.loop)));
	return 0;
}

static void pty_close(struct chardev *c)
{
	timer_stop(&c->retry);
	if (c->listen_fd >= 0)
		close(c->listen_fd);
}

const struct chr_kind chr_pty = {
	.name = "pty", .options = (const char *const[]){ "id", "mux", NULL }, .open = pty_open, .close = pty_close, .hangup = pty_hangup,
};

static int ringbuf_open(struct chardev *c, struct optlist *o, struct err *err)
{
	const char *s = optlist_get(o, "size");
	uint64_t size = 65536;
	if (s && (parse_size(s, 1, &size) || !size || size & (size - 1) || size > (1u << 30)))
		return err_set(err, -EINVAL, "-chardev ringbuf: size='%s' is not valid; valid: a power of two up to 1G", s);
	c->ring = malloc(size);
	c->ring_size = size;
	return c->ring ? 0 : err_set(err, -ENOMEM, "-chardev ringbuf: out of memory");
}

static size_t ringbuf_write(struct chardev *c, const uint8_t *buf, size_t len)
{
	pthread_mutex_lock(&c->lock);
	for (size_t i = 0; i < len; i++)
		c->ring[c->ring_prod++ & (c->ring_size - 1)] = buf[i];
	if (c->ring_prod - c->ring_cons > c->ring_size)
		c->ring_cons = c->ring_prod - c->ring_size;
	pthread_mutex_unlock(&c->lock);
	return len;
}

size_t chr_ringbuf_read(struct chardev *c, uint8_t *buf, size_t len)
{
	size_t n = 0;
	if (!c->ring)
		return 0;
	pthread_mutex_lock(&c->lock);
	while (n < len && c->ring_cons < c->ring_prod)
		buf[n++] = c->ring[c->ring_cons++ & (c->ring_size - 1)];
	pthread_mutex_unlock(&c->lock);
	return n;
}

const struct chr_kind chr_ringbuf = {
	.name = "ringbuf", .options = (const char *const[]){ "id", "mux", "size", NULL }, .open = ringbuf_open, .write = ringbuf_write,
};
