/* The integer families, and the slow halves their handlers share. */
#include "softkvm/interp/ops.h"

u64 ops_ld_slow(struct cpu *c, u64 lin, unsigned size)
{
	void *p = tlb_hit_r(c, lin, size);
	u64 v = 0;

	if (!p)
		mem_read_slow(c, lin, &v, size);
	else if (size == 8)
		v = ram_ld64(p);
	else if (size == 4)
		v = ram_ld32(p);
	else if (size == 2)
		v = ram_ld16(p);
	else
		v = ram_ld8(p);
	return v;
}

void ops_st_slow(struct cpu *c, u64 lin, u64 v, unsigned size)
{
	void *p = tlb_hit_w(c, lin, size);

	if (!p)
		mem_write_slow(c, lin, &v, size);
	else if (size == 8)
		ram_st64(p, v);
	else if (size == 4)
		ram_st32(p, (u32)v);
	else if (size == 2)
		ram_st16(p, (u16)v);
	else
		ram_st8(p, (u8)v);
}

static insn_family *const families[] = {
	ops_alu_decode, ops_lock_decode, ops_mov_decode, ops_branch_decode, ops_stack_decode, ops_shift_decode,
	ops_mul_decode, ops_bit_decode, ops_bmi_decode, ops_string_decode, ops_misc_decode,
};

bool ops_decode(struct insn *i, const struct decoded *d)
{
	const struct insn blank = *i;

	for (unsigned n = 0; n < ARRAY_SIZE(families); n++) {
		if (families[n](i, d))
			return true;
		*i = blank;
	}
	return false;
}
