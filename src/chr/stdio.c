/*
 * Standard input and output. A terminal is put into raw mode and restored at the end, also while the
 * process is stopped (SIGTSTP, SIGCONT). The terminal belongs to the process, so what is needed to
 * restore it is the one thing in this folder that is kept per process.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "chr/internal.h"

static struct {
	bool in_use;            /* a chardev has it */
	volatile sig_atomic_t raw_on;
	struct termios saved, raw;
	struct sigaction old_tstp, old_cont;
} term;

static void restore(void)
{
	if (term.raw_on)
		tcsetattr(0, TCSANOW, &term.saved);
}

static void on_stop(int sig)
{
	int e = errno;
	restore();
	kill(getpid(), SIGSTOP);
	if (term.raw_on)
		tcsetattr(0, TCSANOW, &term.raw);
	errno = e;
}

static void on_cont(int sig)
{
	int e = errno;
	if (term.raw_on)
		tcsetattr(0, TCSANOW, &term.raw);
	errno = e;
}

static void enter_raw(bool signals)
{
	static bool at_exit;
	struct sigaction stop = { .sa_handler = on_stop, .sa_flags = SA_RESTART }, cont = { .sa_handler = on_cont, .sa_flags = SA_RESTART };
	if (tcgetattr(0, &term.saved))
		return;
	term.raw = term.saved;
	term.raw.c_iflag &= ~(tcflag_t)(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
	term.raw.c_oflag |= OPOST;
	term.raw.c_lflag &= ~(tcflag_t)(ECHO | ECHONL | ICANON | IEXTEN);
	if (!signals)
		term.raw.c_lflag &= ~(tcflag_t)ISIG;
	term.raw.c_cflag = (term.raw.c_cflag & ~(tcflag_t)(CSIZE | PARENB)) | CS8;
	term.raw.c_cc[VMIN] = 1;
	term.raw.c_cc[VTIME] = 0;
	sigaction(SIGTSTP, &stop, &term.old_tstp);
	sigaction(SIGCONT, &cont, &term.old_cont);
	term.raw_on = 1;
	if (!at_exit)
		atexit(restore);
	at_exit = true;
	tcsetattr(0, TCSANOW, &term.raw);
}

/*
 * A description of our own, so that O_NONBLOCK does not leak into the shell that shares ours. -1 when
 * it cannot be had; poll() before each short write then comes close.
 */
static int reopen_output(void)
{
	struct stat st;
	if (fstat(1, &st) || !(S_ISFIFO(st.st_mode) || isatty(1)))
		return -1;
	return open("/proc/self/fd/1", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

static int stdio_open(struct chardev *c, struct optlist *o, struct err *err)
{
	bool signals = true;
	int r = optlist_bool(o, "signal", &signals, err);
	if (r)
		return r;
	if (__atomic_exchange_n(&term.in_use, true, __ATOMIC_ACQ_REL))
		return err_set(err, -EBUSY, "-chardev stdio: standard input and output are in use already; share them with mux=on");
	signal(SIGPIPE, SIG_IGN);
	c->is_tty = isatty(0);
	if (c->is_tty)
		enter_raw(signals);
	/* Descriptors of our own, so that closing is the same for every kind. */
	int in = fcntl(0, F_DUPFD_CLOEXEC, 3), out = reopen_output();
	if (out < 0) {
		out = fcntl(1, F_DUPFD_CLOEXEC, 3);
		c->poll_first = true;
	}
	c->own_fds = true;
	return chr_connect(c, in, out, err); /* a closed one is simply not there */
}

static void stdio_close(struct chardev *c)
{
	if (!c->own_fds)
		return; /* the other one has it */
	if (term.raw_on) {
		restore();
		term.raw_on = 0;
		sigaction(SIGTSTP, &term.old_tstp, NULL);
		sigaction(SIGCONT, &term.old_cont, NULL);
	}
	__atomic_store_n(&term.in_use, false, __ATOMIC_RELEASE);
}

const struct chr_kind chr_stdio = {
	.name = "stdio", .options = (const char *const[]){ "id", "mux", "signal", NULL }, .open = stdio_open, .close = stdio_close,
};
