/*
 * The interpreter's loop: find a block, run it, look around.
 *
 * A handler that returns means "look": at posted MMIO, at the end of the block, at the next instruction.
 * Our own handlers mostly call the next one directly (ops.h) and return only when there is something to look at.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <x86intrin.h>

#include "softkvm/events.h"
#include "softkvm/fault.h"
#include "softkvm/interp/block.h"
#include "softkvm/irqchip.h"
#include "softkvm/jit/jit.h"
#include "softkvm/profile.h"
#include "softkvm/sys.h"
#include "softkvm/vcpu.h"
#include "softkvm/vm.h"

#define SLOW_INSN 8     /* a handler that returns to the loop costs that many of those that go on by themselves */
#define GO_ON ((enum run_result)-1)

/* -- RIP --------------------------------------------------------------------------------------- */
static inline uint64_t rip_wrap(const struct cpu *c, uint64_t rip)
{
	return c->code_bits == 64 ? rip : (uint32_t)rip;
}

uint64_t cpu_cur_rip(const struct cpu *c)
{
	return rip_wrap(c, c->gpr[R_BLK] + c->cur->off);
}

uint64_t cpu_next_rip(const struct cpu *c)
{
	return rip_wrap(c, c->gpr[R_BLK] + c->cur->off + c->cur->len);
}

/* The current instruction is complete: make cpu->rip the next one's. */
static void settle_next(struct cpu *c)
{
	if (c->cur && !(c->cur->flags & IF_END))
		c->rip = cpu_next_rip(c);
}

/* -- leaving a handler ------------------------------------------------------------------------- */
void cpu_leave_after(struct cpu *c)
{
	if (c->cur)
		c->block_end = c->cur + 1;
	c->code_stamp = CODE_STAMP_NONE;      /* no links either */
}

void cpu_unwind(struct cpu *c, enum unwind why)
{
	if (c->split_held)
		mem_unlock(c);
	if (!c->in_unwind_scope)
		abort();        /* a bug of ours: nothing runs guest code outside engine_run() */
	longjmp(c->unwind, why);
}

static _Noreturn void raise_event(struct cpu *c, const struct event *e)
{
	c->ev = *e;
	cpu_unwind(c, UNWIND_EVENT);
}

void cpu_raise(struct cpu *c, unsigned vector)
{
	raise_event(c, &(struct event){ .valid = true, .vector = (uint8_t)vector, .type = EV_EXC });
}

void cpu_raise_err(struct cpu *c, unsigned vector, uint32_t error)
{
	raise_event(c, &(struct event){ .valid = true, .vector = (uint8_t)vector, .type = EV_EXC,
					/* real mode pushes none */
					.has_error = !c->real, .error = error });
}

void cpu_raise_pf(struct cpu *c, uint64_t addr, uint32_t error)
{
	raise_event(c, &(struct event){ .valid = true, .vector = EXC_PF, .type = EV_EXC, .has_error = true,
					.error = error, .payload = addr, .has_payload = true });
}

_Noreturn void cpu_engine_failed(struct cpu *c)
{
	struct kvm_run *r = c->run;
	const struct block *b = c->blk;
	const struct insn *i = c->cur;

	memset(&r->emulation_failure, 0, sizeof r->emulation_failure);
	r->exit_reason = KVM_EXIT_INTERNAL_ERROR;
	r->emulation_failure.suberror = KVM_INTERNAL_ERROR_EMULATION;
	r->emulation_failure.ndata = 1;
	if (b && i && i->len && i->off + i->len <= b->bytes) {
		r->emulation_failure.ndata = 4;
		r->emulation_failure.flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
		r->emulation_failure.insn_size = i->len;
		memcpy(r->emulation_failure.insn_bytes, block_copy(b) + i->off, MIN(i->len, 15));
	}
	mmio_reset(c);          /* nothing of the instruction has happened */
	cpu_unwind(c, UNWIND_EXIT);
}

void cpu_emulation_failed(struct cpu *c)
{
	if (c->vm && !c->vm->policy.emulation_exit) {
		if (c->cpl)
			cpu_ud(c);
		/* As on Linux the guest would find #UD, should user space let it go on. */
		c->ev = (struct event){ .valid = true, .vector = EXC_UD, .type = EV_EXC };
		c->ev_pending = true;   /* KVM_SET_REGS drops it */
	}
	cpu_engine_failed(c);
}

/* -- one instruction at a time (events.h says what the loop owes) --------------------------------- */
static void step_begin(struct cpu *c)
{
	c->blocks->stepping = true;
	c->step.tf = (c->eflags & FL_TF) || (c->dbg.enabled && c->dbg.step);
	c->step.rf = c->eflags & FL_RF;
	c->step.shadow = c->shadow;
}

/* The instruction is complete: ages shadow and RF, records the trap, recomputes one_insn. */
static void step_done(struct cpu *c)
{
	if (!c->blocks->stepping)
		return;
	c->blocks->stepping = false;
	event_insn_done(c);
}

/* Execution breakpoints of `dr`/`dr7` at the linear address: DR6 bits. */
static uint64_t code_bp_hit(const uint64_t *dr, uint64_t dr7, uint64_t lin)
{
	uint64_t hit = 0;

	for (unsigned n = 0; n < 4; n++)
		if ((dr7 >> (2 * n) & 3) && !(dr7 >> (16 + 4 * n) & 15) && dr[n] == lin)
			hit |= 1u << n;
	return hit;
}

/* True when a breakpoint takes the place of the next instruction; *out is what to do then. */
static bool check_code_bp(struct cpu *c, enum run_result *out)
{
	uint64_t lin = c->rip, hit;

	if (c->code_bits != 64)
		lin = (uint32_t)(lin + c->seg[SEG_CS].base);
	if (c->dbg.enabled && c->dbg.hw_bp) {
		hit = code_bp_hit(c->dbg.dr, c->dbg.dr7, lin);
		if (hit) {
			c->run->exit_reason = KVM_EXIT_DEBUG;
			c->run->debug.arch.exception = EXC_DB;
			c->run->debug.arch.pc = lin;
			c->run->debug.arch.dr6 = hit | 0xffff0ff0;
			c->run->debug.arch.dr7 = c->dbg.dr7;
			*out = RUN_EXIT;
			return true;
		}
		return false;
	}
	hit = c->eflags & FL_RF ? 0 : code_bp_hit(c->dr, c->dr[7], lin);
	if (!hit)
		return false;
	c->ev = (struct event){ .valid = true, .vector = EXC_DB, .type = EV_EXC, .payload = hit, .has_payload = true };
	*out = event_deliver(c) ? GO_ON : RUN_EXIT;
	return true;
}

/* -- block boundaries -------------------------------------------------------------------------- */
/* What was asked for while the vCPU was parked (flushes, above all) is served too before guest code goes on. */
static uint32_t serve_requests(struct cpu *c, uint32_t req)
{
	c->look_until = 0;      /* a timer may have been set */
	while (req & REQ_PAUSE) {
		vm_park(c);
		req = (req & ~(uint32_t)REQ_PAUSE) | atomic_exchange(&c->requests, 0);
	}
	if (req & REQ_TLB)
		mmu_flush_all(c);
	if (req & REQ_BLOCKS) {
		block_flush(c);
		vec_flush(c);
		block_new_generation(c);
	}
	if (req & REQ_CLOCK)
		clock_update(c);
	if ((req & REQ_TIMER) && c->lapic)
		lapic_timer_poll(c);
	if (req & REQ_DEBUG)
		block_new_generation(c);
	return req;
}

static bool waits_for_sipi(const struct cpu *c)
{
	uint32_t s = c->vcpu ? atomic_load(&c->vcpu->mp_state) : KVM_MP_STATE_RUNNABLE;

	return s == KVM_MP_STATE_INIT_RECEIVED || s == KVM_MP_STATE_UNINITIALIZED;
}

/* Where a client that does not announce its writes may have replaced code (DESIGN section 1). */
static void client_may_have_written(struct cpu *c)
{
	if (c->vm && !c->vm->client_tells_code)
		watch_all(c->vm);
}

/* Something may want attention before the next instruction. GO_ON: execute it. */
static enum run_result boundary(struct cpu *c)
{
	uint32_t req = atomic_load_explicit(&c->requests, memory_order_acquire);
	bool event = c->trap_db || c->halted || c->ev.valid;

	c->blocks->want = NULL;
	if (c->budget <= 0) {
		block_count_insns(c);
		if (unlikely(c->profile))
			profile_sample(c->profile, c->rip + (c->flat ? 0 : c->seg[SEG_CS].base), c->cpl);
		if (c->lapic)
			lapic_timer_poll(c);
		if (vcpu_poll(c))
			req |= REQ_EXIT;
		c->blocks->most = c->budget;
		block_refill(c, __rdtsc());
	}
	if (req) {
		req = serve_requests(c, req | atomic_exchange(&c->requests, 0));
		event |= (req & (REQ_EVENT | REQ_TIMER | REQ_DEBUG)) || (atomic_load(&c->requests) & REQ_EVENT);
	}
	if (event)
		client_may_have_written(c);
	if (req & REQ_EXIT) {
		if (event)      /* not lost: the next entry looks */
			atomic_fetch_or(&c->requests, REQ_EVENT);
		return RUN_EINTR;
	}
	if ((event || c->one_insn) && !event_boundary(c))
		return RUN_EXIT;
	if (waits_for_sipi(c))
		return RUN_WAIT_SIPI;
	if (c->monitor.waiting) {
		block_no_insn(c);       /* reading the line may find that the client has unmapped it */
		if (!c->halted || !mwait_goes_on(c))
			c->monitor.waiting = c->halted = false;
	}
	return c->halted ? RUN_HALTED : GO_ON;
}

/* -- the loop ---------------------------------------------------------------------------------- */
static inline void block_enter(struct cpu *c, struct block *b)
{
	c->gpr[R_BLK] = c->rip;
	c->rip += b->bytes;
	c->blk = b;
	c->block_end = b->insn + b->n;
	c->budget -= b->n;
	c->stats.blocks_run++;
}

static void run_block(struct cpu *c, struct block *b)
{
	const struct insn *i = b->insn;

	do {
		c->cur = i;
		i->fn(c, i);
		cpu_charge(c, SLOW_INSN);
		if (unlikely(mmio_pending(c)))
			break;
		i = c->cur + 1; /* handlers may have gone on to others */
	} while (i < c->block_end);
}

/* The loop left a block: everything up to cpu->cur is complete. */
static enum run_result after_insn(struct cpu *c)
{
	settle_next(c);
	step_done(c);
	if (unlikely(mmio_pending(c)) && mmio_commit(c))
		return RUN_EXIT;
	return GO_ON;
}

static enum run_result run_one(struct cpu *c)
{
	struct block_cache *bc = c->blocks;
	bool step = c->one_insn;
	enum run_result r;
	struct block_link *want;
	struct block *b;
	uint32_t mode;

	block_check_generation(c);
	if (unlikely(step)) {
		if (c->code_bp && !mmio_pending(c) && check_code_bp(c, &r))
			return r;
		step_begin(c);
	}
	mode = block_mode(c, step || mmio_pending(c) || (unlikely(c->watch) && c->watch->one));
	b = block_get(c, mode);
	want = bc->want;
	if (want && c->code_stamp != CODE_STAMP_NONE) {
		*want = (struct block_link){ .stamp = c->code_stamp, .rip = c->rip, .blk = b };
		bc->want = NULL;
	}
	if (c->jit && !step && !mmio_pending(c)) {
		switch (jit_run(c, b, mode)) {
		case JIT_DONE: return GO_ON;
		case JIT_LOOK: return after_insn(c);
		case JIT_NOT: break;
		}
	}
	block_enter(c, b);
	run_block(c, b);
	return after_insn(c);
}

static enum run_result engine_loop(struct cpu *c)
{
	enum run_result r;

	for (;;) {
		if (unlikely(block_boundary_due(c)) && (r = boundary(c)) != GO_ON)
			return r;
		if ((r = run_one(c)) != GO_ON)
			return r;
	}
}

static enum run_result take_event(struct cpu *c)
{
	c->rip = cpu_cur_rip(c);
	if (c->ev.type == EV_SOFT || c->ev.type == EV_SOFT_EXC || c->ev.type == EV_PRIV_SOFT_EXC)
		c->rip = rip_wrap(c, c->rip + c->ev.insn_len);
	mmio_reset(c);
	c->blocks->stepping = false;
	c->stats.exceptions++;
	return event_deliver(c) ? GO_ON : RUN_EXIT;
}

/* A handler gave up or finished by way of cpu_unwind(). */
static enum run_result resume(struct cpu *c, enum unwind why)
{
	c->blocks->want = NULL;
	switch (why) {
	case UNWIND_EVENT:
		return take_event(c);
	case UNWIND_EXIT:
		c->rip = cpu_cur_rip(c);
		c->blocks->stepping = false;
		return RUN_EXIT;
	case UNWIND_EXIT_NEXT:
		settle_next(c);
		step_done(c);
		return RUN_EXIT;
	case UNWIND_RETRY:
		c->rip = cpu_cur_rip(c);
		c->mmio.replay = 0;
		c->blocks->stepping = false;
		return GO_ON;
	case UNWIND_LEAVE:
	default:
		return after_insn(c);
	}
}

/*
 * First thing on entry: an instruction whose MMIO read was answered is finished before anything else may happen. An event whose
 * delivery reads MMIO goes on at the boundary, which finds it in cpu->ev, unless user space has taken it away.
 */
static enum run_result engine_start(struct cpu *c)
{
	c->blocks->want = NULL;
	c->blocks->stepping = false;
	c->code_stamp = CODE_STAMP_NONE;
	c->gpr[R_ZERO] = 0;
	block_start_budget(c, __rdtsc());
	c->look_until = 0;
	if (c->mmio.of_event && !c->ev.valid)
		mmio_reset(c);
	if (mmio_pending(c) && !c->halted && !c->mmio.of_event) {
		client_may_have_written(c);
		serve_requests(c, atomic_fetch_and(&c->requests, ~(uint32_t)(REQ_TLB | REQ_BLOCKS)) & (REQ_TLB | REQ_BLOCKS));
		enum run_result r = run_one(c);

		if (r != GO_ON)
			return r;
	}
	atomic_fetch_or(&c->requests, REQ_EVENT);       /* which also looks for changed code */
	if (*(volatile uint8_t *)&c->run->immediate_exit)
		return RUN_EINTR;
	return GO_ON;
}

enum run_result engine_run(struct cpu *c)
{
	enum run_result r;
	int why;

	if (!c->blocks && engine_cpu_init(c)) {
		c->run->exit_reason = KVM_EXIT_INTERNAL_ERROR;
		c->run->internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
		c->run->internal.ndata = 0;
		return RUN_EXIT;
	}
	fault_enter(c);
	why = _setjmp(c->unwind);
	c->in_unwind_scope = true;
	r = why ? resume(c, why) : engine_start(c);
	if (r == GO_ON)
		r = engine_loop(c);
	c->in_unwind_scope = false;
	block_count_insns(c);
	return r;
}
