/* Translator and interpreter side by side: see lockstep.h. */
#include "softkvm/jit/lockstep.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "base/log.h"
#include "softkvm/vm.h"

#define STEP_BUDGET 100         /* instructions after which translated code leaves at the next backward jump */
#define PAGES_KEPT 12           /* open from step to step: all are compared every time */
#define PAGES_MAX 4096
#define INSNS_MAX 60000         /* of one step, before the interpreter is taken to have gone elsewhere */
#define TRACE 128
#define TRIES 4

/* Everything an instruction may change that a step runs twice. */
struct state {
	uint64_t gpr[R_COUNT], rip;
	uint16_t aflags;
	uint32_t eflags;
	uint8_t shadow;
	bool one_insn, trap_db;
	uint64_t trap_dr6, cr2;
	struct fpu fpu;
	struct event ev;
};

struct page { uint8_t *host; uint8_t *copy, *trans; bool changed; };

enum stop { STOP_AT, STOP_ONCE, STOP_EVENT, STOP_OTHER };    /* STOP_AT: cpu->rip is the next instruction */

struct traced { uint64_t rip; uint8_t len, bytes[15]; uint64_t gpr[16]; uint16_t aflags; };

struct lockstep {
	struct cpu_watch watch;         /* first: the hooks find us by it */
	struct jit *j;
	bool paired, was_once;
	struct page page[PAGES_MAX];
	unsigned npages;
	struct state start, trans, near_;
	bool have_near;
	struct insn called[2];          /* the one that is interpreted, and what stops the interpreter */
	struct traced trace[TRACE];
	unsigned ntrace;
	uint64_t steps, insns, alone, again, stale, events;
	bool failed;
	jmp_buf saved;
};

/* -- state --------------------------------------------------------------------------------------- */
static void state_get(struct state *s, const struct cpu *c)
{
	memcpy(s->gpr, c->gpr, sizeof s->gpr);
	s->rip = c->rip;
	s->aflags = c->aflags;
	s->eflags = c->eflags;
	s->shadow = c->shadow;
	s->one_insn = c->one_insn;
	s->trap_db = c->trap_db;
	s->trap_dr6 = c->trap_dr6;
	s->cr2 = c->cr2;
	s->fpu = c->fpu;
	s->ev = c->ev;
}

static void state_put(const struct state *s, struct cpu *c)
{
	memcpy(c->gpr, s->gpr, sizeof s->gpr);
	c->rip = s->rip;
	c->aflags = s->aflags;
	c->eflags = s->eflags;
	c->shadow = s->shadow;
	c->one_insn = s->one_insn;
	c->trap_db = s->trap_db;
	c->trap_dr6 = s->trap_dr6;
	c->cr2 = s->cr2;
	c->fpu = s->fpu;
	c->ev = s->ev;
}

static bool same_event(const struct event *a, const struct event *b)
{
	return a->valid == b->valid && (!a->valid || (a->vector == b->vector && a->type == b->type && a->has_error == b->has_error &&
	       (!a->has_error || a->error == b->error) && (!a->has_payload || a->payload == b->payload)));
}

/* The last instruction's and operand's address (bytes 8 to 23) are the host's own: not compared. */
static bool same_fpu(const struct fpu *a, const struct fpu *b)
{
	return !memcmp(a->zmm, b->zmm, sizeof a->zmm) && !memcmp(a->k, b->k, sizeof a->k) && a->mxcsr == b->mxcsr &&
	       !memcmp(a->fx, b->fx, 6) && !memcmp(a->fx + 32, b->fx + 32, 128);
}

static bool same_gprs(const struct state *a, const struct cpu *c)
{
	return !memcmp(a->gpr, c->gpr, 16 * sizeof a->gpr[0]) && a->eflags == c->eflags;
}

/* -- memory -------------------------------------------------------------------------------------- */
static void page_hook(struct cpu *c, uint8_t *host)
{
	struct lockstep *l = (struct lockstep *)c->watch;
	struct page *p;

	for (unsigned n = 0; n < l->npages; n++)
		if (l->page[n].host == host)
			return;
	if (l->npages == PAGES_MAX) {
		log_error("lockstep: an instruction writes more than %u pages", PAGES_MAX);
		l->failed = true;
		return;
	}
	p = &l->page[l->npages];
	if (!p->copy)
		p->copy = malloc(8192);
	if (!p->copy)
		abort();        /* a test's tool: nothing can go on */
	p->trans = p->copy + 4096;
	p->host = host;
	p->changed = false;
	l->npages++;
	memcpy(p->copy, host, 4096);
}

static void pages_begin(struct lockstep *l)
{
	if (l->npages > PAGES_KEPT) {
		mmu_drop_data(l->j->c);
		l->npages = 0;
	}
	for (unsigned n = 0; n < l->npages; n++)
		memcpy(l->page[n].copy, l->page[n].host, 4096);
}

/* Words that changed from `now` to the copy, unless somebody else has written them since. */
static void page_undo(struct page *p, const uint8_t *now)
{
	for (unsigned k = 0; k < 4096; k += 8) {
		uint64_t was = ld_le64(p->copy + k), is = ld_le64(now + k);

		if (was != is)
			__atomic_compare_exchange_n((uint64_t *)(void *)(p->host + k), &is, was, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
	}
}

/* Keep what the translated code wrote, and put memory back. */
static void pages_back(struct lockstep *l, bool keep)
{
	for (unsigned n = 0; n < l->npages; n++) {
		struct page *p = &l->page[n];
		uint8_t now[4096];

		memcpy(now, p->host, 4096);
		if (keep) {
			p->changed = memcmp(now, p->copy, 4096);
			memcpy(p->trans, now, p->changed ? 4096 : 0);
		}
		page_undo(p, now);
	}
}

static bool page_same(const struct page *p) { return !memcmp(p->host, p->changed ? p->trans : p->copy, 4096); }

static bool pages_same(const struct lockstep *l)
{
	for (unsigned n = 0; n < l->npages; n++)
		if (!page_same(&l->page[n]))
			return false;
	return true;
}

/* -- what ends a step ------------------------------------------------------------------------------- */
static void once_hook(struct cpu *c)
{
	struct lockstep *l = (struct lockstep *)c->watch;

	if (!l->paired)
		return;
	l->was_once = true;
	cpu_unwind(c, UNWIND_RETRY);
}

static enum stop ended_by(struct lockstep *l, struct cpu *c, int why)
{
	mmio_reset(c);
	if (l->was_once) {
		c->rip = cpu_cur_rip(c);
		return STOP_ONCE;
	}
	if (why != UNWIND_EVENT)
		return STOP_OTHER;
	c->rip = cpu_cur_rip(c);
	return STOP_EVENT;
}

static void settle(struct cpu *c)
{
	if (c->cur && !(c->cur->flags & IF_END))
		c->rip = cpu_next_rip(c);
}

/* Translated code from here. JIT_NOT: there is none. */
static enum jit_result run_translated(struct lockstep *l, struct block *b, uint32_t mode, enum stop *end)
{
	struct cpu *c = l->j->c;
	enum jit_result r;
	int why;

	l->was_once = false;
	why = _setjmp(c->unwind);
	if (why) {
		*end = ended_by(l, c, why);
		return JIT_DONE;
	}
	r = jit_run_translated(c, b, mode);
	if (r == JIT_LOOK)
		settle(c);
	*end = STOP_AT;
	return r;
}

/* -- the interpreter's turn -------------------------------------------------------------------------- */
static void trace_one(struct lockstep *l, const struct cpu *c, uint64_t rip, const struct block *b, const struct insn *i)
{
	struct traced *t = &l->trace[l->ntrace++ % TRACE];

	t->rip = rip;
	t->len = MIN(i->len, 15);
	memcpy(t->bytes, block_copy(b) + i->off, t->len);
	memcpy(t->gpr, c->gpr, sizeof t->gpr);
	t->aflags = c->aflags;
}

static void op_stop(struct cpu *c, const struct insn *i) { }

/* Instruction `i` of `b`, which starts at `base`. True: the block goes on behind it. */
static bool interpret(struct lockstep *l, struct cpu *c, struct block *b, const struct insn *i, uint64_t base)
{
	struct insn *s = l->called;

	s[0] = *i;
	s[1] = (struct insn){ .fn = op_stop, .off = (uint16_t)(i->off + i->len), .base = R_ZERO, .index = R_ZERO };
	c->gpr[R_BLK] = base;
	c->rip = base + b->bytes;
	c->blk = b;
	c->block_end = NULL;
	c->code_stamp = CODE_STAMP_NONE;
	c->cur = s;
	trace_one(l, c, base + i->off, b, i);
	if (i->flags & IF_ONCE)
		once_hook(c);
	s->fn(c, s);
	atomic_store_explicit(&c->code_store, false, memory_order_release);
	settle(c);
	return !(i->flags & IF_END) && !c->block_end && i + 1 < b->insn + b->n;
}

static bool arrived(struct lockstep *l, const struct cpu *c)
{
	if (c->rip != l->trans.rip)
		return false;
	if (!same_gprs(&l->trans, c) || !pages_same(l)) {
		if (!l->have_near)
			state_get(&l->near_, c), l->have_near = true;
		return false;
	}
	return true;
}

/* Translated code may have been left at its entry; a jump to itself leads there as well, and may leave a trap behind. */
static bool did_nothing(const struct lockstep *l)
{
	return l->trans.rip == l->start.rip && l->trans.trap_db == l->start.trap_db && l->trans.one_insn == l->start.one_insn &&
	       l->trans.shadow == l->start.shadow;
}

static enum stop interpret_until(struct lockstep *l, struct cpu *c, enum stop want, volatile unsigned *n)
{
	struct block *b = NULL;
	const struct insn *i = NULL;
	uint64_t base = 0;

	for (*n = 0; *n < INSNS_MAX; ++*n) {
		if ((want == STOP_ONCE || (want == STOP_AT && (*n || did_nothing(l)))) && arrived(l, c))
			return want;
		if (!b) {
			block_check_generation(c);
			base = c->rip;
			b = block_get(c, block_mode(c, false));
			i = b->insn;
		}
		if (interpret(l, c, b, i, base))
			i++;
		else
			b = NULL;
	}
	return STOP_OTHER;
}

/* Until the state is the one that translated code left, or something ends it. Counts instructions in *n. */
static enum stop run_interpreter(struct lockstep *l, enum stop want, volatile unsigned *n)
{
	struct cpu *c = l->j->c;
	int why;

	l->was_once = l->have_near = false;
	l->ntrace = 0;
	why = _setjmp(c->unwind);
	return why ? ended_by(l, c, why) : interpret_until(l, c, want, n);
}

/* -- comparison ---------------------------------------------------------------------------------------- */
/* Flags of `left` that the code at cpu->rip may read before it overwrites them. Moves cpu->rip. */
struct seen { unsigned n; uint64_t rip[64]; uint16_t left[64]; };

static uint16_t flags_read(struct cpu *c, uint16_t left, struct seen *s)
{
	uint64_t rip = c->rip, to;
	struct block *b;
	struct tinsn t;
	ZydisDecoder z;

	for (unsigned n = 0; n < s->n; n++)     /* a loop: what else it leads to is looked at there */
		if (s->rip[n] == rip && !(left & ~s->left[n]))
			return 0;
	if (!left || s->n == ARRAY_SIZE(s->rip))
		return left;
	s->rip[s->n] = rip;
	s->left[s->n++] = left;
	b = block_get(c, block_mode(c, false));
	decode_init(&z, c, b->mode);
	for (unsigned n = 0; n < b->n && left; n++) {
		const struct insn *i = &b->insn[n];

		if (ZYAN_FAILED(decode_zydis(&z, c, block_copy(b) + i->off, i->len, &t.z, t.op)) ||
		    ((i->flags & IF_ONCE) && (i->flags & IF_END)))
			return left;
		tinsn_flags(&t);
		if (t.tested & left)
			return left;
		left &= (uint16_t)~t.killed;
	}
	if (!left)
		return 0;
	c->rip = rip + b->bytes;
	if (!(b->insn[b->n - 1].flags & IF_BRANCH))
		return flags_read(c, left, s);
	if (t.op[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || t.z.meta.category == ZYDIS_CATEGORY_CALL)
		return left;
	to = c->rip + (uint64_t)t.op[0].imm.value.s;
	if (c->code_bits != 64)
		to = (uint32_t)to;
	if (t.z.meta.category == ZYDIS_CATEGORY_COND_BR) {
		uint16_t next = flags_read(c, left, s);

		c->rip = to;
		return next | flags_read(c, left, s);
	}
	c->rip = to;
	return flags_read(c, left, s);
}

static uint16_t flags_live(struct cpu *c, uint16_t left)
{
	struct seen s = { 0 };

	return _setjmp(c->unwind) ? JIT_ALL_FLAGS : flags_read(c, left, &s);
}

/* Flags that are undefined after the instructions of this step: the host's are what other instructions left. */
static uint16_t flags_undefined(const struct lockstep *l, struct cpu *c)
{
	unsigned from = l->ntrace > TRACE ? l->ntrace - TRACE : 0;
	uint16_t undefined = 0;
	ZydisDecoder z;

	decode_init(&z, c, block_mode(c, false));
	for (unsigned n = from; n < l->ntrace; n++) {
		const struct traced *t = &l->trace[n % TRACE];
		ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
		ZydisDecodedInstruction i;

		if (ZYAN_FAILED(decode_zydis(&z, c, t->bytes, t->len, &i, op)) || !i.cpu_flags)
			continue;
		undefined &= (uint16_t)~(i.cpu_flags->modified | i.cpu_flags->set_0 | i.cpu_flags->set_1);
		undefined |= i.cpu_flags->undefined & JIT_ALL_FLAGS;
	}
	return undefined;
}

static bool flags_agree(struct lockstep *l, struct cpu *c)
{
	uint16_t diff = (uint16_t)(l->trans.aflags ^ c->aflags);
	uint16_t bits = (uint16_t)((diff >> 8 & 0xd5) | (diff & 1) << 11);      /* as in RFLAGS */
	struct event ev = c->ev;
	const struct insn *cur = c->cur;
	uint64_t blk = c->gpr[R_BLK], rip = c->rip;

	if (!bits)
		return true;
	bits &= (uint16_t)~flags_undefined(l, c);
	if (!bits)
		return true;
	bits = flags_live(c, bits);
	c->ev = ev;
	c->cur = cur;
	c->gpr[R_BLK] = blk;
	c->rip = rip;
	l->stale += !bits;
	return !bits;
}

static bool agree(struct lockstep *l, enum stop t, enum stop i)
{
	struct cpu *c = l->j->c;

	return t == i && l->trans.rip == c->rip && same_gprs(&l->trans, c) && same_fpu(&l->trans.fpu, &c->fpu) && pages_same(l) &&
	       (t != STOP_EVENT || same_event(&l->trans.ev, &c->ev)) && flags_agree(l, c);
}

/* -- the report ---------------------------------------------------------------------------------------- */
static const char *const names[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };
static const char *const ends[] = { "at the next block", "in front of an instruction that is not repeated", "with an event", "otherwise" };

static void report_insn(struct lockstep *l, const struct traced *t, const struct traced *next)
{
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	ZydisDecodedInstruction z;
	ZydisFormatter f;
	ZydisDecoder d;
	char text[96] = "(bad)", regs[512] = "";
	unsigned n = 0;

	decode_init(&d, l->j->c, block_mode(l->j->c, false));
	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	if (ZYAN_SUCCESS(decode_zydis(&d, l->j->c, t->bytes, t->len, &z, op)))
		ZydisFormatterFormatInstruction(&f, &z, op, z.operand_count_visible, text, sizeof text, t->rip, NULL);
	for (unsigned r = 0; r < 16 && n < sizeof regs - 32; r++)
		if (t->gpr[r] != next->gpr[r])
			n += (unsigned)snprintf(regs + n, sizeof regs - n, " %s=%" PRIx64, names[r], next->gpr[r]);
	log_error("  %" PRIx64 ": %-44s flags %04x -> %04x%s", t->rip, text, t->aflags, next->aflags, regs);
}

static void report_code(struct lockstep *l)
{
	struct cpu *c = l->j->c;
	struct traced last = { .aflags = c->aflags };
	unsigned from = l->ntrace > TRACE ? l->ntrace - TRACE : 0;

	memcpy(last.gpr, c->gpr, sizeof last.gpr);
	if (from)
		log_error("  ... %u instructions before these", from);
	for (unsigned n = from; n < l->ntrace; n++)
		report_insn(l, &l->trace[n % TRACE], n + 1 < l->ntrace ? &l->trace[(n + 1) % TRACE] : &last);
}

static void report_fpu(const struct fpu *t, const struct fpu *i)
{
	for (unsigned r = 0; r < 32; r++)
		if (memcmp(t->zmm[r], i->zmm[r], 64))
			log_error("  zmm%u: translated %016" PRIx64 "%016" PRIx64 ", interpreted %016" PRIx64 "%016" PRIx64, r,
				  ld_le64(t->zmm[r] + 8), ld_le64(t->zmm[r]), ld_le64(i->zmm[r] + 8), ld_le64(i->zmm[r]));
	if (t->mxcsr != i->mxcsr)
		log_error("  mxcsr: translated %x, interpreted %x", t->mxcsr, i->mxcsr);
	if (memcmp(t->fx, i->fx, 6) || memcmp(t->fx + 32, i->fx + 32, 128))
		log_error("  x87 state differs");
}

static void report(struct lockstep *l, enum stop t, enum stop i)
{
	const struct cpu *c = l->j->c;
	const struct state *s = &l->near_;
	struct state now;

	state_get(&now, c);
	if (!l->have_near)
		s = &now;
	log_error("lockstep: first difference, in step %" PRIu64 " after %" PRIu64 " instructions", l->steps, l->insns);
	log_error("  from rip %" PRIx64 "; the translation ended %s, the interpreter %s", l->start.rip, ends[t], ends[i]);
	for (unsigned r = 0; r < 16; r++)
		log_error("  %-3s before %016" PRIx64 "  translated %016" PRIx64 "  interpreted %016" PRIx64 "%s", names[r], l->start.gpr[r],
			  l->trans.gpr[r], s->gpr[r], l->trans.gpr[r] != s->gpr[r] ? "  <--" : "");
	log_error("  rip before %" PRIx64 "  translated %" PRIx64 "  interpreted %" PRIx64, l->start.rip, l->trans.rip, s->rip);
	log_error("  aflags before %04x  translated %04x  interpreted %04x; eflags %x %x", l->start.aflags, l->trans.aflags, s->aflags,
		  l->trans.eflags, s->eflags);
	if (t == STOP_EVENT || i == STOP_EVENT)
		log_error("  event: translated %d vector %u error %x, interpreted %d vector %u error %x", l->trans.ev.valid, l->trans.ev.vector,
			  l->trans.ev.error, c->ev.valid, c->ev.vector, c->ev.error);
	report_fpu(&l->trans.fpu, &s->fpu);
	for (unsigned n = 0; n < l->npages; n++)
		for (unsigned k = 0; k < 4096 && !page_same(&l->page[n]); k += 8) {
			const struct page *p = &l->page[n];
			uint64_t a = ld_le64((p->changed ? p->trans : p->copy) + k), b = ld_le64(p->host + k);

			if (a != b)
				log_error("  memory of host %p: before %016" PRIx64 "  translated %016" PRIx64 "  interpreted %016" PRIx64,
					  (void *)(p->host + k), ld_le64(p->copy + k), a, b);
		}
	report_code(l);
}

/* -- a step ---------------------------------------------------------------------------------------------- */
/* Both, from the same start. JIT_NOT: nothing is translated here, and nothing has happened. */
static enum jit_result both(struct lockstep *l, struct block *b, uint32_t mode, enum stop *t, enum stop *i, volatile unsigned *n)
{
	struct cpu *c = l->j->c;
	uint64_t fills = c->stats.tlb_fills;
	struct jit_link *want;

	c->budget = STEP_BUDGET;
	l->paired = true;
	if (run_translated(l, b, mode, t) == JIT_NOT) {
		l->paired = false;
		return JIT_NOT;
	}
	want = c->blocks->jit_want;
	state_get(&l->trans, c);
	pages_back(l, true);
	/* Walks of page tables that were written and put back have to be made again. */
	if (c->stats.tlb_fills != fills)
		mmu_drop_data(c);
	state_put(&l->start, c);
	*i = *t == STOP_OTHER ? STOP_OTHER : run_interpreter(l, *t, n);
	l->paired = false;
	c->blocks->jit_want = *t == STOP_AT ? want : NULL;
	c->blocks->want = NULL;
	c->code_stamp = CODE_STAMP_NONE;
	return JIT_DONE;
}

/* Does it differ again? Memory and registers are as the interpreter left them, or as before the step. */
static bool step(struct lockstep *l, uint32_t mode, struct block *b, enum stop *t, volatile unsigned *n, bool *not)
{
	struct cpu *c = l->j->c;
	enum stop i = STOP_OTHER;

	for (unsigned try = 0;; try++) {
		if (both(l, b, mode, t, &i, n) == JIT_NOT) {
			*not = true;
			return true;
		}
		if (*t != STOP_OTHER && agree(l, *t, i)) {
			l->again += try != 0;
			return true;
		}
		if (*t == STOP_OTHER) {          /* leaves KVM_RUN, or the like: by the interpreter alone */
			pages_back(l, false);
			state_put(&l->start, c);
			c->watch->one = true;
			return true;
		}
		if (try == TRIES)
			break;
		pages_back(l, false);
		mmu_drop_data(c);
		state_put(&l->start, c);
		memcpy(c->unwind, l->saved, sizeof l->saved);   /* to fetch may fault */
		b = block_get(c, mode);
	}
	report(l, *t, i);
	return false;
}

enum jit_result lockstep_run(struct jit *j, struct block *b, uint32_t mode)
{
	struct lockstep *l = j->lock;
	struct cpu *c = j->c;
	int32_t budget = c->budget;
	volatile unsigned n = 0;
	enum stop t = STOP_OTHER;
	bool not = false, ok;

	if ((mode & BM_ONE) || l->failed || (c->vm && atomic_load(&c->vm->ncpus) > 1)) {
		c->watch->one = false;
		l->alone++;
		return JIT_NOT;
	}
	pages_begin(l);
	state_get(&l->start, c);
	memcpy(l->saved, c->unwind, sizeof l->saved);
	ok = step(l, mode, b, &t, &n, &not);
	memcpy(c->unwind, l->saved, sizeof l->saved);
	c->budget = budget - (int32_t)MAX(n, 1u);       /* the loop looks around even if state comes back to what it was */
	if (not)
		return JIT_NOT;
	l->steps++;
	l->insns += n;
	if (!ok) {
		l->failed = true;
		cpu_engine_failed(c);
	}
	if (t == STOP_ONCE)
		c->watch->one = true;
	if (t == STOP_EVENT) {
		l->events++;
		cpu_unwind(c, UNWIND_EVENT);
	}
	return JIT_DONE;
}

/* -- life -------------------------------------------------------------------------------------------------- */
int lockstep_init(struct jit *j)
{
	struct lockstep *l = calloc(1, sizeof *l);

	if (!l)
		return -ENOMEM;
	l->watch.page = page_hook;
	l->watch.once = once_hook;
	l->j = j;
	j->lock = l;
	j->c->watch = &l->watch;
	return 0;
}

void lockstep_free(struct jit *j)
{
	struct lockstep *l = j->lock;

	if (!l)
		return;
	log_warn("lockstep: %" PRIu64 " instructions in %" PRIu64 " steps compared, %" PRIu64 " with an event, %" PRIu64 " left stale flags, %"
		 PRIu64 " repeated; %" PRIu64 " instructions interpreted alone; %s", l->insns, l->steps, l->events, l->stale, l->again, l->alone,
		 l->failed ? "A DIFFERENCE" : "no difference");
	for (unsigned n = 0; n < PAGES_MAX; n++)
		free(l->page[n].copy);
	j->c->watch = NULL;
	j->lock = NULL;
	free(l);
}
