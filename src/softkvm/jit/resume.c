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
#include <sys/mman.h>

#include "softkvm/fault.h"
#include "softkvm/jit/internal.h"

/* -- life ---------------------------------------------------------------------------------------- */
int points_map(struct jit *j, size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return -errno;
	jit_records_huge(p, bytes);
	j->points = p;
	j->points_max = (uint32_t)(bytes / sizeof *j->points);
	return 0;
}

void points_unmap(struct jit *j)
{
	if (j->points)
		munmap(j->points, j->points_max * sizeof *j->points);
}

/* -- while code is made --------------------------------------------------------------------------- */
static uint32_t here(const struct tr *t) { return (uint32_t)(t->h.p - t->j->rw); }

/* What lies behind was emitted and taken back. */
static void forget_behind(struct tr *t)
{
	const struct jit_point *p = t->j->points + t->j->npoints;

	while (t->npoints && p[t->npoints - 1].at >= here(t))
		t->npoints--;
}

void gen_point(struct tr *t, unsigned n)
{
	struct jit_point *p = t->j->points + t->j->npoints;

	forget_behind(t);
	if (t->swapped || t->npoints == POINTS_MAX) {
		t->failed = true;
		return;
	}
	p[t->npoints++] = (struct jit_point){
		.at = here(t), .code = (uint32_t)(uintptr_t)t->k, .rip = (int16_t)(t->t[n].rip - t->k->rip),
		.rsp = t->rsp_off, .host_flags = t->in_host && !t->in_mem,
	};
}

void points_keep(struct tr *t)
{
	forget_behind(t);
	t->j->npoints += t->npoints;
}

/* -- when it runs --------------------------------------------------------------------------------- */
static const struct jit_point *find(const struct jit *j, uint32_t at)
{
	uint32_t lo = 0, hi = j->npoints;

	while (lo < hi) {
		uint32_t mid = lo + (hi - lo) / 2;

		if (j->points[mid].at < at)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < j->npoints && j->points[lo].at == at ? &j->points[lo] : NULL;
}

static void take_registers(struct cpu *c, const struct jit_point *p, const greg_t *r)
{
	static const uint8_t reg[16] = {
		REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12,
		REG_R13, REG_R14, REG_R15,
	};
	const struct jit_code *k = (const struct jit_code *)(uintptr_t)p->code;
	int8_t map[16];

	map_of(map, k->map);
	for (unsigned g = 0; g < 16; g++)
		if (map[g] >= 0)
			c->gpr[g] = (uint64_t)r[reg[map[g]]];
	if (p->rsp) {
		c->gpr[R_RSP] += (uint64_t)(int64_t)p->rsp;
		if (!(k->mode & BM_CODE64))
			c->gpr[R_RSP] = (uint32_t)c->gpr[R_RSP];
	}
	if (p->host_flags)
		c->aflags = aflags_from((uint64_t)r[REG_EFL]);
	c->rip = jit_code_rip(k) + (uint64_t)(int64_t)p->rip;
}

bool jit_fault(struct cpu *c, struct fault *f)
{
	greg_t *r = f->uc->uc_mcontext.gregs;
	const struct jit_point *p;
	struct jit *j = c->jit;

	if (!j || f->pc - (uintptr_t)j->rx >= j->size)
		return false;
	p = find(j, (uint32_t)(f->pc - (uintptr_t)j->rx));
	if (!p || ((f->sig == SIGSEGV || f->sig == SIGBUS) && !f->client)) {
		f->client = false;      /* nor can C code go on from here */
		return false;
	}
	take_registers(c, p, r);
	j->alone = true;
	j->alone_rip = c->rip;
	c->stats.host_faults++;
	r[REG_RAX] = 0;                 /* as `leave`, by no link */
	r[REG_RIP] = (greg_t)(uintptr_t)(j->rx + j->abandon);
	return true;
}
