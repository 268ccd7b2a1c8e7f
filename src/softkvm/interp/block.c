/* The cache of decoded blocks: see block.h. */
#include "softkvm/interp/block.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "softkvm/jit/jit.h"
#include "softkvm/vm.h"

static const _Atomic uint32_t never_matches = 0;        /* marked pages are odd */

#define DECODE_COST 128         /* instructions' worth of time, per instruction */

/* Room for the worst: with an end behind the last instruction and a second page. */
static size_t block_size(unsigned n, unsigned bytes)
{
	return sizeof(struct block) + (n + 1) * sizeof(struct insn) + bytes + 8 + sizeof(struct block_cross);
}

/* -- life -------------------------------------------------------------------------------------- */
int engine_cpu_init(struct cpu *c)
{
	struct block_cache *bc = calloc(1, sizeof *bc);

	if (!bc)
		return -ENOMEM;
	bc->scratch = aligned_alloc(64, ALIGN_UP(block_size(1, 15), 64));
	bc->gen[1] = bc->last_gen = 1;
	c->blocks = bc;
	if (block_arena_init(c) && block_hash_init(bc) && bc->scratch)
		return 0;
	engine_cpu_free(c);
	return -ENOMEM;
}

void engine_cpu_free(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	if (!bc)
		return;
	block_arena_free(bc);
	block_hash_free(bc);
	free(bc->scratch);
	free(bc);
	c->blocks = NULL;
}

void block_new_generation_of(struct cpu *c, unsigned user)
{
	struct block_cache *bc = c->blocks;

	bc->want = NULL;
	c->code_stamp = CODE_STAMP_NONE;
	if (bc->last_gen == UINT32_MAX) {
		bc->gen[!user] = 0;
		bc->last_gen = 0;
		memset(bc->known, 0, sizeof bc->known);
		block_flush(c);
	}
	bc->gen[user] = ++bc->last_gen;
}

void block_fetch_changed(struct cpu *c, unsigned user)
{
	struct block_cache *bc = c->blocks;
	uint32_t now = bc->seen_fetch_gen[user] = c->fetch_gen[user];

	for (unsigned i = 0; user && i < ARRAY_SIZE(bc->known); i++)
		if (bc->known[i].gen && bc->known[i].fetch_gen == now) {
			bc->want = NULL;
			c->code_stamp = CODE_STAMP_NONE;
			bc->gen[1] = bc->known[i].gen;
			return;
		}
	block_new_generation_of(c, user);
	if (!user)
		return;
	bc->known[bc->next_known].fetch_gen = now;
	bc->known[bc->next_known++].gen = bc->gen[1];
	bc->next_known %= ARRAY_SIZE(bc->known);
}

void block_new_generation(struct cpu *c)
{
	memset(c->blocks->known, 0, sizeof c->blocks->known);
	block_new_generation_of(c, 0);
	block_new_generation_of(c, 1);
}

void block_flush(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	memset(bc->fast, 0, sizeof bc->fast);
	memset(bc->fields, 0, sizeof bc->fields);
	block_hash_clear(bc);
	bc->used = 0;
	bc->want = NULL;
	quick_forget(&bc->quick);       /* the guest's features may be others now */
	jit_flush(c);
	c->code_stamp = CODE_STAMP_NONE;
}

/* What is known of the data segments: as seg_lin() checks them. */
static uint32_t data_segments(const struct cpu *c)
{
	uint32_t m = BM_FLAT;

	for (unsigned n = SEG_ES; n <= SEG_GS; n++) {
		const struct seg *s = &c->seg[n];

		if (n == SEG_CS)
			continue;
		if (!s->unusable && (s->type & 14) == 2)
			m |= BM_SEG_DATA << n;
		if (n <= SEG_DS && (s->base || s->limit != UINT32_MAX))
			m &= ~(uint32_t)BM_FLAT;
	}
	return m;
}

uint32_t block_mode(const struct cpu *c, bool one)
{
	const struct seg *cs = &c->seg[SEG_CS];
	uint32_t m = one ? BM_ONE : 0;

	if (c->code_bits == 64)
		m |= BM_CODE64 | BM_STACK64;
	else
		m |= (c->code_bits == 32 ? BM_CODE32 : BM_CODE16) | (c->stack_bits == 32 ? BM_STACK32 : BM_STACK16) |
		     (c->real || c->vm86 ? BM_REAL : c->code_bits == 32 ? data_segments(c) : 0) |
		     (cs->base || cs->limit != UINT32_MAX ? BM_SEG : 0);
	return m | (c->smm ? BM_SMM : 0) | (c->cpl == 3 ? BM_USER : 0) |
	       (c->tlb == c->tlbs[TLB_KERNEL_AC] ? BM_AC : 0);
}

/* While code is fetched there is no current instruction: RIP is what cpu_cur_rip() must say. */
void block_no_insn(struct cpu *c)
{
	static const struct insn none = { .fn = op_ud, .flags = IF_END, .base = R_ZERO, .index = R_ZERO };

	c->cur = &none;
	c->gpr[R_BLK] = c->rip;
}

/* -- validity ---------------------------------------------------------------------------------- */
static bool same_bytes(const struct block *b)
{
	unsigned first = b->cross ? 4096 - (b->gpa & 4095) : b->bytes;
	const uint8_t *copy = block_copy(b);

	return ram_same(b->host, copy, first) &&
	       (!b->cross || ram_same(block_cross(b)->second.host, copy + first, b->bytes - first));
}

static const uint8_t *page_base(const struct code_page *p)
{
	return p->host - (p->gpa & 4095);
}

/* A client that does not announce its writes: what this block was made from is watched. */
static void watch_block(struct cpu *c, const struct block *b, const struct code_page *first)
{
	const struct block_cross *x = b->cross ? block_cross(b) : NULL;
	unsigned off = b->gpa & 4095, n = x ? 4096 - off : b->bytes;

	if (!c->vm || c->vm->client_tells_code)
		return;
	watch_decoded(c->vm, first, x ? x->page_ver[0] : b->ver_value, off, block_copy(b), n);
	if (x)
		watch_decoded(c->vm, &x->second, x->page_ver[1], 0, block_copy(b) + n, b->bytes - n);
}

/* The page was written, or may have been behind our back: do the bytes still stand? Marked before they are compared. */
static bool revive(struct cpu *c, struct block *b)
{
	struct block_cross *x = b->cross ? block_cross(b) : NULL;
	struct code_page first = block_page(b);
	uint32_t v0, v1;

	block_no_insn(c);
	v0 = mmu_code_mark(c, &first);
	v1 = x ? mmu_code_mark(c, &x->second) : 0;

	if (x ? v0 == x->page_ver[0] && v1 == x->page_ver[1] : v0 == b->ver_value)
		return true;            /* the page slept */
	mmu_code_lines(c, &first, b->gpa & 4095, x ? 4096 - (b->gpa & 4095) : b->bytes);
	if (x)
		mmu_code_lines(c, &x->second, 0, b->bytes - (4096 - (b->gpa & 4095)));
	cpu_charge(c, DECODE_COST);
	if (!same_bytes(b) && !block_patch(c, b)) {
		c->stats.code_invalidations++;
		return false;
	}
	if (x) {
		x->page_ver[0] = v0;
		x->page_ver[1] = v1;
	} else {
		b->ver_value = v0;
	}
	watch_block(c, b, &first);
	jit_revived(c, b);
	return true;
}

static inline uint32_t ver_now(const _Atomic uint32_t *ver)
{
	return atomic_load_explicit((_Atomic uint32_t *)(uintptr_t)ver, memory_order_acquire);
}

static bool cross_unchanged(const struct block *b)
{
	const struct block_cross *x = block_cross(b);

	return ver_now(x->ver) == x->page_ver[0] && ver_now(x->second.ver) == x->page_ver[1];
}

static inline bool block_valid(struct cpu *c, struct block *b)
{
	if (likely(ver_now(b->ver) == b->ver_value || (b->cross && cross_unchanged(b))))
		return true;
	return revive(c, b);
}

/* -- making ------------------------------------------------------------------------------------ */
struct build {
	uint64_t lin, gpa;
	uint32_t mode;
	uint64_t limit;         /* bytes of code up to the CS limit */
	struct code_page page[2];
	uint32_t ver[2];
	bool cross, keep;
	unsigned n, bytes;
	ZydisDecoder decoder;
	struct insn insn[BLOCK_MAX_INSNS];
	uint8_t buf[BLOCK_MAX_BYTES + 16];
};

static void fetch(struct cpu *c, uint64_t lin, struct code_page *p)
{
	mmu_fetch(c, lin, p);
	if (!p->host || !p->ver)
		cpu_emulation_failed(c);
	p->host = page_base(p);
	p->gpa &= ~4095ULL;
}

/* The first instruction does not end in its page (or before the CS limit). */
static void build_cross(struct cpu *c, struct build *b, unsigned first)
{
	unsigned avail = (unsigned)MIN(b->limit, 15), rest = 4096 - (b->gpa & 4095);

	if (avail > rest) {
		uint64_t lin = b->lin + rest;

		if (c->code_bits != 64)
			lin = (uint32_t)lin;
		else if (!cpu_canonical(c, lin))
			cpu_gp(c, 0);
		fetch(c, lin, &b->page[1]);
		b->cross = true;
		b->ver[1] = mmu_code_mark(c, &b->page[1]);
		ram_copy(b->buf + rest, b->page[1].host, avail - rest);
		if (decode_insn(c, &b->decoder, b->mode, b->buf, avail, 0, b->insn) == DEC_OK) {
			b->n = 1;
			b->bytes = b->insn[0].len;
			b->cross = b->bytes > rest;
			return;
		}
	}
	b->cross = false;       /* the limit cuts it off */
	b->keep = false;
	b->n = 1;
	b->bytes = first;
	b->insn[0] = (struct insn){ .fn = op_fetch_gp, .flags = IF_END, .len = (uint8_t)first,
				    .base = R_ZERO, .index = R_ZERO };
}

static void build_block(struct cpu *c, struct build *b)
{
	unsigned rest = 4096 - (b->gpa & 4095), max = b->mode & BM_ONE ? 1 : BLOCK_MAX_INSNS;
	unsigned have = (unsigned)MIN(MIN((uint64_t)rest, b->limit), (uint64_t)sizeof b->buf - 1);

	b->ver[0] = mmu_code_mark(c, &b->page[0]);
	ram_copy(b->buf, b->page[0].host + (b->gpa & 4095), have);
	while (b->n < max && b->bytes < BLOCK_MAX_BYTES && b->bytes < have) {
		unsigned avail = MIN(15, have - b->bytes);
		struct insn *i = &b->insn[b->n];

		if (decode_insn(c, &b->decoder, b->mode, b->buf + b->bytes, avail, b->bytes, i) == DEC_MORE) {
			if (!b->n)
				build_cross(c, b, avail);
			return;
		}
		b->n++;
		b->bytes += i->len;
		if (i->flags & IF_END)
			return;
	}
}

/* Stores to what was decoded will be noticed from here on. False: one came in between. */
static bool build_settle(struct cpu *c, const struct build *b)
{
	unsigned off = b->gpa & 4095, first = b->cross ? 4096 - off : b->bytes;
	bool fresh = mmu_code_lines(c, &b->page[0], off, first);

	if (b->cross)
		fresh |= mmu_code_lines(c, &b->page[1], 0, b->bytes - first);
	return !fresh || (ram_same(b->page[0].host + off, b->buf, first) &&
			  (!b->cross || ram_same(b->page[1].host, b->buf + first, b->bytes - first)));
}

/* Decodes; code that keeps changing meanwhile is executed once, instruction by instruction. */
static void build(struct cpu *c, struct build *b)
{
	decode_init(&b->decoder, c, b->mode);
	for (unsigned n = 0; n < 4; n++) {
		b->n = b->bytes = 0;
		b->cross = false;
		build_block(c, b);
		if (build_settle(c, b))
			return;
		b->keep = n < 2 && b->keep;
		if (!b->keep)
			b->mode |= BM_ONE;
	}
}

/* Bytes `s` needs as a block. */
static size_t built_size(const struct build *s)
{
	bool end = !(s->insn[s->n - 1].flags & IF_BRANCH);

	return sizeof(struct block) + (s->n + end) * sizeof(struct insn) + s->bytes + (s->cross ? 8 + sizeof(struct block_cross) : 0);
}

static void finish_insns(struct block *b, const struct build *s)
{
	memcpy(b->insn, s->insn, s->n * sizeof(struct insn));
	if (!(s->insn[s->n - 1].flags & IF_BRANCH))
		b->insn[s->n] = (struct insn){ .fn = op_block_end, .off = (uint16_t)s->bytes, .base = R_ZERO, .index = R_ZERO };
	memcpy((uint8_t *)(uintptr_t)block_copy(b), s->buf, s->bytes);
	if (s->cross)
		*block_cross(b) = (struct block_cross){ .ver = s->page[0].ver, .page_ver = { s->ver[0], s->ver[1] },
							.second = s->page[1] };
}

static struct block *block_finish(struct cpu *c, struct build *s)
{
	if (s->insn[s->n - 1].flags & IF_NOT_LAST)
		s->insn[s->n - 1].flags |= IF_END;
	struct block_cache *bc = c->blocks;
	struct block *b = s->keep ? block_alloc(c, built_size(s)) : bc->scratch;

	*b = (struct block){
		.n = (uint8_t)s->n, .bytes = (uint16_t)s->bytes, .gpa = s->gpa, .mode = s->mode & BM_PHYS_MASK, .cross = s->cross,
		.linked = s->keep && bc->linked, .lines = s->page[0].lines, .host = s->page[0].host + (s->gpa & 4095),
		.ver = s->cross || !s->keep ? &never_matches : s->page[0].ver, .ver_value = s->cross || !s->keep ? 1 : s->ver[0],
	};
	finish_insns(b, s);
	if (s->keep) {
		block_hash_add(bc, b);
		watch_block(c, b, &s->page[0]);
	}
	c->stats.blocks_decoded++;
	cpu_charge(c, DECODE_COST * b->n);
	return b;
}

/* -- finding ----------------------------------------------------------------------------------- */
/* Is it the same memory as when `b` was decoded? */
static bool same_pages(struct cpu *c, const struct block *b, const struct code_page *pg, uint64_t lin)
{
	struct code_page first = block_page(b), second;
	uint64_t next = (lin | 4095) + 1;

	if (first.host != pg->host || first.ver != pg->ver)
		return false;
	if (!b->cross)
		return true;
	fetch(c, c->code_bits == 64 ? next : (uint32_t)next, &second);
	return second.host == block_cross(b)->second.host && second.ver == block_cross(b)->second.ver;
}

static struct block *hash_find(struct cpu *c, uint64_t gpa, uint32_t mode, const struct code_page *pg, uint64_t lin)
{
	struct block *b;
	uint32_t *e = block_hash_look(c->blocks, gpa, mode, &b);

	if (!e || (same_pages(c, b, pg, lin) && block_valid(c, b)))
		return e ? b : NULL;
	*e = BLOCK_HASH_GONE;
	return NULL;
}

static struct block *block_slow(struct cpu *c, uint32_t mode, uint64_t lin)
{
	struct build s;
	struct block *b;

	s.keep = true;
	s.ver[1] = 0;
	memset(s.page, 0, sizeof s.page);
	s.lin = lin;
	s.mode = mode;
	s.limit = UINT64_MAX;
	if (mode & BM_CODE64) {
		if (!cpu_canonical(c, lin))
			cpu_gp(c, 0);
	} else {
		if (c->rip > c->seg[SEG_CS].limit)
			cpu_gp(c, 0);
		s.limit = (uint64_t)c->seg[SEG_CS].limit - c->rip + 1;
	}
	fetch(c, lin, &s.page[0]);
	s.gpa = s.page[0].gpa | (lin & 4095);
	b = hash_find(c, s.gpa, mode, &s.page[0], lin);
	if (b && b->bytes <= s.limit)
		return b;
	if (b) {        /* cached under a larger limit */
		s.keep = false;
		s.mode |= BM_ONE;
	}
	build(c, &s);
	return block_finish(c, &s);
}

/* Links and lookups have died, but the block is what it was at this address: one look at the instruction TLB says so. */
static bool same_again(struct cpu *c, struct block_fast *e, uint64_t stamp)
{
	struct block *b = e->blk;
	struct code_page pg;

	if (!e->stamp || (uint32_t)e->stamp != (uint32_t)stamp || (stamp & (BM_SEG | BM_ONE)) || b->cross)
		return false;
	block_no_insn(c);
	mmu_fetch(c, e->rip, &pg);
	if (!pg.host || pg.host + (e->rip & 4095) != b->host || pg.ver != b->ver || !block_valid(c, b))
		return false;
	e->stamp = stamp;
	return true;
}

struct block *block_get(struct cpu *c, uint32_t mode)
{
	struct block_cache *bc = c->blocks;
	uint64_t stamp = block_stamp(c, mode);
	uint64_t lin = c->rip;
	struct block_fast *e;
	struct block *b;

	if (unlikely(atomic_load_explicit(&c->code_store, memory_order_relaxed)))
		atomic_store_explicit(&c->code_store, false, memory_order_release);
	if (!(mode & BM_CODE64))
		lin = (uint32_t)(c->seg[SEG_CS].base + c->rip);
	e = &bc->fast[block_fast_index(lin)];
	c->code_stamp = mode & (BM_ONE | BM_SEG) ? CODE_STAMP_NONE : stamp;
	if (likely(e->rip == lin && !(mode & BM_SEG)) && (likely(e->stamp == stamp) ? block_valid(c, e->blk) : same_again(c, e, stamp)))
		return e->blk;
	block_no_insn(c);
	b = block_slow(c, mode, lin);
	c->code_stamp = mode & (BM_ONE | BM_SEG) ? CODE_STAMP_NONE : stamp;   /* a flush cleared it */
	if (b != bc->scratch)
		*e = (struct block_fast){ .rip = lin, .stamp = stamp, .blk = b };
	return b;
}
