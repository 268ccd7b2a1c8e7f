/*
 * What a name means: a path, a protocol's name, or json:{...}, the options of a format node over a protocol node. Names
 * come from the command line and from images (backing files).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/parse.h"
#include "base/util.h"
#include "block/driver.h"
#include "block/graph.h"
#include "block/nbd.h"

static const char *const unsupported[] = { "http:", "https:", "ftp:", "ftps:", "ssh:", "iscsi:", "rbd:", "nfs:", "gluster:", "gluster+tcp:",
					   "gluster+unix:", "nvme:", "fat:", "sheepdog:", "vxhs:", "host_cdrom:" };
static const char *const formats[] = { "raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx" };

static const char *const null_drivers[] = { "null-co", "null-aio" };

static bool null_is_name(const char *file)
{
	return !strncmp(file, "null-co:", 8) || !strncmp(file, "null-aio:", 9);
}

/* null-co:// and nothing behind it. */
static int null_name(struct block_opts *o, struct err *err)
{
	const char *colon = strchr(o->file, ':');
	if (strcmp(colon, "://"))
		return err_set(err, -EINVAL, "The only allowed filename for this driver is '%.*s://'", (int)(colon - o->file), o->file);
	o->null.on = true;
	o->null.size = 1 << 30;
	return 0;
}

static int null_keys(struct block_name *n, const char *driver, const char *what, struct err *err)
{
	struct keyvals *l = &n->leaf;
	n->o.null.on = true;
	n->o.null.size = 1 << 30;
	if (n->o.file)
		return err_set(err, -EINVAL, "%s: driver=%s has no filename", what, driver);
	n->o.file = !strcmp(driver, "null-co") ? "null-co://" : "null-aio://";
	const char *size = keyvals_get(l, "size");
	if (size && (parse_size(size, 1, &n->o.null.size) || n->o.null.size > INT64_MAX - 511))
		return err_set(err, -EINVAL, "%s: size=%s is not a size", what, size);
	int r = keyvals_u64(l, what, "latency-ns", 0, 1000000000 /* a backing name may say it */, &n->o.null.latency, err);
	if (!r)
		r = keyvals_bool(l, what, "read-zeroes", &n->o.null.zeroes, err);
	return r ? r : keyvals_end(l, what, err);
}

bool block_name_is_protocol(const char *file)
{
	const char *end = strpbrk(file, ":/");
	return end && *end == ':';
}

const char *block_plain_path(const char *file)
{
	return file + (!strncmp(file, "file:", 5) ? 5 : !strncmp(file, "host_device:", 12) ? 12 : 0);
}

static int check_device(const char *file, struct err *err)
{
	struct stat st;
	if (!stat(file, &st) && !S_ISBLK(st.st_mode) && !S_ISCHR(st.st_mode))
		return err_set(err, -EINVAL, "'host_device' driver requires '%s' to be either a character or block device", file);
	return 0;
}

static int check_supported(const char *file, struct err *err)
{
	if (!file || !*file)
		return err_set(err, -EINVAL, "drive: no file given (file=PATH)");
	for (size_t i = 0; i < ARRAY_SIZE(unsupported); i++) {
		if (!strncmp(file, unsupported[i], strlen(unsupported[i])))
			return err_set(err, -ENOTSUP, "%s: protocol '%.*s' is not supported; supported: files, block devices and nbd", file,
				       (int)strlen(unsupported[i]) - 1, unsupported[i]);
	}
	return 0;
}

static int check_name(const char *file, struct err *err)
{
	int r = check_supported(file, err);
	if (r)
		return r;
	if (!strncmp(file, "host_device:", 12))
		return check_device(block_plain_path(file), err);
	if (block_name_is_protocol(file) && block_plain_path(file) == file && !null_is_name(file) && !nbd_is_name(file) && !filter_is_name(file))
		return err_set(err, -EINVAL, "Unknown protocol '%.*s'; a file of that name is './%s'", (int)strcspn(file, ":"), file, file);
	return 0;
}

static bool is_format(const char *driver)
{
	for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
		if (!strcmp(driver, formats[i]))
			return true;
	}
	return false;
}

int block_aio_key(const char *what, const char *v, struct block_opts *b, struct err *err)
{
	static const char *const names[] = { [AIO_THREADS] = "threads", [AIO_NATIVE] = "native", [AIO_IO_URING] = "io_uring" };

	if (!v)
		return 0;
	for (unsigned i = AIO_THREADS; i < ARRAY_SIZE(names); i++)
		if (!strcmp(v, names[i]))
			b->aio = (enum block_aio)i;
	if (!b->aio)
		return err_set(err, -EINVAL, "%s: aio=%s is none of threads, native, io_uring", what, v);
	if (b->aio == AIO_NATIVE && b->cache != CACHE_NONE && b->cache != CACHE_DIRECTSYNC)
		return err_set(err, -EINVAL, "%s: aio=native was specified, but it requires cache.direct=on (cache=none or directsync)", what);
	return 0;
}

int block_node_keys(struct keyvals *l, const char *what, struct block_opts *o, struct err *err)
{
	bool direct = o->cache == CACHE_NONE || o->cache == CACHE_DIRECTSYNC, noflush = o->cache == CACHE_UNSAFE;
	bool writeback = o->cache != CACHE_WRITETHROUGH && o->cache != CACHE_DIRECTSYNC, had = keyvals_get(l, "cache.direct") || keyvals_get(l, "cache.no-flush");
	const char *v;
	int r;
	if ((r = keyvals_bool(l, what, "read-only", &o->read_only, err)) || (r = keyvals_bool(l, what, "auto-read-only", &o->auto_read_only, err)) ||
	    (r = keyvals_bool(l, what, "cache.direct", &direct, err)) || (r = keyvals_bool(l, what, "cache.no-flush", &noflush, err)) ||
	    (r = keyvals_bool(l, what, "force-share", &o->shared, err)))
		return r;
	o->node_name = keyvals_get(l, "node-name");
	if (had)
		o->cache = noflush ? CACHE_UNSAFE : direct ? (writeback ? CACHE_NONE : CACHE_DIRECTSYNC) : writeback ? CACHE_WRITEBACK : CACHE_WRITETHROUGH;
	if ((v = keyvals_get(l, "discard"))) {
		o->discard_unmap = !strcmp(v, "unmap") || !strcmp(v, "on");
		if (!o->discard_unmap && strcmp(v, "ignore") && strcmp(v, "off"))
			return err_set(err, -EINVAL, "%s: discard=%s is neither ignore nor unmap", what, v);
	}
	if ((v = keyvals_get(l, "detect-zeroes"))) {
		o->detect_zeroes = !strcmp(v, "on") || !strcmp(v, "unmap");
		if (!o->detect_zeroes && strcmp(v, "off"))
			return err_set(err, -EINVAL, "%s: detect-zeroes=%s is none of off, on, unmap", what, v);
	}
	return 0;
}

/* driver=file|host_device|nbd with its own keys in n->leaf; anything else that is known is a node of its own (n->below). */
static int leaf_keys(struct block_name *n, const char *what, struct err *err)
{
	struct keyvals *l = &n->leaf;
	const char *driver = keyvals_get(l, "driver"), *file = keyvals_get(l, "filename");
	n->below = driver ? is_format(driver) || filter_has_driver(driver) : file && filter_is_name(file);
	if (n->below)
		return 0;
	int r = block_node_keys(l, what, &n->o, err);
	if (r)
		return r;
	n->o.leaf = NULL;
	n->o.file = file;
	if ((!driver && file) || (driver && (!strcmp(driver, "file") || !strcmp(driver, "host_device")))) {
		if (!file)
			return err_set(err, -EINVAL, "%s: filename= is missing", what);
		if ((r = keyvals_only(l, what, "locking", "auto|on|off", err)) || (r = block_aio_key(what, keyvals_get(l, "aio"), &n->o, err)))
			return r;
		const char *locking = keyvals_get(l, "locking");
		n->o.no_lock |= locking && !strcmp(locking, "off");
		/* filename= is a path, whatever stands before a colon */
		r = !driver ? check_supported(file, err) : !strcmp(driver, "host_device") ? check_device(file, err) : 0;
		return r ? r : keyvals_end(l, what, err);
	}
	for (size_t i = 0; driver && i < ARRAY_SIZE(null_drivers); i++)
		if (!strcmp(driver, null_drivers[i]))
			return null_keys(n, null_drivers[i], what, err);
	if (driver && !strcmp(driver, "nbd")) {
		n->o.leaf = l;
		n->o.file = "nbd";
		return 0;
	}
	return err_set(err, -ENOTSUP, "%s: driver=%s is not supported ("BLOCK_FORMATS", " BLOCK_FILTERS ", file, host_device, nbd, null-co, null-aio)",
		       what, driver ? driver : "(none)");
}

/* What nbd.c does not know goes: generic keys were taken above. */
static void strip_generic(struct keyvals *l)
{
	static const char *const generic[] = { "node-name", "read-only", "auto-read-only", "cache.direct", "cache.no-flush", "discard",
					       "detect-zeroes", "force-share" };
	unsigned k = 0;
	for (unsigned i = 0; i < l->n; i++) {
		bool drop = false;
		for (size_t j = 0; j < ARRAY_SIZE(generic); j++)
			drop |= !strcmp(l->o[i].key, generic[j]);
		if (drop) {
			free(l->o[i].key);
			free(l->o[i].val);
		} else {
			l->o[k++] = l->o[i];
		}
	}
	l->n = k;
}

static bool has_prefix(const struct keyvals *l, const char *prefix)
{
	for (unsigned i = 0; i < l->n; i++) {
		if (!strncmp(l->o[i].key, prefix, strlen(prefix)))
			return true;
	}
	return false;
}

/* The nodes below besides the file. backing=null (which is an empty word): none, whatever the image says. */
static int children(struct block_name *n, const char *what, struct err *err)
{
	const char *v;
	if (keyvals_sub(&n->backing, &n->all, "backing."))
		n->o.backing_options = &n->backing;
	if (keyvals_sub(&n->data, &n->all, "data-file."))
		n->o.data_options = &n->data;
	if ((v = keyvals_get(&n->all, "backing"))) {
		if (*v)
			return err_set(err, -ENOENT, "%s: backing=%s names no node", what, v);
		n->o.no_backing = true;
	}
	if ((v = keyvals_get(&n->all, "data-file")))
		return err_set(err, -ENOENT, "%s: data-file=%s names no node", what, v);
	return 0;
}

/* A node that is neither a format nor a protocol: its driver takes the rest (filter_open). */
static int filter_options(struct block_name *n, const char *driver, const char *what, struct err *err)
{
	n->filter = driver;
	if (n->o.format && strcmp(n->o.format, driver) && strcmp(n->o.format, "raw"))
		return err_set(err, -EINVAL, "%s: driver=%s, but the format was given as %s", what, driver, n->o.format);
	return block_node_keys(&n->all, what, &n->o, err);
}

/* The name of a protocol's driver, for good; NULL: it is none. */
static const char *bare_driver(const char *driver)
{
	static const char *const protocols[] = { "file", "host_device", "nbd", "null-co", "null-aio" };
	for (size_t i = 0; driver && i < ARRAY_SIZE(protocols); i++) {
		if (!strcmp(driver, protocols[i]))
			return protocols[i];
	}
	return NULL;
}

static int from_options(struct block_name *n, const char *what, struct err *err)
{
	const char *driver = keyvals_get(&n->all, "driver"), *v;
	if (driver && filter_has_driver(driver))
		return filter_options(n, driver, what, err);
	/* Without a driver but with a file below it is an image whose format is to be found out. */
	bool format = driver ? is_format(driver) : has_prefix(&n->all, "file.");
	int r;
	if (format) {
		if (driver && n->o.format && strcmp(n->o.format, driver))
			return err_set(err, -EINVAL, "%s: driver=%s, but the format was given as %s", what, driver, n->o.format);
		n->o.format = driver ? driver : n->o.format;
		if (!keyvals_sub(&n->leaf, &n->all, "file.")) {
			v = keyvals_get(&n->all, "file");
			return v ? err_set(err, -ENOENT, "%s: file=%s names no node; write out its options (file.driver=...)", what, v) :
				   err_set(err, -EINVAL, "%s: file= is missing", what);
		}
		if ((r = children(n, what, err)) || (r = block_format_keys(&n->all, what, &n->o, err)))
			return r;
		r = block_node_keys(&n->all, what, &n->o, err);
		struct block_opts top = n->o;
		n->o.read_only = false;
		if (!r)
			r = leaf_keys(n, what, err);
		/* raw is as its file is; what keeps tables of its own needs what it was asked for. */
		if (!r && n->o.read_only && !top.read_only && !top.auto_read_only && driver && strcmp(driver, "raw"))
			return err_set(err, -EACCES, "%s: driver=%s is to be written, but the node below has read-only=on: Block node is read-only", what, driver);
		if (!keyvals_get(&n->all, "discard"))
			top.discard_unmap = n->o.discard_unmap;
		n->o.read_only |= top.read_only;
		n->o.cache = keyvals_get(&n->all, "cache.direct") || keyvals_get(&n->all, "cache.no-flush") ? top.cache : n->o.cache;
		n->o.discard_unmap = top.discard_unmap;
		n->o.node_name = top.node_name;
		n->o.detect_zeroes = top.detect_zeroes;
		if (!r)
			r = keyvals_end(&n->all, what, err);
	} else {
		keyvals_sub(&n->leaf, &n->all, "");
		r = leaf_keys(n, what, err);
		if (!n->o.format && (driver || n->o.protocol)) {
			n->o.format = "raw"; /* a protocol's node is a disk as it is */
			n->o.bare = bare_driver(driver);
		}
	}
	if (!n->below)
		strip_generic(&n->leaf);
	n->o.node_name = keyvals_get(&n->all, "node-name");     /* the leaf's copy of it is gone */
	return r;
}

int block_name_resolve(struct block_name *n, const struct block_opts *o, struct err *err)
{
	*n = (struct block_name){ .o = *o };
	n->o.options = NULL;
	if (o->options) {
		keyvals_sub(&n->all, &(struct keyvals){ o->options->o, o->options->n }, "");
		return from_options(n, "block options", err);
	}
	if (o->leaf) {
		struct keyvals given = { o->leaf->o, o->leaf->n };

		keyvals_sub(&n->leaf, &given, "");
		int r = leaf_keys(n, "block options", err);
		if (!n->below)
			strip_generic(&n->leaf);
		n->o.node_name = keyvals_get(&given, "node-name");
		return r;
	}
	if (o->file && !strncmp(o->file, "json:", 5)) {
		const char *text = o->file + 5 + strspn(o->file + 5, " \t\r\n");
		int r = *text == '{' ? keyvals_parse(&n->all, "json:", text, NULL, err) : err_set(err, -EINVAL, "%s: is no JSON object", o->file);
		return r ? r : from_options(n, "json:", err);
	}
	if (o->file && filter_is_name(o->file) && o->protocol)
		return filter_name(n, o->file, err);
	if (o->file && filter_is_name(o->file)) {
		n->below = true;
		return keyvals_add(&n->leaf, "filename", o->file) ? err_set(err, -ENOMEM, "out of memory") : 0;
	}
	if (!n->o.format && o->protocol)
		n->o.format = "raw";
	if (o->file && null_is_name(o->file))
		return null_name(&n->o, err);
	return check_name(o->file, err);
}

void block_name_free(struct block_name *n)
{
	keyvals_free(&n->all);
	keyvals_free(&n->leaf);
	keyvals_free(&n->backing);
	keyvals_free(&n->data);
}

int leaf_open(struct block *b, const struct block_opts *o, struct err *err)
{
	if (o->null.on)
		return null_open(b, o, err);
	return o->leaf || nbd_is_name(o->file) ? nbd_open(b, o, err) : raw_open(b, o, err);
}
