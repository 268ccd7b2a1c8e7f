/* libslirp through net_send() and receive(): ARP, DHCP, a forwarded port; back-pressure; option errors. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/util.h"
#include "loop/loop.h"
#include "net/net.h"

struct guest {
	struct loop *l;
	struct net_backend *n;
	uint8_t want;           /* 'a' ARP reply, 'd' DHCP offer, 's' TCP SYN */
	bool refuse;
	int refused, got;
	uint8_t frame[2048];
	size_t len;
};

static bool matches(char want, const uint8_t *f, size_t len)
{
	if (want == 'a')
		return len >= 42 && f[12] == 8 && f[13] == 6 && f[21] == 2;
	if (want == 'd')
		return len > 286 && f[12] == 8 && f[23] == 17 && f[36] == 0 && f[37] == 68;
	return len >= 54 && f[12] == 8 && f[13] == 0 && f[23] == 6 && f[47] & 2;
}

static bool receive(void *opaque, const void *frame, size_t len)
{
	struct guest *g = opaque;
	if (g->refuse) {
		g->refused++;
		return false;
	}
	if (!matches((char)g->want, frame, len))
		return true;
	memcpy(g->frame, frame, MIN(len, sizeof g->frame));
	g->len = len;
	g->got++;
	loop_stop(g->l, 0);
	return true;
}

static void too_late(void *opaque)
{
	loop_stop(opaque, 1);
}

static int run(struct guest *g, uint64_t ms)
{
	struct timer t;
	timer_init(&t, clock_host(g->l), too_late, g->l);
	timer_arm(&t, clock_now(clock_host(g->l)) + ms * 1000000);
	int r = loop_run(g->l);
	timer_stop(&t);
	return r;
}

static void open_guest(struct guest *g, const char *spec)
{
	struct err e = { 0 };
	struct net_client c = { .receive = receive, .opaque = g };
	memset(g, 0, sizeof *g);
	assert_int_equal(loop_create(&g->l, NULL), 0);
	if (net_open(&g->n, spec, g->l, &e)) {
		if (e.code == -ENOENT && strstr(e.msg, "libslirp0")) {
			print_message("%s\n", e.msg);
			_exit(77);
		}
		fail_msg("%s", e.msg);
	}
	assert_int_equal(net_attach(g->n, &c, "test", &e), 0);
	assert_int_equal(net_attach(g->n, &c, "other", &e), -EBUSY);
}

static void close_guest(struct guest *g)
{
	net_detach(g->n);
	net_close(g->n);
	loop_destroy(g->l);
}

static const uint8_t mac[6] = { 0x52, 0x54, 0, 1, 2, 3 };

static void arp(struct guest *g, const char *who)
{
	uint8_t f[60] = { 0 };
	struct in_addr a, me;
	memset(f, 0xff, 6);
	memcpy(f + 6, mac, 6);
	memcpy(f + 12, "\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01", 10);
	memcpy(f + 22, mac, 6);
	inet_aton("10.0.2.15", &me);
	inet_aton(who, &a);
	memcpy(f + 28, &me, 4);
	memcpy(f + 38, &a, 4);
	struct iovec v[2] = { { f, 20 }, { f + 20, 40 } };
	assert_int_equal(net_send(g->n, v, 2), 0);
}

static uint16_t ip_sum(const uint8_t *p, int n)
{
	uint32_t s = 0;
	for (int i = 0; i < n; i += 2)
		s += (uint32_t)p[i] << 8 | p[i + 1];
	while (s >> 16)
		s = (s & 0xffff) + (s >> 16);
	return (uint16_t)~s;
}

static void dhcp_discover(struct guest *g)
{
	uint8_t f[14 + 20 + 8 + 300] = { 0 };
	uint8_t *ip = f + 14, *udp = ip + 20, *b = udp + 8;
	memset(f, 0xff, 6);
	memcpy(f + 6, mac, 6);
	f[12] = 8;
	ip[0] = 0x45;
	ip[2] = 328 >> 8;
	ip[3] = 328 & 0xff;
	ip[8] = 64;
	ip[9] = 17;
	memset(ip + 16, 0xff, 4);
	uint16_t s = ip_sum(ip, 20);
	ip[10] = (uint8_t)(s >> 8);
	ip[11] = (uint8_t)s;
	udp[1] = 68;
	udp[3] = 67;
	udp[4] = 308 >> 8;
	udp[5] = 308 & 0xff;
	b[0] = b[1] = 1;
	b[2] = 6;
	memcpy(b + 28, mac, 6);
	memcpy(b + 236, "\x63\x82\x53\x63\x35\x01\x01\xff", 8);
	struct iovec v = { f, sizeof f };
	assert_int_equal(net_send(g->n, &v, 1), 0);
}

static void test_arp(void **state)
{
	struct guest g;
	open_guest(&g, "user,id=n0,ipv6=off");
	g.want = 'a';
	arp(&g, "10.0.2.2");
	assert_int_equal(run(&g, 3000), 0);
	assert_memory_equal(g.frame, mac, 6);
	assert_memory_equal(g.frame + 28, "\x0a\0\x02\x02", 4);
	close_guest(&g);
}

static void test_dhcp(void **state)
{
	struct guest g;
	open_guest(&g, "user,id=n0,net=192.168.76.0/24,dhcpstart=192.168.76.9,hostname=lodge,dnssearch=a.example,dnssearch=b.example");
	g.want = 'd';
	dhcp_discover(&g);
	assert_int_equal(run(&g, 3000), 0);
	assert_memory_equal(g.frame + 14 + 20 + 8 + 16, "\xc0\xa8\x4c\x09", 4);
	assert_non_null(memmem(g.frame, g.len, "lodge", 5));
	close_guest(&g);
}

static void test_refused_frames_come_again(void **state)
{
	struct guest g;
	open_guest(&g, "user,id=n0");
	g.want = 'a';
	g.refuse = true;
	arp(&g, "10.0.2.2");
	assert_int_equal(run(&g, 100), 1);
	assert_true(g.refused > 0);
	g.refuse = false;
	net_resume(g.n);
	net_resume(g.n);
	assert_int_equal(run(&g, 3000), 0);
	assert_int_equal(g.got, 1);
	close_guest(&g);
}

static void test_full_queue(void **state)
{
	struct guest g;
	uint8_t f[64] = { 0 };
	struct iovec v = { f, sizeof f };
	int r = 0, n = 0;
	open_guest(&g, "user,id=n0");
	while (!r && n < 10000) {
		r = net_send(g.n, &v, 1);
		n++;
	}
	assert_int_equal(r, -EAGAIN);
	v.iov_len = 10;
	assert_int_equal(net_send(g.n, &v, 1), -EINVAL);
	struct iovec huge[3] = { { f, SIZE_MAX / 2 }, { f, SIZE_MAX / 2 }, { f, 64 } };
	assert_int_equal(net_send(g.n, huge, 3), -EMSGSIZE);
	close_guest(&g);
}

static int free_port(int *fd)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof a;
	*fd = socket(AF_INET, SOCK_STREAM, 0);
	assert_int_equal(bind(*fd, (struct sockaddr *)&a, sizeof a), 0);
	assert_int_equal(listen(*fd, 1), 0);
	getsockname(*fd, (struct sockaddr *)&a, &len);
	return ntohs(a.sin_port);
}

static void test_hostfwd(void **state)
{
	struct guest g;
	char spec[128];
	int fd, port = free_port(&fd);
	close(fd);
	snprintf(spec, sizeof spec, "user,id=n0,hostfwd=tcp:127.0.0.1:%d-10.0.2.15:22,hostfwd=udp::0-:53", port);
	open_guest(&g, spec);
	g.want = 'a';
	arp(&g, "10.0.2.2"); /* slirp learns our address */
	assert_int_equal(run(&g, 3000), 0);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons((uint16_t)port) };
	fd = socket(AF_INET, SOCK_STREAM, 0);
	assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
	g.want = 's';
	assert_int_equal(run(&g, 3000), 0);
	assert_int_equal(g.frame[36] << 8 | g.frame[37], 22);
	close(fd);
	close_guest(&g);
}

static void test_errors(void **state)
{
	char busy[80];
	int fd, port = free_port(&fd);
	snprintf(busy, sizeof busy, "user,id=n,hostfwd=tcp:127.0.0.1:%d-:22", port);
	char portname[16];
	snprintf(portname, sizeof portname, "%d", port);
	const char *const bad[][2] = {
		{ busy, portname }, { "user,hostfwd=22", "hostfwd='22'" }, { "user,hostfwd=tcp::99999-:22", "hostfwd" },
		{ "user,hostfwd=sctp::1-:22", "[tcp|udp]" }, { "user,net=banana", "net='banana'" }, { "user,net=10.0.2.0/33", "mask" },
		{ "user,host=1.2.3.4", "outside" }, { "user,dns=10.0.2.2", "different" }, { "user,restrict=perhaps", "restrict" },
		{ "user,tftp=/nonexistent", "tftp" }, { "user,ipv4=off,ipv6=off", "nothing" }, { "user,hostfwdd=x", "did you mean 'hostfwd'" },
		{ "bridge,br=br0", "not supported yet" }, { "socket,listen=:1", "not supported yet" }, { "nonsense", "user, tap" },
		{ "", "no kind" }, { "tap,vhost=on", "vhost" }, { "tap,fd=0,ifname=x", "combined" }, { "tap,fd=99", "fd=99" },
		{ "tap,ifname=waytoolongforaninterface", "longer" }, { "user,guestfwd=tcp:10.0.2.100:80-vde:x", "not supported yet" },
		{ "user,smb=/", "smb" },
	};
	struct loop *l;
	assert_int_equal(loop_create(&l, NULL), 0);
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		struct net_backend *n;
		struct err e = { 0 };
		assert_true(net_open(&n, bad[i][0], l, &e) < 0);
		if (!strstr(e.msg, bad[i][1]))
			fail_msg("%s: %s", bad[i][0], e.msg);
	}
	loop_destroy(l);
	close(fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_arp), cmocka_unit_test(test_dhcp), cmocka_unit_test(test_refused_frames_come_again),
		cmocka_unit_test(test_full_queue), cmocka_unit_test(test_hostfwd), cmocka_unit_test(test_errors),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
