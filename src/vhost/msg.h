/*
 * vhost-user messages (QEMU's docs/interop/vhost-user.rst): what both ends share, the back end that serves a device
 * (export/vhost_blk.c) and a front end that uses one.
 *
 * The peer is hostile: a message is read only up to the size of the longest one known, descriptors are received only with
 * the header, at most VHOST_FDS_MAX of them, and belong to the message until somebody takes them.
 */
#ifndef VHOST_MSG_H
#define VHOST_MSG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* name, number, length of the payload that a front end sends (-1: variable) */
#define VHOST_REQUESTS(X)                                                                                                     \
	X(GET_FEATURES, 1, 0) X(SET_FEATURES, 2, 8) X(SET_OWNER, 3, 0) X(RESET_OWNER, 4, 0) X(SET_MEM_TABLE, 5, -1)            \
	X(SET_LOG_BASE, 6, -1) X(SET_LOG_FD, 7, 0) X(SET_VRING_NUM, 8, 8) X(SET_VRING_ADDR, 9, 40) X(SET_VRING_BASE, 10, 8)    \
	X(GET_VRING_BASE, 11, 8) X(SET_VRING_KICK, 12, 8) X(SET_VRING_CALL, 13, 8) X(SET_VRING_ERR, 14, 8)                     \
	X(GET_PROTOCOL_FEATURES, 15, 0) X(SET_PROTOCOL_FEATURES, 16, 8) X(GET_QUEUE_NUM, 17, 0) X(SET_VRING_ENABLE, 18, 8)     \
	X(SEND_RARP, 19, 8) X(NET_SET_MTU, 20, 8) X(SET_BACKEND_REQ_FD, 21, 0) X(IOTLB_MSG, 22, -1) X(SET_VRING_ENDIAN, 23, 8) \
	X(GET_CONFIG, 24, -1) X(SET_CONFIG, 25, -1) X(GET_INFLIGHT_FD, 31, 24) X(SET_INFLIGHT_FD, 32, 24)                      \
	X(RESET_DEVICE, 34, 0) X(GET_MAX_MEM_SLOTS, 36, 0) X(ADD_MEM_REG, 37, 40) X(REM_MEM_REG, 38, 40) X(SET_STATUS, 39, 8) \
	X(GET_STATUS, 40, 0)
enum vhost_request {
#define VHOST_ENUM(name, n, len) VHOST_##name = n,
	VHOST_REQUESTS(VHOST_ENUM)
#undef VHOST_ENUM
};

enum { VHOST_VERSION = 1, VHOST_REPLY = 4, VHOST_NEED_REPLY = 8 };
enum { VHOST_F_PROTOCOL_FEATURES = 30 };
enum { VHOST_P_MQ = 0, VHOST_P_REPLY_ACK = 3, VHOST_P_CONFIG = 9, VHOST_P_RESET_DEVICE = 13, VHOST_P_CONFIGURE_MEM_SLOTS = 15 };
enum { VHOST_FDS_MAX = 8, VHOST_REGIONS_MAX = 8, VHOST_SLOTS_MAX = 32, VHOST_CONFIG_MAX = 256, VHOST_NO_FD = 1 << 8 };

struct vhost_region { uint64_t gpa, size, uva, offset; };

struct vhost_msg {
	uint32_t request, flags, size;
	union {
		uint64_t u64;
		struct { uint32_t index, num; } state;
		struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr;
		struct { uint32_t n, pad; struct vhost_region r[VHOST_REGIONS_MAX]; } mem;
		struct { uint64_t pad; struct vhost_region r; } slot;
		struct { uint32_t offset, size, flags; uint8_t data[VHOST_CONFIG_MAX]; } config;
		uint8_t raw[sizeof(struct vhost_region) * VHOST_REGIONS_MAX + 16];
	} p;
	int fd[VHOST_FDS_MAX];
	unsigned nfds;
};

/* The name, for messages; "?" for an unknown request. */
const char *vhost_name(uint32_t request);
/*
 * One message; blocks. 0, -EPIPE at the end, -errno. Its size fits the request (a known request with another length is -EPROTO,
 * unknown ones pass). Free what nobody took with vhost_close_fds().
 */
int vhost_recv(int sock, struct vhost_msg *m);
/* Take descriptor `i` out of the message: -1 when it is not there. */
int vhost_take_fd(struct vhost_msg *m, unsigned i);
void vhost_close_fds(struct vhost_msg *m);
/* With the message's descriptors, which stay the caller's. */
int vhost_send(int sock, const struct vhost_msg *m);

#endif
