/*
 * libsoftkvm-preload: softkvm behind /dev/kvm for programs that know nothing of it. Private to the object.
 *
 * The object interposes the C library's functions that lead to /dev/kvm. Each softkvm file is represented by a
 * memfd: the kernel numbers it, inherits it, passes it, closes it on exec and answers poll() and epoll_ctl() as it
 * does for KVM's own files (always ready; EPERM). A table maps descriptor numbers to softkvm files. The exported
 * names are those of exports.map and nothing else; the state below is per process, as descriptors are.
 *
 * Linux ties a VM to the address space that made it: after fork() the child's descriptors answer EIO. A page that
 * the kernel wipes on fork (MADV_WIPEONFORK) tells the two apart without a system call and holds the table's lock,
 * which is therefore free in the child. vfork() shares the address space but not the descriptors: the functions
 * that change descriptors compare process ids and leave the table alone there.
 */
#ifndef PRELOAD_PRELOAD_H
#define PRELOAD_PRELOAD_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct softkvm_file;

enum file_type { FILE_KVM, FILE_VM, FILE_VCPU, FILE_STATS, FILE_TYPES };

/* What a descriptor of ours leads to; counted by descriptors and by calls under way. */
struct pfile {
	struct softkvm_file *file;
	enum file_type type;
	unsigned refs;          /* under the table's lock */
	unsigned owner;         /* generation of the address space that made it */
	ino_t ino;              /* of the memfd: tells a number that was reused behind our back */
};

/* -- table.c ---------------------------------------------------------------------------------- */
/* Set up on the first open of /dev/kvm. 0 or -errno. */
int table_init(void);
/* Was it ever? */
bool table_used(void);
/* Fast: may `fd` be ours? Most calls in a program end here. */
bool table_maybe(int fd);
/* The file of a descriptor, with a reference for table_put(); NULL: not ours. */
struct pfile *table_get(int fd);
/* The same, but checks that the descriptor still is the memfd that was made for it. */
struct pfile *table_get_checked(int fd);
void table_put(struct pfile *p);
/* The file was made by this address space (VMs and vCPUs work only there). */
bool table_alive(const struct pfile *p);
/* Set or clear an entry; false: this is a vfork() child or the like, nothing was changed. `p` may be NULL. */
bool table_set(int fd, struct pfile *p);
/* Forget a range of descriptors (about to be closed). */
void table_clear_range(unsigned first, unsigned last);
/* A new memfd of that type; -1 with errno. */
int table_new_fd(enum file_type type, bool cloexec);
/* Enter `file` (the reference is taken over) as `fd`. 0 or -1 with errno ENOMEM; `fd` stays open then. */
int table_enter(int fd, enum file_type type, struct softkvm_file *file);
/* A descriptor that is not in the table, but was made as ours by another process (exec, SCM_RIGHTS). */
bool table_foreign(int fd, enum file_type *type);

/* A descriptor that came to us again on a way that is not interposed (SCM_RIGHTS): what it leads to, with a reference, and entered. */
struct pfile *table_adopt(int fd);

/* Descriptors that softkvm uses inside; close_range() and closefrom() leave them alone. */
void internal_add(int fd);
bool internal_remove(int fd);
/* The lowest internal descriptor in [first, last], or -1. */
int internal_next(unsigned first, unsigned last);

/* -- real.c ----------------------------------------------------------------------------------- */
/* A system call around everything interposed: result or -1 with errno. */
long raw_call(long nr, long a, long b, long c, long d, long e, long f);
#define RAW(nr, ...) RAW_(nr, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define RAW_(nr, a, b, c, d, e, f, ...) raw_call(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
/* The next definition of a function, looked up once. */
void *real_find(_Atomic(void *) *cache, const char *name);
#define DECLARE_REAL(name) static _Atomic(void *) real_cache_##name
#define REAL(name) ((__typeof__(&name))real_find(&real_cache_##name, #name))

/* -- kvm.c: what a call on one of our descriptors does ---------------------------------------------- */
/* Does this path lead to /dev/kvm? */
bool kvm_path(int dirfd, const char *path);
int kvm_open(int flags);
int kvm_ioctl(int fd, struct pfile *p, unsigned long req, uintptr_t arg);
void *kvm_mmap(struct pfile *p, void *addr, size_t len, int prot, int flags, off_t off);
/* Bring a statistics file's memfd up to date before it is read. */
void kvm_refresh(int fd, struct pfile *p);

#endif
