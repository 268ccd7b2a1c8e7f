/*
 * Which translations run much. Most of a large program's code runs seldom, and what it costs is the room that it takes in caches: its checks are
 * calls (gen_check()). Where the budget ends tells where the guest is, so the loop counts that. A translation where it ends often within a while
 * is made anew, with its checks in line; nothing leads to it until then. Compiled as look.c, which calls it.
 */
#include "softkvm/jit/internal.h"

#define WHILE 8192u     /* budgets: some 150 ms of the guest's */
#define BUDGETS 5
#define ROWS_MISSED 200u

static void want(struct jit *j, struct jit_code *k)
{
	k->wanted = true;
	jit_cut_incoming(j, k);
	code_moves(j, k);       /* nor is it found by lookups */
	jit_page_hide(j, k);
}

/*
 * What shares a check lies on both sides of a page end, mostly: a run of pushes where the stack happens to be. Each time costs a call of the handlers, so where
 * that is often the accesses get a check each.
 */
bool heat_row_missed(struct jit *j, struct jit_code *k)
{
	if (k->apart || k->rows_missed == ROWS_MISSED || ++k->rows_missed < ROWS_MISSED)
		return false;
	j->rows = k;
	return true;
}

void heat_rows(struct jit *j)
{
	j->rows->apart = true;
	if (!j->rows->wanted)
		want(j, j->rows);
	j->rows = NULL;
}

void heat_begin(const struct jit *j, struct jit_code *k)
{
	k->heat_time = j->heat_time;
	k->budgets = 0;
}

bool heat_would_want(const struct jit *j, const struct jit_code *k)
{
	unsigned so_far = j->heat_time - k->heat_time >= WHILE ? 0 : k->budgets;

	return k->wanted || (!k->in_line && so_far + 1 >= (j->in_line ? 1 : BUDGETS));
}

void heat_budget(struct jit *j, struct jit_code *k)
{
	if (k->in_line || k->wanted)
		return;
	if (j->heat_time - k->heat_time >= WHILE)
		heat_begin(j, k);
	if (++k->budgets == (j->in_line ? 1 : BUDGETS))         /* tests are short */
		want(j, k);
}
