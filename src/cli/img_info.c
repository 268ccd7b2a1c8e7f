/* lodge img: verbs that look: info, map, check, measure; and snapshot. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <time.h>

#include "cli/img.h"

/* --- info --- */

struct info { struct block *b; struct image_info i; bool qcow2; const char *file; char *name; };

static void human_snapshots(const struct image_info *i)
{
	if (!i->nsnapshots)
		return;
	printf("Snapshot list:\n%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT");
	for (unsigned k = 0; k < i->nsnapshots; k++) {
		const struct image_snapshot *s = &i->snapshots[k];
		time_t t = s->date_sec;
		struct tm tm;
		char date[64], clock[64], icount[32] = "", size[32];
		uint64_t sec = s->vm_clock_ns / 1000000000;
		localtime_r(&t, &tm);
		strftime(date, sizeof date, "%Y-%m-%d %H:%M:%S", &tm);
		snprintf(clock, sizeof clock, "%02d:%02d:%02d.%03d", (int)(sec / 3600), (int)(sec / 60 % 60), (int)(sec % 60),
			 (int)(s->vm_clock_ns / 1000000 % 1000));
		if (s->icount != UINT64_MAX)
			snprintf(icount, sizeof icount, "%llu", (unsigned long long)s->icount);
		printf("%-9s %-16s %8s%20s%13s%11s\n", s->id, s->name, img_human(s->vm_state_size, size), date, clock, icount);
	}
}

void img_print_specific(const struct image_info *i)
{
	printf("Format specific information:\n    compat: %s\n    compression type: %s\n", i->version >= 3 ? "1.1" : "0.10",
	       i->compressed_zstd ? "zstd" : "zlib");
	if (i->version >= 3)
		printf("    lazy refcounts: %s\n", i->lazy_refcounts ? "true" : "false");
	if (i->version >= 3 && i->nbitmaps) {
		puts("    bitmaps:");
		for (unsigned k = 0; k < i->nbitmaps; k++) {
			const struct image_bitmap *m = &i->bitmaps[k];
			unsigned f = 0;
			printf("        [%u]:\n            flags:\n", k);
			if (m->in_use)
				printf("                [%u]: in-use\n", f++);
			if (m->automatic)
				printf("                [%u]: auto\n", f++);
			printf("            name: %s\n            granularity: %llu\n", m->name, (unsigned long long)m->granularity);
		}
	}
	printf("    refcount bits: %u\n", i->refcount_bits);
	if (i->version < 3)
		return;
	if (i->data_file)
		printf("    data file: %s\n    data file raw: %s\n", i->data_file, i->data_raw ? "true" : "false");
	printf("    corrupt: %s\n    extended l2: %s\n", i->corrupt ? "true" : "false", i->extended_l2 ? "true" : "false");
}

static void human_vmdk(const struct image_vmdk *v)
{
	printf("Format specific information:\n    cid: %u\n    parent cid: %u\n    create type: %s\n    extents:\n", v->cid, v->parent_cid, v->create_type);
	for (unsigned k = 0; k < v->n; k++) {
		const struct image_vmdk_extent *x = &v->extents[k];
		printf("        [%u]:\n", k);
		if (x->compressed)
			puts("            compressed: true");
		printf("            virtual size: %llu\n            filename: %s\n", (unsigned long long)x->size, x->file ? x->file : "");
		if (x->cluster_size)
			printf("            cluster size: %u\n", x->cluster_size);
		printf("            format: %s\n", x->type ? x->type : "");
	}
}

static void human_info(const struct info *n)
{
	int64_t disk = image_disk_size(n->b);
	char size[32], used[32];
	printf("image: %s\nfile format: %s\nvirtual size: %s (%llu bytes)\ndisk size: %s\n", n->file, image_driver(n->b),
	       img_human(block_length(n->b), size), (unsigned long long)block_length(n->b),
	       disk < 0 ? "unavailable" : img_human((uint64_t)disk, used));
	if (n->i.encrypted)
		puts("encrypted: yes");
	if (n->i.cluster_size)
		printf("cluster_size: %u\n", n->i.cluster_size);
	if (n->i.dirty)
		puts("cleanly shut down: no");
	if (n->i.backing) {
		char *full = block_path_beside(n->file, n->i.backing);
		printf("backing file: %s", n->i.backing);
		if (full && strcmp(full, n->i.backing))
			printf(" (actual path: %s)", full);
		puts("");
		if (n->i.backing_format)
			printf("backing file format: %s\n", n->i.backing_format);
		free(full);
	}
	human_snapshots(&n->i);
	if (n->qcow2)
		img_print_specific(&n->i);
	if (n->i.vmdk.n)
		human_vmdk(&n->i.vmdk);
}

static void pad(int n)
{
	printf("%*s", n, "");
}

static void json_snapshots(const struct image_info *i, int at)
{
	if (!i->nsnapshots)
		return;
	pad(at);
	puts("\"snapshots\": [");
	for (unsigned k = 0; k < i->nsnapshots; k++) {
		const struct image_snapshot *s = &i->snapshots[k];
		pad(at + 4);
		puts("{");
		if (s->icount != UINT64_MAX)
			printf("%*s\"icount\": %llu,\n", at + 8, "", (unsigned long long)s->icount);
		printf("%*s\"vm-clock-nsec\": %llu,\n%*s\"name\": ", at + 8, "", (unsigned long long)(s->vm_clock_ns % 1000000000), at + 8, "");
		img_json_string(s->name);
		printf(",\n%*s\"date-sec\": %u,\n%*s\"date-nsec\": %u,\n%*s\"vm-clock-sec\": %llu,\n%*s\"id\": ", at + 8, "", s->date_sec, at + 8, "",
		       s->date_nsec, at + 8, "", (unsigned long long)(s->vm_clock_ns / 1000000000), at + 8, "");
		img_json_string(s->id);
		printf(",\n%*s\"vm-state-size\": %llu\n%*s}%s\n", at + 8, "", (unsigned long long)s->vm_state_size, at + 4, "",
		       k + 1 < i->nsnapshots ? "," : "");
	}
	pad(at);
	puts("],");
}

static void json_bitmaps(const struct image_info *i, int at)
{
	if (!i->nbitmaps)
		return;
	printf("%*s\"bitmaps\": [\n", at, "");
	for (unsigned k = 0; k < i->nbitmaps; k++) {
		const struct image_bitmap *m = &i->bitmaps[k];
		printf("%*s{\n%*s\"flags\": [\n", at + 4, "", at + 8, "");
		if (m->in_use)
			printf("%*s\"in-use\"%s\n", at + 12, "", m->automatic ? "," : "");
		if (m->automatic)
			printf("%*s\"auto\"\n", at + 12, "");
		printf("%*s],\n%*s\"name\": ", at + 8, "", at + 8, "");
		img_json_string(m->name);
		printf(",\n%*s\"granularity\": %llu\n%*s}%s\n", at + 8, "", (unsigned long long)m->granularity, at + 4, "",
		       k + 1 < i->nbitmaps ? "," : "");
	}
	printf("%*s],\n", at, "");
}

static void json_specific(const struct image_info *i, int at)
{
	printf("%*s\"format-specific\": {\n%*s\"type\": \"qcow2\",\n%*s\"data\": {\n", at, "", at + 4, "", at + 4, "");
	int in = at + 8;
	printf("%*s\"compat\": \"%s\",\n%*s\"compression-type\": \"%s\",\n", in, "", i->version >= 3 ? "1.1" : "0.10", in, "",
	       i->compressed_zstd ? "zstd" : "zlib");
	if (i->version >= 3) {
		printf("%*s\"lazy-refcounts\": %s,\n", in, "", i->lazy_refcounts ? "true" : "false");
		json_bitmaps(i, in);
	}
	printf("%*s\"refcount-bits\": %u%s\n", in, "", i->refcount_bits, i->version >= 3 ? "," : "");
	if (i->version >= 3 && i->data_file) {
		printf("%*s\"data-file\": ", in, "");
		img_json_string(i->data_file);
		printf(",\n%*s\"data-file-raw\": %s,\n", in, "", i->data_raw ? "true" : "false");
	}
	if (i->version >= 3)
		printf("%*s\"corrupt\": %s,\n%*s\"extended-l2\": %s\n", in, "", i->corrupt ? "true" : "false", in, "",
		       i->extended_l2 ? "true" : "false");
	printf("%*s}\n%*s},\n", at + 4, "", at, "");
}

static void json_vmdk(const struct image_vmdk *v, int at)
{
	printf("%*s\"format-specific\": {\n%*s\"type\": \"vmdk\",\n%*s\"data\": {\n", at, "", at + 4, "", at + 4, "");
	printf("%*s\"cid\": %u,\n%*s\"parent-cid\": %u,\n%*s\"create-type\": ", at + 8, "", v->cid, at + 8, "", v->parent_cid, at + 8, "");
	img_json_string(v->create_type);
	printf(",\n%*s\"extents\": [\n", at + 8, "");
	for (unsigned k = 0; k < v->n; k++) {
		const struct image_vmdk_extent *x = &v->extents[k];
		printf("%*s{\n", at + 12, "");
		if (x->compressed)
			printf("%*s\"compressed\": true,\n", at + 16, "");
		printf("%*s\"virtual-size\": %llu,\n%*s\"filename\": ", at + 16, "", (unsigned long long)x->size, at + 16, "");
		img_json_string(x->file ? x->file : "");
		if (x->cluster_size)
			printf(",\n%*s\"cluster-size\": %u", at + 16, "", x->cluster_size);
		printf(",\n%*s\"format\": \"%s\"\n%*s}%s\n", at + 16, "", x->type ? x->type : "", at + 12, "", k + 1 < v->n ? "," : "");
	}
	printf("%*s]\n%*s}\n%*s},\n", at + 8, "", at + 4, "", at, "");
}

static void json_info(const struct info *n, int at)
{
	int64_t disk = image_disk_size(n->b);
	printf("%*s{\n", at, "");
	at += 4;
	if (n->i.backing && n->i.backing_format) {
		printf("%*s\"backing-filename-format\": ", at, "");
		img_json_string(n->i.backing_format);
		puts(",");
	}
	json_snapshots(&n->i, at);
	printf("%*s\"virtual-size\": %llu,\n%*s\"filename\": ", at, "", (unsigned long long)block_length(n->b), at, "");
	img_json_string(n->file);
	puts(",");
	if (n->i.cluster_size)
		printf("%*s\"cluster-size\": %u,\n", at, "", n->i.cluster_size);
	printf("%*s\"format\": \"%s\"", at, "", image_driver(n->b));
	if (block_is_remote(n->b) && !n->qcow2 && !n->i.vmdk.n && !n->i.cluster_size) { /* of a server's disk nothing else is known */
		printf("\n%*s}", at - 4, "");
		return;
	}
	puts(",");
	if (disk >= 0)
		printf("%*s\"actual-size\": %lld,\n", at, "", (long long)disk);
	if (n->qcow2)
		json_specific(&n->i, at);
	if (n->i.vmdk.n)
		json_vmdk(&n->i.vmdk, at);
	if (n->i.backing) {
		char *full = block_path_beside(n->file, n->i.backing);
		printf("%*s\"full-backing-filename\": ", at, "");
		img_json_string(full ? full : n->i.backing);
		printf(",\n%*s\"backing-filename\": ", at, "");
		img_json_string(n->i.backing);
		puts(",");
		free(full);
	}
	printf("%*s\"dirty-flag\": %s\n%*s}", at, "", n->i.dirty ? "true" : "false", at - 4, "");
}

enum { CHAIN_MAX = 200 };

/* The image and, for the chain, those below it, opened one by one. 0, or 1 after telling why; *n are to be closed in any case. */
static int gather(const char *file, struct img_open *o, bool chain, struct info *v, unsigned *n)
{
	char *name = strdup(file);
	while (name) {
		struct info *i = &v[*n];
		*i = (struct info){ .b = img_open(name, o), .name = name };
		if (!i->b) {
			free(name);
			return 1;
		}
		++*n;
		i->file = block_name_is_protocol(name) || (*n == 1 && img_image_opts()) ? block_name(i->b) : name;
		i->qcow2 = !image_info(i->b, &i->i) && !strcmp(image_format(i->b), "qcow2");
		name = chain && i->i.backing ? block_path_beside(i->file, i->i.backing) : NULL;
		o->format = i->i.backing_format;
		o->plain = true;
		if (name && *n == CHAIN_MAX) {
			free(name);
			return img_fail("the backing chain is too long; does it loop?");
		}
	}
	return 0;
}

int img_info(int argc, char **argv)
{
	struct img_open o = { .no_backing = true, .as_is = true };
	bool json = false, chain = false;
	unsigned n = 0;
	int c;
	while ((c = img_getopt(argc, argv, ":hf:U")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'U')
			o.shared = true;
		else if (c == OPT_BACKING_CHAIN)
			chain = true;
		else if (c == OPT_OUTPUT && img_output(optarg, &json))
			return 1;
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	struct info *v = calloc(CHAIN_MAX, sizeof *v);
	int r = v ? gather(argv[optind], &o, chain, v, &n) : img_fail("out of memory");
	if (!r && json && chain)
		puts("[");
	for (unsigned i = 0; !r && i < n; i++) {
		if (i)
			puts(json ? "," : "");
		if (json)
			json_info(&v[i], chain ? 4 : 0);
		else
			human_info(&v[i]);
	}
	if (!r && json)
		puts(chain ? "\n]" : "");
	while (n) {
		image_info_free(&v[--n].i);
		block_close(v[n].b);
		free(v[n].name);
	}
	free(v);
	return r;
}

/* --- map --- */

struct map { bool json, first; };

static bool same(const struct block_extent *a, const struct block_extent *b, bool json)
{
	if (a->zero != b->zero || a->data != b->data || a->depth != b->depth || a->present != b->present || a->has_offset != b->has_offset ||
	    (json ? false : a->compressed != b->compressed))
		return false;
	return !a->has_offset || a->offset + a->len == b->offset;
}

static int print_extent(struct map *m, uint64_t start, const struct block_extent *e)
{
	if (!m->json) {
		if (e->data && !e->has_offset)
			return img_fail("File contains external, encrypted or compressed clusters.");
		if (e->data && !e->zero)
			printf("%#-16llx%#-16llx%#-16llx%s\n", (unsigned long long)start, (unsigned long long)e->len,
			       (unsigned long long)e->offset, e->file ? e->file : "");
		return 0;
	}
	printf("%s{ \"start\": %llu, \"length\": %llu, \"depth\": %u, \"present\": %s, \"zero\": %s, \"data\": %s", m->first ? "[" : ",\n",
	       (unsigned long long)start, (unsigned long long)e->len, e->depth, e->present ? "true" : "false", e->zero ? "true" : "false",
	       e->data ? "true" : "false");
	if (e->has_offset)
		printf(", \"offset\": %llu", (unsigned long long)e->offset);
	printf("}");
	m->first = false;
	return 0;
}

static int map_all(struct block *b, struct map *m, uint64_t from, uint64_t end)
{
	struct block_extent cur = { 0 }, e;
	uint64_t start = from;
	int r = 0;
	for (uint64_t off = from; !r && off < end; off += e.len) {
		r = image_map(b, NULL, off, end - off, &e);
		if (r)
			return img_fail("Failed to read image metadata: %s", strerror(-r));
		if (cur.len && same(&cur, &e, m->json)) {
			cur.len += e.len;
			continue;
		}
		if (cur.len)
			r = print_extent(m, start, &cur);
		cur = e;
		start = off;
	}
	return r || !cur.len ? r : print_extent(m, start, &cur);
}

int img_map(int argc, char **argv)
{
	struct img_open o = { 0 };
	struct map m = { .first = true };
	int64_t from = 0, len = INT64_MAX;
	int c;
	while ((c = img_getopt(argc, argv, ":f:s:l:hU")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'U')
			o.shared = true;
		else if (c == OPT_OUTPUT && img_output(optarg, &m.json))
			return 1;
		else if ((c == OPT_START || c == 's') && (from = img_size(optarg, "start offset")) < 0)
			return 1;
		else if ((c == OPT_LENGTH || c == 'l') && (len = img_size(optarg, "max length")) < 0)
			return 1;
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	struct block *b = img_open(argv[optind], &o);
	if (!b)
		return 1;
	if (!m.json)
		printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
	uint64_t end = MIN(block_length(b), (uint64_t)from + MIN((uint64_t)len, (uint64_t)(INT64_MAX - from)));
	int r = map_all(b, &m, (uint64_t)from, end);
	if (m.json && m.first) /* nothing is there: QEMU shows that as one range of no length */
		r = r ? r : print_extent(&m, (uint64_t)from, &(struct block_extent){ 0 });
	if (m.json)
		puts("]");
	block_close(b);
	return r ? 1 : 0;
}

/* --- check --- */

static void print_finding(void *opaque, const char *line)
{
	fprintf(stderr, "%s\n", line);
}

static void human_check(const struct image_check *c)
{
	if (!c->corruptions && !c->leaks && !c->errors) {
		puts("No errors were found on the image.");
	} else {
		if (c->corruptions)
			printf("\n%llu errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
			       (unsigned long long)c->corruptions);
		if (c->leaks)
			printf("\n%llu leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
			       (unsigned long long)c->leaks);
		if (c->errors)
			printf("\n%llu internal errors have occurred during the check.\n", (unsigned long long)c->errors);
	}
	if (c->total && c->allocated)
		printf("%llu/%llu = %0.2f%% allocated, %0.2f%% fragmented, %0.2f%% compressed clusters\n", (unsigned long long)c->allocated,
		       (unsigned long long)c->total, (double)c->allocated * 100.0 / (double)c->total,
		       (double)c->fragmented * 100.0 / (double)c->allocated, (double)c->compressed * 100.0 / (double)c->allocated);
	if (c->end_offset)
		printf("Image end offset: %llu\n", (unsigned long long)c->end_offset);
}

static void json_check(const struct image_check *c, const char *file, const char *format)
{
	puts("{");
	if (c->end_offset)
		printf("    \"image-end-offset\": %llu,\n", (unsigned long long)c->end_offset);
	if (c->compressed)
		printf("    \"compressed-clusters\": %llu,\n", (unsigned long long)c->compressed);
	if (c->total)
		printf("    \"total-clusters\": %llu,\n", (unsigned long long)c->total);
	if (c->corruptions_fixed)
		printf("    \"corruptions-fixed\": %llu,\n", (unsigned long long)c->corruptions_fixed);
	if (c->corruptions)
		printf("    \"corruptions\": %llu,\n", (unsigned long long)c->corruptions);
	printf("    \"check-errors\": %llu,\n", (unsigned long long)c->errors);
	if (c->leaks_fixed)
		printf("    \"leaks-fixed\": %llu,\n", (unsigned long long)c->leaks_fixed);
	if (c->leaks)
		printf("    \"leaks\": %llu,\n", (unsigned long long)c->leaks);
	if (c->allocated)
		printf("    \"allocated-clusters\": %llu,\n", (unsigned long long)c->allocated);
	printf("    \"filename\": ");
	img_json_string(file);
	printf(",\n    \"format\": \"%s\"", format);
	if (c->fragmented)
		printf(",\n    \"fragmented-clusters\": %llu", (unsigned long long)c->fragmented);
	puts("\n}");
}

int img_check(int argc, char **argv)
{
	struct img_open o = { .as_is = true };
	struct image_check k = { .say = print_finding }, again = { .say = print_finding };
	struct err err = { 0 };
	bool json = false, quiet = false;
	unsigned fix = 0;
	int c;
	while ((c = img_getopt(argc, argv, ":hf:r:T:qU")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'U')
			o.shared = true;
		else if (c == 'T')
			o.cache = optarg;
		else if (c == 'q')
			quiet = true;
		else if (c == OPT_OUTPUT && img_output(optarg, &json))
			return 1;
		else if (c == 'r') {
			fix = !strcmp(optarg, "leaks") ? CHECK_FIX_LEAKS : !strcmp(optarg, "all") ? CHECK_FIX_LEAKS | CHECK_FIX_ERRORS : 0;
			if (!fix)
				return img_usage("--repair expects 'leaks' or 'all' as argument");
		}
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	struct block *b = img_open(argv[optind], &o);
	if (b && !strcmp(image_format(b), "vhdx"))
		fix = 0; /* there it is the log that is replayed, and an image that has one was not opened */
	if (b && fix && strcmp(image_format(b), "qcow2")) { /* the others are not written, so not repaired */
		block_close(b);
		return img_fail("This image format does not support repairing"), 63;
	}
	if (b && fix) {
		block_close(b);
		o.write = true;
		b = img_open(argv[optind], &o);
	}
	if (!b)
		return 1;
	int r = image_check(b, fix, &k, &err);
	if (r) {
		block_close(b);
		if (r == -ENOTSUP)
			return img_fail("This image format does not support checks"), 63;
		return img_fail("Check failed: %s", err.msg);
	}
	uint64_t fixed = k.corruptions_fixed + k.leaks_fixed;
	if (fixed) {
		if (!json && !quiet)
			printf("The following inconsistencies were found and repaired:\n\n    %llu leaked clusters\n    %llu corruptions\n\n"
			       "Double checking the fixed image now...\n", (unsigned long long)k.leaks_fixed, (unsigned long long)k.corruptions_fixed);
		fflush(stdout);
		r = image_check(b, 0, &again, &err);
		again.leaks_fixed = k.leaks_fixed;
		again.corruptions_fixed = k.corruptions_fixed;
		k = again;
	}
	fflush(stderr);
	if (json && !quiet)
		json_check(&k, argv[optind], image_driver(b));
	else if (!quiet)
		human_check(&k);
	block_close(b);
	return r || k.errors ? 1 : k.corruptions ? 2 : k.leaks ? 3 : 0;
}

/* --- snapshot --- */

int img_snapshot(int argc, char **argv)
{
	struct img_open o = { 0 };
	struct err err = { 0 };
	struct image_info i;
	const char *name = NULL;
	int action = 0, c, r = 0;
	while ((c = img_getopt(argc, argv, ":la:c:d:hqU")) >= 0) {
		if (strchr("lacd", c)) {
			if (action)
				return img_usage("Cannot mix '-l', '-a', '-c', '-d'");
			action = c;
			name = optarg;
		} else if (c == 'U') {
			o.shared = true;
		}
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	o.write = action && action != 'l';
	struct block *b = img_open(argv[optind], &o);
	if (!b)
		return 1;
	if (action == 'l' && !image_info(b, &i)) {
		human_snapshots(&i);
		image_info_free(&i);
	} else if (action == 'c') {
		r = image_snapshot_create(b, name, &err);
		if (r)
			img_fail("Could not create snapshot '%s': %s", name, err.msg);
	} else if (action == 'a') {
		r = image_snapshot_apply(b, name, &err);
		if (r)
			img_fail("Could not apply snapshot '%s': %s", name, err.msg);
	} else if (action == 'd') {
		r = image_snapshot_delete(b, name, &err);
		if (r)
			img_fail("Could not delete snapshot '%s': %s", name, r == -ENOENT ? "snapshot not found" : err.msg);
	}
	int r2 = block_close_checked(b);
	return r || r2 ? 1 : 0;
}

/* --- measure --- */

struct measure { uint64_t size, required, full; };

/* What a qcow2 image needs for `data` bytes in whole clusters of a disk of `size`: as image_create() lays it out. */
static uint64_t qcow2_bytes(const struct image_create *c, uint64_t size, uint64_t clusters)
{
	uint64_t cs = c->cluster_size, per_l2 = cs / (c->extended_l2 ? 16 : 8), l2 = (size / cs + !!(size % cs) + per_l2 - 1) / per_l2;
	uint64_t l1 = (l2 * 8 + cs - 1) / cs, fixed = 1 + l2 + l1 + clusters;
	uint64_t per_block = cs * 8 / c->refcount_bits, blocks = 0, table = 0;
	for (;;) {
		uint64_t all = fixed + blocks + table, b = (all + per_block - 1) / per_block, t = (b * 8 + cs - 1) / cs;
		if (b <= blocks && t <= table)
			return all * cs;
		blocks = MAX(blocks, b);
		table = MAX(table, t);
	}
}

/* What copies of the persistent bitmaps of `b` need in such an image: false when `b` cannot have any. */
static bool bitmaps_bytes(struct block *b, uint64_t size, uint32_t cs, uint64_t *bytes)
{
	struct image_info i;
	*bytes = 0;
	if (!b || image_info(b, &i))
		return false;
	bool can = i.version >= 3;
	uint64_t directory = 0;
	for (unsigned k = 0; can && k < i.nbitmaps; k++) {
		uint64_t bits = (size + i.bitmaps[k].granularity - 1) / i.bitmaps[k].granularity, clusters = ((bits + 7) / 8 + cs - 1) / cs;
		*bytes += clusters * cs + ALIGN_UP(clusters * 8, (uint64_t)cs);
		directory += ALIGN_UP(24 + strlen(i.bitmaps[k].name), (uint64_t)8);
	}
	*bytes += ALIGN_UP(directory, (uint64_t)cs);
	image_info_free(&i);
	return can;
}

static int used_clusters(struct block *b, uint64_t cs, uint64_t *n)
{
	uint64_t last = UINT64_MAX;
	*n = 0;
	for (uint64_t off = 0; off < block_length(b);) {
		struct block_extent e;
		int r = image_map(b, NULL, off, block_length(b) - off, &e);
		if (r)
			return r;
		if (e.data && !e.zero) {
			uint64_t a = off / cs, z = (off + e.len - 1) / cs;
			*n += z - a + (a != last);
			last = z;
		}
		off += e.len;
	}
	return 0;
}

/* As in QEMU only what makes a difference for the size has to fit together. */
static int check_measured(const struct image_create *c)
{
	struct image_create m = { .cluster_size = c->cluster_size, .refcount_bits = c->refcount_bits, .version = c->version, .extended_l2 = c->extended_l2 };
	struct err err = { 0 };
	if (m.extended_l2 && m.refcount_bits == 16)
		m.version = 3;
	return image_create_check(&m, &err) ? img_fail("%s", err.msg) : 0;
}

int img_measure(int argc, char **argv)
{
	struct img_open o = { 0 };
	struct image_create cr;
	struct img_create_seen seen = { 0 };
	struct keyvals l = { 0 };
	struct err err = { 0 };
	char *options = NULL;
	int64_t size = -1;
	bool json = false;
	uint64_t used = 0, required, full;
	int c, r = 0;
	image_create_init(&cr);
	while ((c = img_getopt(argc, argv, ":hf:l:o:O:U")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'l')
			o.internal = optarg;
		else if (c == 'o' && img_add_options(&options, optarg))
			return 1;
		else if (c == 'O')
			cr.format = optarg;
		else if (c == 'U')
			o.shared = true;
		else if (c == OPT_OUTPUT && img_output(optarg, &json))
			return 1;
		else if (c == OPT_SIZE && (size = img_size(optarg, "image size")) < 0)
			return 1;
	}
	if (argc - optind > 1 || (optind < argc && size >= 0) || (optind == argc && size < 0))
		return img_fail(optind < argc && size >= 0 ? "--size N cannot be used together with a filename" :
				argc - optind > 1 ? "At most one filename argument is allowed." : "Either --size N or one filename must be specified");
	if (options && keyvals_parse(&l, "-o", options, NULL, &err))
		return img_fail("%s", err.msg);
	cr.cluster_size = 65536;
	r = img_create_options(&cr, &l, &seen);
	if (!r && strcmp(cr.format, "raw") && strcmp(cr.format, "qcow2"))
		r = img_fail("Cannot measure for format '%s': Lodge makes raw and qcow2 images", cr.format);
	if (!r && !strcmp(cr.format, "qcow2"))
		r = check_measured(&cr);
	struct block *b = r || optind == argc ? NULL : img_open(argv[optind], &o);
	r = r || (optind < argc && !b);
	if (!r && b) {
		size = (int64_t)block_length(b);
		if (used_clusters(b, cr.cluster_size, &used))
			r = img_fail("Failed to read image metadata");
	}
	if (!r) {
		uint64_t vs = ALIGN_UP((uint64_t)size, (uint64_t)512), all = vs / cr.cluster_size + !!(vs % cr.cluster_size);
		bool qcow2 = !strcmp(cr.format, "qcow2");
		if (cr.prealloc >= PREALLOC_FALLOC)
			used = all;
		required = qcow2 ? qcow2_bytes(&cr, vs, all) - (all - used) * cr.cluster_size : vs;
		full = qcow2 ? qcow2_bytes(&cr, vs, all) : vs;
		uint64_t bitmaps;
		bool has = bitmaps_bytes(b, vs, cr.cluster_size, &bitmaps) && qcow2 && cr.version >= 3;
		if (json && has)
			printf("{\n    \"bitmaps\": %llu,\n", (unsigned long long)bitmaps);
		else if (json)
			puts("{");
		printf(json ? "    \"required\": %llu,\n    \"fully-allocated\": %llu\n}\n" : "required size: %llu\nfully allocated size: %llu\n",
		       (unsigned long long)required, (unsigned long long)full);
		if (!json && has)
			printf("bitmaps size: %llu\n", (unsigned long long)bitmaps);
	}
	block_close(b);
	keyvals_free(&l);
	free(options);
	return r ? 1 : 0;
}
