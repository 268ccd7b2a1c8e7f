/* 32-bit programs: i386_program.c, which is part of this one (embed.py), executed from memory. */
#include "bench/items/i386.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/items/items.h"
#include "i386_bytes.h"

static int program_fd(void)
{
	int fd = memfd_create("i386", MFD_CLOEXEC);

	if (fd < 0 || write(fd, i386_bytes, sizeof i386_bytes) != (ssize_t)sizeof i386_bytes)
		bench_die("no memory file");
	return fd;
}

/* 126: no 32-bit programs here. */
static void child(int program, int out, const char *name, const char *scale)
{
	char *argv[] = { "i386", (char *)(uintptr_t)name, (char *)(uintptr_t)scale, NULL };

	dup2(out, 1);
	fexecve(program, argv, environ);
	_exit(errno == ENOEXEC || errno == ENOSYS ? 126 : 127);
}

static uint64_t run(struct bench *b, const char *name)
{
	struct i386_result r;
	int fd = program_fd(), p[2], status;
	char scale[16];
	ssize_t n;
	pid_t pid;

	snprintf(scale, sizeof scale, "%u", b->scale);
	if (pipe(p) || (pid = fork()) < 0)
		bench_die("no pipe or process");
	if (!pid)
		child(fd, p[1], name, scale);
	close(p[1]);
	n = read(p[0], &r, sizeof r);
	if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status))
		bench_die("the 32-bit program died: %x", (unsigned)status);
	close(p[0]);
	close(fd);
	b->skipped = WEXITSTATUS(status) == 126 || WEXITSTATUS(status) == 3;
	if (b->skipped)
		return 0;
	if (WEXITSTATUS(status) || n != (ssize_t)sizeof r)
		bench_die("the 32-bit program failed: %d", WEXITSTATUS(status));
	b->begin = 0;           /* its own clock: without the start */
	b->end = (double)r.ns / 1e9;
	return r.hash;
}

#define ITEM(name) static uint64_t run_##name(struct bench *b) { return run(b, #name); }
ITEM(rounds) ITEM(sort) ITEM(calls) ITEM(bignum) ITEM(bytecode) ITEM(strings) ITEM(x87) ITEM(tls) ITEM(syscall)

const struct bench_item items_i386[] = {
	{ "i386", "rounds", run_rounds }, { "i386", "sort", run_sort }, { "i386", "calls", run_calls }, { "i386", "bignum", run_bignum },
	{ "i386", "bytecode", run_bytecode }, { "i386", "strings", run_strings }, { "i386", "x87", run_x87 }, { "i386", "tls", run_tls },
	{ "i386", "syscall", run_syscall },
	{ 0 },
};
