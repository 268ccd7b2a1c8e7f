/*
 * softkvm's own descriptors. The object is linked with --wrap for these functions: what softkvm opens is moved out
 * of the way of the program's numbers (some expect the lowest) and kept from its close_range().
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/preload.h"

#pragma GCC diagnostic ignored "-Wmissing-prototypes"

static int keep(int fd)
{
	struct rlimit lim;
	long high, base = 512;

	if (fd < 0)
		return fd;
	if (!getrlimit(RLIMIT_NOFILE, &lim) && lim.rlim_cur < 2 * (rlim_t)base)
		base = (long)lim.rlim_cur / 2;
	high = RAW(SYS_fcntl, fd, F_DUPFD_CLOEXEC, base);
	if (high >= 0) {
		RAW(SYS_close, fd);
		fd = (int)high;
	}
	internal_add(fd);
	return fd;
}

int __wrap_eventfd(unsigned count, int flags) { return keep((int)RAW(SYS_eventfd2, count, flags)); }
int __wrap_epoll_create1(int flags) { return keep((int)RAW(SYS_epoll_create1, flags)); }

int __wrap_signalfd(int fd, const sigset_t *mask, int flags)
{
	int r = (int)RAW(SYS_signalfd4, fd, mask, sizeof(uint64_t), flags);

	return fd < 0 ? keep(r) : r;
}

/* softkvm duplicates the client's eventfds; other commands pass. Its files are compiled for 64-bit offsets, hence the names. */
int __wrap_fcntl64(int fd, int cmd, ...)
{
	va_list ap;
	long arg, r;

	va_start(ap, cmd);
	arg = va_arg(ap, long);
	va_end(ap);
	r = RAW(SYS_fcntl, fd, cmd, arg);
	return cmd == F_DUPFD_CLOEXEC ? keep((int)r) : (int)r;
}

/*
 * Nothing that softkvm maps is a file of ours: spare it the look. ThreadSanitizer has to hear of it, or takes what two
 * threads have one after the other at one address for a race.
 */
void *__wrap_mmap64(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
#ifdef __SANITIZE_THREAD__
	__typeof__(&mmap) heard = (__typeof__(&mmap))dlsym(RTLD_DEFAULT, "mmap");

	addr = heard(addr, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (flags & (MAP_32BIT | MAP_FIXED)), -1, 0);
	if (addr == MAP_FAILED)
		return addr;
	flags |= MAP_FIXED;
#endif
	return (void *)RAW(SYS_mmap, addr, len, prot, flags, fd, off);
}

int __wrap_close(int fd)
{
	internal_remove(fd);
	return (int)RAW(SYS_close, fd);
}
