/* What the serving programs share: signals, forking, pid file, socket activation, objects. */
#include "cli/serve.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/parse.h"
#include "cli/options.h"

/* The groups of a program without a loop: limits of driver=throttle nodes. */
static int add_group(struct throttle_set *groups, struct keyvals *l, struct err *err)
{
	struct throttle_limits limits = { 0 };
	const char *id = keyvals_get(l, "id");
	int r = id && *id ? 0 : err_set(err, -EINVAL, "Parameter 'id' is missing");
	if (!r && throttle_set_find(groups, id))
		r = err_set(err, -EEXIST, "attempt to add duplicate property '%s' to object (type 'container')", id);
	if (!r)
		r = throttle_keys(l, "--object throttle-group", "x-", &limits, err);
	if (!r)
		r = throttle_keys(l, "--object throttle-group", "limits.", &limits, err);
	if (!r)
		r = keyvals_end(l, "--object throttle-group", err);
	return !r && throttle_set_add(groups, id, &limits, NULL, NULL) ? err_set(err, -ENOMEM, "out of memory") : r;
}

int serve_object(struct tls_store *s, struct throttle_set *groups, const char *text, struct err *err)
{
	struct keyvals l;
	int r = keyvals_parse(&l, "--object", text, "qom-type", err);
	if (r)
		return r;
	const char *type = keyvals_get(&l, "qom-type");
	if (type && !strcmp(type, "help")) {
		puts("List of user creatable objects:\n  authz-list\n  authz-list-file\n  authz-simple\n  secret\n  throttle-group\n  tls-creds-psk\n  tls-creds-x509");
		r = 1;
	} else if (type && !strcmp(type, "throttle-group")) {
		r = add_group(groups, &l, err);
	} else if (type && !tls_is_object(type)) {
		r = err_set(err, -ENOTSUP, "invalid object type: %s", type);
	} else {
		r = tls_store_add(s, &l, err);
	}
	keyvals_free(&l);
	return r;
}

int serve_start(struct serve *s, struct err *err)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	s->sigfd = signalfd(-1, &set, SFD_CLOEXEC);
	s->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return s->sigfd < 0 || s->event < 0 ? err_set_errno(err, -errno, "signals") : 0;
}

int serve_fork(struct serve *s, struct err *err)
{
	int p[2], status;
	char c;
	if (pipe2(p, O_CLOEXEC))
		return err_set_errno(err, -errno, "pipe");
	pid_t pid = fork();
	if (pid < 0)
		return err_set_errno(err, -errno, "Failed to fork");
	if (!pid) {
		close(p[0]);
		s->ready = p[1];
		setsid();
		return 0;
	}
	close(p[1]);
	while (read(p[0], &c, 1) < 0 && errno == EINTR)
		;
	/* A byte: it serves. The end of the pipe: it failed, and said why itself. */
	struct pollfd f = { p[0], POLLIN, 0 };
	if (waitpid(pid, &status, WNOHANG) == pid || (poll(&f, 1, 0) == 1 && f.revents & POLLHUP && waitpid(pid, &status, 0) == pid))
		_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
	_exit(0);
}

static int write_pid(const char *file, struct err *err)
{
	char text[32];
	int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
	int fd = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, text, (size_t)n) != n) {
		int r = -errno;
		if (fd >= 0)
			close(fd);
		return err_set_errno(err, r, "%s", file);
	}
	close(fd);
	return 0;
}

int serve_ready(struct serve *s, const char *pidfile, struct err *err)
{
	int r = pidfile ? write_pid(pidfile, err) : 0;
	if (r || s->ready <= 0)
		return r;
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = 0; null >= 0 && fd < 3; fd++)
		dup2(null, fd);
	if (null > 2)
		close(null);
	if (chdir("/"))
		r = 0; /* it may stay where it is */
	if (write(s->ready, "", 1) != 1)
		r = err_set_errno(err, -errno, "pipe");
	return r; /* the descriptor stays: its end would mean failure */
}

void serve_wait(struct serve *s)
{
	struct pollfd p[2] = { { s->sigfd, POLLIN, 0 }, { s->event, POLLIN, 0 } };
	while (poll(p, 2, -1) < 0 && errno == EINTR)
		;
}

void serve_end(struct serve *s)
{
	uint64_t one = 1;
	if (write(s->event, &one, sizeof one) < 0)
		return; /* it is already set */
}

unsigned serve_passed(void)
{
	const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");
	uint64_t p, k;
	if (!pid || !n || parse_u64(pid, &p) || parse_u64(n, &k) || p != (uint64_t)getpid() || !k || k > 1024)
		return 0;
	for (unsigned i = 0; i < k; i++) {
		int fl = fcntl(3 + (int)i, F_GETFD);
		if (fl < 0)
			return 0;
		fcntl(3 + (int)i, F_SETFD, fl | FD_CLOEXEC);
	}
	return (unsigned)k;
}

int serve_bitmap(struct nbd_export *e, const char *name, struct image_bits *bits, struct err *err)
{
	int r = image_bitmap_read(e->blk, name, bits, err);
	if (r)
		return r;
	e->bitmap = name;
	e->bits = bits->bits;
	e->nbits = bits->nbits;
	e->gran_bits = bits->gran_bits;
	e->live = bits->live;
	return 0;
}
