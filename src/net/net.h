/*
 * Network back ends: frames in, frames out, with back-pressure both ways. Cannot see a guest.
 *
 * Everything runs on the loop's thread except net_send(), which any one thread at a time may call.
 */
#ifndef NET_NET_H
#define NET_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/err.h"

struct net_backend;
struct loop;

/* The device's side. */
struct net_client {
	/* One Ethernet frame for the guest. false: no room, the back end keeps it; call net_resume() later. */
	bool (*receive)(void *opaque, const void *frame, size_t len);
	void (*link)(void *opaque, bool up);
	void *opaque;
	/* There is room again after net_send() said -EAGAIN. Loop thread; may be NULL. */
	void (*can_send)(void *opaque);
};

/* `spec` is QEMU's -netdev text: "user,id=n0,hostfwd=tcp::2222-:22", "tap,id=n1,ifname=tap0,script=no". */
int net_open(struct net_backend **out, const char *spec, struct loop *l, struct err *err);
void net_close(struct net_backend *n);
const char *net_id(const struct net_backend *n);
int net_attach(struct net_backend *n, const struct net_client *c, const char *owner, struct err *err);
void net_detach(struct net_backend *n);
/* A frame from the guest; 0, or -EAGAIN when the back end is full (it calls can_send() later), -errno. */
int net_send(struct net_backend *n, const struct iovec *iov, int iovcnt);
/* The device has room again: frames that receive() refused are offered anew. Any thread. */
void net_resume(struct net_backend *n);

#endif
