/* The way around what this object interposes. */
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>

#include "preload/preload.h"

long raw_call(long nr, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long r;

	__asm__ volatile("syscall" : "=a"(r) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
	if ((unsigned long)r > -4096ul) {
		errno = (int)-r;
		return -1;
	}
	return r;
}

void *real_find(_Atomic(void *) *cache, const char *name)
{
	void *p = atomic_load_explicit(cache, memory_order_relaxed);

	if (!p) {
		p = dlsym(RTLD_NEXT, name);
		atomic_store_explicit(cache, p, memory_order_relaxed);
	}
	return p;
}
