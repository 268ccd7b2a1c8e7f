/*
 * Decoded blocks: straight runs of guest instructions inside one page of guest physical memory.
 * Private to interp/.
 *
 * Finding a block. By linear address in a direct-mapped table that is valid for one `code_stamp`
 * (generation of the instruction TLB at this privilege, and mode), else by physical address in a hash. Without a translator a
 * branch remembers where it went last (struct block_link) and goes there without leaving the handler.
 *
 * Staying right. A block remembers the version of its page (mmu_code_mark()); whoever stores to the page
 * changes it. A block whose page changed is compared with the bytes it was made from and either revived or
 * thrown away. For clients that do not announce their writes, mmu/watch.c compares pages and changes their versions. An instruction that crosses a page end is a block of its own and has two of everything.
 *
 * Memory. A bounded arena per vCPU, filled front to back; when it is full, what was not translated is thrown away (collect.c). What a VM's arenas
 * may hold together is bounded as well, so that a machine of four CPUs takes no more memory than one of one. A guest
 * that fills its arena again and again with little done in between has more code in use than fits: where a translator
 * works, the arena then grows instead, up to a part of the memory meant for translations.
 */
#ifndef SOFTKVM_INTERP_BLOCK_H
#define SOFTKVM_INTERP_BLOCK_H

#include <stdatomic.h>

#include "softkvm/cpu.h"
#include "softkvm/insn.h"
#include "softkvm/interp/quick.h"
#include "softkvm/vm.h"

#define BLOCK_MAX_INSNS 64
#define BLOCK_MAX_BYTES 512
#define BLOCK_ARENA_TOTAL (14u << 20)
#define BLOCK_ARENA_MIN (1u << 20)
#define BLOCK_ARENA_JIT (7u << 20)      /* enough for one vCPU where a translator takes over what runs often */
#define BLOCK_ALIGN 32u
#define BLOCK_GROW 150000               /* decoded in all, before which no arena grows */
#define BLOCK_BUSY 8192                 /* instructions for each decoded block, below which an arena grows */

/* Mode bits of a block: part of its key and of code_stamp. */
enum {
	BM_CODE16 = 0, BM_CODE32 = 1, BM_CODE64 = 2,    /* code_bits */
	BM_STACK16 = 0, BM_STACK32 = 4, BM_STACK64 = 8,
	BM_ONE = 16,            /* one instruction */
	BM_REAL = 32,           /* real or virtual-8086 mode: fewer instructions exist */
	BM_SMM = 64,
	BM_USER = 128,          /* CPL 3: fetch permission; not part of the physical key */
	BM_SEG = 256,           /* CS has a base or a limit: no links; not part of the physical key */
	BM_AC = 512,            /* kernel code that may touch user pages (SMAP on, EFLAGS.AC set); not part of the physical key */
	/* 32-bit code, for the translator: bit SEG_* says that the segment is data, may be written and does not expand down; in CS's place ... */
	BM_SEG_DATA = 1 << 10,
	BM_FLAT = BM_SEG_DATA << SEG_CS,        /* ... that those of ES, SS and DS have no base and 4 GiB */
};
#define BM_PHYS_MASK (~(uint32_t)(BM_USER | BM_SEG | BM_AC))

struct block_link {
	uint64_t stamp, rip;
	struct block *blk;
};

/*
 * One cache line; what a lookup by linear address and the translator look at comes first. Where nothing is translated two links lie in front
 * of it (block_link()): with a translator the interpreter follows none.
 */
struct block {
	const _Atomic uint32_t *ver;    /* what links check; a crossing block points to a version that never matches */
	uint32_t ver_value;
	uint16_t bytes;
	uint8_t n;                      /* instructions */
	bool cross : 1;                 /* the one instruction goes on in another page: struct block_cross */
	bool linked : 1;                /* has links */
	bool kept : 1, hashed : 1;      /* collect.c */
	struct jit_code *code;          /* its translation, if code_gen is the translator's; see jit/jit.h */
	uint32_t code_gen;
	uint8_t runs;                   /* times interpreted while a translator waited */
	uint8_t patched;                /* immediates and displacements that changed since: patch.c */
	uint64_t gpa;
	uint32_t mode;
	uint32_t moves;                 /* collect.c */
	_Atomic uint64_t *lines;        /* of its (first) page: mmu_code_lines() */
	const uint8_t *host;            /* first byte in host memory */
	/* n, then one with op_block_end unless the last is a branch; then the bytes this was decoded from; then block_cross. */
	_Alignas(32) struct insn insn[];
};
_Static_assert(sizeof(struct block) == 64, "block: small ones are most of the arena");

/* n = 0: fall-through or not taken; 1: taken. */
static inline struct block_link *block_link(struct block *b, unsigned n) { return (struct block_link *)b - 1 - n; }
#define BLOCK_LINKS ALIGN_UP(2 * sizeof(struct block_link), BLOCK_ALIGN)

/* Of a block that crosses a page end: the pages' own versions, and the second page. */
struct block_cross {
	_Atomic uint32_t *ver;          /* first page */
	uint32_t page_ver[2];
	struct code_page second;
};

static inline const uint8_t *block_copy(const struct block *b)
{
	return (const uint8_t *)&b->insn[b->n + !(b->insn[b->n - 1].flags & IF_BRANCH)];
}

static inline struct block_cross *block_cross(const struct block *b)
{
	return (struct block_cross *)(((uintptr_t)block_copy(b) + b->bytes + 7) & ~(uintptr_t)7);
}

/* What it takes in the arena. */
static inline size_t block_bytes(const struct block *b)
{
	const uint8_t *end = block_copy(b) + b->bytes;

	return ALIGN_UP((size_t)(end - (const uint8_t *)b) + (b->cross ? 8 + sizeof(struct block_cross) : 0), BLOCK_ALIGN);
}

struct block_fast { uint64_t rip, stamp; struct block *blk; };

/* Where an instruction in the arena, of those that were patched, has an immediate that may be anything: patch.c. */
struct block_field { const struct insn *insn; uint8_t at, len; };

#define CODE_STAMP_NONE 1      /* no block or link ever has this */

#define BLOCK_FAST_BITS 14
#define BLOCK_HASH_BITS 16              /* at first */
#define BLOCK_HASH_LINE 16              /* entries in a cache line */

struct block_cache {
	struct block_fast fast[1 << BLOCK_FAST_BITS];
	/* By physical address: 24 bits say which block of the arena, 0: none; 8 are some of the hash, so that a lookup touches one line. 0 ends a search. */
	uint32_t *hash;
	unsigned hash_bits, hashed;     /* hashed: entries that are not 0 */
	uint8_t *arena;
	size_t size, used;
	bool linked;                    /* its blocks have links */
	unsigned grown;                 /* times that the arena's bound was doubled */
	uint64_t full_insns, full_blocks;       /* statistics when it was full last */
	struct { uint64_t since, insns; bool again; } rest;  /* rest.c */
	uint32_t gen[2], last_gen;      /* upper half of code_stamp, [1] at CPL 3; no value is used twice */
	uint32_t seen_fetch_gen[2];
	struct { uint32_t fetch_gen, gen; } known[8];   /* at CPL 3: values of fetch_gen that may come back */
	unsigned next_known;
	struct block_link *want;        /* link to be filled by the next lookup */
	struct block_field fields[64];
	struct block *scratch;          /* for blocks that cannot be kept */
	struct jit_link *jit_want;      /* translated code's jump that the next lookup resolves */
	int32_t budget_start;           /* to count instructions */
	int32_t most, refill;           /* what vcpu_poll() gives, and how much of that: block_refill() */
	uint64_t refilled;              /* when, by the host's TSC */
	bool stepping;                  /* one_insn was set when the running instruction began */
	unsigned pauses;                /* PAUSE instructions since so many instructions had run */
	uint64_t pauses_since;
	unsigned random_left;           /* RDRAND: numbers drawn and not yet given out */
	uint64_t random[32];
	struct quick quick;             /* decode_zydis() */
};

static inline unsigned block_fast_index(uint64_t rip)
{
	return (unsigned)(rip ^ rip >> BLOCK_FAST_BITS) & ((1u << BLOCK_FAST_BITS) - 1);
}

/* The page of its first byte. */
static inline struct code_page block_page(const struct block *b)
{
	return (struct code_page){ .gpa = b->gpa & ~4095ULL, .host = b->host - (b->gpa & 4095), .lines = b->lines,
				   .ver = b->cross ? block_cross(b)->ver : (_Atomic uint32_t *)(uintptr_t)b->ver };
}

/* Code of this mode can be translated (jit/): 64-bit, and 32-bit with a flat code segment and a 32-bit stack in data that does not expand down. */
static inline bool block_mode_translates(uint32_t mode)
{
	const uint32_t look = BM_CODE32 | BM_STACK32 | BM_SEG | BM_REAL | BM_SEG_DATA << SEG_SS;

	return (mode & BM_CODE64) || (mode & look) == (BM_CODE32 | BM_STACK32 | BM_SEG_DATA << SEG_SS);
}

/* Current mode bits. `one`: a block of one instruction is wanted. */
uint32_t block_mode(const struct cpu *c, bool one);
/* The valid block at CS:rip; decodes it when needed. Raises what the fetch raises. */
struct block *block_get(struct cpu *c, uint32_t mode);
/* Forget everything. Never while a block runs. */
void block_flush(struct cpu *c);
/* collect.c: forget what is not translated. False: nothing was forgotten, as too much would be left, or there is no translator. */
bool block_collect(struct cpu *c, size_t limit);
/* arena.c: memory for a block. What was decoded or translated may have been forgotten then. */
struct block *block_alloc(struct cpu *c, size_t need);
bool block_arena_init(struct cpu *c);
void block_arena_free(struct block_cache *bc);
/* hash.c. block_hash_look(): the entry of *found, which becomes BLOCK_HASH_GONE where that is given up; NULL: none. */
#define BLOCK_HASH_GONE 1u
bool block_hash_init(struct block_cache *bc);
void block_hash_free(struct block_cache *bc);
void block_hash_add(struct block_cache *bc, struct block *b);
void block_hash_clear(struct block_cache *bc);
uint32_t *block_hash_look(const struct block_cache *bc, uint64_t gpa, uint32_t mode, struct block **found);
/* That of an entry; NULL: it has none. */
static inline struct block *block_hashed(const struct block_cache *bc, uint32_t entry)
{
	return entry >> 8 ? (struct block *)(bc->arena + ((size_t)(entry >> 8) - 1) * BLOCK_ALIGN) : NULL;
}
/*
 * patch.c: its bytes have changed (which is noticed from here on). Take over immediates and displacements; false: it is other code. What
 * was translated from it finds its instructions changed: jit_revived().
 */
bool block_patch(struct cpu *c, struct block *b);
/* The block decoded from there, valid or not; NULL: none. */
struct block *block_hash_find(const struct block_cache *bc, uint64_t gpa, uint32_t mode);
/* No instruction runs: cpu_cur_rip() is cpu->rip. Before guest memory is read between instructions. */
void block_no_insn(struct cpu *c);
/* Do not follow links made before this point: all, or those at CPL 3 (`user`), or those below. */
void block_new_generation(struct cpu *c);
void block_new_generation_of(struct cpu *c, unsigned user);
/* fetch_gen[user] is another: one that was known brings its links back. */
void block_fetch_changed(struct cpu *c, unsigned user);

/* The loop has something to look at before the next block. */
static inline bool block_event_due(const struct cpu *c)
{
	return atomic_load_explicit(&c->requests, memory_order_relaxed) || c->trap_db || c->halted || c->ev.valid || c->one_insn;
}
static inline bool block_boundary_due(const struct cpu *c)
{
	return c->budget <= 0 || block_event_due(c);
}

/* The budget is used up: what it was used for. The caller gives another. */
#define PAUSES_WITHIN 4096
static inline void block_count_insns(struct cpu *c)
{
	c->stats.insns += (uint64_t)(int64_t)(c->blocks->budget_start - c->budget - c->charged);
	c->charged = 0;
	if (c->stats.insns - c->blocks->pauses_since >= PAUSES_WITHIN) {
		c->blocks->pauses = 0;
		c->blocks->pauses_since = c->stats.insns;
	}
}

/*
 * The next budget. Instructions that wait for memory, or that code takes from it without counting (jumps forward), make it last too long for signals
 * and requests: then it is smaller, so that half of SLOW_BUDGET is what it lasts, until it is quick again.
 */
#define SLOW_BUDGET 60000       /* host cycles: 15 to 30 us, 15 of them for each of vcpu_poll()'s 4096 instructions */
#define LEAST_BUDGET 64
#define FIRST_BUDGET 4096
static inline void block_refill(struct cpu *c, uint64_t now)
{
	struct block_cache *bc = c->blocks;
	uint64_t took = now - bc->refilled;
	int32_t n = bc->refill;

	if (took > SLOW_BUDGET)
		n = MAX((int32_t)((uint64_t)n * (SLOW_BUDGET / 2) / took), LEAST_BUDGET);
	else if (took < SLOW_BUDGET / 4)
		n *= 2;
	bc->refilled = now;
	c->budget = bc->budget_start = bc->refill = MIN(n, bc->most);
}

/* The first of a KVM_RUN. */
static inline void block_start_budget(struct cpu *c, uint64_t now)
{
	struct block_cache *bc = c->blocks;

	bc->refilled = now;
	c->budget = bc->budget_start = bc->refill = bc->refill ? bc->refill : FIRST_BUDGET;
}

/* Linear lookups and links die when the MMU says that a fetch may give something else. */
static inline void block_check_generation(struct cpu *c)
{
	struct block_cache *bc = c->blocks;

	for (unsigned user = 0; user < 2; user++)
		if (unlikely(bc->seen_fetch_gen[user] != c->fetch_gen[user]))
			block_fetch_changed(c, user);
}

/* code_stamp of this mode now. */
static inline uint64_t block_stamp(const struct cpu *c, uint32_t mode)
{
	return (uint64_t)c->blocks->gen[!!(mode & BM_USER)] << 32 | mode | (1u << 31);
}

/* decode.c: decode one instruction from `bytes` of which `avail` (<= 15) can be had, by decode_init()'s `z` for `mode`. */
enum decode_result { DEC_OK, DEC_MORE /* needs bytes beyond avail */ };
enum decode_result decode_insn(const struct cpu *c, const ZydisDecoder *z, uint32_t mode, const uint8_t *bytes, unsigned avail,
			       unsigned off, struct insn *i);
/* A Zydis decoder for the mode and the guest's features. */
void decode_init(ZydisDecoder *z, const struct cpu *c, uint32_t mode);
/* ZydisDecoderDecodeFull() with what Zydis gets wrong put right: for whoever looks at operands and widths. */
ZyanStatus decode_zydis(const ZydisDecoder *dec, const struct cpu *c, const uint8_t *bytes, unsigned avail, ZydisDecodedInstruction *z,
			ZydisDecodedOperand *op);
insn_fn op_block_end, op_fetch_gp;

#endif
