/* The options of -netdev user. */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/parse.h"
#include "base/util.h"
#include "net/user.h"

static int get_ip(struct optlist *o, const char *key, struct in_addr *a, struct err *err)
{
	const char *s = optlist_get(o, key);
	if (s && !inet_aton(s, a))
		return err_set(err, -EINVAL, "-netdev user: %s='%s' is no IPv4 address", key, s);
	return 0;
}

static int get_ip6(struct optlist *o, const char *key, struct in6_addr *a, struct err *err)
{
	const char *s = optlist_get(o, key);
	if (s && inet_pton(AF_INET6, s, a) != 1)
		return err_set(err, -EINVAL, "-netdev user: %s='%s' is no IPv6 address", key, s);
	return 0;
}

/* "10.0.2.0/24", "10.0.2.0/255.255.255.0", or the class's mask without one. */
static int parse_net(const char *s, struct in_addr *net, struct in_addr *mask, struct err *err)
{
	char text[64];
	snprintf(text, sizeof text, "%s", s);
	char *slash = strchr(text, '/');
	uint64_t bits = 0;
	if (slash)
		*slash++ = 0;
	if (!inet_aton(text, net))
		return err_set(err, -EINVAL, "-netdev user: net='%s' is no IPv4 network; valid: 10.0.2.0/24", s);
	uint32_t a = ntohl(net->s_addr), m;
	if (!slash)
		m = a >> 31 == 0 ? 0xff000000 : a >> 30 == 2 ? 0xffff0000 : 0xffffff00;
	else if (!parse_u64(slash, &bits) && bits >= 4 && bits <= 30)
		m = ~0u << (32 - bits);
	else if (strchr(slash, '.') && inet_aton(slash, mask))
		m = ntohl(mask->s_addr);
	else
		return err_set(err, -EINVAL, "-netdev user: net='%s': the mask must be 4 to 30 bits or an address", s);
	mask->s_addr = htonl(m);
	net->s_addr &= mask->s_addr;
	return 0;
}

static int inside(const SlirpConfig *c, struct in_addr a, const char *key, struct err *err)
{
	char text[INET_ADDRSTRLEN];
	if ((a.s_addr & c->vnetmask.s_addr) == c->vnetwork.s_addr)
		return 0;
	return err_set(err, -EINVAL, "-netdev user: %s=%s is outside of net=", key, inet_ntop(AF_INET, &a, text, sizeof text));
}

static int parse_ipv4(SlirpConfig *c, struct optlist *o, struct err *err)
{
	const char *net = optlist_get(o, "net");
	c->vnetwork.s_addr = htonl(0x0a000200);
	c->vnetmask.s_addr = htonl(0xffffff00);
	int r = net ? parse_net(net, &c->vnetwork, &c->vnetmask, err) : 0;
	uint32_t base = ntohl(c->vnetwork.s_addr), size = ~ntohl(c->vnetmask.s_addr);
	c->vhost.s_addr = htonl(base | (2 & size));
	c->vnameserver.s_addr = htonl(base | (3 & size));
	c->vdhcp_start.s_addr = htonl(base | (15 & size));
	if (!r)
		r = get_ip(o, "host", &c->vhost, err);
	if (!r)
		r = get_ip(o, "dns", &c->vnameserver, err);
	if (!r)
		r = get_ip(o, "dhcpstart", &c->vdhcp_start, err);
	if (!r)
		r = inside(c, c->vhost, "host", err);
	if (!r && !c->restricted)
		r = inside(c, c->vnameserver, "dns", err);
	if (!r)
		r = inside(c, c->vdhcp_start, "dhcpstart", err);
	if (!r && (c->vhost.s_addr == c->vnameserver.s_addr || c->vdhcp_start.s_addr == c->vhost.s_addr ||
		   c->vdhcp_start.s_addr == c->vnameserver.s_addr))
		r = err_set(err, -EINVAL, "-netdev user: host, dns and dhcpstart must be different addresses");
	return r;
}

static int parse_ipv6(SlirpConfig *c, struct optlist *o, struct err *err)
{
	uint64_t len = 64;
	const char *net = optlist_get(o, "ipv6-net");
	char text[64];
	inet_pton(AF_INET6, "fec0::", &c->vprefix_addr6);
	int r = get_ip6(o, "ipv6-prefix", &c->vprefix_addr6, err);
	if (!r)
		r = optlist_u64(o, "ipv6-prefixlen", 126, &len, err);
	if (!r && net) {
		snprintf(text, sizeof text, "%s", net);
		char *slash = strchr(text, '/');
		if (slash)
			*slash++ = 0;
		if (inet_pton(AF_INET6, text, &c->vprefix_addr6) != 1 || (slash && (parse_u64(slash, &len) || len > 126)))
			r = err_set(err, -EINVAL, "-netdev user: ipv6-net='%s' is no IPv6 network; valid: fec0::/64", net);
	}
	c->vprefix_len = (uint8_t)len;
	c->vhost6 = c->vnameserver6 = c->vprefix_addr6;
	c->vhost6.s6_addr[15] |= 2;
	c->vnameserver6.s6_addr[15] |= 3;
	if (!r)
		r = get_ip6(o, "ipv6-host", &c->vhost6, err);
	if (!r)
		r = get_ip6(o, "ipv6-dns", &c->vnameserver6, err);
	return r;
}

static int check_tftp(const char *dir, struct err *err)
{
	struct stat st;
	if (dir && (stat(dir, &st) || !S_ISDIR(st.st_mode)))
		return err_set(err, -ENOTDIR, "-netdev user: tftp='%s' is no directory", dir);
	return 0;
}

int user_parse(struct user_config *cfg, struct optlist *o, struct err *err)
{
	SlirpConfig *c = &cfg->c;
	bool restricted = false, v4 = true, v6 = true;
	const char *s;
	size_t n = 0;
	memset(cfg, 0, sizeof *cfg);
	c->version = 3;
	if (optlist_get(o, "ipv6") && !optlist_get(o, "ipv4"))
		v4 = false;             /* as QEMU: asking for one alone leaves the other out */
	if (optlist_get(o, "ipv4") && !optlist_get(o, "ipv6"))
		v6 = false;
	int r = optlist_bool(o, "restrict", &restricted, err);
	if (!r)
		r = optlist_bool(o, "ipv4", &v4, err);
	if (!r)
		r = optlist_bool(o, "ipv6", &v6, err);
	if (!r && optlist_get(o, "ipv4") && !optlist_get(o, "ipv6"))
		v6 = !v4;
	if (!r && optlist_get(o, "ipv6") && !optlist_get(o, "ipv4"))
		v4 = !v6;
	if (!r && !v4 && !v6)
		r = err_set(err, -EINVAL, "-netdev user: ipv4=off and ipv6=off leave nothing");
	c->restricted = restricted;
	c->in_enabled = v4;
	c->in6_enabled = v6;
	if (!r && optlist_get(o, "smb"))
		r = err_set(err, -ENOTSUP, "-netdev user: smb= is not supported yet");
	if (!r)
		r = parse_ipv4(c, o, err);
	if (!r)
		r = parse_ipv6(c, o, err);
	c->vhostname = optlist_get(o, "hostname");
	c->vdomainname = optlist_get(o, "domainname");
	c->bootfile = optlist_get(o, "bootfile");
	c->tftp_path = optlist_get(o, "tftp");
	c->tftp_server_name = optlist_get(o, "tftp-server-name");
	for (size_t pos = 0; (s = optlist_next(o, "dnssearch", &pos)) && n < USER_SEARCH_MAX;)
		cfg->search[n++] = s;
	if (n)
		c->vdnssearch = cfg->search;
	return r ? r : check_tftp(c->tftp_path, err);
}

/* --- forwards --- */

/* Cut *s at the next `sep`; NULL when there is none. */
static char *cut(char **s, char sep)
{
	char *start = *s, *p = strchr(start, sep);
	if (!p)
		return NULL;
	*p = 0;
	*s = p + 1;
	return start;
}

static bool get_port(const char *s, uint64_t min, int *port)
{
	uint64_t v;
	if (!s || parse_u64(s, &v) || v < min || v > 65535)
		return false;
	*port = (int)v;
	return true;
}

/* [tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport */
static int add_hostfwd(struct user *u, const char *rule, struct err *err)
{
	char text[256], *s = text;
	struct in_addr host = { INADDR_ANY }, guest = { 0 };
	int hport, gport;
	snprintf(text, sizeof text, "%s", rule);
	char *proto = cut(&s, ':'), *haddr = proto ? cut(&s, ':') : NULL, *hp = haddr ? cut(&s, '-') : NULL;
	char *gaddr = hp ? cut(&s, ':') : NULL;
	bool udp = proto && !strcmp(proto, "udp");
	if (!gaddr || (*proto && !udp && strcmp(proto, "tcp")) || (*haddr && !inet_aton(haddr, &host)) || !get_port(hp, 0, &hport) ||
	    (*gaddr && !inet_aton(gaddr, &guest)) || !get_port(s, 1, &gport))
		return err_set(err, -EINVAL, "-netdev user: hostfwd='%s' is not valid; valid: "
			       "[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport", rule);
	if (!u->lib->slirp_add_hostfwd(u->slirp, udp, host, hport, guest, gport))
		return 0;
	int e = errno;
	return err_set(err, -e, "-netdev user: hostfwd='%s': %s port %d: %s%s", rule, udp ? "udp" : "tcp", hport, strerror(e),
		       e == EADDRINUSE ? "; choose another host port" : e == EACCES ? "; ports below 1024 need privileges" : "");
}

static int connect_tcp(const char *host, const char *port, const char *rule, struct err *err)
{
	struct addrinfo hint = { .ai_socktype = SOCK_STREAM }, *res;
	int r = parse_port_ok(port) ? getaddrinfo(host, port, &hint, &res) : EAI_SERVICE;
	if (r)
		return err_set(err, -EINVAL, "-netdev user: guestfwd='%s': %s", rule, gai_strerror(r));
	int fd = socket(res->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || connect(fd, res->ai_addr, res->ai_addrlen)) {
		r = err_set_errno(err, -errno, "-netdev user: guestfwd='%s'", rule);
		if (fd >= 0)
			close(fd);
		fd = r;
	}
	freeaddrinfo(res);
	return fd;
}

/* [tcp]:server:port-cmd:command or [tcp]:server:port-tcp:host:port */
static int add_guestfwd(struct user *u, const char *rule, struct err *err)
{
	char text[1024], *s = text;
	struct in_addr addr;
	int port, r;
	snprintf(text, sizeof text, "%s", rule);
	char *proto = cut(&s, ':'), *server = proto ? cut(&s, ':') : NULL, *p = server ? cut(&s, '-') : NULL;
	char *kind = p ? cut(&s, ':') : NULL;
	if (!kind || (*proto && strcmp(proto, "tcp")) || !inet_aton(server, &addr) || !get_port(p, 1, &port) || !*s)
		return err_set(err, -EINVAL, "-netdev user: guestfwd='%s' is not valid; valid: [tcp]:server:port-cmd:COMMAND or "
			       "[tcp]:server:port-tcp:host:port", rule);
	if (!strcmp(kind, "cmd")) {
		r = u->lib->slirp_add_exec(u->slirp, s, &addr, port);
		return r < 0 ? err_set(err, -EINVAL, "-netdev user: guestfwd='%s': address or port is taken or outside of net=", rule) : 0;
	}
	char *host = !strcmp(kind, "tcp") ? cut(&s, ':') : NULL;
	if (!host)
		return err_set(err, -ENOTSUP, "-netdev user: guestfwd='%s': '%s' is not supported yet; valid: cmd:COMMAND, tcp:host:port",
			       rule, kind);
	int fd = connect_tcp(host, s, rule, err);
	return fd < 0 ? fd : user_guestfwd_fd(u, addr, port, fd, err);
}

int user_add_forwards(struct user *u, struct optlist *o, struct err *err)
{
	const char *s;
	int r = 0;
	for (size_t pos = 0; !r && (s = optlist_next(o, "hostfwd", &pos));)
		r = add_hostfwd(u, s, err);
	for (size_t pos = 0; !r && (s = optlist_next(o, "guestfwd", &pos));)
		r = add_guestfwd(u, s, err);
	return r;
}
