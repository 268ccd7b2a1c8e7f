/* lodge img: what -o can say (-o help), and the limit of -r. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "cli/img.h"
#include "loop/loop.h"

static const struct { const char *key, *type, *help; bool qcow2_only, amend; } options[] = {
	{ "backing_file", "str", "Name of the base image", true, true },
	{ "backing_fmt", "str", "Format of the base image", true, true },
	{ "cluster_size", "size", "Cluster size, 512 bytes to 2 MiB", true, false },
	{ "compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", true, true },
	{ "compression_type", "str", "Method for compressed clusters: zlib or zstd", true, false },
	{ "data_file", "str", "Name of an external data file", true, false },
	{ "data_file_raw", "bool (on/off)", "The data file stays valid as a raw image", true, true },
	{ "extended_l2", "bool (on/off)", "L2 tables with subclusters", true, false },
	{ "lazy_refcounts", "bool (on/off)", "Refcounts may be behind until the image is closed", true, true },
	{ "preallocation", "str", "Allowed values: off, metadata (qcow2), falloc, full", false, false },
	{ "refcount_bits", "num", "Width of a refcount, 1 to 64", true, true },
	{ "size", "size", "Size of the virtual disk", false, false },
};

bool img_options_help(const char *text, const char *format, bool amend)
{
	bool qcow2 = !strcmp(format, "qcow2");
	const char *last = text ? strrchr(text, ',') : NULL;
	last = last ? last + 1 : text;
	if (!text || (strcmp(last, "help") && strcmp(last, "?")))
		return false;
	printf(amend ? "Amend options for '%s':\n" : "Supported %s options:\n", format);
	for (unsigned i = 0; i < ARRAY_SIZE(options); i++) {
		char left[64];
		if ((options[i].qcow2_only && !qcow2) || (amend && !options[i].amend))
			continue;
		snprintf(left, sizeof left, "%s=<%s>", options[i].key, options[i].type);
		printf("  %-22s - %s\n", left, options[i].help);
	}
	return true;
}

int img_add_options(char **list, const char *more)
{
	size_t len = strlen(more), commas = 0;
	char *all;
	while (commas < len && more[len - 1 - commas] == ',')
		commas++;
	if (!len || *more == ',' || commas % 2)
		return img_fail("Invalid option list: %s", more);
	if (asprintf(&all, "%s%s%s", *list ? *list : "", *list ? "," : "", more) < 0)
		return img_fail("out of memory");
	free(*list);
	*list = all;
	return 0;
}

/* --- a limit in bytes a second --- */

double img_rate_wait(struct img_rate *r, uint64_t bytes)
{
	double t = (double)clock_host_ns() / 1e9;
	if (!r->limit)
		return 0;
	r->due = (r->due > t ? r->due : t) + (double)bytes / (double)r->limit;
	return r->due - t;
}

void img_sleep(double seconds)
{
	struct timespec t = { (time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9) };
	if (seconds > 0)
		while (nanosleep(&t, &t) && errno == EINTR)
			;
}
