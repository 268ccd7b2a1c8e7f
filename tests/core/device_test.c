/* Device properties of every type, their errors, and the life of a device. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/util.h"
#include "core/device.h"

struct thing {
	struct device d;
	bool b;
	uint8_t u8;
	uint16_t u16;
	uint32_t u32;
	uint64_t u64, size;
	char *str;
	uint8_t mac[6];
	int32_t addr;
	void *drive, *netdev;
	int mode;
};

#define P(n, t, f, ...) { .name = n, .type = t, .offset = offsetof(struct thing, f), __VA_ARGS__ }
static const char *const modes[] = { "slow", "fast", NULL };
static const struct prop props[] = {
	P("flag", PROP_BOOL, b, .dflt = 1), P("small", PROP_U8, u8, .dflt = 3), P("port", PROP_U16, u16, .dflt = 0x3f8),
	P("queues", PROP_U32, u32, .min = 1, .max = 64, .dflt = 1), P("wide", PROP_U64, u64), P("bytes", PROP_SIZE, size, .dflt = 4096),
	P("serial", PROP_STR, str, .dflt_str = "none"), P("mac", PROP_MAC, mac), P("addr", PROP_PCI_ADDR, addr),
	P("drive", PROP_DRIVE, drive), P("netdev", PROP_NETDEV, netdev), P("mode", PROP_ENUM, mode, .values = modes, .dflt_str = "fast"),
	{ NULL },
};

static int created, destroyed;
static int create(struct device *d, struct err *err)
{
	if (((struct thing *)d)->u8 == 99)
		return err_set(err, -EINVAL, "99 is too many");
	created++;
	return 0;
}
static void destroy(struct device *d)
{
	destroyed++;
}
static const struct device_class cls = { .name = "thing", .props = props, .size = sizeof(struct thing), .create = create,
					 .destroy = destroy };

static void *find(void *opaque, enum prop_type type, const char *id, struct err *err)
{
	return type == PROP_DRIVE && !strcmp(id, "d0") ? opaque : NULL;
}

static int set(struct thing *t, const char *name, const char *value, struct err *e)
{
	static int backend;
	struct backend_lookup l = { find, &backend };
	err_clear(e);
	return device_set_prop(&t->d, name, value, &l, e);
}

static void test_values(void **state)
{
	struct device *d;
	struct err e = { 0 };
	assert_int_equal(device_alloc(&d, &cls, NULL, "t0", &e), 0);
	struct thing *t = (struct thing *)d;
	assert_true(t->b && t->u8 == 3 && t->u16 == 0x3f8 && t->size == 4096 && t->addr == -1 && t->mode == 1);
	assert_string_equal(t->str, "none");
	static const char *const ok[][2] = {
		{ "flag", "off" }, { "small", "255" }, { "port", "0x2f8" }, { "queues", "64" }, { "wide", "18446744073709551615" },
		{ "bytes", "1.5M" }, { "serial", "abc,def" }, { "mac", "52:54:00:12:34:56" }, { "addr", "1f.7" },
		{ "drive", "d0" }, { "mode", "slow" },
	};
	for (size_t i = 0; i < ARRAY_SIZE(ok); i++)
		assert_int_equal(set(t, ok[i][0], ok[i][1], &e), 0);
	assert_true(!t->b && t->u8 == 255 && t->u16 == 0x2f8 && t->u32 == 64 && t->u64 == UINT64_MAX && t->size == 3 << 19);
	assert_string_equal(t->str, "abc,def");
	assert_int_equal(t->addr, 0xff);
	assert_int_equal(t->mode, 0);
	assert_non_null(t->drive);
	assert_int_equal(set(t, "addr", "3", &e), 0);
	assert_int_equal(t->addr, 0x18);
	static const char *const bad[][3] = {
		{ "flag", "maybe", "on, off" }, { "small", "256", "0 to 255" }, { "queues", "0", "1 to 64" }, { "queues", "65", "1 to 64" },
		{ "wide", "-1", "number" }, { "bytes", "1Z", "size" }, { "mac", "52:54", "six bytes" },
		{ "mac", "01:00:00:00:00:01", "unicast" }, { "addr", "20", "1f.7" }, { "addr", "3.8", "1f.7" }, { "addr", "3.", "1f.7" },
		{ "addr", "", "1f.7" }, { "addr", "-1", "1f.7" }, { "drive", "d1", "id 'd1'" }, { "mode", "fats", "slow, fast" }, { "netdev", "n0", "-netdev" },
		{ "seriall", "x", "did you mean 'serial'" }, { "zzzzzz", "x", "valid: flag, small" },
	};
	for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
		assert_true(set(t, bad[i][0], bad[i][1], &e) < 0);
		if (!strstr(e.msg, bad[i][2]) || !strstr(e.msg, "t0"))
			fail_msg("message: %s", e.msg);
	}
	assert_int_equal(device_create(d, &e), 0);
	assert_int_equal(created, 1);
	device_free(d);
	assert_int_equal(destroyed, 1);
}

static void test_failed_create(void **state)
{
	struct device *d;
	struct err e = { 0 };
	assert_int_equal(device_alloc(&d, &cls, NULL, NULL, &e), 0);
	((struct thing *)d)->u8 = 99;
	assert_int_equal(device_create(d, &e), -EINVAL);
	assert_string_equal(e.msg, "device thing: 99 is too many");
	int before = destroyed;
	device_free(d);
	assert_int_equal(destroyed, before);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_values), cmocka_unit_test(test_failed_create) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
