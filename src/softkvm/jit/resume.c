/*
 * Faults of the host in translated code. What the host executes for the guest may trap there although the guest did nothing
 * wrong: the client unmapped the memory behind a check that passed, the host has no such instruction after all. For
 * each such place (a `point`) we know the guest's instruction and where its flags are; all other state is where the region's map says.
 * The signal handler puts it into struct cpu and lets the code be left in front of that instruction, which the interpreter
 * then executes: its handlers know what such a fault means (fault.h), or meet none.
 *
 * The rule for generators: no guest register and no memory changes before the last place of an instruction that can trap, and
 * gen_point() stands directly before each. A fault at any other place is a bug, and nobody goes on from it.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "softkvm/fault.h"
#include "softkvm/jit/internal.h"

#define POINTS_PER_SPAN 5       /* at the least: memory is divided so */

/* -- life ---------------------------------------------------------------------------------------- */
int points_map(struct jit *j, size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return -errno;
	jit_records_huge(p, bytes);
	j->spans = p;
	j->spans_max = (uint32_t)(bytes / sizeof *j->spans / POINTS_PER_SPAN);
	j->points = (struct jit_point *)(void *)(j->spans + j->spans_max);
	j->points_max = (uint32_t)(bytes / sizeof *j->points) - j->spans_max;
	return 0;
}

void points_unmap(struct jit *j)
{
	if (j->spans)
		munmap(j->spans, j->spans_max * sizeof *j->spans + j->points_max * sizeof *j->points);
}

/* -- while code is made --------------------------------------------------------------------------- */
static uint16_t here(const struct tr *t) { return (uint16_t)(t->h.p - (t->j->rw + t->k->hot)); }

static struct jit_point *point_new(struct tr *t)
{
	if (t->swapped || t->npoints == POINTS_MAX) {
		t->failed = true;
		t->npoints = 0;         /* no matter */
	}
	t->points[t->npoints] = (struct jit_point){ .at = here(t) };
	return &t->points[t->npoints++];
}

unsigned gen_point_check(struct tr *t)
{
	return (unsigned)(point_new(t) - t->points);
}

void gen_point(struct tr *t, unsigned n)
{
	struct jit_point *p = t->npoints ? &t->points[t->npoints - 1] : NULL;

	/* Right behind its check, whose point has no instruction yet: that will be the first of those that share it, and where rsp differs it is not. */
	if (!p || p->at != here(t) || (p->flags & POINT_TRAP) || t->rsp_off)
		p = point_new(t);
	p->n = (uint8_t)n;
	p->rsp = (int8_t)(t->rsp_off / (t->bits / 8));
	p->flags = POINT_TRAP | t->point_flags | (t->in_host && !t->in_mem ? POINT_HOST_FLAGS : 0) | (tr_64(t) ? 0 : POINT_32);
}

void points_keep(struct tr *t)
{
	struct jit *j = t->j;

	t->k->points = j->npoints;
	t->k->npoints = (uint16_t)t->npoints;
	memcpy(j->points + j->npoints, t->points, t->npoints * sizeof *t->points);
	j->npoints += t->npoints;
	j->spans[j->nspans++] = (struct jit_span){ t->k->hot, (uint32_t)(uintptr_t)t->k };
}

/* -- when it runs --------------------------------------------------------------------------------- */
struct jit_code *point_code(const struct jit *j, uint32_t at)
{
	uint32_t lo = 0, hi = j->nspans;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (j->spans[mid].hot <= at)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo ? (struct jit_code *)(uintptr_t)j->spans[lo - 1].code : NULL;
}

const struct jit_point *point_find(const struct jit *j, const struct jit_code *k, uint32_t at, bool check)
{
	const struct jit_point *p = j->points + k->points;
	uint32_t lo = 0, hi = k->npoints;

	at -= k->hot;
	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (p[mid].at < at)
			lo = mid + 1;
		else
			hi = mid;
	}
	for (; lo < k->npoints && p[lo].at == at; lo++)
		if (check ? p[lo].count : p[lo].flags & POINT_TRAP)
			return &p[lo];
	return NULL;
}

/* Which of the region's blocks has its instruction n, and as the how manieth. */
static const struct block *block_of(const struct jit_code *k, unsigned n, unsigned *part, unsigned *insn)
{
	for (*part = 0; *part + 1 < k->nparts && n >= k->part[*part]->n; ++*part)
		n -= k->part[*part]->n;
	*insn = n;
	return k->part[*part];
}

static int64_t block_delta(const struct jit_code *k, const struct block *b) { return (int64_t)(b->gpa & 4095) - (int64_t)(k->rip & 4095); }

/* The code that `from`, where a thunk was called, goes on at if all is well: in the cold part, where a jump there stands, maybe behind an xor. */
static uint32_t goes_on(const struct jit *j, uint64_t from)
{
	uint32_t at = (uint32_t)(from - (uintptr_t)j->rx);

	if (at < j->hot_size)
		return at;
	at += j->rx[at] == 0x31 ? 2 : 0;
	return at + 5 + ld_le32(j->rx + at + 1);
}

/*
 * A check failed, and no entry is to be had: the instructions go to their handlers. As jit_call_insn(); 0: on at jit_low.go_on.
 * Registers are in jit_low.regs.
 */
uint64_t jit_miss(struct jit *j, uint64_t from)
{
	uint32_t at = goes_on(j, from);
	struct jit_code *k = point_code(j, at);
	const struct jit_point *p = k ? point_find(j, k, at, true) : NULL;
	struct cpu *c = j->c;
	unsigned part, insn;
	const struct block *b;
	int8_t map[16];
	uint64_t r;

	if (!p)
		abort();                /* code that we did not make */
	b = block_of(k, p->n, &part, &insn);
	map_of(map, k->map);
	for (unsigned g = 0; g < 16; g++)
		if (map[g] >= 0)
			c->gpr[g] = j->low->regs[map[g]];
	r = jit_call_insn(c, &(struct jit_site){
		.code = (uint32_t)(uintptr_t)k, .delta = (int16_t)block_delta(k, b), .bytes = b->bytes, .n = b->n, .part = (uint8_t)part,
		.first = (uint8_t)insn, .count = p->count, .need = p->need });
	for (unsigned g = 0; g < 16; g++)
		if (map[g] >= 0)
			j->low->regs[map[g]] = c->gpr[g];
	j->low->go_on = (uintptr_t)(j->rx + k->hot + p->back);
	return p->count > 1 && heat_row_missed(j, k) ? 1 : r;
}

static void take_registers(struct cpu *c, const struct jit_code *k, const struct jit_point *p, const greg_t *r)
{
	static const uint8_t reg[16] = {
		REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12,
		REG_R13, REG_R14, REG_R15,
	};
	const struct block *b;
	unsigned part, insn;
	int8_t map[16];

	map_of(map, k->map);
	for (unsigned g = 0; g < 16; g++) {
		unsigned h = (unsigned)map[g];

		if (map[g] < 0)
			continue;
		if (h == H_RDI && (p->flags & POINT_RDI))
			h = ST;
		else if (h == H_RSI && (p->flags & POINT_RSI))
			h = SA;
		c->gpr[g] = (uint64_t)r[reg[h]];
	}
	if (p->rsp) {
		c->gpr[R_RSP] += (uint64_t)(int64_t)p->rsp * (p->flags & POINT_32 ? 4 : 8);
		if (!(k->mode & BM_CODE64))
			c->gpr[R_RSP] = (uint32_t)c->gpr[R_RSP];
	}
	if (p->flags & POINT_HOST_FLAGS)
		c->aflags = aflags_from((uint64_t)r[REG_EFL]);
	b = block_of(k, p->n, &part, &insn);
	c->rip = jit_code_rip(k) + (uint64_t)block_delta(k, b) + b->insn[insn].off;
}

bool jit_fault(struct cpu *c, struct fault *f)
{
	greg_t *r = f->uc->uc_mcontext.gregs;
	const struct jit_point *p;
	const struct jit_code *k;
	struct jit *j = c->jit;
	uint32_t at;

	if (!j || f->pc - (uintptr_t)j->rx >= j->size)
		return false;
	at = (uint32_t)(f->pc - (uintptr_t)j->rx);
	k = at < j->hot_size ? point_code(j, at) : NULL;
	p = k ? point_find(j, k, at, false) : NULL;
	if (!p || ((f->sig == SIGSEGV || f->sig == SIGBUS) && !f->client)) {
		f->client = false;      /* nor can C code go on from here */
		return false;
	}
	take_registers(c, k, p, r);
	j->alone = true;
	j->alone_rip = c->rip;
	c->stats.host_faults++;
	r[REG_RAX] = 0;                 /* as `leave`, by no link */
	r[REG_RIP] = (greg_t)(uintptr_t)(j->rx + j->abandon);
	return true;
}
