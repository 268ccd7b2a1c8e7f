/*
 * Which translations run much. Most of a large program's code runs seldom, and what it costs is the room that it takes in caches: its checks are
 * calls (gen_check()). Such a translation counts how often it is entered, and the loop how often the budget ends in its loops. One that
 * runs much within a while is made anew, with its checks in line; nothing leads to it until then.
 */
#include "softkvm/jit/internal.h"

#define WHILE 4096u     /* budgets: some 50 ms of the guest's */
#define ENTRIES 1024
#define ENTRIES_TEST 10
#define BUDGETS 4

static void want(struct jit *j, struct jit_code *k)
{
	k->wanted = true;
	jit_cut_incoming(j, k);
	code_moves(j, k);       /* nor is it found by lookups */
	jit_page_hide(j, k);
}

void heat_begin(const struct jit *j, struct jit_code *k)
{
	*jit_count(j, k) = j->in_line ? ENTRIES_TEST : ENTRIES;
	k->heat_time = j->heat_time;
	k->budgets = 0;
}

void heat_entered(struct jit *j, struct jit_code *k)
{
	if (!k->wanted && j->heat_time - k->heat_time < WHILE)
		want(j, k);
	heat_begin(j, k);
}

void heat_budget(struct jit *j, struct jit_code *k)
{
	if (k->in_line || k->wanted)
		return;
	if (j->heat_time - k->heat_time >= WHILE)
		heat_begin(j, k);
	if (++k->budgets == BUDGETS)
		want(j, k);
}
