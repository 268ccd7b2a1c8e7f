/*
 * `lodge nbd` and `lodge storage-daemon`: programs that serve disks, in the words of qemu-nbd and qemu-storage-daemon 7.2.
 */
#ifndef CLI_SERVE_H
#define CLI_SERVE_H

#include "block/image.h"
#include "block/nbd.h"
#include "block/throttle.h"
#include "tls/tls.h"

int nbd_main(int argc, char **argv);
int storage_main(int argc, char **argv);

/* One --object of a tool: TLS credentials, secrets, authorization. "help" prints the types: returns 1. */
int serve_object(struct tls_store *s, struct throttle_set *groups, const char *text, struct err *err);

/* --- serve.c: the frame of both --- */
struct serve { int sigfd, event; int ready; };
/* Signals that end the program, as a descriptor; before any thread starts. */
int serve_start(struct serve *s, struct err *err);
/*
 * Become a child; the parent waits until serve_ready() and then ends with status 0, or with the child's status when that ends
 * first. Before any thread starts. Returns in the child only.
 */
int serve_fork(struct serve *s, struct err *err);
/* What was started serves: write the pid file (may be NULL), let the parent go and leave the terminal. */
int serve_ready(struct serve *s, const char *pidfile, struct err *err);
/* Until a signal, or serve_end() from any thread. */
void serve_wait(struct serve *s);
void serve_end(struct serve *s);
/* Descriptors that a service manager passed (LISTEN_FDS), the first one is 3; 0: none. */
unsigned serve_passed(void);

/* Show a bitmap as a context of the export; its content is the caller's to free. */
int serve_bitmap(struct nbd_export *e, const char *name, struct image_bits *bits, struct err *err);

/* nbd_dev.c: the kernel's client (-c, -d). `fd` is the kernel's end of a connected pair. */
int nbd_dev_attach(const char *dev, int fd, const struct nbd_export *e, struct err *err);
/* Serves the device until it is disconnected; on a thread of its own. */
int nbd_dev_run(int dev);
int nbd_dev_disconnect(const char *dev, struct err *err);

#endif
