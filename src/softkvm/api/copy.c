/*
 * Client memory. A client of the library shares its address space with it, so a bad pointer would
 * fault here where Linux gives EFAULT. In strict mode (the preload object and fuzzing switch it on)
 * the kernel does the copy and tells, but for the stack that the call itself stands on, where small arguments usually are:
 * that copy would be most of the time that such a call takes.
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>
#include <unistd.h>

#include "softkvm/api/api.h"
#include "softkvm/fault.h"

#define STACK_NEAR 65536u       /* from the frame that copies to the caller's object */

static _Atomic bool copy_strict;        /* a property of the process, not of a VM */

void softkvm_strict_copies(int on)
{
	atomic_store(&copy_strict, on != 0);
}

/* This thread's stack; an end of 0: not asked yet, 1: not known. */
static __thread uintptr_t stack_low, stack_end;

static void find_stack(void)
{
	pthread_attr_t a;
	void *low;
	size_t size;

	stack_end = 1;
	if (pthread_getattr_np(pthread_self(), &a))
		return;
	if (!pthread_attr_getstack(&a, &low, &size)) {
		stack_low = (uintptr_t)low;
		stack_end = stack_low + size;
	}
	pthread_attr_destroy(&a);
}

/* In frames of our callers: between here and the stack's end everything is mapped and writable. */
static bool on_stack(uintptr_t p, size_t len)
{
	uintptr_t here = (uintptr_t)__builtin_frame_address(0);

	if (p < here || p - here > STACK_NEAR || len > STACK_NEAR)
		return false;
	if (!stack_end)
		find_stack();
	return here >= stack_low && p + len <= stack_end;       /* else the thread runs on another stack */
}

int copy_from_client(void *dst, uintptr_t src, size_t len)
{
	if (!len)
		return 0;
	if (atomic_load_explicit(&copy_strict, memory_order_relaxed) && !on_stack(src, len)) {
		struct iovec l = { dst, len }, r = { (void *)src, len };

		return process_vm_readv(getpid(), &l, 1, &r, 1, 0) == (ssize_t)len ? 0 : -EFAULT;
	}
	return src ? fault_copy(dst, (const void *)src, len) : -EFAULT;
}

int copy_to_client(uintptr_t dst, const void *src, size_t len)
{
	if (!len)
		return 0;
	if (atomic_load_explicit(&copy_strict, memory_order_relaxed) && !on_stack(dst, len)) {
		struct iovec l = { (void *)src, len }, r = { (void *)dst, len };

		return process_vm_writev(getpid(), &l, 1, &r, 1, 0) == (ssize_t)len ? 0 : -EFAULT;
	}
	return dst ? fault_copy((void *)dst, src, len) : -EFAULT;
}
