/* What the files of this folder share. */
#ifndef NET_INTERNAL_H
#define NET_INTERNAL_H

#include <pthread.h>

#include "base/optlist.h"
#include "loop/loop.h"
#include "net/net.h"

enum { NET_FRAME_MAX = 65536 + 18, NET_QUEUE = 256 };

struct net_frame { struct net_frame *next; size_t len; uint8_t data[]; };
struct net_queue { struct net_frame *head, **tail; unsigned n; };

struct net_kind {
	const char *name;
	const char *const *options;
	size_t size;                    /* of the struct that begins with struct net_backend */
	int (*open)(struct net_backend *n, struct optlist *o, struct err *err);
	void (*close)(struct net_backend *n);           /* also after a failed open */
	int (*send)(struct net_backend *n, const struct iovec *iov, int iovcnt, size_t len);
	void (*resume)(struct net_backend *n);          /* loop thread: the client takes frames again; may be NULL */
};

struct net_backend {
	const struct net_kind *kind;
	char *id, *owner;
	struct loop *loop;
	struct net_client client;
	bool attached;
	struct net_queue rx;            /* frames the client refused; loop thread */
	bool resume_posted;             /* atomic */
	bool send_blocked;              /* atomic: net_send() said -EAGAIN */
};

/* One frame for the guest: given, kept, or dropped when too many wait already. Loop thread. */
void net_deliver(struct net_backend *n, const void *frame, size_t len);
/* true when no refused frame waits. */
bool net_ready(const struct net_backend *n);
void net_sendable(struct net_backend *n);

void queue_init(struct net_queue *q);
int queue_put(struct net_queue *q, const struct iovec *iov, int n, size_t len);
struct net_frame *queue_take(struct net_queue *q);
void queue_clear(struct net_queue *q);

extern const struct net_kind net_user, net_tap;

#endif
