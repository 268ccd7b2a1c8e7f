/*
 * The server's life: exports, listening sockets, connections.
 *
 * Bounds: max_clients connections at once (further ones wait in the socket's queue), a handshake of 30 seconds, and per connection
 * what nbd_serve.c allows (64 requests, 64 MiB).
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block/nbd_priv.h"

enum { CLIENTS_MAX = 1024, END_MS = 2000, STACK = 256 * 1024 };

uint16_t nbd_export_flags(const struct nbd_export *e)
{
	unsigned f = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_CACHE | (e->multi_conn ? NBD_MULTI_CONN : 0);
	return (uint16_t)(f | (e->writable ? NBD_SEND_TRIM | NBD_SEND_WRITE_ZEROES | NBD_SEND_FAST_ZERO : NBD_READ_ONLY));
}

int nbd_server_new(struct nbd_server **out, const struct nbd_server_opts *o, struct err *err)
{
	struct nbd_server *s = calloc(1, sizeof *s);
	if (!s)
		return err_set(err, -ENOMEM, "NBD server: out of memory");
	s->o = *o;
	s->max = o->max_clients ? o->max_clients : CLIENTS_MAX;
	if (pipe2(s->wake, O_CLOEXEC)) {
		int r = err_set_errno(err, -errno, "NBD server");
		free(s);
		return r;
	}
	pthread_mutex_init(&s->lock, NULL);
	pthread_cond_init(&s->change, NULL);
	*out = s;
	return 0;
}

static void ex_free(struct nbd_ex *ex)
{
	free((char *)(uintptr_t)ex->e.name);
	free((char *)(uintptr_t)ex->e.desc);
	free((char *)(uintptr_t)ex->e.bitmap);
	pthread_mutex_destroy(&ex->lock);
	pthread_cond_destroy(&ex->calm);
	free(ex);
}

int nbd_server_add(struct nbd_server *s, const struct nbd_export *e, struct err *err)
{
	if (strlen(e->name) > NBD_NAME_MAX || (e->desc && strlen(e->desc) > NBD_NAME_MAX))
		return err_set(err, -EINVAL, "export name or description is longer than %d bytes", NBD_NAME_MAX);
	if (range_bad(e->off, e->len, block_length(e->blk)))
		return err_set(err, -EINVAL, "export '%s': offset and size are outside of the image", e->name);
	if (nbd_server_find(s, e->name, strlen(e->name)))
		return err_set(err, -EEXIST, "NBD server already has export named '%s'", e->name);
	struct nbd_ex *ex = calloc(1, sizeof *ex);
	if (!ex)
		return err_set(err, -ENOMEM, "out of memory");
	pthread_mutex_init(&ex->lock, NULL);
	pthread_cond_init(&ex->calm, NULL);
	ex->e = *e;
	ex->e.writable = e->writable && !block_read_only(e->blk);
	ex->e.name = strdup(e->name);
	ex->e.desc = e->desc ? strdup(e->desc) : NULL;
	ex->e.bitmap = e->bitmap ? strdup(e->bitmap) : NULL;
	ex->flags = nbd_export_flags(&ex->e);
	if (!ex->e.name || (e->desc && !ex->e.desc) || (e->bitmap && !ex->e.bitmap)) {
		ex_free(ex);
		return err_set(err, -ENOMEM, "out of memory");
	}
	pthread_mutex_lock(&s->lock); /* clients may be looking already */
	struct nbd_ex **v = realloc(s->ex, (s->nex + 1) * sizeof *v);
	if (v) {
		s->ex = v;
		v[s->nex++] = ex;
	}
	pthread_mutex_unlock(&s->lock);
	if (v)
		return 0;
	ex_free(ex);
	return err_set(err, -ENOMEM, "out of memory");
}

struct nbd_ex *nbd_server_at(struct nbd_server *s, unsigned i)
{
	pthread_mutex_lock(&s->lock);
	struct nbd_ex *ex = i < s->nex ? s->ex[i] : NULL;
	pthread_mutex_unlock(&s->lock);
	return ex;
}

struct nbd_ex *nbd_server_find(struct nbd_server *s, const char *name, size_t len)
{
	struct nbd_ex *ex;
	for (unsigned i = 0; (ex = nbd_server_at(s, i)); i++) {
		if (strlen(ex->e.name) == len && !memcmp(ex->e.name, name, len))
			return ex;
	}
	return NULL;
}

/* --- connections --- */

static void client_free(struct nbd_client *c)
{
	nbd_chan_close(&c->chan);
	pthread_mutex_destroy(&c->send);
	pthread_mutex_destroy(&c->lock);
	pthread_cond_destroy(&c->room);
	free(c);
}

static void *client_thread(void *arg)
{
	struct nbd_client *c = arg;
	struct nbd_server *s = c->s;
	int r = c->negotiated ? 0 : nbd_talk(c);
	if (s->o.verbose && r && r != -ECONNABORTED)
		log_warn("NBD: handshake failed: %s", strerror(-r));
	if (!r)
		nbd_serve(c);
	pthread_mutex_lock(&s->lock);
	for (struct nbd_client **p = &s->list; *p; p = &(*p)->next) {
		if (*p == c) {
			*p = c->next;
			break;
		}
	}
	pthread_mutex_unlock(&s->lock);
	client_free(c);
	pthread_mutex_lock(&s->lock);
	unsigned left = --s->clients;
	pthread_mutex_unlock(&s->lock);
	if (!r && s->o.closed)
		s->o.closed(s->o.opaque, left);
	pthread_mutex_lock(&s->lock);
	s->listeners--; /* this thread counts as one that uses `s` */
	pthread_cond_broadcast(&s->change);
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

/* A detached thread with all signals blocked. */
static int start_thread(void *(*fn)(void *), void *arg)
{
	pthread_attr_t a;
	pthread_t t;
	sigset_t all, old;
	pthread_attr_init(&a);
	pthread_attr_setdetachstate(&a, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&a, STACK);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = pthread_create(&t, &a, fn, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_attr_destroy(&a);
	return -r;
}

int nbd_server_client(struct nbd_server *s, int fd, bool negotiated, struct err *err)
{
	struct nbd_client *c = calloc(1, sizeof *c);
	int one = 1;
	if (!c) {
		close(fd);
		return err_set(err, -ENOMEM, "out of memory");
	}
	c->s = s;
	c->negotiated = negotiated;
	if (negotiated)
		c->ex = s->ex[0];
	nbd_chan_init(&c->chan, fd);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
	pthread_mutex_init(&c->send, NULL);
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->room, NULL);
	pthread_mutex_lock(&s->lock);
	int r = s->stop ? -ESHUTDOWN : 0;
	if (!r) {
		s->clients++;
		s->listeners++;
		c->next = s->list;
		s->list = c;
		r = start_thread(client_thread, c);
	}
	if (r && !s->stop) {
		s->clients--;
		s->listeners--;
		s->list = c->next;
	}
	pthread_mutex_unlock(&s->lock);
	if (!r)
		return 0;
	client_free(c);
	return err_set_errno(err, r, "NBD connection");
}

/* --- listening --- */

struct listener { struct nbd_server *s; int fd; };

static bool wait_for_room(struct nbd_server *s)
{
	pthread_mutex_lock(&s->lock);
	while (!s->stop && s->clients >= s->max)
		pthread_cond_wait(&s->change, &s->lock);
	bool go = !s->stop;
	pthread_mutex_unlock(&s->lock);
	return go;
}

static void *listen_thread(void *arg)
{
	struct listener *l = arg;
	struct nbd_server *s = l->s;
	while (wait_for_room(s)) {
		struct pollfd p[2] = { { l->fd, POLLIN, 0 }, { s->wake[0], POLLIN, 0 } };
		if (poll(p, 2, -1) < 0 && errno != EINTR)
			break;
		if (p[1].revents)
			break;
		int fd = p[0].revents ? accept4(l->fd, NULL, NULL, SOCK_CLOEXEC) : -1;
		if (fd < 0 && p[0].revents && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)) {
			log_guest("NBD: cannot accept a connection: %s", strerror(errno));
			nanosleep(&(struct timespec){ 0, 100000000 }, NULL);
		}
		if (fd >= 0)
			nbd_server_client(s, fd, false, NULL);
	}
	close(l->fd);
	free(l);
	pthread_mutex_lock(&s->lock);
	s->listeners--;
	pthread_cond_broadcast(&s->change);
	pthread_mutex_unlock(&s->lock);
	return NULL;
}

int nbd_server_listen(struct nbd_server *s, int fd, struct err *err)
{
	struct listener *l = malloc(sizeof *l);
	/* Several wait for one socket, and a client may be gone before it is accepted. */
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	int r = l ? 0 : -ENOMEM;
	if (!r) {
		*l = (struct listener){ s, fd };
		pthread_mutex_lock(&s->lock);
		s->listeners++;
		r = start_thread(listen_thread, l);
		if (r)
			s->listeners--;
		pthread_mutex_unlock(&s->lock);
	}
	if (!r)
		return 0;
	free(l);
	close(fd);
	return err_set_errno(err, r, "NBD server");
}

/* --- the end --- */

/* Lock held: what arrives is not read any more (SHUT_RD), or nothing goes out either. */
static void shut_clients(struct nbd_server *s, int how)
{
	for (struct nbd_client *c = s->list; c; c = c->next)
		shutdown(c->chan.fd, how);
}

static bool wait_idle(struct nbd_server *s, unsigned ms)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += ms / 1000;
	while (s->listeners) {
		if (!ms)
			pthread_cond_wait(&s->change, &s->lock);
		else if (pthread_cond_timedwait(&s->change, &s->lock, &ts))
			break;
	}
	return !s->listeners;
}


static void flush_export(struct nbd_ex *ex)
{
	int r = ex->dirty ? image_flush(ex->e.blk) : 0;
	if (r)
		log_error("%s: flush failed: %s", block_name(ex->e.blk), strerror(-r));
}

void nbd_server_free(struct nbd_server *s)
{
	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	s->stop = true;
	pthread_cond_broadcast(&s->change);
	if (write(s->wake[1], "", 1) < 0)
		log_warn("NBD server: %s", strerror(errno));
	shut_clients(s, SHUT_RD);
	if (!wait_idle(s, END_MS)) { /* somebody does not read the answers */
		shut_clients(s, SHUT_RDWR);
		wait_idle(s, 0);
	}
	pthread_mutex_unlock(&s->lock);
	for (unsigned i = 0; i < s->nex; i++) {
		flush_export(s->ex[i]);
		ex_free(s->ex[i]);
	}
	free(s->ex);
	close(s->wake[0]);
	close(s->wake[1]);
	pthread_mutex_destroy(&s->lock);
	pthread_cond_destroy(&s->change);
	free(s);
}
