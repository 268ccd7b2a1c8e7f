/*
 * The system calls that a running machine may make (seccomp).
 *
 * Two filters. The process's, put on all threads when everything is opened and before the guest runs, denies what no machine
 * needs: new programs, other identities, mounts, modules, other processes' memory... A vCPU thread gets a second one, that allows
 * only what executing a guest and serving its exits takes: no file is opened there, no socket made. docs/security.md has the argument.
 *
 * A denied call fails with EPERM, except for those that only an attacker makes on a vCPU thread: they end the process.
 */
#ifndef CLI_SANDBOX_H
#define CLI_SANDBOX_H

#include <stdbool.h>

#include "base/err.h"

/* QEMU's words: what of the groups may be called although the sandbox is on. */
struct sandbox_config {
	bool on, obsolete, elevate, spawn, resources;
};

/* On unless this is a build with a sanitizer, whose leak check at the end starts processes. */
void sandbox_default(struct sandbox_config *c);

struct sandbox;

/* Filter the calling thread and all others; no way back. Prepares the vCPU filter. *out lives until sandbox_free(). */
int sandbox_enter(struct sandbox **out, const struct sandbox_config *c, struct err *err);
/* On a vCPU's thread, after sandbox_enter(). 0 or -errno. `sb` is a struct sandbox. */
int sandbox_enter_vcpu(void *sb);
void sandbox_free(struct sandbox *sb);

#endif
