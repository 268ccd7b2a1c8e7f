#include "dev/fw_cfg.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>

#include "base/util.h"
#include "core/mem.h"

#define FILES 64
#define KEYS (FW_CFG_FILE_FIRST + FILES)
#define NAME_MAX_LEN 56

enum { DMA_ERROR = 1, DMA_READ = 2, DMA_SKIP = 4, DMA_SELECT = 8, DMA_WRITE = 16 };

struct item {
	uint8_t *data;
	uint32_t len;
};

/* As the guest reads it from item FW_CFG_FILE_DIR; big-endian. */
struct dir_entry {
	uint32_t size;
	uint16_t select, reserved;
	char name[NAME_MAX_LEN];
} __attribute__((packed));

struct fw_cfg {
	struct machine_env *env;
	pthread_mutex_t lock;
	struct io_window win_io, win_dma;
	struct item item[KEYS];
	struct dir_entry dir[FILES];
	unsigned n_files;
	uint16_t key;
	uint32_t off;
	uint64_t dma_addr;
};

static const struct item *current(const struct fw_cfg *f)
{
	unsigned key = f->key & 0x3fff;         /* bit 14: write access, bit 15: architecture's own items */

	return key < KEYS && !(f->key & 0x8000) ? &f->item[key] : NULL;
}

static void select_item(struct fw_cfg *f, uint16_t key)
{
	f->key = key;
	f->off = 0;
}

/* Past the end of an item come zeros. */
static void item_read(struct fw_cfg *f, uint8_t *buf, uint32_t len)
{
	const struct item *it = current(f);
	uint32_t have = it && f->off < it->len ? MIN(it->len - f->off, len) : 0;

	if (have)
		memcpy(buf, it->data + f->off, have);
	memset(buf + have, 0, len - have);
	f->off += have;
}

static uint64_t io_data_read(void *opaque, uint64_t off, unsigned size)
{
	struct fw_cfg *f = opaque;
	uint8_t v = 0;

	if (off == 1 && size == 1)
		item_read(f, &v, 1);
	return v;
}

static void io_select(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	if (off == 0 && size == 2)
		select_item(opaque, val);
}

/*
 * A transfer is bounded by what the item holds plus one pass of zeros over guest RAM, so its length
 * (the guest's) is worked off in pieces without growing anything here.
 */
static uint32_t dma_copy(struct fw_cfg *f, uint64_t addr, uint32_t len)
{
	uint8_t buf[4096];

	while (len) {
		uint32_t n = MIN(len, (uint32_t)sizeof(buf));

		item_read(f, buf, n);
		if (gm_write(f->env->mem, addr, buf, n))
			return DMA_ERROR;
		addr += n;
		len -= n;
	}
	return 0;
}

static void dma_run(struct fw_cfg *f)
{
	struct { uint32_t control, length; uint64_t address; } __attribute__((packed)) d;
	uint32_t ctl, len, result = 0;

	if (gm_read(f->env->mem, f->dma_addr, &d, sizeof(d)))
		return;
	ctl = be32toh(d.control);
	len = be32toh(d.length);
	if (ctl & DMA_SELECT)
		select_item(f, ctl >> 16);
	if (ctl & DMA_READ) {
		result = dma_copy(f, be64toh(d.address), len);
	} else if (ctl & DMA_WRITE) {
		result = DMA_ERROR;
	} else if (ctl & DMA_SKIP) {
		const struct item *it = current(f);
		uint32_t left = it && f->off < it->len ? it->len - f->off : 0;

		f->off += MIN(left, len);
	}
	result = htobe32(result);
	gm_write(f->env->mem, f->dma_addr, &result, sizeof(result));
}

static uint64_t dma_read(void *opaque, uint64_t off, unsigned size)
{
	static const char sig[8] = "QEMU CFG";
	uint64_t v = 0;

	memcpy(&v, sig + off, size);
	return v;
}

static void dma_write(void *opaque, uint64_t off, uint64_t val, unsigned size)
{
	struct fw_cfg *f = opaque;

	if (size != 4)
		return;
	if (off == 0) {
		f->dma_addr = (uint64_t)be32toh((uint32_t)val) << 32;
	} else if (off == 4) {
		f->dma_addr |= be32toh((uint32_t)val);
		dma_run(f);
		f->dma_addr = 0;
	}
}

static const struct io_ops io_ops = { io_data_read, io_select, 1, 2 };
static const struct io_ops dma_ops = { dma_read, dma_write, 1, 4 };

int fw_cfg_add(struct fw_cfg *f, unsigned key, const void *data, size_t len, struct err *err)
{
	if (key >= KEYS || len > UINT32_MAX)
		return err_set(err, -ENOSPC, "fw_cfg: item %#x of %zu bytes does not fit", key, len);
	if (f->item[key].data)
		return err_set(err, -EEXIST, "fw_cfg: item %#x exists", key);
	f->item[key].data = malloc(len ? len : 1);
	if (!f->item[key].data)
		return err_set(err, -ENOMEM, "fw_cfg: no memory for an item of %zu bytes", len);
	memcpy(f->item[key].data, data, len);
	f->item[key].len = len;
	return 0;
}

/* The directory is kept ready for reading: a big-endian count and the entries. */
static int publish_dir(struct fw_cfg *f, struct err *err)
{
	struct item *it = &f->item[FW_CFG_FILE_DIR];
	size_t len = 4 + f->n_files * sizeof(f->dir[0]);
	uint8_t *p = realloc(it->data, len);
	uint32_t n = htobe32(f->n_files);

	if (!p)
		return err_set(err, -ENOMEM, "fw_cfg: no memory for the directory");
	memcpy(p, &n, 4);
	memcpy(p + 4, f->dir, len - 4);
	it->data = p;
	it->len = len;
	return 0;
}

int fw_cfg_add_file(struct fw_cfg *f, const char *name, const void *data, size_t len, struct err *err)
{
	struct dir_entry *e = &f->dir[f->n_files];
	int r;

	if (strlen(name) >= NAME_MAX_LEN)
		return err_set(err, -ENAMETOOLONG, "fw_cfg: file name '%s' is longer than %d bytes", name,
			       NAME_MAX_LEN - 1);
	if (f->n_files == FILES)
		return err_set(err, -ENOSPC, "fw_cfg: no room for file '%s'", name);
	for (unsigned i = 0; i < f->n_files; i++)
		if (!strcmp(f->dir[i].name, name))
			return err_set(err, -EEXIST, "fw_cfg: file '%s' exists", name);
	r = fw_cfg_add(f, FW_CFG_FILE_FIRST + f->n_files, data, len, err);
	if (r)
		return r;
	memset(e, 0, sizeof(*e));
	e->size = htobe32(len);
	e->select = htobe16(FW_CFG_FILE_FIRST + f->n_files);
	memcpy(e->name, name, strlen(name));
	f->n_files++;
	return publish_dir(f, err);
}

int fw_cfg_create(struct fw_cfg **out, struct machine_env *env, struct err *err)
{
	struct fw_cfg *f = calloc(1, sizeof(*f));
	static const uint8_t features[4] = { 3 };       /* bit 0: ports, bit 1: DMA */
	int r;

	if (!f)
		return err_set(err, -ENOMEM, "no memory for fw_cfg");
	f->env = env;
	pthread_mutex_init(&f->lock, NULL);
	f->win_io = (struct io_window){ .name = "fw_cfg", .ops = &io_ops, .opaque = f, .lock = &f->lock, .size = 2 };
	f->win_dma = (struct io_window){ .name = "fw_cfg-dma", .ops = &dma_ops, .opaque = f, .lock = &f->lock,
					 .size = 8 };
	r = fw_cfg_add(f, FW_CFG_SIGNATURE, "QEMU", 4, err);
	if (!r)
		r = fw_cfg_add(f, FW_CFG_ID, features, 4, err);
	if (!r)
		r = publish_dir(f, err);
	if (!r)
		r = io_map(env->ports, &f->win_io, 0x510, err);
	if (!r)
		r = io_map(env->ports, &f->win_dma, 0x514, err);
	if (r) {
		fw_cfg_destroy(f);
		return r;
	}
	*out = f;
	return 0;
}

void fw_cfg_destroy(struct fw_cfg *f)
{
	if (!f)
		return;
	if (f->win_io.mapped)
		io_unmap(f->env->ports, &f->win_io);
	if (f->win_dma.mapped)
		io_unmap(f->env->ports, &f->win_dma);
	for (unsigned i = 0; i < KEYS; i++)
		free(f->item[i].data);
	pthread_mutex_destroy(&f->lock);
	free(f);
}

void fw_cfg_reset(struct fw_cfg *f)
{
	pthread_mutex_lock(&f->lock);
	select_item(f, 0);
	f->dma_addr = 0;
	pthread_mutex_unlock(&f->lock);
}
