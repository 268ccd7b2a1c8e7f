/* Errors, log and number parsing. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "base/err.h"
#include "base/log.h"
#include "base/parse.h"
#include "base/util.h"

static void test_err(void **state)
{
	struct err e = { 0 };
	assert_int_equal(err_set(&e, -EINVAL, "first %d", 1), -EINVAL);
	assert_int_equal(err_set(&e, -EIO, "second"), -EIO);
	assert_string_equal(e.msg, "first 1");
	assert_int_equal(err_prefix(&e, "-drive"), -EINVAL);
	assert_string_equal(e.msg, "-drive: first 1");
	err_clear(&e);
	err_set_errno(&e, -ENOENT, "x");
	assert_string_equal(e.msg, "x: No such file or directory");
	assert_int_equal(err_set(NULL, -EIO, "nobody"), -EIO);
	char longtext[2000];
	memset(longtext, 'a', sizeof longtext - 1);
	longtext[sizeof longtext - 1] = 0;
	err_clear(&e);
	err_set(&e, -EIO, "%s", longtext);
	err_prefix(&e, "%s", longtext);
	assert_int_equal(strlen(e.msg), sizeof e.msg - 1);
}

static int lines;
static void count(enum log_level level, const char *line, void *opaque)
{
	lines++;
}

static void test_log(void **state)
{
	log_set_sink(count, NULL, LOG_WARN);
	log_info("hidden");
	log_warn("seen");
	assert_int_equal(lines, 1);
	lines = 0;
	struct log_limit l = { 0 };
	for (int i = 0; i < 1000; i++)
		log_limited(&l, LOG_WARN, "guest said %d", i);
	assert_in_range(lines, 10, 22); /* the second may change once in between */
	log_set_sink(NULL, NULL, LOG_WARN);
}

static void test_numbers(void **state)
{
	uint64_t v;
	assert_int_equal(parse_u64("18446744073709551615", &v), 0);
	assert_true(v == UINT64_MAX);
	assert_int_equal(parse_u64("18446744073709551616", &v), -ERANGE);
	assert_int_equal(parse_u64("0x10", &v), 0);
	assert_int_equal(v, 16);
	static const char *const bad[] = { "", " 1", "-1", "+1", "1 ", "1x", "0x", "x" };
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		assert_int_not_equal(parse_u64(bad[i], &v), 0);
}

static void test_sizes(void **state)
{
	static const struct { const char *s; uint64_t unit, want; } good[] = {
		{ "0", 1, 0 }, { "512", 1, 512 }, { "1k", 1, 1024 }, { "1G", 1 << 20, 1ull << 30 },
		{ "128", 1 << 20, 128ull << 20 }, { "1.5G", 1, 3ull << 29 }, { "0x1000", 1, 4096 },
		{ "15E", 1, 15ull << 60 }, { "0.5K", 1, 512 }, { "7B", 1 << 20, 7 },
	};
	static const char *const bad[] = { "", "-1", "1X", "1GG", "1.G", "1.5", "0.5B", ".5G", "16E", "99999999999999999999", "G",
					   "010", "1 G" };
	uint64_t v;
	for (size_t i = 0; i < ARRAY_SIZE(good); i++) {
		assert_int_equal(parse_size(good[i].s, good[i].unit, &v), 0);
		assert_true(v == good[i].want);
	}
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
		assert_int_not_equal(parse_size(bad[i], 1, &v), 0);
}

static void test_words(void **state)
{
	bool b = false;
	uint8_t mac[6];
	assert_int_equal(parse_bool("on", &b), 0);
	assert_true(b);
	assert_int_equal(parse_bool("false", &b), 0);
	assert_false(b);
	assert_int_equal(parse_bool("On", &b), -EINVAL);
	assert_int_equal(parse_mac("52:54:00:aB:34:56", mac), 0);
	assert_int_equal(mac[3], 0xab);
	assert_int_equal(parse_mac("52:54:00:12:34", mac), -EINVAL);
	assert_int_equal(parse_mac("52:54:00:12:34:5g", mac), -EINVAL);
	assert_int_equal(parse_mac("52:54:00:12:34:567", mac), -EINVAL);
	static const char *const names[] = { "serial", "drive", NULL, "bootindex" };
	assert_string_equal(parse_nearest("seral", names, 4), "serial");
	assert_string_equal(parse_nearest("boot-index", names, 4), "bootindex");
	assert_null(parse_nearest("zzz", names, 4));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_err), cmocka_unit_test(test_log), cmocka_unit_test(test_numbers),
		cmocka_unit_test(test_sizes), cmocka_unit_test(test_words),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
