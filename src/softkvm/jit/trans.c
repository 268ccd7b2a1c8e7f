/* From a decoded block to code: decoding again, flag liveness, and the walk over its instructions. */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "softkvm/jit/internal.h"

#define HOT_MAX (32u << 10)
#define THUNKS_MAX (4u << 10)
#define COLD_MAX (128u << 10)
#define ARENA_MAX (sizeof(struct jit_code) + sizeof(struct jit_page) + 128 + (REGION_INSNS * 3 + REGION_PARTS * 2) * sizeof(struct jit_link))

void gen_colds(struct tr *t);
insn_fn op_fetch_gp;

/* -- flags --------------------------------------------------------------------------------------- */
/* Shifts and rotates by zero write nothing, nor do comparisons of no elements. */
static bool may_not_write(const struct tinsn *i)
{
	if (i->z.meta.category == ZYDIS_CATEGORY_STRINGOP)
		return i->z.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
	switch (i->z.mnemonic) {
	case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR: case ZYDIS_MNEMONIC_ROL:
	case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR:
		return i->op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(i->op[1].imm.value.u & (i->z.operand_width == 64 ? 63 : 31)) ||
		       i->z.operand_width < 32;
	case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD:
		return i->op[2].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !(i->op[2].imm.value.u & (i->z.operand_width == 64 ? 63 : 31));
	default:
		return false;
	}
}

void tinsn_flags(struct tinsn *i)
{
	const ZydisAccessedFlags *f = i->z.cpu_flags;

	i->tested = i->written = i->killed = 0;
	if (f) {
		i->tested = f->tested & JIT_ALL_FLAGS;
		i->written = (f->modified | f->set_0 | f->set_1 | f->undefined) & JIT_ALL_FLAGS;
		i->killed = may_not_write(i) ? 0 : i->written;
	}
	/* Branches look at flags even where they leave: their own business. */
}

/* Of an instruction's bytes, those that say what it does to flags: its values do not, but for counts. */
static uint64_t flag_bytes(const ZydisDecodedInstruction *z)
{
	uint64_t m = BIT(z->length) - 1;

	if (z->raw.disp.size)
		m &= ~((BIT(z->raw.disp.size / 8) - 1) << z->raw.disp.offset);
	if (z->raw.imm[0].size && z->meta.category != ZYDIS_CATEGORY_SHIFT)
		m &= BIT(z->raw.imm[0].offset) - 1;
	return m;
}

static bool look_ahead(struct tr *t, struct ahead *s)
{
	static const uint16_t all = JIT_ALL_FLAGS;
	const struct code_page page = block_page(t->b);
	unsigned off = s->rip & 4095, have = MIN((unsigned)sizeof s->bytes, 4096 - off), at = 0;
	uint16_t left = all;
	struct tinsn i;

	/* What is looked at here is not part of the block: a store to it must count as one to the block. */
	mmu_code_lines(t->c, &page, off, have);
	ram_copy(s->bytes, page.host + off, have);
	for (unsigned n = 0; n < SEEN_INSNS; n++) {
		if (ZYAN_FAILED(decode_zydis(&t->decoder, t->c, s->bytes + at, MIN(have - at, 15u), &i.z, i.op)))
			return false;
		switch (i.z.meta.category) {
		case ZYDIS_CATEGORY_BINARY: case ZYDIS_CATEGORY_LOGICAL: case ZYDIS_CATEGORY_DATAXFER: case ZYDIS_CATEGORY_SHIFT:
		case ZYDIS_CATEGORY_PUSH: case ZYDIS_CATEGORY_POP: case ZYDIS_CATEGORY_MISC: case ZYDIS_CATEGORY_CMOV:
		case ZYDIS_CATEGORY_SETCC: case ZYDIS_CATEGORY_BITBYTE:
			break;
		default:
			return false;
		}
		tinsn_flags(&i);
		/* MOV CR and MOV DR are their handlers', before which all flags are to be right. */
		if ((i.tested & left) || (i.z.opcode_map == ZYDIS_OPCODE_MAP_0F && (i.z.opcode & 0xfc) == 0x20))
			return false;
		left &= (uint16_t)~i.killed;
		s->mask |= flag_bytes(&i.z) << at;
		at += i.z.length;
		s->len = (uint8_t)at;
		if (!left)
			return true;
		if (off + at >= 4096)
			return false;
	}
	return false;
}

/* Nobody looks at the flags that hold when the code at `rip`, in the same page, is reached. Asked for the same places again and again. */
bool flags_dead_at(struct tr *t, uint64_t rip)
{
	struct ahead *s = &t->seen[t->nseen];

	if ((rip ^ t->k->rip) >> 12)
		return false;
	for (unsigned n = 0; n < t->nseen; n++)
		if (t->seen[n].rip == rip)
			return t->seen[n].dead;
	if (t->nseen == SEEN_MAX)
		return false;
	t->nseen++;
	s->rip = rip;
	s->mask = 0;
	return s->dead = look_ahead(t, s);
}

/* Flags that matter behind the last instruction of a part. */
static uint16_t live_at(struct tr *t, uint64_t rip)
{
	int p = tr_part(t, rip);

	return p >= 0 ? t->part[p].live : flags_dead_at(t, rip) ? 0 : JIT_ALL_FLAGS;
}

static uint16_t live_out(struct tr *t, unsigned p)
{
	unsigned n = t->part[p].first + t->part[p].n - 1;

	switch (t->t[n].end) {
	case END_NONE: return live_at(t, tr_end(t, n));
	case END_JMP: return live_at(t, tr_target(t, n));
	case END_JCC: return live_at(t, tr_target(t, n)) | live_at(t, tr_end(t, n));
	default: return JIT_ALL_FLAGS;
	}
}

static bool part_liveness(struct tr *t, unsigned p)
{
	struct part *q = &t->part[p];
	uint16_t live = live_out(t, p), was = q->live;

	for (unsigned n = q->first + q->n; n-- > q->first;) {
		struct tinsn *i = &t->t[n];

		i->live = live;
		live = i->tested | (live & ~i->killed);
	}
	q->live = live;
	return live != was;
}

/* Backwards over the region until nothing changes; sets only grow. */
static void liveness(struct tr *t)
{
	bool again;

	for (unsigned p = 0; p < t->nparts; p++)
		t->part[p].live = 0;
	do {
		again = false;
		for (unsigned p = t->nparts; p--;)
			again |= part_liveness(t, p);
	} while (again);
}

/* -- the region ---------------------------------------------------------------------------------- */
int tr_part(const struct tr *t, uint64_t rip)
{
	for (unsigned p = 0; p < t->nparts; p++)
		if (t->part[p].rip == rip)
			return (int)p;
	return -1;
}

static enum tend end_of(const struct tr *t, const struct tinsn *i)
{
	if (!(i->in->flags & IF_END) || (!i->by_handler && gen_string_may(t, i)))
		return END_NONE;
	if (i->by_handler || i->z.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || i->op[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE ||
	    !i->op[0].imm.is_relative || i->z.operand_width != t->bits)
		return END_OTHER;
	if (i->z.mnemonic == ZYDIS_MNEMONIC_JMP)
		return END_JMP;
	if (gen_counts(t, i))
		return END_JCC;
	return (i->z.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i->z.opcode & 0xf0) == 0x70) ||
	       (i->z.opcode_map == ZYDIS_OPCODE_MAP_0F && (i->z.opcode & 0xf0) == 0x80) ? END_JCC : END_OTHER;
}

static void decode_part(struct tr *t, struct block *b, uint64_t rip)
{
	struct part *p = &t->part[t->nparts++];

	*p = (struct part){ .b = b, .rip = rip, .first = t->n, .n = b->n };
	for (unsigned n = 0; n < b->n; n++) {
		struct tinsn *i = &t->t[t->n++];
		const struct insn *in = &b->insn[n];

		i->in = in;
		i->b = b;
		i->rip = rip + in->off;
		i->by_handler = in->fn == op_ud || in->fn == op_fetch_gp || (in->flags & IF_NEW_DISP) ||
				(in->flags & (IF_NEW_IMM | IF_END)) == (IF_NEW_IMM | IF_END) ||
				ZYAN_FAILED(decode_zydis(&t->decoder, t->c, block_copy(b) + in->off, in->len, &i->z, i->op)) ||
				i->z.length != in->len || ((in->flags & IF_ONCE) && !gen_sys_may(t, i));
		if (i->by_handler) {
			i->tested = JIT_ALL_FLAGS;
			i->written = i->killed = 0;
			i->z.mnemonic = ZYDIS_MNEMONIC_INVALID;
		} else {
			tinsn_flags(i);
		}
		i->end = end_of(t, i);
		if (i->end == END_OTHER)
			i->tested = JIT_ALL_FLAGS, i->killed = 0;
	}
}

/* As valid as the region's first block. Where the page was written, and code of it stands, its blocks are compared when they are come to. */
static bool valid(struct tr *t, struct block *b)
{
	struct code_page page = block_page(b);

	if (b->ver_value == t->b->ver_value)
		return true;
	mmu_code_lines(t->c, &page, b->gpa & 4095, b->bytes);
	return ram_same(b->host, block_copy(b), b->bytes) || block_patch(t->c, b);
}

/* The decoded block at `rip` if it may join: executed a few times, in the page, as valid as the first. */
/*
 * There is a translation of it that can be jumped to. Taking it in as well saves that jump and lets registers and flags be where this region has them,
 * but code that everything leads to would be translated again and again: in large programs it made up four tenths of all. That is for what proves hot.
 */
static bool leads(const struct tr *t, const struct block *b, uint64_t rip)
{
	return !t->k->in_line && b->code_gen == t->j->gen && b->code && b->code->mode == t->k->mode && jit_code_rip(b->code) == rip;
}

static struct block *candidate(struct tr *t, uint64_t rip)
{
	const struct block_fast *e = &t->c->blocks->fast[block_fast_index(rip)];
	const struct block *h = t->b;
	struct block *b = e->blk;

	if (((rip ^ t->k->rip) >> 12) || e->rip != rip || !b || b->gpa != h->gpa + (rip - t->k->rip) || b->mode != h->mode ||
	    b->host != h->host + (int64_t)(rip - t->k->rip) || b->ver != h->ver || b->cross ||
	    b == t->c->blocks->scratch || (t->j->threshold && (b->code_gen != t->j->gen || (!b->code && b->runs * 4 < t->j->threshold))) ||
	    t->n + b->n > REGION_INSNS || t->nparts == REGION_PARTS || tr_part(t, rip) >= 0 || leads(t, b, rip) || !valid(t, b))
		return NULL;
	return b;
}

/* Falls through from block to block as far as it can, then from the latest conditional jump's target. */
static void collect(struct tr *t)
{
	uint64_t todo[REGION_PARTS * 2], rip = t->k->rip;
	unsigned ntodo = 0;
	struct block *b = t->b;

	t->n = t->nparts = t->nseen = 0;
	decode_init(&t->decoder, t->c, b->mode);
	while (b) {
		unsigned n;

		decode_part(t, b, rip);
		n = t->n - 1;
		b = NULL;
		if (t->t[n].end != END_OTHER) {
			rip = t->t[n].end == END_JMP ? tr_target(t, n) : tr_end(t, n);
			b = candidate(t, rip);
		}
		if (t->t[n].end == END_JCC)
			todo[ntodo++] = tr_target(t, n);        /* at most one for each part */
		while (!b && ntodo) {
			rip = todo[--ntodo];
			b = candidate(t, rip);
		}
	}
}

static void note_label(struct tr *t, uint64_t rip, unsigned from, bool falls)
{
	int p = tr_part(t, rip);

	if (p >= 0 && !(falls && (unsigned)p == from + 1))
		t->part[p].label = true;
}

/* Which parts are reached by jumps; gen_edge() and conditional() make the same choices. */
static void labels(struct tr *t)
{
	for (unsigned p = 0; p < t->nparts; p++) {
		unsigned n = t->part[p].first + t->part[p].n - 1;
		uint64_t fall = tr_end(t, n), to = t->t[n].end >= END_JMP ? tr_target(t, n) : 0;

		switch (t->t[n].end) {
		case END_NONE:
			note_label(t, fall, p, true);
			break;
		case END_JMP:
			note_label(t, to, p, true);
			break;
		case END_JCC:
			note_label(t, fall, p, true);
			note_label(t, to, p, to > t->t[n].rip && tr_part(t, fall) != (int)p + 1);
			break;
		default:        /* a call's target */
			if (!t->t[n].by_handler && t->t[n].op[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && t->t[n].op[0].imm.is_relative &&
			    t->t[n].z.operand_width == t->bits)
				note_label(t, tr_target(t, n), p, false);
		}
	}
}

/* -- the walk ------------------------------------------------------------------------------------ */
/* An instruction that is not translated looks at all flags. Known only when it was tried: a dry run decides. */
static bool gen_one(struct tr *t, unsigned n)
{
	if (t->t[n].by_handler)
		return false;
	if (t->t[n].in->flags & IF_NEW_IMM)
		return gen_patched(t, n);
	if (t->t[n].in->flags & IF_ONCE)
		return gen_sys(t, n);
	return gen_int(t, n) || gen_vec(t, n) || gen_gather(t, n) || gen_x87(t, n) || gen_branch(t, n) || gen_string(t, n) || gen_odd(t, n) || gen_single(t, n);
}

static void reset(struct tr *t, const struct em *h, const struct em *cold)
{
	t->h = *h;
	t->cold = *cold;
	t->swapped = false;
	t->in_mem = true;
	t->in_host = false;
	t->live = 0;
	t->ncold = t->nfix = t->npoints = 0;
	t->row = t->index = false;
	t->align = t->point_flags = 0;
	t->rsp_off = 0;
	hold_forget(t);
	t->k->links = 0;
	t->k->patches = 0;
	for (unsigned p = 0; p < t->nparts; p++)
		t->part[p].at = NULL;
}

static uint8_t *check_version(struct em *e, const _Atomic uint32_t *ver, const uint32_t *want)
{
	em_imm(e, SC, (uintptr_t)ver);
	EM(e, 0x8b, 0x09);                              /* mov ecx, [rcx] */
	em_op_abs(e, false, 0x3b, SC, want);
	return em_jcc(e, 5);
}

/* To the loop, as if it had not been entered; returns where that is. */
static uint8_t *leave_entry(struct tr *t)
{
	uint8_t *at = t->cold.p;

	gen_leave(&t->cold, t, t->k->rip, (const struct jit_link *)((uintptr_t)t->k | LEFT_ENTRY));
	return at;
}

/*
 * Is its page, and its second one if it has two, what was seen there, and still what memory holds? If not, leave by way of the cold part.
 * ENTRY_* say where its constants are.
 */
static uint8_t *check(struct em *e, struct tr *t)
{
	const struct block_cross *x = t->b->cross ? block_cross(t->b) : NULL;
	struct em *cold = &t->cold;
	uint8_t *bad[3], *left;
	unsigned n = 0;

	em_load(e, SA, &t->j->low->stamp);
	em_op_abs(e, true, 0x3b, SA, x ? &t->k->stamp : &t->k->page->stamp);
	bad[n++] = em_jcc(e, 5);
	if (x) {
		bad[n++] = check_version(e, x->second.ver, &t->k->second_value);
		bad[n++] = check_version(e, x->ver, &t->k->ver_value);
	} else {
		EM(e, 0x48, 0xb9);                              /* mov rcx, imm64 ; cmp dword [rcx], imm32 */
		e64(e, (uintptr_t)t->b->ver);
		EM(e, 0x81, 0x39);
		e32(e, t->k->ver_value);
		bad[n++] = em_jcc(e, 5);
	}
	if (e == cold) {
		uint8_t *on = em_jmp(e);

		while (n)
			em_here(e, bad[--n]);
		left = leave_entry(t);
		em_here(e, on);
		return left;
	}
	while (n)
		em_here(cold, bad[--n]);
	return leave_entry(t);
}

/*
 * Until it is known to run much its first block is taken from the budget here, and not where it is left: each way in comes by here, and where the budget ends
 * is where the guest spends its time (heat.c). Flags are free at an entry.
 */
static void charge_entry(struct tr *t, uint8_t *leave)
{
	uint8_t *over, *on;

	em_charge(&t->h, t->c, t->part[0].n);
	over = em_jcc(&t->h, 14);                       /* jle */
	em_here(&t->cold, over);
	on = gen_look(&t->cold, t);
	if (t->k->map)
		map_out(&t->cold, t);
	over = em_jmp(&t->cold);
	if (!t->cold.full) {
		em_to(on, t->h.p);
		em_to(over, leave);
	}
}

static void entry(struct tr *t)
{
	struct em *e = &t->h, *cold = &t->cold;
	struct jit_code *k = t->k;
	uint8_t *to, *left;

	t->mapped = false;
	k->entry = (uint32_t)(e->p - t->j->rw);
	left = check(e, t);
	k->body = (uint32_t)(e->p - t->j->rw);
	k->entry_same = k->entry;
	map_in(e, t);
	k->body_same = (uint32_t)(e->p - t->j->rw);
	t->mapped = k->map;
	if (k->map) {
		k->entry_same = (uint32_t)(cold->p - t->j->rw);
		check(cold, t);
		to = em_jmp(cold);
		if (!cold->full)
			em_to(to, e->p);
	}
	if (!k->in_line)
		charge_entry(t, left);
}

/* False: it turned out to need its handler. */
static bool walk_insn(struct tr *t, unsigned n)
{
	struct em h = t->h, cold = t->cold;
	unsigned ncold = t->ncold, nfix = t->nfix, npoints = t->npoints;
	struct hold hold[HOLDS];

	memcpy(hold, t->hold, sizeof hold);
	if (t->t[n].by_handler) {
		gen_handler(t, n);
		return true;
	}
	if (gen_one(t, n))
		return true;
	t->h = h;
	t->cold = cold;
	t->ncold = ncold;
	t->nfix = nfix;
	t->npoints = npoints;
	memcpy(t->hold, hold, sizeof hold);
	t->t[n].by_handler = true;
	t->t[n].tested = JIT_ALL_FLAGS;
	t->t[n].written = t->t[n].killed = 0;
	if (t->t[n].in->flags & IF_END)
		t->t[n].end = END_OTHER;
	return false;
}

static bool walk_row(struct tr *t, unsigned n, unsigned count, const struct row *r)
{
	struct cold *k = row_begin(t, n, count, r);
	bool ok = true;

	if (!k) {
		t->failed = true;
		return false;
	}
	for (unsigned m = 0; m < count; m++)
		ok &= walk_insn(t, n + m);
	row_end(t, n + count - 1, k);
	return ok;
}

static void begin_part(struct tr *t, unsigned p)
{
	struct part *q = &t->part[p];

	t->now = p;
	if (q->label) {
		t->in_mem = true;
		t->in_host = false;
		t->live = 0;
		hold_forget(t);
	}
	q->at = t->h.p;
	for (unsigned f = 0; f < t->nfix; f++)
		if (t->fix[f].part == p)
			em_here(&t->h, t->fix[f].rel32);
}

/* False: some instruction turned out to need its handler, and liveness must be worked out anew. */
static bool walk(struct tr *t)
{
	bool again = false;

	entry(t);
	for (unsigned p = 0; p < t->nparts && !t->failed; p++) {
		unsigned n = t->part[p].first, end = n + t->part[p].n;

		begin_part(t, p);
		while (n < end && !t->failed) {
			unsigned done = gen_stack_group(t, n, end);
			struct row r;

			if (!done && (done = row_find(t, n, end, &r)))
				again |= !walk_row(t, n, done, &r);
			else if (!done)
				again |= !walk_insn(t, n);
			for (done = done ? done : 1; done; done--)
				hold_behind(t, n++);
		}
		if (t->t[n - 1].end == END_NONE)
			gen_edge(t, tr_end(t, n - 1), n - 1, true);
	}
	if (again || t->failed)
		return false;
	gen_colds(t);
	return true;
}

/* For perf(1): one line, whole, whatever other vCPUs write. */
static void note(struct tr *t, const uint8_t *start)
{
	char line[80];
	int n;

	if (t->j->perf_fd < 0)
		return;
	n = snprintf(line, sizeof line, "%" PRIxPTR " %zx guest:%" PRIx64 "\n", (uintptr_t)(t->j->rx + (start - t->j->rw)),
		     (size_t)(t->h.p - start), t->k->rip);
	if (write(t->j->perf_fd, line, (size_t)n) != n)
		t->j->perf_fd = -1;     /* the file system is full */
}

/* Of a table's `size`, what its vCPU may use: vCPUs that came later want their part of the VM's. */
static size_t part_of(const struct jit *j, size_t size)
{
	uint64_t n = atomic_load_explicit(&j->c->vm->ncpus, memory_order_relaxed), share = jit_share(j->c->vm->policy.code_bytes, MAX(n, (uint64_t)1));

	share = MAX(share, (uint64_t)JIT_BYTES_MIN);
	return share >= j->bytes ? size : (size_t)((double)size * (double)share / (double)j->bytes);
}

static bool in(size_t used, size_t more, size_t size) { return used + more <= size; }

static bool has_room(const struct jit *j, size_t (*size_of)(const struct jit *, size_t))
{
	return in(j->npoints, POINTS_MAX, size_of(j, j->points_max)) && in(j->nspans, 1, size_of(j, j->spans_max)) && in(j->hot, HOT_MAX + THUNKS_MAX, size_of(j, j->hot_size)) &&
	       in(j->cold, COLD_MAX, size_of(j, j->size - j->hot_size)) && in(j->arena, ARENA_MAX, size_of(j, j->arena_size));
}

static void room(struct jit *j)
{
	if (!has_room(j, part_of))
		jit_flush(j->c);
}

static void count(struct tr *t, size_t bytes)
{
	struct softkvm_stats *s = &t->c->stats;
	const struct jit *j = t->j;

	s->translations++;
	s->translated_insns += t->n;
	s->translated_bytes += bytes;
	s->code_used = j->hot + j->cold + j->arena + (j->npoints + j->nspans) * sizeof *j->points;
}

/* `k`, allocated last, keeps room for as many parts as there are. */
static void keep_parts(struct jit *j, struct jit_code *k, const struct tr *t)
{
	k->nparts = (uint8_t)t->nparts;
	for (unsigned p = 0; p < t->nparts; p++)
		k->part[p] = t->part[p].b;
	j->arena -= ALIGN_UP(sizeof *k, 16) - ALIGN_UP(offsetof(struct jit_code, part) + t->nparts * sizeof k->part[0], 16);
}

/* What was written is there to be executed; seen as memory to be written it need not be resident a second time. */
static void unmap_written(struct jit *j, size_t bytes)
{
	j->written += bytes;
	if (j->written < 1 << 20)
		return;
	j->written = 0;
	madvise(j->rw, j->size, MADV_DONTNEED);
}

struct jit_code *jit_translate(struct jit *j, struct block *b, uint64_t rip, uint32_t mode, bool in_line)
{
	struct tr *t = j->tr;
	bool apart = b->code_gen == j->gen && b->code && b->code->apart;
	struct jit_code *k;
	struct em h, cold;
	size_t arena;
	unsigned tries = 0;

	room(j);
	k = jit_arena(j, sizeof *k);
	h = (struct em){ j->rw + j->hot, j->rw + j->hot + HOT_MAX, false, jit_to_rx(j) };
	cold = (struct em){ j->rw + j->hot_size + j->cold, j->rw + j->hot_size + j->cold + COLD_MAX, false, jit_to_rx(j) };
	*k = (struct jit_code){ .b = b, .rip = rip, .mode = mode, .apart = apart,
				.in_line = in_line || (j->c->stats.translations & 1) < j->in_line };
	code_valid(j, k, 0);
	heat_begin(j, k);
	t->j = j;
	t->c = j->c;
	t->b = b;
	t->k = k;
	t->tlb = j->c->tlb;
	for (t->tlb_mode = 0; j->c->tlbs[t->tlb_mode] != t->tlb; t->tlb_mode++)
		;
	t->failed = false;
	t->bits = mode & BM_CODE64 ? 64 : 32;
	collect(t);
	keep_parts(j, k, t);
	jit_page_join(j, k);
	labels(t);
	map_choose(t);
	h.p = j->rw + j->hot;
	h.end = h.p + HOT_MAX;
	k->hot = (uint32_t)j->hot;
	arena = j->arena;
	do {
		j->arena = arena;
		reset(t, &h, &cold);
		liveness(t);
		if (++tries > REGION_INSNS + 1)
			t->failed = true;
	} while (!t->failed && !walk(t));
	if (t->failed || t->h.full || t->cold.full) {
		b->runs = 0;
		return NULL;
	}
	points_keep(t);
	looks_keep(t);
	k->patched = (uint16_t)patch_count(k);
	note(t, h.p);
	em_align(&t->h);
	j->hot = (size_t)(t->h.p - j->rw);
	j->cold = (size_t)(t->cold.p - j->rw) - j->hot_size;
	count(t, (size_t)(t->h.p - h.p) + (size_t)(t->cold.p - cold.p));
	unmap_written(j, (size_t)(t->h.p - h.p) + (size_t)(t->cold.p - cold.p));
	jit_code_grown(j);
	jit_page_add(j, k);
	k->next = j->codes;
	j->codes = k;
	b->code = k;
	b->code_gen = j->gen;
	return k;
}
