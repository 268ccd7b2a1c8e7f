/*
 * I/O spaces.
 *
 * Windows are flattened into a sorted array of disjoint segments, each naming the window that wins
 * there. The array is immutable and found through one pointer. A dispatching thread announces in a
 * slot of its own first which array it searches, then which window it is about to call (hazard
 * pointers), so a lookup takes no lock and touches no cache line another thread writes. Whoever
 * changes the map publishes a new array, waits until nobody searches the old one (short: a binary
 * search), frees it, and then waits for the calls into a removed window.
 *
 * That last wait is left out when the changing thread is itself inside a handler of this space (a
 * BAR moved by a configuration write): two such threads would wait for each other. A window with a
 * lock is safe all the same, because the dispatcher looks again once it holds the lock.
 */
#include "core/io.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"

struct segment {
	uint64_t start, last;           /* inclusive */
	struct io_window *w;
	uint64_t base;                  /* w->base when this was published */
};

struct io_view {
	unsigned n;
	struct segment seg[];
};

enum { CHUNK = 32 };

struct reader {
	const void *owner;              /* identity of the thread in here; NULL: free */
	struct io_view *view;           /* being searched */
	struct io_window *w;            /* being called */
} __attribute__((aligned(64)));

struct chunk {
	struct reader r[CHUNK];
	struct chunk *next;
};

struct io_space {
	const char *name;
	uint64_t limit;
	pthread_mutex_t lock;           /* writers */
	struct io_view *view;
	struct io_window **windows;
	unsigned nwindows, cap;
	struct chunk readers;           /* the first; more follow when more threads than that dispatch at once */
};

/* The address of this is a thread's identity; the value spreads threads over the reader slots. */
static _Thread_local unsigned thread_hint;

static unsigned my_hint(void)
{
	static unsigned last;           /* process-wide, like a thread id */
	if (!thread_hint)
		thread_hint = __atomic_add_fetch(&last, 1, __ATOMIC_RELAXED);
	return thread_hint;
}

int io_space_create(struct io_space **out, const char *name, uint64_t limit, struct err *err)
{
	struct io_space *s = NULL;
	if (!posix_memalign((void **)&s, 64, sizeof *s)) {
		memset(s, 0, sizeof *s);
		s->view = calloc(1, sizeof *s->view);
	}
	if (!s || !s->view) {
		free(s);
		return err_set(err, -ENOMEM, "%s: out of memory", name);
	}
	s->name = name;
	s->limit = limit;
	pthread_mutex_init(&s->lock, NULL);
	*out = s;
	return 0;
}

void io_space_destroy(struct io_space *s)
{
	if (!s)
		return;
	for (struct chunk *c = s->readers.next, *next; c; c = next) {
		next = c->next;
		free(c);
	}
	pthread_mutex_destroy(&s->lock);
	free(s->windows);
	free(s->view);
	free(s);
}

/* --- building the view --- */

static int cmp_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static struct io_window *winner_at(struct io_space *s, uint64_t addr)
{
	struct io_window *best = NULL;
	for (unsigned i = 0; i < s->nwindows; i++) {
		struct io_window *w = s->windows[i];
		if (addr - w->base < w->size && (!best || w->priority > best->priority))
			best = w;
	}
	return best;
}

static struct io_view *build_view(struct io_space *s)
{
	unsigned max = 2 * s->nwindows, n = 0;
	uint64_t *edge = malloc((max + 1) * sizeof *edge);
	struct io_view *v = calloc(1, sizeof *v + max * sizeof v->seg[0]);
	if (!edge || !v) {
		free(edge);
		free(v);
		return NULL;
	}
	for (unsigned i = 0; i < s->nwindows; i++) {
		uint64_t end = s->windows[i]->base + s->windows[i]->size;
		edge[n++] = s->windows[i]->base;
		if (end)
			edge[n++] = end; /* 0: it reaches the top of the address space */
	}
	qsort(edge, n, sizeof *edge, cmp_u64);
	for (unsigned i = 0; i < n; i++) {
		struct io_window *w;
		if ((i && edge[i] == edge[i - 1]) || !(w = winner_at(s, edge[i])))
			continue;
		unsigned j = i + 1;
		while (j < n && edge[j] == edge[i])
			j++;
		uint64_t last = j < n ? edge[j] - 1 : w->base + (w->size - 1);
		struct segment *prev = v->n ? &v->seg[v->n - 1] : NULL;
		if (prev && prev->w == w && prev->last + 1 == edge[i])
			prev->last = last;
		else
			v->seg[v->n++] = (struct segment){ edge[i], last, w, w->base };
	}
	free(edge);
	return v;
}

/* --- waiting for readers --- */

static bool inside_dispatch(struct io_space *s)
{
	for (struct chunk *c = &s->readers; c; c = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE)) {
		for (int i = 0; i < CHUNK; i++) {
			if (__atomic_load_n(&c->r[i].owner, __ATOMIC_RELAXED) == &thread_hint)
				return true;
		}
	}
	return false;
}

/* Wait until no slot's pointer at `off` is `p`. */
static void wait_clear(struct io_space *s, size_t off, const void *p)
{
	for (struct chunk *c = &s->readers; c; c = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE)) {
		for (int i = 0; i < CHUNK; i++) {
			void **field = (void **)((char *)&c->r[i] + off);
			while (__atomic_load_n(field, __ATOMIC_SEQ_CST) == p)
				sched_yield();
		}
	}
}

static void swap_view(struct io_space *s, struct io_view *v)
{
	struct io_view *old = s->view;
	__atomic_store_n(&s->view, v, __ATOMIC_SEQ_CST);
	wait_clear(s, offsetof(struct reader, view), old);
	free(old);
}

/* --- changing the map --- */

static int find_window(struct io_space *s, struct io_window *w)
{
	for (unsigned i = 0; i < s->nwindows; i++) {
		if (s->windows[i] == w)
			return (int)i;
	}
	return -1;
}

static int check_map(struct io_space *s, struct io_window *w, uint64_t base, struct err *err)
{
	if (!w->size || range_bad(base, w->size, s->limit))
		return err_set(err, -ERANGE, "%s: '%s' does not fit at 0x%llx", s->name, w->name, (unsigned long long)base);
	for (unsigned i = 0; i < s->nwindows; i++) {
		struct io_window *o = s->windows[i];
		if (o != w && o->priority == w->priority && ranges_overlap(base, w->size, o->base, o->size))
			return err_set(err, -EBUSY, "%s: '%s' at 0x%llx overlaps '%s' at 0x%llx", s->name, w->name,
				       (unsigned long long)base, o->name, (unsigned long long)o->base);
	}
	return 0;
}

static int grow(struct io_space *s)
{
	if (s->nwindows < s->cap)
		return 0;
	unsigned cap = s->cap ? s->cap * 2 : 16;
	struct io_window **n = realloc(s->windows, cap * sizeof(struct io_window *));
	if (!n)
		return -ENOMEM;
	s->windows = n;
	s->cap = cap;
	return 0;
}

/* base and mapped are read by dispatchers that hold only the window's lock. */
static void set_place(struct io_window *w, uint64_t base, bool mapped)
{
	__atomic_store_n(&w->base, base, __ATOMIC_RELAXED);
	__atomic_store_n(&w->mapped, mapped, __ATOMIC_RELEASE);
}

static int map_locked(struct io_space *s, struct io_window *w, uint64_t base, struct err *err)
{
	int r = check_map(s, w, base, err);
	if (r)
		return r;
	bool was = find_window(s, w) >= 0;
	uint64_t old = w->base;
	if (grow(s))
		return err_set(err, -ENOMEM, "%s: out of memory", s->name);
	if (!was)
		s->windows[s->nwindows++] = w;
	set_place(w, base, true);
	struct io_view *v = build_view(s);
	if (!v) {
		if (!was)
			s->nwindows--;
		set_place(w, old, was);
		return err_set(err, -ENOMEM, "%s: out of memory", s->name);
	}
	swap_view(s, v);
	return 0;
}

int io_map(struct io_space *s, struct io_window *w, uint64_t base, struct err *err)
{
	pthread_mutex_lock(&s->lock);
	int r = map_locked(s, w, base, err);
	pthread_mutex_unlock(&s->lock);
	return r;
}

/* Without memory for a new view, empty the window's segments in place of it: unmapping cannot fail. */
static void blank_segments(struct io_space *s, struct io_window *w)
{
	for (unsigned i = 0; i < s->view->n; i++) {
		if (s->view->seg[i].w == w)
			__atomic_store_n(&s->view->seg[i].w, NULL, __ATOMIC_SEQ_CST);
	}
	wait_clear(s, offsetof(struct reader, view), s->view);
}

void io_unmap(struct io_space *s, struct io_window *w)
{
	pthread_mutex_lock(&s->lock);
	int i = find_window(s, w);
	if (i >= 0) {
		s->windows[i] = s->windows[--s->nwindows];
		set_place(w, w->base, false);
		struct io_view *v = build_view(s);
		if (v)
			swap_view(s, v);
		else
			blank_segments(s, w);
	}
	pthread_mutex_unlock(&s->lock);
	if (i >= 0 && !inside_dispatch(s))
		wait_clear(s, offsetof(struct reader, w), w);
}

/* --- dispatch --- */

static struct reader *claim_in(struct chunk *c, unsigned start)
{
	for (unsigned i = 0; i < CHUNK; i++) {
		struct reader *r = &c->r[(start + i) % CHUNK];
		const void *none = NULL;
		if (__atomic_load_n(&r->owner, __ATOMIC_RELAXED))
			continue;
		if (__atomic_compare_exchange_n(&r->owner, &none, &thread_hint, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
			return r;
	}
	return NULL;
}

static struct reader *claim(struct io_space *s)
{
	unsigned start = my_hint();
	for (struct chunk *c = &s->readers;;) {
		struct reader *r = claim_in(c, start);
		if (r)
			return r;
		struct chunk *next = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE);
		if (!next) {
			struct chunk *fresh = NULL;
			if (posix_memalign((void **)&fresh, 64, sizeof *fresh)) {
				sched_yield(); /* a slot will come free */
				continue;
			}
			memset(fresh, 0, sizeof *fresh);
			if (!__atomic_compare_exchange_n(&c->next, &next, fresh, false, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE))
				free(fresh);
			else
				next = fresh;
		}
		c = next;
	}
}

static void unclaim(struct reader *r)
{
	__atomic_store_n(&r->owner, NULL, __ATOMIC_RELEASE);
}

/*
 * The segment at `addr`, with its window announced in `r`; when nobody is there, .w is NULL and .last
 * is where the hole ends.
 */
static struct segment lookup(struct io_space *s, struct reader *r, uint64_t addr)
{
	struct io_view *v = __atomic_load_n(&s->view, __ATOMIC_SEQ_CST), *again;
	for (;; v = again) {
		__atomic_store_n(&r->view, v, __ATOMIC_SEQ_CST);
		again = __atomic_load_n(&s->view, __ATOMIC_SEQ_CST);
		if (again == v)
			break;
	}
	struct segment out = { .last = UINT64_MAX };
	unsigned lo = 0, hi = v->n;
	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;
		const struct segment *g = &v->seg[mid];
		if (addr < g->start) {
			out.last = g->start - 1;
			hi = mid;
		} else if (addr > g->last) {
			lo = mid + 1;
		} else {
			out.start = g->start;
			out.last = g->last;
			out.base = g->base;
			out.w = __atomic_load_n(&g->w, __ATOMIC_SEQ_CST);
			break;
		}
	}
	__atomic_store_n(&r->w, out.w, __ATOMIC_SEQ_CST);
	__atomic_store_n(&r->view, NULL, __ATOMIC_SEQ_CST);
	return out;
}

struct access { bool write; uint8_t *buf; };

/* `n` bytes at `off`, cut into what the device takes. The window's lock is held. */
static void call_ops(const struct io_window *w, struct access *a, uint64_t off, unsigned n)
{
	unsigned min = w->ops->min_size ? w->ops->min_size : 1, max = w->ops->max_size ? w->ops->max_size : 8;
	while (n) {
		unsigned size = MIN(max, n);
		size = 1u << (31 - __builtin_clz(size)); /* 3 is 2 and 1 */
		bool able = size >= min && !(off & (min - 1));
		if (a->write) {
			uint64_t v = 0;
			memcpy(&v, a->buf, size);
			if (able && w->ops->write)
				w->ops->write(w->opaque, off, v, size);
		} else {
			uint64_t v = able && w->ops->read ? w->ops->read(w->opaque, off, size) : UINT64_MAX;
			memcpy(a->buf, &v, size);
		}
		a->buf += size;
		off += size;
		n -= size;
	}
}

/* false: the window moved away between lookup and lock. */
static bool call_window(const struct segment *g, struct access *a, uint64_t addr, unsigned n)
{
	struct io_window *w = g->w;
	if (w->lock)
		pthread_mutex_lock(w->lock);
	bool ok = __atomic_load_n(&w->mapped, __ATOMIC_ACQUIRE) && __atomic_load_n(&w->base, __ATOMIC_RELAXED) == g->base;
	if (ok)
		call_ops(w, a, addr - g->base, n);
	if (w->lock)
		pthread_mutex_unlock(w->lock);
	return ok;
}

static bool dispatch(struct io_space *s, uint64_t addr, struct access *a, unsigned len)
{
	bool claimed = false;
	struct reader *r = claim(s);
	while (len) {
		struct segment g = lookup(s, r, addr);
		uint64_t room = g.last - addr;
		unsigned n = room < len - 1 ? (unsigned)room + 1 : len;
		if (g.w) {
			bool ok = call_window(&g, a, addr, n);
			__atomic_store_n(&r->w, NULL, __ATOMIC_SEQ_CST);
			if (!ok)
				continue;
			claimed = true;
		} else {
			if (!a->write)
				memset(a->buf, 0xff, n);
			a->buf += n;
		}
		addr += n; /* past the top it starts again at 0, as the bus does */
		len -= n;
	}
	unclaim(r);
	return claimed;
}

bool io_read(struct io_space *s, uint64_t addr, void *buf, unsigned len)
{
	struct access a = { false, buf };
	return dispatch(s, addr, &a, len);
}

bool io_write(struct io_space *s, uint64_t addr, const void *buf, unsigned len)
{
	struct access a = { true, (uint8_t *)(uintptr_t)buf };
	return dispatch(s, addr, &a, len);
}
