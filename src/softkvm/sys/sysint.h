/*
 * What the files of sys/ share: descriptors, code and stack segment checks, pushes onto an inner stack.
 * All of it follows SDM vol. 3 chapters 3, 5, 6 and 7. Private to sys/.
 *
 * EXT. Error codes are made here without the EXT bit; event_deliver() adds it to the faults it catches.
 */
#ifndef SOFTKVM_SYS_SYSINT_H
#define SOFTKVM_SYS_SYSINT_H

#include "softkvm/cpu.h"
#include "softkvm/events.h"
#include "softkvm/insn.h"
#include "softkvm/mmu.h"
#include "softkvm/sys.h"

/* A descriptor as it lies in memory; `hi` is the upper half of a 16-byte one. */
struct desc {
	uint64_t raw, hi, lin;
	uint16_t sel;
};

static inline unsigned desc_type(const struct desc *d) { return d->raw >> 40 & 15; }
static inline bool desc_s(const struct desc *d) { return d->raw >> 44 & 1; }
static inline unsigned desc_dpl(const struct desc *d) { return d->raw >> 45 & 3; }
static inline bool desc_present(const struct desc *d) { return d->raw >> 47 & 1; }
static inline bool desc_l(const struct desc *d) { return d->raw >> 53 & 1; }
static inline bool desc_db(const struct desc *d) { return d->raw >> 54 & 1; }
static inline bool desc_code(const struct desc *d) { return desc_s(d) && (desc_type(d) & 8); }
static inline bool desc_conforming(const struct desc *d) { return desc_type(d) & 4; }
static inline bool desc_data_writable(const struct desc *d) { return desc_s(d) && (desc_type(d) & 10) == 2; }
static inline uint32_t desc_base32(const struct desc *d) { return (uint32_t)((d->raw >> 16 & 0xffffff) | (d->raw >> 56) << 24); }
static inline uint64_t desc_base64(const struct desc *d) { return desc_base32(d) | d->hi << 32; }
uint32_t desc_limit(const struct desc *d);
static inline bool sel_null(uint16_t sel) { return !(sel & 0xfffc); }
static inline uint32_t sel_err(uint16_t sel) { return sel & 0xfffc; }

/* System descriptor types */
enum { SYS_TSS16 = 1, SYS_LDT = 2, SYS_TSS16_BUSY = 3, SYS_CALL16 = 4, SYS_TASK_GATE = 5, SYS_INT16 = 6, SYS_TRAP16 = 7,
       SYS_TSS32 = 9, SYS_TSS32_BUSY = 11, SYS_CALL32 = 12, SYS_INT32 = 14, SYS_TRAP32 = 15 };

/* False: beyond the table. Faults of the memory access are raised. */
bool desc_try(struct cpu *c, uint16_t sel, struct desc *d);
/* Raises `exc`(selector) beyond the table. */
void desc_fetch(struct cpu *c, uint16_t sel, unsigned exc, struct desc *d);
/* Upper half of a 16-byte system descriptor; raises exc(selector). */
void desc_fetch_hi(struct cpu *c, struct desc *d, unsigned exc);
void desc_set_accessed(struct cpu *c, struct desc *d);
/* Set or clear the busy bit of a TSS descriptor. */
void desc_set_busy(struct cpu *c, struct desc *d, bool busy);
void seg_from_desc(struct seg *s, const struct desc *d);
void seg_null(struct seg *s, uint16_t sel);
/* Is [off, off+size) inside the limit of `s`? */
bool seg_range_ok(const struct seg *s, uint64_t off, unsigned size);
/* DS, ES, FS, GS checks (after the null test); raises. */
void seg_check_data(struct cpu *c, uint16_t sel, const struct desc *d, unsigned cpl);
/* SS checks for a stack at `cpl`: exc is #GP or #TS, absent is #SS. */
void seg_check_ss(struct cpu *c, uint16_t sel, const struct desc *d, unsigned cpl, unsigned exc);
/* Null DS, ES, FS, GS that the outer ring `cpl` may not have. */
void seg_null_inner(struct cpu *c, unsigned cpl);
/* A flat code or stack segment as SYSCALL and SYSENTER make it. */
void seg_flat(struct seg *s, uint16_t sel, bool code, unsigned dpl, bool l);

/* Offset as an IP in a code segment: limit or canonical check, raises #GP(0). Returns it truncated. */
uint64_t code_check_ip(struct cpu *c, const struct desc *cs, uint64_t ip);
static inline bool desc_is_64(const struct cpu *c, const struct desc *cs) { return cpu_long(c) && desc_l(cs); }

/* -- the current stack ------------------------------------------------------------------------ */
uint64_t stack_lin(struct cpu *c, uint64_t off, unsigned size, enum access acc);
static inline uint64_t stack_mask(const struct cpu *c)
{
	return c->stack_bits == 64 ? ~0ull : c->stack_bits == 32 ? 0xffffffffu : 0xffffu;
}
void stack_set_sp(struct cpu *c, uint64_t sp);          /* by the stack's width */
/* The far pointer in memory that an instruction names, its offset of i->aux bytes: two accesses, each of its own alignment. */
uint64_t far_pointer(struct cpu *c, const struct insn *i, uint16_t *sel);
uint64_t stack_peek(struct cpu *c, uint64_t delta, unsigned size);
/* Writes n elements of `size` below SP, v[0] highest, then moves SP. */
void stack_push_n(struct cpu *c, const uint64_t *v, unsigned n, unsigned size);

/* -- a stack that is being switched to -------------------------------------------------------- */
struct nstack {
	struct seg ss;
	struct desc d;
	uint64_t sp;
	unsigned cpl;
	bool is64;
};
/* From the TSS, for ring `cpl`; legacy and long mode. Raises #TS, #SS, #NP. */
void nstack_from_tss(struct cpu *c, struct nstack *n, unsigned cpl);
void nstack_push(struct cpu *c, struct nstack *n, uint64_t v, unsigned size);
/* SS, (R)SP become these. The caller updates the mode. */
void nstack_commit(struct cpu *c, struct nstack *n);

/* Make `d` the CS with this privilege and go to ip; callers have checked everything. */
void cs_commit(struct cpu *c, struct desc *d, unsigned cpl, uint64_t ip);

/* -- far transfers (far.c, iret.c, task.c) ---------------------------------------------------- */
void far_branch(struct cpu *c, uint16_t sel, uint64_t off, unsigned opsize, bool call);
void far_ret(struct cpu *c, unsigned opsize, unsigned pop);
void far_iret(struct cpu *c, unsigned opsize);
/* RFLAGS as loaded by POPF or IRET at this privilege. */
uint64_t flags_merge(const struct cpu *c, uint64_t v, unsigned opsize, unsigned cpl, bool iret);

/* Fault unless CPL is 0. */
static inline void need_cpl0(struct cpu *c) { if (c->cpl) cpu_gp(c, 0); }
static inline unsigned cpu_iopl(const struct cpu *c) { return c->eflags >> 12 & 3; }
/* SGDT, SIDT, SLDT, STR, SMSW outside ring 0 under UMIP. */
static inline void need_no_umip(struct cpu *c) { if (c->cpl && (c->cr4 & CR4_UMIP)) cpu_gp(c, 0); }
/* The software interrupt redirection of VME applies to this vector: deliver through the IVT. */
bool vme_redirected(struct cpu *c, unsigned vector);
/* One instruction finished outside the loop (completion of an exit): shadows, RF, single step. */
void event_completed_outside(struct cpu *c);
/* I/O breakpoints (CR4.DE). */
void debug_io_access(struct cpu *c, uint16_t port, unsigned size);

/* Decoders of the files; each as insn_family. */
insn_family sys_decode_far, sys_decode_seg, sys_decode_flags, sys_decode_io, sys_decode_cr, sys_decode_desc, sys_decode_msr,
	    sys_decode_misc;

/* deliver.c: DR6 as a #DB leaves it. */
#define DR6_FIXED 0xffff0ff0u
#define DR6_TRAPS 0xfu          /* what a #DB sets anew; BD, BS and BT only ever gain, software clears them */
void event_db_payload(struct cpu *c, uint64_t payload);

#endif
