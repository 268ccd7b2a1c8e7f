/* The provider in the Linux kernel: /dev/kvm. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm/provider.h"

static int linux_open(struct kvm_file *f, struct err *err)
{
	f->fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (f->fd >= 0)
		return 0;
	int r = -errno;
	if (r == -ENOENT || r == -ENODEV || r == -ENXIO)
		return err_set(err, r, "/dev/kvm is not there: load kvm_intel or kvm_amd (and enable virtualization in the "
			       "firmware), or use -accel soft");
	if (r == -EACCES || r == -EPERM)
		return err_set(err, r, "/dev/kvm: permission denied: become a member of group kvm, or use -accel soft");
	return err_set_errno(err, r, "/dev/kvm");
}

static int linux_ioctl(struct kvm_file *f, unsigned long req, uintptr_t arg, struct kvm_file *created)
{
	int r = ioctl(f->fd, req, arg);
	if (r < 0)
		return -errno;
	if (!created)
		return r;
	created->p = f->p;
	created->fd = r;
	return 0;
}

static void *linux_mmap(struct kvm_file *f, size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void linux_munmap(struct kvm_file *f, void *p, size_t len)
{
	munmap(p, len);
}

static void linux_close(struct kvm_file *f)
{
	close(f->fd);
}

const struct kvm_provider kvm_provider_linux = {
	.name = "kvm", .open = linux_open, .ioctl = linux_ioctl, .mmap = linux_mmap, .munmap = linux_munmap, .close = linux_close,
};
