/*
 * Debian's programs, started from here with inputs that are made here: their output is read
 * through a pipe and hashed. They are found in the file system below `/`: bench/suite calls this program inside a chroot.
 */
#include "bench/items/items.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void put_file(const char *path, const void *data, size_t n)
{
	FILE *f = fopen(path, "w");

	if (!f || fwrite(data, 1, n, f) != n || fclose(f))
		bench_die("%s: %s", path, strerror(errno));
}

/* `n` bytes of words and numbers with a natural kind of repetition, in lines. */
static char *make_text(struct bench *b, size_t n)
{
	static const char *const word[] = { "the", "guest", "page", "of", "memory", "interrupt", "is", "translated", "when", "cache", "a", "line",
		"block", "queue", "and", "status", "error", "0x7fff", "device", "clock" };
	char *s = bench_alloc(n + 64);
	size_t at = 0;

	while (at < n) {
		uint64_t v = bench_random(b);

		if (v % 11 == 0)
			at += (size_t)sprintf(s + at, "%u", (unsigned)(v >> 40));
		else
			at += (size_t)sprintf(s + at, "%s", word[(v >> 8) % 20 * ((v >> 16) % 20) / 20]);
		s[at++] = v % 13 == 0 ? '\n' : ' ';
	}
	s[n - 1] = '\n';
	return s;
}

/* Runs a command, its output hashed into the result. */
static uint64_t command(char *const argv[])
{
	static uint8_t buf[65536];
	uint64_t h = 0;
	int p[2], status;
	ssize_t n;
	pid_t pid;

	if (pipe(p) || (pid = fork()) < 0)
		bench_die("%s: %s", argv[0], strerror(errno));
	if (!pid) {
		int null = open("/dev/null", O_RDONLY);

		dup2(null, 0);
		dup2(p[1], 1);
		close(p[0]);
		close(p[1]);
		setenv("PATH", "/usr/bin:/bin", 1);
		setenv("LC_ALL", "C", 1);
		setenv("PYTHONHASHSEED", "0", 1);
		setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
		execvp(argv[0], argv);
		_exit(127);
	}
	close(p[1]);
	while ((n = read(p[0], buf, sizeof buf)) > 0)
		h = bench_hash(h, buf, (size_t)n);
	close(p[0]);
	if (waitpid(pid, &status, 0) != pid || status)
		bench_die("%s ended with status %#x", argv[0], (unsigned)status);
	return h;
}

#define RUN(...) command((char *[]){ __VA_ARGS__, NULL })

#define TEXT "/tmp/bench.text"

static void text_file(struct bench *b, size_t size)
{
	size = size * b->scale / 100;
	put_file(TEXT, make_text(b, size), size);
}

/* A shell command over a text of `size` bytes; `before` (or NULL) prepares more, untimed. */
static uint64_t over_text(struct bench *b, size_t size, const char *before, const char *cmd)
{
	uint64_t h;

	text_file(b, size);
	if (before)
		RUN("sh", "-c", (char *)before);
	bench_begin(b);
	h = RUN("sh", "-c", (char *)cmd);
	bench_end(b);
	return h;
}

static uint64_t run_gzip(struct bench *b) { return over_text(b, 3 << 20, NULL, "gzip -nc " TEXT); }
static uint64_t run_gunzip(struct bench *b) { return over_text(b, 24 << 20, "gzip -nf " TEXT, "gzip -dc " TEXT ".gz"); }
static uint64_t run_bzip2(struct bench *b) { return over_text(b, 1 << 20, NULL, "bzip2 -c " TEXT); }
static uint64_t run_zstd(struct bench *b) { return over_text(b, 16 << 20, NULL, "zstd -T1 -qc " TEXT); }
static uint64_t run_unzstd(struct bench *b) { return over_text(b, 48 << 20, "zstd -T1 -qf " TEXT, "zstd -dqc " TEXT ".zst"); }
static uint64_t run_xz(struct bench *b) { return over_text(b, 400 << 10, NULL, "xz -T1 -c " TEXT); }
static uint64_t run_unxz(struct bench *b) { return over_text(b, 12 << 20, "xz -1 -T1 -kf " TEXT, "xz -dc " TEXT ".xz"); }
static uint64_t run_grep(struct bench *b) { return over_text(b, 24 << 20, NULL, "grep -E 'gu[a-f]st.*(0x7fff|clock) [0-9]+' " TEXT); }
static uint64_t run_sort(struct bench *b) { return over_text(b, 8 << 20, NULL, "sort --parallel=1 -k2 " TEXT); }
static uint64_t run_awk(struct bench *b)
{
	return over_text(b, 4 << 20, NULL, "mawk '{ for (i = 1; i <= NF; i++) n[$i]++ } END { print n[\"cache\"], n[\"the\"], length(n) }' " TEXT);
}
static uint64_t run_sed(struct bench *b) { return over_text(b, 4 << 20, NULL, "sed -e 's/guest/host/g;/^[0-9]/d;s/\\([a-z]*\\) the/the \\1/' " TEXT); }
static uint64_t run_openssl(struct bench *b)
{
	return over_text(b, 32 << 20, NULL, "openssl dgst -r -sha256 " TEXT "; openssl dgst -r -sha3-256 " TEXT
		"; openssl enc -aes-256-ctr -K 00112233 -iv 44 -in " TEXT " 2>/dev/null | openssl dgst -r -blake2b512");
}

static uint64_t run_kdf(struct bench *b)
{
	char n[32];

	snprintf(n, sizeof n, "%u", bench_rounds(b, 120000));
	return RUN("openssl", "enc", "-aes-256-cbc", "-pbkdf2", "-iter", n, "-S", "0011223344556677", "-k", "secret", "-in", "/dev/null");
}

static uint64_t script(struct bench *b, const char *path, const char *text, const char *program, unsigned rounds)
{
	char n[32];
	uint64_t h;

	snprintf(n, sizeof n, "%u", bench_rounds(b, rounds));
	put_file(path, text, strlen(text));
	bench_begin(b);
	h = RUN((char *)program, (char *)path, n);
	bench_end(b);
	return h;
}

static uint64_t run_lua(struct bench *b)
{
	return script(b, "/tmp/bench.lua",
		"local n, t, s = tonumber(arg[1]), {}, 0\n"
		"for i = 1, n do t[i % 5000] = (t[(i * 7) % 5000] or i) + i % 3; s = s + t[i % 5000] end\n"
		"local w = {}\nfor i = 1, n // 20 do w[#w + 1] = string.format('%d:%s', i, string.rep('x', i % 7)) end\n"
		"local c = table.concat(w, ','); local m = 0\nfor k in c:gmatch('(%d+):x') do m = m + tonumber(k) end\n"
		"local function fib(k) if k < 2 then return k end return fib(k - 1) + fib(k - 2) end\n"
		"print(s, #c, m, fib(23))\n", "lua5.4", 1500000);
}

static uint64_t run_python(struct bench *b)
{
	return script(b, "/tmp/bench.py",
		"import sys, json, re\nn = int(sys.argv[1])\nd = {}\n"
		"for i in range(n):\n    k = 'k%d' % (i * 7919 % 4096)\n    d[k] = d.get(k, 0) + i\n"
		"class P:\n    def __init__(self, v): self.v = v\n    def step(self): self.v = (self.v * 31 + 7) % 65521; return self.v\n"
		"p = P(1)\ns = sum(p.step() for _ in range(n))\n"
		"t = json.dumps(sorted(d.items()))\nu = json.loads(t)\n"
		"print(s, len(t), len(u), len(re.findall(r'k\\d+1\\b', t)), sum(pow(3, i, 1000003) for i in range(n // 20)))\n", "python3", 120000);
}

static uint64_t run_perl(struct bench *b)
{
	return script(b, "/tmp/bench.pl",
		"my $n = shift; my (%h, $s);\nfor my $i (1 .. $n) { my $k = 'k' . ($i * 7919 % 4096); $h{$k} += $i; $s .= \"$k,\" if $i % 3 == 0 }\n"
		"my $c = 0; $c += $1 while $s =~ /k(\\d+)5,/g; $s =~ tr/0-9/a-j/;\nprint join(' ', scalar(keys %h), $c, length $s, substr($s, 1000, 20)), \"\\n\";\n",
		"perl", 300000);
}

static uint64_t run_shell(struct bench *b)
{
	return script(b, "/tmp/bench.sh",
		"n=$1; i=0; s=0\nwhile [ $i -lt $n ]; do\n  i=$((i + 1)); case $i in *7) s=$((s + i));; *[13]) s=$((s ^ i));; esac; x=${s%%3*}; y=\"$x$i\"\ndone\n"
		"echo $s ${#y}\nfor k in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do echo $k | cat | wc -c; v=$(expr $k + 1); echo $v; done\n",
		"sh", 25000);
}

static uint64_t run_sqlite(struct bench *b)
{
	char sql[1024];
	uint64_t h;

	snprintf(sql, sizeof sql, "create table t(a integer primary key, b int, c text);"
		"with recursive n(i) as (select 1 union all select i + 1 from n where i < %u) insert into t select i, i * 7919 %% 10007, 'row ' || (i %% 977) from n;"
		"create index tb on t(b); create index tc on t(c); update t set b = b + 1 where a %% 3 = 0; delete from t where b %% 11 = 0;\n"
		"select count(*), sum(b), max(c) from t; select c, count(*) n from t group by c order by n desc, c limit 5;\n"
		"select count(*) from t x join t y on x.b = y.a where y.c like '%%7'; pragma integrity_check;\n", bench_rounds(b, 30000));
	put_file("/tmp/bench.sql", sql, strlen(sql));
	bench_begin(b);
	h = RUN("sqlite3", ":memory:", ".read /tmp/bench.sql");
	bench_end(b);
	return h;
}

/* The compiler proper, over a C file of `n` functions. */
static uint64_t run_gcc(struct bench *b)
{
	unsigned n = bench_rounds(b, 30);
	FILE *f = fopen("/tmp/bench.c", "w");
	uint64_t h;

	if (!f)
		bench_die("/tmp/bench.c: %s", strerror(errno));
	fputs("struct s { unsigned a[16]; struct s *next; };\nextern void out(unsigned);\n", f);
	for (unsigned i = 0; i < n; i++)
		fprintf(f, "unsigned f%u(struct s *p, unsigned n)\n{\n\tunsigned v = %u;\n\tfor (; p; p = p->next)\n\t\tfor (unsigned i = 0; i < n; i++) {\n"
			"\t\t\tif (p->a[i & 15] > v) v = v * %u + p->a[(i + %u) & 15]; else if (i %% %u == 1) out(v ^ i);\n\t\t\tswitch (v & 7) { case 1: v += i; break; "
			"case 3: v ^= %u; break; case 6: p->a[v & 15]--; }\n\t\t}\n\treturn v;\n}\n", i, i * 3, i + 5, i % 16, i % 5 + 2, i * 77);
	fclose(f);
	bench_begin(b);
	h = RUN("gcc-12", "-O1", "-S", "-o", "-", "/tmp/bench.c");
	bench_end(b);
	return h;
}

const struct bench_item items_app[] = {
	{ "app", "gzip", run_gzip },
	{ "app", "gunzip", run_gunzip },
	{ "app", "bzip2", run_bzip2 },
	{ "app", "zstd", run_zstd },
	{ "app", "unzstd", run_unzstd },
	{ "app", "xz", run_xz },
	{ "app", "unxz", run_unxz },
	{ "app", "grep", run_grep },
	{ "app", "sort", run_sort },
	{ "app", "awk", run_awk },
	{ "app", "sed", run_sed },
	{ "app", "openssl", run_openssl },
	{ "app", "openssl-kdf", run_kdf },
	{ "app", "lua", run_lua },
	{ "app", "python", run_python },
	{ "app", "perl", run_perl },
	{ "app", "shell", run_shell },
	{ "app", "sqlite", run_sqlite },
	{ "app", "gcc", run_gcc },
	{ 0 },
};
