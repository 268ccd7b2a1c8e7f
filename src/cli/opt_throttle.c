/* Limits in -drive (bps=, throttling.bps-total=), -object throttle-group (x-bps-total=, limits.bps-total=). */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/parse.h"
#include "base/util.h"
#include "cli/options.h"

static const char *const legacy[THROTTLE_BUCKETS] = { "bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr" };

static int number(struct keyvals *l, const char *what, const char *key, uint64_t *v, struct err *err)
{
	const char *text = keyvals_get(l, key);

	if (text && parse_size(text, 1, v))
		return err_set(err, -EINVAL, "%s: %s=%s is no number", what, key, text);
	return 0;
}

/* One value under both spellings; the later one in `keys` wins. */
static int value(struct keyvals *l, const char *what, const char *prefix, unsigned b, const char *suffix, uint64_t *v, struct err *err)
{
	char key[96];
	int ret = 0;

	if (!*prefix || !strcmp(prefix, "throttling.")) {
		snprintf(key, sizeof key, "%s%s%s", legacy[b], *suffix ? "_" : "", suffix);
		ret = number(l, what, key, v, err);
	}
	if (ret)
		return ret;
	snprintf(key, sizeof key, "%s%s%s%s", prefix, throttle_name(b), *suffix ? "-" : "", strcmp(suffix, "max_length") ? suffix : "max-length");
	return number(l, what, key, v, err);
}

int throttle_keys(struct keyvals *l, const char *what, const char *prefix, struct throttle_limits *t, struct err *err)
{
	char key[64];
	int ret = 0;

	for (unsigned i = 0; !ret && i < THROTTLE_BUCKETS; i++) {
		if ((ret = value(l, what, prefix, i, "", &t->b[i].avg, err)) || (ret = value(l, what, prefix, i, "max", &t->b[i].max, err)))
			return ret;
		ret = value(l, what, prefix, i, "max_length", &t->b[i].burst_length, err);
	}
	snprintf(key, sizeof key, "%siops-size", prefix);
	if (!ret)
		ret = number(l, what, key, &t->op_size, err);
	if (!ret && !strcmp(prefix, "throttling."))
		ret = number(l, what, "iops_size", &t->op_size, err);
	ret = ret ? ret : throttle_check(t, err);
	return ret ? err_prefix(err, "%s", what) : 0;
}

int opt_throttle_group(struct vm_opts *o, struct vm_object *obj, struct err *err)
{
	struct vm_throttle *t = vmopts_add(o, throttles);

	t->name = obj->id;
	int ret = throttle_keys(&obj->opts, "-object throttle-group", "x-", &t->limits, err);
	return ret ? ret : throttle_keys(&obj->opts, "-object throttle-group", "limits.", &t->limits, err);
}
