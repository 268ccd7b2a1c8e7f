/* Options that belong to an image format: of -drive, -blockdev, --image-opts and json: names. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/keyvals.h"
#include "base/parse.h"
#include "base/util.h"
#include "block/driver.h"

static int size_key(struct keyvals *l, const char *what, const char *key, uint64_t *v, const char **given, struct err *err)
{
	const char *s = keyvals_get(l, key);
	if (!s)
		return 0;
	*given = key;
	return parse_size(s, 1, v) || *v > INT64_MAX ? err_set(err, -EINVAL, "%s: %s=%s is not a size", what, key, s) : 0;
}

static int tri_key(struct keyvals *l, const char *what, const char *key, enum block_tristate *v, const char **given, struct err *err)
{
	bool on = false;
	if (!keyvals_get(l, key))
		return 0;
	*given = key;
	int r = keyvals_bool(l, what, key, &on, err);
	*v = on ? TRI_ON : TRI_OFF;
	return r;
}

/*
 * Which writes are checked against the image's own metadata. All are, always (q_is_meta), so every value that asks for less than
 * everything gets more; what matters is that a wrong word is not taken for a right one.
 */
static int overlap_keys(struct keyvals *l, const char *what, const char **given, struct err *err)
{
	static const char *const parts[] = { "main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
					     "inactive-l1", "inactive-l2", "bitmap-directory" };
	static const char *const words[] = { "overlap-check", "overlap-check.template" };
	char key[64];
	bool on;
	int r = 0;
	for (size_t i = 0; !r && i < ARRAY_SIZE(words); i++) {
		if (keyvals_get(l, words[i]))
			*given = words[i];
		r = keyvals_only(l, what, words[i], "none|constant|cached|all", err);
	}
	for (size_t i = 0; !r && i < ARRAY_SIZE(parts); i++) {
		snprintf(key, sizeof key, "overlap-check.%s", parts[i]);
		if (keyvals_get(l, key))
			*given = "overlap-check";
		r = keyvals_bool(l, what, key, &on, err);
	}
	return r;
}

/* QEMU's rule: two of the three say the third. */
static int cache_sizes(struct block_format_opts *f, const char *what, struct err *err)
{
	if (!f->cache_size)
		return 0;
	if (f->l2_cache && f->ref_cache)
		return err_set(err, -EINVAL, "%s: cache-size, l2-cache-size and refcount-cache-size may not be set at the same time", what);
	if (f->l2_cache > f->cache_size)
		return err_set(err, -EINVAL, "%s: l2-cache-size may not exceed cache-size", what);
	if (f->ref_cache > f->cache_size)
		return err_set(err, -EINVAL, "%s: refcount-cache-size may not exceed cache-size", what);
	if (f->l2_cache)
		f->ref_cache = f->cache_size - f->l2_cache;
	else
		f->l2_cache = f->cache_size - f->ref_cache;
	return 0;
}

static int qcow2_keys(struct keyvals *l, const char *what, struct block_format_opts *f, struct err *err)
{
	const char **q = &f->qcow2_only;
	int r;
	if ((r = size_key(l, what, "cache-size", &f->cache_size, q, err)) || (r = size_key(l, what, "l2-cache-size", &f->l2_cache, q, err)) ||
	    (r = size_key(l, what, "refcount-cache-size", &f->ref_cache, q, err)) ||
	    (r = size_key(l, what, "l2-cache-entry-size", &f->l2_entry, q, err)) ||
	    (r = tri_key(l, what, "lazy-refcounts", &f->lazy, q, err)) ||
	    (r = tri_key(l, what, "pass-discard-request", &f->pass_request, q, err)) ||
	    (r = tri_key(l, what, "pass-discard-snapshot", &f->pass_snapshot, q, err)) ||
	    (r = tri_key(l, what, "pass-discard-other", &f->pass_other, q, err)) || (r = overlap_keys(l, what, q, err)))
		return r;
	if (keyvals_get(l, "cache-clean-interval"))
		*q = "cache-clean-interval";
	r = keyvals_u64(l, what, "cache-clean-interval", 0, UINT32_MAX, &f->clean_interval, err);
	return r ? r : cache_sizes(f, what, err);
}

int block_format_keys(struct keyvals *l, const char *what, struct block_opts *o, struct err *err)
{
	struct block_format_opts *f = &o->fmt;
	int r = qcow2_keys(l, what, f, err);
	if (r || (r = size_key(l, what, "offset", &f->offset, &f->raw_only, err)))
		return r;
	f->has_size = keyvals_get(l, "size");
	r = size_key(l, what, "size", &f->size, &f->raw_only, err);
	return !r && f->has_size && f->size % 512 ? err_set(err, -EINVAL, "%s: Specified size is not multiple of 512", what) : r;
}

int block_format_check(const struct block_opts *o, const char *what, const char *format, struct err *err)
{
	bool qcow2 = !strcmp(format, "qcow2"), raw = !strcmp(format, "raw");
	const char *wrong = !qcow2 && o->fmt.qcow2_only ? o->fmt.qcow2_only : !raw && o->fmt.raw_only ? o->fmt.raw_only :
			    !qcow2 && o->data_options ? "data-file" : !qcow2 && o->backing_options ? "backing" : NULL;
	return wrong ? err_set(err, -EINVAL, "%s: format %s has no option '%s'", what, format, wrong) : 0;
}
