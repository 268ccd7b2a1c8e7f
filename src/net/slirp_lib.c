#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>

#include "net/user.h"

static struct slirp_lib lib;            /* written once; the same for every machine in the process */
static char problem[256];

static void load(void)
{
	void *h = dlopen("libslirp.so.0", RTLD_NOW | RTLD_LOCAL);
	if (!h) {
		const char *e = dlerror();
		snprintf(problem, sizeof problem, "%s", e ? e : "cannot be loaded");
		return;
	}
#define X(f) if (!(*(void **)&lib.f = dlsym(h, #f))) snprintf(problem, sizeof problem, "libslirp.so.0 lacks " #f);
	SLIRP_FUNCTIONS(X)
#undef X
}

int slirp_lib_load(const struct slirp_lib **out, struct err *err)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, load);
	if (problem[0])
		return err_set(err, -ENOENT, "-netdev user: %s (package libslirp0)", problem);
	*out = &lib;
	return 0;
}
