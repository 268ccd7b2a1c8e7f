/*
 * `lodge kvm-run -- COMMAND...`: start a program with libsoftkvm-preload.so, whose /dev/kvm is softkvm. The dynamic
 * linker ignores what it cannot preload, so programs that it would not reach are refused here with the reason.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/options.h"

#define OBJECT "libsoftkvm-preload.so"
#define SCRIPT_LINE 256         /* what Linux reads of it */
#define SCRIPT_DEPTH 4          /* scripts that interpret scripts, as many as Linux follows */
#define CANNOT_RUN 126          /* as a shell has it */
#define NOT_FOUND 127
#define MAX_PROGRAM_HEADERS 256

static int complain(int status, const char *program, const char *why)
{
	fprintf(stderr, "lodge: kvm-run: %s: %s\n", program, why);
	return status;
}

/* Beside the program (a build folder), else where it is installed. */
static bool find_object(char *out, size_t size)
{
	char self[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);

	if (n > 0) {
		self[n] = 0;
		*strrchr(self, '/') = 0;
		if (snprintf(out, size, "%s/" OBJECT, self) < (int)size && !access(out, R_OK))
			return true;
		if (snprintf(out, size, "%s/../lib/lodge/" OBJECT, self) < (int)size && !access(out, R_OK))
			return true;
	}
	return snprintf(out, size, "%s/" OBJECT, LODGE_LIBDIR) < (int)size && !access(out, R_OK);
}

/* As execvp() looks for it. */
static bool find_program(const char *name, char *out, size_t size)
{
	const char *path = getenv("PATH");
	struct stat st;

	if (strchr(name, '/'))
		return snprintf(out, size, "%s", name) < (int)size && !access(out, F_OK);
	for (const char *p = path ? path : "/bin:/usr/bin"; *p; p += *p == ':') {
		size_t n = strcspn(p, ":");

		if (snprintf(out, size, "%.*s%s%s", (int)n, p, n ? "/" : "", name) < (int)size &&
		    !access(out, X_OK) && !stat(out, &st) && S_ISREG(st.st_mode))
			return true;
		p += n;
	}
	return false;
}

static bool has_interpreter(int fd, const Elf64_Ehdr *h)
{
	Elf64_Phdr p;

	for (unsigned i = 0; i < h->e_phnum && i < MAX_PROGRAM_HEADERS; i++)
		if (h->e_phentsize == sizeof p && pread(fd, &p, sizeof p, (off_t)(h->e_phoff + i * sizeof p)) == sizeof p &&
		    p.p_type == PT_INTERP)
			return true;
	return false;
}

/* The program named after a script's #!, in `path`; false: this is no script. */
static bool script_interpreter(int fd, char path[static SCRIPT_LINE])
{
	char line[SCRIPT_LINE];
	ssize_t n = pread(fd, line, sizeof line - 1, 0);
	size_t skip, len;

	if (n < 3 || line[0] != '#' || line[1] != '!')
		return false;
	line[n] = 0;
	skip = 2 + strspn(line + 2, " \t");
	len = strcspn(line + skip, " \t\n");
	memcpy(path, line + skip, len);
	path[len] = 0;
	return len > 0;
}

/* Why the preload object would not reach this program, or the one that interprets it; NULL: it will. */
static const char *unreachable(const char *path, unsigned depth)
{
	char interpreter[SCRIPT_LINE];
	const char *why = NULL;
	struct stat st;
	Elf64_Ehdr h;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return NULL;    /* executable but not readable: exec will tell */
	if (!fstat(fd, &st) && st.st_mode & (S_ISUID | S_ISGID) && geteuid())
		why = "runs with other rights (set-user-id); such programs load nothing from outside";
	else if (depth < SCRIPT_DEPTH && script_interpreter(fd, interpreter))
		why = unreachable(interpreter, depth + 1);
	else if (pread(fd, &h, sizeof h, 0) != sizeof h || memcmp(h.e_ident, ELFMAG, SELFMAG))
		why = NULL;
	else if (h.e_ident[EI_CLASS] != ELFCLASS64 || h.e_machine != EM_X86_64)
		why = "not an x86-64 program; the KVM stand-in is";
	else if (!has_interpreter(fd, &h))
		why = "statically linked; only dynamically linked programs can be given another /dev/kvm";
	close(fd);
	return why;
}

static int set_preload(const char *object)
{
	const char *old = getenv("LD_PRELOAD");
	char *all;
	int r;

	if (!old || !*old)
		return setenv("LD_PRELOAD", object, 1);
	if (strstr(old, object))
		return 0;
	if (asprintf(&all, "%s:%s", old, object) < 0)
		return -1;
	r = setenv("LD_PRELOAD", all, 1);
	free(all);
	return r;
}

int verb_kvm_run(int argc, char **argv)
{
	char object[PATH_MAX], program[PATH_MAX];
	const char *why;

	if (argc && (!strcmp(argv[0], "--help") || !strcmp(argv[0], "-h")))
		return puts("Usage: lodge kvm-run [--] COMMAND [ARGUMENT...]\n\nRun a program that uses KVM; its /dev/kvm is Lodge's own implementation,\n"
			    "whether the host has KVM or not. The program must be x86-64 and dynamically\nlinked. Its exit status is the result; 126: it "
			    "cannot be run so, 127: not found."), 0;
	if (argc && !strcmp(argv[0], "--"))
		argc--, argv++;
	else if (argc && argv[0][0] == '-')
		return complain(2, argv[0], "unknown option; usage: lodge kvm-run [--] COMMAND [ARGUMENT...]");
	if (!argc)
		return fputs("Usage: lodge kvm-run [--] COMMAND [ARGUMENT...]\n", stderr), 2;
	if (!find_object(object, sizeof object))
		return complain(CANNOT_RUN, OBJECT, "not found beside lodge nor in " LODGE_LIBDIR);
	if (strpbrk(object, " :"))
		return complain(CANNOT_RUN, object, "the dynamic linker takes no path with a space or a colon");
	if (!find_program(argv[0], program, sizeof program))
		return complain(NOT_FOUND, argv[0], "not found");
	why = unreachable(program, 0);
	if (why)
		return complain(CANNOT_RUN, program, why);
	if (set_preload(object))
		return complain(CANNOT_RUN, program, "out of memory");
	execv(program, argv);
	return complain(errno == ENOENT ? NOT_FOUND : CANNOT_RUN, program, strerror(errno));
}
