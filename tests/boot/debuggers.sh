#!/bin/bash
# In the Debian guest: what gdb, strace and valgrind say about debugged.c, built for 64 and 32 bits.
set -eu
cd /tmp
want() { grep -q -- "$1" "$2" || { echo "no '$1' in $2:"; tail -20 "$2"; exit 1; }; }
for m in 64 32; do
	gcc -m$m -g -O1 -pthread -o prog$m debugged.c
	./prog$m >out$m
	want "^$m bits 13 1 99999 10 142857142.857143$" out$m
	gdb -q -batch -ex 'break step' -ex run -ex 'print n' -ex 'watch watched' -ex continue -ex continue -ex 'print watched' -ex 'delete' \
		-ex 'stepi 200' -ex 'info registers' -ex 'awatch table[3]' -ex continue -ex 'print table[3]' -ex 'delete' -ex 'handle SIGUSR1 nostop' -ex continue prog$m >gdb$m 2>&1 </dev/null || true
	want 'Hardware watchpoint 2: watched' gdb$m
	want 'exited normally' gdb$m
	want '^.[0-9] = 1$' gdb$m
	want '^.[0-9] = 10$' gdb$m
	strace -f -o strace$m ./prog$m >out; cmp out out$m
	want 'SIGUSR1 {si_signo=SIGUSR1' strace$m
	[ "$(grep -c 'clone3*(' strace$m)" -ge 4 ]
	gdb -q -batch -ex 'set pagination off' -ex 'break main' -ex run -ex 'python n = 0
while n < 500:
    gdb.execute("stepi", to_string=True)
    n += 1
print("steps", n)' -ex 'handle SIGUSR1 nostop' -ex continue prog$m >step$m 2>&1 </dev/null
	want 'steps 500' step$m
	want 'exited normally' step$m
done
valgrind -q --error-exitcode=9 ./prog64 >out; cmp out out64
valgrind --tool=helgrind -q ./prog64 >out 2>/dev/null; cmp out out64
echo debuggers fine
