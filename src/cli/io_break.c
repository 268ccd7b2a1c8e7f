/*
 * lodge io: blkdebug's breakpoints, and aio_ requests that may stand at one. As long as no breakpoint was set aio_ requests are done when
 * their command ends; afterwards each has a thread, and its command ends when it is done or stopped.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/io.h"

enum { SETTLE_MS = 500 };

struct io_aio {
	pthread_t thread;
	void (*fn)(struct io *io, const void *args);
	void *args;
	struct io *io;
	bool done;                      /* atomic */
	struct io_aio *next;
};

static void *run(void *opaque)
{
	struct io_aio *a = opaque;
	a->fn(a->io, a->args);
	fflush(stdout);
	__atomic_store_n(&a->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void tell_stops(struct io *io)
{
	for (char *tag; (tag = image_stop_news(io->b)); free(tag))
		printf("blkdebug: Suspended request '%s'\n", tag);
	fflush(stdout);
}

/* Join what is done; how many are not. */
static unsigned reap(struct io *io)
{
	unsigned n = 0;
	for (struct io_aio **p = &io->aio, *a; (a = *p);) {
		if (!__atomic_load_n(&a->done, __ATOMIC_ACQUIRE)) {
			n++;
			p = &a->next;
			continue;
		}
		pthread_join(a->thread, NULL);
		*p = a->next;
		free(a->args);
		free(a);
	}
	return n;
}

/* Until each request is done or stopped; not for ever, since one may wait for what another holds. */
static void settle(struct io *io)
{
	for (int i = 0; i < SETTLE_MS && reap(io) > image_stopped(io->b, NULL); i++)
		usleep(1000);
	tell_stops(io);
}

int io_aio_start(struct io *io, void (*fn)(struct io *io, const void *args), const void *args, size_t size)
{
	struct io_aio *a = calloc(1, sizeof *a);
	void *copy = a ? malloc(size) : NULL;
	if (!copy) {
		free(a);
		return io_fail("out of memory");
	}
	memcpy(copy, args, size);
	*a = (struct io_aio){ .fn = fn, .args = copy, .io = io, .next = io->aio };
	if (pthread_create(&a->thread, NULL, run, a)) {
		free(copy);
		free(a);
		return io_fail("cannot start a thread");
	}
	io->aio = a;
	settle(io);
	return 0;
}

int io_aio_wait(struct io *io)
{
	while (reap(io)) {
		if (image_stopped(io->b, NULL))
			return io_fail("a request stands at a breakpoint; resume it");
		usleep(1000);
	}
	return 0;
}

void io_aio_end(struct io *io)
{
	while (io->b && reap(io)) {
		image_resume(io->b, NULL);
		usleep(1000);
	}
	io->breaks = false;
}

/* --- the commands --- */

int io_break(struct io *io, int argc, char **argv)
{
	int r = image_break(io->b, argv[1], argv[2]);
	if (r)
		printf("Could not set breakpoint: %s\n", strerror(-r));
	else
		io->breaks = true;
	return r;
}

int io_remove_break(struct io *io, int argc, char **argv)
{
	int r = image_unbreak(io->b, argv[1]);
	if (r)
		printf("Could not remove breakpoint %s: %s\n", argv[1], strerror(-r));
	settle(io);
	return r;
}

int io_resume(struct io *io, int argc, char **argv)
{
	bool there = image_stopped(io->b, argv[1]);
	if (there) {
		printf("blkdebug: Resuming request '%s'\n", argv[1]);
		fflush(stdout);
	}
	int r = image_resume(io->b, argv[1]);
	if (r)
		printf("Could not resume request: %s\n", strerror(-r));
	settle(io);
	return r;
}

int io_wait_break(struct io *io, int argc, char **argv)
{
	while (!image_stopped(io->b, argv[1])) {
		if (!reap(io))
			return io_fail("no request is under way that could come by breakpoint %s", argv[1]);
		usleep(1000);
	}
	tell_stops(io);
	return 0;
}
