/* Opening a network back end, and the queue of frames that its client refused. */
#include "net/net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net/internal.h"

/* --- queues --- */

void queue_init(struct net_queue *q)
{
	*q = (struct net_queue){ .tail = &q->head };
}

int queue_put(struct net_queue *q, const struct iovec *iov, int n, size_t len)
{
	if (q->n >= NET_QUEUE)
		return -EAGAIN;
	struct net_frame *f = malloc(sizeof *f + len);
	if (!f)
		return -ENOMEM;
	f->next = NULL;
	f->len = 0;
	for (int i = 0; i < n; i++) {
		memcpy(f->data + f->len, iov[i].iov_base, iov[i].iov_len);
		f->len += iov[i].iov_len;
	}
	*q->tail = f;
	q->tail = &f->next;
	q->n++;
	return 0;
}

struct net_frame *queue_take(struct net_queue *q)
{
	struct net_frame *f = q->head;
	if (!f)
		return NULL;
	q->head = f->next;
	if (!q->head)
		q->tail = &q->head;
	q->n--;
	return f;
}

void queue_clear(struct net_queue *q)
{
	struct net_frame *f;
	while ((f = queue_take(q)))
		free(f);
}

/* --- towards the guest --- */

bool net_ready(const struct net_backend *n)
{
	return !n->rx.n;
}

void net_deliver(struct net_backend *n, const void *frame, size_t len)
{
	struct iovec v = { (void *)(uintptr_t)frame, len };
	if (!n->attached)
		return;
	if (!n->rx.n && n->client.receive(n->client.opaque, frame, len))
		return;
	queue_put(&n->rx, &v, 1, len); /* full: dropped, as on a wire */
}

static void resume_on_loop(void *opaque)
{
	struct net_backend *n = opaque;
	__atomic_store_n(&n->resume_posted, false, __ATOMIC_SEQ_CST);
	while (n->attached && n->rx.n && n->client.receive(n->client.opaque, n->rx.head->data, n->rx.head->len))
		free(queue_take(&n->rx));
	if (!n->rx.n && n->kind->resume)
		n->kind->resume(n);
}

void net_resume(struct net_backend *n)
{
	if (!__atomic_exchange_n(&n->resume_posted, true, __ATOMIC_SEQ_CST))
		loop_post(n->loop, resume_on_loop, n);
}

/* --- from the guest --- */

int net_send(struct net_backend *n, const struct iovec *iov, int iovcnt)
{
	size_t len = 0;
	for (int i = 0; i < iovcnt; i++) {
		if (iov[i].iov_len > NET_FRAME_MAX - len)
			return -EMSGSIZE;
		len += iov[i].iov_len;
	}
	if (len < 14)
		return -EINVAL; /* no Ethernet header */
	return n->kind->send(n, iov, iovcnt, len);
}

void net_sendable(struct net_backend *n)
{
	if (__atomic_exchange_n(&n->send_blocked, false, __ATOMIC_SEQ_CST) && n->attached && n->client.can_send)
		n->client.can_send(n->client.opaque);
}

/* --- life --- */

static const struct net_kind *find_kind(const char *name, struct err *err)
{
	static const char *const later[] = { "bridge", "socket", "stream", "dgram", "l2tpv3", "vde", "netmap", "vhost-user",
					     "vhost-vdpa", "hubport", "af-xdp", "passt" };
	if (!strcmp(name, "user"))
		return &net_user;
	if (!strcmp(name, "tap"))
		return &net_tap;
	for (size_t i = 0; i < sizeof later / sizeof later[0]; i++) {
		if (!strcmp(name, later[i])) {
			err_set(err, -ENOTSUP, "-netdev %s: not supported yet; valid: user, tap", name);
			return NULL;
		}
	}
	err_set(err, -EINVAL, "-netdev %s: no such kind; valid: user, tap", name);
	return NULL;
}

static int open_kind(const struct net_kind *kind, struct optlist *o, struct loop *l, struct net_backend **out, struct err *err)
{
	const char *id = optlist_get(o, "id");
	struct net_backend *n = calloc(1, kind->size);
	if (!n || (id && !(n->id = strdup(id)))) {
		free(n);
		return err_set(err, -ENOMEM, "-netdev: out of memory");
	}
	n->kind = kind;
	n->loop = l;
	queue_init(&n->rx);
	int r = kind->open(n, o, err);
	if (!r)
		r = optlist_unused(o, kind->options, err);
	if (r) {
		net_close(n);
		return r;
	}
	*out = n;
	return 0;
}

int net_open(struct net_backend **out, const char *spec, struct loop *l, struct err *err)
{
	struct optlist o;
	int r = optlist_parse(&o, spec, "type", "-netdev", err);
	if (r)
		return r;
	const char *type = optlist_get(&o, "type");
	const struct net_kind *kind = type ? find_kind(type, err) : NULL;
	if (!type)
		r = err_set(err, -EINVAL, "-netdev: no kind given; valid: user, tap");
	else
		r = kind ? open_kind(kind, &o, l, out, err) : -EINVAL;
	optlist_free(&o);
	return r;
}

void net_close(struct net_backend *n)
{
	if (!n)
		return;
	n->attached = false;
	loop_cancel(n->loop, resume_on_loop, n);
	n->kind->close(n);
	queue_clear(&n->rx);
	free(n->id);
	free(n->owner);
	free(n);
}

const char *net_id(const struct net_backend *n)
{
	return n->id;
}

int net_attach(struct net_backend *n, const struct net_client *c, const char *owner, struct err *err)
{
	if (n->attached)
		return err_set(err, -EBUSY, "netdev '%s' is already used by %s", n->id ? n->id : n->kind->name, n->owner);
	n->owner = strdup(owner);
	if (!n->owner)
		return err_set(err, -ENOMEM, "netdev: out of memory");
	n->client = *c;
	n->attached = true;
	return 0;
}

void net_detach(struct net_backend *n)
{
	n->attached = false;
	free(n->owner);
	n->owner = NULL;
	queue_clear(&n->rx);
}
