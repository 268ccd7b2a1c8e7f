/* What the filters let through and what they deny, each in a process of its own. */
#include "cli/sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { KILLED = 1000 };

/* Status of a child that enters the sandbox (0: only the process's, 1: a vCPU's too) and runs `fn`: its result, or KILLED by SIGSYS. */
static int in_sandbox(int vcpu, const struct sandbox_config *cfg, int (*fn)(void))
{
	struct sandbox_config c = { .on = true, .resources = true };
	int status;
	pid_t pid = fork();

	assert_true(pid >= 0);
	if (!pid) {
		struct sandbox *sb;
		struct err err;

		if (sandbox_enter(&sb, cfg ? cfg : &c, &err) || (vcpu && sandbox_enter_vcpu(sb)))
			_exit(200);
		_exit(fn());
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (WIFSIGNALED(status))
		return WTERMSIG(status) == SIGSYS ? KILLED : -WTERMSIG(status);
	return WEXITSTATUS(status);
}

static int error(long r) { return r < 0 ? errno : 0; }

static int do_open(void) { return error(open("/etc/passwd", O_RDONLY)); }
static int do_socket(void) { return error(socket(AF_INET, SOCK_STREAM, 0)); }
static int do_connect(void) { return error(connect(0, NULL, 0)); }
static int do_unlink(void) { return error(unlink("/tmp/lodge-sandbox-test-none")); }
static int do_kill(void) { return error(kill(getppid(), 0)); }
static int do_tgkill(void) { return error(syscall(SYS_tgkill, getpid(), gettid(), 0)); }
static int do_tgkill_other(void) { return error(syscall(SYS_tgkill, getppid(), getppid(), 0)); }
static int do_exec(void) { return error(execl("/bin/true", "true", NULL)); }
static int do_execveat(void) { char *v[] = { "true", NULL }; return error(syscall(SYS_execveat, AT_FDCWD, "/bin/true", v, v, 0)); }
static int do_ptrace(void) { return error(ptrace(PTRACE_TRACEME, 0, 0, 0)); }
static int do_setuid(void) { return error(syscall(SYS_setuid, getuid())); }
static int do_mount(void) { return error(mount("none", "/lodge-none", "tmpfs", 0, NULL)); }
static int do_bpf(void) { return error(syscall(SYS_bpf, 0, NULL, 0)); }
static int do_unshare(void) { return error(unshare(CLONE_FS)); }
static int do_vm_write(void) { return error(syscall(SYS_process_vm_writev, getppid(), NULL, 0, NULL, 0, 0)); }
static int do_priority(void) { return error(setpriority(PRIO_PROCESS, 0, 0)); }
static int do_terminal(void) { return error(ioctl(eventfd(0, 0), TIOCSTI, "x")); }
static int do_kvm_ioctl(void) { return error(ioctl(eventfd(0, 0), 0xae80, 0)); }
static int do_uselib(void) { return error(syscall(SYS_uselib, "/lodge-none")); }
static int do_clone3(void) { return error(syscall(SYS_clone3, NULL, 0)); }
static int do_x32(void) { return error(syscall(SYS_getpid | 0x40000000)); }

static int do_fork(void)
{
	pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);

	if (!pid)
		_exit(0);
	return error(pid);
}

static int map(int prot)
{
	return mmap(NULL, 4096, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? errno : 0;
}

static int do_map_rw(void) { return map(PROT_READ | PROT_WRITE); }
static int do_map_rx(void) { return map(PROT_READ | PROT_EXEC); }
static int do_map_wx(void) { return map(PROT_READ | PROT_WRITE | PROT_EXEC); }

static int do_protect_wx(void)
{
	void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return error(mprotect(p, 4096, PROT_READ | PROT_WRITE | PROT_EXEC));
}

static void *nothing(void *arg) { return arg; }

static int do_thread(void)
{
	pthread_t t;
	int r = pthread_create(&t, NULL, nothing, NULL);

	return r ? r : pthread_join(t, NULL);
}

/* What devices do on a vCPU's thread. */
static int do_work(void)
{
	char buf[64] = "x";
	int fd = memfd_create("t", MFD_CLOEXEC), ev = eventfd(0, EFD_NONBLOCK);
	uint64_t one = 1;

	if (fd < 0 || ev < 0 || ftruncate(fd, 8192) || pwrite(fd, buf, 64, 100) != 64 || pread(fd, buf, 64, 100) != 64 || fdatasync(fd))
		return errno;
	if (write(ev, &one, 8) != 8 || read(ev, &one, 8) != 8 || lseek(fd, 0, SEEK_END) != 8192)
		return errno;
	free(malloc(1 << 20));
	return do_thread();
}


static void vcpu_allows(void **state)
{
	assert_int_equal(in_sandbox(1, NULL, do_work), 0);
	assert_int_equal(in_sandbox(1, NULL, do_map_rw), 0);
	assert_int_equal(in_sandbox(1, NULL, do_map_rx), 0);
	assert_int_equal(in_sandbox(1, NULL, do_tgkill), 0);
	assert_int_not_equal(in_sandbox(1, NULL, do_kvm_ioctl), EPERM);
}

static void vcpu_denies(void **state)
{
	assert_int_equal(in_sandbox(1, NULL, do_open), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_socket), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_connect), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_unlink), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_kill), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_tgkill_other), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_terminal), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_map_wx), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_protect_wx), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_fork), EPERM);
	assert_int_equal(in_sandbox(1, NULL, do_clone3), ENOSYS);
}

static void vcpu_dies(void **state)
{
	int (*const fns[])(void) = { do_exec, do_execveat, do_ptrace, do_vm_write, do_mount, do_bpf, do_unshare, do_setuid, do_x32 };

	for (size_t i = 0; i < sizeof fns / sizeof fns[0]; i++)
		assert_int_equal(in_sandbox(1, NULL, fns[i]), KILLED);
}

static void process_filter(void **state)
{
	assert_int_equal(in_sandbox(0, NULL, do_open), 0);
	assert_int_equal(in_sandbox(0, NULL, do_socket), 0);
	assert_int_equal(in_sandbox(0, NULL, do_thread), 0);
	assert_int_equal(in_sandbox(0, NULL, do_work), 0);
	assert_int_equal(in_sandbox(0, NULL, do_priority), 0);
	assert_int_equal(in_sandbox(0, NULL, do_exec), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_fork), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_ptrace), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_mount), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_setuid), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_uselib), EPERM);
	assert_int_equal(in_sandbox(0, NULL, do_map_wx), EPERM);
}

/* Each of QEMU's groups can be allowed, and resourcecontrol denied. */
static void groups(void **state)
{
	struct sandbox_config all = { true, true, true, true, true }, none = { .on = true };

	assert_int_equal(in_sandbox(0, &all, do_exec), 0);
	assert_int_equal(in_sandbox(0, &all, do_fork), 0);
	assert_int_equal(in_sandbox(0, &all, do_setuid), 0);
	assert_int_not_equal(in_sandbox(0, &all, do_uselib), EPERM);
	assert_int_equal(in_sandbox(0, &all, do_mount), EPERM);
	assert_int_equal(in_sandbox(0, &none, do_priority), EPERM);
	assert_int_equal(in_sandbox(1, &all, do_exec), KILLED);
}

static int other_thread_result;
static int go[2];

static void *waits(void *arg)
{
	char c;

	if (read(go[0], &c, 1) != 1)
		return NULL;
	other_thread_result = error(syscall(SYS_execve, "/lodge-none", NULL, NULL));
	return NULL;
}

/* Threads that exist already are filtered too. */
static int do_other_threads(void)
{
	return other_thread_result;
}

static void threads_too(void **state)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		struct sandbox_config c = { .on = true };
		struct sandbox *sb;
		struct err err;
		pthread_t t;

		if (pipe(go) || pthread_create(&t, NULL, waits, NULL) || sandbox_enter(&sb, &c, &err))
			_exit(200);
		if (write(go[1], "x", 1) != 1 || pthread_join(t, NULL))
			_exit(201);
		_exit(do_other_threads());
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), EPERM);
	assert_int_equal(do_open(), 0);  /* nothing of all this touched this process */
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(vcpu_allows), cmocka_unit_test(vcpu_denies), cmocka_unit_test(vcpu_dies), cmocka_unit_test(process_filter),
		cmocka_unit_test(groups), cmocka_unit_test(threads_too),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
