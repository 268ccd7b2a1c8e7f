/*
 * The server's handshake. The client is hostile: an option is read only when it is short (OPT_MAX), longer ones are skipped and
 * refused, names are bounded, and the whole of it has to end within HANDSHAKE_MS.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "block/nbd_priv.h"

enum { OPT_MAX = 64 * 1024, OPT_SKIP_MAX = 32 << 20, OPTS_MAX = 10000, HANDSHAKE_MS = 30000, TLS_MS = 10000 };

static int reply(struct nbd_client *c, uint32_t opt, uint32_t type, const void *data, uint32_t len)
{
	struct nbd_opt_reply h = { htobe64(NBD_OPT_REPLY_MAGIC), htobe32(opt), htobe32(type), htobe32(len) };
	struct iovec v[2] = { { &h, sizeof h }, { (void *)(uintptr_t)data, len } };
	return nbd_send_iov(&c->chan, v, len ? 2 : 1);
}

static int refuse(struct nbd_client *c, uint32_t opt, uint32_t type, const char *fmt, ...) __attribute__((format(printf, 4, 5)));
static int refuse(struct nbd_client *c, uint32_t opt, uint32_t type, const char *fmt, ...)
{
	char text[512];
	va_list ap;
	va_start(ap, fmt);
	int n = vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	return reply(c, opt, type, text, (uint32_t)MIN(n, (int)sizeof text - 1));
}

/* --- reading an option's data --- */
struct opt { const uint8_t *p; uint32_t left; };

static bool get_u32(struct opt *o, uint32_t *v)
{
	if (o->left < 4)
		return false;
	*v = nbd_get32(o->p);
	o->p += 4;
	o->left -= 4;
	return true;
}

static bool get_string(struct opt *o, const char **s, uint32_t *len)
{
	if (!get_u32(o, len) || *len > NBD_NAME_MAX || *len > o->left)
		return false;
	*s = (const char *)o->p;
	o->p += *len;
	o->left -= *len;
	return true;
}

/* --- options --- */

static int list(struct nbd_client *c, uint32_t len)
{
	if (len)
		return refuse(c, NBD_OPT_LIST, NBD_REP_INVALID, "NBD_OPT_LIST takes no data");
	const struct nbd_ex *ex;
	int r = 0;
	for (unsigned i = 0; !r && (ex = nbd_server_at(c->s, i)); i++) {
		const struct nbd_export *e = &ex->e;
		size_t n = strlen(e->name), d = e->desc ? strlen(e->desc) : 0;
		uint8_t buf[4 + 2 * NBD_NAME_MAX];
		nbd_put32(buf, (uint32_t)n);
		memcpy(buf + 4, e->name, n);
		if (d)
			memcpy(buf + 4 + n, e->desc, d);
		r = reply(c, NBD_OPT_LIST, NBD_REP_SERVER, buf, (uint32_t)(4 + n + d));
	}
	return r ? r : reply(c, NBD_OPT_LIST, NBD_REP_ACK, NULL, 0);
}

static int send_info(struct nbd_client *c, uint32_t opt, uint16_t type, const void *data, size_t len)
{
	uint8_t buf[2 + NBD_NAME_MAX];
	nbd_put16(buf, type);
	memcpy(buf + 2, data, len);
	return reply(c, opt, NBD_REP_INFO, buf, (uint32_t)(2 + len));
}

static uint16_t flags_of(const struct nbd_client *c, const struct nbd_ex *ex)
{
	return ex->flags | (c->structured ? NBD_SEND_DF : 0);
}

/* A description is sent unasked, as QEMU does: clients show it, and few ask. */
static int send_infos(struct nbd_client *c, uint32_t opt, const struct nbd_ex *ex, bool name)
{
	uint8_t b[12];
	int r = name ? send_info(c, opt, NBD_INFO_NAME, ex->e.name, strlen(ex->e.name)) : 0;
	if (!r && ex->e.desc)
		r = send_info(c, opt, NBD_INFO_DESCRIPTION, ex->e.desc, strlen(ex->e.desc));
	nbd_put32(b, 1); /* any alignment is served */
	nbd_put32(b + 4, 4096);
	nbd_put32(b + 8, NBD_PAYLOAD_MAX);
	if (!r)
		r = send_info(c, opt, NBD_INFO_BLOCK_SIZE, b, 12);
	nbd_put64(b, ex->e.len);
	nbd_put16(b + 8, flags_of(c, ex));
	if (!r)
		r = send_info(c, opt, NBD_INFO_EXPORT, b, 10);
	return r ? r : reply(c, opt, NBD_REP_ACK, NULL, 0);
}

/* 1: GO, the handshake is over. */
static int info_or_go(struct nbd_client *c, uint32_t opt, struct opt o)
{
	const char *s;
	uint32_t n;
	bool name = false;
	if (!get_string(&o, &s, &n) || o.left < 2 || nbd_get16(o.p) * 2u != o.left - 2)
		return refuse(c, opt, NBD_REP_INVALID, "malformed option");
	for (uint32_t i = 2; i < o.left; i += 2)
		name |= nbd_get16(o.p + i) == NBD_INFO_NAME;
	struct nbd_ex *ex = nbd_server_find(c->s, s, n);
	if (!ex)
		return refuse(c, opt, NBD_REP_UNKNOWN, "export '%.*s' not present", (int)MIN(n, 256u), s);
	int r = send_infos(c, opt, ex, name);
	if (r || opt == NBD_OPT_INFO)
		return r;
	c->ex = ex;
	return 1;
}

/* "base:allocation"; when listing, "base:" and "" too. */
static bool matches(const char *context, const char *q, uint32_t n, bool listing)
{
	size_t len = strlen(context);
	if (n == len && !memcmp(context, q, n))
		return true;
	if (!listing)
		return false;
	const char *colon = strchr(context, ':');
	return !n || (n == (size_t)(colon - context) + 1 && !memcmp(context, q, n)) ||
	       (!strncmp(context, "qemu:dirty-bitmap:", 18) && n == 18 && !memcmp(context, q, n));
}

static bool context_name(const struct nbd_ex *ex, unsigned i, char name[1100])
{
	if (i == CTX_BITMAP && ex->e.bitmap)
		snprintf(name, 1100, "qemu:dirty-bitmap:%s", ex->e.bitmap);
	else
		strcpy(name, i == CTX_ALLOCATION ? "base:allocation" : "qemu:allocation-depth");
	return i == CTX_ALLOCATION || (i == CTX_DEPTH && ex->e.depth) || (i == CTX_BITMAP && ex->e.bitmap);
}

static int contexts(struct nbd_client *c, uint32_t opt, struct opt o)
{
	const char *s;
	uint32_t n, queries;
	bool listing = opt == NBD_OPT_LIST_META, want[CTX_N] = { false };
	char name[1100];
	if (!c->structured)
		return refuse(c, opt, NBD_REP_INVALID, "request option '%s' when structured reply is not negotiated",
			      listing ? "list meta context" : "set meta context");
	if (!listing) {
		memset(c->ctx, 0, sizeof c->ctx);
		c->ctx_of = NULL;
	}
	if (!get_string(&o, &s, &n))
		return refuse(c, opt, NBD_REP_INVALID, "malformed option");
	const struct nbd_ex *ex = nbd_server_find(c->s, s, n);
	if (!ex)
		return refuse(c, opt, NBD_REP_UNKNOWN, "export '%.*s' not present", (int)MIN(n, 256u), s);
	if (!get_u32(&o, &queries))
		return refuse(c, opt, NBD_REP_INVALID, "malformed option");
	for (unsigned i = 0; listing && !queries && i < CTX_N; i++)
		want[i] = true;
	for (uint32_t k = 0; k < queries; k++) {
		if (!get_string(&o, &s, &n))
			return refuse(c, opt, NBD_REP_INVALID, "malformed option");
		for (unsigned i = 0; i < CTX_N; i++)
			want[i] |= context_name(ex, i, name) && matches(name, s, n, listing);
	}
	if (o.left)
		return refuse(c, opt, NBD_REP_INVALID, "malformed option");
	for (unsigned i = 0; i < CTX_N; i++) {
		uint8_t buf[1104];
		if (!want[i] || !context_name(ex, i, name))
			continue;
		nbd_put32(buf, listing ? 0 : i);
		memcpy(buf + 4, name, strlen(name));
		int r = reply(c, opt, NBD_REP_META, buf, (uint32_t)(4 + strlen(name)));
		if (r)
			return r;
		if (!listing)
			c->ctx[i] = true;
	}
	if (!listing)
		c->ctx_of = ex;
	return reply(c, opt, NBD_REP_ACK, NULL, 0);
}

/* No error can be reported here: the connection ends. */
static int export_name(struct nbd_client *c, const uint8_t *data, uint32_t len, bool zeroes)
{
	uint8_t b[10 + 124] = { 0 };
	struct nbd_ex *ex = nbd_server_find(c->s, (const char *)data, len);
	if (!ex)
		return -ENOENT;
	nbd_put64(b, ex->e.len);
	nbd_put16(b + 8, flags_of(c, ex));
	c->ex = ex;
	int r = nbd_send(&c->chan, b, zeroes ? sizeof b : 10);
	return r ? r : 1;
}

static int start_tls(struct nbd_client *c, uint32_t len)
{
	struct err err = { 0 };
	if (len)
		return refuse(c, NBD_OPT_STARTTLS, NBD_REP_INVALID, "STARTTLS takes no data");
	if (!c->s->o.tls)
		return refuse(c, NBD_OPT_STARTTLS, NBD_REP_POLICY, "TLS not configured");
	if (c->chan.tls)
		return refuse(c, NBD_OPT_STARTTLS, NBD_REP_INVALID, "TLS already enabled");
	int r = reply(c, NBD_OPT_STARTTLS, NBD_REP_ACK, NULL, 0);
	if (!r && nbd_pending(&c->chan))
		r = -EPROTO; /* plain text that would count as protected */
	if (!r)
		r = tls_start(&c->chan.tls, c->s->o.tls, c->chan.fd, NULL, c->s->o.authz, TLS_MS, &err);
	if (r && err.msg[0])
		log_guest("NBD: %s", err.msg);
	return r;
}

/* 0: go on, 1: an export was chosen, else the end. */
static int option(struct nbd_client *c, uint32_t opt, const uint8_t *data, uint32_t len, bool zeroes)
{
	struct opt o = { data, len };
	if (c->s->o.tls && !c->chan.tls && opt != NBD_OPT_STARTTLS && opt != NBD_OPT_ABORT) {
		if (opt == NBD_OPT_EXPORT_NAME)
			return -EACCES;
		return refuse(c, opt, NBD_REP_TLS_REQD, "Option 0x%x not permitted before TLS", opt);
	}
	switch (opt) {
	case NBD_OPT_EXPORT_NAME:
		return export_name(c, data, len, zeroes);
	case NBD_OPT_ABORT:
		reply(c, opt, NBD_REP_ACK, NULL, 0);
		return -ECONNABORTED;
	case NBD_OPT_LIST:
		return list(c, len);
	case NBD_OPT_STARTTLS:
		return start_tls(c, len);
	case NBD_OPT_INFO:
	case NBD_OPT_GO:
		return info_or_go(c, opt, o);
	case NBD_OPT_STRUCTURED_REPLY:
		if (len)
			return refuse(c, opt, NBD_REP_INVALID, "NBD_OPT_STRUCTURED_REPLY takes no data");
		if (c->structured)
			return refuse(c, opt, NBD_REP_INVALID, "structured reply already negotiated");
		c->structured = true;
		return reply(c, opt, NBD_REP_ACK, NULL, 0);
	case NBD_OPT_LIST_META:
	case NBD_OPT_SET_META:
		return contexts(c, opt, o);
	}
	return refuse(c, opt, NBD_REP_UNSUP, "Unsupported option %u", opt);
}

static int one_option(struct nbd_client *c, uint8_t *data, bool zeroes)
{
	struct nbd_opt_head h;
	int r = nbd_recv(&c->chan, &h, sizeof h);
	if (r)
		return r;
	uint32_t len = be32toh(h.len), opt = be32toh(h.opt);
	if (be64toh(h.magic) != NBD_OPT_MAGIC || len > OPT_SKIP_MAX)
		return -EPROTO;
	if (len > OPT_MAX || (opt == NBD_OPT_EXPORT_NAME && len > NBD_NAME_MAX)) {
		r = nbd_skip(&c->chan, len);
		return r ? r : opt == NBD_OPT_EXPORT_NAME ? -EPROTO : refuse(c, opt, NBD_REP_TOO_BIG, "option is too long");
	}
	r = nbd_recv(&c->chan, data, len);
	return r ? r : option(c, opt, data, len, zeroes);
}

int nbd_talk(struct nbd_client *c)
{
	uint8_t b[18], *data = malloc(OPT_MAX);
	c->chan.deadline = nbd_now_ms() + HANDSHAKE_MS;
	nbd_put64(b, NBD_INIT_MAGIC);
	nbd_put64(b + 8, NBD_OPT_MAGIC);
	nbd_put16(b + 16, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
	int r = data ? nbd_send(&c->chan, b, 18) : -ENOMEM;
	if (!r)
		r = nbd_recv(&c->chan, b, 4);
	uint32_t flags = r ? 0 : nbd_get32(b);
	if (!r && (!(flags & NBD_FIXED_NEWSTYLE) || flags & ~3u))
		r = -EPROTO;
	for (unsigned i = 0; !r && i < OPTS_MAX; i++)
		r = one_option(c, data, !(flags & NBD_NO_ZEROES));
	free(data);
	c->chan.deadline = 0;
	if (r > 0 && c->ctx_of != c->ex)
		memset(c->ctx, 0, sizeof c->ctx);
	return r > 0 ? 0 : r ? r : -EPROTO;
}
