/*
 * A virtio device without its bus (virtio 1.2, chapters 2 and 3): status, features, queues,
 * configuration space; and the calls between a device model, this state machine and a transport.
 *
 * Locks. `lock` covers everything here; transports call in with it held. No back end is called with
 * it held: its threads take it when they report. So a device's kick() and drain() may drop the lock
 * around such calls, and what protects it then is
 *  - serving: one thread at a time serves a queue. A kick meanwhile makes it go round once more;
 *  - resetting: no queue is served, registers change nothing. A reset first waits until nobody
 *    serves, then drains the device, and only then lets go of rings.
 *
 * Work a guest can cause with one kick is bounded: kick() handles at most VIRTIO_BUDGET chains, and
 * virtio_defer() continues from the event loop.
 */
#ifndef VIRTIO_VDEV_H
#define VIRTIO_VDEV_H

#include <pthread.h>

#include "core/device.h"
#include "loop/loop.h"
#include "virtio/queue.h"

#define VIRTIO_BUDGET 256
#define VIRTIO_MAX_QUEUES 256
#define VIRTIO_CONFIG_MAX 64
#define VIRTIO_NO_VECTOR 0xffff
#define VIRTIO_LANES_MAX 16

struct virtio_dev;

/* All with the lock held. */
struct virtio_ops {
	/* The driver notified queue `qi`, or may have. May drop the lock; at most VIRTIO_BUDGET chains. */
	void (*kick)(struct virtio_dev *v, unsigned qi);
	/* Wait until no chain is out with a back end and none comes in; may drop the lock. May be NULL. */
	void (*drain)(struct virtio_dev *v);
	/* Back to power-on; nothing is out. May be NULL. */
	void (*reset)(struct virtio_dev *v);
	/* Queue `qi` (VIRTIO_MAX_QUEUES: every queue) is about to lose its ring: forget chains of it. May be NULL. */
	void (*forget)(struct virtio_dev *v, unsigned qi);
	/* Features are fixed; DRIVER_OK was set. May be NULL. */
	void (*features)(struct virtio_dev *v);
	void (*ready)(struct virtio_dev *v);
	/* The guest writes inside v->config, which changes only as far as this does it. May be NULL. */
	void (*config_write)(struct virtio_dev *v, unsigned off, const uint8_t *buf, unsigned len);
};

struct virtio_queue_state {
	struct virtq q;
	uint16_t vector;
	bool serving, again, deferred;
};

/* A loop that deferred work is done on: of every queue, or with n of them of queues i, i + n, i + 2n ... */
struct virtio_lane { struct virtio_dev *v; struct timer defer; };

struct virtio_dev {
	const struct virtio_ops *ops;
	const char *name;
	struct machine_env *env;
	pthread_mutex_t lock;
	pthread_cond_t idle;
	uint64_t host_features, features;
	uint8_t status, isr, generation;
	bool resetting, paused;
	uint16_t config_vector;
	unsigned n_queues, n_serving;
	struct virtio_queue_state *vq;
	uint8_t config[VIRTIO_CONFIG_MAX];
	unsigned config_len;
	struct virtio_lane lane[VIRTIO_LANES_MAX];
	unsigned n_lanes;
	/* The transport: raise an interrupt (config: a configuration change); may the device do DMA? */
	void (*irq)(struct virtio_dev *v, uint16_t vector, bool config);
	bool (*dma_allowed)(struct virtio_dev *v);
	/* Counters: kicks, those that met a busy queue, continuations, interrupts sent and suppressed. */
	struct { uint64_t kicks, collisions, deferred, irqs, quiet; } n;
};

struct virtio_dev_config {
	const struct virtio_ops *ops;
	const char *name;
	unsigned n_queues, queue_size;
	uint64_t features;              /* the device type's own and the ring's; VERSION_1 is added */
	unsigned config_len;
};
int virtio_dev_init(struct virtio_dev *v, struct machine_env *env, const struct virtio_dev_config *c, struct err *err);
/* After the transport let go and the back end is detached. */
void virtio_dev_destroy(struct virtio_dev *v);

/* Where deferred work is done, n is 1 to VIRTIO_LANES_MAX; before the device is plugged. */
void virtio_dev_use_loops(struct virtio_dev *v, struct loop *const *l, unsigned n);
/* No deferred work runs any more, or will. */
void virtio_dev_stop_deferred(struct virtio_dev *v);

/* For transports; lock held. */
void virtio_set_status(struct virtio_dev *v, uint8_t val);
void virtio_set_features(struct virtio_dev *v, uint64_t f);
void virtio_serve(struct virtio_dev *v, unsigned qi);
void virtio_serve_all(struct virtio_dev *v);
void virtio_queue_start(struct virtio_dev *v, unsigned qi);
void virtio_queue_stop(struct virtio_dev *v, unsigned qi);       /* queue_reset */
/* Lock not held: for the machine. */
void virtio_dev_reset(struct virtio_dev *v);
void virtio_dev_pause(struct virtio_dev *v, bool paused);

/* For devices; lock held. */
static inline struct virtq *virtio_vq(struct virtio_dev *v, unsigned qi) { return &v->vq[qi].q; }
static inline bool virtio_has(const struct virtio_dev *v, unsigned bit) { return v->features >> bit & 1; }
bool virtio_queue_ready(struct virtio_dev *v, unsigned qi);      /* may be popped from now */
bool virtio_driver_ok(const struct virtio_dev *v);
void virtio_defer(struct virtio_dev *v, unsigned qi);            /* serve from the loop soon */
void virtio_notify(struct virtio_dev *v, unsigned qi);           /* interrupt, if the driver wants it */
void virtio_config_changed(struct virtio_dev *v);
/* As virtq_pop(); a violation shows as DEVICE_NEEDS_RESET. True when a chain was popped. */
bool virtio_pop(struct virtio_dev *v, unsigned qi, struct virtq_chain *c);
/* A request a driver may not make: DEVICE_NEEDS_RESET. */
void virtio_needs_reset(struct virtio_dev *v);

#endif
