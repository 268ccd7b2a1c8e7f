/* The option grammar: commas, implied keys, switches, JSON, typed values, leftovers. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/util.h"
#include "base/keyvals.h"

static void test_words(void **state)
{
	struct keyvals l;

	assert_int_equal(keyvals_parse(&l, "-d", "virtio-blk-pci,drive=a,,b,packed,noevent_idx,x=1=2,y=", "driver", NULL), 0);
	assert_string_equal(keyvals_get(&l, "driver"), "virtio-blk-pci");
	assert_string_equal(keyvals_get(&l, "drive"), "a,b");
	assert_string_equal(keyvals_get(&l, "packed"), "on");
	assert_string_equal(keyvals_get(&l, "event_idx"), "off");
	assert_string_equal(keyvals_get(&l, "x"), "1=2");
	assert_int_equal(keyvals_end(&l, "-d", NULL), -EINVAL);
	assert_string_equal(keyvals_get(&l, "y"), "");
	assert_int_equal(keyvals_end(&l, "-d", NULL), 0);
	char *text = keyvals_text(&l, "driver", (const char *[]){ "x", "y", NULL });
	assert_string_equal(text, "virtio-blk-pci,drive=a,,b,packed=on,event_idx=off");
	free(text);
	keyvals_free(&l);
}

static void test_json(void **state)
{
	struct keyvals l;
	struct err err = { 0 };

	assert_int_equal(keyvals_parse(&l, "-b", "{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/a,b\"},"
				       "\"read-only\":true,\"n\":5,\"list\":[1,\"z\"]}", "driver", NULL), 0);
	assert_string_equal(keyvals_get(&l, "file.filename"), "/a,b");
	assert_string_equal(keyvals_get(&l, "read-only"), "on");
	assert_string_equal(keyvals_get(&l, "n"), "5");
	assert_string_equal(keyvals_get(&l, "list.1"), "z");
	keyvals_free(&l);
	assert_int_equal(keyvals_parse(&l, "-b", "{\"driver\":", NULL, &err), -EINVAL);
	assert_non_null(strstr(err.msg, "JSON"));
	assert_int_equal(l.n, 0);
}

static void test_bad(void **state)
{
	static const char *const bad[] = { "", "=x", "a=1,=2", "a=1,,,b=2,," };
	struct keyvals l;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(keyvals_parse(&l, "-d", bad[i], "driver", NULL), -EINVAL);
}

static void test_typed(void **state)
{
	struct keyvals l;
	struct err err = { 0 };
	bool b = false;
	uint64_t n = 7;

	assert_int_equal(keyvals_parse(&l, "-smp", "cpus=4,cores=99,on=yes,off=maybe,usb=on,menu=off", NULL, NULL), 0);
	assert_int_equal(keyvals_u64(&l, "-smp", "cpus", 1, 64, &n, NULL), 0);
	assert_int_equal(n, 4);
	assert_int_equal(keyvals_u64(&l, "-smp", "absent", 1, 64, &n, NULL), 0);
	assert_int_equal(n, 4);
	assert_int_equal(keyvals_u64(&l, "-smp", "cores", 1, 64, &n, &err), -EINVAL);
	assert_non_null(strstr(err.msg, "-smp: cores=99"));
	assert_int_equal(keyvals_bool(&l, "-smp", "on", &b, NULL), 0);
	assert_true(b);
	assert_int_equal(keyvals_bool(&l, "-smp", "off", &b, NULL), -EINVAL);
	assert_int_equal(keyvals_only(&l, "-smp", "usb", "off|auto", NULL), -ENOTSUP);
	assert_int_equal(keyvals_only(&l, "-smp", "menu", "auto|off", NULL), 0);
	keyvals_free(&l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_words), cmocka_unit_test(test_json), cmocka_unit_test(test_bad), cmocka_unit_test(test_typed),
	};
	return cmocka_run_group_tests_name("keyvals", tests, NULL, NULL);
}
