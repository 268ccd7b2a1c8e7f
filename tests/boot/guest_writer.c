/*
 * First process of the guest in kill_test.py: writes blocks of a disk at places a generator gives, flushes now and then, and
 * says on the console what is flushed. Whoever knows seed and first number can say what each block may hold.
 * Kernel arguments: writer.seed=N writer.first=N.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { BLOCK = 4096, RUN_MAX = 20 };

static uint64_t argument(const char *cmdline, const char *key)
{
	const char *p = strstr(cmdline, key);
	return p ? strtoull(p + strlen(key), NULL, 0) : 0;
}

static void load_modules(void)
{
	char name[128], path[192];
	FILE *f = fopen("/lib/modules/order", "r");
	while (f && fgets(name, sizeof name, f)) {
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/lib/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd >= 0) {
			syscall(SYS_finit_module, fd, "", 0);
			close(fd);
		}
	}
	if (f)
		fclose(f);
}

static uint32_t next(uint32_t *s)
{
	*s = *s * 1664525u + 1013904223u;
	return *s >> 8;
}

int main(void)
{
	static uint8_t buf[RUN_MAX * BLOCK] __attribute__((aligned(BLOCK)));
	char cmdline[1024] = "";
	setvbuf(stdout, NULL, _IONBF, 0);
	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	int fd = open("/proc/cmdline", O_RDONLY);
	if (fd < 0 || read(fd, cmdline, sizeof cmdline - 1) < 0)
		puts("WRITER no command line");
	load_modules();
	for (int i = 0; (fd = open("/dev/vda", O_RDWR | O_DIRECT)) < 0 && i < 100; i++)
		usleep(20000);
	uint32_t seed = (uint32_t)argument(cmdline, "writer.seed=");
	uint64_t seq = argument(cmdline, "writer.first="), size = (uint64_t)lseek(fd, 0, SEEK_END), blocks = size / BLOCK;
	printf("WRITER ready %llu\n", (unsigned long long)blocks);
	for (;;) {
		uint64_t n = 1 + next(&seed) % RUN_MAX, at = next(&seed) % (blocks - n);
		for (uint64_t i = 0; i < n; i++)
			for (unsigned k = 0; k < BLOCK; k += 16) {
				memcpy(buf + i * BLOCK + k, &(uint64_t){ seq }, 8);
				memcpy(buf + i * BLOCK + k + 8, &(uint64_t){ at + i }, 8);
			}
		if (pwrite(fd, buf, n * BLOCK, (off_t)(at * BLOCK)) != (ssize_t)(n * BLOCK))
			puts("WRITER write failed");
		if (next(&seed) % 8 == 0) {
			if (fsync(fd))
				puts("WRITER flush failed");
			printf("F %llu\n", (unsigned long long)seq);
		}
		seq++;
	}
}
