/* Opening, checking and dispatching requests: at once when the driver can, else on a worker. */
#include "block/block.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/graph.h"
#include "block/qcow2.h"
#include "loop/loop.h"

enum { CHAIN_MAX = 200 };

struct block *block_new(const struct block_opts *o, struct loop *l, struct workers *w)
{
	struct block *b = calloc(1, sizeof *b);
	if (!b)
		return NULL;
	pthread_mutex_init(&b->lock, NULL);
	pthread_cond_init(&b->idle, NULL);
	pthread_rwlock_init(&b->rmw, NULL);
	pthread_mutex_init(&b->listener_lock, NULL);
	b->waiting_tail = &b->waiting;
	b->fd = -1;
	b->size = 512;
	b->loop = l;
	b->workers = w;
	b->cache = o->cache;
	b->read_only = o->read_only;
	b->discard_unmap = o->discard_unmap;
	b->detect_zeroes = o->detect_zeroes;
	b->polled = o->polled;
	b->bare = o->bare;
	const char *file = o->file ? o->file : "";
	b->file = strdup(block_plain_path(file));
	b->id = o->id ? strdup(o->id) : NULL;
	b->node_name = o->node_name ? strdup(o->node_name) : NULL;
	if (b->file && (b->id || !o->id) && (b->node_name || !o->node_name))
		return b;
	block_free(b);
	return NULL;
}

void block_free(struct block *b)
{
	if (!b)
		return;
	if (b->drv && b->drv->close)
		b->drv->close(b);
	block_free(b->backing);
	block_free(b->child);
	for (unsigned i = 0; i < b->nmore; i++)
		block_free(b->more[i]);
	free(b->more);
	pthread_mutex_destroy(&b->lock);
	pthread_cond_destroy(&b->idle);
	pthread_rwlock_destroy(&b->rmw);
	pthread_mutex_destroy(&b->listener_lock);
	throttle_group_unref(b->throttle);
	free(b->id);
	free(b->file);
	free(b->node_name);
	free(b->owner);
	free(b);
}

int block_check_format(const char *what, const char *format, struct err *err)
{
	if (!strcmp(format, "raw") || !strcmp(format, "qcow2") || foreign_has_format(format))
		return 0;
	return err_set(err, -ENOTSUP, "%s: format '%s' is not supported; supported: " BLOCK_FORMATS, what, format);
}

char *block_path_beside(const char *file, const char *name)
{
	const char *slash = strrchr(file, '/');
	char *s = NULL;
	if (*name == '/' || !slash || block_name_is_protocol(name))
		return strdup(name);
	return asprintf(&s, "%.*s%s", (int)(slash - file + 1), file, name) < 0 ? NULL : s;
}

/* A format that is supported, or an error that says what it is instead. */
static int choose_format(struct block *leaf, const struct block_opts *o, const char **format, struct err *err)
{
	_Alignas(4096) uint8_t head[4096] = { 0 };
	struct iovec v = { head, sizeof head };
	const char *found;

	*format = o->format;
	if (o->format)
		return block_check_format(leaf->file, o->format, err);
	int r = leaf->length ? leaf->drv->read(leaf, 0, &v, 1, sizeof head) : 0;
	if (r)
		return err_set_errno(err, r, "%s: cannot read the first sector", leaf->file);
	found = probe_format(head, sizeof head);
	if (found && strcmp(found, "qcow2") && !foreign_has_format(found))
		return err_set(err, -ENOTSUP, "%s: this is a %s image, which is not supported; convert it with 'qemu-img convert "
			       "-O raw', or say format=raw if the guest shall see it as it is", leaf->file, found);
	*format = found ? found : "raw";
	return 0;
}

/* QEMU's rule: who names no format for a raw image gets one whose first sector stays raw. */
static void warn_probed(struct block *b, const struct block_opts *o)
{
	if (o->format || o->read_only || strcmp(b->drv->name, "raw"))
		return;
	b->probed_raw = true;
	if (!o->snapshot)
		log_warn("%s: no format given and it looks raw; sector 0 is protected against headers of other formats. "
			 "Say format=raw to allow them", b->file);
}

/* The node that n->leaf describes, as a file for a format. */
static int open_below(struct block **out, const struct block_name *n, struct loop *l, struct workers *w, unsigned depth, struct err *err)
{
	const struct block_opts *o = &n->o;
	struct block_opts c = { .options = &n->leaf, .tls = o->tls, .throttles = o->throttles, .read_only = o->read_only || o->snapshot,
				.auto_read_only = o->auto_read_only, .cache = o->cache, .aio = o->aio, .polled = o->polled, .shared = o->shared, .discard_unmap = true,
				.protocol = true };
	if (n->leaf.n == 1 && !strcmp(n->leaf.o[0].key, "filename")) {
		c.file = n->leaf.o[0].val;
		c.options = NULL;
	}
	int r = block_open_node(out, &c, l, w, depth + 1, err);
	if (r)
		return r;
	r = fit_open(out, err);
	/* raw is as its file is; what keeps tables of its own needs what it was asked for. */
	if (!r && (*out)->read_only && !c.read_only && !o->auto_read_only && o->format && strcmp(o->format, "raw"))
		r = err_set(err, -EACCES, "%s: the node below %s is read-only: Block node is read-only", (*out)->file, o->format);
	if (r) {
		block_free(*out);
		*out = NULL;
	}
	return r;
}

/* A file, device, server or node below a format. */
static int open_leaf(struct block **out, const struct block_name *n, struct loop *l, struct workers *w, unsigned depth, struct err *err)
{
	if (n->below)
		return open_below(out, n, l, w, depth, err);
	*out = block_new(&n->o, l, w);
	return *out ? leaf_open(*out, &n->o, err) : err_set(err, -ENOMEM, "%s: out of memory", n->o.file);
}

/* Leaf and format; the chain below it. */
static int open_resolved(struct block **out, const struct block_name *n, struct loop *l, struct workers *w, unsigned depth,
			 struct err *err)
{
	const struct block_opts *o = &n->o;
	struct block *leaf = NULL, *b;
	const char *format = NULL;
	int r = open_leaf(&leaf, n, l, w, depth, err);

	b = leaf;
	if (!r)
		r = choose_format(leaf, o, &format, err);
	if (!r)
		r = block_format_check(o, leaf->file, format, err);
	if (!r && leaf->peeks && strcmp(format, "raw")) /* metadata must not change meanwhile */
		r = lock_image(leaf->fd, leaf->file, IMAGE_READ, err);
	bool window = !r && !strcmp(format, "raw") && (o->fmt.raw_only || n->below);
	if (!r && (window || strcmp(format, "raw"))) {
		b = block_new(o, l, w);
		if (b) {
			b->child = leaf;
			b->read_only = o->read_only || o->snapshot || leaf->read_only;
			if (leaf->nbd || n->below) { /* messages name the server, or the file at the bottom */
				char *name = strdup(leaf->file);
				free(b->file);
				b->file = name ? name : strdup("nbd");
			}
			r = window ? window_open(b, o, err) : strcmp(format, "qcow2") ? foreign_open(b, format, o, depth, err) : qcow2_open(b, o, depth, err);
		} else {
			r = err_set(err, -ENOMEM, "%s: out of memory", o->file);
			b = leaf;
		}
	}
	if (r) {
		block_free(b);
		return r;
	}
	if (!depth)
		warn_probed(b, o);
	if (b == leaf && leaf->ragged && !b->read_only && strcmp(o->format ? o->format : "", "raw"))
		log_warn("%s: size %lld is no multiple of 512; the last sector is filled up with zeroes", leaf->file,
			 (long long)leaf->drv->file_length(leaf));
	*out = b;
	return 0;
}

int block_open_node(struct block **out, const struct block_opts *o, struct loop *l, struct workers *w, unsigned depth, struct err *err)
{
	struct block_name n = { 0 };
	*out = NULL;
	int r = depth > CHAIN_MAX ? err_set(err, -ELOOP, "more than %d nodes, one below the other", CHAIN_MAX) : block_name_resolve(&n, o, err);
	if (!r)
		r = n.filter ? filter_open(out, &n, l, w, depth, err) : open_resolved(out, &n, l, w, depth, err);
	block_name_free(&n);
	return r;
}

int block_open_backing(struct block **out, const struct block_opts *o, struct block *above, unsigned depth, struct err *err)
{
	if (depth > CHAIN_MAX)
		return err_set(err, -ELOOP, "%s: more than %d backing files; does the chain loop?", above->file, CHAIN_MAX);
	return block_open_node(out, o, above->loop, above->workers, depth, err);
}

int block_open(struct block **out, const struct block_opts *o, struct loop *l, struct workers *w, struct err *err)
{
	struct block *b, *top;
	int r = block_open_node(&b, o, l, w, 0, err);
	if (r)
		return r;
	if (o->internal && !b->qcow2) {
		r = err_set(err, -ENOTSUP, "%s: cannot load snapshot '%s': a %s node has no internal snapshots", b->file, o->internal, b->drv->name);
		block_free(b);
		return r;
	}
	if (o->copy_on_read && !o->snapshot && (r = cor_enable(b, err))) {
		block_free(b);
		return r;
	}
	if (o->snapshot) {
		top = block_new(o, l, w);
		r = top ? overlay_open(top, b, err) : err_set(err, -ENOMEM, "%s: out of memory", o->file);
		if (r) {
			block_free(top);
			block_free(b);
			return r;
		}
		top->child = b;
		b = top;
	}
	if (o->throttle)
		b->throttle = throttle_group_ref(o->throttle);
	*out = b;
	return 0;
}

/* Twice: the second flush writes the refcounts of what the first one made free. */
int block_close_checked(struct block *b)
{
	if (!b)
		return 0;
	block_drain(b);
	int r = 0;
	if (!b->qcow2)
		r = b->drv->flush(b);
	for (int i = 0; !r && i < 2 && b->qcow2 && !b->read_only; i++)
		r = q_flush(b->qcow2, true); /* with cache=unsafe the tables are written, not waited for */
	block_free(b);
	return r;
}

static void now_safe(struct block *b, void *unused)
{
	if (b->cache == CACHE_UNSAFE)
		b->cache = CACHE_WRITEBACK;
}

int block_sync_close(struct block *b)
{
	graph_walk(b, now_safe, NULL);
	return block_close_checked(b);
}

void block_unlock(struct block *b)
{
	for (; b->child; b = b->child)
		if (b->qcow2 && b->qcow2->data != b->qcow2->leaf)
			block_unlock(b->qcow2->data);
	unlock_image(b->fd);
}

void block_abandon(struct block *b)
{
	b->abandoned = true;
}

void block_close(struct block *b)
{
	block_close_checked(b);
}

/* --- requests --- */

/* A raw image that was taken for raw because nobody said so must not become something else. */
static bool changes_format(const struct block *b, const struct block_req *r)
{
	uint8_t head[512];
	size_t n = 0;
	if (!b->probed_raw || r->op != BLOCK_WRITE || r->off)
		return false;
	for (int i = 0; i < r->iovcnt && n < sizeof head; i++) {
		size_t part = MIN(sizeof head - n, r->iov[i].iov_len);
		memcpy(head + n, r->iov[i].iov_base, part);
		n += part;
	}
	return probe_format(head, n);
}

static int check_request(const struct block *b, const struct block_req *r)
{
	if (r->op == BLOCK_FLUSH)
		return 0;
	if (r->op > BLOCK_ZERO || (r->off | r->len) & (b->size - 1))
		return -EINVAL;
	if (range_bad(r->off, r->len, block_length(b)))
		return -EINVAL;
	if (b->read_only && r->op != BLOCK_READ)
		return -EPERM;
	if (r->op == BLOCK_READ || r->op == BLOCK_WRITE) {
		uint64_t sum = 0;
		for (int i = 0; i < r->iovcnt; i++)
			sum += r->iov[i].iov_len;
		if (r->iovcnt < 0 || sum != r->len || sum > INT_MAX)
			return -EINVAL;
	}
	if (changes_format(b, r)) {
		log_guest("%s: the guest wrote another format's header to sector 0; refused (say format=raw to allow it)", b->file);
		return -EPERM;
	}
	return 0;
}

static void perform(struct block_req *r)
{
	struct block *b = r->blk;
	bool write = r->op == BLOCK_WRITE;
	if (write && b->detect_zeroes && b->drv->zero && iov_is_zero(r->iov, r->iovcnt)) {
		r->ret = b->drv->zero(b, r->off, r->len, r->flags | BLOCK_REQ_MAY_UNMAP);
		return;
	}
	switch (r->op) {
	case BLOCK_READ:
		r->ret = b->drv->read(b, r->off, r->iov, r->iovcnt, r->len);
		break;
	case BLOCK_WRITE:
		r->ret = b->drv->write(b, r->off, r->iov, r->iovcnt, r->len, r->flags);
		break;
	case BLOCK_FLUSH:
		r->ret = b->drv->flush(b);
		break;
	case BLOCK_DISCARD:
		r->ret = b->drv->discard(b, r->off, r->len);
		break;
	case BLOCK_ZERO:
		r->ret = b->drv->zero(b, r->off, r->len, r->flags);
		break;
	}
}

/* `r` may be gone after done(); the count keeps the block alive until then. */
void block_finish(struct block_req *r)
{
	struct block *b = r->blk;
	r->done(r);
	pthread_mutex_lock(&b->lock);
	if (!--b->in_flight)
		pthread_cond_broadcast(&b->idle);
	pthread_mutex_unlock(&b->lock);
}

static void on_worker(void *opaque)
{
	struct block_req *r = opaque;
	perform(r);
	block_finish(r);
}

/* What others wait for must not wait for a worker: those may all be among the others. */
void block_by_worker(struct block_req *r)
{
	struct block *b = r->blk;
	if (!(r->flags & BLOCK_REQ_BELOW) && b->workers && !workers_submit(b->workers, on_worker, NULL, r))
		return;
	on_worker(r); /* slower, but it gets done */
}

/* A polled node: the thread that would end what is under way must not wait for it further down. */
static void block_at_last(struct block_req *r)
{
	while (r->blk->polled && block_poll(r->blk))
		;
	block_by_worker(r);
}

void block_dispatch(struct block_req *r)
{
	struct block *b = r->blk;
	bool look = b->detect_zeroes && r->op == BLOCK_WRITE;
	if (r->flags & BLOCK_REQ_INLINE && !look && b->drv->fast(b, r))
		block_finish(r);
	else if (look || !b->drv->submit || !b->drv->submit(b, r))
		block_at_last(r);
}

bool block_poll(struct block *b)
{
	return b->drv->poll && b->drv->poll(b);
}

bool block_submit_below(struct block *leaf, struct block_req *r)
{
	r->blk = leaf;
	r->flags |= BLOCK_REQ_BELOW;
	pthread_mutex_lock(&leaf->lock);
	leaf->in_flight++;
	pthread_mutex_unlock(&leaf->lock);
	if (leaf->drv->submit && leaf->drv->submit(leaf, r))
		return true;
	pthread_mutex_lock(&leaf->lock);
	if (!--leaf->in_flight)
		pthread_cond_broadcast(&leaf->idle);
	pthread_mutex_unlock(&leaf->lock);
	return false;
}

/* True: it waits for the end of a resize. */
static bool enter(struct block *b, struct block_req *r)
{
	pthread_mutex_lock(&b->lock);
	bool held = b->held;
	if (held) {
		r->next = NULL;
		*b->waiting_tail = r;
		b->waiting_tail = &r->next;
	} else {
		b->in_flight++;
	}
	pthread_mutex_unlock(&b->lock);
	return held;
}

static void start(struct block *b, struct block_req *r)
{
	r->ret = check_request(b, r);
	if (r->ret || (r->op != BLOCK_FLUSH && !r->len))
		block_finish(r);
	else if (!b->throttle || throttle_admit(b->throttle, r))
		block_dispatch(r);
}

void block_submit(struct block *b, struct block_req *r)
{
	r->blk = b;
	if (!enter(b, r))
		start(b, r);
}

static void leaf_unplug(struct block *b)
{
	uring_kick(b);
	copy_kick(b);
}

void block_unplug(struct block *b)
{
	for (; b; b = b->child) {
		leaf_unplug(b);
		if (b->qcow2 && b->qcow2->data != b->child)
			leaf_unplug(b->qcow2->data);
	}
}

static void drain(struct block *b, bool held_too)
{
	if (b->throttle)
		throttle_release(b->throttle, b);
	graph_walk(b, throttle_node_release, b);
	block_unplug(b);
	pthread_mutex_lock(&b->lock);
	while (b->in_flight || (held_too && b->held))
		pthread_cond_wait(&b->idle, &b->lock);
	pthread_mutex_unlock(&b->lock);
	graph_walk(b, throttle_node_release, NULL);
}

void block_drain(struct block *b)
{
	drain(b, true);
}

int block_set_loops(struct block *b, struct loop *const *l, unsigned n, struct err *err)
{
	if (!n || n > BLOCK_LOOPS_MAX)
		return err_set(err, -EINVAL, "%s: 1 to %d I/O threads", b->file, BLOCK_LOOPS_MAX);
	block_drain(b);
	for (; b; b = b->child) {
		int r = uring_move(b, l, n);
		if (!r && b->qcow2 && b->qcow2->data != b->child)
			r = uring_move(b->qcow2->data, l, n);
		if (r)
			return err_set_errno(err, r, "%s: cannot move to an I/O thread", b->file);
		b->loop = l[0];
	}
	return 0;
}

/* --- while a guest uses it --- */

void block_listen(struct block *b, const struct block_listener *l)
{
	pthread_mutex_lock(&b->listener_lock);
	b->listener = l ? *l : (struct block_listener){ 0 };
	pthread_mutex_unlock(&b->listener_lock);
}

static void hold(struct block *b)
{
	pthread_mutex_lock(&b->lock);
	while (b->held) /* somebody else's turn */
		pthread_cond_wait(&b->idle, &b->lock);
	b->held = true;
	pthread_mutex_unlock(&b->lock);
	drain(b, false);
}

static void let_go(struct block *b)
{
	pthread_mutex_lock(&b->lock);
	struct block_req *list = b->waiting, *next;
	b->held = false;
	b->waiting = NULL;
	b->waiting_tail = &b->waiting;
	for (struct block_req *r = list; r; r = r->next)
		b->in_flight++;
	pthread_cond_broadcast(&b->idle);
	pthread_mutex_unlock(&b->lock);
	for (; list; list = next) {
		next = list->next;
		start(b, list);
	}
	block_unplug(b);
}

int block_resize(struct block *b, uint64_t size, struct err *err)
{
	if (size % b->size || size > INT64_MAX)
		return err_set(err, -EINVAL, "%s: the new size must be a multiple of %u", b->file, b->size);
	hold(b);
	int r = image_resize(b, size, PREALLOC_OFF, err);
	let_go(b);
	if (r)
		return r;
	pthread_mutex_lock(&b->listener_lock);
	if (b->listener.resized)
		b->listener.resized(b->listener.opaque);
	pthread_mutex_unlock(&b->listener_lock);
	return 0;
}

struct throttle_group *block_throttle(const struct block *b)
{
	return b->throttle;
}

/* --- facts --- */

uint64_t block_length(const struct block *b)
{
	return __atomic_load_n(&b->length, __ATOMIC_RELAXED);
}

unsigned block_size(const struct block *b)
{
	return b->size;
}

bool block_read_only(const struct block *b)
{
	return b->read_only;
}

bool block_write_cache(const struct block *b)
{
	return b->cache != CACHE_WRITETHROUGH && b->cache != CACHE_DIRECTSYNC;
}

const char *block_id(const struct block *b)
{
	return b->id;
}

/* A format's writes that shall be stable end with a flush each, in the thread that makes them. */
bool block_can_poll(const struct block *b, bool write)
{
	const struct block *leaf = b->qcow2 ? b->qcow2->data : b;
	if (b->qcow2 && write && !block_write_cache(b))
		return false;
	return b->polled && b->drv->poll && (leaf->uring || leaf->nbd);
}

bool block_copies(const struct block *b)
{
	return uring_copies(b->qcow2 ? b->qcow2->data : b);
}

bool block_is_remote(const struct block *b)
{
	while (b->child)
		b = b->child;
	return b->nbd;
}

bool block_is_near(const struct block *b)
{
	while (b->child)
		b = b->child;
	return b->nbd && nbd_is_near(b);
}

const char *block_name(const struct block *b)
{
	return b->file;
}

int block_attach(struct block *b, const char *owner, struct err *err)
{
	if (b->owner)
		return err_set(err, -EBUSY, "drive '%s' is already used by %s", b->id ? b->id : b->file, b->owner);
	b->owner = strdup(owner);
	return b->owner ? 0 : err_set(err, -ENOMEM, "out of memory");
}

void block_detach(struct block *b)
{
	free(b->owner);
	b->owner = NULL;
}
