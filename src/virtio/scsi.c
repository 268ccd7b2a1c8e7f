/*
 * The host bus adapter: request, control and event queues.
 *
 * As in blk.c a kick pops under the lock, submits without it, and what was answered at once shares one interrupt. A command may
 * take several block requests one after the other (unmap, write same). Aborts and resets of a unit wait for what the back
 * end has, which answers it first; so nothing that was aborted touches the medium later.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_ids.h>
#include <linux/virtio_scsi.h>

#include "base/log.h"
#include "base/util.h"
#include "virtio/scsi.h"
#include "virtio/virtio.h"

enum { CTRL = 0, EVENT = 1, FIRST = 2, BATCH = 32, INLINE_BYTES = 256 * 1024, INLINE_REQUESTS = 8, HEAD_SEGS = 8, RESP_FIXED = 12, REQ_FIXED = 19,
       SENSE_MAX = 252, EVENT_LEN = 16 };

struct scsi_request {
	struct virtq_chain chain;
	struct scsi_cmd cmd;
	struct scsi_hba *h;
	struct scsi_request *next;
	uint16_t qi;
	uint8_t response;
	struct iovec head[HEAD_SEGS];   /* where the response goes */
	unsigned n_head, head_len;
};

struct scsi_queue { struct scsi_request *inline_done; pthread_t submitter; bool submitting; };

struct scsi_hba {
	struct virtio_pci vp;
	struct scsi_queue *sq;
	struct scsi_request *pool, *failed, **failed_tail;
	struct scsi_unit **units;
	unsigned n_units;
	uint32_t in_flight;             /* atomic */
	struct virtq_chain ctrl, event;
	bool missed;
	/* properties */
	uint32_t num_queues, queue_size, seg_max, max_sectors, cmd_per_lun;
	bool hotplug, param_change;
	struct iothread *iothread[PROP_IOTHREADS_MAX];  /* queue i is the work of number i modulo n_threads */
	unsigned n_threads;
	struct loop *loops[PROP_IOTHREADS_MAX];
};

static struct scsi_hba *hba_of(struct virtio_dev *v)
{
	return container_of(v, struct scsi_hba, vp.v);
}

struct scsi_hba *scsi_hba_of(struct device *d)
{
	return container_of(d, struct scsi_hba, vp.dev);
}

struct virtio_dev *scsi_vdev(struct scsi_hba *h)
{
	return &h->vp.v;
}

const struct pci_device *scsi_pci(struct scsi_hba *h)
{
	return &h->vp.pci;
}

static uint32_t config_u32(const struct scsi_hba *h, unsigned off)
{
	return ld_le32(h->vp.v.config + off);
}

#define SENSE_SIZE offsetof(struct virtio_scsi_config, sense_size)
#define CDB_SIZE offsetof(struct virtio_scsi_config, cdb_size)

/* --- addresses --- */

static struct scsi_unit *unit_find(const struct scsi_hba *h, unsigned target, unsigned lun)
{
	for (unsigned i = 0; i < h->n_units; i++)
		if (h->units[i]->target == target && h->units[i]->lun == lun && h->units[i]->plugged)
			return h->units[i];
	return NULL;
}

static bool target_exists(const struct scsi_hba *h, unsigned target)
{
	for (unsigned i = 0; i < h->n_units; i++)
		if (h->units[i]->target == target && h->units[i]->plugged)
			return true;
	return false;
}

/* 5.6.6.1: a target and a LUN in flat space addressing, or the REPORT LUNS well known unit. */
static bool decode_lun(const uint8_t *l, unsigned *target, unsigned *lun)
{
	*target = l[1];
	*lun = (unsigned)(l[2] << 8 | l[3]) & 0x3fff;
	return l[0] == 1 || (l[0] == 0xc1 && l[1] == 1);
}

static void encode_lun(const struct scsi_unit *u, uint8_t *l)
{
	memset(l, 0, 8);
	l[0] = 1;
	l[1] = (uint8_t)u->target;
	l[2] = (uint8_t)(u->lun >> 8 | 0x40);
	l[3] = (uint8_t)u->lun;
}

static unsigned report_luns(const struct scsi_hba *h, unsigned target, uint8_t *b)
{
	unsigned n = 8;

	memset(b, 0, SCSI_ANSWER);
	for (unsigned i = 0; i < h->n_units && n + 8 <= SCSI_ANSWER; i++) {
		const struct scsi_unit *u = h->units[i];

		if (u->target != target || !u->plugged)
			continue;
		b[n] = u->lun > 255 ? (uint8_t)(u->lun >> 8 | 0x40) : 0;
		b[n + 1] = (uint8_t)u->lun;
		n += 8;
	}
	scsi_put(b, n - 8, 4);
	return n;
}

/* --- requests --- */

static struct scsi_request *request_get(struct scsi_hba *h)
{
	struct scsi_request *r = h->pool;

	if (r)
		h->pool = r->next;
	else
		r = calloc(1, sizeof(*r));
	if (r)
		r->h = h;
	return r;
}

static void request_put(struct scsi_hba *h, struct scsi_request *r)
{
	scsi_cmd_free(&r->cmd);
	virtq_chain_trim(&r->chain);
	r->next = h->pool;
	h->pool = r;
}

/* Lock held. 5.6.6.1.1: the response, then data; the residual counts what the guest offered and did not get. */
static void request_finish(struct scsi_hba *h, struct scsi_request *r)
{
	struct scsi_cmd *c = &r->cmd;
	uint8_t b[RESP_FIXED + SENSE_MAX] = { 0 };
	uint64_t offered = r->chain.in_len ? r->chain.in_len : r->chain.out_len;
	unsigned sense = MIN(c->has_sense ? (unsigned)SCSI_SENSE : 0, r->head_len - RESP_FIXED);

	if (!r->response && c->overrun)
		r->response = VIRTIO_SCSI_S_OVERRUN;
	if (!r->response) {
		st_le32(b, sense);
		st_le32(b + 4, (uint32_t)(offered - MIN(c->moved, offered)));
		b[10] = c->status;
		memcpy(b + RESP_FIXED, c->sense, sense);
	}
	b[11] = r->response;
	iov_from_buf(r->head, r->n_head, 0, b, r->head_len);
	virtq_fill(virtio_vq(&h->vp.v, r->qi), &r->chain, r->head_len + (r->chain.in_len && !r->response ? (uint32_t)c->moved : 0));
	request_put(h, r);
}

/* Lock held: the back end answered. True: another block request follows. */
static bool request_step(struct scsi_hba *h, struct scsi_request *r)
{
	struct scsi_cmd *c = &r->cmd;
	struct scsi_unit *u = c->unit;
	bool failed = c->io.ret && c->io.ret != -ENOTSUP;
	enum io_policy p = failed ? io_failed(&c->io, u->drive, u->werror, u->rerror, h->vp.v.env) : IO_REPORT;

	if (p == IO_STOP) {
		r->next = NULL;
		*h->failed_tail = r;
		h->failed_tail = &r->next;
	} else {
		if (p == IO_IGNORE)
			c->io.ret = 0;
		if (scsi_next(c) == SCSI_BLOCK_IO)
			return true;
		request_finish(h, r);
	}
	__atomic_sub_fetch(&u->in_flight, 1, __ATOMIC_RELEASE);
	__atomic_sub_fetch(&h->in_flight, 1, __ATOMIC_RELEASE);
	return false;
}

/* Any thread, no lock held. */
static void request_done(struct block_req *io)
{
	struct scsi_request *r = container_of(io, struct scsi_request, cmd.io);
	struct scsi_hba *h = r->h;
	struct virtio_dev *v = &h->vp.v;
	struct scsi_queue *sq = &h->sq[r->qi];
	struct block *b = r->cmd.unit->drive;
	unsigned qi = r->qi;

	if (__atomic_load_n(&sq->submitting, __ATOMIC_ACQUIRE) &&
	    pthread_equal(__atomic_load_n(&sq->submitter, __ATOMIC_RELAXED), pthread_self())) {
		r->next = sq->inline_done;
		sq->inline_done = r;
		return;
	}
	pthread_mutex_lock(&v->lock);
	bool more = request_step(h, r);
	if (virtio_vq(v, qi)->filled) {
		virtq_flush(virtio_vq(v, qi));
		virtio_notify(v, qi);
	}
	pthread_mutex_unlock(&v->lock);
	if (more) {
		r->cmd.io.flags &= ~(unsigned)(BLOCK_REQ_INLINE | BLOCK_REQ_MORE);
		block_submit(b, &r->cmd.io);
	}
}

/* Where the response goes, before the chain is cut to its data. */
static bool take_head(struct scsi_request *r)
{
	uint64_t left = r->head_len;

	r->n_head = 0;
	for (unsigned i = 0; left && i < r->chain.n_in && r->n_head < HEAD_SEGS; i++) {
		uint64_t n = MIN(left, (uint64_t)r->chain.in[i].iov_len);

		r->head[r->n_head++] = (struct iovec){ r->chain.in[i].iov_base, n };
		left -= n;
	}
	iov_trim_front(&r->chain.in, &r->chain.n_in, r->head_len);
	r->chain.in_len -= r->head_len;
	return !left;
}

static enum scsi_step request_start(struct scsi_hba *h, struct scsi_request *r, const uint8_t *head)
{
	struct scsi_cmd *c = &r->cmd;
	unsigned target, lun;
	uint8_t luns[SCSI_ANSWER];
	bool known = decode_lun(head, &target, &lun);

	if (!known || (head[0] == 1 && !target_exists(h, target))) {
		r->response = VIRTIO_SCSI_S_BAD_TARGET;
		return SCSI_ANSWERED;
	}
	c->unit = head[0] == 1 ? unit_find(h, target, lun) : NULL;
	if (!c->unit || c->cdb[0] == 0xa0) {
		unsigned n = report_luns(h, target, luns);

		scsi_no_unit(c, luns, n);
		return SCSI_ANSWERED;
	}
	return scsi_start(c);
}

/* -1: malformed. */
static int request_prepare(struct scsi_hba *h, struct scsi_request *r)
{
	unsigned cdb = config_u32(h, CDB_SIZE), req_len = REQ_FIXED + cdb;
	struct virtq_chain *c = &r->chain;
	uint8_t head[REQ_FIXED + SCSI_CDB];

	r->head_len = RESP_FIXED + config_u32(h, SENSE_SIZE);
	r->response = VIRTIO_SCSI_S_OK;
	if (c->in_len < r->head_len || iov_to_buf(c->out, c->n_out, 0, head, req_len) != req_len || !take_head(r)) {
		log_guest("%s: request without header or room for a response", h->vp.v.name);
		return -1;
	}
	iov_trim_front(&c->out, &c->n_out, req_len);
	c->out_len -= req_len;
	r->cmd = (struct scsi_cmd){ .in = c->in, .n_in = c->n_in, .in_len = c->in_len, .out = c->out, .n_out = c->n_out,
				    .out_len = c->out_len, .io = { .done = request_done, .lane = r->qi } };
	memcpy(r->cmd.cdb, head + REQ_FIXED, cdb);
	if (c->in_len && c->out_len) { /* VIRTIO_SCSI_F_INOUT is not offered */
		r->response = VIRTIO_SCSI_S_FAILURE;
		return SCSI_ANSWERED;
	}
	return request_start(h, r, head);
}

static struct scsi_request *batch_pop(struct scsi_hba *h, unsigned qi, unsigned batch, unsigned *popped)
{
	struct scsi_request *head = NULL, **tail = &head, *r;
	struct virtio_dev *v = &h->vp.v;

	for (; *popped < batch && (r = request_get(h)); ++*popped) {
		r->qi = (uint16_t)qi;
		if (!virtio_pop(v, qi, &r->chain)) {
			request_put(h, r);
			break;
		}
		int step = request_prepare(h, r);
		if (step < 0) {
			request_put(h, r);
			virtio_needs_reset(v);
			break;
		}
		if (step == SCSI_ANSWERED) {
			request_finish(h, r);
			continue;
		}
		__atomic_add_fetch(&r->cmd.unit->in_flight, 1, __ATOMIC_RELAXED);
		__atomic_add_fetch(&h->in_flight, 1, __ATOMIC_RELAXED);
		r->next = NULL;
		*tail = r;
		tail = &r->next;
	}
	return head;
}

/* A list without the lock; those of one unit in a row enter the kernel together. */
static void submit_list(struct scsi_request *list)
{
	struct scsi_request *next;
	uint64_t bytes = 0;

	for (; list; list = next) {
		struct block *b = list->cmd.unit->drive;

		next = list->next;
		bytes += list->cmd.io.len;
		bool more = next && next->cmd.unit->drive == b;
		list->cmd.io.flags |= (more ? BLOCK_REQ_MORE : 0) | (bytes <= INLINE_BYTES && list->cmd.io.op != BLOCK_FLUSH ? BLOCK_REQ_INLINE : 0);
		block_submit(b, &list->cmd.io);
		if (!more)
			block_unplug(b);
	}
}

/* Lock dropped in the middle. */
static void batch_submit(struct scsi_hba *h, unsigned qi, struct scsi_request *list)
{
	struct scsi_queue *sq = &h->sq[qi];
	struct scsi_request *again = NULL, *next;

	sq->inline_done = NULL;
	__atomic_store_n(&sq->submitter, pthread_self(), __ATOMIC_RELAXED);
	__atomic_store_n(&sq->submitting, true, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&h->vp.v.lock);
	submit_list(list);
	__atomic_store_n(&sq->submitting, false, __ATOMIC_RELEASE);
	pthread_mutex_lock(&h->vp.v.lock);
	for (struct scsi_request *r = sq->inline_done; r; r = next) {
		next = r->next;
		if (request_step(h, r)) {
			r->next = again;
			again = r;
		}
	}
	sq->inline_done = NULL;
	if (!again)
		return;
	pthread_mutex_unlock(&h->vp.v.lock);
	for (; again; again = next) {
		next = again->next;
		again->cmd.io.flags &= ~(unsigned)(BLOCK_REQ_INLINE | BLOCK_REQ_MORE);
		block_submit(again->cmd.unit->drive, &again->cmd.io);
	}
	pthread_mutex_lock(&h->vp.v.lock);
}

static void serve_requests(struct scsi_hba *h, unsigned qi)
{
	struct virtio_dev *v = &h->vp.v;
	struct virtq *q = virtio_vq(v, qi);
	bool hand_over = h->n_threads && !loop_on_thread(h->loops[qi % h->n_threads]);
	unsigned total = 0, budget = hand_over ? INLINE_REQUESTS : VIRTIO_BUDGET, n;

	do {
		virtq_want_kicks(q, false);
		do {
			n = 0;
			struct scsi_request *list = batch_pop(h, qi, MIN(budget - total, (unsigned)BATCH), &n);

			if (list)
				batch_submit(h, qi, list);
			if (q->filled) {
				virtq_flush(q);
				virtio_notify(v, qi);
			}
			total += n;
		} while (n == BATCH && total < budget);
		if (total >= budget && !virtq_empty(q)) {
			virtio_defer(v, qi);
			return;
		}
		virtq_want_kicks(q, true);
	} while (!virtq_empty(q) && virtio_queue_ready(v, qi));
}

/* --- task management --- */

/* What failed and waits for the machine to go on is answered instead. Lock held. */
static void drop_failed(struct scsi_hba *h, const struct scsi_unit *u, unsigned qi, uint8_t response)
{
	struct scsi_request **p = &h->failed, *r;

	while ((r = *p)) {
		if ((u && r->cmd.unit != u) || (qi != VIRTIO_MAX_QUEUES && r->qi != qi)) {
			p = &r->next;
			continue;
		}
		*p = r->next;
		r->response = response;
		if (!u) {
			request_put(h, r);
			continue;
		}
		unsigned to = r->qi;
		request_finish(h, r);
		virtq_flush(virtio_vq(&h->vp.v, to));
		virtio_notify(&h->vp.v, to);
	}
	h->failed_tail = p;
}

/* Lock held, dropped meanwhile: until the back end has nothing of this unit. */
static void unit_settle(struct scsi_hba *h, struct scsi_unit *u, uint8_t response)
{
	pthread_mutex_unlock(&h->vp.v.lock);
	while (u->drive && __atomic_load_n(&u->in_flight, __ATOMIC_ACQUIRE)) {
		block_drain(u->drive);
		sched_yield();
	}
	pthread_mutex_lock(&h->vp.v.lock);
	drop_failed(h, u, VIRTIO_MAX_QUEUES, response);
}

static void target_reset(struct scsi_hba *h, unsigned target)
{
	for (unsigned i = 0; i < h->n_units; i++) {
		struct scsi_unit *u = h->units[i];

		if (u->target != target)
			continue;
		unit_settle(h, u, VIRTIO_SCSI_S_RESET);
		u->unit_attention = SENSE_UA_RESET;
	}
}

/* 5.6.6.2. The lock may be dropped; a unit cannot go away: unplugging waits for the queue that is being served. */
static uint8_t task_management(struct scsi_hba *h, const uint8_t *b)
{
	unsigned target, lun;
	struct scsi_unit *u = decode_lun(b + 8, &target, &lun) ? unit_find(h, target, lun) : NULL;

	if (!target_exists(h, target))
		return VIRTIO_SCSI_S_BAD_TARGET;
	switch (ld_le32(b + 4)) {
	case VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET:
		target_reset(h, target);
		return VIRTIO_SCSI_S_OK;
	case VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET:
		if (!u)
			return VIRTIO_SCSI_S_INCORRECT_LUN;
		unit_settle(h, u, VIRTIO_SCSI_S_RESET);
		u->unit_attention = SENSE_UA_RESET;
		return VIRTIO_SCSI_S_OK;
	case VIRTIO_SCSI_T_TMF_ABORT_TASK:
	case VIRTIO_SCSI_T_TMF_ABORT_TASK_SET:
	case VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET:
		if (!u)
			return VIRTIO_SCSI_S_INCORRECT_LUN;
		unit_settle(h, u, VIRTIO_SCSI_S_ABORTED);
		return VIRTIO_SCSI_S_OK;
	case VIRTIO_SCSI_T_TMF_QUERY_TASK:
	case VIRTIO_SCSI_T_TMF_QUERY_TASK_SET:
		if (!u)
			return VIRTIO_SCSI_S_INCORRECT_LUN;
		return __atomic_load_n(&u->in_flight, __ATOMIC_ACQUIRE) ? VIRTIO_SCSI_S_FUNCTION_SUCCEEDED : VIRTIO_SCSI_S_OK;
	}
	return VIRTIO_SCSI_S_FUNCTION_REJECTED;
}

static bool serve_control_one(struct scsi_hba *h)
{
	struct virtq_chain *c = &h->ctrl;
	uint8_t b[24] = { 0 }, answer[5] = { 0 };
	size_t have = iov_to_buf(c->out, c->n_out, 0, b, sizeof(b)), len = 5;

	switch (have >= 4 ? ld_le32(b) : UINT32_MAX) {
	case VIRTIO_SCSI_T_TMF:
		if (have < 24 || !c->in_len)
			return false;
		answer[0] = task_management(h, b);
		len = 1;
		break;
	case VIRTIO_SCSI_T_AN_QUERY:
	case VIRTIO_SCSI_T_AN_SUBSCRIBE:
		if (have < 16 || c->in_len < 5)
			return false;
		break; /* no events there */
	default:
		return false;
	}
	iov_from_buf(c->in, c->n_in, 0, answer, len);
	virtq_push(virtio_vq(&h->vp.v, CTRL), c, (uint32_t)len);
	virtio_notify(&h->vp.v, CTRL);
	return true;
}

static void serve_control(struct scsi_hba *h)
{
	struct virtio_dev *v = &h->vp.v;
	unsigned n = 0;

	while (n < 16 && virtio_pop(v, CTRL, &h->ctrl)) {
		n++;
		if (!serve_control_one(h)) {
			log_guest("%s: malformed control request", v->name);
			virtio_needs_reset(v);
			return;
		}
	}
	if (n == 16)
		virtio_defer(v, CTRL);
}

/* --- events --- */

void scsi_event(struct scsi_hba *h, const struct scsi_unit *u, uint32_t event, uint32_t reason)
{
	struct virtio_dev *v = &h->vp.v;
	uint8_t b[EVENT_LEN] = { 0 };

	if (!virtio_driver_ok(v))
		return;
	if (!virtio_pop(v, EVENT, &h->event)) {
		h->missed = true;
		return;
	}
	st_le32(b, event | (h->missed ? VIRTIO_SCSI_T_EVENTS_MISSED : 0));
	if (u)
		encode_lun(u, b + 4);
	st_le32(b + 12, reason);
	h->missed = false;
	virtq_push(virtio_vq(v, EVENT), &h->event, (uint32_t)iov_from_buf(h->event.in, h->event.n_in, 0, b, sizeof(b)));
	virtio_notify(v, EVENT);
}

/* --- the device --- */

static void hba_kick(struct virtio_dev *v, unsigned qi)
{
	struct scsi_hba *h = hba_of(v);

	if (qi == CTRL)
		serve_control(h);
	else if (qi != EVENT)
		serve_requests(h, qi);
	else if (h->missed)
		scsi_event(h, NULL, VIRTIO_SCSI_T_NO_EVENT, 0);
}

static void hba_drain(struct virtio_dev *v)
{
	struct scsi_hba *h = hba_of(v);

	for (unsigned i = 0; i < h->n_units; i++) {
		struct block *b = h->units[i]->drive;
		uint32_t *n = &h->units[i]->in_flight;

		pthread_mutex_unlock(&v->lock);
		while (b && __atomic_load_n(n, __ATOMIC_ACQUIRE)) {
			block_drain(b);
			sched_yield();
		}
		pthread_mutex_lock(&v->lock);
	}
}

static void hba_forget(struct virtio_dev *v, unsigned qi)
{
	drop_failed(hba_of(v), NULL, qi, 0);
}

static void hba_reset(struct virtio_dev *v)
{
	struct scsi_hba *h = hba_of(v);

	h->missed = false;
	st_le32(v->config + SENSE_SIZE, VIRTIO_SCSI_SENSE_DEFAULT_SIZE);
	st_le32(v->config + CDB_SIZE, VIRTIO_SCSI_CDB_DEFAULT_SIZE);
	for (unsigned i = 0; i < h->n_units; i++) {
		h->units[i]->unit_attention = 0;
		h->units[i]->locked = h->units[i]->stopped = false;
	}
}

/* 5.6.4: two fields are the driver's. */
static void hba_config_write(struct virtio_dev *v, unsigned off, const uint8_t *buf, unsigned len)
{
	uint32_t val = len == 4 ? ld_le32(buf) : 0;

	if ((off == SENSE_SIZE && len == 4 && val <= SENSE_MAX) || (off == CDB_SIZE && val >= 6 && val <= SCSI_CDB))
		st_le32(v->config + off, val);
}

static const struct virtio_ops hba_ops = {
	.kick = hba_kick, .drain = hba_drain, .reset = hba_reset, .forget = hba_forget, .config_write = hba_config_write,
};

/* --- units --- */

int scsi_plug(struct scsi_hba *h, struct scsi_unit *u, struct err *err)
{
	struct virtio_dev *v = &h->vp.v;
	struct scsi_unit **units;
	int r = 0;

	pthread_mutex_lock(&v->lock);
	if (u->target == UINT32_MAX)
		for (u->target = 0; u->target < SCSI_MAX_TARGET && target_exists(h, u->target) && !u->lun; u->target++)
			;
	if (u->target > SCSI_MAX_TARGET || u->lun > SCSI_MAX_LUN || u->channel)
		r = err_set(err, -ERANGE, "%s: channel 0, scsi-id 0 to %d and lun 0 to %d are possible", u->dev.cls->name, SCSI_MAX_TARGET, SCSI_MAX_LUN);
	else if (unit_find(h, u->target, u->lun))
		r = err_set(err, -EEXIST, "%s: scsi-id %u, lun %u is taken", u->dev.cls->name, u->target, u->lun);
	units = r ? NULL : realloc(h->units, (h->n_units + 1) * sizeof(*units));
	if (units) {
		h->units = units;
		units[h->n_units++] = u;
		u->plugged = true;
		if (virtio_has(v, VIRTIO_SCSI_F_HOTPLUG))
			scsi_event(h, u, VIRTIO_SCSI_T_TRANSPORT_RESET, VIRTIO_SCSI_EVT_RESET_RESCAN);
	} else if (!r) {
		r = err_set(err, -ENOMEM, "%s: no memory", u->dev.cls->name);
	}
	pthread_mutex_unlock(&v->lock);
	if (!r && h->n_threads && u->drive)
		r = block_set_loops(u->drive, h->loops, h->n_threads, err);
	return r;
}

void scsi_unplug(struct scsi_hba *h, struct scsi_unit *u)
{
	struct virtio_dev *v = &h->vp.v;

	pthread_mutex_lock(&v->lock);
	u->plugged = false;             /* nothing new */
	while (v->n_serving)            /* nobody holds a pointer across a dropped lock */
		pthread_cond_wait(&v->idle, &v->lock);
	unit_settle(h, u, VIRTIO_SCSI_S_BAD_TARGET);
	for (unsigned i = 0; i < h->n_units; i++)
		if (h->units[i] == u)
			h->units[i--] = h->units[--h->n_units];
	if (virtio_has(v, VIRTIO_SCSI_F_HOTPLUG))
		scsi_event(h, u, VIRTIO_SCSI_T_TRANSPORT_RESET, VIRTIO_SCSI_EVT_RESET_REMOVED);
	pthread_mutex_unlock(&v->lock);
	if (h->n_threads && u->drive)
		block_set_loop(u->drive, v->env->loop, NULL);
}

void scsi_retry(struct scsi_hba *h)
{
	struct scsi_request *list;

	pthread_mutex_lock(&h->vp.v.lock);
	list = h->failed;
	h->failed = NULL;
	h->failed_tail = &h->failed;
	for (struct scsi_request *r = list; r; r = r->next) {
		__atomic_add_fetch(&r->cmd.unit->in_flight, 1, __ATOMIC_RELAXED);
		__atomic_add_fetch(&h->in_flight, 1, __ATOMIC_RELAXED);
	}
	pthread_mutex_unlock(&h->vp.v.lock);
	submit_list(list);
}

/* --- life --- */

static void hba_free(struct scsi_hba *h)
{
	struct scsi_request *r;

	while ((r = h->pool)) {
		h->pool = r->next;
		virtq_chain_free(&r->chain);
		free(r);
	}
	virtq_chain_free(&h->ctrl);
	virtq_chain_free(&h->event);
	free(h->sq);
	free(h->units);
	h->sq = NULL;
	h->units = NULL;
	virtio_pci_destroy(&h->vp);
}

static int hba_create(struct device *dev, struct err *err)
{
	struct scsi_hba *h = container_of(dev, struct scsi_hba, vp.dev);
	unsigned n = FIRST + h->num_queues;
	uint64_t features = (h->hotplug ? BIT(VIRTIO_SCSI_F_HOTPLUG) : 0) | (h->param_change ? BIT(VIRTIO_SCSI_F_CHANGE) : 0);
	int r;

	if (h->queue_size & (h->queue_size - 1))
		return err_set(err, -EINVAL, "%s: virtqueue_size must be a power of two", dev->cls->name);
	r = virtio_pci_init(&h->vp, &(struct virtio_pci_config){ &hba_ops, VIRTIO_ID_SCSI, 0x01, 0x00, n, h->queue_size, n + 1, features,
			    sizeof(struct virtio_scsi_config) }, err);
	if (r)
		return r;
	struct virtio_scsi_config c = { .num_queues = h->num_queues, .seg_max = MIN(h->queue_size, 256u) - 2, .max_sectors = h->max_sectors,
		.cmd_per_lun = MIN(h->cmd_per_lun, h->queue_size), .event_info_size = EVENT_LEN, .max_target = SCSI_MAX_TARGET, .max_lun = SCSI_MAX_LUN };
	memcpy(h->vp.v.config, &c, sizeof(c));
	hba_reset(&h->vp.v);
	h->failed_tail = &h->failed;
	h->sq = calloc(n, sizeof(*h->sq));
	if (!h->sq)
		r = err_set(err, -ENOMEM, "%s: no memory", dev->cls->name);
	for (; h->n_threads < PROP_IOTHREADS_MAX && h->iothread[h->n_threads]; h->n_threads++)
		h->loops[h->n_threads] = iothread_loop(h->iothread[h->n_threads]);
	if (!r && h->n_threads)
		virtio_dev_use_loops(&h->vp.v, h->loops, h->n_threads);
	if (!r)
		r = virtio_pci_plug(&h->vp, err);
	if (r)
		hba_free(h);
	return r;
}

static void hba_destroy(struct device *dev)
{
	struct scsi_hba *h = container_of(dev, struct scsi_hba, vp.dev);

	virtio_pci_unplug(&h->vp);
	hba_free(h);
}

static void hba_pause(struct device *dev, bool paused)
{
	if (!paused)
		scsi_retry(container_of(dev, struct scsi_hba, vp.dev));
	virtio_pci_dev_pause(dev, paused);
}

static const struct prop hba_props[] = {
	VIRTIO_PCI_PROPS(struct scsi_hba),
	{ "num_queues", PROP_U32, offsetof(struct scsi_hba, num_queues), 1, .min = 1, .max = 64, .help = "request queues" },
	{ "virtqueue_size", PROP_U32, offsetof(struct scsi_hba, queue_size), 256, .min = 8, .max = VIRTQ_MAX_SIZE, .help = "descriptors in a queue" },
	{ "max_sectors", PROP_U32, offsetof(struct scsi_hba, max_sectors), 0xffff, .min = 1, .help = "longest transfer the driver is told of" },
	{ "cmd_per_lun", PROP_U32, offsetof(struct scsi_hba, cmd_per_lun), 128, .min = 1, .help = "commands a unit takes at once" },
	{ "hotplug", PROP_BOOL, offsetof(struct scsi_hba, hotplug), 1, .help = "tell the driver of units that come and go" },
	{ "param_change", PROP_BOOL, offsetof(struct scsi_hba, param_change), 1, .help = "tell the driver of units that change" },
	{ "iothread", PROP_IOTHREADS, offsetof(struct scsi_hba, iothread), .help = "id of an -object iothread; ID:ID...: several, which share the queues" },
	{ NULL }
};

const struct device_class virtio_scsi_pci_class = {
	.name = "virtio-scsi-pci", .aliases = (const char *const[]){ "virtio-scsi", NULL }, .desc = "virtio SCSI host adapter",
	.bus = "PCI", .provides = "SCSI", .props = hba_props, .size = sizeof(struct scsi_hba),
	.create = hba_create, .destroy = hba_destroy, .reset = virtio_pci_dev_reset, .pause = hba_pause,
};
