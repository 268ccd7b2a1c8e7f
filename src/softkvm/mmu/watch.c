/*
 * Code of clients that do not announce their writes.
 *
 * Such a client may write to guest memory at any time, and what it wrote may be code that was decoded before. The guest
 * learns of it by an exit that returns, by an interrupt, or by looking at memory; so code is compared with what it was
 * decoded from whenever a vCPU enters KVM_RUN or takes an event (watch_all()), and when a page enters an instruction TLB
 * (watch_enter(), for memory that the guest polls). A page that differs gets a new version, as after a store of the
 * guest's own, and everything that was made from it dies by that.
 *
 * A kernel has hundreds of code pages, and an exit touches a handful. So pages are awake or asleep. Awake pages are compared each time.
 * A sleeping page has VER_ASLEEP in its version, which therefore matches no block: whoever wants to enter it comes by
 * watch_wake(), which compares and, if nothing changed, gives the old version back, with all blocks and links. Every
 * few times all pages are put to sleep, so that those awake are those in use.
 *
 * Of a page, only the lines of 64 bytes that something was decoded from are kept and compared. Versions are changed by
 * compare-and-swap, so a guest's store at the same time is never lost; `lock` guards the rest. Nothing in here waits for a vCPU.
 */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "softkvm/fault.h"
#include "softkvm/mmu.h"
#include "softkvm/mmu/phys.h"

#define PAGES 4096u             /* watched at most; then all are forgotten (16 MiB) */
#define HASH (2 * PAGES)
#define AWAKE 64u
#define PERIOD 16u              /* watch_all()s until all are put to sleep */
#define LINE 64u

struct watched {
	_Atomic uint32_t *ver;
	const uint8_t *host;
	uint64_t lines;         /* bit n: line n is in the copy */
	uint32_t value;         /* version that the copy belongs to, awake */
	bool awake;
};

struct code_watch {
	pthread_mutex_t lock;
	unsigned n, nawake, turns;
	uint16_t awake[AWAKE];  /* indices into page */
	uint16_t hash[HASH];    /* the same plus 1; open addressing */
	struct watched page[PAGES];
	uint8_t copy[PAGES][4096];
};

/* -- life -------------------------------------------------------------------------------------- */
/* The VM's, made on first use; NULL: no memory, then nothing stays valid (watch_decoded). */
static struct code_watch *watch_make(struct vm *vm)
{
	struct code_watch *w = atomic_load_explicit(&vm->watch, memory_order_acquire), *none = NULL;

	if (w)
		return w;
	w = mmap(NULL, sizeof *w, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (w == MAP_FAILED)
		return NULL;
	pthread_mutex_init(&w->lock, NULL);
	if (atomic_compare_exchange_strong(&vm->watch, &none, w))
		return w;
	pthread_mutex_destroy(&w->lock);
	munmap(w, sizeof *w);
	return none;
}

void watch_free(struct vm *vm)
{
	struct code_watch *w = atomic_exchange(&vm->watch, NULL);

	if (!w)
		return;
	pthread_mutex_destroy(&w->lock);
	munmap(w, sizeof *w);
}

/* Blocks of the pages have to be compared and entered anew. */
static void forget_all(struct code_watch *w)
{
	for (unsigned i = 0; i < w->n; i++)
		page_code_written(w->page[i].ver);
	w->n = w->nawake = 0;
	memset(w->hash, 0, sizeof w->hash);
}

void watch_forget(struct vm *vm)
{
	struct code_watch *w = atomic_load(&vm->watch);

	if (!w)
		return;
	pthread_mutex_lock(&w->lock);
	forget_all(w);
	pthread_mutex_unlock(&w->lock);
}

/* -- pages --------------------------------------------------------------------------------------- */
static uint16_t *hash_slot(struct code_watch *w, const _Atomic uint32_t *ver)
{
	unsigned i = (unsigned)((uintptr_t)ver / 4 * 0x9e3779b97f4a7c15ull >> 40) % HASH;

	while (w->hash[i] && w->page[w->hash[i] - 1].ver != ver)
		i = (i + 1) % HASH;
	return &w->hash[i];
}

static struct watched *find(struct code_watch *w, const _Atomic uint32_t *ver)
{
	uint16_t i = *hash_slot(w, ver);

	return i ? &w->page[i - 1] : NULL;
}

static uint8_t *copy_of(struct code_watch *w, const struct watched *p)
{
	return w->copy[p - w->page];
}

/* Are the lines what they were? */
static bool same(struct code_watch *w, const struct watched *p)
{
	const uint8_t *copy = copy_of(w, p);
	uint64_t left = p->lines;

	while (left) {
		unsigned first = (unsigned)__builtin_ctzll(left);
		uint64_t rest = ~(left >> first);
		unsigned n = rest ? (unsigned)__builtin_ctzll(rest) : 64;

		if (!fault_same(p->host + first * LINE, copy + first * LINE, (size_t)n * LINE))
			return false;
		left = first + n < 64 ? left & ~0ull << (first + n) : 0;
	}
	return true;
}

static void sleep_all(struct code_watch *w)
{
	for (unsigned i = 0; i < w->nawake; i++) {
		struct watched *p = &w->page[w->awake[i]];
		uint32_t v = p->value;

		p->awake = false;
		/* Fails when the page has another version by now, whose blocks nobody watches yet or that will be entered here. */
		atomic_compare_exchange_strong(p->ver, &v, v | VER_ASLEEP);
	}
	w->nawake = 0;
}

static void awake_add(struct code_watch *w, struct watched *p)
{
	if (p->awake)
		return;
	if (w->nawake == AWAKE)
		sleep_all(w);
	p->awake = true;
	w->awake[w->nawake++] = (uint16_t)(p - w->page);
}

/* -- comparing ------------------------------------------------------------------------------------- */
void watch_all(struct vm *vm)
{
	struct code_watch *w = atomic_load_explicit(&vm->watch, memory_order_acquire);
	unsigned kept = 0;

	if (!w)
		return;
	pthread_mutex_lock(&w->lock);
	for (unsigned i = 0; i < w->nawake; i++) {
		struct watched *p = &w->page[w->awake[i]];

		if (atomic_load_explicit(p->ver, memory_order_acquire) == p->value && same(w, p)) {
			w->awake[kept++] = w->awake[i];
			continue;
		}
		page_code_written(p->ver);
		p->awake = false;
	}
	w->nawake = kept;
	if (++w->turns % PERIOD == 0)
		sleep_all(w);
	pthread_mutex_unlock(&w->lock);
}

void watch_wake(struct vm *vm, _Atomic uint32_t *ver)
{
	struct code_watch *w = atomic_load_explicit(&vm->watch, memory_order_acquire);
	uint32_t v = atomic_load(ver);
	struct watched *p;

	pthread_mutex_lock(&w->lock);
	p = find(w, ver);
	if (p && v == (p->value | VER_ASLEEP) && same(w, p)) {
		if (atomic_compare_exchange_strong(ver, &v, p->value))
			awake_add(w, p);
	} else if (v & VER_ASLEEP) {
		page_code_written(ver);
	}
	pthread_mutex_unlock(&w->lock);
}

void watch_enter(struct vm *vm, _Atomic uint32_t *ver)
{
	struct code_watch *w = atomic_load_explicit(&vm->watch, memory_order_acquire);
	uint32_t v = atomic_load_explicit(ver, memory_order_acquire);
	struct watched *p;

	if (!w || (v & (VER_CODE | VER_ASLEEP)) != VER_CODE)
		return;
	pthread_mutex_lock(&w->lock);
	p = find(w, ver);
	if (!p || p->value != v || !same(w, p))
		page_code_written(ver);
	pthread_mutex_unlock(&w->lock);
}

/* -- entering -------------------------------------------------------------------------------------- */
static struct watched *page_add(struct code_watch *w, const struct code_page *page)
{
	struct watched *p;

	if (w->n == PAGES)
		forget_all(w);
	p = &w->page[w->n++];
	*p = (struct watched){ .ver = page->ver, .host = page->host };
	*hash_slot(w, page->ver) = (uint16_t)w->n;
	return p;
}

/* The lines of `bytes`: false when what is there is not that (any more). */
static bool lines_add(struct code_watch *w, struct watched *p, unsigned off, const uint8_t *bytes, unsigned len)
{
	uint8_t *copy = copy_of(w, p);

	for (unsigned l = off / LINE; l <= (off + len - 1) / LINE; l++) {
		if (p->lines >> l & 1)
			continue;
		if (fault_copy(copy + l * LINE, p->host + l * LINE, LINE))
			return false;
		p->lines |= 1ull << l;
	}
	return !memcmp(copy + off, bytes, len);
}

void watch_decoded(struct vm *vm, const struct code_page *page, uint32_t value, unsigned off, const uint8_t *bytes, unsigned len)
{
	struct code_watch *w = watch_make(vm);
	struct watched *p;

	if (!w) {
		page_code_written(page->ver);
		return;
	}
	pthread_mutex_lock(&w->lock);
	p = find(w, page->ver);
	if (!p)
		p = page_add(w, page);
	if (p->value != value) {
		p->value = value;
		p->lines = 0;
	}
	if (!lines_add(w, p, off, bytes, len))
		page_code_written(page->ver);
	else if (!(atomic_load(page->ver) & VER_ASLEEP))
		awake_add(w, p);
	pthread_mutex_unlock(&w->lock);
}
