/*
 * fw_cfg: named blobs that firmware and guest drivers read (QEMU docs/specs/fw_cfg.rst).
 *
 * Ports: 0x510 selector (16 bits), 0x511 data, 0x514 DMA address (two big-endian dwords, the second
 * starts the transfer). Items are read only for the guest; a DMA write to one is refused.
 */
#ifndef DEV_FW_CFG_H
#define DEV_FW_CFG_H

#include "core/device.h"

enum fw_cfg_key {
	FW_CFG_SIGNATURE = 0x00, FW_CFG_ID = 0x01, FW_CFG_UUID = 0x02, FW_CFG_RAM_SIZE = 0x03,
	FW_CFG_NOGRAPHIC = 0x04, FW_CFG_NB_CPUS = 0x05, FW_CFG_KERNEL_ADDR = 0x07, FW_CFG_KERNEL_SIZE = 0x08,
	FW_CFG_INITRD_ADDR = 0x0a, FW_CFG_INITRD_SIZE = 0x0b, FW_CFG_BOOT_MENU = 0x0e, FW_CFG_MAX_CPUS = 0x0f,
	FW_CFG_KERNEL_DATA = 0x11, FW_CFG_INITRD_DATA = 0x12, FW_CFG_CMDLINE_ADDR = 0x13,
	FW_CFG_CMDLINE_SIZE = 0x14, FW_CFG_CMDLINE_DATA = 0x15, FW_CFG_SETUP_ADDR = 0x16,
	FW_CFG_SETUP_SIZE = 0x17, FW_CFG_SETUP_DATA = 0x18, FW_CFG_FILE_DIR = 0x19, FW_CFG_FILE_FIRST = 0x20,
};

struct fw_cfg;

int fw_cfg_create(struct fw_cfg **out, struct machine_env *env, struct err *err);
void fw_cfg_destroy(struct fw_cfg *f);
void fw_cfg_reset(struct fw_cfg *f);
/* Copies `data`. Before the guest runs. -EEXIST, -ENOSPC, -ENOMEM, -ENAMETOOLONG (55 bytes). */
int fw_cfg_add(struct fw_cfg *f, unsigned key, const void *data, size_t len, struct err *err);
int fw_cfg_add_file(struct fw_cfg *f, const char *name, const void *data, size_t len, struct err *err);

#endif
