/*
 * A fuzz target is LLVMFuzzerTestOneInput(). Built with -fsanitize=fuzzer it is libFuzzer's; without,
 * this main runs it on pseudo-random bytes: `prog [runs [seed]]`. The seed is printed.
 *
 * Nothing may grow: not from run to run (what a device leaves behind), and not inside one long run (what a guest can make a
 * device pile up). For the second the target walks its input with FUZZ_EACH, and main makes its last run a long one.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <dirent.h>
#include <malloc.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef __has_feature
#define FUZZ_FEATURE(f) __has_feature(f)
#else
#define FUZZ_FEATURE(f) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || FUZZ_FEATURE(address_sanitizer)
size_t __sanitizer_get_current_allocated_bytes(void);
#define FUZZ_HEAP() __sanitizer_get_current_allocated_bytes()
#else
static inline size_t fuzz_malloced(void)
{
	struct mallinfo2 m = mallinfo2();

	return m.uordblks + m.hblkhd;
}
#define FUZZ_HEAP() fuzz_malloced()
#endif

enum { FUZZ_LONG = 1 << 16 /* bytes, from which on an input is watched */, FUZZ_SLACK = 256 << 10, FUZZ_FDS = 8 };

struct fuzz_use { size_t heap, fds; };

static inline struct fuzz_use fuzz_use(void)
{
	struct fuzz_use u = { .heap = FUZZ_HEAP() };
	DIR *d = opendir("/proc/self/fd");

	while (d && readdir(d))
		u.fds++;
	if (d)
		closedir(d);
	return u;
}

static inline void fuzz_check(const char *when, struct fuzz_use early, struct fuzz_use late)
{
	if (late.heap <= early.heap + FUZZ_SLACK && late.fds <= early.fds + FUZZ_FDS)
		return;
	fprintf(stderr, "growth %s: heap %zu to %zu bytes, %zu to %zu descriptors\n", when, early.heap, late.heap, early.fds,
		late.fds);
	abort();
}

/* The most that was in use in the first half of an input, and in the second. */
struct fuzz_watch { size_t total; unsigned samples; struct fuzz_use half[2]; };

static inline bool fuzz_next(struct fuzz_watch *w, size_t left, size_t need)
{
	unsigned now = w->total >= FUZZ_LONG ? (w->total - left) * 64 / w->total : 0;

	if (now > w->samples || (w->samples && left < need)) {
		struct fuzz_use u = fuzz_use(), *h = &w->half[w->samples >= 32];

		w->samples = now;
		h->heap = u.heap > h->heap ? u.heap : h->heap;
		h->fds = u.fds > h->fds ? u.fds : h->fds;
		if (left < need)
			fuzz_check("in one run", w->half[0], w->half[1]);
	}
	return left >= need;
}
#define FUZZ_EACH(data, len, n) \
	for (struct fuzz_watch w_ = { .total = (len) }; fuzz_next(&w_, len, n); (data) += (n), (len) -= (n))

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

#ifndef LIBFUZZER
static inline void fuzz_fill(uint8_t *buf, size_t len, uint64_t *s)
{
	for (size_t i = 0; i < len; i++) {
		*s = *s * 6364136223846793005ULL + 1442695040888963407ULL;
		buf[i] = *s >> 56;
	}
}

/* The last of the runs is as long as a hundred others, or a tenth of them all. */
static inline int fuzz_main(int argc, char **argv)
{
	unsigned runs = argc > 1 ? strtoul(argv[1], NULL, 0) : 300;
	uint64_t s = argc > 2 ? strtoull(argv[2], NULL, 0) : (uint64_t)time(NULL);
	enum { ONE = 4096 };
	size_t last = (size_t)ONE * (runs > 1000 ? runs / 10 : 100);
	uint8_t *buf = malloc(last);
	struct fuzz_use half = { 0 };

	if (!buf)
		return 2;
	printf("seed %llu, %u runs\n", (unsigned long long)s, runs);
	fflush(stdout);
	for (unsigned r = 0; r < runs; r++) {
		fuzz_fill(buf, ONE, &s);
		LLVMFuzzerTestOneInput(buf, ONE - (s >> 32) % 64);
		if (r == runs / 2)
			half = fuzz_use();
	}
	if (runs > 1)
		fuzz_check("from run to run", half, fuzz_use());
	fuzz_fill(buf, last, &s);
	LLVMFuzzerTestOneInput(buf, last);
	free(buf);
	return 0;
}
#ifndef FUZZ_OWN_MAIN
int main(int argc, char **argv) { return fuzz_main(argc, argv); }
#endif
#endif

#endif
