/*
 * `lodge img`: qemu-img's words, output and exit statuses (qemu-img 7.2). Each verb is a function that
 * gets its own argv and returns the exit status.
 */
#ifndef CLI_IMG_H
#define CLI_IMG_H

#include <stdio.h>

#include "base/util.h"
#include "block/image.h"
#include "base/keyvals.h"
#include "block/throttle.h"

struct tls_store;

int img_main(int argc, char **argv);
/* serve_object() for img_objects(). */
int img_add_object(const char *text, struct err *err);
/* The qcow2 part of `info`. */
void img_print_specific(const struct image_info *i);
/* Credentials of --object, for what makes images. */
const struct tls_store *img_objects(void);
int io_main(int argc, char **argv);

/* --- img.c: what the verbs share --- */
/* "qemu-img: message" on standard error; returns 1. */
int img_fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* "FILE: WHAT: reason", and what to do where that is known; returns 1. */
int img_io_failed(const char *file, const char *what, int error);
/* A message about a file that may begin with its name. */
int img_file_failed(const char *file, const char *message);
int img_usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));      /* with "Try --help" */
/* plain: a name even with --image-opts; target: --target-image-opts decides. */
struct img_open {
	const char *format, *cache, *backing, *internal;
	bool write, shared, no_backing, as_is, plain, target, discard_ignore, snapshot, copy_on_read;
	bool still;                     /* read-only: nobody may write meanwhile, not even to a raw image */
	bool options;                   /* the name is a list of options, whatever --image-opts says */
	const char *program;            /* qemu-io, for messages; NULL: qemu-img */
	enum block_aio aio;
	bool polled;                    /* requests of one thread that calls block_poll() */
};
/* --image-opts was given. */
bool img_image_opts(void);
/* NULL after telling why. */
struct block *img_open(const char *file, const struct img_open *o);
/* "10G": -1 after telling why. */
int64_t img_size(const char *text, const char *what);
int64_t img_size_most(const char *text, const char *what, int64_t most);
/* A plain number, as strtoul() reads it, from 0 to `most`: -1 after telling that `what` is invalid. */
int64_t img_count(const char *text, const char *what, int64_t most);
int img_cache(const char *mode, enum block_cache *c);
/* Like getopt_long() with the names every verb has: 'U' force-share, 256 object, 257 image-opts, 258 output, 259... */
enum { OPT_OBJECT = 256, OPT_IMAGE_OPTS, OPT_OUTPUT, OPT_BACKING_CHAIN, OPT_SIZE, OPT_PREALLOC, OPT_SHRINK, OPT_START, OPT_LENGTH,
       OPT_FLUSH, OPT_PATTERN, OPT_NO_DRAIN, OPT_SALVAGE, OPT_TARGET_ZERO, OPT_BITMAPS, OPT_FORCE, OPT_SKIP_BROKEN, OPT_TARGET_OPTS,
       OPT_BITMAP_ADD = 300 /* and the other image_bitmap_ops */ };
int img_getopt(int argc, char **argv, const char *shorts);
int img_output(const char *text, bool *json);
void img_json_string(const char *s);
/* -o of create, convert, amend, measure: 0, or 1 after telling why. `seen` names what was given. */
struct img_create_seen { bool size, version, lazy, refcount_bits, data_raw, prealloc, encryption, other; const char *compat; /* as it was said */ };
int img_create_options(struct image_create *c, struct keyvals *l, struct img_create_seen *seen);
void img_progress(bool on, double percent);
/* "64 KiB" as QEMU writes sizes. */
const char *img_human(uint64_t bytes, char buf[32]);
extern const char img_missing[];
/* img_opts.c: -o help was asked for, and answered. No `text`: no. */
bool img_options_help(const char *text, const char *format, bool amend);
/* One more -o: added to `list` (NULL when there was none; the caller frees it). 0, or 1 after telling why. */
int img_add_options(char **list, const char *more);
/* -r: seconds to wait before `bytes` more are due; the caller holds what protects `r`. */
struct img_rate { uint64_t limit; double due; };
double img_rate_wait(struct img_rate *r, uint64_t bytes);
void img_sleep(double seconds);
/* img_bitmap.c: 0, or 1 after telling why. */
int img_copy_bitmaps(struct block *to, struct block *from, bool skip_broken);

int img_create(int argc, char **argv);
int img_info(int argc, char **argv);
int img_check(int argc, char **argv);
int img_map(int argc, char **argv);
int img_measure(int argc, char **argv);
int img_snapshot(int argc, char **argv);
int img_resize(int argc, char **argv);
int img_amend(int argc, char **argv);
int img_rebase(int argc, char **argv);
int img_commit(int argc, char **argv);
int img_convert(int argc, char **argv);
int img_compare(int argc, char **argv);
int img_bitmap(int argc, char **argv);
int img_bench(int argc, char **argv);
int img_dd(int argc, char **argv);

#endif
