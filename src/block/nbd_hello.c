/*
 * The client's handshake: fixed newstyle only. The server is hostile: every length is bounded before anything is read, replies
 * must belong to the option that was sent, and the number of replies to one option is limited.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/util.h"
#include "block/nbd_hello.h"

enum { REPLY_MAX = 64 * 1024, REPLIES_MAX = 10000, EXPORTS_MAX = 4096, CONTEXTS_MAX = 256 };

static int proto(struct err *err, const char *what)
{
	return err_set(err, -EPROTO, "NBD server: %s", what);
}

static int lost(struct err *err, int r)
{
	if (r == -EPIPE || r == -ECONNRESET)
		return err_set(err, r, "NBD server closed the connection during the handshake");
	return err_set_errno(err, r, "NBD handshake");
}

struct reply { uint32_t type, len; char data[REPLY_MAX + 1]; };

static int send_opt(struct nbd_chan *c, uint32_t opt, const void *data, uint32_t len, struct err *err)
{
	struct nbd_opt_head h = { htobe64(NBD_OPT_MAGIC), htobe32(opt), htobe32(len) };
	struct iovec v[2] = { { &h, sizeof h }, { (void *)(uintptr_t)data, len } };
	int r = nbd_send_iov(c, v, len ? 2 : 1);
	return r ? lost(err, r) : 0;
}

static int get_reply(struct nbd_chan *c, uint32_t opt, struct reply *r, struct err *err)
{
	struct nbd_opt_reply h;
	int e = nbd_recv(c, &h, sizeof h);
	if (e)
		return lost(err, e);
	r->type = be32toh(h.type);
	r->len = be32toh(h.len);
	if (be64toh(h.magic) != NBD_OPT_REPLY_MAGIC || be32toh(h.opt) != opt)
		return proto(err, "unexpected reply to an option");
	if (r->len > REPLY_MAX)
		return proto(err, "reply to an option is too long");
	e = r->len ? nbd_recv(c, r->data, r->len) : 0;
	r->data[r->len] = '\0';
	return e ? lost(err, e) : 0;
}

/* An error reply in words. */
static int refused(const struct reply *r, const char *what, struct err *err)
{
	static const struct { uint32_t type; int e; const char *text; } known[] = {
		{ NBD_REP_UNSUP, -EINVAL, "is not supported by the server" }, { NBD_REP_POLICY, -EACCES, "denied by server policy" },
		{ NBD_REP_INVALID, -EINVAL, "the server calls it invalid" }, { NBD_REP_PLATFORM, -EINVAL, "the server's platform cannot" },
		{ NBD_REP_TLS_REQD, -EINVAL, "server requires TLS (give tls-creds)" }, { NBD_REP_UNKNOWN, -EINVAL, "Requested export not available" },
		{ NBD_REP_SHUTDOWN, -ESHUTDOWN, "the server is shutting down" }, { NBD_REP_BLOCK_SIZE_REQD, -EINVAL, "the server needs block sizes" },
		{ NBD_REP_TOO_BIG, -EINVAL, "too big for the server" },
	};
	const char *text = "unknown error";
	int e = -EINVAL;
	for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
		if (known[i].type == r->type) {
			text = known[i].text;
			e = known[i].e;
		}
	}
	char said[256];
	size_t n = 0;
	for (size_t i = 0; i < r->len && n < sizeof said - 1; i++)
		said[n++] = r->data[i] >= 0x20 && r->data[i] < 0x7f ? r->data[i] : ' ';
	said[n] = '\0';
	return err_set(err, e, "%s: %s%s%s", what, text, n ? "; server reported: " : "", said);
}

/* What both sides agreed on before any export. */
struct link { bool structured, no_zeroes; };

static int greeting(struct nbd_chan *c, struct link *l, struct err *err)
{
	uint8_t b[18], flags[4];
	int r = nbd_recv(c, b, 16);
	if (r)
		return lost(err, r);
	if (nbd_get64(b) != NBD_INIT_MAGIC)
		return err_set(err, -EINVAL, "Bad initial magic received: this is no NBD server");
	if (nbd_get64(b + 8) == NBD_OLD_MAGIC)
		return err_set(err, -ENOTSUP, "NBD server speaks the oldstyle protocol, which is not supported; start it with newstyle (for nbdkit: without -o)");
	if (nbd_get64(b + 8) != NBD_OPT_MAGIC)
		return proto(err, "bad server magic received");
	r = nbd_recv(c, b + 16, 2);
	if (r)
		return lost(err, r);
	unsigned f = nbd_get16(b + 16);
	if (!(f & NBD_FIXED_NEWSTYLE))
		return err_set(err, -ENOTSUP, "NBD server does not speak fixed newstyle, which is needed");
	l->no_zeroes = f & NBD_NO_ZEROES;
	nbd_put32(flags, NBD_FIXED_NEWSTYLE | (f & NBD_NO_ZEROES));
	r = nbd_send(c, flags, 4);
	return r ? lost(err, r) : 0;
}

/* An option without data: 1 acknowledged, 0 refused as unsupported, or an error. */
static int simple_opt(struct nbd_chan *c, uint32_t opt, const char *what, struct reply *rep, struct err *err)
{
	int r = send_opt(c, opt, NULL, 0, err);
	if (!r)
		r = get_reply(c, opt, rep, err);
	if (r)
		return r;
	if (rep->type == NBD_REP_ACK)
		return 1;
	if (rep->type & NBD_REP_ERROR)
		return rep->type == NBD_REP_UNSUP || rep->type == NBD_REP_POLICY || rep->type == NBD_REP_INVALID ? 0 : refused(rep, what, err);
	return proto(err, "unexpected kind of reply");
}

static int start_tls(struct nbd_chan *c, const struct nbd_config *cfg, const struct tls_creds *creds, struct reply *rep, struct err *err)
{
	const char *host = cfg->tls_hostname ? cfg->tls_hostname : cfg->host;
	int r = simple_opt(c, NBD_OPT_STARTTLS, "TLS negotiation", rep, err);
	if (r < 0)
		return r;
	if (!r)
		return refused(rep, "TLS negotiation", err);
	if (nbd_pending(c))
		return proto(err, "data before the TLS handshake");
	uint64_t now = nbd_now_ms(), left = c->deadline > now ? c->deadline - now : 0;
	return tls_start(&c->tls, creds, c->fd, host, NULL, (unsigned)left, err);
}

static int open_link(struct nbd_chan *c, const struct nbd_config *cfg, const struct tls_creds *creds, struct reply *rep, struct link *l,
		     struct err *err)
{
	int r = greeting(c, l, err);
	if (!r && creds)
		r = start_tls(c, cfg, creds, rep, err);
	if (r)
		return r;
	r = simple_opt(c, NBD_OPT_STRUCTURED_REPLY, "structured replies", rep, err);
	l->structured = r > 0;
	return r < 0 ? r : 0;
}

/* { u32 length, name } */
static uint32_t put_string(uint8_t *p, const char *s)
{
	uint32_t n = (uint32_t)strlen(s);
	nbd_put32(p, n);
	memcpy(p + 4, s, n);
	return n + 4;
}

static int set_context(struct nbd_chan *c, const char *export, const char *context, struct nbd_hello *h, struct reply *rep, struct err *err)
{
	uint8_t q[2 * NBD_NAME_MAX + 32];
	uint32_t n = put_string(q, export);
	nbd_put32(q + n, 1);
	n += 4;
	n += put_string(q + n, context);
	int r = send_opt(c, NBD_OPT_SET_META, q, n, err);
	for (unsigned i = 0; !r && i < 3; i++) {
		r = get_reply(c, NBD_OPT_SET_META, rep, err);
		if (r || rep->type == NBD_REP_ACK)
			return r;
		if (rep->type & NBD_REP_ERROR) /* it has none, or does not know the export: GO tells */
			return 0;
		if (rep->type != NBD_REP_META || rep->len < 4 || h->has_context || strcmp(rep->data + 4, context) ||
		    rep->len != 4 + strlen(context))
			return proto(err, "unexpected meta context");
		h->has_context = true;
		h->context = nbd_get32(rep->data);
	}
	return r ? r : proto(err, "too many meta contexts");
}

static bool pow2(uint32_t v)
{
	return v && !(v & (v - 1));
}

static int take_info(const struct reply *rep, struct nbd_hello *h, bool *seen, struct nbd_export_info *x, struct err *err)
{
	if (rep->len < 2)
		return proto(err, "short information");
	const char *d = rep->data + 2;
	switch (nbd_get16(rep->data)) {
	case NBD_INFO_EXPORT:
		if (rep->len != 12)
			return proto(err, "export information of the wrong length");
		h->size = nbd_get64(d);
		h->flags = nbd_get16(d + 8);
		*seen = true;
		if (h->size > INT64_MAX)
			return proto(err, "export is too big");
		return 0;
	case NBD_INFO_BLOCK_SIZE:
		if (rep->len != 14)
			return proto(err, "block sizes of the wrong length");
		h->min_block = nbd_get32(d);
		h->opt_block = nbd_get32(d + 4);
		h->max_block = nbd_get32(d + 8);
		if (!pow2(h->min_block) || h->min_block > 65536 || h->opt_block < h->min_block || h->max_block < h->min_block)
			return proto(err, "block sizes make no sense");
		h->max_block = ALIGN_DOWN(h->max_block, h->min_block);
		return 0;
	case NBD_INFO_DESCRIPTION:
		if (x && !x->desc && rep->len - 2 <= NBD_NAME_MAX)
			x->desc = strndup(d, rep->len - 2);
		return 0;
	}
	return 0; /* others are to be ignored */
}

/* GO or INFO with block sizes. 1: the server does not know the option. */
static int go(struct nbd_chan *c, uint32_t opt, const char *export, struct nbd_hello *h, struct nbd_export_info *x, struct reply *rep,
	      struct err *err)
{
	uint8_t q[NBD_NAME_MAX + 64];
	bool seen = false;
	uint32_t n = put_string(q, export);
	nbd_put16(q + n, x ? 2 : 1);
	nbd_put16(q + n + 2, NBD_INFO_BLOCK_SIZE);
	nbd_put16(q + n + 4, NBD_INFO_DESCRIPTION);
	int r = send_opt(c, opt, q, n + (x ? 6 : 4), err);
	for (unsigned i = 0; !r && i < REPLIES_MAX; i++) {
		r = get_reply(c, opt, rep, err);
		if (r)
			return r;
		if (rep->type == NBD_REP_UNSUP)
			return 1;
		if (rep->type & NBD_REP_ERROR)
			return refused(rep, opt == NBD_OPT_GO ? "NBD_OPT_GO" : "NBD_OPT_INFO", err);
		if (rep->type == NBD_REP_ACK)
			return seen ? 0 : proto(err, "no size of the export");
		r = rep->type == NBD_REP_INFO ? take_info(rep, h, &seen, x, err) : proto(err, "unexpected kind of reply");
	}
	return r ? r : proto(err, "too many replies");
}

/* NBD_OPT_EXPORT_NAME: the only way with servers from before GO. No error can be reported: they hang up. */
static int export_name(struct nbd_chan *c, const char *export, const struct link *l, struct nbd_hello *h, struct err *err)
{
	uint8_t b[134];
	int r = send_opt(c, NBD_OPT_EXPORT_NAME, export, (uint32_t)strlen(export), err);
	if (!r && nbd_recv(c, b, 10))
		r = err_set(err, -EINVAL, "Requested export not available ('%s')", export);
	if (r)
		return r;
	h->size = nbd_get64(b);
	h->flags = nbd_get16(b + 8);
	if (!l->no_zeroes && nbd_recv(c, b, 124))
		return proto(err, "short answer");
	return h->size > INT64_MAX ? proto(err, "export is too big") : 0;
}

int nbd_hello(struct nbd_chan *c, const struct nbd_config *cfg, const struct tls_creds *creds, const char *context,
	      struct nbd_hello *h, struct err *err)
{
	const char *export = cfg->export ? cfg->export : "";
	struct reply *rep = malloc(sizeof *rep);
	struct link l = { 0 };
	*h = (struct nbd_hello){ 0 };
	int r = rep ? open_link(c, cfg, creds, rep, &l, err) : err_set(err, -ENOMEM, "out of memory");
	h->structured = l.structured;
	if (!r && h->structured && context)
		r = set_context(c, export, context, h, rep, err);
	if (!r)
		r = go(c, NBD_OPT_GO, export, h, NULL, rep, err);
	if (r > 0)
		r = export_name(c, export, &l, h, err);
	free(rep);
	return r;
}

/* --- listing --- */

static int list_names(struct nbd_chan *c, struct nbd_export_info **out, unsigned *n, struct reply *rep, struct err *err)
{
	int r = send_opt(c, NBD_OPT_LIST, NULL, 0, err);
	while (!r) {
		r = get_reply(c, NBD_OPT_LIST, rep, err);
		if (r || rep->type == NBD_REP_ACK)
			return r;
		if (rep->type & NBD_REP_ERROR)
			return refused(rep, "NBD_OPT_LIST", err);
		uint32_t len = rep->len >= 4 ? nbd_get32(rep->data) : UINT32_MAX;
		if (rep->type != NBD_REP_SERVER || len > NBD_NAME_MAX || len > rep->len - 4)
			return proto(err, "bad name in the list of exports");
		struct nbd_export_info *v = *n < EXPORTS_MAX ? realloc(*out, (*n + 1) * sizeof *v) : NULL;
		if (!v)
			return err_set(err, -ENOMEM, "more than %d exports", EXPORTS_MAX);
		*out = v;
		v += (*n)++;
		*v = (struct nbd_export_info){ .name = strndup(rep->data + 4, len) };
		if (rep->len > 4 + len)
			v->desc = strndup(rep->data + 4 + len, MIN(rep->len - 4 - len, (uint32_t)NBD_NAME_MAX));
		if (!v->name)
			return err_set(err, -ENOMEM, "out of memory");
	}
	return r;
}

static int list_contexts(struct nbd_chan *c, struct nbd_export_info *x, struct reply *rep, struct err *err)
{
	uint8_t q[NBD_NAME_MAX + 32];
	uint32_t n = put_string(q, x->name);
	nbd_put32(q + n, 0);
	int r = send_opt(c, NBD_OPT_LIST_META, q, n + 4, err);
	while (!r) {
		r = get_reply(c, NBD_OPT_LIST_META, rep, err);
		if (r || rep->type == NBD_REP_ACK || rep->type & NBD_REP_ERROR)
			return r;
		if (rep->type != NBD_REP_META || rep->len < 4 || x->ncontexts >= CONTEXTS_MAX)
			return proto(err, "unexpected meta context");
		char **v = realloc(x->contexts, (x->ncontexts + 1) * sizeof *v), *s = strndup(rep->data + 4, NBD_NAME_MAX);
		if (v)
			x->contexts = v;
		if (!v || !s) {
			free(s);
			return err_set(err, -ENOMEM, "out of memory");
		}
		v[x->ncontexts++] = s;
	}
	return r;
}

static int list_details(struct nbd_chan *c, struct nbd_export_info *x, bool structured, struct reply *rep, struct err *err)
{
	struct nbd_hello h = { 0 };
	int r = go(c, NBD_OPT_INFO, x->name, &h, x, rep, err);
	if (r)
		return r > 0 ? 0 : r;
	x->size = h.size;
	x->flags = h.flags;
	x->min_block = h.min_block;
	x->opt_block = h.opt_block;
	x->max_block = h.max_block;
	return structured ? list_contexts(c, x, rep, err) : 0;
}

int nbd_list(const struct nbd_config *cfg, const struct tls_store *tls, struct nbd_export_info **out, unsigned *n, struct err *err)
{
	const struct tls_creds *creds = NULL;
	struct reply *rep = malloc(sizeof *rep);
	struct nbd_chan *c = malloc(sizeof *c);
	struct link l = { 0 };
	*out = NULL;
	*n = 0;
	int r = rep && c ? 0 : err_set(err, -ENOMEM, "out of memory");
	if (!r && cfg->tls_creds)
		r = tls_find_creds(tls, cfg->tls_creds, false, &creds, err);
	int fd = r ? -1 : nbd_connect(cfg, NBD_HELLO_MS, err);
	if (!r && fd < 0)
		r = fd;
	if (!r) {
		nbd_chan_init(c, fd);
		c->deadline = nbd_now_ms() + NBD_HELLO_MS;
		r = open_link(c, cfg, creds, rep, &l, err);
		if (!r)
			r = list_names(c, out, n, rep, err);
		for (unsigned i = 0; !r && i < *n; i++)
			r = list_details(c, *out + i, l.structured, rep, err);
		if (!r)
			send_opt(c, NBD_OPT_ABORT, NULL, 0, NULL);
		nbd_chan_close(c);
	}
	free(rep);
	free(c);
	return r;
}

void nbd_list_free(struct nbd_export_info *v, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		for (unsigned k = 0; k < v[i].ncontexts; k++)
			free(v[i].contexts[k]);
		free(v[i].contexts);
		free(v[i].name);
		free(v[i].desc);
	}
	free(v);
}
