/* The kernel's NBD client: /dev/nbdN over a socket pair, whose other end is served by this process (linux/nbd.h). */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/nbd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "cli/serve.h"

static int open_device(const char *dev, struct err *err)
{
	int fd = open(dev, O_RDWR | O_CLOEXEC);
	if (fd >= 0)
		return fd;
	if (errno == ENOENT || errno == ENXIO)
		return err_set(err, -errno, "%s: there is no such device; does the kernel have NBD (modprobe nbd)?", dev);
	return err_set_errno(err, -errno, "Failed to open %s", dev);
}

int nbd_dev_attach(const char *dev, int sock, const struct nbd_export *e, struct err *err)
{
	int fd = open_device(dev, err), r = 0;
	unsigned long ro = !e->writable, blocks = (unsigned long)(e->len / 512);
	if (fd < 0)
		return fd;
	if (ioctl(fd, NBD_SET_SOCK, (unsigned long)sock))
		r = err_set_errno(err, -errno, "%s: Failed to set NBD socket", dev);
	else if (ioctl(fd, NBD_SET_BLKSIZE, 512ul) || ioctl(fd, NBD_SET_SIZE_BLOCKS, blocks))
		r = err_set_errno(err, -errno, "%s: Failed setting size", dev);
	else if (ioctl(fd, NBD_SET_FLAGS, (unsigned long)nbd_export_flags(e)) && errno != ENOTTY)
		r = err_set_errno(err, -errno, "%s: Failed setting flags", dev);
	else if (ro && ioctl(fd, BLKROSET, &(int){ 1 }))
		r = err_set_errno(err, -errno, "%s: Failed setting read-only", dev);
	if (!r)
		return fd;
	ioctl(fd, NBD_CLEAR_SOCK);
	close(fd);
	return r;
}

int nbd_dev_run(int dev)
{
	int r;
	do
		r = ioctl(dev, NBD_DO_IT) < 0 ? -errno : 0;
	while (r == -EINTR);
	ioctl(dev, NBD_CLEAR_QUE);
	ioctl(dev, NBD_CLEAR_SOCK);
	close(dev);
	return r == -EPIPE ? 0 : r; /* NBD_DISCONNECT */
}

int nbd_dev_disconnect(const char *dev, struct err *err)
{
	int fd = open_device(dev, err);
	if (fd < 0)
		return fd;
	ioctl(fd, NBD_CLEAR_QUE);
	ioctl(fd, NBD_DISCONNECT);
	ioctl(fd, NBD_CLEAR_SOCK);
	close(fd);
	return 0;
}
