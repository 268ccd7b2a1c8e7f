/*
 * Block device (virtio 1.2, 5.2).
 *
 * A kick pops a batch under the lock, hands it to the block layer without it, and pushes what was
 * answered at once with a single interrupt; what comes later pushes itself. Requests live in a pool
 * that grows up to the queues' size and is kept.
 */
#include <errno.h>
#include <stdio.h>
#include <sched.h>
#include <stdlib.h>

#include <linux/virtio_blk.h>
#include <linux/virtio_ids.h>

#include "base/log.h"
#include "base/util.h"
#include "block/block.h"
#include "virtio/ioerr.h"
#include "virtio/pci.h"
#include "virtio/blk_req.h"
#include "virtio/virtio.h"

#define BATCH 32
#define INLINE_MAX (256 * 1024)         /* a batch with more in it is worth another thread's time */
#define INLINE_REQUESTS 8               /* with an I/O thread: what one kick does by itself */

struct blk;

struct blk_request {
	struct virtq_chain chain;
	struct block_req io;
	struct blk *d;
	struct blk_request *next;
	uint16_t qi;
	uint8_t *status;
	bool unsupported;
};

struct blk_queue { struct blk_request *inline_done; pthread_t submitter; bool submitting; };

struct blk {
	struct virtio_pci vp;
	struct blk_queue *bq;
	struct blk_request *pool;
	struct blk_request *failed, **failed_tail;      /* the policy is to stop: done again when the machine goes on */
	uint32_t in_flight;             /* atomic: popped and not yet out of done() */
	unsigned blk_size;
	bool attached;
	/* Counters: answered while the kick was served | later. */
	uint64_t n_inline, n_later;
	/* properties */
	struct block *drive;
	char *serial;
	int werror, rerror;
	struct iothread *iothread[PROP_IOTHREADS_MAX];  /* queue i is the work of number i modulo n_threads */
	unsigned n_threads;
	uint32_t num_queues, queue_size;
	int32_t bootindex;
	uint64_t lbs, pbs;
	int write_cache;                /* auto, on, off */
	bool discard, write_zeroes;
};

static struct blk *blk_of(struct virtio_dev *v)
{
	return container_of(v, struct blk, vp.v);
}

static struct blk_request *request_get(struct blk *d)
{
	struct blk_request *r = d->pool;

	if (r)
		d->pool = r->next;
	else
		r = calloc(1, sizeof(*r));
	if (r)
		r->d = d;
	return r;
}

static void request_put(struct blk *d, struct blk_request *r)
{
	virtq_chain_trim(&r->chain);
	r->next = d->pool;
	d->pool = r;
}

/* Lock held. */
static void request_finish(struct blk *d, struct blk_request *r)
{
	struct virtio_dev *v = &d->vp.v;

	*r->status = virtio_blk_status(&r->io, r->unsupported);
	/* The status sits behind the data, so all of `in` counts as touched. */
	virtq_fill(virtio_vq(v, r->qi), &r->chain, r->chain.in_len + 1);
	request_put(d, r);
}

/* Lock held: the back end answered. */
static void request_complete(struct blk *d, struct blk_request *r)
{
	enum io_policy p = r->io.ret && r->io.ret != -ENOTSUP ? io_failed(&r->io, d->drive, d->werror, d->rerror, d->vp.v.env) : IO_REPORT;

	if (p == IO_IGNORE)
		r->io.ret = 0;
	if (p != IO_STOP) {
		request_finish(d, r);
		return;
	}
	r->next = NULL;
	*d->failed_tail = r;
	d->failed_tail = &r->next;
}

/* Any thread, no lock held. */
static void request_done(struct block_req *io)
{
	struct blk_request *r = container_of(io, struct blk_request, io);
	struct blk *d = r->d;
	struct blk_queue *bq = &d->bq[r->qi];
	unsigned qi = r->qi;

	if (__atomic_load_n(&bq->submitting, __ATOMIC_ACQUIRE) &&
	    pthread_equal(__atomic_load_n(&bq->submitter, __ATOMIC_RELAXED), pthread_self())) {
		r->next = bq->inline_done;
		bq->inline_done = r;
		return;
	}
	pthread_mutex_lock(&d->vp.v.lock);
	d->n_later++;
	request_complete(d, r);
	virtq_flush(virtio_vq(&d->vp.v, qi));
	virtio_notify(&d->vp.v, qi);
	pthread_mutex_unlock(&d->vp.v.lock);
	__atomic_sub_fetch(&d->in_flight, 1, __ATOMIC_RELEASE);
}

/* 0: goes to the block layer; 1: answered (io.ret set); -1: no place to answer. */
static int request_prepare(struct blk *d, struct blk_request *r)
{
	struct virtio_dev *v = &d->vp.v;
	struct virtio_blk_disk disk = { .blk = d->drive, .block_size = d->blk_size, .id = d->serial, .writable = !block_read_only(d->drive),
					.writethrough = !v->config[offsetof(struct virtio_blk_config, wce)],
					.discard = virtio_has(v, VIRTIO_BLK_F_DISCARD), .write_zeroes = virtio_has(v, VIRTIO_BLK_F_WRITE_ZEROES) };
	int ret;

	r->io = (struct block_req){ .done = request_done, .lane = r->qi };
	ret = virtio_blk_request(&disk, &r->chain, &r->io, &r->status, &r->unsupported);
	if (ret < 0)
		log_guest("%s: request without header or status", v->name);
	return ret;
}

/* Pop up to `batch` requests: a list of those for the block layer; the others are answered here. */
static struct blk_request *batch_pop(struct blk *d, unsigned qi, unsigned batch, unsigned *popped)
{
	struct blk_request *head = NULL, **tail = &head, *r;
	struct virtio_dev *v = &d->vp.v;

	while (*popped < batch && (r = request_get(d))) {
		int ret;

		r->qi = qi;
		if (!virtio_pop(v, qi, &r->chain)) {
			request_put(d, r);
			break;
		}
		++*popped;
		ret = request_prepare(d, r);
		if (ret < 0) {
			request_put(d, r);
			virtio_needs_reset(v);
			break;
		}
		if (ret) {
			request_finish(d, r);
			continue;
		}
		__atomic_add_fetch(&d->in_flight, 1, __ATOMIC_RELAXED);
		r->next = NULL;
		*tail = r;
		tail = &r->next;
	}
	return head;
}

/* A few short requests are done right here when the back end has the data; a long list goes out at once. */
static void batch_flags(struct blk_request *list)
{
	uint64_t total = 0;
	unsigned n = 0;

	for (struct blk_request *r = list; r; r = r->next, n++)
		total += r->io.len;
	for (struct blk_request *r = list; r; r = r->next) {
		if (total <= INLINE_MAX && r->io.op != BLOCK_FLUSH)
			r->io.flags |= BLOCK_REQ_INLINE;
		if (n > 1)
			r->io.flags |= BLOCK_REQ_MORE;
	}
}

/* Lock dropped in the middle. */
static void batch_submit(struct blk *d, unsigned qi, struct blk_request *list)
{
	struct blk_queue *bq = &d->bq[qi];
	struct blk_request *next;
	bool many = list->next;

	batch_flags(list);
	bq->inline_done = NULL;
	__atomic_store_n(&bq->submitter, pthread_self(), __ATOMIC_RELAXED);
	__atomic_store_n(&bq->submitting, true, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&d->vp.v.lock);
	for (; list; list = next) {
		next = list->next;
		block_submit(d->drive, &list->io);
	}
	if (many)
		block_unplug(d->drive);
	__atomic_store_n(&bq->submitting, false, __ATOMIC_RELEASE);
	pthread_mutex_lock(&d->vp.v.lock);
	for (struct blk_request *r = bq->inline_done; r; r = next) {
		next = r->next;
		d->n_inline++;
		request_complete(d, r);
		__atomic_sub_fetch(&d->in_flight, 1, __ATOMIC_RELEASE);
	}
	bq->inline_done = NULL;
}

static void blk_kick(struct virtio_dev *v, unsigned qi)
{
	struct blk *d = blk_of(v);
	struct virtq *q = virtio_vq(v, qi);
	bool hand_over = d->n_threads && !loop_on_thread(iothread_loop(d->iothread[qi % d->n_threads]));
	unsigned total = 0, budget = hand_over ? INLINE_REQUESTS : VIRTIO_BUDGET, batch = MIN(budget, BATCH);

	do {
		virtq_want_kicks(q, false);
		for (unsigned popped = batch; popped == batch && total < budget; total += popped) {
			popped = 0;
			struct blk_request *list = batch_pop(d, qi, batch, &popped);

			if (list)
				batch_submit(d, qi, list);
			if (q->filled) {
				virtq_flush(q);
				virtio_notify(v, qi);
			}
		}
		if (total >= budget && !virtq_empty(q)) {
			virtio_defer(v, qi);
			return;
		}
		virtq_want_kicks(q, true);
	} while (!virtq_empty(q) && virtio_queue_ready(v, qi));
}

static void blk_drain(struct virtio_dev *v)
{
	struct blk *d = blk_of(v);

	pthread_mutex_unlock(&v->lock);
	while (__atomic_load_n(&d->in_flight, __ATOMIC_ACQUIRE)) {
		block_drain(d->drive);
		sched_yield();
	}
	pthread_mutex_lock(&v->lock);
}

/* Chains of this queue are not answered any more. */
static void blk_forget(struct virtio_dev *v, unsigned qi)
{
	struct blk *d = blk_of(v);
	struct blk_request **p = &d->failed, *r;

	while ((r = *p)) {
		if (qi != VIRTIO_MAX_QUEUES && r->qi != qi) {
			p = &r->next;
			continue;
		}
		*p = r->next;
		request_put(d, r);
	}
	d->failed_tail = p;
}

/* The machine goes on: what failed is tried again, before anything new. */
static void blk_retry(struct blk *d)
{
	struct blk_request *list, *next;

	pthread_mutex_lock(&d->vp.v.lock);
	list = d->failed;
	d->failed = NULL;
	d->failed_tail = &d->failed;
	for (struct blk_request *r = list; r; r = r->next)
		__atomic_add_fetch(&d->in_flight, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&d->vp.v.lock);
	for (; list; list = next) {
		next = list->next;
		list->io.flags &= ~(unsigned)(BLOCK_REQ_MORE | BLOCK_REQ_INLINE);
		block_submit(d->drive, &list->io);
	}
}

static void blk_pause(struct device *dev, bool paused)
{
	if (!paused)
		blk_retry(container_of(dev, struct blk, vp.dev));
	virtio_pci_dev_pause(dev, paused);
}

/* The image has another size; on any thread. */
static void blk_resized(void *opaque)
{
	struct blk *d = opaque;
	uint64_t sectors = block_length(d->drive) >> 9;

	pthread_mutex_lock(&d->vp.v.lock);
	memcpy(d->vp.v.config + offsetof(struct virtio_blk_config, capacity), &sectors, sizeof(sectors));
	virtio_config_changed(&d->vp.v);
	pthread_mutex_unlock(&d->vp.v.lock);
}

static bool cached(const struct blk *d)
{
	return d->write_cache ? d->write_cache == 1 : block_write_cache(d->drive);
}

/* Without FLUSH the driver can not ask for stability, so every write must give it (5.2.5.2). */
static void blk_features(struct virtio_dev *v)
{
	struct blk *d = blk_of(v);

	v->config[offsetof(struct virtio_blk_config, wce)] = cached(d) && virtio_has(v, VIRTIO_BLK_F_FLUSH);
}

static void blk_reset(struct virtio_dev *v)
{
	v->config[offsetof(struct virtio_blk_config, wce)] = cached(blk_of(v));
}

static void blk_config_write(struct virtio_dev *v, unsigned off, const uint8_t *buf, unsigned len)
{
	if (off == offsetof(struct virtio_blk_config, wce) && len == 1 && virtio_has(v, VIRTIO_BLK_F_CONFIG_WCE))
		v->config[off] = buf[0] & 1;
}

static const struct virtio_ops blk_ops = {
	.kick = blk_kick, .drain = blk_drain, .reset = blk_reset, .features = blk_features,
	.config_write = blk_config_write, .forget = blk_forget,
};

static void fill_config(struct blk *d)
{
	struct virtio_blk_config c = {
		.capacity = block_length(d->drive) >> 9,
		.seg_max = MIN(d->queue_size, 256u) - 2,
		.blk_size = d->blk_size,
		.physical_block_exp = __builtin_ctz(MAX((uint32_t)d->pbs, d->blk_size) / d->blk_size),
		.wce = cached(d),
		.num_queues = d->num_queues,
		.max_discard_sectors = VIRTIO_BLK_RANGE_SECTORS & ~(d->blk_size / 512 - 1),
		.max_discard_seg = 1,
		.discard_sector_alignment = d->blk_size / 512,
		.max_write_zeroes_sectors = VIRTIO_BLK_RANGE_SECTORS & ~(d->blk_size / 512 - 1),
		.max_write_zeroes_seg = 1,
		.write_zeroes_may_unmap = 1,
	};

	memcpy(d->vp.v.config, &c, MIN(sizeof(c), (size_t)VIRTIO_CONFIG_MAX));
}

static bool pow2_between(uint32_t v, uint32_t lo, uint32_t hi)
{
	return v >= lo && v <= hi && !(v & (v - 1));
}

static int blk_check(struct blk *d, struct err *err)
{
	const char *n = d->vp.dev.cls->name;

	if (!d->drive)
		return err_set(err, -EINVAL, "%s: drive property not set", n);
	if (!d->num_queues || d->num_queues > 64)
		return err_set(err, -EINVAL, "%s: num-queues must be 1 to 64", n);
	if (!pow2_between(d->queue_size, 4, VIRTQ_MAX_SIZE))
		return err_set(err, -EINVAL, "%s: queue-size must be a power of two from 4 to %d", n, VIRTQ_MAX_SIZE);
	d->blk_size = d->lbs ? MIN(d->lbs, 1u << 20) : block_size(d->drive);
	if (!pow2_between(d->blk_size, 512, 32768) || (d->pbs && !pow2_between(d->pbs, 512, 1 << 21)))
		return err_set(err, -EINVAL, "%s: block sizes must be powers of two, at least 512", n);
	if (d->blk_size < block_size(d->drive))
		return err_set(err, -EINVAL, "%s: logical_block_size=%u, but %s needs %u", n, d->blk_size,
			       block_name(d->drive), block_size(d->drive));
	return 0;
}

static uint64_t blk_host_features(const struct blk *d)
{
	bool ro = block_read_only(d->drive);

	return BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_TOPOLOGY) |
	       BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_CONFIG_WCE) |
	       (d->num_queues > 1 ? BIT(VIRTIO_BLK_F_MQ) : 0) | (ro ? BIT(VIRTIO_BLK_F_RO) : 0) |
	       (d->discard && !ro ? BIT(VIRTIO_BLK_F_DISCARD) : 0) |
	       (d->write_zeroes && !ro ? BIT(VIRTIO_BLK_F_WRITE_ZEROES) : 0);
}

static void blk_free(struct blk *d)
{
	struct blk_request *r;

	if (d->attached) {
		block_listen(d->drive, NULL);
		if (d->n_threads)
			block_set_loop(d->drive, d->vp.dev.env->loop, NULL);
		block_detach(d->drive);
	}
	d->attached = false;
	while ((r = d->pool)) {
		d->pool = r->next;
		virtq_chain_free(&r->chain);
		free(r);
	}
	free(d->bq);
	d->bq = NULL;
	virtio_pci_destroy(&d->vp);
}

static int use_threads(struct blk *d, struct err *err)
{
	struct loop *l[PROP_IOTHREADS_MAX];

	while (d->n_threads < PROP_IOTHREADS_MAX && d->iothread[d->n_threads]) {
		l[d->n_threads] = iothread_loop(d->iothread[d->n_threads]);
		d->n_threads++;
	}
	if (!d->n_threads)
		return 0;
	virtio_dev_use_loops(&d->vp.v, l, d->n_threads);
	return block_set_loops(d->drive, l, d->n_threads, err);
}

static int blk_create(struct device *dev, struct err *err)
{
	struct blk *d = container_of(dev, struct blk, vp.dev);
	int r = blk_check(d, err);

	if (r)
		return r;
	r = virtio_pci_init(&d->vp, &(struct virtio_pci_config){ &blk_ops, VIRTIO_ID_BLOCK, 0x01, 0x00,
			d->num_queues, d->queue_size, d->num_queues + 1, blk_host_features(d),
			offsetof(struct virtio_blk_config, unused1) + 3 }, err);
	if (r)
		return r;
	d->bq = calloc(d->num_queues, sizeof(*d->bq));
	r = d->bq ? block_attach(d->drive, dev->id ? dev->id : dev->cls->name, err)
		  : err_set(err, -ENOMEM, "%s: no memory", dev->cls->name);
	d->attached = !r;
	d->failed_tail = &d->failed;
	if (!r)
		r = use_threads(d, err);
	if (!r) {
		block_listen(d->drive, &(struct block_listener){ blk_resized, d });
		fill_config(d);
		r = virtio_pci_plug(&d->vp, err);
	}
	if (r)
		blk_free(d);
	return r;
}

static void blk_destroy(struct device *dev)
{
	struct blk *d = container_of(dev, struct blk, vp.dev);

	virtio_pci_unplug(&d->vp);
	blk_free(d);
}

static int32_t blk_boot(struct device *dev, char *path, size_t len)
{
	struct blk *d = container_of(dev, struct blk, vp.dev);
	char bus[64];

	pci_fw_path(&d->vp.pci, "scsi", bus, sizeof(bus));
	snprintf(path, len, "%s/disk@0,0", bus);
	return d->bootindex;
}

static const struct prop blk_props[] = {
	VIRTIO_PCI_PROPS(struct blk),
	BOOTINDEX_PROP(struct blk, bootindex),
	{ "drive", PROP_DRIVE, offsetof(struct blk, drive), .help = "id of a -drive or -blockdev" },
	{ "serial", PROP_STR, offsetof(struct blk, serial), .help = "serial number, 20 characters" },
	{ "num-queues", PROP_U32, offsetof(struct blk, num_queues), 1, .min = 1, .max = 64, .help = "request queues" },
	{ "queue-size", PROP_U32, offsetof(struct blk, queue_size), 256, .min = 4, .max = VIRTQ_MAX_SIZE,
	  .help = "descriptors in a queue" },
	{ "logical_block_size", PROP_SIZE, offsetof(struct blk, lbs), 0, .help = "0: the image's" },
	{ "physical_block_size", PROP_SIZE, offsetof(struct blk, pbs), 0, .help = "0: as logical" },
	{ "write-cache", PROP_ENUM, offsetof(struct blk, write_cache), .dflt_str = "auto", .values = virtio_on_off_auto,
	  .help = "offer a volatile write cache" },
	{ "discard", PROP_BOOL, offsetof(struct blk, discard), 1, .help = "offer discard" },
	{ "write-zeroes", PROP_BOOL, offsetof(struct blk, write_zeroes), 1, .help = "offer write zeroes" },
	IO_ERROR_PROPS(struct blk),
	{ "iothread", PROP_IOTHREADS, offsetof(struct blk, iothread),
	  .help = "id of an -object iothread that serves deep queues and completions; ID:ID...: several, which share the queues" },
	{ NULL }
};

const struct device_class virtio_blk_pci_class = {
	.name = "virtio-blk-pci", .aliases = (const char *const[]){ "virtio-blk", NULL },
	.desc = "virtio disk", .bus = "PCI", .props = blk_props, .size = sizeof(struct blk),
	.create = blk_create, .destroy = blk_destroy, .reset = virtio_pci_dev_reset, .pause = blk_pause, .boot = blk_boot,
};
