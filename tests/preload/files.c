/* Descriptors: every way to open, duplicate, pass, inherit and close them. */
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client.h"

extern char **environ;

static void version(int fd)
{
	CHECK(fd >= 0);
	CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
}

static void opening(void)
{
	int dir = open("/dev", O_RDONLY | O_DIRECTORY), fd;
	struct stat st;
	FILE *f;

	version(fd = open("/dev/kvm", O_RDWR));
	CHECK(!(fcntl(fd, F_GETFD) & FD_CLOEXEC));
	close(fd);
	version(fd = open("//dev/./kvm", O_RDWR | O_CLOEXEC));
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	close(fd);
	version(fd = openat(AT_FDCWD, "/dev/kvm", O_RDWR));
	close(fd);
	version(fd = openat(dir, "kvm", O_RDWR));
	close(fd);
	version(fd = (int)syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR));
	CHECK(syscall(SYS_ioctl, fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	CHECK(syscall(SYS_close, fd) == 0);
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), EBADF);
	CHECK((f = fopen("/dev/kvm", "r+")));
	version(fileno(f));
	fclose(f);
	FAILS(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
	CHECK(stat("/dev/kvm", &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 232));
	CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
	CHECK(syscall(SYS_access, "/dev/kvm", R_OK | W_OK) == 0);
	CHECK(syscall(SYS_faccessat2, dir, "kvm", R_OK, 0) == 0);
	CHECK(syscall(SYS_newfstatat, AT_FDCWD, "/dev/kvm", &st, 0) == 0 && st.st_rdev == makedev(10, 232));
	CHECK((fd = open("/dev/null", O_RDWR)) >= 0);
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), ENOTTY);
	close(fd);
	close(dir);
}

/* What is no ioctl answers as KVM's files do. */
static void other_calls(struct client *c)
{
	struct pollfd p = { .fd = c->vcpu, .events = POLLIN | POLLOUT };
	struct epoll_event e = { .events = EPOLLIN };
	int ep = epoll_create1(0);
	char b[8] = { 0 };
	struct stat st;

	FAILS(read(c->sys, b, 1), EINVAL);
	FAILS(write(c->vm, b, 1), EINVAL);
	FAILS(syscall(SYS_read, c->vcpu, b, 1), EINVAL);
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, c->vm, 0) == MAP_FAILED && errno == ENODEV);
	CHECK(poll(&p, 1, 0) == 1 && p.revents == (POLLIN | POLLOUT));
	FAILS(epoll_ctl(ep, EPOLL_CTL_ADD, c->vm, &e), EPERM);
	FAILS(preadv(c->sys, &(struct iovec){ b, 1 }, 1, 0), EINVAL);
	CHECK(fstat(c->sys, &st) == 0 && S_ISCHR(st.st_mode));
	/* Anonymous inodes are of no type: who maps a vCPU shall not hold the length against the size of a file. */
	CHECK(fstat(c->vcpu, &st) == 0 && !(st.st_mode & S_IFMT) && st.st_size == 0);
	CHECK(syscall(SYS_fstat, c->vm, &st) == 0 && !(st.st_mode & S_IFMT));
	CHECK(fstatat(c->vm, "", &st, AT_EMPTY_PATH) == 0 && !(st.st_mode & S_IFMT));
	CHECK(ioctl(c->vm, FIOCLEX) == 0);
	FAILS(ioctl(c->sys, 0x1234, 0), ENOTTY);
	FAILS(ioctl(c->vcpu, 0x1234, 0), EINVAL);
	close(ep);
}

/* Where the host has a KVM, a link to it leads to softkvm all the same. */
static void linked(void)
{
	char dir[] = "/tmp/preload-XXXXXX", link[64];
	int fd;

	CHECK(mkdtemp(dir));
	snprintf(link, sizeof link, "%s/kvm", dir);
	CHECK(symlink("/dev/kvm", link) == 0);
	fd = open(link, O_RDWR);
	unlink(link);
	rmdir(dir);
	if (fd < 0) {
		CHECK(errno == ENOENT || errno == EACCES);
		return;
	}
	version(fd);
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	char target[64] = { 0 };
	CHECK(readlink(link, target, sizeof target - 1) > 0 && strstr(target, "softkvm"));
	close(fd);
}

/* A place asked for is taken, but not from another mapping. */
static void placed(struct client *c)
{
	char *room = mmap(NULL, 3 * c->run_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_run *again;

	CHECK(room != MAP_FAILED);
	CHECK(mmap(room, c->run_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, c->vcpu, 0) == MAP_FAILED && errno == EEXIST);
	munmap(room, c->run_size);
	again = mmap(room, c->run_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, c->vcpu, 0);
	CHECK((char *)again == room);
	c->run->exit_reason = 77;
	CHECK(again->exit_reason == 77);
	munmap(room, 3 * c->run_size);
}

static void duplicates(struct client *c)
{
	int a = dup(c->vm), b = fcntl(c->vm, F_DUPFD_CLOEXEC, 200), p[2], v;

	CHECK(a >= 0 && b >= 200 && pipe(p) == 0);
	CHECK(dup2(c->vm, p[0]) == p[0]);
	CHECK(dup3(c->vm, p[1], O_CLOEXEC) == p[1]);
	for (int i = 0; i < 4; i++)
		CHECK(ioctl((int[]){ a, b, p[0], p[1] }[i], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	close(a);
	FAILS(ioctl(a, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EBADF);
	CHECK((v = open("/dev/null", O_RDWR)) >= 0);
	CHECK(dup2(v, b) == b);
	FAILS(ioctl(b, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), ENOTTY);
	CHECK(write(b, "x", 1) == 1);
	close(v);
	close(b);
	close(p[0]);
	CHECK(close_range((unsigned)p[1], (unsigned)p[1], 0) == 0);
	FAILS(ioctl(p[1], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EBADF);
	CHECK(ioctl(c->vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
}

static void run_hlt(struct client *c)
{
	client_rip(c, 0, 0);
	CHECK(ioctl(c->vcpu, KVM_RUN, 0) == 0);
	CHECK(c->run->exit_reason == KVM_EXIT_HLT);
}

/* A child's VM descriptors are dead, /dev/kvm works; the parent notices nothing. */
static void forks(struct client *c)
{
	struct client own;
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		FAILS(ioctl(c->vcpu, KVM_RUN, 0), EIO);
		FAILS(ioctl(c->vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EIO);
		close(c->vcpu);
		close(c->vm);
		version(c->sys);
		client_start(&own, code_hlt, 1);
		run_hlt(&own);
		client_stop(&own);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	run_hlt(c);
	pid = vfork();
	if (!pid) {
		close(c->vm);
		close_range(3, ~0u, 0);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	run_hlt(c);
}

/* /dev/kvm itself may be inherited and passed. */
static void passed(const char *self)
{
	int fd = open("/dev/kvm", O_RDWR), s[2], status, got;
	char number[16], c = 0, ctl[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec v = { &c, 1 };
	struct msghdr m = { .msg_iov = &v, .msg_iovlen = 1, .msg_control = ctl, .msg_controllen = sizeof ctl };
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	pid_t pid;

	snprintf(number, sizeof number, "%d", fd);
	CHECK(posix_spawn(&pid, self, NULL, NULL, (char *[]){ (char *)self, number, NULL }, environ) == 0);
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, s) == 0);
	h->cmsg_level = SOL_SOCKET;
	h->cmsg_type = SCM_RIGHTS;
	h->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(h), &fd, sizeof fd);
	CHECK(sendmsg(s[0], &m, 0) == 1);
	CHECK(recvmsg(s[1], &m, 0) == 1);
	memcpy(&got, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof got);
	version(got);
	close(got);
	close(s[0]);
	close(s[1]);
	close(fd);
}

/* Closing everything above the program's own does not reach softkvm's inner descriptors. */
static void close_all_above(struct client *c)
{
	uint64_t irqchip_works = 0;
	struct kvm_signal_mask *m = calloc(1, sizeof *m + 8);

	m->len = 8;
	memcpy(m->sigset, &irqchip_works, 8);
	CHECK(ioctl(c->vcpu, KVM_SET_SIGNAL_MASK, m) == 0);
	CHECK(close_range(300, ~0u, 0) == 0);
	CHECK(ioctl(c->vcpu, KVM_SET_SIGNAL_MASK, m) == 0);
	CHECK(ioctl(c->vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
	run_hlt(c);
	free(m);
}

/* The same for the eventfds that softkvm keeps copies of: interrupts still arrive. */
static void irqfd_outlives_close_range(void)
{
	struct client c;
	struct kvm_irqchip pic = { .chip_id = KVM_IRQCHIP_PIC_MASTER };
	struct kvm_irqfd irq = { .gsi = 5 };
	int e;

	client_start(&c, code_hlt, 1);
	close(c.vcpu);
	CHECK(munmap(c.run, c.run_size) == 0);
	close(c.vm);
	CHECK((c.vm = ioctl(c.sys, KVM_CREATE_VM, 0)) >= 0);
	client_vcpu(&c, true);
	CHECK((e = eventfd(0, EFD_CLOEXEC)) > c.vcpu);
	irq.fd = (uint32_t)e;
	CHECK(ioctl(c.vm, KVM_IRQFD, &irq) == 0);
	CHECK(close_range((unsigned)e + 1, ~0u, 0) == 0);
	CHECK(eventfd_write(e, 1) == 0);
	for (int i = 0; i < 10000 && !(pic.chip.pic.irr & 0x20); i++) {
		CHECK(ioctl(c.vm, KVM_GET_IRQCHIP, &pic) == 0);
		usleep(1000);
	}
	CHECK(pic.chip.pic.irr & 0x20);
	close(e);
	client_stop(&c);
}

int main(int argc, char **argv)
{
	struct client c;

	if (argc > 1) {
		version(atoi(argv[1]));
		return 0;
	}
	opening();
	client_start(&c, code_hlt, 1);
	run_hlt(&c);
	other_calls(&c);
	linked();
	placed(&c);
	duplicates(&c);
	forks(&c);
	passed(argv[0]);
	close_all_above(&c);
	client_stop(&c);
	irqfd_outlives_close_range();
	return 0;
}
