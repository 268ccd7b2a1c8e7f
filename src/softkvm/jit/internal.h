/* What the files of jit/ share. Register map and invariants: docs/engine-translator.md. */
#ifndef SOFTKVM_JIT_INTERNAL_H
#define SOFTKVM_JIT_INTERNAL_H

#include <stddef.h>
#include <stdio.h>

#include "softkvm/jit/jit.h"
#include "softkvm/low.h"

/* Host registers by number. */
enum { H_RAX, H_RCX, H_RDX, H_RBX, H_RSP, H_RBP, H_RSI, H_RDI, H_R8, H_R9, H_R10, H_R11, H_R12, H_R13, H_R14, H_R15 };
/* Scratch: flags and accumulator, index and shift count, address. */
#define SA H_RAX
#define SC H_RCX
#define ST H_R15
/* Host register of a guest register, -1: it stays in cpu->gpr. */
extern const int8_t jit_map[16];

#define JIT_THRESHOLD 8
#define JIT_THUNKS 16384u       /* bytes at the start of the code area */
#define JIT_ALL_FLAGS 0x8d5u    /* OF SF ZF AF PF CF in RFLAGS' positions */

/* Addresses in low memory, by their lower halves; 0 is NULL. There are many. */
typedef uint32_t low_ptr;

/* A direct jump to another block. */
struct jit_link {
	low_ptr from;                   /* jit_code */
	low_ptr to;                     /* jit_code where it leads, 0: nowhere yet */
	low_ptr next, next_in;          /* jit_link of the same translation; that lead there */
	int32_t rip;                    /* from that of `from` */
	uint32_t at, unlinked;          /* offset of the rel32 in the code area, and where it leads while unlinked */
	bool behind_call;               /* registers are where they usually are, and where it leads has to look at all: the call may have taken long */
};

/*
 * Translations of a page for one mode. In low memory: entries read `stamp` of their page. A page that does not move has one
 * of these for each address.
 */
struct jit_page {
	uint64_t stamp;                 /* code stamp under which it was seen last to be at `lin` */
	uint64_t lin;                   /* its linear address, now if it `moves` */
	uint64_t gpa;
	const _Atomic uint32_t *ver;    /* which page: where its version is */
	uint32_t mode;
	low_ptr slots;                  /* jit_slot: a table of `size`, a power of two or 0, `used` of them ever */
	uint16_t size, used;
	bool moves;                     /* its translations read `lin` */
	uint8_t was[2], returns;        /* where it was before that; how many times it has come back there (page.c) */
	struct jit_code *codes;         /* if it moves */
	struct jit_page *next;          /* of the same hash */
};
_Static_assert(sizeof(struct jit_page) == 64, "jit_page: there are many");
/* Where the entry of the translation of an offset in the page is, an address; 0: it has none now. */
struct jit_slot { uint16_t off1; uint32_t at; };        /* off1: the offset plus one; 0: free, so none is behind it */
#define JIT_PAGE_BITS 12
#define JIT_AT_BITS 13

/* What translated code is left by: a jit_link, NULL, a jit_code whose entry did not let in (it is stale, or the budget is used up), or one where the budget ended in a loop. */
#define LEFT_ENTRY 2u
#define LEFT_BUDGET 4u

/* Thunks for a choice of registers. Number 0 is the usual one, in the fixed part of the code area. */
#define JIT_SWAPS 4
struct jit_map_thunks { uint32_t gen, call, live; };

/*
 * Handler call: a number of instructions that follow each other in a decoded block. The instructions are copied when they are
 * called (struct jit, `called`).
 */
struct jit_site {
	low_ptr code;                   /* struct jit_code */
	int16_t delta;                  /* of the block's first byte from the translation's */
	uint16_t bytes;                 /* the block's, and its instructions */
	uint8_t n;
	uint8_t part;                   /* which of the translation's */
	uint8_t first, count;           /* which */
	uint8_t need;                   /* JV_* that the code behind it relies on */
};
_Static_assert(sizeof(struct jit_site) == 16, "jit_site: most are never used");
#define SITE_MAX 9

/* Decoded blocks of one page that are translated together. */
#define REGION_PARTS 24
#define REGION_INSNS 128

struct jit_code {
	struct block *b;
	uint64_t rip;
	uint64_t stamp;                 /* of a block that crosses a page end: when both pages were looked at last */
	struct jit_page *page;          /* if that moves, `rip` was the address when it was made */
	struct jit_code *next;          /* of all: struct jit, `codes` */
	struct jit_code *page_next;
	uint32_t ver_value;             /* its entry compares it: there it is an immediate, unless the block crosses a page end */
	uint32_t second_value;          /* of a block that crosses a page end: the other page's version */
	uint32_t mode;
	uint32_t entry, body;           /* offsets in the code area: with and without the look at stamp and version */
	uint32_t entry_same, body_same; /* the same for those who come with this map */
	uint32_t hot, points;           /* where its code begins in the code area, and its points in struct jit's */
	low_ptr links, in;              /* jit_link */
	low_ptr patches;                /* jit_patch: immediates that it reads from memory */
	low_ptr looks;                  /* jit_look: at code beyond its blocks (flags_dead_at()) */
	uint32_t heat_time;
	uint16_t npoints;
	uint16_t map;                   /* map.c */
	uint16_t patched;               /* patch_count() when it was made */
	uint8_t nparts, budgets;        /* budgets: that ended in its loops */
	bool in_line;                   /* checks are in it rather than called */
	bool wanted;                    /* it should be made anew, with checks in line: heat.c */
	bool apart;                     /* accesses in a row do not share a check: theirs failed too often */
	uint8_t rows_missed;
	struct block *part[REGION_PARTS];       /* [0] is b; there is memory for nparts of them */
};

/* In low memory: translated code reads `value`, which is that of an instruction of a part. */
struct jit_patch {
	uint64_t value;
	uint32_t next;                  /* address, 0: the last */
	uint8_t part, insn;
};

/* Bytes of the translation's page, and which of them matter. */
struct jit_look {
	uint64_t mask;
	uint32_t next;
	uint16_t off;
	uint16_t len;
	uint8_t bytes[];
};

/* Where it is now. */
static inline uint64_t jit_code_rip(const struct jit_code *k) { return k->page->lin | (k->rip & 4095); }
/* What is where in an entry (trans.c, check()): the address of the stamp that it wants, and the version. */
enum { ENTRY_STAMP = 11, ENTRY_VERSION = 33 };
#define LOW_PTR(type, v) ((type *)(uintptr_t)(v))
static inline low_ptr low_of(const void *p) { return (low_ptr)(uintptr_t)p; }
static inline struct jit_link *jit_link_at(low_ptr p) { return LOW_PTR(struct jit_link, p); }
static inline struct jit_code *jit_link_from(const struct jit_link *l) { return LOW_PTR(struct jit_code, l->from); }
static inline struct jit_code *jit_link_to(const struct jit_link *l) { return LOW_PTR(struct jit_code, l->to); }
static inline uint64_t jit_link_rip(const struct jit_link *l)
{
	const struct jit_code *k = jit_link_from(l);
	uint64_t rip = jit_code_rip(k) + (uint64_t)(int64_t)l->rip;

	return k->mode & BM_CODE64 ? rip : (uint32_t)rip;
}
/* Within the page: it needs no stamp. */
bool jit_link_near(const struct jit_link *l);
/* The rel32 behind the registers' change to the usual places, which unlinked leads on; 0: `at` is behind it. */
uint32_t jit_link_at2(const struct jit_link *l);

/*
 * Recent targets of indirect jumps, at the index of the address' bits 3 to 16, so that those of a function are neighbours, and
 * where the entry of its translation is, which looks whether it is good. An empty entry has an address of another index.
 */
struct jit_ind { uint64_t rip, at; };
#define IND_BITS 14
#define IND_LOW 3
static inline unsigned jit_ind_index(uint64_t rip) { return rip >> IND_LOW & (BIT(IND_BITS) - 1); }
static inline struct jit_ind jit_ind_none(unsigned index) { return (struct jit_ind){ index ? 0 : UINT64_MAX, 0 }; }
/* Where it is entered, 0: not known. */
static inline uint32_t jit_ind_entry(const struct jit_ind *table, uint64_t rip)
{
	const struct jit_ind *i = &table[jit_ind_index(rip)];

	return i->rip == rip ? (uint32_t)i->at : 0;
}

#define HOLDS 4
#define CALLS_BYTES 8192

/* The part that translated code addresses: below 2 GiB. */
struct jit_low {
	struct jit_ind ind[1 << IND_BITS];
	uint64_t stamp;                 /* of the code that runs: block_cache generation and mode */
	uint8_t vec_ok;                 /* JV_*: vector and x87 state that is the host's now, and what may use it (live.c) */
	uint8_t narrow;                 /* load 16 bytes only */
	uint16_t fcw;                   /* on its way to the control word */
	uint32_t host_mxcsr, mxcsr;     /* mxcsr: on its way there */
	uint64_t string_to, string_n;   /* host address that MOVS is about to write, or CMPS to read; elements that CMPS or SCAS is about to compare */
	uint64_t calls_base, calls_limit, calls_none;   /* the calls on the host's stack: rsp without any, with too many; the address in those that are none */
	uint64_t hold[HOLDS];           /* host addresses (gen_hold.c); 0: none */
	uint64_t regs[16], go_on;       /* of code whose check failed, by host register; where it goes on (jit_miss()) */
	struct { _Alignas(32) uint8_t index[32], mask[32], data[32]; } gather;
	_Alignas(64) uint8_t xs[576];   /* x87 state in XSAVE's form */
	_Alignas(64) uint8_t arena[];   /* jit_code and jit_site */
};
/*
 * What is known of a place in translated code (resume.c), by its offset from the translation's begin, ascending. One where the host may trap for
 * reasons of its own: which instruction of the guest it belongs to and where the guest's state is. And the place where code goes on behind a TLB check
 * (`count` is not 0): which instructions go to their handlers when it fails, and where it goes on then. Often both.
 */
struct jit_point {
	uint16_t at;
	uint16_t back;                  /* 0: the last of them ends its block */
	uint8_t n;                      /* the translation's instruction, counted over its parts */
	uint8_t flags;                  /* POINT_* */
	uint8_t count : 4;
	int8_t rsp : 4;                 /* stack slots that the guest's rsp is ahead of the host's copy of it */
	uint8_t need;                   /* JV_* that the code at `back` relies on */
};
_Static_assert(sizeof(struct jit_point) == 8, "jit_point: there are as many as memory operands");
enum {
	POINT_TRAP = 1,
	POINT_HOST_FLAGS = 2,           /* the guest's flags are the host's, rather than in aflags */
	POINT_32 = 4,                   /* stack slots are of 4 bytes */
	POINT_RDI = 8, POINT_RSI = 16,  /* the host's string instruction: what belongs into rdi is in ST, and into rsi in SA */
};
#define POINTS_MAX (REGION_INSNS * 4)   /* of one translation */
/* Translations in the order of their code. */
struct jit_span { uint32_t hot, code; };
_Static_assert(sizeof(struct jit_span) == sizeof(struct jit_point), "points lie behind spans");
#define CHECK_SIZES 7           /* 1 to 64, by powers of two */

enum { JV_SSE = 1, JV_VEX = 2, JV_EVEX = 4, JV_FP_SHIFT = 3 /* the same with MXCSR */, JV_VECTORS = 0x3f, JV_X87 = 64 };

struct jit {
	struct cpu *c;
	uint8_t *rw, *rx;
	size_t size, hot_size;
	size_t hot, cold;               /* used so far; cold counts from hot_size */
	size_t written;                 /* bytes since `rw` was last unmapped */
	size_t huge[2];                 /* in huge pages up to here: hot, cold; offsets in the area */
	struct jit_low *low;
	uint32_t mxcsr_mask;            /* MXCSR bits the host has */
	size_t low_size, arena_size, arena;
	uint32_t gen;
	uint32_t enter, leave, abandon, call_out;       /* thunks */
	/* Of reads and of writes: a check, one that has failed, and what looks for an entry then. */
	uint32_t check[TLB_MODES][2][CHECK_SIZES], miss[TLB_MODES][2][CHECK_SIZES], fill[TLB_MODES][2], fail, lookup, look;
	uint32_t span[TLB_MODES][2];    /* a check of as many bytes as SA says */
	struct jit_point *points;       /* touched as they are used */
	uint32_t npoints, points_max;
	struct jit_span *spans;
	uint32_t nspans, spans_max;
	uint32_t heat_time;             /* budgets that ended in translated code */
	unsigned in_line;               /* of two new translations, how many have their checks in line from the start; 0 but for tests */
	struct jit_page *pages[1 << JIT_PAGE_BITS];
	low_ptr at[1 << JIT_AT_BITS];           /* jit_page entered lately, by linear address */
	struct jit_code *codes;         /* all that may be entered */
	uint64_t moves;                 /* of pages, and changes between their homes, ever */
	bool alone;                     /* the instruction at alone_rip is to be interpreted: translated, it met a fault */
	uint64_t alone_rip;
	struct jit_map_thunks maps[1 << 12];    /* by map.c's key, valid for one gen */
	struct jit_code *rows;          /* the check of a row in it has failed too often just now: it is to be made anew */
	struct jit_code *stale;         /* was found so at its entry just now: if its block is another now, links to it are to be cut */
	bool off;                       /* tests: interpret, but keep translations right */
	struct lockstep *lock;          /* lockstep.h, or NULL */
	struct insn called[SITE_MAX + 1];       /* by handler just now; behind them what stops the interpreter */
	unsigned threshold;             /* times a block is interpreted first */
	struct tr *tr;                  /* the translator's working memory */
	int perf_fd;                    /* perf map, or -1 */
	size_t bytes;                   /* all that it may take */
};

/* -- byte emission ------------------------------------------------------------------------------ */
struct em { uint8_t *p, *end; bool full; intptr_t to_rx; };         /* to_rx: from where it is written to where it runs */
static inline intptr_t jit_to_rx(const struct jit *j) { return (intptr_t)(j->rx - j->rw); }

static inline void e8(struct em *e, unsigned v)
{
	if (e->p < e->end)
		*e->p++ = (uint8_t)v;
	else
		e->full = true;
}
static inline void e_bytes(struct em *e, const void *v, size_t n)
{
	if ((size_t)(e->end - e->p) >= n) {
		memcpy(e->p, v, n);
		e->p += n;
	} else {
		e->full = true;
	}
}
static inline void e32(struct em *e, uint32_t v) { e_bytes(e, &v, 4); }
static inline void e64(struct em *e, uint64_t v) { e_bytes(e, &v, 8); }
#define EM(e, ...) do { static const uint8_t b_[] = { __VA_ARGS__ }; e_bytes(e, b_, sizeof b_); } while (0)

/* code.c */
void em_abs(struct em *e, unsigned reg, const void *p);                 /* modrm, sib, disp32 of [p] */
void em_op_abs(struct em *e, bool w, unsigned op, unsigned reg, const void *p);
/*
 * The same relative to the instruction pointer, for instructions without an immediate. A byte shorter; and what was stored with another displacement
 * than it is loaded with reaches the load at once on some processors (Zen 4), where two equal absolute addresses take seven cycles.
 */
void em_op_near(struct em *e, bool w, unsigned op, unsigned reg, const void *p);
void em_load(struct em *e, unsigned reg, const void *p);                /* mov reg, [p]: 64 bits */
void em_store(struct em *e, unsigned reg, const void *p);
void em_load32(struct em *e, unsigned reg, const void *p);
void em_mov(struct em *e, unsigned dst, unsigned src);                  /* 64 bits */
void em_imm(struct em *e, unsigned reg, uint64_t v);
/* op reg, [base + index << scale + disp] with w; index -1: none. */
/* lookup, as far as the table goes: the jump that is taken where it does not have the target in rax; else eax is where that is entered. Uses rcx. */
uint8_t *em_lookup(struct em *e, const struct jit *j);
void em_mem(struct em *e, bool w, unsigned op, unsigned reg, int base, int index, unsigned scale, int32_t disp);
uint8_t *em_jmp(struct em *e);                                          /* returns the rel32's place */
uint8_t *em_call(struct em *e);
uint8_t *em_jcc(struct em *e, unsigned cc);
void em_here(struct em *e, uint8_t *rel32);                             /* that jump leads here */
void em_to(uint8_t *rel32, const uint8_t *target);
void em_align(struct em *e);
void em_flags(struct em *e, struct cpu *c);                             /* the host's from cpu->aflags; uses SA */
void em_charge(struct em *e, struct cpu *c, uint32_t n);                /* instructions, of the budget; the host's flags say what is left */
/* ST, scratch SC: from linear address to host address of an access, if `t`, a TLB's table, has it. Returns the jump that is taken if not. `apart`: the
 * host address is ST + SC then, a cycle earlier. */
uint8_t *em_check(struct em *e, const struct tlb_entry *t, unsigned size, bool apart);
void jit_thunks(struct jit *j);
void jit_map_thunks(struct jit *j, struct jit_map_thunks *m, const int8_t *map);

/* map.c */
struct tr;
void map_choose(struct tr *t);
void map_in(struct em *e, struct tr *t);
void map_out(struct em *e, struct tr *t);
unsigned map_out_bytes(unsigned key);           /* what it emits */
void map_of(int8_t map[16], unsigned key);      /* async-signal-safe */

/* area.c */
int jit_code_map(struct jit *j, size_t bytes);
void jit_code_grown(struct jit *j);     /* more is in use than before */
void jit_code_trim(struct jit *j);      /* give back the memory of what is not used now */
void jit_records_huge(void *p, size_t bytes);   /* memory that fills slowly */
void jit_code_unmap(struct jit *j);
void *jit_arena(struct jit *j, size_t size);                            /* low memory, 16-byte aligned; NULL: full */

/* run.c */
void code_valid(struct jit *j, struct jit_code *k, uint64_t stamp);      /* its first block is valid now, under that stamp (0: none) */
uint64_t jit_call_insn(struct cpu *c, const struct jit_site *s);
void jit_cut_incoming(struct jit *j, struct jit_code *k);        /* who leads to it has to ask anew */
void jit_cut_outgoing(struct jit *j, struct jit_code *k);        /* its own jumps */
void jit_cut_far(struct jit *j, struct jit_code *k);             /* links between it and other pages */

/* resume.c */
struct fault;
bool jit_fault(struct cpu *c, struct fault *f);
/*
 * The next instruction emitted may trap on the host: it touches guest memory, or needs an extension. Guest state is that in
 * front of instruction n.
 */
void gen_point(struct tr *t, unsigned n);
unsigned gen_point_check(struct tr *t);        /* code goes on here behind a check: its index in tr.points */
void points_keep(struct tr *t);         /* the translation is complete */
/* The translation that holds that place in the code area, NULL; and the point there that has a `count`, or else flag POINT_TRAP. */
struct jit_code *point_code(const struct jit *j, uint32_t at);
const struct jit_point *point_find(const struct jit *j, const struct jit_code *k, uint32_t at, bool check);
uint64_t jit_miss(struct jit *j, uint64_t from);
int points_map(struct jit *j, size_t bytes);
void points_unmap(struct jit *j);

/* page.c. The new translation `k` belongs to a page, which is at k->rip now. jit_page_add(): it is complete. */
void jit_page_join(struct jit *j, struct jit_code *k);
void jit_page_add(struct jit *j, struct jit_code *k);
/* Lookups do not find it any more. */
void jit_page_hide(struct jit *j, const struct jit_code *k);
/* Jumps between it and other pages, and lookups that lead to it, have to ask anew. */
void code_moves(struct jit *j, struct jit_code *k);
/* Nobody can come to it any more: replaced, and its page has another version since, as its entry will find. */
bool code_gone(const struct jit_code *k);
/* `k`, of a page that moves, is what was translated of `b` last: the translation of it for `rip`, with its page there, or `k` itself. */
struct jit_code *jit_page_home(struct jit *j, struct block *b, struct jit_code *k, uint64_t rip);
/* The page is where `rip` is from now on. Never while its code runs. */
void jit_page_move(struct jit *j, struct jit_page *p, uint64_t rip);

/*
 * find.c: where the translation of what is at `rip` now is entered, for a lookup that the table of indirect targets could not answer, and which it can
 * from now on. 0: the loop may know. Leaves the host's vector registers alone.
 */
uint64_t jit_find(struct jit *j, uint64_t rip);
struct jit_slot *jit_slot_of(struct jit_page *p, uint64_t rip);         /* its slot, or a free one; NULL: no table */
/* Pages whose code was entered lately. */
static inline low_ptr *jit_page_at(struct jit *j, uint64_t rip) { return &j->at[rip >> 12 & ((1u << JIT_AT_BITS) - 1)]; }
static inline uint32_t jit_stamp_mode(uint64_t stamp) { return (uint32_t)stamp & ~(1u << 31); }
static inline void jit_ind_put(struct jit *j, uint64_t rip, uint32_t entry)
{
	j->low->ind[jit_ind_index(rip)] = (struct jit_ind){ rip, entry };
}

/* live.c: vector and x87 state. */
void live_emit_save(struct em *e, struct jit *j);
void live_emit_load(struct em *e, struct jit *j);
void live_settle(struct cpu *c);
unsigned live_begin(struct cpu *c, unsigned want);
void jit_live(struct cpu *c, unsigned want);

/* trans.c */
struct jit_code *jit_translate(struct jit *j, struct block *b, uint64_t rip, uint32_t mode, bool in_line);

/* Where it is entered with a look at whether it is good now: an address of executable memory, which is low. */
static inline uint32_t jit_entry(const struct jit *j, const struct jit_code *k) { return (uint32_t)(uintptr_t)(j->rx + k->entry); }

/* heat.c: translations that run much get their checks in line. heat_budget(): the budget ended there. */
void heat_begin(const struct jit *j, struct jit_code *k);
void heat_budget(struct jit *j, struct jit_code *k);
/* The check that a row of accesses shares has failed in `k`. True: too often, leave (struct jit, `rows`); heat_rows() then has it made anew. */
bool heat_row_missed(struct jit *j, struct jit_code *k);
void heat_rows(struct jit *j);
/* Will the next one have it made anew, or was that decided already? Until then heat_budget() only counts. */
bool heat_would_want(const struct jit *j, const struct jit_code *k);

/* look.c. In `k` the budget was used up: 0: go on, it is refilled; else the loop has to look. Leaves the host's vector registers alone. */
uint64_t jit_look(struct jit *j, struct jit_code *k);

/* -- a translation under way ------------------------------------------------------------------------ */
struct tinsn {
	const struct insn *in;
	struct block *b;
	uint64_t rip;
	ZydisDecodedInstruction z;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	uint16_t tested, written, killed, live;         /* flags; live: behind the instruction */
	bool by_handler;
	uint8_t end;                    /* enum tend */
};

#define VEC_MAX 32
/* A TLB check: in line it fails to `from` and goes on at `back` once the entry is there. */
#define FILLS_MAX 8
struct fill { uint8_t *from, *back; uint16_t point; uint8_t order; bool write, apart; };

struct cold {
	uint8_t *from[8];
	unsigned nfrom, nfills;
	uint8_t *back;
	uint8_t n, count, need;         /* the instructions that go to their handlers; what the code behind relies on */
	bool final;
	struct fill fill[FILLS_MAX];
};

enum tend { END_NONE, END_OTHER, END_JMP, END_JCC };   /* what the last instruction of a part does */

#define FIXUPS_MAX 128
#define SEEN_MAX 32
#define SEEN_INSNS 4            /* 60 bytes: a mask has 64 bits */
struct ahead { uint64_t rip, mask; bool dead; uint8_t len; uint8_t bytes[SEEN_INSNS * 15]; };
struct part {
	struct block *b;
	uint64_t rip;
	unsigned first, n;              /* instructions in tr.t */
	bool label;                     /* reached by a jump, too */
	uint16_t live;                  /* flags at its start */
	uint8_t *at;                    /* where it begins, once it is emitted */
};

/* jit_low.hold has the host's address of `low` behind a guest base, and all is checked up to `high`. */
struct hold { int64_t low, high; uint8_t base, index, scale; bool write, used; };

struct tr {
	struct jit *j;
	struct cpu *c;
	struct block *b;
	struct jit_code *k;
	struct tlb *tlb;
	unsigned tlb_mode;
	struct em h, cold;
	bool in_host, in_mem;           /* where the guest's flags are */
	uint8_t live;                   /* JV_*: known to be the host's */
	struct decoded d;
	ZydisDecoder decoder;           /* for all of the region */
	struct ahead seen[SEEN_MAX];     /* flags_dead_at() said so, and by which bytes */
	unsigned nseen;
	bool failed;
	uint8_t bits;                   /* 64, or 32: the natural width of operands, addresses and the stack */
	struct part part[REGION_PARTS];
	int8_t map[16];                 /* host register of each guest register, -1: in memory */
	const struct jit_map_thunks *thunks;
	bool mapped;                    /* that is where registers are now */
	uint8_t point_flags;            /* POINT_RDI and POINT_RSI, for the points to come */
	uint8_t align;                  /* bits of operands' linear addresses that are to be 0 (gen_sys.c) */
	bool index;                     /* SA is added to operands' addresses (gen_sys.c) */
	bool row;                       /* in a row (gen_group.c): ST is the host address of displacement row_low */
	int64_t row_low;
	int8_t mem_disp;                /* of the operand from ST */
	bool apart;                     /* the next check may leave its address in two parts: ST and SC; it does if that still says so */
	struct hold hold[HOLDS];
	unsigned next_hold;             /* the one to give up */
	int8_t rsp_off;                 /* in a group of pushes or pops: of the guest's rsp from where the host has it */
	bool swapped;                   /* h is the cold part */
	unsigned nparts, now;           /* now: the part being emitted */
	struct { uint8_t *rel32; unsigned part; } fix[FIXUPS_MAX];
	unsigned nfix;
	unsigned n, ncold, npoints;
	struct jit_point points[POINTS_MAX];
	struct cold colds[REGION_INSNS * 2];
	struct tinsn t[REGION_INSNS];
};

/* The cold path of `count` instructions from n on: their handlers. Jumps added with cold_from(); `back` is set by cold_done(). */
struct cold *cold_new(struct tr *t, unsigned n, unsigned count);
static inline void cold_from(struct cold *k, uint8_t *rel32) { k->from[k->nfrom++] = rel32; }

/* gen.c: pieces. */
void gen_flags_save(struct tr *t);              /* to cpu->aflags if only the host has them */
void gen_flags_load(struct tr *t);              /* to the host if only cpu->aflags has them; uses SA */
void gen_clobber(struct tr *t, unsigned n);     /* EFLAGS are about to be destroyed before instruction n ran */
void gen_flags_after(struct tr *t, unsigned n); /* instruction n has run natively */
/* ST = host address of the access at linear ST, or to the cold path; uses SC. */
void gen_check(struct tr *t, struct cold *k, unsigned size, bool write);
static inline unsigned gen_order(unsigned size) { return size > 1 ? 32 - (unsigned)__builtin_clz(size - 1) : 0; }  /* of the checks that are called */
void gen_call(struct tr *t, uint32_t thunk);
/* Code goes on here behind a thunk that the cold part calls, directly before a jump to here. */
void gen_point_behind(struct tr *t, struct cold *k);
/* A thunk is called that returns, or has the handlers called instead. */
void gen_call_check(struct tr *t, struct cold *k, uint32_t thunk);
/* n instructions of the budget; where it is used up and the loop has to look, code goes to `k`. Keeps SA; destroys the host's flags, SC and ST. */
void gen_charge(struct tr *t, struct cold *k, uint32_t n);
uint8_t *gen_look(struct em *e, struct tr *t);
/* ST = host address of the memory operand, or to the cold path; uses SC and flags. False: cannot. */
bool gen_operand(struct tr *t, unsigned n, struct cold *k, unsigned size, bool write);
bool gen_operand_at(struct tr *t, unsigned n, struct cold *k, int64_t disp, unsigned size, bool write);   /* with another displacement */
/* The same for the stack, at offset ST, and at guest rsp + d. */
void gen_stack_at(struct tr *t, struct cold *k, unsigned size, bool write);
void gen_stack(struct tr *t, struct cold *k, int32_t d, unsigned size, bool write);
void gen_handler(struct tr *t, unsigned n);
unsigned gen_get(struct tr *t, unsigned guest, unsigned scratch);       /* host register holding it now */
void gen_rip(struct em *e, struct tr *t, bool w, unsigned reg, uint64_t rip);   /* reg = that address in the guest's code; w: all of it */
void gen_put(struct tr *t, unsigned guest, unsigned host);
void gen_leave(struct em *e, struct tr *t, uint64_t rip, const struct jit_link *l);
uint8_t tr_part_of(const struct tr *t, const struct block *b);
/* The region's part at `rip`, -1. */
int tr_part(const struct tr *t, uint64_t rip);
/* From behind instruction n on at rip; flags are saved if they matter there. `next`: nothing is emitted if it comes next anyway. */
void gen_edge(struct tr *t, uint64_t rip, unsigned n, bool next);
/* A direct call's, as gen_edge(), by a call of the host's; and from behind a call to the instruction behind n: registers are where they usually are. */
void gen_call_edge(struct tr *t, uint64_t rip, unsigned n);
void gen_return_edge(struct tr *t, unsigned n);
/* On a condition behind instruction n forward to code of the page that is not of the region; false: there is more to do than that jump. */
bool gen_jcc_link(struct tr *t, unsigned n, unsigned cc, uint64_t rip);
void gen_jcc_part(struct tr *t, unsigned p, unsigned cc);       /* to a part, on a condition */
/* Code goes to the cold part until this is called again; it ends with a jump. */
static inline void tr_swap(struct tr *t) { struct em e = t->h; t->h = t->cold; t->cold = e; t->swapped = !t->swapped; }
static inline uint64_t tr_end(const struct tr *t, unsigned n) { return t->t[n].rip + t->t[n].in->len; }
static inline bool tr_64(const struct tr *t) { return t->bits == 64; }
/* A general-purpose register of the natural width. */
static inline bool tr_full_reg(const struct tr *t, ZydisRegister r)
{
	return ZydisRegisterGetClass(r) == (tr_64(t) ? ZYDIS_REGCLASS_GPR64 : ZYDIS_REGCLASS_GPR32);
}
/* The segment needs neither base nor limit. */
bool tr_seg_flat(const struct tr *t, unsigned seg);
uint64_t tr_target(const struct tr *t, unsigned n);
/* For the budget: instructions of the part up to n; which of the others ran is not known. */
static inline uint32_t tr_count(const struct tr *t, unsigned n) { return n + 1 - t->part[t->now].first; }
/* Instruction n rewritten: registers of its modrm, opcode and VEX.vvvv fields replaced, memory operand [ST] or [ST + SC]. -1: as it is. */
struct regs { int reg, rm, op, v; bool mem, apart; };
bool gen_rewrite(struct tr *t, const struct tinsn *i, const uint8_t *bytes, struct regs r);

/* True when done natively. */
bool gen_int(struct tr *t, unsigned n);
bool gen_branch(struct tr *t, unsigned n);
bool gen_counts(const struct tr *t, const struct tinsn *i);     /* LOOP and JRCXZ */
/*
 * The target of an indirect jump is in SA: find its code, else let the handler do the whole instruction. Then SA is the code's address, and nothing has
 * happened yet. Such a jump may lead back, so it counts where entries do not.
 */
void gen_lookup(struct tr *t, unsigned n, struct cold *k);
unsigned gen_stack_group(struct tr *t, unsigned n, unsigned end);       /* instructions done together, 0: none */
bool int_row(const struct tinsn *i);            /* may stand in a row */
bool int_nothing(const struct tinsn *i);        /* NOP and what acts like one */
bool gen_vec(struct tr *t, unsigned n);
bool gen_gather(struct tr *t, unsigned n);
bool gen_x87(struct tr *t, unsigned n);
bool gen_odd(struct tr *t, unsigned n);                 /* bit strings, CMPXCHG16B, CLD: gen_sys.c */
bool gen_single(struct tr *t, unsigned n);              /* strings without a repeat, XLAT, CMPXCHG8B, EMMS */
bool gen_string(struct tr *t, unsigned n);              /* REP STOS and MOVS ... */
bool gen_string_may(const struct tr *t, const struct tinsn *i); /* ... but for forms that no compiler makes: code goes on behind it */
bool gen_sys(struct tr *t, unsigned n);                 /* with IF_ONCE ... */
bool gen_sys_may(const struct tr *t, const struct tinsn *i);    /* ... those that are worth a try */
/* Instruction n needs these JV_* bits: looks unless they are known. Destroys flags; on failure to `k`. */
void gen_live(struct tr *t, struct cold *k, unsigned bit);

/* gen_patch.c */
bool gen_patched(struct tr *t, unsigned n);             /* gen_int() for an instruction with IF_NEW_IMM */
unsigned patch_count(const struct jit_code *k);         /* of its blocks: another number than before, and it lacks some */
void patch_values(const struct jit_code *k);            /* from the blocks to what the code reads */
void looks_keep(struct tr *t);
bool looks_same(struct cpu *c, const struct jit_code *k);

/* gen_group.c */
struct row { int64_t low, high; bool write; };
unsigned row_find(struct tr *t, unsigned n, unsigned end, struct row *r);
struct cold *row_begin(struct tr *t, unsigned n, unsigned count, const struct row *r);
void row_end(struct tr *t, unsigned last, struct cold *k);

/* gen_hold.c: gen_operand_at() and gen_stack() where one check is for several accesses; false: it is not. */
bool hold_operand(struct tr *t, unsigned n, struct cold *k, int64_t disp, unsigned size, bool write);
bool hold_stack(struct tr *t, struct cold *k, int32_t d, unsigned size, bool write);
void hold_behind(struct tr *t, unsigned n);     /* instruction n is done */
void hold_forget(struct tr *t);

void tinsn_flags(struct tinsn *i);              /* tested, written, killed, from the decoded instruction */
bool flags_dead_at(struct tr *t, uint64_t rip);
static inline const uint8_t *tr_bytes(const struct tr *t, unsigned n) { return block_copy(t->t[n].b) + t->t[n].in->off; }

#endif
