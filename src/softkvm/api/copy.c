/*
 * Client memory. A client of the library shares its address space with it, so a bad pointer would
 * fault here where Linux gives EFAULT. In strict mode (the preload object and fuzzing switch it on)
 * the kernel does the copy and tells.
 */
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "softkvm/api/api.h"

static _Atomic bool copy_strict;        /* a property of the process, not of a VM */

void softkvm_strict_copies(int on)
{
	atomic_store(&copy_strict, on != 0);
}

int copy_from_client(void *dst, uintptr_t src, size_t len)
{
	if (!len)
		return 0;
	if (atomic_load_explicit(&copy_strict, memory_order_relaxed)) {
		struct iovec l = { dst, len }, r = { (void *)src, len };

		return process_vm_readv(getpid(), &l, 1, &r, 1, 0) == (ssize_t)len ? 0 : -EFAULT;
	}
	if (!src)
		return -EFAULT;
	memcpy(dst, (const void *)src, len);
	return 0;
}

int copy_to_client(uintptr_t dst, const void *src, size_t len)
{
	if (!len)
		return 0;
	if (atomic_load_explicit(&copy_strict, memory_order_relaxed)) {
		struct iovec l = { (void *)src, len }, r = { (void *)dst, len };

		return process_vm_writev(getpid(), &l, 1, &r, 1, 0) == (ssize_t)len ? 0 : -EFAULT;
	}
	if (!dst)
		return -EFAULT;
	memcpy((void *)dst, src, len);
	return 0;
}
