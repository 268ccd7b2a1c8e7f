/*
 * Guest memory: RAM and ROM of one machine, as slots over memfds, or of anonymous memory where that is asked for.
 *
 * Security: a guest address is hostile. Every access carries length and direction, is checked
 * without overflow, and reaches RAM only (never a device window), so a DMA can not re-enter a
 * device. Writes mark pages dirty and tell softkvm when they overwrote code.
 */
#ifndef CORE_MEM_H
#define CORE_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct guest_mem;
struct kvm_vm;

enum mem_dir { MEM_READ, MEM_WRITE };   /* seen from the device: MEM_WRITE changes guest memory */

struct mem_backing {
	bool huge;              /* back with huge pages; an error when the host has none */
	bool prealloc;
	bool no_dump;           /* keep it out of core dumps */
	bool private;           /* anonymous, which the host may give huge pages unasked; else a memfd, which other processes can map */
};

int guest_mem_create(struct guest_mem **out, struct kvm_vm *vm, struct err *err);
void guest_mem_destroy(struct guest_mem *m);

/*
 * Before `size` bytes in all are added: -ENOMEM where they are to be allocated now and are not there. The kernel would find that out by
 * killing somebody.
 */
int guest_mem_check(const struct mem_backing *b, uint64_t size, struct err *err);
/* Map `size` bytes of new RAM at `gpa`; both page aligned. `name` shows in errors and in the memory map. */
int guest_mem_add_ram(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size,
		      const struct mem_backing *b, struct err *err);
/*
 * RAM that another process made: [off, off+size) of `fd` (kept; the caller's own stays the caller's). The file must be that long;
 * who can make it shorter later can end this process with SIGBUS.
 */
int guest_mem_add_fd(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, int fd, uint64_t off, struct err *err);
/* Read-only to the guest, filled by the host through gm_write_rom(). */
int guest_mem_add_rom(struct guest_mem *m, const char *name, uint64_t gpa, uint64_t size, struct err *err);

/* All of [gpa, gpa+len) or nothing: 0, or -EFAULT when any byte is not RAM (ROM may be read). */
int gm_read(struct guest_mem *m, uint64_t gpa, void *buf, size_t len);
int gm_write(struct guest_mem *m, uint64_t gpa, const void *buf, size_t len);
int gm_write_rom(struct guest_mem *m, uint64_t gpa, const void *buf, size_t len);
int gm_fill(struct guest_mem *m, uint64_t gpa, int byte, size_t len);

/*
 * Host pointer to [gpa, gpa+len), which must lie in one slot; NULL otherwise. Valid as long as the
 * machine. After writing through it, call gm_written(); the guest can change the bytes at any time,
 * so read each value once.
 */
void *gm_ptr(struct guest_mem *m, uint64_t gpa, size_t len, enum mem_dir dir);
void gm_written(struct guest_mem *m, uint64_t gpa, size_t len);

/* Naturally aligned 16-bit accesses that are one atomic load or store (ring indices). */
int gm_read_u16(struct guest_mem *m, uint64_t gpa, uint16_t *v);
int gm_write_u16(struct guest_mem *m, uint64_t gpa, uint16_t v);

uint64_t guest_mem_ram_size(const struct guest_mem *m);

/* Ranges in ascending order, for the memory map; returns false past the end. */
struct mem_range { const char *name; uint64_t gpa, size; bool rom; int fd; uint64_t fd_off; void *host; };
bool guest_mem_range(const struct guest_mem *m, unsigned i, struct mem_range *r);

/*
 * Record which pages the host side (devices, loaders) writes; the vCPUs' writes are in KVM's own log.
 * Ranges added while logging are not recorded. 0 or -ENOMEM.
 */
int guest_mem_dirty_log(struct guest_mem *m, bool on);
/* Was the page at `gpa` written since the last take? Clears it. */
bool guest_mem_dirty_take(struct guest_mem *m, uint64_t gpa);

#endif
