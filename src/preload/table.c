/* Descriptors to softkvm files. */
#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload/preload.h"
#include "softkvm/softkvm.h"

#define CHUNK 1024u
#define CHUNKS 1024u            /* the kernel's default ceiling, fs.nr_open, is CHUNK * CHUNKS */

/* Wiped by the kernel in a forked child. All zeros is an unlocked mutex. */
struct mm_page {
	pthread_mutex_t lock;
	unsigned generation;
	pid_t pid;
};

static _Atomic(struct mm_page *) mm;
static unsigned last_generation;
static _Atomic(_Atomic(struct pfile *) *) chunks[CHUNKS];
static _Atomic uint64_t *_Atomic internal_bits;

int table_init(void)
{
	struct mm_page *p, *none = NULL;
	_Atomic uint64_t *bits, *no_bits = NULL;

	if (atomic_load(&mm))
		return 0;
	bits = calloc(CHUNK * CHUNKS / 64, sizeof *bits);
	p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!bits || p == MAP_FAILED) {
		free(bits);
		return -ENOMEM;
	}
	if (!atomic_compare_exchange_strong(&internal_bits, &no_bits, bits))
		free(bits);
	madvise(p, 4096, MADV_WIPEONFORK);
	if (!atomic_compare_exchange_strong(&mm, &none, p))
		munmap(p, 4096);
	return 0;
}

bool table_used(void)
{
	return atomic_load_explicit(&mm, memory_order_relaxed);
}

/* Take the lock; in a new address space, give it a generation of its own first. */
static struct mm_page *table_lock(void)
{
	struct mm_page *m = atomic_load(&mm);

	pthread_mutex_lock(&m->lock);
	if (!m->generation) {
		m->generation = ++last_generation;
		m->pid = (pid_t)RAW(SYS_getpid);
	}
	return m;
}

static void table_unlock(struct mm_page *m)
{
	pthread_mutex_unlock(&m->lock);
}

static _Atomic(struct pfile *) *slot_of(unsigned fd, bool make)
{
	_Atomic(struct pfile *) *c, *none = NULL;

	if (fd >= CHUNK * CHUNKS)
		return NULL;
	c = atomic_load_explicit(&chunks[fd / CHUNK], memory_order_acquire);
	if (!c && make) {
		c = calloc(CHUNK, sizeof *c);
		if (c && !atomic_compare_exchange_strong(&chunks[fd / CHUNK], &none, c)) {
			free((void *)c);
			c = none;
		}
	}
	return c ? &c[fd % CHUNK] : NULL;
}

bool table_maybe(int fd)
{
	_Atomic(struct pfile *) *s = fd < 0 ? NULL : slot_of((unsigned)fd, false);

	return s && atomic_load_explicit(s, memory_order_relaxed);
}

struct pfile *table_get(int fd)
{
	struct mm_page *m;
	struct pfile *p;

	if (!table_maybe(fd))
		return NULL;
	m = table_lock();
	p = atomic_load(slot_of((unsigned)fd, false));
	if (p)
		p->refs++;
	table_unlock(m);
	return p;
}

bool table_alive(const struct pfile *p)
{
	struct mm_page *m = table_lock();
	bool alive = p->owner == m->generation;

	table_unlock(m);
	return alive;
}

void table_put(struct pfile *p)
{
	struct mm_page *m = table_lock();
	bool last = --p->refs == 0, alive = p->owner == m->generation;

	table_unlock(m);
	if (!last)
		return;
	/* In a forked child the VM's threads are gone and its locks may be held for ever: leave it be. */
	if (alive)
		softkvm_close(p->file);
	free(p);
}

struct pfile *table_get_checked(int fd)
{
	struct pfile *p = table_get(fd);
	struct stat st;

	if (!p)
		return NULL;
	if (!RAW(SYS_fstat, fd, &st) && st.st_ino == p->ino)
		return p;
	table_put(p);
	table_set(fd, NULL);
	return NULL;
}

bool table_set(int fd, struct pfile *p)
{
	_Atomic(struct pfile *) *s = fd < 0 ? NULL : slot_of((unsigned)fd, p != NULL);
	struct pfile *old = NULL;
	struct mm_page *m;
	bool mine;

	if (!s)
		return !p;
	m = table_lock();
	mine = m->pid == (pid_t)RAW(SYS_getpid);
	if (mine) {
		if (p)
			p->refs++;
		old = atomic_exchange(s, p);
	}
	table_unlock(m);
	if (old)
		table_put(old);
	return mine;
}

void table_clear_range(unsigned first, unsigned last)
{
	if (last >= CHUNK * CHUNKS)
		last = CHUNK * CHUNKS - 1;
	for (unsigned i = first; i <= last; i++) {
		if (!atomic_load_explicit(&chunks[i / CHUNK], memory_order_acquire))
			i |= CHUNK - 1;
		else if (table_maybe((int)i))
			table_set((int)i, NULL);
	}
}

/* -- descriptors ------------------------------------------------------------------------------ */
static const char *const names[FILE_TYPES] = { "softkvm", "softkvm-vm", "softkvm-vcpu", "softkvm-stats" };

int table_new_fd(enum file_type type, bool cloexec)
{
	int fd = (int)RAW(SYS_memfd_create, names[type], MFD_ALLOW_SEALING | (cloexec ? MFD_CLOEXEC : 0));

	/* Nobody shall write to it or map it, whose mapping, empty as it is, would fault. */
	if (fd >= 0 && type != FILE_STATS)
		RAW(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
	return fd;
}

int table_enter(int fd, enum file_type type, struct softkvm_file *file)
{
	struct pfile *p = calloc(1, sizeof *p);
	struct mm_page *m;
	struct stat st;

	if (!p || !slot_of((unsigned)fd, true) || RAW(SYS_fstat, fd, &st)) {
		free(p);
		softkvm_close(file);
		errno = ENOMEM;
		return -1;
	}
	p->file = file;
	p->type = type;
	p->ino = st.st_ino;
	p->refs = 1;
	m = table_lock();
	p->owner = m->generation;
	table_unlock(m);
	table_set(fd, p);
	table_put(p);
	return 0;
}

bool table_foreign(int fd, enum file_type *type)
{
	char link[64], target[64], want[64];
	long n;

	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	n = RAW(SYS_readlink, link, target, sizeof target - 1);
	if (n <= 0)
		return false;
	target[n] = 0;
	for (unsigned i = 0; i < FILE_TYPES; i++) {
		snprintf(want, sizeof want, "/memfd:%s (deleted)", names[i]);
		if (!strcmp(target, want)) {
			*type = (enum file_type)i;
			return true;
		}
	}
	return false;
}

/* The entry that leads to the memfd `ino`, with a reference. */
static struct pfile *find_file(ino_t ino)
{
	struct mm_page *m = table_lock();
	struct pfile *found = NULL;

	for (unsigned i = 0; i < CHUNKS && !found; i++) {
		_Atomic(struct pfile *) *c = atomic_load_explicit(&chunks[i], memory_order_acquire);

		for (unsigned k = 0; c && k < CHUNK && !found; k++) {
			struct pfile *p = atomic_load(&c[k]);

			if (p && p->ino == ino)
				found = p;
		}
	}
	if (found)
		found->refs++;
	table_unlock(m);
	return found;
}

struct pfile *table_adopt(int fd)
{
	enum file_type type;
	struct pfile *p;
	struct stat st;

	if (!table_used() || !table_foreign(fd, &type) || RAW(SYS_fstat, fd, &st))
		return NULL;
	p = find_file(st.st_ino);
	if (p)
		table_set(fd, p);
	return p;
}

/* -- softkvm's own ---------------------------------------------------------------------------- */
void internal_add(int fd)
{
	_Atomic uint64_t *b = atomic_load(&internal_bits);

	if (b && fd >= 0 && (unsigned)fd < CHUNK * CHUNKS)
		atomic_fetch_or(&b[fd / 64], 1ull << (fd % 64));
}

bool internal_remove(int fd)
{
	_Atomic uint64_t *b = atomic_load(&internal_bits);

	if (!b || fd < 0 || (unsigned)fd >= CHUNK * CHUNKS)
		return false;
	return atomic_fetch_and(&b[fd / 64], ~(1ull << (fd % 64))) >> (fd % 64) & 1;
}

int internal_next(unsigned first, unsigned last)
{
	_Atomic uint64_t *b = atomic_load(&internal_bits);
	struct mm_page *m;

	if (!b || first >= CHUNK * CHUNKS)
		return -1;
	/* A child closes what it inherited: the VM is not its own. */
	m = table_lock();
	bool mine = m->pid == (pid_t)RAW(SYS_getpid);
	table_unlock(m);
	if (!mine)
		return -1;
	for (unsigned i = first; i < CHUNK * CHUNKS && i <= last; i++) {
		uint64_t w = atomic_load_explicit(&b[i / 64], memory_order_relaxed) >> (i % 64);

		if (!w)
			i |= 63;
		else if (i + (unsigned)__builtin_ctzll(w) <= last)
			return (int)(i + (unsigned)__builtin_ctzll(w));
		else
			return -1;
	}
	return -1;
}
