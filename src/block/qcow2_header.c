/* qcow2: the header and its extensions. Everything in it is checked here, before anything follows it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "block/qcow2.h"

enum { V2_LEN = 72, V3_LEN = 104, NAME_MAX_LEN = 1023, EXTS_MAX = 64 };

static const struct { uint8_t type, bit; const char *name; } features[] = {
	{ 0, 0, "dirty bit" }, { 0, 1, "corrupt bit" }, { 0, 2, "external data file" }, { 0, 3, "compression type" },
	{ 0, 4, "extended L2 entries" }, { 1, 0, "lazy refcounts" }, { 2, 0, "bitmaps" }, { 2, 1, "raw external data" },
};

void qhead_decode(struct qhead *h, const uint8_t *p)
{
	*h = (struct qhead){
		.version = be32(p + 4), .backing_off = be64(p + 8), .backing_size = be32(p + 16), .cluster_bits = be32(p + 20),
		.size = be64(p + 24), .crypt = be32(p + 32), .l1_size = be32(p + 36), .l1_off = be64(p + 40),
		.reftable_off = be64(p + 48), .reftable_clusters = be32(p + 56), .nb_snapshots = be32(p + 60),
		.snapshots_off = be64(p + 64), .refcount_order = 4, .header_len = V2_LEN,
	};
	if (h->version < 3)
		return;
	h->incompat = be64(p + 72);
	h->compat = be64(p + 80);
	h->autoclear = be64(p + 88);
	h->refcount_order = be32(p + 96);
	h->header_len = be32(p + 100);
	if (h->header_len > V3_LEN)
		h->compression = p[104];
}

static void qhead_encode(const struct qhead *h, uint8_t *p)
{
	put32(p, QCOW2_MAGIC);
	put32(p + 4, h->version);
	put64(p + 8, h->backing_off);
	put32(p + 16, h->backing_size);
	put32(p + 20, h->cluster_bits);
	put64(p + 24, h->size);
	put32(p + 32, h->crypt);
	put32(p + 36, h->l1_size);
	put64(p + 40, h->l1_off);
	put64(p + 48, h->reftable_off);
	put32(p + 56, h->reftable_clusters);
	put32(p + 60, h->nb_snapshots);
	put64(p + 64, h->snapshots_off);
	if (h->version < 3)
		return;
	put64(p + 72, h->incompat);
	put64(p + 80, h->compat);
	put64(p + 88, h->autoclear);
	put32(p + 96, h->refcount_order);
	put32(p + 100, h->header_len);
	if (h->header_len > V3_LEN)
		p[104] = h->compression;
}

static int check_features(struct qcow2 *q, const uint8_t *table, uint32_t len, struct err *err)
{
	uint64_t unknown = q->h.incompat & ~(uint64_t)INCOMPAT_KNOWN;
	char names[300] = "";
	for (unsigned bit = 0; bit < 64; bit++) {
		size_t used = strlen(names);
		bool named = false;
		if (!(unknown & BIT(bit)))
			continue;
		for (uint32_t i = 0; i + 48 <= len && !named; i += 48) {
			if (table[i] == 0 && table[i + 1] == bit && table[i + 2]) {
				snprintf(names + used, sizeof names - used, "%s%.46s", used ? ", " : "", (const char *)table + i + 2);
				named = true;
			}
		}
		if (!named)
			snprintf(names + used, sizeof names - used, "%sUnknown incompatible feature: %llx", used ? ", " : "",
				 (unsigned long long)BIT(bit));
	}
	return unknown ? err_set(err, -ENOTSUP, "%s: Unsupported qcow2 feature(s): %s", q->b->file, names) : 0;
}

static int bad(struct qcow2 *q, struct err *err, const char *what)
{
	return err_set(err, -EINVAL, "%s: %s", q->b->file, what);
}

static int check_tables(struct qcow2 *q, uint64_t file_len, struct err *err)
{
	const struct qhead *h = &q->h;
	uint64_t need = q_l1_entries(q, h->size);
	if (!h->reftable_clusters || (uint64_t)h->reftable_clusters * q->cs > REFTABLE_BYTES_MAX)
		return bad(q, err, h->reftable_clusters ? "Image reference count table too large" :
			   "Image does not contain a reference count table");
	if (!h->reftable_off || !q_is_aligned(q, h->reftable_off) ||
	    range_bad(h->reftable_off, (uint64_t)h->reftable_clusters * q->cs, INT64_MAX))
		return bad(q, err, "Invalid reference count table offset");
	/* No counts at all: nobody may allocate, but what is there can be read, and a check can count anew. */
	if (h->reftable_off >= file_len && !q->b->read_only && !q->as_is)
		return bad(q, err, "The reference count table is outside of the file; repair the image with 'lodge img check -r all'");
	if (need * 8 > L1_BYTES_MAX)
		return bad(q, err, "Image is too big for its cluster size");
	if ((uint64_t)h->l1_size * 8 > L1_BYTES_MAX)
		return bad(q, err, "Active L1 table too large");
	if (h->l1_size < need)
		return bad(q, err, "L1 table is too small");
	if (h->l1_size && (!h->l1_off || !q_is_aligned(q, h->l1_off) ||
			   range_bad(h->l1_off, (uint64_t)h->l1_size * 8, INT64_MAX) || h->l1_off >= file_len))
		return bad(q, err, "Invalid L1 table offset");
	if (h->nb_snapshots > SNAPSHOTS_MAX)
		return bad(q, err, "Snapshot table too large");
	if (h->nb_snapshots && (!h->snapshots_off || !q_is_aligned(q, h->snapshots_off) || h->snapshots_off >= file_len))
		return bad(q, err, "Invalid snapshot table offset");
	return 0;
}

int qhead_check(struct qcow2 *q, uint64_t file_len, struct err *err)
{
	const struct qhead *h = &q->h;
	if (h->version != 2 && h->version != 3)
		return err_set(err, -ENOTSUP, "%s: Unsupported qcow2 version %u", q->b->file, h->version);
	if (h->cluster_bits < 9 || h->cluster_bits > 21)
		return err_set(err, -EINVAL, "%s: Unsupported cluster size: 2^%u", q->b->file, h->cluster_bits);
	if (h->version == 3 && (h->header_len < V3_LEN || h->header_len > BIT(h->cluster_bits)))
		return bad(q, err, h->header_len < V3_LEN ? "qcow2 header too short" : "qcow2 header exceeds cluster size");
	if (h->backing_off > BIT(h->cluster_bits))
		return bad(q, err, "Invalid backing file offset");
	if (h->backing_off && (h->backing_size > NAME_MAX_LEN || h->backing_off + h->backing_size > BIT(h->cluster_bits)))
		return bad(q, err, "Backing file name too long");
	if (h->refcount_order > 6)
		return bad(q, err, "Reference count entry width too large; may not exceed 64 bits");
	if (h->crypt)
		return err_set(err, -ENOTSUP, "%s: is encrypted (%s), which is not supported; decrypt it with 'qemu-img convert'",
			       q->b->file, h->crypt == 1 ? "AES" : h->crypt == 2 ? "LUKS" : "unknown method");
	if (h->incompat & INCOMPAT_EXT_L2 && h->cluster_bits < 14)
		return bad(q, err, "clusters are too small for extended L2 entries");
	if (!(h->incompat & INCOMPAT_COMPRESSION) != !h->compression || h->compression > 1)
		return bad(q, err, "compression type and its feature bit do not fit each other");
	q->cs = 1u << h->cluster_bits;
	bool ext = h->incompat & INCOMPAT_EXT_L2;
	q->nsub = ext ? 32 : 1;
	q->sub_size = q->cs / q->nsub;
	q->entry_size = ext ? 16 : 8;
	q->l2_bits = h->cluster_bits - (ext ? 4 : 3);
	q->ref_bits = 1u << h->refcount_order;
	q->ref_per_block_bits = h->cluster_bits + 3 - h->refcount_order;
	q->ref_max = q->ref_bits == 64 ? INT64_MAX : BIT(q->ref_bits) - 1;
	return check_tables(q, file_len, err);
}

struct qext *q_find_ext(struct qcow2 *q, uint32_t type)
{
	for (unsigned i = 0; i < q->next; i++)
		if (q->ext[i].type == type)
			return &q->ext[i];
	return NULL;
}

void q_free_exts(struct qcow2 *q)
{
	for (unsigned i = 0; i < q->next; i++)
		free(q->ext[i].data);
	free(q->ext);
	q->ext = NULL;
	q->next = 0;
}

static int add_ext(struct qcow2 *q, uint32_t type, const uint8_t *data, uint32_t len)
{
	struct qext *e = realloc(q->ext, (q->next + 1) * sizeof *e);
	if (!e)
		return -ENOMEM;
	q->ext = e;
	e += q->next;
	*e = (struct qext){ type, len, calloc(1, len + 1) };
	if (!e->data)
		return -ENOMEM;
	memcpy(e->data, data, len);
	q->next++;
	return 0;
}

int q_set_string_ext(struct qcow2 *q, uint32_t type, const char *text)
{
	return q_set_ext(q, type, text, text ? (uint32_t)strlen(text) : 0);
}

int q_set_ext(struct qcow2 *q, uint32_t type, const void *data, uint32_t len)
{
	for (unsigned i = 0; i < q->next; i++) {
		if (q->ext[i].type != type)
			continue;
		free(q->ext[i].data);
		memmove(&q->ext[i], &q->ext[i + 1], (--q->next - i) * sizeof *q->ext);
		break;
	}
	return data ? add_ext(q, type, data, len) : 0;
}

/* Extensions run up to the end marker, the backing name or the end of the first cluster. */
static int read_exts(struct qcow2 *q, const uint8_t *p, struct err *err)
{
	uint64_t at = q->h.header_len, end = q->h.backing_off ? q->h.backing_off : q->cs;
	while (at + 8 <= end) {
		uint32_t type = be32(p + at), len = be32(p + at + 4);
		at += 8;
		if (type == EXT_END)
			return 0;
		if (len > end - at || q->next >= EXTS_MAX)
			return err_set(err, -EINVAL, "%s: Header extension too large", q->b->file);
		if (add_ext(q, type, p + at, len))
			return err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
		at += ALIGN_UP((uint64_t)len, (uint64_t)8);
	}
	return 0;
}

static char *ext_string(struct qcow2 *q, uint32_t type)
{
	struct qext *e = q_find_ext(q, type);
	return e ? strndup((char *)e->data, e->len) : NULL;
}

int q_read_header(struct qcow2 *q, struct err *err)
{
	uint8_t head[512] = { 0 }, *first;
	int64_t len = q->leaf->drv->file_length(q->leaf);
	int r = len < 0 ? (int)len : q_pread(q, 0, head, sizeof head);
	if (r)
		return err_set_errno(err, r, "%s: cannot read the header", q->b->file);
	if (len < V2_LEN || be32(head) != QCOW2_MAGIC)
		return err_set(err, -EINVAL, "%s: Image is not in qcow2 format", q->b->file);
	qhead_decode(&q->h, head);
	r = qhead_check(q, (uint64_t)len, err);
	if (r && q->h.version != 3)
		return r;
	if (q->h.cluster_bits < 9 || q->h.cluster_bits > 21 || q->h.header_len > BIT(q->h.cluster_bits))
		return r;
	q->cs = 1u << q->h.cluster_bits;
	first = calloc(1, q->cs);
	if (!first)
		return err_set(err, -ENOMEM, "%s: out of memory", q->b->file);
	int r2 = q_pread(q, 0, first, q->cs);
	if (!r2 && (!r || q->h.backing_off <= q->cs))
		r2 = read_exts(q, first, r ? NULL : err);
	struct qext *names = q_find_ext(q, EXT_FEATURES);
	if (check_features(q, names ? names->data : NULL, names ? names->len : 0, r ? NULL : err))
		r2 = -ENOTSUP;
	if (!r && !r2 && q->h.backing_off)
		q->backing = strndup((char *)first + q->h.backing_off, q->h.backing_size);
	free(first);
	if (r || r2)
		return r ? r : err_set_errno(err, r2, "%s: header", q->b->file);
	q->backing_format = ext_string(q, EXT_BACKING_FORMAT);
	q->data_file = ext_string(q, EXT_DATA_FILE);
	return 0;
}

int q_write_head(struct qcow2 *q, const struct qhead *h)
{
	uint8_t head[512];
	int r = q_pread(q, 0, head, sizeof head);
	if (r)
		return r;
	qhead_encode(h, head);
	r = q_pwrite(q, 0, head, sizeof head);
	return r ? r : q_sync(q);
}

static uint8_t *put_ext(uint8_t *p, const uint8_t *end, uint32_t type, const void *data, uint32_t len)
{
	uint32_t room = (uint32_t)ALIGN_UP((uint64_t)len, (uint64_t)8);
	if (!p || (uint64_t)(end - p) < room + 8ull)
		return NULL;
	put32(p, type);
	put32(p + 4, len);
	if (len)
		memcpy(p + 8, data, len);
	return p + 8 + room;
}

static uint8_t *put_features(uint8_t *p, const uint8_t *end)
{
	uint8_t table[ARRAY_SIZE(features) * 48] = { 0 };
	for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
		table[i * 48] = features[i].type;
		table[i * 48 + 1] = features[i].bit;
		memcpy(table + i * 48 + 2, features[i].name, strlen(features[i].name));
	}
	return put_ext(p, end, EXT_FEATURES, table, sizeof table);
}

/*
 * The first sector is written last and alone, with all extensions in it when they fit: a torn write must
 * not leave half of an extension. The backing name goes to a place where the old one is not. (The names of
 * features are left out when they would not fit the sector, except in new images.)
 */
static uint8_t *put_exts(struct qcow2 *q, uint8_t *first, uint32_t len, uint64_t end, bool fresh)
{
	uint8_t *p = first + len, *with;
	for (unsigned i = 0; i < q->next; i++)
		if (q->ext[i].type != EXT_FEATURES)
			p = put_ext(p, first + end, q->ext[i].type, q->ext[i].data, q->ext[i].len);
	if (p && q->h.version >= 3) {
		uint64_t stop = fresh ? end : MIN(end, 512u);
		with = (uint64_t)(p - first) + 16 < stop ? put_features(p, first + stop - 8) : NULL;
		p = with ? with : p;
	}
	return put_ext(p, first + end, EXT_END, NULL, 0);
}

int q_write_header(struct qcow2 *q, const struct qhead *want, bool fresh)
{
	struct qhead h = *want;
	uint8_t *first = calloc(1, q->cs), *p;
	uint64_t name = q->backing ? strlen(q->backing) : 0, at = 0;
	if (!first)
		return -ENOMEM;
	h.header_len = h.version >= 3 ? MAX(h.header_len, 112u) : V2_LEN;
	p = put_exts(q, first, h.header_len, q->cs - name, fresh);
	if (p && name) {
		at = (uint64_t)(p - first);
		uint64_t apart = at <= 512 && h.backing_off != 512 ? 512 : 512 + 1024;
		if (!fresh && at <= apart && apart + name <= q->cs)
			at = apart;
		memcpy(first + at, q->backing, name);
	}
	h.backing_off = at;
	h.backing_size = (uint32_t)name;
	int r = p ? 0 : -ENOSPC;
	if (!r && fresh && q->cs > 512)
		r = q_pwrite(q, 512, first + 512, q->cs - 512);
	else if (!r && q->cs > 512 && name) /* only the new name: the old one is valid until the first sector changes */
		r = q_pwrite(q, MAX(at, 512u), first + MAX(at, 512u), at + name - MIN(MAX(at, 512u), at + name));
	if (!r && !fresh && p - first > 512) /* no way to be atomic */
		r = q_pwrite(q, 512, first + 512, (uint64_t)(p - first) - 512);
	if (!r)
		r = q_sync(q);
	if (!r) {
		qhead_encode(&h, first);
		r = q_pwrite(q, 0, first, 512);
	}
	free(first);
	if (!r)
		r = q_sync(q);
	if (!r)
		q->h = h;
	return r;
}
