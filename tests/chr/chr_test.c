/* Character back ends through pipes, ptys, sockets and files; the mux; back-pressure. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "chr/chr.h"
#include "loop/loop.h"

struct front { struct loop *l; size_t can; char in[65536]; size_t len; int opened, closed, breaks, writable, quit, eof; };

static size_t can_receive(void *opaque)
{
	return ((struct front *)opaque)->can;
}

static void receive(void *opaque, const uint8_t *buf, size_t len)
{
	struct front *f = opaque;
	assert_true(len <= f->can && f->len + len < sizeof f->in);
	memcpy(f->in + f->len, buf, len);
	f->len += len;
	f->can -= len;
}

static void event(void *opaque, enum chr_event e)
{
	struct front *f = opaque;
	f->opened += e == CHR_OPENED;
	f->closed += e == CHR_CLOSED;
	f->breaks += e == CHR_BREAK;
	f->writable += e == CHR_WRITABLE;
}

static void quit(void *opaque)
{
	((struct front *)opaque)->quit++;
}

static void eof(void *opaque)
{
	((struct front *)opaque)->eof++;
}

static void stop(void *l)
{
	loop_stop(l, 0);
}

static void run(struct loop *l, unsigned ms)
{
	struct timer t;
	timer_init(&t, clock_host(l), stop, l);
	timer_arm(&t, clock_now(clock_host(l)) + ms * 1000000ull);
	loop_run(l);
	timer_stop(&t);
}

static struct chardev *open_chr(struct front *f, const char *spec)
{
	struct chardev *c;
	struct err e = { 0 };
	struct chr_env env = { f->l, quit, f };
	struct chr_client cl = { can_receive, receive, event, f };
	if (chr_open(&c, spec, &env, &e))
		fail_msg("%s", e.msg);
	assert_int_equal(chr_attach(c, &cl, "serial0", &e), 0);
	return c;
}

static struct front *new_front(struct loop *l)
{
	struct front *f = calloc(1, sizeof *f);
	f->l = l;
	f->can = sizeof f->in - 1;
	return f;
}

static size_t put(struct chardev *c, const char *s)
{
	return chr_write(c, (const uint8_t *)s, strlen(s));
}

static char dir[] = "/tmp/chr-test-XXXXXX";
static char path[100], spec[200];

static void test_simple(void **state)
{
	struct loop *l = *state;
	struct front *f = new_front(l);
	struct chardev *c = open_chr(f, "null,id=n0");
	assert_string_equal(chr_id(c), "n0");
	assert_int_equal(f->opened, 1);
	assert_int_equal(put(c, "gone"), 4);
	struct chr_client other = { .opaque = l };
	struct err e = { 0 };
	assert_int_equal(chr_attach(c, &other, "serial1", &e), -EBUSY);
	assert_non_null(strstr(e.msg, "serial0"));
	chr_close(c);

	snprintf(path, sizeof path, "%s/file,x", dir);
	snprintf(spec, sizeof spec, "file,id=f,path=%s/file,,x", dir);
	for (int i = 0; i < 3; i++) {
		char s[220], buf[32] = { 0 };
		snprintf(s, sizeof s, "%s%s", spec, i == 1 ? ",append=on" : "");
		c = open_chr(f, s);
		assert_int_equal(put(c, "text"), 4);
		chr_close(c);
		FILE *file = fopen(path, "r");
		assert_non_null(file);
		assert_int_equal(fread(buf, 1, sizeof buf, file), i == 1 ? 8 : 4);
		fclose(file);
	}
	unlink(path);

	uint8_t ring[64];
	c = open_chr(f, "ringbuf,id=r,size=8");
	put(c, "0123456789");
	assert_int_equal(chr_ringbuf_read(c, ring, sizeof ring), 8);
	assert_memory_equal(ring, "23456789", 8);
	chr_close(c);
	free(f);
}

static void test_pipe_backpressure(void **state)
{
	struct loop *l = *state;
	struct front *f = new_front(l);
	char big[4096], in[100], out[100];
	snprintf(in, sizeof in, "%s/p.in", dir);
	snprintf(out, sizeof out, "%s/p.out", dir);
	assert_int_equal(mkfifo(in, 0600) | mkfifo(out, 0600), 0);
	snprintf(spec, sizeof spec, "pipe,id=p,path=%s/p", dir);
	struct chardev *c = open_chr(f, spec);
	int w = open(in, O_WRONLY | O_NONBLOCK), r = open(out, O_RDONLY | O_NONBLOCK);
	/* in: the front end takes 3 bytes, then nothing, then the rest */
	f->can = 3;
	memset(big, 'b', sizeof big);
	assert_int_equal(write(w, big, 4000), 4000);
	run(l, 20);
	assert_int_equal(f->len, 3);
	f->can = 5000;
	chr_accept_input(c);
	chr_accept_input(c);
	run(l, 20);
	assert_int_equal(f->len, 4000);
	/* out: fill the pipe, drain it, hear about it */
	size_t sent = 0, n;
	while ((n = chr_write(c, (uint8_t *)big, sizeof big)) == sizeof big)
		sent += n;
	sent += n;
	run(l, 10);
	assert_int_equal(f->writable, 0);
	while (sent) {
		ssize_t k = read(r, big, sizeof big);
		assert_true(k > 0);
		sent -= (size_t)k;
	}
	run(l, 10);
	assert_int_equal(f->writable, 1);
	assert_int_equal(put(c, "more"), 4);
	chr_close(c);
	close(w);
	close(r);
	unlink(in);
	unlink(out);
	free(f);
}

static int dial(const char *p)
{
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	strcpy(un.sun_path, p);
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&un, sizeof un), 0);
	return fd;
}

static void test_socket(void **state)
{
	struct loop *l = *state;
	struct front *f = new_front(l);
	char buf[16];
	snprintf(path, sizeof path, "%s/s", dir);
	snprintf(spec, sizeof spec, "socket,id=s,path=%s,server=on,wait=off", path);
	struct chardev *c = open_chr(f, spec);
	assert_int_equal(f->opened, 0);
	assert_int_equal(put(c, "dropped"), 7);
	for (int i = 1; i <= 3; i++) {
		int fd = dial(path);
		run(l, 5);
		assert_int_equal(f->opened, i);
		assert_int_equal(write(fd, "hi", 2), 2);
		assert_int_equal(put(c, "yo"), 2);
		run(l, 5);
		assert_int_equal(f->len, 2 * i);
		assert_int_equal(read(fd, buf, sizeof buf), 2);
		close(fd);
		run(l, 5);
		assert_int_equal(f->closed, i);
	}
	/* a second server on the same path is refused, a client is not */
	struct chr_env env = { l, quit, f };
	struct chardev *d;
	struct err e = { 0 };
	assert_int_equal(chr_open(&d, spec, &env, &e), -EADDRINUSE);
	struct front *g = new_front(l);
	char cs[200];
	snprintf(cs, sizeof cs, "socket,id=c,path=%s,reconnect=1", path);
	run(l, 5); /* the probe above was a peer, too */
	d = open_chr(g, cs);
	put(d, "knock");
	run(l, 10);
	assert_memory_equal(f->in + 6, "knock", 5);
	chr_close(d);
	chr_close(c);
	assert_int_not_equal(access(path, F_OK), 0);
	/* reconnect: the server comes later */
	d = open_chr(g, cs);
	c = open_chr(f, spec);
	run(l, 1300);
	assert_int_equal(g->opened, 2);
	chr_close(d);
	chr_close(c);
	c = open_chr(f, "socket,id=t,host=127.0.0.1,port=0,server=on,wait=off");
	assert_non_null(strstr(chr_label(c), "tcp:127.0.0.1:"));
	chr_close(c);
	free(f);
	free(g);
}

static void test_pty(void **state)
{
	struct loop *l = *state;
	struct front *f = new_front(l);
	char buf[16];
	struct chardev *c = open_chr(f, "pty,id=p");
	const char *name = strstr(chr_label(c), "/dev/pts/");
	assert_non_null(name);
	for (int i = 0; i < 3000; i++)
		assert_int_equal(put(c, "nobody there"), 12);
	run(l, 10);
	int fd = open(name, O_RDWR | O_NOCTTY);
	run(l, 300);
	assert_int_equal(f->opened, 1);
	assert_int_equal(write(fd, "in\r", 3), 3);
	assert_int_equal(put(c, "out"), 3);
	run(l, 20);
	assert_memory_equal(f->in, "in\r", 3);
	assert_int_equal(read(fd, buf, sizeof buf), 3);
	close(fd);
	run(l, 20);
	assert_int_equal(f->closed, 1);
	chr_close(c);
	free(f);
}

static int saved[2];
static void redirect(int in, int out)
{
	fflush(stdout);
	saved[0] = dup(0);
	saved[1] = dup(1);
	dup2(in, 0);
	dup2(out, 1);
}

static void undo_redirect(void)
{
	for (int i = 0; i < 2; i++) {
		dup2(saved[i], i);
		close(saved[i]);
	}
}

static void test_stdio_eof(void **state)
{
	struct loop *l = *state;
	static const char *const sources[] = { "pipe", "file", "null" };
	for (int i = 0; i < 3; i++) {
		struct front *f = new_front(l);
		int p[2], out[2], in;
		assert_int_equal(pipe(out), 0);
		snprintf(path, sizeof path, "%s/stdin", dir);
		if (i == 0) {
			assert_int_equal(pipe(p), 0);
			assert_int_equal(write(p[1], "uname -a\n", 9), 9);
			close(p[1]);
			in = p[0];
		} else if (i == 1) {
			in = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
			assert_int_equal(write(in, "uname -a\n", 9), 9);
			lseek(in, 0, SEEK_SET);
		} else {
			in = open("/dev/null", O_RDONLY);
		}
		redirect(in, out[1]);
		struct chardev *c = open_chr(f, "stdio,id=c,mux=on,signal=off");
		chr_on_eof(c, eof, f);
		f->can = 4;             /* the end comes after the last byte was taken */
		run(l, 20);
		int early = f->eof;
		f->can = 100;
		chr_accept_input(c);
		run(l, 20);
		size_t put_n = put(c, "answer");
		chr_close(c);
		undo_redirect();
		char buf[16] = { 0 };
		assert_int_equal(put_n, 6);
		assert_int_equal(read(out[0], buf, sizeof buf), 6);
		assert_int_equal(early, i == 2);
		assert_int_equal(f->eof, 1);
		if (i < 2)
			assert_memory_equal(f->in, "uname -a\n", 9);
		if (strcmp(sources[i], "file") == 0)
			unlink(path);
		close(in);
		close(out[0]);
		close(out[1]);
		free(f);
	}
}

static void test_terminal_and_mux(void **state)
{
	struct loop *l = *state;
	struct front *f = new_front(l), *g = new_front(l);
	struct termios before, during, after;
	int master, slave;
	char screen[4096] = { 0 };
	assert_int_equal(openpty(&master, &slave, NULL, NULL, NULL), 0);
	tcgetattr(slave, &before);
	redirect(slave, slave);
	struct chardev *c = open_chr(f, "stdio,id=c,mux=on,signal=off");
	struct chr_client cl = { can_receive, receive, event, g };
	int second = chr_attach(c, &cl, "monitor", NULL);
	struct chr_env env = { l, quit, f };
	struct chardev *d;
	struct err e = { 0 };
	int twice = chr_open(&d, "stdio,id=again", &env, &e);
	tcgetattr(slave, &during);
	static const char typed[] = "a\x01\x01" "b\x01" "bc\x01" "cd\x01" "ce\x01h\x01q";
	ssize_t w = write(master, typed, sizeof typed - 1);
	run(l, 30);
	f->can = 0;             /* a stuck guest: Ctrl-A x works all the same */
	for (int i = 0; i < 60; i++) {
		w += write(master, "0123456789012345678901234567890123456789", 40);
		run(l, 1);
	}
	w += write(master, "\x01x", 2);
	run(l, 30);
	chr_close(c);
	tcgetattr(slave, &after);
	undo_redirect();
	fcntl(master, F_SETFL, O_NONBLOCK);
	ssize_t n = read(master, screen, sizeof screen - 1);
	assert_int_equal(second, 0);
	assert_int_equal(twice, -EBUSY);
	assert_non_null(strstr(e.msg, "mux=on"));
	assert_int_equal(during.c_lflag & (ICANON | ECHO | ISIG), 0);
	assert_true(after.c_lflag == before.c_lflag && after.c_iflag == before.c_iflag);
	assert_int_equal(f->breaks, 1);
	assert_memory_equal(f->in, "a\x01" "bce", 5);
	assert_memory_equal(g->in, "d", 1);
	assert_int_equal(f->quit, 1);
	assert_true(n > 0 && w > 0);
	assert_non_null(strstr(screen, "C-a x"));
	assert_non_null(strstr(screen, "[monitor]"));
	close(master);
	close(slave);
	free(f);
	free(g);
}

static void test_errors(void **state)
{
	struct loop *l = *state;
	static const char *const bad[][2] = {
		{ "", "no kind" }, { "serial,path=/dev/ttyS0", "not supported yet" }, { "parport,path=x", "not supported yet" }, { "nonsense", "no such kind" },
		{ "file,id=f", "path=" }, { "file,path=/nonexistent/x", "/nonexistent/x" }, { "socket,id=s", "path=" },
		{ "socket,path=/nonexistent", "cannot connect" }, { "socket,path=/x,telnet=on", "telnet" }, { "null,mux=perhaps", "mux" },
		{ "socket,path=/x,srever=on", "cannot connect" }, { "null,idd=x", "unknown option 'idd'" }, { "ringbuf,size=100", "power of two" }, { "pipe,path=/nonexistent", "mkfifo" },
		{ "socket,host=127.0.0.1,port=1,reconnect=x", "reconnect" },
	};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct chr_env env = { .loop = l };
		struct chardev *c;
		struct err e = { 0 };
		assert_true(chr_open(&c, bad[i][0], &env, &e) < 0);
		if (!strstr(e.msg, bad[i][1]))
			fail_msg("%s: %s", bad[i][0], e.msg);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_simple), cmocka_unit_test(test_pipe_backpressure), cmocka_unit_test(test_socket), cmocka_unit_test(test_pty),
		cmocka_unit_test(test_stdio_eof), cmocka_unit_test(test_terminal_and_mux), cmocka_unit_test(test_errors),
	};
	struct loop *l;
	if (loop_create(&l, NULL) || !mkdtemp(dir))
		return 77;
	int r = 0;
	struct CMUnitTest one[ARRAY_SIZE(tests)];
	for (size_t i = 0; i < ARRAY_SIZE(tests); i++) {
		one[i] = tests[i];
		one[i].initial_state = l;
	}
	r = cmocka_run_group_tests(one, NULL, NULL);
	loop_destroy(l);
	rmdir(dir);
	return r;
}
