/*
 * Character back ends: a byte stream each way with back-pressure. Cannot see a guest.
 */
#ifndef CHR_CHR_H
#define CHR_CHR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

struct chardev;
struct loop;

enum chr_event { CHR_OPENED, CHR_CLOSED, CHR_BREAK, CHR_WRITABLE };

struct chr_client {
	size_t (*can_receive)(void *opaque);                            /* bytes it can take now */
	void (*receive)(void *opaque, const uint8_t *buf, size_t len);  /* loop thread, at most can_receive() */
	void (*event)(void *opaque, enum chr_event e);
	void *opaque;
};

/*
 * `spec` is QEMU's -chardev text: "stdio,id=c0,mux=on,signal=off", "file,id=f,path=x", "null,id=n",
 * "socket,id=s,path=/x,server=on,wait=off", "pty,id=p", "pipe,...". Several clients may share one
 * with mux=on; Ctrl-A c moves the focus, Ctrl-A x calls `quit`, Ctrl-A h helps, Ctrl-A b is a break.
 */
struct chr_env { struct loop *loop; void (*quit)(void *opaque); void *opaque; };
int chr_open(struct chardev **out, const char *spec, const struct chr_env *env, struct err *err);
void chr_close(struct chardev *c);              /* restores a terminal */
const char *chr_id(const struct chardev *c);
/* What a person calls it, with what they need to connect ("pty: /dev/pts/3"). */
const char *chr_label(const struct chardev *c);
/* Attach and detach on the loop's thread, or while it does not run. */
int chr_attach(struct chardev *c, const struct chr_client *cl, const char *owner, struct err *err);
void chr_detach(struct chardev *c, const void *opaque);
/* Any thread. Bytes taken, possibly fewer than `len`; CHR_WRITABLE follows when there is room again. */
size_t chr_write(struct chardev *c, const uint8_t *buf, size_t len);
/* The client can take bytes again. Any thread. */
void chr_accept_input(struct chardev *c);
/* Standard input ended (a pipe): the machine decides what that means. Loop thread. */
void chr_on_eof(struct chardev *c, void (*fn)(void *opaque), void *opaque);
/* Take what a ringbuf holds; 0 for other kinds. */
size_t chr_ringbuf_read(struct chardev *c, uint8_t *buf, size_t len);

#endif
