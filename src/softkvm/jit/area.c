/*
 * The memory of translations: the code area, which is mapped twice, and the records beside it. A host that gives it by 4 KiB takes a fault for each page,
 * for code two, and the processor a TLB entry; large programs have tens of MiB of code. So what has grown beyond its beginnings is had in huge pages.
 */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "softkvm/jit/internal.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25                /* Linux 6.1 */
#endif

#define HUGE ((size_t)2 << 20)
#define HUGE_WORTH (128u << 10)         /* used of a huge page, before it is made one */
#define SMALL_FIRST ((size_t)1 << 20)   /* of records, which the smallest guests do not fill */

static size_t whole_pages(size_t bytes) { return ALIGN_UP(bytes, (size_t)4096); }

/* Addresses that begin with a huge page's. NULL: none left. */
static uint8_t *reserve(size_t bytes, int flags)
{
	size_t size = whole_pages(bytes), head;
	uint8_t *p = mmap(NULL, size + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	head = -(uintptr_t)p & (HUGE - 1);
	if (head)
		munmap(p, head);
	munmap(p + head + size, HUGE - head);
	return p + head;
}

static int map_memfd(struct jit *j, size_t bytes)
{
	int fd = memfd_create("softkvm-code", MFD_CLOEXEC);
	void *rw = MAP_FAILED, *rx = MAP_FAILED;

	if (fd < 0)
		return -errno;
	if (ftruncate(fd, (off_t)bytes) == 0) {
		rw = mmap(j->rw, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
		rx = mmap(j->rx, bytes, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, fd, 0);
	}
	close(fd);
	return rw == MAP_FAILED || rx == MAP_FAILED ? -ENOMEM : 0;
}

/* perf(1) uses its map for memory without a name only: shared memory that mremap() maps a second time. */
static int map_nameless(struct jit *j, size_t bytes)
{
	if (mmap(j->rx, bytes, PROT_READ, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED ||
	    mremap(j->rx, 0, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, j->rw) == MAP_FAILED ||
	    mprotect(j->rw, bytes, PROT_READ | PROT_WRITE) || mprotect(j->rx, bytes, PROT_READ | PROT_EXEC))
		return -errno;
	return 0;
}

int jit_code_map(struct jit *j, size_t bytes)
{
	j->size = bytes;
	j->hot_size = bytes / 16 * 11;
	if (j->hot_size > 4 * HUGE)
		j->hot_size &= ~(HUGE - 1);
	j->rw = reserve(bytes, 0);
	j->rx = reserve(bytes, MAP_32BIT);
	if (!j->rw || !j->rx || !low_is(j->rx, bytes))
		return -ENOMEM;
	return j->perf_fd >= 0 ? map_nameless(j, bytes) : map_memfd(j, bytes);
}

/*
 * Make the huge page at *huge one as soon as `used` bytes of the area reach into it; *huge is the first that is none. Collapsing is the one way to huge
 * pages for a memfd where shared memory gets none by itself, and cheap while the page is nearly empty. The page comes with the mapping where code runs, the other
 * one finds it when it is written next.
 */
static void grow(struct jit *j, size_t *huge, size_t used)
{
	for (; used >= *huge + HUGE_WORTH && j->size - *huge >= HUGE; *huge += HUGE)
		madvise(j->rx + *huge, HUGE, MADV_COLLAPSE);    /* no more than a favour */
}

void jit_code_grown(struct jit *j)
{
	size_t cold = ALIGN_UP(j->hot_size, HUGE);

	grow(j, &j->huge[0], MIN(j->hot, j->hot_size));
	j->huge[1] = MAX(j->huge[1], cold);
	grow(j, &j->huge[1], j->hot_size + j->cold);
}

void jit_records_huge(void *p, size_t bytes)
{
	uintptr_t from = ALIGN_UP((uintptr_t)p + SMALL_FIRST, HUGE), end = (uintptr_t)p + bytes;

	if (from < end)
		madvise((void *)from, end - from, MADV_HUGEPAGE);
}

static void trim(uint8_t *from, const uint8_t *end, int how)
{
	from = (uint8_t *)ALIGN_UP((uintptr_t)from, 4096);
	if (from < end)
		madvise(from, (size_t)(end - from), how);       /* no more than a favour */
}

void jit_code_trim(struct jit *j)
{
	trim(j->rw + j->hot, j->rw + (j->hot_size & ~(size_t)4095), MADV_REMOVE);
	trim(j->rw + j->hot_size + j->cold, j->rw + j->size, MADV_REMOVE);
	j->huge[0] = j->huge[1] = 0;
	trim(j->low->arena + j->arena, (uint8_t *)j->low + (j->low_size & ~(size_t)4095), MADV_DONTNEED);
	trim((uint8_t *)(j->spans + j->nspans), (uint8_t *)((uintptr_t)j->points & ~(uintptr_t)4095), MADV_DONTNEED);
	trim((uint8_t *)(j->points + j->npoints), (uint8_t *)(j->points + j->points_max), MADV_DONTNEED);
}

void jit_code_unmap(struct jit *j)
{
	if (j->rw)
		munmap(j->rw, whole_pages(j->size));
	if (j->rx)
		munmap(j->rx, whole_pages(j->size));
}

void *jit_arena(struct jit *j, size_t size)
{
	uint8_t *p = j->low->arena + j->arena;

	size = ALIGN_UP(size, 16);
	if (j->arena_size - j->arena < size)
		return NULL;
	j->arena += size;
	return p;
}
