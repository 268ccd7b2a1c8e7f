/* Messages and their descriptors over a Unix socket. */
#include "vhost/msg.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEAD = 12 };

static const struct { uint32_t n; const char *name; int len; } requests[] = {
#define VHOST_ROW(name, n, len) { n, #name, len },
	VHOST_REQUESTS(VHOST_ROW)
#undef VHOST_ROW
};

const char *vhost_name(uint32_t request)
{
	for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
		if (requests[i].n == request)
			return requests[i].name;
	}
	return "?";
}

static bool size_fits(const struct vhost_msg *m)
{
	if (m->size > sizeof m->p)
		return false;
	if (m->flags & VHOST_REPLY)
		return true; /* the front end knows what it asked */
	for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
		if (requests[i].n == m->request)
			return requests[i].len < 0 || m->size == (uint32_t)requests[i].len;
	}
	return true;
}

static int read_all(int sock, void *buf, size_t len)
{
	for (size_t got = 0; got < len;) {
		ssize_t n = recv(sock, (char *)buf + got, len - got, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? -errno : -ECONNRESET;
		got += (size_t)n;
	}
	return 0;
}

static bool take_control(struct msghdr *h, struct vhost_msg *m)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < n; i++) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (m->nfds < VHOST_FDS_MAX)
				m->fd[m->nfds++] = fd;
			else
				close(fd);
		}
	}
	return !(h->msg_flags & (MSG_CTRUNC | MSG_TRUNC));
}

int vhost_recv(int sock, struct vhost_msg *m)
{
	union { struct cmsghdr align; char buf[CMSG_SPACE(VHOST_FDS_MAX * sizeof(int))]; } control;
	uint32_t head[3];
	struct iovec v = { head, HEAD };
	struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control.buf };
	ssize_t n;
	m->nfds = 0;
	do
		n = recvmsg(sock, &h, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n ? -errno : -EPIPE;
	int r = take_control(&h, m) ? 0 : -EPROTO;
	if (!r && n < HEAD)
		r = read_all(sock, (char *)head + n, HEAD - (size_t)n);
	m->request = head[0];
	m->flags = head[1];
	m->size = head[2];
	memset(&m->p, 0, sizeof m->p);
	if (!r && ((m->flags & 3) != VHOST_VERSION || !size_fits(m)))
		r = -EPROTO;
	if (!r)
		r = read_all(sock, &m->p, m->size);
	if (r)
		vhost_close_fds(m);
	return r;
}

int vhost_take_fd(struct vhost_msg *m, unsigned i)
{
	if (i >= m->nfds)
		return -1;
	int fd = m->fd[i];
	m->fd[i] = -1;
	return fd;
}

void vhost_close_fds(struct vhost_msg *m)
{
	for (unsigned i = 0; i < m->nfds; i++) {
		if (m->fd[i] >= 0)
			close(m->fd[i]);
	}
	m->nfds = 0;
}

int vhost_send(int sock, const struct vhost_msg *m)
{
	union { struct cmsghdr align; char buf[CMSG_SPACE(VHOST_FDS_MAX * sizeof(int))]; } control = { 0 };
	uint32_t head[3] = { m->request, m->flags, m->size };
	struct iovec v[2] = { { head, HEAD }, { (void *)(uintptr_t)&m->p, m->size } };
	struct msghdr h = { .msg_iov = v, .msg_iovlen = 2 };
	if (m->nfds) {
		h.msg_control = control.buf;
		h.msg_controllen = CMSG_SPACE(m->nfds * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&h);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(m->nfds * sizeof(int));
		memcpy(CMSG_DATA(c), m->fd, m->nfds * sizeof(int));
	}
	ssize_t n;
	do
		n = sendmsg(sock, &h, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : (size_t)n == HEAD + m->size ? 0 : -EIO; /* short messages go whole, or the peer does not read */
}
