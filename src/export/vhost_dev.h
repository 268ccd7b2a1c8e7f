/*
 * The device side of vhost-user without the device: memory, rings, messages. Private to this folder.
 *
 * Lock order: a queue's lock is taken by its thread and by completions; messages come on the connection's thread, which alone
 * starts and stops queues.
 */
#ifndef EXPORT_VHOST_DEV_H
#define EXPORT_VHOST_DEV_H

#include <pthread.h>

#include "vhost/msg.h"
#include "virtio/queue.h"

struct vhost_dev;

struct vhost_queue {
	struct vhost_dev *d;
	unsigned index;
	struct virtq q;
	pthread_mutex_t lock;
	pthread_cond_t idle;
	unsigned in_flight;             /* chains with the device */
	bool addr_set, enabled, running;
	uint16_t size;
	uint32_t base;                  /* positions to start from, as in SET_VRING_BASE */
	uint64_t desc, used, avail;     /* the front end's addresses */
	int kick, call, err, stop;
	pthread_t thread;
};

struct vhost_dev_ops {
	/*
	 * The queue's thread, its lock held; may drop it. Serve what is there, a bounded number of requests: true when there is more.
	 * in_flight counts what was popped.
	 */
	bool (*serve)(struct vhost_queue *q);
	/* A byte range of the configuration space was written: 0 or -errno. */
	int (*set_config)(struct vhost_dev *d, uint32_t off, const uint8_t *data, uint32_t len);
};

struct vhost_dev {
	const struct vhost_dev_ops *ops;
	const char *name;
	uint64_t host_features, features, protocol;
	uint8_t config[VHOST_CONFIG_MAX];
	uint32_t config_len;
	unsigned nq;
	struct vhost_queue *q;
	struct guest_mem *mem;
	struct { struct vhost_region r; int fd; } region[VHOST_SLOTS_MAX];
	unsigned nregions;
	int sock;
};

int vhost_dev_init(struct vhost_dev *d, struct err *err);        /* ops, name, features, config, nq are set */
void vhost_dev_fini(struct vhost_dev *d);
/* Until the front end leaves: 0, or -errno for what it did wrong. */
int vhost_dev_talk(struct vhost_dev *d, int sock);
/* Lock held: tell the driver, if it wants to know. */
void vhost_queue_notify(struct vhost_queue *q);

#endif
