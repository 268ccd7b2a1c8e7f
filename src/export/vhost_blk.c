/* A disk behind vhost-user: virtio block requests (virtio 1.2, 5.2.6) from rings in another process's memory. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/virtio_blk.h>

#include "base/log.h"
#include "base/util.h"
#include "block/image.h"
#include "export/export.h"
#include "export/vhost_dev.h"
#include "virtio/blk_req.h"

enum { BATCH = 32, TURN = 32 * BATCH, INLINE_MAX = 64 * 1024 };

struct request {
	struct virtq_chain chain;
	struct block_req io;
	struct vhost_queue *q;
	struct request *next;
	uint8_t *status;
	bool unsupported;
};

/* Answered while the queue's thread submits: collected, so that one interrupt tells of all. */
struct blk_queue { struct request *pool, *done; pthread_t submitter; bool submitting; /* atomic */ };

struct vhost_blk {
	struct vhost_dev dev;
	char *id;
	struct block *blk;
	bool writable, wce;
	uint32_t block_size;
	struct blk_queue *bq;
	int listen, conn, stop;
	bool connected, running;
	pthread_mutex_t lock;           /* conn */
	pthread_t thread;
};

static struct vhost_blk *blk_of(struct vhost_queue *q)
{
	return container_of(q->d, struct vhost_blk, dev);
}

/* --- requests; the queue's lock held --- */

static struct request *request_get(struct vhost_queue *q)
{
	struct blk_queue *bq = &blk_of(q)->bq[q->index];
	struct request *r = bq->pool;
	if (r)
		bq->pool = r->next;
	else
		r = calloc(1, sizeof *r);
	if (r)
		r->q = q;
	return r;
}

static void request_put(struct request *r)
{
	struct blk_queue *bq = &blk_of(r->q)->bq[r->q->index];
	virtq_chain_trim(&r->chain);
	r->next = bq->pool;
	bq->pool = r;
}

static void request_finish(struct request *r)
{
	struct vhost_queue *q = r->q;
	*r->status = virtio_blk_status(&r->io, r->unsupported);
	virtq_fill(&q->q, &r->chain, (uint32_t)r->chain.in_len + 1);
	request_put(r);
	if (!--q->in_flight)
		pthread_cond_broadcast(&q->idle);
}

/* Any thread, no lock held. */
static void request_done(struct block_req *io)
{
	struct request *r = container_of(io, struct request, io);
	struct vhost_queue *q = r->q;
	struct blk_queue *bq = &blk_of(q)->bq[q->index];
	if (__atomic_load_n(&bq->submitting, __ATOMIC_ACQUIRE) &&
	    pthread_equal(__atomic_load_n(&bq->submitter, __ATOMIC_RELAXED), pthread_self())) {
		r->next = bq->done;
		bq->done = r;
		return;
	}
	pthread_mutex_lock(&q->lock);
	request_finish(r);
	virtq_flush(&q->q);
	vhost_queue_notify(q);
	pthread_mutex_unlock(&q->lock);
}

/* 0: for the block layer, 1: answered, below 0: no place for an answer. */
static int prepare(struct vhost_blk *v, struct request *r)
{
	struct virtio_blk_disk disk = { .blk = v->blk, .block_size = v->block_size, .id = v->id, .writable = v->writable,
					.writethrough = !__atomic_load_n(&v->wce, __ATOMIC_RELAXED), .discard = true, .write_zeroes = true };
	r->io = (struct block_req){ .done = request_done };
	return virtio_blk_request(&disk, &r->chain, &r->io, &r->status, &r->unsupported);
}

/* Up to BATCH requests from the ring; those for the block layer as a list. */
static struct request *pop_batch(struct vhost_queue *q, unsigned *n)
{
	struct request *head = NULL, **tail = &head, *r;
	while (*n < BATCH && (r = request_get(q))) {
		if (virtq_pop(&q->q, &r->chain) != 1) {
			request_put(r);
			break;
		}
		++*n;
		int p = prepare(blk_of(q), r);
		if (p < 0) {
			log_guest("%s: request without header or status", q->d->name);
			q->q.broken = true;
			request_put(r);
			break;
		}
		q->in_flight++;
		if (p) {
			request_finish(r);
			continue;
		}
		r->next = NULL;
		*tail = r;
		tail = &r->next;
	}
	return head;
}

static void submit_batch(struct vhost_queue *q, struct request *list)
{
	struct vhost_blk *v = blk_of(q);
	struct blk_queue *bq = &v->bq[q->index];
	struct request *next;
	pthread_mutex_unlock(&q->lock);
	__atomic_store_n(&bq->submitter, pthread_self(), __ATOMIC_RELAXED);
	__atomic_store_n(&bq->submitting, true, __ATOMIC_RELEASE);
	for (; list; list = next) {
		next = list->next;
		if (list->io.len <= INLINE_MAX && list->io.op != BLOCK_FLUSH)
			list->io.flags |= BLOCK_REQ_INLINE;
		block_submit(v->blk, &list->io);
	}
	block_unplug(v->blk);
	__atomic_store_n(&bq->submitting, false, __ATOMIC_RELEASE);
	pthread_mutex_lock(&q->lock);
	struct request *done = bq->done, *order = NULL;
	bq->done = NULL;
	for (; done; done = next) {
		next = done->next;
		done->next = order;
		order = done;
	}
	for (; order; order = next) {
		next = order->next;
		request_finish(order);
	}
}

/*
 * At most TURN requests. A driver that goes on filling its ring, or one whose rings lie over each other so that answers are new
 * requests, must not keep the thread from seeing that it shall stop.
 */
static bool serve(struct vhost_queue *q)
{
	unsigned left = TURN;
	if (q->q.broken)
		return false;
	virtq_want_kicks(&q->q, false);
	for (unsigned n = BATCH; n == BATCH && left; left -= n) {
		n = 0;
		struct request *list = pop_batch(q, &n);
		if (list)
			submit_batch(q, list);
		if (q->q.filled) {
			virtq_flush(&q->q);
			vhost_queue_notify(q);
		}
	}
	virtq_want_kicks(&q->q, true);
	return !virtq_empty(&q->q);
}

static int set_config(struct vhost_dev *d, uint32_t off, const uint8_t *data, uint32_t len)
{
	struct vhost_blk *v = container_of(d, struct vhost_blk, dev);
	if (off != offsetof(struct virtio_blk_config, wce) || len != 1 || data[0] > 1)
		return -EINVAL;
	__atomic_store_n(&v->wce, data[0], __ATOMIC_RELAXED);
	d->config[off] = data[0];
	return 0;
}

static const struct vhost_dev_ops blk_ops = { .serve = serve, .set_config = set_config };

/* --- life --- */

static void fill_config(struct vhost_blk *v)
{
	struct virtio_blk_config c = {
		.capacity = block_length(v->blk) >> 9, .seg_max = 128 - 2, .blk_size = v->block_size, .min_io_size = 1, .opt_io_size = 1,
		.wce = v->wce, .num_queues = (uint16_t)v->dev.nq, .max_discard_sectors = VIRTIO_BLK_RANGE_SECTORS, .max_discard_seg = 1,
		.discard_sector_alignment = v->block_size >> 9, .max_write_zeroes_sectors = VIRTIO_BLK_RANGE_SECTORS, .max_write_zeroes_seg = 1,
		.write_zeroes_may_unmap = 1,
	};
	v->dev.config_len = (uint32_t)MIN(sizeof c, (size_t)VHOST_CONFIG_MAX);
	memcpy(v->dev.config, &c, v->dev.config_len);
}

static uint64_t features(const struct vhost_blk *v)
{
	return BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) | BIT(VIRTIO_BLK_F_TOPOLOGY) | BIT(VIRTIO_BLK_F_FLUSH) |
	       BIT(VIRTIO_BLK_F_CONFIG_WCE) | (v->dev.nq > 1 ? BIT(VIRTIO_BLK_F_MQ) : 0) |
	       (v->writable ? BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES) : BIT(VIRTIO_BLK_F_RO));
}

static int check_opts(const struct vhost_blk_opts *o, struct err *err)
{
	uint32_t bs = o->block_size;
	if (!o->num_queues || o->num_queues > 64)
		return err_set(err, -EINVAL, "vhost-user-blk export '%s': num-queues must be 1 to 64", o->id);
	if (bs && (bs < 512 || bs > 32768 || bs & (bs - 1)))
		return err_set(err, -EINVAL, "vhost-user-blk export '%s': logical-block-size must be a power of two from 512 to 32768", o->id);
	if (bs && bs < block_size(o->blk))
		return err_set(err, -EINVAL, "vhost-user-blk export '%s': the image needs blocks of %u bytes", o->id, block_size(o->blk));
	if (o->writable && block_read_only(o->blk))
		return err_set(err, -EINVAL, "vhost-user-blk export '%s': cannot export a read-only node as writable", o->id);
	return 0;
}

int vhost_blk_new(struct vhost_blk **out, const struct vhost_blk_opts *o, struct err *err)
{
	int r = check_opts(o, err);
	if (r)
		return r;
	struct vhost_blk *v = calloc(1, sizeof *v);
	if (!v)
		return err_set(err, -ENOMEM, "out of memory");
	v->listen = v->conn = -1;
	pthread_mutex_init(&v->lock, NULL);
	v->id = strdup(o->id);
	v->blk = o->blk;
	v->writable = o->writable;
	v->wce = block_write_cache(o->blk);
	v->block_size = o->block_size ? o->block_size : block_size(o->blk);
	v->stop = eventfd(0, EFD_CLOEXEC);
	v->bq = calloc(o->num_queues, sizeof *v->bq);
	v->dev.ops = &blk_ops;
	v->dev.name = v->id;
	v->dev.nq = o->num_queues;
	v->dev.host_features = features(v);
	r = v->id && v->bq && v->stop >= 0 ? vhost_dev_init(&v->dev, err) : err_set(err, -ENOMEM, "out of memory");
	if (r) {
		vhost_blk_free(v);
		return r;
	}
	fill_config(v);
	*out = v;
	return 0;
}

static int next_connection(struct vhost_blk *v)
{
	struct pollfd p[2] = { { v->listen, POLLIN, 0 }, { v->stop, POLLIN, 0 } };
	while (poll(p, 2, -1) >= 0 || errno == EINTR) {
		if (p[1].revents)
			return -1;
		int fd = p[0].revents ? accept4(v->listen, NULL, NULL, SOCK_CLOEXEC) : -1;
		if (fd >= 0)
			return fd;
		if (p[0].revents && errno != EAGAIN && errno != ECONNABORTED)
			poll(&p[1], 1, 100);
	}
	return -1;
}

static void talk(struct vhost_blk *v, int fd)
{
	struct pollfd p = { v->stop, POLLIN, 0 };
	pthread_mutex_lock(&v->lock);
	v->conn = fd;
	pthread_mutex_unlock(&v->lock);
	int r = poll(&p, 1, 0) ? 0 : vhost_dev_talk(&v->dev, fd);
	if (r)
		log_guest("%s: the front end's connection ended: %s", v->id, strerror(-r));
	pthread_mutex_lock(&v->lock);
	v->conn = -1;
	close(fd);
	pthread_mutex_unlock(&v->lock);
}

static void *blk_thread(void *arg)
{
	struct vhost_blk *v = arg;
	if (v->connected) {
		talk(v, v->listen);
		v->listen = -1;
		return NULL;
	}
	for (int fd; (fd = next_connection(v)) >= 0;)
		talk(v, fd);
	return NULL;
}

int vhost_blk_serve(struct vhost_blk *v, int fd, bool connected, struct err *err)
{
	sigset_t all, old;
	v->connected = connected;
	v->listen = fd;
	if (!connected)
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	v->running = !pthread_create(&v->thread, NULL, blk_thread, v);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (v->running)
		return 0;
	v->listen = -1;
	return err_set(err, -EAGAIN, "cannot start a thread");
}

void vhost_blk_free(struct vhost_blk *v)
{
	if (!v)
		return;
	if (v->running) {
		uint64_t one = 1;
		if (write(v->stop, &one, sizeof one) < 0)
			log_warn("eventfd: %s", strerror(errno));
		pthread_mutex_lock(&v->lock);
		if (v->conn >= 0)
			shutdown(v->conn, SHUT_RDWR);
		pthread_mutex_unlock(&v->lock);
		pthread_join(v->thread, NULL);
		if (v->writable)
			image_flush(v->blk);
	}
	vhost_dev_fini(&v->dev);
	for (unsigned i = 0; v->bq && i < v->dev.nq; i++) {
		for (struct request *r = v->bq[i].pool; r; r = v->bq[i].pool) {
			v->bq[i].pool = r->next;
			virtq_chain_free(&r->chain);
			free(r);
		}
	}
	if (v->listen >= 0)
		close(v->listen);
	if (v->stop >= 0)
		close(v->stop);
	pthread_mutex_destroy(&v->lock);
	free(v->bq);
	free(v->id);
	free(v);
}
