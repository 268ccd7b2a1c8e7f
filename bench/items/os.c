/* What the kernel does for programs: calls, faults, processes, switches, signals. */
#include "bench/items/items.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t run_syscall(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 500000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++)
		sum += syscall(SYS_getppid) > 0;
	return sum;
}

static uint64_t run_fault(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 18);
	size_t size = 8u << 20;
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		volatile uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p == MAP_FAILED)
			bench_die("mmap: %s", strerror(errno));
		madvise((void *)p, size, MADV_NOHUGEPAGE);
		for (size_t i = 0; i < size; i += 4096)
			p[i] = 1;
		sum += p[size - 4096];
		munmap((void *)p, size);
	}
	return sum;
}

static uint64_t run_mmap(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 12000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		uint8_t *p = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (p == MAP_FAILED)
			bench_die("mmap: %s", strerror(errno));
		p[r % 65536] = 1;
		sum += p[(r + 1) % 65536];
		munmap(p, 65536);
	}
	return sum;
}

static uint64_t wait_for(pid_t pid)
{
	int status;

	if (pid < 0)
		bench_die("fork: %s", strerror(errno));
	if (waitpid(pid, &status, 0) != pid)
		bench_die("waitpid: %s", strerror(errno));
	return WIFEXITED(status) ? (uint64_t)WEXITSTATUS(status) : 999;
}

static uint64_t run_fork(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 400);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		pid_t pid = fork();

		if (!pid)
			_exit((int)(r & 127));
		sum += wait_for(pid);
	}
	return sum;
}

static uint64_t run_exec(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 100);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		pid_t pid = fork();

		if (!pid) {
			char *argv[] = { "bench-items", "none", NULL };
			int null = open("/dev/null", O_WRONLY);

			dup2(null, 1);
			execv("/proc/self/exe", argv);
			_exit(100);
		}
		sum += 1 + wait_for(pid);
	}
	return sum;
}

static uint64_t run_pipe_switch(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 12000);
	int to[2], from[2];
	uint32_t v = 0;
	pid_t pid;

	if (pipe(to) || pipe(from))
		bench_die("pipe: %s", strerror(errno));
	pid = fork();
	if (!pid) {
		close(to[1]);
		while (read(to[0], &v, 4) == 4) {
			v++;
			if (write(from[1], &v, 4) != 4)
				_exit(1);
		}
		_exit(0);
	}
	for (unsigned r = 0; r < rounds; r++)
		if (write(to[1], &v, 4) != 4 || read(from[0], &v, 4) != 4)
			bench_die("pipe: short");
	close(to[1]);
	return v + wait_for(pid);
}

static uint64_t run_pipe_bytes(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 4000);
	static uint8_t buf[65536];
	uint64_t sum = 0;
	int p[2];

	if (pipe(p))
		bench_die("pipe: %s", strerror(errno));
	for (unsigned r = 0; r < rounds; r++) {
		memset(buf, (int)r, 64);
		for (ssize_t done = 0, n; done < 65536; done += n)
			if ((n = write(p[1], buf + done, 65536 - (size_t)done)) <= 0)
				bench_die("write: %s", strerror(errno));
		for (ssize_t done = 0, n; done < 65536; done += n)
			if ((n = read(p[0], buf + done, 65536 - (size_t)done)) <= 0)
				bench_die("read: %s", strerror(errno));
		sum += buf[5];
	}
	return sum;
}

static volatile sig_atomic_t hits;

static void on_signal(int sig)
{
	hits++;
}

static uint64_t run_signal(struct bench *b)
{
	struct sigaction sa = { .sa_handler = on_signal };
	unsigned rounds = bench_rounds(b, 50000);
	pid_t pid = getpid();

	sigaction(SIGUSR1, &sa, NULL);
	for (unsigned r = 0; r < rounds; r++)
		kill(pid, SIGUSR1);
	return (uint64_t)hits;
}

static uint8_t *guarded;

static void on_fault(int sig)
{
	hits++;
	mprotect(guarded, 4096, PROT_READ | PROT_WRITE);
}

static uint64_t run_segv(struct bench *b)
{
	struct sigaction sa = { .sa_handler = on_fault };
	unsigned rounds = bench_rounds(b, 15000);

	guarded = bench_alloc(4096);
	sigaction(SIGSEGV, &sa, NULL);
	for (unsigned r = 0; r < rounds; r++) {
		mprotect(guarded, 4096, PROT_READ);
		*(volatile uint8_t *)guarded = (uint8_t)r;
	}
	return (uint64_t)hits;
}

static _Atomic uint32_t turn;

static void futex_wait(uint32_t while_is)
{
	syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, while_is, NULL, NULL, 0);
}

static void futex_wake(void)
{
	syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void *other_side(void *arg)
{
	unsigned rounds = *(unsigned *)arg;

	for (unsigned r = 0; r < rounds; r++) {
		while (atomic_load(&turn) != 1)
			futex_wait(0);
		atomic_store(&turn, 0);
		futex_wake();
	}
	return NULL;
}

static uint64_t run_futex(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 20000);
	pthread_t t;

	if (pthread_create(&t, NULL, other_side, &rounds))
		bench_die("no thread");
	for (unsigned r = 0; r < rounds; r++) {
		atomic_store(&turn, 1);
		futex_wake();
		while (atomic_load(&turn) != 0)
			futex_wait(1);
	}
	pthread_join(t, NULL);
	return rounds;
}

static void *nothing(void *arg)
{
	return arg;
}

static uint64_t run_threads(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 1500);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		pthread_t t;
		void *got;

		if (pthread_create(&t, NULL, nothing, (void *)(uintptr_t)r))
			bench_die("no thread");
		pthread_join(t, &got);
		sum += (uintptr_t)got;
	}
	return sum;
}

static uint64_t run_file(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 40000);
	int fd = memfd_create("bench", 0);
	uint8_t buf[512] = { 0 };
	uint64_t sum = 0;

	if (fd < 0 || ftruncate(fd, 1 << 20))
		bench_die("memfd: %s", strerror(errno));
	for (unsigned r = 0; r < rounds; r++) {
		off_t at = (off_t)(r * 512u % (1 << 20));

		buf[r % 512]++;
		if (pwrite(fd, buf, 512, at) != 512 || pread(fd, buf, 512, (at + 4096) % (1 << 20)) != 512)
			bench_die("file: %s", strerror(errno));
		sum += buf[r % 512];
	}
	return sum;
}

static uint64_t run_stat(struct bench *b)
{
	unsigned rounds = bench_rounds(b, 20000);
	uint64_t sum = 0;

	for (unsigned r = 0; r < rounds; r++) {
		struct stat st;
		int fd = open("/proc/self", O_RDONLY | O_DIRECTORY);

		sum += fstat(fd, &st) == 0 && S_ISDIR(st.st_mode);
		close(fd);
		sum += stat("/dev/null", &st) == 0;
	}
	return sum;
}

const struct bench_item items_os[] = {
	{ "os", "syscall", run_syscall },
	{ "os", "page-fault", run_fault },
	{ "os", "mmap-munmap", run_mmap },
	{ "os", "fork", run_fork },
	{ "os", "fork-exec", run_exec },
	{ "os", "pipe-switch", run_pipe_switch },
	{ "os", "pipe-bytes", run_pipe_bytes },
	{ "os", "signal", run_signal },
	{ "os", "segv-mprotect", run_segv },
	{ "os", "futex-switch", run_futex },
	{ "os", "threads", run_threads },
	{ "os", "file-io", run_file },
	{ "os", "open-stat", run_stat },
	{ 0 },
};
