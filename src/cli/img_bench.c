/* lodge img bench: many requests of one size, timed. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "cli/img.h"
#include "loop/loop.h"

enum { BENCH_THREADS = 64, CACHED_THREADS = 16, POLLED_DEPTH = 1024, REMOTE_DEPTH = 128, SHARE_MIN = 4096 };

struct bench {
	struct block *b;
	uint64_t count, next, off, size, step, flush;
	bool write, no_drain, alone;    /* alone: one request at a time */
	bool may_share;                 /* polled: threads go on when the requests turn out to be copies */
	int pattern, error;
	pthread_mutex_t lock;
	struct bench_slot *spare;       /* polled */
	unsigned in_flight;
};

/* Where the next request goes. With threads the lock is held. */
static uint64_t next_offset(struct bench *k)
{
	uint64_t off = k->off;
	k->off += k->step;
	if (k->off + k->size > block_length(k->b))
		k->off = block_length(k->b) <= k->size ? 0 : k->off % (block_length(k->b) - k->size + 1) / 512 * 512;
	return off;
}

/* --- one thread that has many requests under way and asks for their ends --- */

struct bench_slot { struct block_req r; struct iovec iov; struct bench *k; struct bench_slot *next; };

static void slot_done(struct block_req *r)
{
	struct bench_slot *s = container_of(r, struct bench_slot, r);
	struct bench *k = s->k;
	if (r->ret && !k->error)
		k->error = r->ret;
	s->next = k->spare;
	k->spare = s;
	k->in_flight--;
}

static void submit_slot(struct bench *k, enum block_op op)
{
	struct bench_slot *s = k->spare;
	k->spare = s->next;
	k->in_flight++;
	bool alone = k->alone || (op == BLOCK_FLUSH && !k->no_drain);
	s->r = (struct block_req){ .op = op, .flags = BLOCK_REQ_INLINE | (alone ? 0 : BLOCK_REQ_MORE), .done = slot_done };
	if (op != BLOCK_FLUSH) {
		s->r.off = next_offset(k);
		s->r.len = k->size;
		s->r.iov = &s->iov;
		s->r.iovcnt = 1;
		k->next++;
	}
	block_submit(k->b, &s->r);
}

/* False: nothing can come to an end any more, which is an error. */
static bool end_some(struct bench *k)
{
	if (!block_poll(k->b) && k->in_flight && !k->error)
		k->error = -EIO;
	return !k->error;
}

/* Until all is done, or more threads would do it faster. */
static void run_slots(struct bench *k)
{
	while (k->next < k->count && !k->error && !(k->may_share && block_copies(k->b))) {
		if (!k->spare && !end_some(k))
			break;
		if (!k->spare)
			continue;
		submit_slot(k, k->write ? BLOCK_WRITE : BLOCK_READ);
		if (!k->flush || k->next % k->flush)
			continue;
		while (k->in_flight && !k->no_drain && end_some(k))
			;
		while (!k->spare && end_some(k))
			;
		if (!k->error)
			submit_slot(k, BLOCK_FLUSH);
	}
	while (k->in_flight && block_poll(k->b))
		;
}

/* One buffer for all, as in qemu-img: nobody looks at what is read, and what is written is the same everywhere. */
static int run_polled(struct bench *k, unsigned depth)
{
	struct bench_slot *slots = calloc(depth, sizeof *slots);
	uint8_t *buf = NULL;
	if (!slots || posix_memalign((void **)&buf, 4096, k->size)) {
		free(slots);
		return -ENOMEM;
	}
	memset(buf, k->pattern, k->size);
	k->alone = depth == 1;
	for (unsigned i = 0; i < depth; i++) {
		slots[i] = (struct bench_slot){ .iov = { buf, k->size }, .k = k, .next = k->spare };
		k->spare = &slots[i];
	}
	run_slots(k);
	free(slots);
	free(buf);
	return k->error;
}

/* --- threads --- */

static void *bencher(void *opaque)
{
	struct bench *k = opaque;
	uint8_t *buf = NULL;
	int no_memory = posix_memalign((void **)&buf, 4096, k->size);
	if (!no_memory)
		memset(buf, k->pattern, k->size);
	pthread_mutex_lock(&k->lock);
	if (no_memory)
		k->error = -ENOMEM;
	while (k->next < k->count && !k->error) {
		uint64_t off = next_offset(k), nth = ++k->next;
		pthread_mutex_unlock(&k->lock);
		int r = k->write ? image_write(k->b, off, buf, k->size) : image_read(k->b, off, buf, k->size);
		if (!r && k->flush && nth % k->flush == 0)
			r = image_flush(k->b);
		pthread_mutex_lock(&k->lock);
		if (r)
			k->error = r;
	}
	pthread_mutex_unlock(&k->lock);
	free(buf);
	return NULL;
}

static int run_threads(struct bench *k, unsigned want)
{
	pthread_t t[BENCH_THREADS];
	unsigned n = 0;
	while (n + 1 < want && !pthread_create(&t[n], NULL, bencher, k))
		n++;
	bencher(k);
	while (n)
		pthread_join(t[--n], NULL);
	return k->error;
}

/* 0, or 1 after telling why. */
static int check_args(const struct bench *k, struct img_open *o, int64_t depth, enum block_cache cache, const char *aio)
{
	struct block_opts b = { .cache = cache };
	struct err err = { 0 };
	if (block_aio_key("-i", aio, &b, &err))
		return img_fail("%s", err.msg);
	o->aio = b.aio;
	if (!k->size || k->size > 1 << 30 || depth < 1)
		return img_fail(depth < 1 ? "Invalid queue depth specified" : "Invalid buffer size specified");
	if (!k->write && k->flush)
		return img_fail("--flush-interval is only available in write tests");
	return k->flush && k->flush < (uint64_t)depth ? img_fail("Flush interval can't be smaller than depth") : 0;
}

static void announce(const struct bench *k, int64_t depth)
{
	printf("Sending %llu %s requests, %llu bytes each, %lld in parallel (starting at offset %llu, step size %llu)\n",
	       (unsigned long long)k->count, k->write ? "write" : "read", (unsigned long long)k->size, (long long)depth,
	       (unsigned long long)k->off, (unsigned long long)k->step);
	if (k->flush)
		printf("Sending flush every %llu requests\n", (unsigned long long)k->flush);
}

/* What the option says as a number, 0 where it is none; -1 after telling why, in qemu-img's words: counts have no suffixes, sizes do. */
static int64_t argument(int c)
{
	switch (c) {
	case 'c': return img_count(optarg, "request count", INT32_MAX);
	case 'd': return img_count(optarg, "queue depth", INT32_MAX);
	case OPT_FLUSH: return img_count(optarg, "flush interval", INT32_MAX);
	case OPT_PATTERN: return img_count(optarg, "pattern byte", 255);
	case 'o': return img_size(optarg, "offset");
	case 's': return img_size_most(optarg, "buffer size", INT32_MAX);
	case 'S': return img_size_most(optarg, "step_size", INT32_MAX);
	default: return 0;
	}
}

static int parse_args(struct bench *k, struct img_open *o, int argc, char **argv, int64_t *depth, bool *quiet, const char **aio)
{
	int64_t v = 0;
	int c;
	while ((c = img_getopt(argc, argv, ":hc:d:f:ni:o:qs:S:t:wU")) >= 0) {
		if ((v = argument(c)) < 0)
			return 1;
		switch (c) {
		case 'c': k->count = (uint64_t)v; break;
		case 'd': *depth = v; break;
		case 'f': o->format = optarg; break;
		case 'n': *aio = "native"; break;
		case 'i': *aio = optarg; break;
		case 'o': k->off = (uint64_t)v; break;
		case 'q': *quiet = true; break;
		case 's': k->size = (uint64_t)v; break;
		case 'S': k->step = (uint64_t)v; break;
		case 't': o->cache = optarg; break;
		case 'w': k->write = o->write = true; break;
		case 'U': o->shared = true; break;
		case OPT_FLUSH: k->flush = (uint64_t)v; break;
		case OPT_NO_DRAIN: k->no_drain = true; break;
		case OPT_PATTERN: k->pattern = (int)v; break;
		}
	}
	return optind != argc - 1 ? img_usage("%s", img_missing) : 0;
}

/*
 * Copies out of the page cache want as many threads as there are processors, and some; more of them only wait for each other. Whether reads past it are copies, too,
 * turns out when they run (a file system in memory, holes). Writes to one file wait for each other there, and one thread is faster.
 */
static int run(struct bench *k, int64_t depth, bool ring, bool direct)
{
	bool remote = block_is_remote(k->b), stable = k->write && !block_write_cache(k->b);
	bool polled = block_can_poll(k->b, k->write) && (ring || remote || (depth > 1 && direct));
	unsigned copiers = (unsigned)MIN(2 * sysconf(_SC_NPROCESSORS_ONLN), (long)CACHED_THREADS);
	unsigned threads = (unsigned)MIN(depth, (int64_t)(direct || remote || stable ? BENCH_THREADS : copiers));
	k->may_share = polled && !ring && !remote && !k->write && k->size >= SHARE_MIN;
	int r = polled ? run_polled(k, (unsigned)MIN(depth, (int64_t)(remote ? REMOTE_DEPTH : POLLED_DEPTH))) : 0;
	return r || k->next >= k->count ? r : run_threads(k, threads);
}

int img_bench(int argc, char **argv)
{
	struct bench k = { .count = 75000, .size = 4096, .lock = PTHREAD_MUTEX_INITIALIZER };
	struct img_open o = { 0 };
	enum block_cache cache = CACHE_WRITEBACK;
	const char *aio = NULL;
	bool quiet = false;
	int64_t depth = 64;
	if (parse_args(&k, &o, argc, argv, &depth, &quiet, &aio) || (o.cache && img_cache(o.cache, &cache)) || check_args(&k, &o, depth, cache, aio))
		return 1;
	k.step = k.step ? k.step : k.size;
	/*
	 * One thread with a ring serves a device or a server best; the page cache, from which requests are copies, threads.
	 * One request at a time through neither is a plain system call.
	 */
	bool direct = cache == CACHE_NONE || cache == CACHE_DIRECTSYNC, ring = o.aio == AIO_NATIVE || o.aio == AIO_IO_URING;
	o.polled = ring || (depth > 1 && direct) || block_name_is_protocol(argv[optind]) || img_image_opts();
	k.b = img_open(argv[optind], &o);
	int r = !k.b;
	if (!r && !quiet)
		announce(&k, depth);
	if (!r && range_bad(k.off, k.size, block_length(k.b)))
		r = img_fail("Failed request: %s: it does not fit the image", strerror(EIO));
	uint64_t begin = clock_host_ns();
	int e = r ? 0 : run(&k, depth, ring, direct);
	if (e)
		r = img_fail("Failed request: %s", strerror(-e));
	if (!r && !quiet)
		printf("Run completed in %3.3f seconds.\n", (double)(clock_host_ns() - begin) / 1e9);
	block_close(k.b);
	return r;
}
