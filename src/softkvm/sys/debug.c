/* Debug registers: what makes loop and MMU look, and breakpoints on I/O (SDM vol. 3 ch. 18). */
#include "softkvm/sys/sysint.h"

/* The registers in force: guest debugging puts its own in place of the guest's. */
static const uint64_t *bp_addrs(const struct cpu *c, uint64_t *dr7)
{
	if (c->dbg.enabled && c->dbg.hw_bp) {
		*dr7 = c->dbg.dr7;
		return c->dbg.dr;
	}
	*dr7 = c->dr[7];
	return c->dr;
}

static inline bool bp_on(uint64_t dr7, unsigned n) { return dr7 >> (2 * n) & 3; }
static inline unsigned bp_type(uint64_t dr7, unsigned n) { return dr7 >> (16 + 4 * n) & 3; }
static inline unsigned bp_len(uint64_t dr7, unsigned n)
{
	static const uint8_t len[4] = { 1, 2, 8, 4 };

	return len[dr7 >> (18 + 4 * n) & 3];
}

void debug_update(struct cpu *c)
{
	bool data = false, code = false;
	uint64_t dr7;

	bp_addrs(c, &dr7);
	for (unsigned n = 0; n < 4; n++) {
		if (!bp_on(dr7, n))
			continue;
		if (bp_type(dr7, n) == 0)
			code = true;
		else
			data = true;
	}
	c->code_bp = code;
	c->data_bp = data;
	if (data)       /* pages with a breakpoint leave the fast path */
		mmu_flush_all(c);
	event_update_one_insn(c);
}

static void record(struct cpu *c, unsigned n)
{
	c->trap_db = true;
	c->trap_dr6 |= 1u << n;
	if (c->cur)
		cpu_leave_after(c);
}

void debug_io_access(struct cpu *c, uint16_t port, unsigned size)
{
	uint64_t dr7;
	const uint64_t *dr = bp_addrs(c, &dr7);

	if (!c->data_bp || !(c->cr4 & CR4_DE))
		return;
	for (unsigned n = 0; n < 4; n++) {
		unsigned len = bp_len(dr7, n);
		uint64_t a = dr[n] & ~(uint64_t)(len - 1);

		if (bp_on(dr7, n) && bp_type(dr7, n) == 2 && ranges_overlap(a, len, port, size))
			record(c, n);
	}
}
