/* Guest memory: edges of ranges, wrap-around, ROM, dirty log. No VM below. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "core/mem.h"

static struct guest_mem *make(void)
{
	struct guest_mem *m;
	assert_int_equal(guest_mem_create(&m, NULL, NULL), 0);
	assert_int_equal(guest_mem_add_ram(m, "high", 0x100000000, 0x4000, NULL, NULL), 0);
	assert_int_equal(guest_mem_add_ram(m, "low", 0, 0x8000, NULL, NULL), 0);
	assert_int_equal(guest_mem_add_ram(m, "next", 0x8000, 0x1000, NULL, NULL), 0);
	assert_int_equal(guest_mem_add_rom(m, "bios", 0xfffff000, 0x1000, NULL), 0);
	assert_int_equal(guest_mem_add_ram(m, "top", 0xfffffffffffff000, 0x1000, NULL, NULL), 0);
	return m;
}

static void test_edges(void **state)
{
	struct guest_mem *m = make();
	uint8_t buf[0x2000];
	memset(buf, 0x5a, sizeof buf);
	/* across two slots that touch, and not one byte further */
	assert_int_equal(gm_write(m, 0x7ff0, buf, 0x1010), 0);
	assert_int_equal(gm_write(m, 0x7ff0, buf, 0x1011), -EFAULT);
	assert_int_equal(gm_read(m, 0x8fff, buf, 1), 0);
	assert_int_equal(buf[0], 0x5a);
	assert_int_equal(gm_read(m, 0x9000, buf, 1), -EFAULT);
	assert_int_equal(gm_read(m, 0x9000, buf, 0), 0);
	/* ROM and the RAM behind it touch */
	assert_int_equal(gm_read(m, 0xfffffff0, buf, 0x20), 0);
	assert_int_equal(gm_write(m, 0xfffffff0, buf, 0x20), -EFAULT);
	assert_int_equal(gm_write_rom(m, 0xfffffff0, "rom", 3), 0);
	assert_int_equal(gm_read(m, 0xfffffff0, buf, 3), 0);
	assert_memory_equal(buf, "rom", 3);
	/* wrap */
	assert_int_equal(gm_read(m, UINT64_MAX, buf, 1), 0);
	assert_int_equal(gm_read(m, UINT64_MAX, buf, 2), -EFAULT);
	assert_int_equal(gm_write(m, 0xfffffffffffff000, buf, 0x1001), -EFAULT);
	assert_int_equal(gm_fill(m, 0, 0, SIZE_MAX), -EFAULT);
	assert_int_equal(gm_fill(m, 0x10, 7, 0x10), 0);
	guest_mem_destroy(m);
}

static void test_nothing_written_on_failure(void **state)
{
	struct guest_mem *m = make();
	uint8_t b = 0;
	uint8_t big[64];
	memset(big, 0xff, sizeof big);
	assert_int_equal(gm_write(m, 0x8fe0, big, 64), -EFAULT);
	assert_int_equal(gm_read(m, 0x8fe0, &b, 1), 0);
	assert_int_equal(b, 0);
	guest_mem_destroy(m);
}

static void test_ptr(void **state)
{
	struct guest_mem *m = make();
	uint16_t v;
	assert_non_null(gm_ptr(m, 0, 0x8000, MEM_WRITE));
	assert_null(gm_ptr(m, 0, 0x8001, MEM_WRITE));     /* one slot only */
	assert_null(gm_ptr(m, 1, SIZE_MAX, MEM_READ));
	assert_null(gm_ptr(m, 0xfffff000, 4, MEM_WRITE));
	assert_non_null(gm_ptr(m, 0xfffff000, 4, MEM_READ));
	assert_null(gm_ptr(m, 0x200000000, 0, MEM_READ));
	assert_int_equal(gm_write_u16(m, 0x7ffe, 0x1234), 0);
	assert_int_equal(gm_read_u16(m, 0x7ffe, &v), 0);
	assert_int_equal(v, 0x1234);
	assert_int_equal(gm_read_u16(m, 0x7fff, &v), -EFAULT);
	assert_int_equal(gm_write_u16(m, 0xfffffff0, 1), -EFAULT);
	guest_mem_destroy(m);
}

static void test_bad_ranges(void **state)
{
	struct guest_mem *m = make();
	struct err e = { 0 };
	assert_int_equal(guest_mem_add_ram(m, "over", 0x8000, 0x1000, NULL, &e), -EBUSY);
	assert_non_null(strstr(e.msg, "'next'"));
	assert_int_equal(guest_mem_add_ram(m, "zero", 0x20000, 0, NULL, NULL), -EINVAL);
	assert_int_equal(guest_mem_add_ram(m, "odd", 0x20001, 0x1000, NULL, NULL), -EINVAL);
	assert_int_equal(guest_mem_add_ram(m, "wrap", 0xffffffffffffe000, 0x3000, NULL, NULL), -EINVAL);
	err_clear(&e);
	assert_true(guest_mem_add_ram(m, "vast", 1ull << 40, 1ull << 60, NULL, &e) < 0);
	assert_non_null(strstr(e.msg, "'vast'"));
	struct mem_backing huge = { .huge = true };
	assert_true(guest_mem_add_ram(m, "huge", 1ull << 33, 0x1000, &huge, NULL) < 0);
	struct mem_backing pre = { .prealloc = true };
	assert_int_equal(guest_mem_add_ram(m, "pre", 1ull << 33, 0x10000, &pre, NULL), 0);
	struct mem_backing private = { .private = true };
	struct mem_range r;
	assert_int_equal(guest_mem_add_ram(m, "private", 1ull << 34, 0x10000, &private, NULL), 0);
	for (unsigned n = 0; guest_mem_range(m, n, &r); n++)
		assert_int_equal(r.fd < 0, !strcmp(r.name, "private"));
	guest_mem_destroy(m);
}

static void test_ranges_and_dirty(void **state)
{
	struct guest_mem *m = make();
	struct mem_range r;
	uint64_t last = 0;
	unsigned n = 0;
	for (; guest_mem_range(m, n, &r); n++) {
		assert_true(n == 0 || r.gpa > last);
		last = r.gpa;
		assert_int_equal(((uintptr_t)r.host ^ r.gpa) & 0x1fffff, 0);
	}
	assert_int_equal(n, 5);
	assert_int_equal(guest_mem_ram_size(m), 0x8000 + 0x1000 + 0x4000 + 0x1000);
	gm_fill(m, 0, 1, 1);
	assert_false(guest_mem_dirty_take(m, 0));
	assert_int_equal(guest_mem_dirty_log(m, true), 0);
	gm_fill(m, 0x1fff, 1, 2);
	gm_write_u16(m, 0x8000, 1);
	assert_false(guest_mem_dirty_take(m, 0));
	assert_true(guest_mem_dirty_take(m, 0x1000));
	assert_false(guest_mem_dirty_take(m, 0x1000));
	assert_true(guest_mem_dirty_take(m, 0x2abc));
	assert_false(guest_mem_dirty_take(m, 0x3000));
	assert_true(guest_mem_dirty_take(m, 0x8000));
	assert_false(guest_mem_dirty_take(m, 0x9000));
	guest_mem_destroy(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_edges), cmocka_unit_test(test_nothing_written_on_failure), cmocka_unit_test(test_ptr),
		cmocka_unit_test(test_bad_ranges), cmocka_unit_test(test_ranges_and_dirty),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
