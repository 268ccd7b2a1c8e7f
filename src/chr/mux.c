/* Several front ends on one stream: Ctrl-A escapes, as people know them from QEMU. */
#include <stdio.h>
#include <string.h>

#include "chr/internal.h"

enum { CTRL_A = 1 };

static void say(struct chardev *c, const char *text)
{
	chr_raw_write(c, (const uint8_t *)text, strlen(text));
}

static void help(struct chardev *c)
{
	say(c, "\r\n"
	       "C-a h    this help\r\n"
	       "C-a x    quit\r\n"
	       "C-a b    send a break\r\n"
	       "C-a c    next: console, monitor, ...\r\n"
	       "C-a t    times in front of lines, on or off\r\n"
	       "C-a s    save snapshot data (not supported)\r\n"
	       "C-a C-a  send C-a\r\n");
}

static void next_port(struct chardev *c)
{
	if (c->nports < 2)
		return;
	c->focus = (c->focus + 1) % c->nports;
	char line[96];
	snprintf(line, sizeof line, "\r\n[%.64s]\r\n", c->port[c->focus]->owner);
	say(c, line);
}

static void command(struct chardev *c, uint8_t byte)
{
	switch (byte) {
	case 'h':
	case '?':
		help(c);
		break;
	case 'x':
		say(c, "\r\nlodge: quit\r\n");
		if (c->env.quit)
			c->env.quit(c->env.opaque);
		break;
	case 'b':
		if (c->nports && c->port[c->focus]->cl.event)
			c->port[c->focus]->cl.event(c->port[c->focus]->cl.opaque, CHR_BREAK);
		break;
	case 'c':
		next_port(c);
		break;
	case 's':
		say(c, "\r\nlodge: saving snapshot data is not supported\r\n");
		break;
	case 't':
		__atomic_store_n(&c->timestamps, !c->timestamps, __ATOMIC_RELAXED);
		break;
	}
}

bool mux_escape(struct chardev *c, uint8_t byte)
{
	if (!c->escape) {
		c->escape = byte == CTRL_A;
		return c->escape;
	}
	c->escape = false;
	if (byte == CTRL_A)
		return false; /* one Ctrl-A for the guest */
	command(c, byte);
	return true;
}

size_t mux_write_timed(struct chardev *c, const uint8_t *buf, size_t len)
{
	size_t done = 0;
	while (done < len) {
		const uint8_t *nl = memchr(buf + done, '\n', len - done);
		size_t n = nl ? (size_t)(nl - (buf + done)) + 1 : len - done;
		if (c->line_start) {
			uint64_t ms = (clock_now(clock_host(c->env.loop)) - c->start_ns) / 1000000;
			char t[40];
			snprintf(t, sizeof t, "[%02u:%02u:%02u.%03u] ", (unsigned)(ms / 3600000), (unsigned)(ms / 60000 % 60),
				 (unsigned)(ms / 1000 % 60), (unsigned)(ms % 1000));
			say(c, t);
			c->line_start = false;
		}
		size_t took = chr_raw_write(c, buf + done, n);
		done += took;
		if (took < n)
			break;
		c->line_start = nl != NULL;
	}
	return done;
}
