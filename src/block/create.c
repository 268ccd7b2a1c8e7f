/*
 * New images. A qcow2 image starts as the smallest valid one of size 0 (header, refcount table, one block)
 * and grows to its size like any other.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "block/nbd.h"
#include "block/qcow2.h"

void image_create_init(struct image_create *c)
{
	*c = (struct image_create){ .format = "raw", .version = 3, .refcount_bits = 16 };
}

int image_create_check(const struct image_create *c, struct err *err)
{
	bool pow2 = c->cluster_size && !(c->cluster_size & (c->cluster_size - 1));
	if (!pow2 || c->cluster_size < 512 || c->cluster_size > 2 << 20)
		return err_set(err, -EINVAL, "Cluster size must be a power of two between 512 and 2048k");
	if (c->extended_l2 && c->cluster_size < 16384)
		return err_set(err, -EINVAL, "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes");
	if (!c->refcount_bits || c->refcount_bits & (c->refcount_bits - 1) || c->refcount_bits > 64)
		return err_set(err, -EINVAL, "Refcount width must be a power of two and may not exceed 64 bits");
	if (c->version < 3 && c->refcount_bits != 16)
		return err_set(err, -EINVAL, "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)");
	if (c->version < 3 && c->lazy_refcounts)
		return err_set(err, -EINVAL, "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)");
	if (c->version < 3 && (c->zstd || c->extended_l2 || c->data_file))
		return err_set(err, -EINVAL, "%s only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
			       c->zstd ? "Non-zlib compression type is" : c->extended_l2 ? "Extended L2 entries are" : "External data files are");
	if (c->data_raw && !c->data_file)
		return err_set(err, -EINVAL, "data-file-raw requires data-file");
	if (c->data_raw && c->backing)
		return err_set(err, -EINVAL, "Backing file and data-file-raw cannot be used at the same time");
	if (c->backing && c->prealloc != PREALLOC_OFF && !c->extended_l2)
		return err_set(err, -EINVAL, "Backing file and preallocation can only be used at the same time if extended_l2 is enabled");
	return c->backing && strlen(c->backing) > 1023 ? err_set(err, -EINVAL, "Backing file name too long") : 0;
}

/* An empty file under the image lock; what was in it is gone only when nobody else uses it. */
static int make_file(const char *file, const struct tls_store *tls, struct block **leaf, struct err *err)
{
	struct block_name n;
	int r = block_name_resolve(&n, &(struct block_opts){ .file = file, .format = "raw", .tls = tls }, err);
	if (!r && !strncmp(file, "json:", 5))
		r = err_set(err, -EINVAL, "%s: Unknown protocol 'json': a new image needs a name", file);
	if (!r && (n.below || n.filter))
		r = err_set(err, -ENOTSUP, "%s: Protocol driver '%.*s' does not support image creation", file, (int)strcspn(file, ":"), file);
	bool remote = !r && (n.o.leaf || nbd_is_name(n.o.file));
	const char *path = r ? NULL : block_plain_path(n.o.file);
	int fd = r || remote ? -1 : open(path, O_RDWR | (strncmp(file, "host_device:", 12) ? O_CREAT : 0) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644);
	if (!r && !remote && fd < 0)
		r = err_set_errno(err, -errno, "%s: Could not create file", file);
	if (fd >= 0)
		close(fd);
	*leaf = r ? NULL : block_new(&n.o, NULL, NULL);
	if (!r)
		r = *leaf ? leaf_open(*leaf, &n.o, err) : err_set(err, -ENOMEM, "out of memory");
	block_name_free(&n);
	if (!r && !(*leaf)->is_dev)
		r = (*leaf)->drv->truncate(*leaf, 0);
	if (r) {
		block_free(*leaf);
		*leaf = NULL;
		return err_set_errno(err, r, "%s", file);
	}
	return 0;
}

static int write_empty(struct qcow2 *q, const struct image_create *c)
{
	struct qhead h = {
		.version = c->version, .cluster_bits = (uint32_t)__builtin_ctz(c->cluster_size), .reftable_clusters = 1,
		.reftable_off = c->cluster_size, .refcount_order = (uint32_t)__builtin_ctz(c->refcount_bits), .header_len = 112,
		.incompat = (c->zstd ? INCOMPAT_COMPRESSION : 0) | (c->extended_l2 ? INCOMPAT_EXT_L2 : 0) |
			    (c->data_file ? INCOMPAT_DATA_FILE : 0),
		.compat = c->lazy_refcounts ? COMPAT_LAZY : 0, .autoclear = c->data_raw ? AUTOCLEAR_DATA_RAW : 0,
		.compression = c->zstd,
	};
	uint8_t *two = calloc(2, c->cluster_size);
	if (!two)
		return -ENOMEM;
	q->cs = c->cluster_size;
	q->ref_bits = c->refcount_bits;
	q->h = h;
	put64(two, 2ull * q->cs);
	for (unsigned i = 0; i < 3; i++)
		ref_set(q, two + q->cs, i, 1);
	int r = q_pwrite(q, q->cs, two, 2ull * q->cs);
	free(two);
	if (!r)
		r = q_set_string_ext(q, EXT_DATA_FILE, c->data_file);
	if (!r)
		r = q_set_string_ext(q, EXT_BACKING_FORMAT, c->backing ? c->backing_format : NULL);
	if (!r && c->backing && !(q->backing = strdup(c->backing)))
		r = -ENOMEM;
	return r ? r : q_write_header(q, &h, true);
}

static int make_data_file(const struct image_create *c, struct err *err)
{
	struct block *data = NULL;
	char *path = NULL;
	const char *slash = strrchr(c->file, '/');
	if (!c->data_file)
		return 0;
	if (*c->data_file == '/' || !slash)
		path = strdup(c->data_file);
	else if (asprintf(&path, "%.*s%s", (int)(slash - c->file + 1), c->file, c->data_file) < 0)
		path = NULL;
	int r = path ? make_file(path, NULL, &data, err) : err_set(err, -ENOMEM, "out of memory");
	block_free(data);
	free(path);
	return r;
}

static int create_qcow2(const struct image_create *c, struct block *leaf, struct err *err)
{
	struct block_opts o = { .file = c->file, .format = "qcow2", .no_backing = true, .cache = CACHE_UNSAFE, .tls = c->tls };
	struct block fake = { .cache = CACHE_UNSAFE, .file = leaf->file };
	struct qcow2 q = { .leaf = leaf, .data = leaf, .b = &fake };
	struct block *b;
	int r = write_empty(&q, c);
	q_free_exts(&q);
	free(q.backing);
	block_free(leaf);
	if (r)
		return err_set_errno(err, r, "%s: cannot write", c->file);
	r = make_data_file(c, err);
	if (r)
		return r;
	r = block_open(&b, &o, NULL, NULL, err);
	if (r)
		return r;
	r = image_resize(b, ALIGN_UP(c->size, (uint64_t)512), c->prealloc, err);
	if (r)
		block_abandon(b);
	int r2 = block_sync_close(b); /* an image that was made is there after a power cut */
	return r ? r : r2 ? err_set_errno(err, r2, "%s: cannot write", c->file) : 0;
}

int image_create(const struct image_create *want, struct err *err)
{
	struct image_create c = *want;
	struct block *leaf;
	bool qcow2 = !strcmp(c.format, "qcow2");
	if (!qcow2 && strcmp(c.format, "raw"))
		return err_set(err, -ENOTSUP, "Unknown file format '%s'", c.format);
	if (!c.cluster_size)
		c.cluster_size = 65536;
	int r = qcow2 ? image_create_check(&c, err) : 0;
	if (!qcow2 && c.prealloc == PREALLOC_METADATA) /* before anything is overwritten */
		r = err_set(err, -ENOTSUP, "Unsupported preallocation mode: metadata");
	if (!r)
		r = make_file(c.file, c.tls, &leaf, err);
	if (r)
		return r;
	char *path = leaf->nbd || leaf->is_dev ? NULL : realpath(leaf->file, NULL);
	if (qcow2) {
		r = create_qcow2(&c, leaf, err);
	} else {
		r = image_resize(leaf, ALIGN_UP(c.size, (uint64_t)512), c.prealloc, err);
		block_free(leaf);
	}
	if (r && path) /* half an image is worse than none */
		unlink(path);
	free(path);
	return r;
}
