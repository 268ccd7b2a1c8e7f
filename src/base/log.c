#include "base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

static struct {
	pthread_mutex_t lock;
	log_sink_fn *fn;
	void *opaque;
	enum log_level max;
} sink = { .lock = PTHREAD_MUTEX_INITIALIZER, .max = LOG_WARN };

void log_set_sink(log_sink_fn *fn, void *opaque, enum log_level max_level)
{
	pthread_mutex_lock(&sink.lock);
	sink.fn = fn;
	sink.opaque = opaque;
	sink.max = max_level;
	pthread_mutex_unlock(&sink.lock);
}

static void emit(enum log_level level, const char *fmt, va_list ap)
{
	char line[1024];
	vsnprintf(line, sizeof line, fmt, ap);
	pthread_mutex_lock(&sink.lock);
	if (sink.fn && level <= sink.max)
		sink.fn(level, line, sink.opaque);
	pthread_mutex_unlock(&sink.lock);
}

void log_msg(enum log_level level, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	emit(level, fmt, ap);
	va_end(ap);
}

void log_limited(struct log_limit *l, enum log_level level, const char *fmt, ...)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC_COARSE, &ts);
	uint64_t now = (uint64_t)ts.tv_sec + 1; /* never 0, so that the first window is new */
	if (atomic_exchange_explicit(&l->window, now, memory_order_relaxed) != now) {
		uint32_t n = atomic_exchange_explicit(&l->count, 0, memory_order_relaxed);
		if (n > 10)
			log_msg(level, "(%u similar messages dropped)", n - 10);
	}
	if (atomic_fetch_add_explicit(&l->count, 1, memory_order_relaxed) >= 10)
		return;
	va_list ap;
	va_start(ap, fmt);
	emit(level, fmt, ap);
	va_end(ap);
}
