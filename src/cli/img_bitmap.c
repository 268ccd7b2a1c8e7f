/* lodge img bitmap, and what convert --bitmaps copies. */
#include <errno.h>
#include <getopt.h>
#include <stdlib.h>

#include "cli/img.h"

static const struct { const char *name; enum image_bitmap_op op; bool arg; } actions[] = {
	{ "add", BITMAP_ADD, false }, { "remove", BITMAP_REMOVE, false }, { "clear", BITMAP_CLEAR, false }, { "enable", BITMAP_ENABLE, false },
	{ "disable", BITMAP_DISABLE, false }, { "merge", BITMAP_MERGE, true },
};

struct action { enum image_bitmap_op op; const char *source; };

static int perform(struct block *b, struct block *source, const char *name, const struct action *a, unsigned n, uint64_t granularity)
{
	struct err err = { 0 };

	for (unsigned i = 0; i < n; i++) {
		struct image_bitmap_arg arg = { granularity, a[i].source ? source : NULL, a[i].source };
		if (image_bitmap_change(b, a[i].op, name, &arg, &err))
			return img_fail("Operation %s on bitmap %s failed: %s", actions[a[i].op].name, name, err.msg);
	}
	return 0;
}

int img_bitmap(int argc, char **argv)
{
	struct action a[64];
	struct img_open o = { .write = true }, so = { 0 };
	const char *source = NULL;
	int64_t granularity = 0;
	unsigned n = 0;
	bool add = false, merge = false;
	int c;

	while ((c = img_getopt(argc, argv, ":hb:f:F:g:U")) >= 0) {
		switch (c) {
		case 'b': source = optarg; break;
		case 'f': o.format = optarg; break;
		case 'F': so.format = optarg; break;
		case 'U': so.shared = true; break;
		case 'g':
			granularity = img_size(optarg, "granularity");
			if (granularity < 0)
				return 1;
			break;
		}
		if (c < OPT_BITMAP_ADD || c > OPT_BITMAP_ADD + BITMAP_MERGE)
			continue;
		if (n == ARRAY_SIZE(a))
			return img_fail("too many actions");
		a[n] = (struct action){ (enum image_bitmap_op)(c - OPT_BITMAP_ADD), c - OPT_BITMAP_ADD == BITMAP_MERGE ? optarg : NULL };
		add |= a[n].op == BITMAP_ADD;
		merge |= a[n++].op == BITMAP_MERGE;
	}
	if (optind != argc - 2)
		return img_usage("Expecting filename and bitmap name");
	if (!n)
		return img_usage("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
	if (granularity && !add)
		return img_usage("granularity only supported with --add");
	if ((source || so.format) && (!merge || !source))
		return img_usage(source ? "-b and -F only supported with --merge" : "-F without -b");
	struct block *b = img_open(argv[optind], &o), *s = b && source ? img_open(source, &so) : b;
	int r = b && s ? perform(b, s, argv[optind + 1], a, n, (uint64_t)granularity) : 1;
	if (s != b)
		block_close(s);
	if (block_close_checked(b) && !r)
		r = img_fail("%s: cannot write", argv[optind]);
	return r;
}

static int copy_one(struct block *to, struct block *from, const struct image_bitmap *m)
{
	struct image_bitmap_arg add = { .granularity = m->granularity }, merge = { .source = from, .source_name = m->name };
	struct err err = { 0 };
	int r = image_bitmap_change(to, BITMAP_ADD, m->name, &add, &err);

	if (!r)
		r = image_bitmap_change(to, BITMAP_MERGE, m->name, &merge, &err);
	if (!r && !m->automatic)
		r = image_bitmap_change(to, BITMAP_DISABLE, m->name, NULL, &err);
	if (r) {
		image_bitmap_change(to, BITMAP_REMOVE, m->name, NULL, NULL);
		return img_fail("Failed to populate bitmap %s: %s", m->name, err.msg);
	}
	return 0;
}

int img_copy_bitmaps(struct block *to, struct block *from, bool skip_broken)
{
	struct image_info i;
	int r = image_info(from, &i) ? img_fail("This will fail: the source has no persistent bitmaps") : 0;

	for (unsigned k = 0; !r && k < i.nbitmaps; k++) {
		bool broken = i.bitmaps[k].in_use || !i.bitmaps_consistent;
		if (broken && skip_broken)
			fprintf(stderr, "qemu-img: warning: Skipping inconsistent bitmap '%s'\n", i.bitmaps[k].name);
		else
			r = broken ? img_fail("Cannot copy inconsistent bitmap '%s'; try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'", i.bitmaps[k].name) :
				     copy_one(to, from, &i.bitmaps[k]);
	}
	image_info_free(&i);
	return r;
}
