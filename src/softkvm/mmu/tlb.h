/* What the files of mmu/ share about the soft TLB. */
#ifndef SOFTKVM_MMU_TLB_H
#define SOFTKVM_MMU_TLB_H

#include <stdatomic.h>

#include "base/util.h"
#include "softkvm/mmu/walk.h"
#include "softkvm/vm.h"

#define TLB_WORDS (TLB_ENTRIES / 64)

/* A table with what flushing needs: which entries are filled, and which of those are global. */
struct tlb_full {
	struct tlb t;
	uint64_t filled[2][TLB_WORDS], global[2][TLB_WORDS];    /* [0] reads, [1] writes */
};

static inline struct tlb_full *tlb_full(struct tlb *t) { return container_of(t, struct tlb_full, t); }

#define ITLB_ENTRIES 512
#define FETCH_WORDS 256         /* bits by page: those of 2 MiB are together */
struct itlb_entry {
	uint64_t key;           /* linear page | user << 1 | 1; 0 empty */
	struct code_page page;
};

/*
 * A 2 MiB region's entry of the page directory, as the processor's paging-structure caches keep it (SDM vol. 3 4.10.3):
 * 64-bit paging only, all entries above it accessed. It leads to a page table, or it is the translation itself.
 */
#define PWC_ENTRIES 1024
struct pwc_entry {
	uint64_t key;           /* pwc_key() */
	uint8_t *host;          /* the table, or the large page's first byte */
	struct slot *slot;      /* that holds it */
	uint32_t gpa_page;      /* its guest-physical page number; regions beyond 2^44 are not kept */
	uint8_t rights;         /* PWC_*: of all levels up to here */
	uint8_t pkey;           /* of a large page */
};
enum { PWC_W = 1, PWC_U = 2, PWC_NX = 4, PWC_LEAF = 8, PWC_DIRTY = 16, PWC_GLOBAL = 32 };

/*
 * How many write entries may lead to a host page, by hash, and the linear page that was entered last. Counted up before
 * the page is granted, so that who marks it as code and then finds 0 need not look at this vCPU; changed by the vCPU's
 * own thread, or while it is parked.
 */
#define WRITER_BITS 13
struct writers {
	_Atomic uint64_t n[1u << WRITER_BITS];  /* count in the lower half, tlb_index() of the last in the upper */
	/*
	 * A page with that hash of which is known how many entries lead to it, since all were looked for once: in the lower 12 bits. 0: none. Code that is
	 * written again and again would have all entries looked through each time because of some other page with its hash.
	 */
	uint64_t known[1u << WRITER_BITS];
};

struct itlb {
	uint8_t bounce[192];    /* fill.c: an operand that lies in two pages */
	struct pwc_entry pwc[PWC_ENTRIES];
	uint32_t pwc_gen;       /* every flush moves it, INVLPG as well, and with it go all entries */
	struct slot *slot;      /* found last */
	struct writers writers;
	/* Stores to pages with code since one was last decoded or compared: which page, how many. */
	const _Atomic uint32_t *smc_ver;
	unsigned smc_hits, smc_near;            /* smc_near: as CODE_NEAR_* weigh them */
	struct itlb_entry e[ITLB_ENTRIES];
	uint64_t filled[2][ITLB_ENTRIES / 64];  /* [1]: with global ones, which most flushes leave alone */
	/*
	 * What was fetched since fetch_gen[user] last changed: pages, hashed (itlb_word()), and whether a
	 * supervisor page was not global. A flush that cannot concern them leaves decoded code where it is.
	 */
	uint64_t fetched[2][FETCH_WORDS];
	bool sup_nonglobal, user_global;
	uint32_t last_gen;      /* the value that fetch_gen took last */
	/* Address spaces with a PCID that the guest left: their fetch_gen[1], good until something of that PCID is flushed. */
	struct { uint64_t cr3; uint32_t gen; bool valid; uint64_t fetched[FETCH_WORDS]; } left[8];
	unsigned next_left;
	/* Regions of which some 4 KiB entry came from a large page, hashed: INVLPG there flushes all of the region. */
	uint64_t large2m[16], large1g[16];
};

static inline uint64_t itlb_key(uint64_t lin, bool user) { return (lin & ~4095ull) | (user ? 3 : 1); }
static inline unsigned itlb_index(uint64_t lin) { return (lin >> 12) % ITLB_ENTRIES; }
/* The word of `fetched` that has its page's bit. Kernel and user pages are both asked for, so the upper bits count as well. */
static inline unsigned itlb_word(uint64_t lin) { return (lin >> 18 ^ lin >> 39 << 3) % FETCH_WORDS; }
static inline void itlb_note(struct itlb *t, uint64_t lin, bool user) { t->fetched[user][itlb_word(lin)] |= 1ull << (lin >> 12 & 63); }

/* What is fetched from that page of code, NULL if it has to be looked up. */
static inline const struct code_page *itlb_fetch(struct itlb *t, uint64_t lin, bool user)
{
	const struct itlb_entry *e = &t->e[itlb_index(lin)];

	if (unlikely(e->key != itlb_key(lin, user)))
		return NULL;
	itlb_note(t, lin, user);
	return &e->page;
}

#define PWC_GEN_BITS 28
static inline uint64_t pwc_key(const struct itlb *t, uint64_t lin)
{
	return ((uint64_t)t->pwc_gen << (64 - PWC_GEN_BITS)) | ((lin >> 21) & (BIT(64 - PWC_GEN_BITS) - 1));
}
/* Forget what the page walks remember. */
void pwc_flush(struct itlb *t);
/* phys_ptr() for a vCPU on its own thread: remembers the slot. */
uint8_t *tlb_phys(struct cpu *c, uint64_t gpa, bool *ro, struct slot **slot);

/* Index into cpu->tlbs for a party. */
unsigned tlb_mode_of(const struct cpu *c, struct walk_as as);
/* The books on who holds write entries, see struct writers. */
static inline unsigned tlb_writer_hash(uint64_t host_page) { return (unsigned)((host_page >> 12) * 0x9e3779b97f4a7c15ull >> (64 - WRITER_BITS)); }

static inline _Atomic uint64_t *tlb_writers_of(struct cpu *c, uint64_t host_page)
{
	return &c->itlb->writers.n[tlb_writer_hash(host_page)];
}

/* NULL: it is not known how many lead there. */
static inline uint64_t *tlb_writers_known(struct cpu *c, uint64_t host_page)
{
	uint64_t *k = &c->itlb->writers.known[tlb_writer_hash(host_page)];

	return (*k ^ host_page) >> 12 ? NULL : k;
}

static inline void tlb_writer_comes(struct cpu *c, const uint8_t *host_page, uint64_t lin)
{
	_Atomic uint64_t *w = tlb_writers_of(c, (uintptr_t)host_page);
	uint64_t v = (uint64_t)tlb_index(lin) << 32 | ((uint32_t)atomic_load_explicit(w, memory_order_relaxed) + 1);
	uint64_t *known = tlb_writers_known(c, (uintptr_t)host_page);

	if (unlikely(known))
		*known = (*known & 4095) == 4095 ? 0 : *known + 1;
	/*
	 * Ordered before the look at the page's version: see struct writers. A vCPU that is alone need not wait for its stores for
	 * that; who makes another one stops it first.
	 */
	if (atomic_load_explicit(&c->vm->ncpus, memory_order_relaxed) > 1)
		atomic_exchange(w, v);
	else
		atomic_store_explicit(w, v, memory_order_relaxed);
}

static inline void tlb_writer_gone(struct cpu *c, uint64_t host_page)
{
	_Atomic uint64_t *w = tlb_writers_of(c, host_page);
	uint64_t *known = tlb_writers_known(c, host_page);

	if (unlikely(known))
		*known = *known & 4095 ? *known - 1 : 0;
	atomic_store_explicit(w, atomic_load_explicit(w, memory_order_relaxed) - 1, memory_order_release);
}

static inline struct tlb_entry *tlb_table(struct tlb *t, int write) { return write ? t->w : t->r; }

/*
 * The tag of a write entry for a page with code: page tables, slot and dirty log allow the store, but which lines it touches is to be looked
 * at each time (fill.c). No address is ever compared with it successfully, as all that are looked up in this place differ from it in
 * bit 12. Such an entry is on the books like others. Pages 0 and 1 get none: those would be empty entries' tags.
 */
static inline uint64_t tlb_near_tag(uint64_t lin) { return (lin & ~4095ull) ^ 4096; }
static inline bool tlb_near_may(uint64_t lin) { return lin >= 8192; }
/* An entry at lin's place is for its page, of whichever kind. */
static inline bool tlb_is_for(const struct tlb_entry *e, uint64_t lin) { return !((e->tag ^ lin) >> 13); }

/* An entry goes; one of writes is taken off the books first. */
static inline void tlb_drop(struct cpu *c, struct tlb_full *f, int write, unsigned i)
{
	struct tlb_entry *e = &tlb_table(&f->t, write)[i];

	if (e->tag == tlb_empty_tag(i))
		return;
	e->tag = tlb_empty_tag(i);
	if (write)
		tlb_writer_gone(c, e->host);
}

static inline void tlb_hash_set(uint64_t *map, uint64_t v) { map[(v >> 6) & 15] |= 1ull << (v & 63); }
static inline bool tlb_hash_has(const uint64_t *map, uint64_t v) { return map[(v >> 6) & 15] >> (v & 63) & 1; }

/* Some entry for `lin`, of code or data, came from a page of that size. */
static inline void tlb_note_large(struct cpu *c, uint64_t lin, uint64_t leaf_size)
{
	if (leaf_size == 4096 || leaf_size == ~0ull)
		return;
	if (leaf_size == BIT(30)) {
		tlb_hash_set(c->itlb->large1g, lin >> 30);
		return;
	}
	tlb_hash_set(c->itlb->large2m, lin >> 21);
	if (leaf_size == BIT(22))
		tlb_hash_set(c->itlb->large2m, (lin >> 21) ^ 1);
}

/* tlb_enter() into that table. */
static inline void tlb_put_tag(struct cpu *c, struct tlb_full *f, bool write, uint64_t lin, uint64_t tag, uint8_t *host, bool global,
			       uint64_t leaf_size)
{
	unsigned i = tlb_index(lin);
	uint64_t bit = 1ull << (i % 64);

	tlb_drop(c, f, write, i);
	tlb_table(&f->t, write)[i] = (struct tlb_entry){ tag, (uintptr_t)host };
	f->filled[write][i / 64] |= bit;
	if (global)
		f->global[write][i / 64] |= bit;
	else
		f->global[write][i / 64] &= ~bit;
	tlb_note_large(c, lin, leaf_size);
	c->stats.tlb_fills++;
}

static inline void tlb_put(struct cpu *c, struct tlb_full *f, bool write, uint64_t lin, uint8_t *host, bool global, uint64_t leaf_size)
{
	tlb_put_tag(c, f, write, lin, lin & ~4095ull, host, global, leaf_size);
}

/* Enter a translation: `host` is the page's host address. Of writes: granted and counted. */
void tlb_enter(struct cpu *c, unsigned mode, bool write, uint64_t lin, uint8_t *host, const struct walk *w);

/*
 * A walk ended with this fault: raises it. Entries of the page go first, as a page fault does on a processor (SDM vol. 3
 * 4.10.4.1), those of code where it was a fetch.
 */
_Noreturn void tlb_page_fault(struct cpu *c, uint64_t lin, uint32_t err, bool fetch);

/*
 * Stores beside a page's code, since it was last decoded from or compared, before it is data again. A page that is still in use costs a
 * comparison then, so cheap ones are allowed more often.
 */
#define CODE_NEAR_MAX 4096
#define CODE_NEAR_SLOW 16

/* -- code.c: who may hold write entries, and what stores do to pages with code ------------------------------------ */
/* Drop every write entry of `c` that leads to this host page; `c` is parked or the caller. */
void tlb_revoke_write(struct cpu *c, const uint8_t *host_page);
/*
 * A store of `len` bytes at gpa, in one page, is about to happen: blocks decoded from what it overwrites die first. True:
 * a write entry for the page may exist. `counted`: tlb_writer_comes() was called for it.
 */
bool tlb_grant_write(struct cpu *c, struct slot *s, uint64_t gpa, unsigned len, bool counted);

#endif
