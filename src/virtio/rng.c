/*
 * Entropy device (virtio 1.2, 5.4): fills what the driver offers with the host's random bytes, which
 * never block once the host has booted. `max-bytes` and `period` limit the rate.
 */
#include <errno.h>

#include <linux/virtio_ids.h>
#include <sys/random.h>

#include "base/util.h"
#include "virtio/pci.h"
#include "virtio/virtio.h"

#define CHUNK_MAX (8 * 1024)    /* bytes for one chain; a driver takes a short answer */
#define CHAINS_MAX 64           /* in one kick: half a MiB, about a millisecond */

struct rng {
	struct virtio_pci vp;
	struct virtq_chain chain;
	struct timer refill;
	uint64_t left;
	bool limited, counting;         /* counting: a period has started */
	/* properties */
	char *rng;
	uint64_t max_bytes;
	uint32_t period;
};

static struct rng *rng_of(struct virtio_dev *v)
{
	return container_of(v, struct rng, vp.v);
}

/* The first bytes of a period start it. */
static void account(struct rng *d, uint64_t n)
{
	if (!d->limited)
		return;
	d->left -= n;
	if (d->counting)
		return;
	d->counting = true;
	timer_arm(&d->refill, clock_now(d->vp.v.env->clock) + d->period * 1000000ull);
}

static void refill_fn(void *opaque)
{
	struct rng *d = opaque;

	pthread_mutex_lock(&d->vp.v.lock);
	d->left = d->max_bytes;
	d->counting = false;
	virtio_serve(&d->vp.v, 0);
	pthread_mutex_unlock(&d->vp.v.lock);
}

static uint32_t fill(const struct virtq_chain *c, uint64_t max)
{
	uint32_t done = 0;

	for (unsigned i = 0; i < c->n_in && done < max; i++) {
		size_t n = MIN(c->in[i].iov_len, max - done);
		ssize_t r = getrandom(c->in[i].iov_base, n, 0);

		if (r <= 0)
			break;
		done += r;
		if ((size_t)r < n)
			break;
	}
	return done;
}

static void rng_kick(struct virtio_dev *v, unsigned qi)
{
	struct rng *d = rng_of(v);
	struct virtq *q = virtio_vq(v, qi);
	unsigned n = 0;

	while ((!d->limited || d->left) && n < CHAINS_MAX && virtio_pop(v, qi, &d->chain)) {
		uint32_t got = fill(&d->chain, d->limited ? MIN(d->left, CHUNK_MAX) : CHUNK_MAX);

		account(d, got);
		virtq_push(q, &d->chain, got);
		n++;
	}
	virtq_chain_trim(&d->chain);
	if (n)
		virtio_notify(v, qi);
	if ((!d->limited || d->left) && !virtq_empty(q) && virtio_queue_ready(v, qi))
		virtio_defer(v, qi);
}

static const struct virtio_ops rng_ops = { .kick = rng_kick };

static int rng_create(struct device *dev, struct err *err)
{
	struct rng *d = container_of(dev, struct rng, vp.dev);
	int r;

	d->limited = d->max_bytes && d->max_bytes < INT64_MAX;
	d->left = d->max_bytes;
	if (d->limited && !d->period)
		return err_set(err, -EINVAL, "%s: period must not be 0 when max-bytes is set", dev->cls->name);
	r = virtio_pci_init(&d->vp, &(struct virtio_pci_config){ &rng_ops, VIRTIO_ID_RNG, 0x00, 0xff, 1, 8, 2, 0, 0 }, err);
	if (r)
		return r;
	timer_init(&d->refill, dev->env->clock, refill_fn, d);
	r = virtio_pci_plug(&d->vp, err);
	if (r)
		virtio_pci_destroy(&d->vp);
	return r;
}

static void rng_destroy(struct device *dev)
{
	struct rng *d = container_of(dev, struct rng, vp.dev);

	virtio_pci_unplug(&d->vp);
	timer_stop(&d->refill);
	virtq_chain_free(&d->chain);
	virtio_pci_destroy(&d->vp);
}

static const struct prop rng_props[] = {
	VIRTIO_PCI_PROPS(struct rng),
	{ "rng", PROP_STR, offsetof(struct rng, rng), .help = "id of a -object rng-random or rng-builtin" },
	{ "max-bytes", PROP_U64, offsetof(struct rng, max_bytes), INT64_MAX, .help = "bytes in a period" },
	{ "period", PROP_U32, offsetof(struct rng, period), 65536, .help = "milliseconds" },
	{ NULL }
};

const struct device_class virtio_rng_pci_class = {
	.name = "virtio-rng-pci", .aliases = (const char *const[]){ "virtio-rng", NULL },
	.desc = "virtio entropy source", .bus = "PCI", .props = rng_props, .size = sizeof(struct rng),
	.create = rng_create, .destroy = rng_destroy, .reset = virtio_pci_dev_reset, .pause = virtio_pci_dev_pause,
};
