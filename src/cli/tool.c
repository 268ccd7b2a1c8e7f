/* Shared by the tools in QEMU's words. */
#include "cli/tool.h"

#include <stdio.h>
#include <string.h>

#include "base/util.h"

int tool_fail(const char *tool, const char *after, const char *fmt, va_list ap)
{
	fflush(stdout);
	fprintf(stderr, "%s: ", tool);
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, "%s\n", after);
	return 1;
}

struct name { const char *name; int value; };

static bool find(const struct name *v, unsigned n, const char *name, int *value)
{
	for (unsigned i = 0; i < n; i++) {
		if (!strcmp(v[i].name, name)) {
			*value = v[i].value;
			return true;
		}
	}
	return false;
}

bool tool_cache(const char *name, enum block_cache *c)
{
	static const struct name modes[] = {
		{ "writeback", CACHE_WRITEBACK }, { "none", CACHE_NONE }, { "off", CACHE_NONE },
		{ "writethrough", CACHE_WRITETHROUGH }, { "directsync", CACHE_DIRECTSYNC }, { "unsafe", CACHE_UNSAFE },
	};
	int v;
	if (!find(modes, ARRAY_SIZE(modes), name, &v))
		return false;
	*c = (enum block_cache)v;
	return true;
}

static const struct name preallocs[] = {
	{ "off", PREALLOC_OFF }, { "metadata", PREALLOC_METADATA }, { "falloc", PREALLOC_FALLOC }, { "full", PREALLOC_FULL },
};

bool tool_prealloc(const char *name, enum block_prealloc *p)
{
	int v;
	if (!find(preallocs, ARRAY_SIZE(preallocs), name, &v))
		return false;
	*p = (enum block_prealloc)v;
	return true;
}

const char *tool_prealloc_name(enum block_prealloc p)
{
	return preallocs[p].name;
}
