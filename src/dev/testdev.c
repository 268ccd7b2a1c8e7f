/*
 * pc-testdev: what test guests for a KVM provider expect of the machine, at QEMU's addresses. A latch to read back what I/O
 * instructions wrote, a port that makes the host drop its mapping of a guest page (a provider's translations of it go with
 * it), the ISA interrupt lines, and 64 KiB of memory that only exits reach, for every form of MMIO access.
 */
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "base/util.h"
#include "core/mem.h"
#include "dev/dev.h"

enum {
	LATCH_PORT = 0xe0,              /* takes accesses as they are */
	FLUSH_PORT = 0xe4,
	BYTES_PORT = 0xe8,              /* the same latch, always byte by byte */
	LINES_PORT = 0x2000,            /* one port per ISA line */
	LINES = 16,
	IOMEM_BASE = 0xff000000,
	IOMEM_SIZE = 0x10000,
};

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

struct testdev {
	struct device dev;
	pthread_mutex_t lock;
	struct io_window latch, flush, bytes, lines, iomem;
	uint8_t data[4];
	uint8_t mem[IOMEM_SIZE];
};

/* The latch and the I/O memory: bytes that keep what was written, `opaque` is the first. */
static uint64_t store_read(void *opaque, uint64_t off, unsigned size)
{
	uint64_t val = 0;

	memcpy(&val, (const uint8_t *)opaque + off, size);
	return val;
}

static void store_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	memcpy((uint8_t *)opaque + off, &val, size);
}

static const struct io_ops latch_ops = { store_read, store_write, 1, 4 };
static const struct io_ops bytes_ops = { store_read, store_write, 1, 1 };
static const struct io_ops iomem_ops = { store_read, store_write, 0, 0 };

static uint64_t nothing_read(void *opaque, uint64_t off, unsigned size)
{
	return ~0ull;
}

/*
 * The page of a guest-physical address. Its contents stay and other vCPUs may use it meanwhile, so this asks for reclaim of the
 * page rather than taking the right to access it away for a moment; a kernel that declines does no harm.
 */
static void flush_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct testdev *t = opaque;
	void *page = t->dev.env->mem ? gm_ptr(t->dev.env->mem, val & ~0xfffull, 4096, MEM_READ) : NULL;

	if (page)
		madvise(page, 4096, MADV_PAGEOUT);
}

static const struct io_ops flush_ops = { nothing_read, flush_write, 4, 4 };

static void lines_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	const struct machine_env *env = ((struct testdev *)opaque)->dev.env;

	irq_set(env->isa_irq(env->opaque, (int)off), !!val);
}

static const struct io_ops lines_ops = { nothing_read, lines_write, 1, 1 };

static void testdev_unmap(struct testdev *t)
{
	struct io_space *ports = t->dev.env->ports;

	io_unmap(ports, &t->latch);
	io_unmap(ports, &t->flush);
	io_unmap(ports, &t->bytes);
	io_unmap(ports, &t->lines);
	io_unmap(t->dev.env->mmio, &t->iomem);
	pthread_mutex_destroy(&t->lock);
}

static struct io_window window(struct testdev *t, const char *name, const struct io_ops *ops, void *opaque, uint64_t size)
{
	return (struct io_window){ .name = name, .ops = ops, .opaque = opaque, .lock = &t->lock, .size = size };
}

static int testdev_create(struct device *d, struct err *err)
{
	struct testdev *t = container_of(d, struct testdev, dev);
	struct io_space *ports = d->env->ports;
	int r;

	pthread_mutex_init(&t->lock, NULL);
	t->latch = window(t, "pc-testdev-latch", &latch_ops, t->data, sizeof t->data);
	t->flush = window(t, "pc-testdev-flush", &flush_ops, t, 4);
	t->bytes = window(t, "pc-testdev-bytes", &bytes_ops, t->data, sizeof t->data);
	t->bytes.priority = -1;         /* a debug console keeps its port 0xe9 */
	t->lines = window(t, "pc-testdev-lines", &lines_ops, t, LINES);
	t->iomem = window(t, "pc-testdev-iomem", &iomem_ops, t->mem, sizeof t->mem);
	r = io_map(ports, &t->latch, LATCH_PORT, err);
	r = r ? r : io_map(ports, &t->flush, FLUSH_PORT, err);
	r = r ? r : io_map(ports, &t->bytes, BYTES_PORT, err);
	r = r ? r : io_map(ports, &t->lines, LINES_PORT, err);
	r = r ? r : io_map(d->env->mmio, &t->iomem, IOMEM_BASE, err);
	if (r)
		testdev_unmap(t);
	return r;
}

static void testdev_destroy(struct device *d)
{
	testdev_unmap(container_of(d, struct testdev, dev));
}

const struct device_class pc_testdev_class = {
	.name = "pc-testdev", .desc = "ports, interrupt lines and I/O memory for test guests", .bus = "ISA",
	.size = sizeof(struct testdev), .create = testdev_create, .destroy = testdev_destroy,
};
