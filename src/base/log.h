/*
 * Log: what is abnormal. Counters and traces are elsewhere; a hot path never logs.
 *
 * The sink is the only process-wide state: `cli` installs one that prints, tests one that records.
 * What a guest can cause goes through log_guest(), which is rate limited per call site.
 */
#ifndef BASE_LOG_H
#define BASE_LOG_H

#include <stdint.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

typedef void log_sink_fn(enum log_level level, const char *line, void *opaque);

void log_set_sink(log_sink_fn *fn, void *opaque, enum log_level max_level);
void log_msg(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_msg(LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  log_msg(LOG_WARN, __VA_ARGS__)
#define log_info(...)  log_msg(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_msg(LOG_DEBUG, __VA_ARGS__)

/* State of one rate-limited call site: at most 10 lines a second, then a count of what was dropped. */
struct log_limit { _Atomic uint64_t window; _Atomic uint32_t count; };
void log_limited(struct log_limit *l, enum log_level level, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
#define log_guest(...) do { static struct log_limit l_; log_limited(&l_, LOG_WARN, __VA_ARGS__); } while (0)

#endif
