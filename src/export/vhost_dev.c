/* Memory, rings and messages of a vhost-user back end. */
#include "export/vhost_dev.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>

#include "base/log.h"
#include "base/util.h"

static const uint64_t protocol_features = BIT(VHOST_P_MQ) | BIT(VHOST_P_REPLY_ACK) | BIT(VHOST_P_CONFIG) | BIT(VHOST_P_RESET_DEVICE) |
					  BIT(VHOST_P_CONFIGURE_MEM_SLOTS);

static void set_fd(int *slot, int fd)
{
	if (*slot >= 0)
		close(*slot);
	*slot = fd;
}

static void ring_fd(int fd)
{
	uint64_t one = 1;
	if (fd >= 0 && write(fd, &one, sizeof one) < 0)
		return; /* the counter is full: it is set */
}

void vhost_queue_notify(struct vhost_queue *q)
{
	if (virtq_should_notify(&q->q))
		ring_fd(q->call);
}

/* --- rings --- */

static int to_gpa(struct vhost_dev *d, uint64_t uva, uint64_t *gpa)
{
	for (unsigned i = 0; i < d->nregions; i++) {
		const struct vhost_region *r = &d->region[i].r;
		if (uva >= r->uva && uva - r->uva < r->size) {
			*gpa = r->gpa + (uva - r->uva);
			return 0;
		}
	}
	return -EFAULT;
}

static void *queue_thread(void *arg)
{
	struct vhost_queue *q = arg;
	struct pollfd p[2] = { { q->kick, POLLIN, 0 }, { q->stop, POLLIN, 0 } };
	uint64_t n;
	for (;;) {
		pthread_mutex_lock(&q->lock);
		bool more = q->d->ops->serve(q);
		if (q->q.broken)
			ring_fd(q->err);
		pthread_mutex_unlock(&q->lock);
		/* Whatever the ring holds, a stop is seen after each turn. */
		if (poll(p, 2, more ? 0 : -1) < 0 && errno != EINTR)
			break;
		if (p[1].revents || p[0].revents & (POLLERR | POLLNVAL))
			break;
		ssize_t got = p[0].revents ? read(q->kick, &n, sizeof n) : 1;
		if (!got || (got < 0 && errno != EAGAIN && errno != EINTR))
			break; /* the other end is closed */
	}
	return NULL;
}

static void positions_set(struct virtq *q, uint32_t base)
{
	if (q->packed) {
		q->next_avail = base & 0x7fff;
		q->avail_wrap = base >> 15 & 1;
		q->next_used = base >> 16 & 0x7fff;
		q->used_wrap = base >> 31;
		return;
	}
	q->next_avail = (uint16_t)base;
	/* What was taken and not given back by a back end before is not taken again. */
	q->next_used = __atomic_load_n((uint16_t *)(void *)(q->device + 2), __ATOMIC_ACQUIRE);
}

static uint32_t positions(const struct virtq *q)
{
	if (!q->packed)
		return q->next_avail;
	return q->next_avail | (uint32_t)q->avail_wrap << 15 | (uint32_t)q->next_used << 16 | (uint32_t)q->used_wrap << 31;
}

static int enable_ring(struct vhost_queue *q)
{
	struct vhost_dev *d = q->d;
	virtq_destroy(&q->q);
	int r = virtq_init(&q->q, d->mem, d->name, q->index, VIRTQ_MAX_SIZE, NULL);
	q->q.size = q->size;
	q->q.packed = d->features >> VIRTIO_F_RING_PACKED & 1;
	q->q.event_idx = d->features >> VIRTIO_RING_F_EVENT_IDX & 1;
	q->q.indirect = d->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
	if (!r)
		r = to_gpa(d, q->desc, &q->q.desc_gpa);
	if (!r)
		r = to_gpa(d, q->avail, &q->q.driver_gpa);
	if (!r)
		r = to_gpa(d, q->used, &q->q.device_gpa);
	if (!r)
		r = virtq_enable(&q->q);
	if (r)
		return r;
	if (q->q.packed && ((q->base & 0x7fff) >= q->size || (q->base >> 16 & 0x7fff) >= q->size))
		return -EINVAL;
	positions_set(&q->q, q->base);
	virtq_want_kicks(&q->q, true);
	return 0;
}

static int queue_start(struct vhost_queue *q)
{
	sigset_t all, old;
	uint64_t n;
	if (q->running || !q->enabled || !q->addr_set || !q->size || q->kick < 0 || !q->d->mem)
		return 0;
	int r = enable_ring(q);
	if (r) {
		log_guest("%s: queue %u cannot start: %s", q->d->name, q->index, strerror(-r));
		return r;
	}
	if (read(q->stop, &n, sizeof n) < 0 && errno != EAGAIN)
		return -errno;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	q->running = !pthread_create(&q->thread, NULL, queue_thread, q);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return q->running ? 0 : -EAGAIN;
}

/* Nothing of the ring is used any more afterwards. */
static void queue_stop(struct vhost_queue *q)
{
	if (!q->running)
		return;
	ring_fd(q->stop);
	pthread_join(q->thread, NULL);
	pthread_mutex_lock(&q->lock);
	while (q->in_flight)
		pthread_cond_wait(&q->idle, &q->lock);
	q->base = positions(&q->q);
	virtq_destroy(&q->q);
	pthread_mutex_unlock(&q->lock);
	q->running = false;
}

static int start_all(struct vhost_dev *d)
{
	int r = 0;
	for (unsigned i = 0; i < d->nq; i++) {
		int e = queue_start(&d->q[i]);
		r = r ? r : e;
	}
	return r;
}

static void stop_all(struct vhost_dev *d)
{
	for (unsigned i = 0; i < d->nq; i++)
		queue_stop(&d->q[i]);
}

/* --- memory --- */

static void drop_regions(struct vhost_dev *d)
{
	for (unsigned i = 0; i < d->nregions; i++)
		close(d->region[i].fd);
	d->nregions = 0;
}

/* Queues are stopped. Guest memory anew from the list of regions. */
static int remap(struct vhost_dev *d)
{
	struct err err = { 0 };
	guest_mem_destroy(d->mem);
	d->mem = NULL;
	int r = d->nregions ? guest_mem_create(&d->mem, NULL, &err) : 0;
	for (unsigned i = 0; !r && i < d->nregions; i++) {
		const struct vhost_region *g = &d->region[i].r;
		if (g->uva + (g->size - 1) < g->uva)
			r = err_set(&err, -EINVAL, "a region wraps around");
		else
			r = guest_mem_add_fd(d->mem, "vhost-user", g->gpa, g->size, d->region[i].fd, g->offset, &err);
	}
	if (r) {
		log_guest("%s: %s", d->name, err.msg);
		guest_mem_destroy(d->mem);
		d->mem = NULL;
		drop_regions(d);
	}
	return r;
}

static int add_region(struct vhost_dev *d, const struct vhost_region *r, int fd)
{
	if (fd < 0 || d->nregions == VHOST_SLOTS_MAX) {
		if (fd >= 0)
			close(fd);
		return -EINVAL;
	}
	d->region[d->nregions].r = *r;
	d->region[d->nregions++].fd = fd;
	return 0;
}

static int set_mem_table(struct vhost_dev *d, struct vhost_msg *m)
{
	int r = 0;
	if (m->p.mem.n > VHOST_REGIONS_MAX || m->size != 8 + m->p.mem.n * sizeof(struct vhost_region) || m->nfds != m->p.mem.n)
		return -EPROTO;
	stop_all(d);
	drop_regions(d);
	for (unsigned i = 0; !r && i < m->p.mem.n; i++)
		r = add_region(d, &m->p.mem.r[i], vhost_take_fd(m, i));
	if (!r)
		r = remap(d);
	return r ? r : start_all(d);
}

static int add_mem_reg(struct vhost_dev *d, struct vhost_msg *m)
{
	stop_all(d);
	int r = add_region(d, &m->p.slot.r, vhost_take_fd(m, 0));
	if (!r)
		r = remap(d);
	return r ? r : start_all(d);
}

static int rem_mem_reg(struct vhost_dev *d, struct vhost_msg *m)
{
	const struct vhost_region *w = &m->p.slot.r;
	for (unsigned i = 0; i < d->nregions; i++) {
		const struct vhost_region *r = &d->region[i].r;
		if (r->gpa != w->gpa || r->size != w->size || r->uva != w->uva)
			continue;
		stop_all(d);
		close(d->region[i].fd);
		d->region[i] = d->region[--d->nregions];
		int e = remap(d);
		if (!e)
			start_all(d); /* a ring that was in there stays stopped */
		return e;
	}
	return -ENOENT;
}

/* --- messages --- */

static struct vhost_queue *queue_of(struct vhost_dev *d, uint64_t index)
{
	return index < d->nq ? &d->q[index] : NULL;
}

static int vring_addr(struct vhost_dev *d, struct vhost_msg *m)
{
	struct vhost_queue *q = queue_of(d, m->p.addr.index);
	if (!q)
		return -EINVAL;
	queue_stop(q);
	q->desc = m->p.addr.desc;
	q->used = m->p.addr.used;
	q->avail = m->p.addr.avail;
	q->addr_set = true;
	return queue_start(q);
}

/*
 * Descriptors that wait and wake: eventfds, pipes, sockets. A file is always ready. What the front end leaves blocking would let it
 * hold a queue's thread in read() or write().
 */
static bool event_fd_ok(int fd)
{
	struct stat st;
	int flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fstat(fd, &st) < 0 || ((st.st_mode & S_IFMT) && !S_ISFIFO(st.st_mode) && !S_ISSOCK(st.st_mode)))
		return false;
	return flags & O_NONBLOCK || !fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

static int vring_fd(struct vhost_dev *d, struct vhost_msg *m)
{
	struct vhost_queue *q = queue_of(d, m->p.u64 & 0xff);
	bool none = m->p.u64 & VHOST_NO_FD;
	if (!q || m->p.u64 & ~0x1ffull || (none ? m->nfds : m->nfds != 1 || !event_fd_ok(m->fd[0])))
		return -EINVAL;
	if (m->request == VHOST_SET_VRING_KICK && none)
		return -ENOTSUP; /* polling a ring without kicks is not offered */
	/* The thread uses them: not while it runs. */
	bool was = q->running;
	queue_stop(q);
	set_fd(m->request == VHOST_SET_VRING_KICK ? &q->kick : m->request == VHOST_SET_VRING_CALL ? &q->call : &q->err, vhost_take_fd(m, 0));
	return was || m->request == VHOST_SET_VRING_KICK ? queue_start(q) : 0;
}

static int vring_state(struct vhost_dev *d, struct vhost_msg *m)
{
	struct vhost_queue *q = queue_of(d, m->p.state.index);
	uint32_t num = m->p.state.num;
	if (!q)
		return -EINVAL;
	if (m->request == VHOST_SET_VRING_ENABLE) {
		if (num > 1)
			return -EINVAL;
		if (!num)
			queue_stop(q);
		q->enabled = num;
		return queue_start(q);
	}
	if (q->running)
		return -EBUSY;
	if (m->request == VHOST_SET_VRING_BASE) {
		q->base = num;
	} else {
		if (!num || num > VIRTQ_MAX_SIZE)
			return -EINVAL;
		q->size = (uint16_t)num;
	}
	return 0;
}

static int set_features(struct vhost_dev *d, uint64_t f)
{
	if (f & ~d->host_features)
		return -EINVAL;
	d->features = f;
	for (unsigned i = 0; !(f >> VHOST_F_PROTOCOL_FEATURES & 1) && i < d->nq; i++)
		d->q[i].enabled = true; /* who does not know SET_VRING_ENABLE wants them all */
	return 0;
}

/* The state a front end finds; its connection's memory stays for a reset, not at the end. */
static void reset(struct vhost_dev *d)
{
	stop_all(d);
	for (unsigned i = 0; i < d->nq; i++) {
		struct vhost_queue *q = &d->q[i];
		set_fd(&q->kick, -1);
		set_fd(&q->call, -1);
		set_fd(&q->err, -1);
		q->addr_set = q->enabled = false;
		q->size = 0;
		q->base = 0;
	}
	d->features = 0;
}

/* Requests without an answer of their own: 0 or -errno; -EPROTO ends the connection. */
static int plain_request(struct vhost_dev *d, struct vhost_msg *m)
{
	switch (m->request) {
	case VHOST_SET_FEATURES: return set_features(d, m->p.u64);
	case VHOST_SET_OWNER: return 0;
	case VHOST_RESET_OWNER:
	case VHOST_RESET_DEVICE: reset(d); return 0;
	case VHOST_SET_MEM_TABLE: return set_mem_table(d, m);
	case VHOST_ADD_MEM_REG: return add_mem_reg(d, m);
	case VHOST_REM_MEM_REG: return rem_mem_reg(d, m);
	case VHOST_SET_VRING_ADDR: return vring_addr(d, m);
	case VHOST_SET_VRING_NUM:
	case VHOST_SET_VRING_BASE:
	case VHOST_SET_VRING_ENABLE: return vring_state(d, m);
	case VHOST_SET_VRING_KICK:
	case VHOST_SET_VRING_CALL:
	case VHOST_SET_VRING_ERR: return vring_fd(d, m);
	case VHOST_SET_PROTOCOL_FEATURES:
		if (m->p.u64 & ~protocol_features)
			return -EINVAL;
		d->protocol = m->p.u64;
		return 0;
	case VHOST_SET_CONFIG:
		if (m->size < 12 || m->p.config.size != m->size - 12 || range_bad(m->p.config.offset, m->p.config.size, d->config_len))
			return -EINVAL;
		return d->ops->set_config(d, m->p.config.offset, m->p.config.data, m->p.config.size);
	}
	log_guest("%s: vhost-user request %u (%s) is not supported", d->name, m->request, vhost_name(m->request));
	return -ENOTSUP;
}

static void answer_u64(struct vhost_msg *m, uint64_t v)
{
	m->p.u64 = v;
	m->size = 8;
}

/* 1: `m` is the answer; 0: no such request. */
static int asking_request(struct vhost_dev *d, struct vhost_msg *m)
{
	struct vhost_queue *q;
	switch (m->request) {
	case VHOST_GET_FEATURES: answer_u64(m, d->host_features); return 1;
	case VHOST_GET_PROTOCOL_FEATURES: answer_u64(m, protocol_features); return 1;
	case VHOST_GET_QUEUE_NUM: answer_u64(m, d->nq); return 1;
	case VHOST_GET_MAX_MEM_SLOTS: answer_u64(m, VHOST_SLOTS_MAX); return 1;
	case VHOST_GET_VRING_BASE:
		q = queue_of(d, m->p.state.index);
		if (!q)
			return -EPROTO;
		queue_stop(q);
		set_fd(&q->kick, -1);
		m->p.state.num = q->base;
		m->size = 8;
		return 1;
	case VHOST_GET_CONFIG:
		if (m->size < 12 || range_bad(m->p.config.offset, m->p.config.size, VHOST_CONFIG_MAX))
			return -EPROTO;
		memcpy(m->p.config.data, d->config + m->p.config.offset, m->p.config.size);
		m->size = 12 + m->p.config.size;
		return 1;
	}
	return 0;
}

static int one_message(struct vhost_dev *d, struct vhost_msg *m)
{
	int r = vhost_recv(d->sock, m);
	if (r)
		return r;
	bool ack = m->flags & VHOST_NEED_REPLY && d->protocol >> VHOST_P_REPLY_ACK & 1;
	int asked = asking_request(d, m);
	if (!asked) {
		r = plain_request(d, m);
		if (ack)
			answer_u64(m, r != 0);
	}
	vhost_close_fds(m);
	if (asked < 0 || r == -EPROTO)
		return -EPROTO;
	if (r && !ack)
		log_guest("%s: vhost-user %s: %s", d->name, vhost_name(m->request), strerror(-r));
	if (!asked && !ack)
		return 0;
	m->flags = VHOST_VERSION | VHOST_REPLY;
	return vhost_send(d->sock, m);
}

int vhost_dev_talk(struct vhost_dev *d, int sock)
{
	struct vhost_msg *m = malloc(sizeof *m);
	int r = m ? 0 : -ENOMEM;
	d->sock = sock;
	d->protocol = 0;
	while (!r)
		r = one_message(d, m);
	reset(d);
	drop_regions(d);
	guest_mem_destroy(d->mem);
	d->mem = NULL;
	free(m);
	return r == -EPIPE ? 0 : r;
}

int vhost_dev_init(struct vhost_dev *d, struct err *err)
{
	d->host_features |= BIT(VIRTIO_F_VERSION_1) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(VIRTIO_RING_F_INDIRECT_DESC) |
			    BIT(VIRTIO_F_RING_PACKED) | BIT(VHOST_F_PROTOCOL_FEATURES);
	d->q = calloc(d->nq, sizeof *d->q);
	if (!d->q)
		return err_set(err, -ENOMEM, "out of memory");
	for (unsigned i = 0; i < d->nq; i++) {
		struct vhost_queue *q = &d->q[i];
		*q = (struct vhost_queue){ .d = d, .index = i, .kick = -1, .call = -1, .err = -1 };
		pthread_mutex_init(&q->lock, NULL);
		pthread_cond_init(&q->idle, NULL);
		q->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (q->stop < 0)
			return err_set_errno(err, -errno, "eventfd");
	}
	return 0;
}

void vhost_dev_fini(struct vhost_dev *d)
{
	for (unsigned i = 0; d->q && i < d->nq; i++) {
		set_fd(&d->q[i].stop, -1);
		pthread_mutex_destroy(&d->q[i].lock);
		pthread_cond_destroy(&d->q[i].idle);
	}
	free(d->q);
	d->q = NULL;
}
