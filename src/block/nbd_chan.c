/* Bytes in and out, for both ends of NBD. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/util.h"
#include "block/driver.h"
#include "block/nbd_proto.h"
#include "loop/loop.h"

enum { VEC = 64 };

static const int wire_errors[] = { EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN };

uint32_t nbd_error_to_wire(int r)
{
	if (r == -EROFS)
		return EPERM;
	if (r == -EFBIG || r == -EDQUOT)
		return ENOSPC;
	for (size_t i = 0; i < ARRAY_SIZE(wire_errors); i++) {
		if (-r == wire_errors[i])
			return (uint32_t)-r;
	}
	return r ? EIO : 0;
}

int nbd_error_from_wire(uint32_t e)
{
	for (size_t i = 0; i < ARRAY_SIZE(wire_errors); i++) {
		if (e == (uint32_t)wire_errors[i])
			return -wire_errors[i];
	}
	return e ? -EINVAL : 0;
}

uint64_t nbd_now_ms(void)
{
	return clock_host_ns() / 1000000;
}

void nbd_chan_init(struct nbd_chan *c, int fd)
{
	c->fd = fd;
	c->tls = NULL;
	c->deadline = 0;
	c->head = c->tail = 0;
}

void nbd_chan_close(struct nbd_chan *c)
{
	tls_free(c->tls);
	c->tls = NULL;
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
}

/* Milliseconds left, -1: for ever, 0: too late. */
static int time_left(const struct nbd_chan *c)
{
	if (!c->deadline)
		return -1;
	uint64_t now = nbd_now_ms();
	return now >= c->deadline ? 0 : (int)MIN(c->deadline - now, (uint64_t)INT_MAX);
}

static int wait_fd(const struct nbd_chan *c, short events)
{
	struct pollfd p = { c->fd, events, 0 };
	int n, left = time_left(c);
	do
		n = left ? poll(&p, 1, left) : 0;
	while (n < 0 && errno == EINTR);
	return n > 0 ? 0 : n ? -errno : -ETIMEDOUT;
}

static ssize_t recv_some(struct nbd_chan *c, struct iovec *iov, int n)
{
	if (c->tls)
		return tls_recv(c->tls, iov[0].iov_base, iov[0].iov_len, time_left(c));
	int r = c->deadline ? wait_fd(c, POLLIN) : 0;
	if (r)
		return r;
	struct msghdr m = { .msg_iov = iov, .msg_iovlen = (size_t)n };
	for (;;) {
		ssize_t got = recvmsg(c->fd, &m, 0);
		if (got >= 0)
			return got;
		if (errno == EAGAIN) {
			r = wait_fd(c, POLLIN);
			if (r)
				return r;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
}

static size_t take(struct nbd_chan *c, void *buf, size_t len)
{
	size_t n = MIN(len, (size_t)(c->tail - c->head));
	if (n)
		memcpy(buf, c->buf + c->head, n);
	c->head += (unsigned)n;
	return n;
}

/* The buffer is empty: receive into `iov`, and into the buffer what comes behind it. */
static int fill(struct nbd_chan *c, struct iovec *v, int n, size_t want)
{
	struct iovec all[VEC + 1];
	while (want) {
		int k = MIN(n, VEC);
		c->head = c->tail = 0;
		size_t room = 0;
		memcpy(all, v, (size_t)k * sizeof *v);
		for (int i = 0; i < k; i++)
			room += v[i].iov_len;
		bool last = room >= want;
		if (last)
			all[k] = (struct iovec){ c->buf, NBD_BUF };
		/* TLS records are read one at a time: short things through the buffer. */
		bool through = c->tls && want < 64;
		ssize_t got = through ? recv_some(c, &(struct iovec){ c->buf, NBD_BUF }, 1) : recv_some(c, all, k + last);
		if (got <= 0)
			return got ? (int)got : -ECONNRESET;
		size_t left = (size_t)got;
		if (through) {
			c->tail = (unsigned)got;
			left = 0;
		}
		while (n && left >= v->iov_len) {
			left -= v->iov_len;
			want -= v->iov_len;
			v++;
			n--;
		}
		if (n && left) {
			v->iov_base = (char *)v->iov_base + left;
			v->iov_len -= left;
			want -= left;
			left = 0;
		}
		if (!through)
			c->tail = (unsigned)left;
		while (through && n && c->head < c->tail) {
			size_t t = take(c, v->iov_base, v->iov_len);
			want -= t;
			v->iov_base = (char *)v->iov_base + t;
			v->iov_len -= t;
			if (!v->iov_len) {
				v++;
				n--;
			}
		}
	}
	return 0;
}

int nbd_recv(struct nbd_chan *c, void *buf, size_t len)
{
	size_t n = take(c, buf, len);
	if (n == len)
		return 0;
	struct iovec v = { (char *)buf + n, len - n };
	int r = fill(c, &v, 1, len - n);
	return r == -ECONNRESET && !n && v.iov_len == len ? -EPIPE : r;
}

int nbd_recv_iov(struct nbd_chan *c, const struct iovec *iov, int n, size_t len)
{
	struct iovec part[VEC];
	for (size_t done = 0; done < len;) {
		size_t now = 0, skip = done;
		int k = 0;
		for (int i = 0; i < n && k < VEC && done + now < len; i++) {
			if (skip >= iov[i].iov_len) {
				skip -= iov[i].iov_len;
				continue;
			}
			part[k].iov_base = (char *)iov[i].iov_base + skip;
			part[k].iov_len = MIN(iov[i].iov_len - skip, len - done - now);
			now += part[k++].iov_len;
			skip = 0;
		}
		if (!now)
			return -EINVAL;
		done += now;
		int i = 0;
		while (i < k && nbd_pending(c)) {
			size_t t = take(c, part[i].iov_base, part[i].iov_len);
			part[i].iov_base = (char *)part[i].iov_base + t;
			part[i].iov_len -= t;
			now -= t;
			i += !part[i].iov_len;
		}
		int r = now ? fill(c, part + i, k - i, now) : 0;
		if (r)
			return r;
	}
	return 0;
}

int nbd_skip(struct nbd_chan *c, uint64_t len)
{
	uint8_t sink[4096];
	int r = 0;
	while (!r && len) {
		size_t n = MIN(len, (uint64_t)sizeof sink);
		r = nbd_recv(c, sink, n);
		len -= n;
	}
	return r;
}

static ssize_t send_some(struct nbd_chan *c, const struct iovec *iov, int n)
{
	if (c->tls)
		return tls_send(c->tls, iov[0].iov_base, iov[0].iov_len, time_left(c));
	struct msghdr m = { .msg_iov = (struct iovec *)(uintptr_t)iov, .msg_iovlen = (size_t)MIN(n, IOV_MAX) };
	for (;;) {
		ssize_t put = sendmsg(c->fd, &m, MSG_NOSIGNAL | (c->deadline ? MSG_DONTWAIT : 0));
		if (put >= 0)
			return put;
		if (errno == EAGAIN) {
			int r = wait_fd(c, POLLOUT);
			if (r)
				return r;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
}

ssize_t nbd_send_now(struct nbd_chan *c, const struct iovec *iov, int n)
{
	if (c->tls)
		return send_some(c, iov, 1);
	struct msghdr m = { .msg_iov = (struct iovec *)(uintptr_t)iov, .msg_iovlen = (size_t)MIN(n, IOV_MAX) };
	ssize_t put;
	do
		put = sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (put < 0 && errno == EINTR);
	return put < 0 ? -errno : put;
}

/* Through TLS, short pieces go in one record: a header and its data, if both are small. */
static int send_tls(struct nbd_chan *c, struct iovec *iov, int n)
{
	uint8_t buf[NBD_BUF];
	while (n) {
		size_t len = 0;
		while (n && iov->iov_len <= sizeof buf - len) {
			memcpy(buf + len, iov->iov_base, iov->iov_len);
			len += iov->iov_len;
			iov++;
			n--;
		}
		const uint8_t *p = len ? buf : iov->iov_base;
		size_t left = len ? len : iov->iov_len;
		while (left) {
			ssize_t put = send_some(c, &(struct iovec){ (void *)(uintptr_t)p, left }, 1);
			if (put < 0)
				return (int)put;
			p += put;
			left -= (size_t)put;
		}
		if (!len) {
			iov++;
			n--;
		}
	}
	return 0;
}

int nbd_send_iov(struct nbd_chan *c, struct iovec *iov, int n)
{
	if (c->tls)
		return send_tls(c, iov, n);
	while (n) {
		ssize_t put = send_some(c, iov, n);
		if (put < 0)
			return (int)put;
		size_t left = (size_t)put;
		while (n && left >= iov->iov_len) {
			left -= iov->iov_len;
			iov++;
			n--;
		}
		if (n && left) {
			iov->iov_base = (char *)iov->iov_base + left;
			iov->iov_len -= left;
		}
	}
	return 0;
}

int nbd_send(struct nbd_chan *c, const void *buf, size_t len)
{
	struct iovec v = { (void *)(uintptr_t)buf, len };
	return nbd_send_iov(c, &v, 1);
}
