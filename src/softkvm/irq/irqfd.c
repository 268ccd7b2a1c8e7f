/*
 * irqfd: eventfds that raise a GSI, optionally resampled. One thread per VM waits for all of them.
 *
 * The client may close its descriptor after KVM_IRQFD, so duplicates are kept; a later deassignment is matched by
 * the eventfd's identity in /proc (by number where that cannot be read).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "softkvm/irq/internal.h"

/* False with *err when `fd` is no eventfd. *ident 0: an eventfd whose identity is not known. */
bool eventfd_identify(int fd, uint64_t *ident, int *err)
{
	char path[40], line[128];
	bool is = false;
	FILE *f;

	*ident = 0;
	*err = -EBADF;
	if (fcntl(fd, F_GETFD) < 0)
		return false;
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	f = fopen(path, "re");
	if (!f)
		return true;
	while (fgets(line, sizeof line, f)) {
		if (!strncmp(line, "eventfd-count:", 14))
			is = true;
		else if (!strncmp(line, "eventfd-id:", 11))
			*ident = strtoull(line + 11, NULL, 10) + 1;
	}
	fclose(f);
	*err = -EINVAL;
	return is;
}

/* A counter so full that a blocking eventfd would make us wait takes 2^64 signals that nobody read. */
void eventfd_signal(int fd)
{
	uint64_t one = 1;
	ssize_t n = write(fd, &one, sizeof one);

	(void)n;        /* EAGAIN: full, and so already signalled */
}

void irqfd_acked(struct irqchip *ic, uint32_t gsi)
{
	bool lowered = false;

	for (unsigned i = 0; i < ic->nfds; i++) {
		struct irqfd *f = &ic->fds[i];

		if (!f->used || f->resample < 0 || f->gsi != gsi)
			continue;
		if (!lowered)
			irqchip_set_gsi(ic, gsi, 0, SRC_RESAMPLE);
		lowered = true;
		eventfd_signal(f->resample);
	}
}

static void irqfd_fire(struct irqchip *ic, struct irqfd *f)
{
	uint64_t n;
	struct pollfd p = { .fd = f->fd, .events = POLLIN };

	if (poll(&p, 1, 0) != 1 || read(f->fd, &n, sizeof n) != sizeof n)
		return;
	if (f->resample >= 0) {
		irqchip_set_gsi(ic, f->gsi, 1, SRC_RESAMPLE);
		return;
	}
	irqchip_set_gsi(ic, f->gsi, 1, SRC_USER);
	irqchip_set_gsi(ic, f->gsi, 0, SRC_USER);
}

static void *irqfd_thread(void *arg)
{
	struct irqchip *ic = arg;
	struct epoll_event ev[64];

	for (;;) {
		int n = epoll_wait(ic->epoll, ev, ARRAY_SIZE(ev), -1);

		irqchip_lock(ic);
		for (int i = 0; i < n; i++) {
			uint32_t slot = ev[i].data.u64, gen = ev[i].data.u64 >> 32;

			if (slot == UINT32_MAX) {
				irqchip_unlock(ic);
				return NULL;
			}
			if (slot < ic->nfds && ic->fds[slot].used && ic->fds[slot].gen == gen)
				irqfd_fire(ic, &ic->fds[slot]);
		}
		irqchip_unlock(ic);
	}
}

static int thread_start(struct irqchip *ic)
{
	struct epoll_event ev = { .events = EPOLLIN, .data.u64 = UINT32_MAX };

	if (ic->fd_thread_up)
		return 0;
	if (ic->epoll < 0)
		ic->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (ic->stop_fd < 0)
		ic->stop_fd = eventfd(0, EFD_CLOEXEC);
	if (ic->epoll < 0 || ic->stop_fd < 0)
		return -errno;
	if (epoll_ctl(ic->epoll, EPOLL_CTL_ADD, ic->stop_fd, &ev) && errno != EEXIST)
		return -errno;
	if (pthread_create(&ic->fd_thread, NULL, irqfd_thread, ic))
		return -EAGAIN;
	ic->fd_thread_up = true;
	return 0;
}

static struct irqfd *slot_get(struct irqchip *ic)
{
	struct irqfd *f;
	unsigned n;

	for (unsigned i = 0; i < ic->nfds; i++)
		if (!ic->fds[i].used)
			return &ic->fds[i];
	n = ic->nfds ? ic->nfds * 2 : 16;
	f = realloc(ic->fds, n * sizeof *f);
	if (!f)
		return NULL;
	memset(f + ic->nfds, 0, (n - ic->nfds) * sizeof *f);
	ic->fds = f;
	f += ic->nfds;
	ic->nfds = n;
	return f;
}

static bool same_eventfd(const struct irqfd *f, int fd, uint64_t ident)
{
	return ident && f->ident ? f->ident == ident : f->client_fd == fd;
}

static void slot_free(struct irqchip *ic, struct irqfd *f)
{
	bool others = false;

	epoll_ctl(ic->epoll, EPOLL_CTL_DEL, f->fd, NULL);
	close(f->fd);
	f->used = false;
	if (f->resample < 0)
		return;
	close(f->resample);
	f->resample = -1;
	ic->nresample--;
	for (unsigned i = 0; i < ic->nfds; i++)
		others |= ic->fds[i].used && ic->fds[i].resample >= 0 && ic->fds[i].gsi == f->gsi;
	if (!others)
		irqchip_set_gsi(ic, f->gsi, 0, SRC_RESAMPLE);
}

static int irqfd_deassign(struct irqchip *ic, const struct kvm_irqfd *a, uint64_t ident)
{
	irqchip_lock(ic);
	for (unsigned i = 0; i < ic->nfds; i++) {
		struct irqfd *f = &ic->fds[i];

		if (f->used && f->gsi == a->gsi && same_eventfd(f, a->fd, ident))
			slot_free(ic, f);
	}
	irqchip_update_eoi_map(ic);
	irqchip_unlock(ic);
	return 0;
}

static int irqfd_add(struct irqchip *ic, const struct kvm_irqfd *a, uint64_t ident, int fd, int resample)
{
	struct epoll_event ev = { .events = EPOLLIN };
	struct irqfd *f;
	int r;

	for (unsigned i = 0; i < ic->nfds; i++)
		if (ic->fds[i].used && same_eventfd(&ic->fds[i], a->fd, ident))
			return -EBUSY;
	r = thread_start(ic);
	if (r)
		return r;
	f = slot_get(ic);
	if (!f)
		return -ENOMEM;
	*f = (struct irqfd){ .used = true, .gen = ++ic->gen, .fd = fd, .resample = resample, .client_fd = a->fd,
			     .ident = ident, .gsi = a->gsi };
	ev.data.u64 = (uint64_t)f->gen << 32 | (uint32_t)(f - ic->fds);
	if (epoll_ctl(ic->epoll, EPOLL_CTL_ADD, fd, &ev)) {
		f->used = false;
		return -errno;
	}
	ic->nresample += resample >= 0;
	irqchip_update_eoi_map(ic);
	return 0;
}

static int irqfd_assign(struct irqchip *ic, const struct kvm_irqfd *a, uint64_t ident)
{
	int fd, resample = -1, r;
	uint64_t id;

	if (a->flags & KVM_IRQFD_FLAG_RESAMPLE) {
		if (ic->split)
			return -EINVAL;
		if (!eventfd_identify(a->resamplefd, &id, &r))
			return r;
		resample = fcntl(a->resamplefd, F_DUPFD_CLOEXEC, 0);
		if (resample < 0)
			return -errno;
	}
	fd = fcntl(a->fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0) {
		r = -errno;
	} else {
		irqchip_lock(ic);
		r = irqfd_add(ic, a, ident, fd, resample);
		irqchip_unlock(ic);
	}
	if (r) {
		if (fd >= 0)
			close(fd);
		if (resample >= 0)
			close(resample);
	}
	return r;
}

int irqchip_irqfd(struct vm *vm, const struct kvm_irqfd *a)
{
	struct irqchip *ic = vm->irqchip;
	uint64_t ident;
	int err;

	if (!ic || (a->flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE)))
		return -EINVAL;
	if (!eventfd_identify(a->fd, &ident, &err))
		return err;
	return a->flags & KVM_IRQFD_FLAG_DEASSIGN ? irqfd_deassign(ic, a, ident) : irqfd_assign(ic, a, ident);
}

void irqfd_stop(struct irqchip *ic)
{
	if (ic->fd_thread_up) {
		eventfd_signal(ic->stop_fd);
		pthread_join(ic->fd_thread, NULL);
		ic->fd_thread_up = false;
	}
	irqchip_lock(ic);
	for (unsigned i = 0; i < ic->nfds; i++)
		if (ic->fds[i].used)
			slot_free(ic, &ic->fds[i]);
	free(ic->fds);
	ic->fds = NULL;
	ic->nfds = 0;
	irqchip_unlock(ic);
	if (ic->epoll >= 0)
		close(ic->epoll);
	if (ic->stop_fd >= 0)
		close(ic->stop_fd);
}
