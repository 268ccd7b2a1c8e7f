/* Running translated code, linking it, and what it calls. */
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/random.h>

#include "softkvm/fault.h"
#include "softkvm/jit/lockstep.h"
#include "softkvm/vec/vec.h"

#define SLOW_INSN 32    /* instructions' worth of time that a call of a handler may take */

/* -- life ---------------------------------------------------------------------------------------- */
static bool addressable(const struct cpu *c)
{
	if (!low_is(c, sizeof *c))
		return false;
	for (unsigned m = 0; m < TLB_MODES; m++)
		if (!low_is(c->tlbs[m], sizeof(struct tlb)))
			return false;
	return true;
}

/* An address that nothing returns to, and that the guest does not know. */
static int calls_none(uint64_t *v)
{
	if (getrandom(v, sizeof *v, 0) != sizeof *v)
		return -errno;
	*v = (*v & ~(3ull << 62)) | 1ull << 62;         /* not canonical */
	return 0;
}

static int init(struct jit *j, const struct jit_config *cfg)
{
	size_t part = cfg->bytes / 32 & ~(size_t)4095; /* in proportion to what a compiler's code takes */
	int r;

	j->gen = 1;
	j->bytes = cfg->bytes;
	j->perf_fd = cfg->perf_fd;
	j->mxcsr_mask = mxcsr_mask();
	j->in_line = cfg->mode == JIT_AT_ONCE ? 2 : cfg->mode == JIT_LOCKSTEP ? 1 : 0;
	j->threshold = cfg->mode == JIT_AT_ONCE ? 0 : cfg->mode == JIT_LOCKSTEP ? 3 : JIT_THRESHOLD;
	j->tr = calloc(1, sizeof *j->tr);
	j->arena_size = 13 * part;
	j->low_size = sizeof *j->low + j->arena_size;
	j->low = low_alloc(j->low_size);
	if (!j->tr || !j->low || !low_is(j->low, j->low_size))
		return -ENOMEM;
	j->low->ind[0] = jit_ind_none(0);
	jit_records_huge(j->low, j->low_size);
	if ((r = calls_none(&j->low->calls_none)))
		return r;
	if ((r = jit_code_map(j, 16 * part)) || (r = points_map(j, 3 * part)))
		return r;
	return cfg->mode == JIT_LOCKSTEP ? lockstep_init(j) : 0;
}

int jit_cpu_init(struct cpu *c, const struct jit_config *cfg)
{
	struct jit *j;
	int r;

	if (cfg->bytes < JIT_BYTES_MIN)
		return -ENOSPC;
	if (!__builtin_cpu_supports("bmi2") || !addressable(c))
		return -ENOTSUP;
	j = calloc(1, sizeof *j);
	if (!j)
		return -ENOMEM;
	j->c = c;
	c->jit = j;
	r = init(j, cfg);
	if (r) {
		jit_cpu_free(c);
		return r;
	}
	jit_thunks(j);
	fault_serve(FAULT_CODE, jit_fault);
	return 0;
}

void jit_cpu_free(struct cpu *c)
{
	struct jit *j = c->jit;

	if (!j)
		return;
	lockstep_free(j);
	jit_code_unmap(j);
	points_unmap(j);
	low_free(j->low, j->low_size);
	free(j->tr);
	free(j);
	c->jit = NULL;
}

void jit_flush(struct cpu *c)
{
	struct jit *j = c->jit;

	if (!j)
		return;
	c->blocks->jit_want = NULL;
	c->stats.code_flushes++;
	c->stats.code_used = 0;
	j->hot = JIT_THUNKS;
	j->cold = 0;
	j->arena = 0;
	j->npoints = j->nspans = 0;
	j->stale = j->rows = NULL;
	j->codes = NULL;
	j->gen++;
	memset(j->low->ind, 0, sizeof j->low->ind);
	j->low->ind[0] = jit_ind_none(0);
	memset(j->pages, 0, sizeof j->pages);
	memset(j->at, 0, sizeof j->at);
}

void jit_give_back(struct cpu *c)
{
	if (c->jit)
		jit_code_trim(c->jit);
}

static struct jit_code *code_of(const struct jit *j, const struct block *b)
{
	return b->code_gen == j->gen ? b->code : NULL;
}

/* -- links --------------------------------------------------------------------------------------- */
bool jit_link_near(const struct jit_link *l)
{
	const struct jit_code *k = jit_link_from(l);

	return !k->b->cross && !((k->rip ^ (k->rip + (uint64_t)(int64_t)l->rip)) >> 12);
}

static uint32_t link_map(const struct jit_link *l) { return l->behind_call ? 0 : jit_link_from(l)->map; }

uint32_t jit_link_at2(const struct jit_link *l)
{
	uint32_t map = link_map(l);

	return map ? l->unlinked + map_out_bytes(map) + 1 : 0;
}

static void link_cut(struct jit *j, struct jit_link *l)
{
	uint32_t at2 = jit_link_at2(l);

	em_to(j->rw + l->at, j->rw + l->unlinked);
	if (at2)
		em_to(j->rw + at2, j->rw + at2 + 4);
}

static void link_forget(struct jit_link *l)
{
	low_ptr *p;

	for (p = &jit_link_to(l)->in; *p != low_of(l); p = &jit_link_at(*p)->next_in)
		;
	*p = l->next_in;
	l->to = 0;
}

void jit_cut_incoming(struct jit *j, struct jit_code *k)
{
	struct jit_link *l;

	while ((l = jit_link_at(k->in))) {
		k->in = l->next_in;
		l->to = 0;
		link_cut(j, l);
	}
}

static void cut_outgoing(struct jit *j, struct jit_code *k, bool far)
{
	for (struct jit_link *l = jit_link_at(k->links); l; l = jit_link_at(l->next)) {
		if (!l->to || (far && jit_link_near(l)))
			continue;
		link_forget(l);
		link_cut(j, l);
	}
}

void jit_cut_far(struct jit *j, struct jit_code *k)
{
	struct jit_link *l;

	for (low_ptr *p = &k->in; (l = jit_link_at(*p));) {
		if (jit_link_near(l)) {
			p = &l->next_in;
			continue;
		}
		*p = l->next_in;
		l->to = 0;
		link_cut(j, l);
	}
	cut_outgoing(j, k, true);
}

void jit_cut_outgoing(struct jit *j, struct jit_code *k) { cut_outgoing(j, k, false); }

static void link_to(struct jit *j, struct jit_link *l, struct jit_code *to)
{
	/* What crosses a page end has to look at the other page. */
	bool straight = jit_link_near(l) && !to->b->cross && !l->behind_call;
	uint32_t at2 = jit_link_at2(l);

	if (l->to == low_of(to))
		return;
	if (l->to)
		link_forget(l);
	l->to = low_of(to);
	l->next_in = to->in;
	to->in = low_of(l);
	j->c->stats.links++;
	if (link_map(l) == to->map) {
		em_to(j->rw + l->at, j->rw + (straight ? to->body_same : to->entry_same));
	} else {
		link_cut(j, l);
		em_to(j->rw + (at2 ? at2 : l->at), j->rw + (straight ? to->body : to->entry));
	}
}

/* The blocks that were translated with the first, which is valid again. */
static bool parts_same(struct cpu *c, const struct jit_code *k)
{
	for (unsigned n = 1; n < k->nparts; n++) {
		const struct block *p = k->part[n];
		struct code_page page = block_page(p);

		if (p->ver_value == k->b->ver_value)
			continue;
		mmu_code_lines(c, &page, p->gpa & 4095, p->bytes);
		if (!ram_same(p->host, block_copy(p), p->bytes) && !block_patch(c, k->part[n]))
			return false;
	}
	return true;
}

static uint64_t entry_stamp(uint32_t at) { return *LOW_PTR(const uint64_t, ld_le32(LOW_PTR(const uint8_t, at) + ENTRY_STAMP)); }

static void entry_version(struct jit *j, const struct jit_code *k, uint32_t v)
{
	st_le32(j->rw + k->entry + ENTRY_VERSION, v);
	if (k->map)
		st_le32(j->rw + k->entry_same + ENTRY_VERSION, v);
}

void code_valid(struct jit *j, struct jit_code *k, uint64_t stamp)
{
	const struct block_cross *x = k->b->cross ? block_cross(k->b) : NULL;

	if (!x && k->entry && k->ver_value != k->b->ver_value)
		entry_version(j, k, k->b->ver_value);
	k->ver_value = x ? x->page_ver[0] : k->b->ver_value;
	k->second_value = x ? x->page_ver[1] : 0;
	k->stamp = stamp;
}

void jit_revived(struct cpu *c, struct block *b)
{
	struct jit *j = c->jit;
	struct jit_code *k = j ? code_of(j, b) : NULL;

	if (!k)
		return;
	/* What it is linked to in this page was not compared. */
	jit_cut_outgoing(j, k);
	if (!looks_same(c, k) || !parts_same(c, k) || patch_count(k) != k->patched) {
		b->code = NULL;
		return;
	}
	patch_values(k);
	code_valid(j, k, 0);
}

/* The jump `l` was left by turns out to lead to `to`, which is valid now. */
static void resolve(struct jit *j, struct jit_link *l, struct jit_code *to)
{
	const struct jit_code *from = jit_link_from(l);

	if (jit_link_rip(l) != jit_code_rip(to) || from->mode != to->mode)
		return;
	if (!jit_link_near(l)) {
		link_to(j, l, to);
	} else if (from->page != to->page) {
		return;         /* one of them moves, and is here by chance */
	} else if (to->b->cross) {
		link_to(j, l, to);
	} else if (from->b->ver == to->b->ver && from->b->ver_value == to->b->ver_value &&
		   atomic_load_explicit(from->b->ver, memory_order_acquire) == to->b->ver_value && code_of(j, from->b) == from) {
		link_to(j, l, to);
	}
}

/* -- running ------------------------------------------------------------------------------------- */
/* The loop would find nothing to do but to look up cpu->rip, where code of a mode that is translated goes on: its stamp, else 0. */
static uint64_t may_go_on(struct cpu *c, const struct jit *j)
{
	uint32_t mode;

	if (unlikely(j->lock || block_boundary_due(c) || mmio_pending(c) || c->tlb == c->tlbs[TLB_NONE] || c->data_bp || j->off))
		return 0;
	block_check_generation(c);
	mode = block_mode(c, false);
	return block_mode_translates(mode) ? block_stamp(c, mode) : 0;
}

/* It is still that page that is there: one look at the instruction TLB, which raises what the fetch raises, as in the loop. */
static bool same_page(struct cpu *c, struct jit_page *p, uint64_t stamp)
{
	struct code_page pg;

	if (p->stamp == stamp)
		return true;
	block_no_insn(c);
	mmu_fetch(c, c->rip, &pg);
	if (!pg.host || pg.ver != p->ver)
		return false;
	p->stamp = stamp;
	return true;
}

/*
 * Programs have more return addresses than the table of indirect targets has entries, and links die with the stamp of their page. What
 * the loop would find for cpu->rip is found here by way of the page, if there is a translation of it.
 */
static struct jit_code *page_code(struct cpu *c, struct jit *j, uint64_t stamp)
{
	struct jit_page *p = LOW_PTR(struct jit_page, *jit_page_at(j, c->rip));
	struct jit_code *k;
	const struct block *b;

	if (!p || p->lin != (c->rip & ~4095ull) || p->mode != jit_stamp_mode(stamp) || !same_page(c, p, stamp))
		return NULL;
	b = block_hash_find(c->blocks, p->gpa | (c->rip & 4095), p->mode);
	if (!b || b->cross || b->ver != p->ver || b->ver_value != atomic_load_explicit(p->ver, memory_order_acquire))
		return NULL;
	k = code_of(j, b);
	if (!k || k->page != p || k->wanted)
		return NULL;            /* or one of another home of the page */
	j->low->stamp = stamp;
	jit_ind_put(j, c->rip, jit_entry(j, k));
	return k;
}

/*
 * The block's last instruction was executed by its handler and cpu->rip is set: the translation to go on at, when the
 * loop would find nothing to do but to look it up. 1: let the loop see.
 */
static uint64_t next_code(struct cpu *c, struct jit *j)
{
	uint64_t stamp = may_go_on(c, j);
	const struct jit_code *k;
	uint32_t at;

	if (!stamp)
		return 1;
	at = jit_ind_entry(j->low->ind, c->rip);
	if (!at || entry_stamp(at) != stamp) {
		k = page_code(c, j, stamp);
		if (!k)
			return 1;
		at = jit_entry(j, k);
	}
	j->low->stamp = stamp;
	c->stats.blocks_run++;
	return at;
}

static void op_stop(struct cpu *c, const struct insn *i) { }

/* The instructions of a site, by their handlers. False: the loop has to look before the next one. */
static bool call_handlers(struct cpu *c, const struct insn *i, const struct insn *end)
{
	do {
		c->cur = i;
		if (unlikely(c->watch) && (i->flags & IF_ONCE))
			c->watch->once(c);
		i->fn(c, i);
		cpu_charge(c, SLOW_INSN);
		i = c->cur + 1;         /* handlers may have gone on to others */
	} while (i < end && !c->block_end && !mmio_pending(c));
	return !c->block_end && !mmio_pending(c);
}

/*
 * Translated code hands instructions to their handlers. 0: go on behind them; 1: the loop must look before the next one;
 * else the address of the code to go on at (the last of them was the last of its block).
 */
uint64_t jit_call_insn(struct cpu *c, const struct jit_site *s)
{
	const struct jit_code *k = (const struct jit_code *)(uintptr_t)s->code;
	struct insn *i = c->jit->called, *end = i + s->count;
	bool on;

	c->stats.handler_calls++;
	live_settle(c);
	c->gpr[R_BLK] = jit_code_rip(k) + (uint64_t)(int64_t)s->delta;
	c->rip = c->gpr[R_BLK] + s->bytes;
	c->blk = k->part[s->part];
	c->block_end = NULL;
	if (likely(s->count == 1))      /* which is no matter for `rep movs`, as compilers take it for the other case */
		*i = c->blk->insn[s->first];
	else
		memcpy(i, &c->blk->insn[s->first], s->count * sizeof *i);
	*end = (struct insn){ .fn = op_stop, .off = (uint16_t)(end[-1].off + end[-1].len), .base = R_ZERO, .index = R_ZERO };
	on = call_handlers(c, i, end);
	if (unlikely(atomic_load_explicit(&c->code_store, memory_order_relaxed)))
		atomic_store_explicit(&c->code_store, false, memory_order_release);
	if ((end[-1].flags & IF_END) && c->cur >= end - 1) {
		c->budget -= s->part || k->in_line ? s->n : 0;  /* else it was charged at the entry */
		return next_code(c, c->jit);
	}
	if (!on)
		return 1;
	return s->need && (s->need & ~live_begin(c, s->need));
}

static void left_at_entry(struct cpu *c, struct jit *j, struct jit_code *k)
{
	c->rip = jit_code_rip(k);
	if (c->budget <= 0)
		heat_budget(j, k);
	else
		j->stale = k;
}

static enum jit_result run_code(struct cpu *c, struct jit *j, const struct jit_code *k)
{
	uint64_t (*enter)(const uint8_t *) = (uint64_t (*)(const uint8_t *))(void *)(j->rx + j->enter);
	uint64_t r;

	if (k->in_line) {
		c->budget -= k->b->n;
	} else if (c->budget <= k->b->n) {      /* some of it is to run */
		c->charged -= k->b->n + 1 - c->budget;
		c->budget = k->b->n + 1;
	}
	c->stats.blocks_run++;
	c->stats.code_entries++;
	r = enter(j->rx + k->body);
	live_settle(c);
	j->heat_time += c->budget <= 0;
	if (r == 1) {
		if (unlikely(j->rows))
			heat_rows(j);
		c->stats.left_for_loop++;
		return JIT_LOOK;
	}
	*(c->budget > 0 ? &c->stats.left_by_jump : &c->stats.left_by_budget) += 1;
	j->stale = NULL;
	if (r & LEFT_ENTRY) {
		left_at_entry(c, j, (struct jit_code *)(uintptr_t)(r & ~(uint64_t)LEFT_ENTRY));
	} else if (r & LEFT_BUDGET) {
		heat_budget(j, (struct jit_code *)(uintptr_t)(r & ~(uint64_t)LEFT_BUDGET));
	} else if (r) {
		c->blocks->jit_want = (struct jit_link *)(uintptr_t)r;
		c->rip = jit_link_rip(c->blocks->jit_want);
	}
	return JIT_DONE;
}

/* An entry that did not let in: what led to it is cut if `k` is there now. */
static void not_stale(struct jit *j, const struct jit_code *k)
{
	if (likely(!j->stale))
		return;
	if (j->stale != k)
		jit_cut_incoming(j, j->stale);
	j->stale = NULL;
}

/* Where code was left by a jump whose link was cut or not made yet, and the loop is not wanted, that is made up for here. */
static enum jit_result run_linked(struct cpu *c, struct jit *j, struct jit_code *k)
{
	for (;;) {
		enum jit_result r = run_code(c, j, k);
		struct jit_link *want = c->blocks->jit_want;
		uint64_t stamp;

		if (r != JIT_DONE || (!want && !j->stale) || !(stamp = may_go_on(c, j)) || !(k = page_code(c, j, stamp)))
			return r;
		c->blocks->jit_want = NULL;
		not_stale(j, k);
		if (want)
			resolve(j, want, k);
	}
}

enum jit_result jit_run_translated(struct cpu *c, struct block *b, uint32_t mode)
{
	struct jit *j = c->jit;
	struct jit_link *want = c->blocks->jit_want;
	struct jit_code *k = code_of(j, b);
	uint64_t stamp = c->code_stamp;
	bool same;

	c->blocks->jit_want = NULL;
	c->code_stamp = CODE_STAMP_NONE;        /* the interpreter follows no links of its own */
	c->blocks->want = NULL;
	if (k && k->page->moves && k->mode == mode)
		k = jit_page_home(j, b, k, c->rip);
	not_stale(j, k);
	if (b->code_gen != j->gen) {            /* after a flush it has to earn its place anew */
		b->code_gen = j->gen;
		b->code = NULL;
		b->runs = 0;
	}
	if (unlikely(j->alone) && j->alone_rip == c->rip) {
		j->alone = false;
		return JIT_NOT;
	}
	same = k && jit_code_rip(k) == c->rip && k->mode == mode;
	if (unlikely(!same || k->wanted)) {
		/* Code in the last page of 4 GiB may go on at 0: not worth a thought. */
		if (!block_mode_translates(mode) || (mode & BM_ONE) || (!(mode & BM_CODE64) && c->rip >> 12 >= 0xfffff) ||
		    b == c->blocks->scratch || c->tlb == c->tlbs[TLB_NONE] || j->off || (!same && b->runs++ < j->threshold))
			return JIT_NOT;
		if (k)
			b->runs = 0;
		k = jit_translate(j, b, c->rip, mode, same);
		if (!k && same && (k = code_of(j, b))) {        /* with its checks in line it is too long */
			k->in_line = true;
			k->wanted = false;
		}
		if (!k)
			return JIT_NOT;
		want = NULL;
	}
	if (unlikely(c->tlb == c->tlbs[TLB_NONE] || c->data_bp || j->off))
		return JIT_NOT;
	j->low->stamp = k->page->stamp = stamp;
	if (b->cross)
		code_valid(j, k, stamp);
	if (want)
		resolve(j, want, k);
	*jit_page_at(j, c->rip) = low_of(k->page);
	jit_ind_put(j, c->rip, jit_entry(j, k));
	return run_linked(c, j, k);
}

enum jit_result jit_run(struct cpu *c, struct block *b, uint32_t mode)
{
	return unlikely(c->jit->lock) ? lockstep_run(c->jit, b, mode) : jit_run_translated(c, b, mode);
}
