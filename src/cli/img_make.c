/* lodge img: verbs that make and change: create, resize, amend, rebase, commit. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/img.h"
#include "cli/tool.h"

/* As an option could be given: a comma in it stands twice. */
static void print_name(const char *key, const char *value)
{
	if (!value)
		return;
	printf(" %s=", key);
	for (; *value; value++)
		fputs((char[]){ *value, *value == ',' ? ',' : 0, 0 }, stdout);
}

static void print_formatting(const struct image_create *c, const struct img_create_seen *seen)
{
	printf("Formatting '%s', fmt=%s", c->file, c->format);
	if (strcmp(c->format, "qcow2")) {
		printf(" size=%llu", (unsigned long long)c->size);
		if (seen->prealloc)
			printf(" preallocation=%s", tool_prealloc_name(c->prealloc));
		puts("");
		return;
	}
	if (seen->encryption)
		fputs(" encryption=off", stdout);
	printf(" cluster_size=%u extended_l2=%s", c->cluster_size, c->extended_l2 ? "on" : "off");
	if (seen->prealloc)
		printf(" preallocation=%s", tool_prealloc_name(c->prealloc));
	printf(" compression_type=%s size=%llu", c->zstd ? "zstd" : "zlib", (unsigned long long)c->size);
	if (seen->compat)
		printf(" compat=%s", seen->compat);
	print_name("backing_file", c->backing);
	if (c->backing_format)
		printf(" backing_fmt=%s", c->backing_format);
	print_name("data_file", c->data_file);
	if (seen->data_raw)
		printf(" data_file_raw=%s", c->data_raw ? "on" : "off");
	printf(" lazy_refcounts=%s refcount_bits=%u\n", c->lazy_refcounts ? "on" : "off", c->refcount_bits);
}

/* The backing file's size is the default; it must be there and be what it is said to be. */
static int look_at_backing(struct image_create *c, bool unchecked, bool have_size)
{
	char *path = block_path_beside(c->file, c->backing);
	struct img_open o = { .format = c->backing_format, .plain = true };
	if (!c->backing_format) {
		free(path);
		return img_fail("%s: Could not create image: Backing file specified without backing format (use -F)", c->file);
	}
	if (path && !strcmp(path, c->file)) {
		free(path);
		return img_fail("%s: Error: Trying to create an image with the same filename as the backing file", c->file);
	}
	if (unchecked && have_size) {
		free(path);
		return 0;
	}
	struct block *b = path ? img_open(path, &o) : NULL;
	free(path);
	if (!b)
		return 1;
	if (!have_size)
		c->size = block_length(b);
	block_close(b);
	return 0;
}

int img_create(int argc, char **argv)
{
	struct image_create cr;
	struct img_create_seen seen = { 0 };
	struct keyvals l = { 0 };
	struct err err = { 0 };
	const char *backing = NULL, *backing_format = NULL;
	char *options = NULL;
	bool quiet = false, unchecked = false;
	int64_t size = -1;
	int c;
	image_create_init(&cr);
	while ((c = img_getopt(argc, argv, ":F:b:f:ho:qu")) >= 0) {
		switch (c) {
		case 'F': backing_format = optarg; break;
		case 'b': backing = optarg; break;
		case 'f': cr.format = optarg; break;
		case 'o':
			if (img_add_options(&options, optarg))
				return 1;
			break;
		case 'q': quiet = true; break;
		case 'u': unchecked = true; break;
		}
	}
	if (img_options_help(options, cr.format, false))
		return 0;
	if (optind >= argc)
		return img_usage("Expecting image file name");
	cr.file = argv[optind++];
	if (optind < argc && (size = img_size(argv[optind++], "image size")) < 0)
		return 1;
	if (optind < argc)
		return img_usage("Unexpected argument: %s", argv[optind]);
	if (strcmp(cr.format, "raw") && strcmp(cr.format, "qcow2"))
		return img_fail("%s: Unknown file format '%s'", cr.file, cr.format);
	if (options && keyvals_parse(&l, "-o", options, NULL, &err))
		return img_fail("%s", err.msg);
	cr.cluster_size = 65536;
	int r = img_create_options(&cr, &l, &seen);
	if (!r && backing)
		cr.backing = backing;
	if (!r && backing_format)
		cr.backing_format = backing_format;
	if (!r && size >= 0)
		cr.size = (uint64_t)size;
	bool have_size = size >= 0 || seen.size;
	if (!r && size >= 0 && seen.size)
		r = img_fail("%s: The image size must be specified only once", cr.file);
	if (!r && cr.backing_format && !cr.backing)
		r = img_fail("%s: Backing format cannot be used without backing file", cr.file);
	if (!r && cr.backing && !*cr.backing)
		r = img_fail("%s: Expected backing file name, got empty string", cr.file);
	if (!r && cr.backing && strcmp(cr.format, "qcow2"))
		r = img_fail("%s: Backing file not supported for file format '%s'", cr.file, cr.format);
	if (!r && cr.backing)
		r = look_at_backing(&cr, unchecked, have_size);
	if (!r && !have_size && (unchecked || !cr.backing)) /* -u: nobody looks what size the backing file has */
		r = img_fail("%s: Image creation needs a size parameter", cr.file);
	if (!r && !quiet)
		print_formatting(&cr, &seen);
	fflush(stdout);
	cr.tls = img_objects();
	if (!r && image_create(&cr, &err))
		r = img_file_failed(cr.file, err.msg);
	keyvals_free(&l);
	free(options);
	return r;
}

int img_resize(int argc, char **argv)
{
	struct img_open o = { .write = true };
	enum block_prealloc p = PREALLOC_OFF;
	struct err err = { 0 };
	bool quiet = false, shrink = false;
	const char *text;
	int c;
	/* The size may start with a minus: it is taken off before options are read. */
	if (argc < 3)
		return img_usage("Not enough arguments");
	text = argv[--argc];
	while ((c = img_getopt(argc, argv, ":f:hq")) >= 0) {
		if (c == 'f')
			o.format = optarg;
		else if (c == 'q')
			quiet = true;
		else if (c == OPT_SHRINK)
			shrink = true;
		else if (c == OPT_PREALLOC && !tool_prealloc(optarg, &p))
			return img_fail("Invalid preallocation mode '%s'", optarg);
	}
	if (optind != argc - 1)
		return img_usage("Expecting image file name and size");
	char sign = *text == '+' || *text == '-' ? *text++ : 0;
	int64_t n = img_size(text, "image size");
	if (n < 0)
		return 1;
	struct block *b = img_open(argv[optind], &o);
	if (!b)
		return 1;
	uint64_t old = block_length(b), size = sign == '+' ? old + (uint64_t)n : sign == '-' ? old - MIN(old, (uint64_t)n) : (uint64_t)n;
	int r = 0;
	if (!size)
		r = img_fail("New image size must be positive");
	else if (size <= old && p != PREALLOC_OFF)
		r = img_fail("Preallocation can only be used for growing images");
	else if (size < old && !shrink) {
		fputs("qemu-img: Use the --shrink option to perform a shrink operation.\n"
		      "qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an "
		      "operation, make sure there is no important data there.\n", stderr);
		r = 1;
	} else if (image_resize(b, size, p, &err)) {
		r = img_fail("%s", err.msg);
	}
	if (block_close_checked(b) && !r)
		r = img_fail("%s: cannot write", argv[optind]);
	if (!r && !quiet)
		puts("Image resized.");
	return r;
}

int img_amend(int argc, char **argv)
{
	struct img_open o = { .write = true };
	struct image_create cr;
	struct img_create_seen seen = { 0 };
	struct keyvals l = { 0 };
	struct err err = { 0 };
	char *options = NULL;
	bool progress = false, quiet = false;
	int c, r;
	image_create_init(&cr);
	cr.format = "qcow2";
	while ((c = img_getopt(argc, argv, ":ho:f:t:pq")) >= 0) {
		if (c == 'o' && img_add_options(&options, optarg))
			return 1;
		else if (c == 'f')
			o.format = optarg;
		else if (c == 't')
			o.cache = optarg;
		else if (c == 'p')
			progress = true;
		else if (c == 'q')
			quiet = true;
	}
	progress = progress && !quiet;
	if (!options)
		return img_usage("Must specify options (-o)");
	if (o.format && strcmp(o.format, "qcow2") && !block_check_format("-f", o.format, &err))
		return img_fail("Format driver '%s' does not support option amendment", o.format);
	if (img_options_help(options, cr.format, true))
		return 0;
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	if (keyvals_parse(&l, "-o", options, NULL, &err))
		return img_fail("%s", err.msg);
	struct block *b = img_open(argv[optind], &o);
	r = b ? img_create_options(&cr, &l, &seen) : 1;
	struct image_amend a = { seen.version, seen.lazy, seen.refcount_bits, seen.data_raw, cr.version, cr.refcount_bits,
				 cr.lazy_refcounts, cr.data_raw };
	img_progress(progress && !r, 0);
	if (!r && (cr.backing || cr.backing_format))
		r = img_fail("Cannot amend the backing file; use 'qemu-img rebase'");
	if (!r && seen.other)
		r = img_fail("Error while amending options: Invalid argument; this option cannot be changed");
	if (!r && image_amend(b, &a, &err))
		r = img_fail("%s", err.msg);
	if (!r && seen.size && cr.size && image_resize(b, cr.size, PREALLOC_OFF, &err))
		r = img_fail("%s", err.msg);
	img_progress(progress && !r, 100);
	if (progress && !r)
		puts("");
	if (block_close_checked(b) && !r)
		r = img_fail("%s: cannot write", argv[optind]);
	keyvals_free(&l);
	return r;
}

/* --- rebase --- */

enum { STEP = 2 << 20 };

static int read_short(struct block *b, uint64_t off, uint8_t *buf, uint64_t len)
{
	uint64_t there = b && off < block_length(b) ? MIN(len, block_length(b) - off) : 0;
	memset(buf + there, 0, len - there);
	return there ? image_read(b, off, buf, there) : 0;
}

static bool is_zero(const uint8_t *p, uint64_t n)
{
	return !*p && !memcmp(p, p + 1, n - 1);
}

/*
 * Where `was` and `is` differ `was` goes into `b`, run by run. As in QEMU zeroes are stored as such where there was no backing file, and as data where one
 * had them.
 */
static int keep_differences(struct block *b, uint64_t off, const uint8_t *was, const uint8_t *is, uint64_t len)
{
	struct block *old = image_backing(b);
	uint64_t old_size = old ? block_length(old) : 0;
	enum { SAME, ZERO, DATA } kind = SAME, next;
	uint64_t start = 0;
	int r = 0;
	for (uint64_t at = 0, k; !r; at += k) {
		k = MIN(len - at, (uint64_t)4096);
		next = !k || !memcmp(was + at, is + at, k) ? SAME : off + at >= old_size && is_zero(was + at, k) ? ZERO : DATA;
		if (next != kind) {
			if (kind != SAME)
				r = kind == ZERO ? image_zero_own(b, off + start, at - start) : image_write(b, off + start, was + start, at - start);
			start = at;
			kind = next;
		}
		if (!k)
			break;
	}
	return r;
}

/* What `b` does not hold itself and the new backing file has otherwise is copied into `b`. */
static int rebase_copy(struct block *b, struct block *fresh, bool progress)
{
	uint8_t *was = malloc(STEP), *is = malloc(STEP);
	uint64_t size = block_length(b);
	int r = was && is ? 0 : -ENOMEM;
	for (uint64_t off = 0, n; !r && off < size; off += n) {
		struct block_extent e;
		r = image_map(b, image_backing(b), off, MIN(size - off, (uint64_t)STEP), &e);
		n = e.len;
		if (r || e.present)
			continue;
		r = image_read(b, off, was, n);
		if (!r)
			r = read_short(fresh, off, is, n);
		if (!r)
			r = keep_differences(b, off, was, is, n);
		img_progress(progress, (double)off * 100.0 / (double)size);
	}
	free(was);
	free(is);
	return r ? r : image_flush(b);
}

int img_rebase(int argc, char **argv)
{
	struct img_open o = { .write = true };
	const char *base = NULL, *format = NULL, *base_cache = NULL, *file;
	struct err err = { 0 };
	bool unsafe = false, progress = false, quiet = false, share = false;
	int c, r = 0;
	while ((c = img_getopt(argc, argv, ":hf:F:b:upt:T:qU")) >= 0) {
		switch (c) {
		case 'f': o.format = optarg; break;
		case 'F': format = optarg; break;
		case 'b': base = optarg; break;
		case 't': o.cache = optarg; break;
		case 'u': unsafe = true; break;
		case 'p': progress = true; break;
		case 'q': quiet = true; break;
		case 'T': base_cache = optarg; break;
		case 'U': share = true; break;
		}
	}
	progress = progress && !quiet;
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	if (share)
		return img_fail("Could not open '%s': force-share=on can only be used with read-only images", argv[optind]);
	if (!unsafe && !base)
		return img_usage("Use backing file (-b) option or unsafe mode (-u)");
	file = argv[optind];
	o.no_backing = unsafe;
	struct block *b = img_open(file, &o), *fresh = NULL;
	if (!b)
		return 1;
	bool remove = !base || !*base;
	if (format && block_check_format("-F", format, &err)) {
		block_close(b);
		return img_fail("Invalid format name: %s", err.msg);
	}
	if (!unsafe && !remove) {
		char *path = block_path_beside(file, base);
		struct img_open n = { .format = format, .cache = base_cache, .plain = true, .still = true };
		fresh = path ? img_open(path, &n) : NULL;
		free(path);
		r = !fresh;
	}
	if (!r && !remove && !format)
		r = img_fail("Could not change the backing file to '%s': backing format must be specified", base);
	int n = r || unsafe ? 0 : rebase_copy(b, fresh, progress);
	if (n)
		r = img_io_failed(file, "error while copying", n);
	if (!r && image_set_backing(b, remove ? NULL : base, remove ? NULL : format, &err))
		r = img_fail("Could not change the backing file to '%s': %s", base ? base : "", err.msg);
	img_progress(progress && !r, 100);
	if (progress && !r)
		puts("");
	block_close(fresh);
	if (block_close_checked(b) && !r)
		r = img_fail("%s: cannot write", file);
	return r;
}

/* --- commit --- */

/* What the chain from `b` down to, not including, `base` holds goes into `base`. */
static int commit_copy(struct block *b, struct block *below, struct block *base, uint64_t limit, bool progress)
{
	struct img_rate rate = { .limit = limit };
	uint8_t *buf = malloc(STEP);
	uint64_t size = block_length(b);
	int r = buf ? 0 : -ENOMEM;
	for (uint64_t off = 0; !r && off < size;) {
		struct block_extent e;
		r = image_map(b, below, off, MIN(size - off, (uint64_t)STEP), &e);
		if (r)
			break;
		if (e.present && e.zero)
			r = image_zero(base, off, e.len, true);
		else if (e.present) {
			img_sleep(img_rate_wait(&rate, e.len));
			r = image_read(b, off, buf, e.len);
			if (!r)
				r = image_write(base, off, buf, e.len);
		}
		off += e.len;
		img_progress(progress, (double)off * 100.0 / (double)size);
	}
	free(buf);
	return r ? r : image_flush(base);
}

/* The node and name of the file to commit into: the first backing file, or the one that `want` names. */
static struct block *find_base(struct block *b, const char *file, const char *want, char **path, const char **format)
{
	struct image_info i;
	char *at = strdup(file);
	for (struct block *n = b; n && at && !image_info(n, &i) && i.backing; n = image_backing(n)) {
		char *next = block_path_beside(at, i.backing);
		bool found = !want || !strcmp(i.backing, want) || (next && !strcmp(next, want));
		struct block *below = image_backing(n);
		image_info_free(&i);
		free(at);
		at = next;
		if (found) {
			*path = at;
			*format = below ? image_format(below) : NULL;
			return below;
		}
	}
	free(at);
	return NULL;
}

int img_commit(int argc, char **argv)
{
	struct img_open o = { .write = true }, bo = { .write = true, .plain = true };
	const char *want = NULL;
	struct err err = { 0 };
	bool quiet = false, progress = false, keep = false;
	int64_t limit = 0;
	char *path = NULL;
	int c, r = 0;
	while ((c = img_getopt(argc, argv, ":f:ht:b:dpqr:")) >= 0) {
		switch (c) {
		case 'f': o.format = optarg; break;
		case 't': o.cache = optarg; break;
		case 'b': want = optarg; keep = true; break;
		case 'd': keep = true; break;
		case 'r':
			limit = img_size(optarg, "rate limit");
			if (limit < 0)
				return 1;
			break;
		case 'p': progress = true; break;
		case 'q': quiet = true; break;
		}
	}
	if (optind != argc - 1)
		return img_usage("%s", img_missing);
	struct block *b = img_open(argv[optind], &o), *base = NULL;
	if (!b)
		return 1;
	struct block *below = find_base(b, argv[optind], want, &path, &bo.format);
	if (!below) {
		block_close(b);
		return img_fail(want ? "Did not find '%s' in the backing chain of '%s'" : "Image does not have a backing file", want, argv[optind]);
	}
	/* Our own reader keeps writers out of the base: open it beside, with locks of the writer's kind dropped. */
	block_unlock(below);
	base = img_open(path, &bo);
	r = !base;
	if (!r && block_length(base) < block_length(b) && image_resize(base, block_length(b), PREALLOC_OFF, &err))
		r = img_fail("%s", err.msg);
	int n = r ? 0 : commit_copy(b, below, base, (uint64_t)limit, progress);
	if (n)
		r = img_io_failed(path, "Failed to commit", n);
	n = block_close_checked(base);
	if (n && !r)
		r = img_io_failed(path, "Failed to commit", n);
	/* Everything is stable below: only now may the top forget. */
	if (!r && !keep) {
		if (image_make_empty(b, &err))
			r = img_fail("Could not empty %s: %s", argv[optind], err.msg);
	}
	if (block_close_checked(b) && !r)
		r = img_fail("%s: cannot write", argv[optind]);
	free(path);
	if (progress && !r)
		puts("");
	if (!r && !quiet)
		puts("Image committed.");
	return r;
}
