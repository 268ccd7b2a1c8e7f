/* Status machine, feature negotiation and the serving of queues; see vdev.h for the rules. */
#include <errno.h>
#include <stdlib.h>

#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"
#include "virtio/vdev.h"

static void defer_fn(void *opaque);

int virtio_dev_init(struct virtio_dev *v, struct machine_env *env, const struct virtio_dev_config *c, struct err *err)
{
	v->vq = calloc(c->n_queues, sizeof(*v->vq));
	if (!v->vq)
		return err_set(err, -ENOMEM, "%s: no memory for queues", c->name);
	v->ops = c->ops;
	v->name = c->name;
	v->env = env;
	v->n_queues = c->n_queues;
	v->host_features = c->features | BIT(VIRTIO_F_VERSION_1);
	v->config_len = c->config_len;
	v->config_vector = VIRTIO_NO_VECTOR;
	for (unsigned i = 0; i < v->n_queues; i++) {
		virtq_init(&v->vq[i].q, env->mem, v->name, i, c->queue_size, err);
		v->vq[i].vector = VIRTIO_NO_VECTOR;
	}
	pthread_mutex_init(&v->lock, NULL);
	pthread_cond_init(&v->idle, NULL);
	v->n_lanes = 1;
	v->lane[0].v = v;
	timer_init(&v->lane[0].defer, env->clock, defer_fn, &v->lane[0]);
	return 0;
}

void virtio_dev_destroy(struct virtio_dev *v)
{
	if (!v->vq)
		return;
	virtio_dev_stop_deferred(v);
	for (unsigned i = 0; i < v->n_queues; i++)
		virtq_destroy(&v->vq[i].q);
	free(v->vq);
	v->vq = NULL;
	pthread_cond_destroy(&v->idle);
	pthread_mutex_destroy(&v->lock);
}

bool virtio_driver_ok(const struct virtio_dev *v)
{
	return (v->status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET)) == VIRTIO_CONFIG_S_DRIVER_OK &&
	       !v->resetting && !v->paused;
}

bool virtio_queue_ready(struct virtio_dev *v, unsigned qi)
{
	const struct virtq *q = &v->vq[qi].q;

	return virtio_driver_ok(v) && q->enabled && !q->broken && (!v->dma_allowed || v->dma_allowed(v));
}

void virtio_defer(struct virtio_dev *v, unsigned qi)
{
	struct timer *t = &v->lane[qi % v->n_lanes].defer;

	v->n.deferred++;
	v->vq[qi].deferred = true;
	timer_arm(t, clock_now(t->clock));
}

void virtio_dev_stop_deferred(struct virtio_dev *v)
{
	for (unsigned i = 0; i < v->n_lanes; i++)
		timer_stop(&v->lane[i].defer);
}

void virtio_dev_use_loops(struct virtio_dev *v, struct loop *const *l, unsigned n)
{
	virtio_dev_stop_deferred(v);
	for (unsigned i = 0; i < n; i++) {
		v->lane[i].v = v;
		timer_init(&v->lane[i].defer, clock_host(l[i]), defer_fn, &v->lane[i]);
	}
	v->n_lanes = n;
}

static void defer_fn(void *opaque)
{
	struct virtio_lane *lane = opaque;
	struct virtio_dev *v = lane->v;

	pthread_mutex_lock(&v->lock);
	for (unsigned i = (unsigned)(lane - v->lane); i < v->n_queues; i += v->n_lanes) {
		if (!v->vq[i].deferred)
			continue;
		v->vq[i].deferred = false;
		virtio_serve(v, i);
	}
	pthread_mutex_unlock(&v->lock);
}

void virtio_serve(struct virtio_dev *v, unsigned qi)
{
	struct virtio_queue_state *s;

	if (qi >= v->n_queues || !virtio_queue_ready(v, qi))
		return;
	s = &v->vq[qi];
	v->n.kicks++;
	if (s->serving) {
		v->n.collisions++;
		s->again = true;
		return;
	}
	s->serving = true;
	v->n_serving++;
	s->again = false;
	v->ops->kick(v, qi);
	s->serving = false;
	v->n_serving--;
	if (s->again && virtio_queue_ready(v, qi))
		virtio_defer(v, qi);
	if (!v->n_serving)
		pthread_cond_broadcast(&v->idle);
}

void virtio_serve_all(struct virtio_dev *v)
{
	for (unsigned i = 0; i < v->n_queues; i++)
		virtio_serve(v, i);
}

/* Until nobody serves a queue and the back end holds no chain. The caller keeps new work out. */
static void quiesce(struct virtio_dev *v)
{
	while (v->n_serving)
		pthread_cond_wait(&v->idle, &v->lock);
	if (v->ops->drain)
		v->ops->drain(v);
}

static void queue_reset(struct virtio_dev *v, unsigned qi)
{
	virtq_reset(&v->vq[qi].q);
	v->vq[qi].vector = VIRTIO_NO_VECTOR;
	v->vq[qi].again = v->vq[qi].deferred = false;
}

static void reset_locked(struct virtio_dev *v)
{
	v->resetting = true;
	quiesce(v);
	if (v->ops->forget)
		v->ops->forget(v, VIRTIO_MAX_QUEUES);
	for (unsigned i = 0; i < v->n_queues; i++)
		queue_reset(v, i);
	v->features = 0;
	v->status = v->isr = 0;
	v->config_vector = VIRTIO_NO_VECTOR;
	if (v->ops->reset)
		v->ops->reset(v);
	v->resetting = false;
	pthread_cond_broadcast(&v->idle);
}

void virtio_dev_reset(struct virtio_dev *v)
{
	pthread_mutex_lock(&v->lock);
	while (v->resetting)
		pthread_cond_wait(&v->idle, &v->lock);
	reset_locked(v);
	pthread_mutex_unlock(&v->lock);
}

void virtio_dev_pause(struct virtio_dev *v, bool paused)
{
	pthread_mutex_lock(&v->lock);
	while (v->resetting)
		pthread_cond_wait(&v->idle, &v->lock);
	v->paused = paused;
	if (paused)
		quiesce(v);
	else
		virtio_serve_all(v);
	pthread_mutex_unlock(&v->lock);
}

/* 2.2.2, 3.1.1: FEATURES_OK stays clear when the driver's choice can't be served. */
static bool features_ok(struct virtio_dev *v)
{
	return !(v->features & ~v->host_features) && virtio_has(v, VIRTIO_F_VERSION_1);
}

static void features_fix(struct virtio_dev *v)
{
	for (unsigned i = 0; i < v->n_queues; i++) {
		struct virtq *q = &v->vq[i].q;

		q->packed = virtio_has(v, VIRTIO_F_RING_PACKED);
		q->event_idx = virtio_has(v, VIRTIO_RING_F_EVENT_IDX);
		q->indirect = virtio_has(v, VIRTIO_RING_F_INDIRECT_DESC);
	}
	if (v->ops->features)
		v->ops->features(v);
}

void virtio_set_features(struct virtio_dev *v, uint64_t f)
{
	if (v->resetting || (v->status & VIRTIO_CONFIG_S_FEATURES_OK))
		return;
	v->features = f;
}

/* Bits are only ever added, apart from reset (2.1.1). */
void virtio_set_status(struct virtio_dev *v, uint8_t val)
{
	uint8_t new = val & ~v->status & ~VIRTIO_CONFIG_S_NEEDS_RESET;

	if (v->resetting)
		return;
	if (!val) {
		reset_locked(v);
		return;
	}
	if (new & VIRTIO_CONFIG_S_FEATURES_OK) {
		if (features_ok(v))
			features_fix(v);
		else
			new &= ~VIRTIO_CONFIG_S_FEATURES_OK;
	}
	v->status |= new & ~VIRTIO_CONFIG_S_DRIVER_OK;
	if (!(new & VIRTIO_CONFIG_S_DRIVER_OK))
		return;
	if (!(v->status & VIRTIO_CONFIG_S_FEATURES_OK)) {
		log_guest("%s: DRIVER_OK before FEATURES_OK", v->name);
		return;
	}
	v->status |= VIRTIO_CONFIG_S_DRIVER_OK;
	if (v->ops->ready)
		v->ops->ready(v);
	virtio_serve_all(v);
}

void virtio_queue_start(struct virtio_dev *v, unsigned qi)
{
	struct virtq *q = &v->vq[qi].q;
	int r;

	if (v->resetting || q->enabled || !(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
		return;
	r = virtq_enable(q);
	if (r) {
		log_guest("%s: queue %u: bad ring (%s)", v->name, qi, r == -EINVAL ? "size" : "address");
		q->broken = true;
		virtio_needs_reset(v);
		return;
	}
	virtio_serve(v, qi);
}

void virtio_queue_stop(struct virtio_dev *v, unsigned qi)
{
	if (v->resetting || !virtio_has(v, VIRTIO_F_RING_RESET))
		return;
	v->resetting = true;
	quiesce(v);
	if (v->ops->forget)
		v->ops->forget(v, qi);
	queue_reset(v, qi);
	features_fix(v);
	v->resetting = false;
	pthread_cond_broadcast(&v->idle);
	virtio_serve_all(v);
}

void virtio_notify(struct virtio_dev *v, unsigned qi)
{
	if (!virtq_should_notify(&v->vq[qi].q)) {
		v->n.quiet++;
		return;
	}
	v->n.irqs++;
	if (v->irq)
		v->irq(v, v->vq[qi].vector, false);
}

void virtio_config_changed(struct virtio_dev *v)
{
	v->generation++;
	if ((v->status & VIRTIO_CONFIG_S_DRIVER_OK) && v->irq)
		v->irq(v, v->config_vector, true);
}

void virtio_needs_reset(struct virtio_dev *v)
{
	if (v->status & VIRTIO_CONFIG_S_NEEDS_RESET)
		return;
	v->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
	virtio_config_changed(v);
}

bool virtio_pop(struct virtio_dev *v, unsigned qi, struct virtq_chain *c)
{
	int r;

	if (!virtio_queue_ready(v, qi))
		return false;
	r = virtq_pop(&v->vq[qi].q, c);
	if (r == -EIO)
		virtio_needs_reset(v);
	else if (r == -ENOMEM)
		virtio_defer(v, qi);
	return r == 1;
}
