/*
 * How integer handlers are written. Private to interp/.
 *
 * A handler ends with NEXT (call the next handler: a jump when the compiler makes sibling calls), with a
 * plain return (the loop looks around, then goes on), or, when it ends the block, with one of the chain_*()
 * functions. The rule: a handler that took a slow path of the MMU must return, not NEXT, since the slow path
 * may have logged MMIO or asked to leave the block. The LD and RMW macros below see to it.
 *
 * Flags: the host does the arithmetic and `lahf; seto %al` keeps what came out, undefined flags included.
 */
#ifndef SOFTKVM_INTERP_OPS_H
#define SOFTKVM_INTERP_OPS_H

#include <stdatomic.h>

#include "softkvm/interp/block.h"

#if defined(__clang__) && defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define TAIL __attribute__((musttail))
#define THREADED 1
#elif defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define TAIL
#define THREADED 1      /* without the compiler's help the depth is bounded by the budget */
#else
#define THREADED 0
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#undef THREADED
#define THREADED 0
#endif
#endif

#if THREADED
#define NEXT do { i++; c->cur = i; TAIL return i->fn(c, i); } while (0)
#else
#define NEXT return
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

/*
 * A handler. A call on its cold path would make the compiler save registers on the hot one. So the body is compiled
 * twice: as the handler, which jumps to its twin (MISS) when an access is not in the TLB, and as the twin, which
 * takes the slow path at once (slow_). Nothing has happened by then, so it just starts over. Not for clang, whose
 * `musttail` wants the body to have a handler's own parameters.
 */
#if THREADED && !defined(__clang__)
#define OP(name)                                                                \
	static ALWAYS_INLINE void name##_body(struct cpu *c, const struct insn *i, const bool slow_, insn_fn *twin_); \
	static __attribute__((noinline, cold)) void name##_twin(struct cpu *c, const struct insn *i) { name##_body(c, i, true, NULL); } \
	static void name(struct cpu *c, const struct insn *i) { name##_body(c, i, false, name##_twin); } \
	static ALWAYS_INLINE void name##_body(struct cpu *c, const struct insn *i, const bool slow_, insn_fn *twin_)
#define MISS do { if (!slow_) return twin_(c, i); } while (0)
#else
#define OP(name) static void name(struct cpu *c, const struct insn *i)
#define slow_ false
#define MISS do { } while (0)
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* Registers by size; writing 32 bits clears the upper half. */
#define GET8(o) REG8(c, o)
#define GET16(o) REG16(c, o)
#define GET32(o) REG32(c, o)
#define GET64(o) REG64(c, o)
#define SET8(o, v) (REG8(c, o) = (u8)(v))
#define SET16(o, v) (REG16(c, o) = (u16)(v))
#define SET32(o, v) REG_SET32(c, o, v)
#define SET64(o, v) (REG64(c, o) = (u64)(v))
#define SFX8 "b"
#define SFX16 "w"
#define SFX32 "l"
#define SFX64 "q"
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

/* -- flags ------------------------------------------------------------------------------------- */
#define FLAGS_OUT "\n\tlahf\n\tseto %%al"
/* aflags (in eax) to the host's flags: OF by an addition that overflows when AL is 1, the rest by sahf. */
#define FLAGS_IN "addb $0x7f, %%al\n\tsahf\n\t"
#define AF_CF 0x0100
#define AF_PF 0x0400
#define AF_AF 0x1000
#define AF_ZF 0x4000
#define AF_SF 0x8000
#define AF_OF 0x0001

/* Condition `cc` (as encoded in Jcc) of aflags; constant `cc` folds to a bit test. */
static ALWAYS_INLINE bool cond(const struct cpu *c, unsigned cc)
{
	unsigned f = c->aflags;
	bool r;

	switch (cc >> 1) {
	case 0: r = f & AF_OF; break;
	case 1: r = f & AF_CF; break;
	case 2: r = f & AF_ZF; break;
	case 3: r = f & (AF_CF | AF_ZF); break;
	case 4: r = f & AF_SF; break;
	case 5: r = f & AF_PF; break;
	case 6: r = (f >> 15 ^ f) & 1; break;
	default: r = (f & AF_ZF) || ((f >> 15 ^ f) & 1); break;
	}
	return r ^ (cc & 1);
}

/* -- memory ------------------------------------------------------------------------------------ */
/* Slow loads by value, so that the fast path of a handler needs no stack frame. */
u64 ops_ld_slow(struct cpu *c, u64 lin, unsigned size);
void ops_st_slow(struct cpu *c, u64 lin, u64 v, unsigned size);

/* `v` = the memory operand, then the statements, then the end of the handler. */
#define WITH_LD_AT(bits, v, lin_, ...) do {                                     \
		u64 l_ = (lin_);                                                \
		void *p_ = slow_ ? NULL : tlb_hit_r(c, l_, bits / 8);           \
		if (likely(p_)) { u##bits v = ram_ld##bits(p_); __VA_ARGS__; NEXT; } \
		MISS;                                                           \
		u##bits v = (u##bits)ops_ld_slow(c, l_, bits / 8); __VA_ARGS__; return; \
	} while (0)
#define WITH_LD(bits, v, ...) WITH_LD_AT(bits, v, insn_lin(c, i, bits / 8, ACC_READ), __VA_ARGS__)

/* Store and end the handler. */
#define END_ST_AT(bits, lin_, val_) do {                                        \
		u64 l_ = (lin_);                                                \
		void *p_ = slow_ ? NULL : tlb_hit_w(c, l_, bits / 8);           \
		if (likely(p_)) { ram_st##bits(p_, (u##bits)(val_)); NEXT; }     \
		MISS;                                                           \
		ops_st_slow(c, l_, (u##bits)(val_), bits / 8); return;          \
	} while (0)
#define END_ST(bits, val_) END_ST_AT(bits, insn_lin(c, i, bits / 8, ACC_WRITE), val_)

/*
 * Read-modify-write without LOCK: `m` names an lvalue of the operand. The slow path checks first that the store
 * cannot fault, then works on a copy; flags set by the statements are safe because nothing faults after them.
 */
#define WITH_RMW(bits, m, ...) WITH_RMW_AT(bits, m, insn_lin(c, i, bits / 8, ACC_RMW), __VA_ARGS__)
#define WITH_RMW_AT(bits, m, lin_, ...) do {                                    \
		u64 l_ = (lin_);                                                \
		void *p_ = slow_ ? NULL : tlb_hit_w(c, l_, bits / 8);           \
		if (likely(p_)) {                                               \
			ram_u##bits *q_ = p_;                                           \
			{ RMW_LV(m, *q_) __VA_ARGS__; }                        \
			NEXT;                                                   \
		}                                                               \
		MISS;                                                           \
		mem_probe(c, l_, bits / 8, ACC_RMW);                            \
		u##bits t_ = (u##bits)ops_ld_slow(c, l_, bits / 8);             \
		{ RMW_LV(m, t_) __VA_ARGS__; }                                  \
		ops_st_slow(c, l_, t_, bits / 8);                               \
		return;                                                         \
	} while (0)
#define RMW_LV(m, lv) __typeof__(lv) *m = &(lv);

/*
 * Locked: `m` is a pointer to the operand for a lock-prefixed host instruction; an operand that is MMIO or
 * crosses a page is done on a copy while nobody else does a locked operation there.
 */
#define WITH_LOCKED(bits, m, ...) WITH_LOCKED_AT(bits, m, insn_lin(c, i, bits / 8, ACC_RMW), __VA_ARGS__)
#define WITH_LOCKED_AT(bits, m, lin_, ...) do {                                 \
		u64 l_ = (lin_);                                                \
		void *p_ = slow_ ? NULL : tlb_hit_w(c, l_, bits / 8);           \
		if (likely(p_)) {                                               \
			u##bits *m = p_; __VA_ARGS__; NEXT;                     \
		}                                                               \
		MISS;                                                           \
		p_ = mem_rmw(c, l_, bits / 8);                                  \
		if (p_) {                                                       \
			u##bits *m = p_; __VA_ARGS__; return;                   \
		}                                                               \
		mem_lock(c);                                                    \
		mem_probe(c, l_, bits / 8, ACC_RMW);                            \
		u##bits t_ = (u##bits)ops_ld_slow(c, l_, bits / 8);             \
		{ u##bits *m = &t_; __VA_ARGS__; }                              \
		ops_st_slow(c, l_, t_, bits / 8);                               \
		mem_unlock(c);                                                  \
		return;                                                         \
	} while (0)

/* -- control flow ------------------------------------------------------------------------------ */
static ALWAYS_INLINE const struct insn *chain_enter(struct cpu *c, struct block *b)
{
	c->gpr[R_BLK] = c->rip;
	c->rip += b->bytes;
	c->blk = b;
	c->block_end = b->insn + b->n;
	c->cur = b->insn;
	return b->insn;
}

static ALWAYS_INLINE bool chain_ok(struct cpu *c, const struct block *b)
{
	if (unlikely(atomic_load_explicit(b->ver, memory_order_acquire) != b->ver_value))
		return false;
	if (unlikely(atomic_load_explicit(&c->requests, memory_order_relaxed)))
		return false;
	if (unlikely(c->budget <= 0))
		return false;
	c->budget -= b->n;
	return true;
}

/* cpu->rip is set: go on at the block that link `n` remembers, or let the loop find it. */
#if THREADED
#define CHAIN(n) do {                                                           \
		struct block_link *k_;                                          \
		if (!c->blk->linked)                                            \
			return;                                                 \
		k_ = block_link(c->blk, n);                                     \
		if (likely(k_->stamp == c->code_stamp && k_->rip == c->rip)) { \
			struct block *b_ = k_->blk;                             \
			if (likely(chain_ok(c, b_))) {                          \
				i = chain_enter(c, b_);                         \
				TAIL return i->fn(c, i);                        \
			}                                                       \
			return;                                                 \
		}                                                               \
		c->blocks->want = k_;                                           \
		return;                                                         \
	} while (0)
/* The same for returns and indirect jumps, by way of the table of recent blocks. */
#define CHAIN_INDIRECT do {                                                     \
		const struct block_fast *e_ = &c->blocks->fast[block_fast_index(c->rip)]; \
		if (likely(e_->stamp == c->code_stamp && e_->rip == c->rip)) { \
			struct block *b_ = e_->blk;                             \
			if (likely(chain_ok(c, b_))) {                          \
				i = chain_enter(c, b_);                         \
				TAIL return i->fn(c, i);                        \
			}                                                       \
		}                                                               \
		return;                                                         \
	} while (0)
#else
#define CHAIN(n) return
#define CHAIN_INDIRECT return
#endif

/* -- decoding ---------------------------------------------------------------------------------- */
/* Index of an operand size of 8, 16, 32, 64 bits. */
static inline unsigned size_index(unsigned bits)
{
	return bits == 8 ? 0 : bits == 16 ? 1 : bits == 32 ? 2 : 3;
}

static inline bool is_reg(const struct decoded *d, unsigned n) { return d->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER; }
static inline bool is_mem(const struct decoded *d, unsigned n) { return d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY; }
static inline bool is_imm(const struct decoded *d, unsigned n) { return d->op[n].type == ZYDIS_OPERAND_TYPE_IMMEDIATE; }
static inline uint8_t reg_off(const struct decoded *d, unsigned n) { return insn_reg_off(d->op[n].reg.value); }

/* The lookups of the ops_*.c files, tried in this order by ops_decode(). */
insn_family ops_alu_decode, ops_lock_decode, ops_mov_decode, ops_branch_decode, ops_stack_decode, ops_shift_decode,
	    ops_mul_decode, ops_bit_decode, ops_bmi_decode, ops_string_decode, ops_misc_decode;

#endif
