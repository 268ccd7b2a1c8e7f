/* A TAP interface: frames by read() and write() on /dev/net/tun, or on a descriptor that was passed. */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "net/internal.h"

enum { TAP_IOV = 64 };

struct tap {
	struct net_backend n;
	int fd;
	char ifname[IFNAMSIZ];
	char *down;             /* script to run at the end */
	unsigned hdr;           /* bytes of virtio-net header on a passed descriptor */
	struct loop_watch *watch;
	pthread_mutex_t lock;
	bool want_out, stopped;
	uint8_t *buf;
};

static void update(struct tap *t)
{
	pthread_mutex_lock(&t->lock);
	loop_watch_set(t->watch, (t->stopped ? 0 : LOOP_IN) | (t->want_out ? LOOP_OUT : 0));
	pthread_mutex_unlock(&t->lock);
}

static void tap_ready(void *opaque, int fd, unsigned events)
{
	struct tap *t = opaque;
	if (events & LOOP_OUT && t->want_out) {
		pthread_mutex_lock(&t->lock);
		t->want_out = false;
		pthread_mutex_unlock(&t->lock);
		net_sendable(&t->n);
	}
	for (int i = 0; i < 64 && events & LOOP_IN && net_ready(&t->n); i++) {
		ssize_t n = read(fd, t->buf, NET_FRAME_MAX + t->hdr);
		if (n < 0 && errno != EAGAIN && errno != EINTR) {
			log_warn("netdev tap %s: %s; it receives nothing from here on", t->ifname, strerror(errno));
			loop_watch_set(t->watch, 0);
			return;
		}
		if (n <= (ssize_t)t->hdr)
			break;
		net_deliver(&t->n, t->buf + t->hdr, (size_t)n - t->hdr);
	}
	t->stopped = !net_ready(&t->n);
	update(t);
}

static void tap_resume(struct net_backend *n)
{
	struct tap *t = (struct tap *)n;
	t->stopped = false;
	update(t);
}

static int tap_blocked(struct tap *t)
{
	__atomic_store_n(&t->n.send_blocked, true, __ATOMIC_SEQ_CST);
	pthread_mutex_lock(&t->lock);
	t->want_out = true;
	loop_watch_set(t->watch, (t->stopped ? 0 : LOOP_IN) | LOOP_OUT);
	pthread_mutex_unlock(&t->lock);
	return -EAGAIN;
}

static int tap_send(struct net_backend *n, const struct iovec *iov, int iovcnt, size_t len)
{
	static const uint8_t no_offload[64];
	struct tap *t = (struct tap *)n;
	struct iovec v[TAP_IOV + 1];
	uint8_t *flat = NULL;
	int k = 0;
	if (t->hdr)
		v[k++] = (struct iovec){ (void *)(uintptr_t)no_offload, t->hdr };
	if (iovcnt > TAP_IOV) {
		size_t at = 0;
		flat = malloc(len);
		if (!flat)
			return -ENOMEM;
		for (int i = 0; i < iovcnt; at += iov[i++].iov_len)
			memcpy(flat + at, iov[i].iov_base, iov[i].iov_len);
		v[k++] = (struct iovec){ flat, len };
	} else {
		memcpy(&v[k], iov, (size_t)iovcnt * sizeof v[0]);
		k += iovcnt;
	}
	ssize_t r;
	do
		r = writev(t->fd, v, k);
	while (r < 0 && errno == EINTR);
	int e = r < 0 ? errno : 0;
	free(flat);
	return e == EAGAIN ? tap_blocked(t) : -e;
}

/* --- opening --- */

static int run_script(const char *script, const char *ifname)
{
	extern char **environ;
	char *argv[] = { (char *)(uintptr_t)script, (char *)(uintptr_t)ifname, NULL };
	pid_t pid;
	int status, r = posix_spawn(&pid, script, NULL, NULL, argv, environ);
	if (r)
		return -r;
	while (waitpid(pid, &status, 0) < 0) {
		if (errno != EINTR)
			return -errno;
	}
	return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : -ECHILD;
}

/* Path of a script: the option, QEMU's default where that exists, NULL for none. */
static const char *script_path(struct optlist *o, const char *key, const char *dflt)
{
	const char *s = optlist_get(o, key);
	if (s)
		return !*s || !strcmp(s, "no") ? NULL : s;
	return access(dflt, X_OK) ? NULL : dflt;
}

static int open_tun(struct tap *t, const char *ifname, struct err *err)
{
	struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI };
	if (ifname && strlen(ifname) >= IFNAMSIZ)
		return err_set(err, -EINVAL, "-netdev tap: ifname='%s' is longer than %d characters", ifname, IFNAMSIZ - 1);
	t->fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (t->fd < 0)
		return err_set(err, -errno, "-netdev tap: /dev/net/tun: %s%s", strerror(errno),
			       errno == ENOENT ? " (load the module tun)" : "");
	strcpy(ifr.ifr_name, ifname ? ifname : "tap%d");
	if (ioctl(t->fd, TUNSETIFF, &ifr)) {
		int e = errno;
		return err_set(err, -e, "-netdev tap: %s: %s%s", ifr.ifr_name, strerror(e),
			       e == EPERM ? " (make it beforehand: ip tuntap add NAME mode tap user USER)" :
			       e == EBUSY ? " (another program has it)" : "");
	}
	memcpy(t->ifname, ifr.ifr_name, IFNAMSIZ);
	return 0;
}

static int use_fd(struct tap *t, uint64_t fd, struct err *err)
{
	struct ifreq ifr = { 0 };
	int len = 10;
	if (ioctl((int)fd, TUNGETIFF, &ifr))
		return err_set(err, -EINVAL, "-netdev tap: fd=%d is no tap device", (int)fd);
	if ((ifr.ifr_flags & (IFF_TAP | IFF_NO_PI)) != (IFF_TAP | IFF_NO_PI))
		return err_set(err, -EINVAL, "-netdev tap: fd=%d must be a tap (not tun) device without packet information", (int)fd);
	if (ifr.ifr_flags & IFF_VNET_HDR) {
		ioctl((int)fd, TUNGETVNETHDRSZ, &len);
		ioctl((int)fd, TUNSETOFFLOAD, 0); /* whole, checksummed frames only */
		t->hdr = len > 0 && len <= 64 ? (unsigned)len : 10;
	}
	memcpy(t->ifname, ifr.ifr_name, IFNAMSIZ);
	t->fd = (int)fd;
	fcntl(t->fd, F_SETFL, fcntl(t->fd, F_GETFL) | O_NONBLOCK);
	fcntl(t->fd, F_SETFD, FD_CLOEXEC);
	return 0;
}

static int refuse_unsupported(struct optlist *o, struct err *err)
{
	static const char *const later[] = { "fds", "vhostfd", "vhostfds", "vhostforce", "helper", "br", "queues", "sndbuf",
					     "poll-us" };
	bool vhost = false, vnet = false;
	int r = optlist_bool(o, "vhost", &vhost, err);
	if (!r)
		r = optlist_bool(o, "vnet_hdr", &vnet, err);
	if (!r && (vhost || vnet))
		r = err_set(err, -ENOTSUP, "-netdev tap: %s=on is not supported yet", vhost ? "vhost" : "vnet_hdr");
	for (size_t i = 0; !r && i < ARRAY_SIZE(later); i++) {
		if (optlist_get(o, later[i]))
			r = err_set(err, -ENOTSUP, "-netdev tap: %s= is not supported yet", later[i]);
	}
	return r;
}

static int run_up(struct tap *t, struct optlist *o, struct err *err)
{
	const char *up = script_path(o, "script", "/etc/qemu-ifup"), *down = script_path(o, "downscript", "/etc/qemu-ifdown");
	if (!up) {
		if (!optlist_get(o, "script"))
			log_warn("-netdev tap: no script= and no /etc/qemu-ifup: interface %s is left as it is (script=no says so)", t->ifname);
	} else {
		int r = run_script(up, t->ifname);
		if (r)
			return err_set(err, r, "-netdev tap: script '%s %s' failed%s%s (script=no leaves the interface alone)", up, t->ifname,
				       r == -ECHILD ? "" : ": ", r == -ECHILD ? "" : strerror(-r));
	}
	t->down = down ? strdup(down) : NULL;
	return 0;
}

static int tap_open(struct net_backend *n, struct optlist *o, struct err *err)
{
	struct tap *t = (struct tap *)n;
	const char *ifname = optlist_get(o, "ifname");
	uint64_t fd = UINT64_MAX;
	t->fd = -1;
	pthread_mutex_init(&t->lock, NULL);
	int r = refuse_unsupported(o, err);
	if (!r)
		r = optlist_u64(o, "fd", INT32_MAX, &fd, err);
	if (!r && fd != UINT64_MAX && (ifname || optlist_get(o, "script") || optlist_get(o, "downscript")))
		r = err_set(err, -EINVAL, "-netdev tap: fd= cannot be combined with ifname=, script= or downscript=");
	if (!r)
		r = fd != UINT64_MAX ? use_fd(t, fd, err) : open_tun(t, ifname, err);
	if (!r && fd == UINT64_MAX)
		r = run_up(t, o, err);
	if (r)
		return r;
	t->buf = malloc(NET_FRAME_MAX + 64);
	t->watch = t->buf ? loop_watch_fd(n->loop, t->fd, LOOP_IN, tap_ready, t) : NULL;
	return t->watch ? 0 : err_set(err, -ENOMEM, "-netdev tap: out of memory");
}

static void tap_close(struct net_backend *n)
{
	struct tap *t = (struct tap *)n;
	loop_unwatch(t->watch);
	if (t->down)
		run_script(t->down, t->ifname);
	if (t->fd >= 0)
		close(t->fd);
	pthread_mutex_destroy(&t->lock);
	free(t->down);
	free(t->buf);
}

const struct net_kind net_tap = {
	.name = "tap", .size = sizeof(struct tap),
	.options = (const char *const[]){ "id", "ifname", "script", "downscript", "fd", "vhost", "vnet_hdr", NULL },
	.open = tap_open, .close = tap_close, .send = tap_send, .resume = tap_resume,
};
