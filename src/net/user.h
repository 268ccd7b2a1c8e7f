/* User-mode network: libslirp behind function pointers. Private to this folder. */
#ifndef NET_USER_H
#define NET_USER_H

#include <slirp/libslirp.h>

#include "net/internal.h"

/*
 * The functions used, loaded when the first user network is opened: libslirp brings glib and costs
 * more start-up time than everything else in a small machine.
 */
#define SLIRP_FUNCTIONS(X) X(slirp_new) X(slirp_cleanup) X(slirp_pollfds_fill) X(slirp_pollfds_poll) X(slirp_input) \
	X(slirp_add_hostfwd) X(slirp_add_exec) X(slirp_add_guestfwd) X(slirp_socket_can_recv) X(slirp_socket_recv)
struct slirp_lib {
#define X(f) __typeof__(f) *f;
	SLIRP_FUNCTIONS(X)
#undef X
};

struct user_fd { int fd, events, revents; bool seen; struct loop_watch *watch; struct user *u; };
struct user_timer { struct timer t; SlirpTimerCb cb; void *opaque; struct user *u; };
/* guestfwd to a TCP server on the host: one connection, made at start. */
struct guestfwd { struct guestfwd *next; struct user *u; int fd; struct in_addr addr; int port; struct loop_watch *watch; };

struct user {
	struct net_backend n;
	const struct slirp_lib *lib;
	Slirp *slirp;
	struct user_fd **fd;            /* what slirp wants polled; allocated singly, watches point at them */
	unsigned nfd, fdcap;
	struct timer timeout;           /* slirp's own deadlines */
	bool process_posted;            /* atomic */
	bool closing;
	pthread_mutex_t lock;           /* tx */
	struct net_queue tx;
	struct guestfwd *fwds;
};

int slirp_lib_load(const struct slirp_lib **out, struct err *err);

/* user_opts.c: the configuration from the option text; strings point into `o`. */
enum { USER_SEARCH_MAX = 16 };
struct user_config { SlirpConfig c; const char *search[USER_SEARCH_MAX + 1]; };
int user_parse(struct user_config *cfg, struct optlist *o, struct err *err);
/* hostfwd= and guestfwd=, after slirp was made. */
int user_add_forwards(struct user *u, struct optlist *o, struct err *err);
/* user.c: carry a guest connection to addr:port over `fd`. */
int user_guestfwd_fd(struct user *u, struct in_addr addr, int port, int fd, struct err *err);

#endif
