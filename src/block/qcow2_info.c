/* qcow2: facts for people and tools. */
#include <errno.h>
#include <stdlib.h>

#include "block/qcow2.h"

/* Names are kept with the array: one allocation, so that image_info_free() needs to know nothing. */
static int bitmaps_info(struct qcow2 *q, struct image_info *i)
{
	struct qext *x = q_find_ext(q, EXT_BITMAPS);
	if (!x || x->len < 24)
		return 0;
	uint64_t n = be32(x->data), size = be64(x->data + 8), at = 0;
	if (n > 65535 || size > 64 << 20 || size < n * 24)
		return 0;
	uint8_t *dir = malloc(size + 1);
	struct image_bitmap *v = dir && !q_pread(q, be64(x->data + 16), dir, size) ? calloc(1, n * sizeof *v + size + n) : NULL;
	char *text = v ? (char *)(v + n) : NULL;
	for (uint64_t k = 0; v && k < n && at + 24 <= size; k++) {
		const uint8_t *p = dir + at;
		uint64_t name = 24ull + be32(p + 20), len = be16(p + 18);
		if (name + len > size - at || p[17] > 63)
			break;
		v[k] = (struct image_bitmap){ text, BIT(p[17]), be32(p + 12) & 1, be32(p + 12) & 2 };
		memcpy(text, p + name, len);
		text += len + 1;
		i->nbitmaps++;
		at += ALIGN_UP(name + len, 8ull);
	}
	i->bitmaps = v;
	free(dir);
	return 0;
}

int qcow2_info(struct block *b, struct image_info *i)
{
	struct qcow2 *q = b->qcow2;
	*i = (struct image_info){
		.cluster_size = q->cs, .version = q->h.version, .refcount_bits = q->ref_bits,
		.lazy_refcounts = q->h.compat & COMPAT_LAZY, .dirty = q->h.incompat & INCOMPAT_DIRTY,
		.corrupt = q->h.incompat & INCOMPAT_CORRUPT, .extended_l2 = q->nsub > 1,
		.data_raw = q->h.autoclear & AUTOCLEAR_DATA_RAW, .compressed_zstd = q->h.compression,
		.bitmaps_consistent = q->h.autoclear & AUTOCLEAR_BITMAPS,
		.backing = q->backing, .backing_format = q->backing_format, .data_file = q->data_file,
	};
	if (q->nsnaps) {
		i->snapshots = calloc(q->nsnaps, sizeof *i->snapshots);
		if (!i->snapshots)
			return -ENOMEM;
		i->nsnapshots = q->nsnaps;
		for (unsigned k = 0; k < q->nsnaps; k++)
			i->snapshots[k] = q->snaps[k].s;
	}
	return bitmaps_info(q, i);
}
