#!/usr/bin/env python3
"""The Debian root disk that `./bootstrap run` boots: systemd, network, packages, and real work in it.

`root_disk_test.py LODGE [TEST...]`: systemd (in CI), compiler, python, tools, debuggers (long runs; they install packages in the guest). Needs build/guest/debian.img (tools/debian-disk), skipped without it. Nothing is written to that disk."""
import base64
import hashlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time

import vm

GUEST = vm.guest_dir()
DISK = f"{GUEST}/debian.img"
LONG = 7200     # seconds
PROMPT = r"root@lodge:[^\n]*# "


def args(*more, memory="1G", kernel="vmlinuz", initrd="initramfs"):
    return ("qemu", "-kernel", f"{GUEST}/{kernel}", "-initrd", f"{GUEST}/{initrd}", "-append", "console=ttyS0 root=/dev/vda net.ifnames=0",
            "-m", memory, "-drive", f"file={DISK},format=raw,if=virtio,snapshot=on", "-nic", "user", "-accel", "soft", "-nographic", *more)


def shell(guest):
    begin = time.monotonic()
    guest.expect(PROMPT)
    with open(f"/proc/{guest.proc.pid}/stat", encoding="ascii") as f:
        cpu = sum(int(v) for v in f.read().rsplit(")", 1)[1].split()[11:13]) / os.sysconf("SC_CLK_TCK")
    print(f"  prompt after {time.monotonic() - begin:.1f} s, {cpu:.1f} s of CPU time")
    guest.send("bind 'set enable-bracketed-paste off'; stty -echo; PS1=; dmesg -n 1; echo quiet-\"\"now\n")
    guest.expect(r"quiet-now\n")       # behind an escape sequence of bash
    # Neither what systemd says on the console nor a pager's escape sequences come between a command's words.
    guest.run("export SYSTEMD_PAGER= SYSTEMD_COLORS=0; systemctl is-system-running --wait; kill -s RTMIN+21 1")


def power_off(guest):
    guest.send("systemctl poweroff\n")
    status = guest.wait()
    assert status == 0, f"exit status {status}"


def systemd(start):
    """Boots to a prompt with the network up, nothing failed, and shuts down."""
    guest = start(*args())
    shell(guest)
    assert "10.0.2.15" in guest.run("ip -4 addr show eth0")
    guest.run("systemd-analyze || true")
    guest.run("systemctl --failed --no-legend --plain >/tmp/failed; cat /tmp/failed; [ ! -s /tmp/failed ]")
    assert "Debian GNU/Linux 12" in guest.run("cat /etc/os-release")
    guest.run("dpkg --audit && apt-cache policy >/dev/null")
    power_off(guest)


def install(guest, *packages):
    guest.run("export DEBIAN_FRONTEND=noninteractive; apt-get update -q >/tmp/log 2>&1 || { cat /tmp/log; false; }")
    guest.run(f"apt-get install -y -q --no-install-recommends {' '.join(packages)} >/tmp/log 2>&1 || {{ tail -30 /tmp/log; false; }}")


def compiler(start):
    """gcc from the archive builds a program in several files, which runs and is right."""
    guest = start(*args(memory="2G"), timeout=LONG)
    shell(guest)
    install(guest, "gcc", "libc6-dev", "make")
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "bench", "items", "int.c"), encoding="utf-8") as f:
        items = f.read()
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "bench", "items", "items.h"), encoding="utf-8") as f:
        header = f.read()
    main = ('#include "bench/items/items.h"\n#include <stdio.h>\n#include <stdlib.h>\nuint64_t bench_random(struct bench *b) { return b->rng = '
            'b->rng * 6364136223846793005ull + 1442695040888963407ull; }\nvoid bench_begin(struct bench *b) {}\nvoid bench_end(struct bench *b) {}\n'
            'unsigned bench_rounds(const struct bench *b, unsigned n) { return n * b->scale / 100 ? n * b->scale / 100 : 1; }\n'
            'void *bench_alloc(size_t n) { return calloc(1, n); }\nuint64_t bench_hash(uint64_t h, const void *p, size_t n) { '
            'for (size_t i = 0; i < n; i++) h = h * 31 + ((const uint8_t *)p)[i]; return h; }\n'
            'int main(void) { for (const struct bench_item *i = items_int; i->name; i++) { struct bench b = { 1, 0, 0, 42, 0 }; '
            'printf("%s %llx\\n", i->name, (unsigned long long)i->run(&b)); } return 0; }\n')
    want = build_here(main, items, header)
    guest.run("mkdir -p /tmp/p/bench/items; cd /tmp/p")
    for name, text in (("main.c", main), ("int.c", items), ("bench/items/items.h", header)):
        put(guest, name, text)
    for level in ("-O0", "-O2", "-O3 -march=native"):
        guest.run(f"gcc -Wall {level} -I. -o p main.c int.c 2>&1")
        got = guest.run("./p")
        assert got == want, f"{level}: {got}\nwant {want}"
    power_off(guest)


def build_here(main, items, header):
    """What the same sources print on this machine."""
    with tempfile.TemporaryDirectory() as tmp:
        os.makedirs(f"{tmp}/bench/items")
        for name, text in (("main.c", main), ("int.c", items), ("bench/items/items.h", header)):
            with open(f"{tmp}/{name}", "w", encoding="utf-8") as f:
                f.write(text)
        subprocess.run(["cc", "-O2", f"-I{tmp}", "-o", f"{tmp}/p", f"{tmp}/main.c", f"{tmp}/int.c"], check=True)
        return subprocess.run([f"{tmp}/p"], capture_output=True, text=True, check=True).stdout


def put(guest, name, text):
    """A file in the guest's directory, line by line through the console."""
    data = base64.encodebytes(text.encode()).decode()
    guest.run("rm -f /tmp/b64")
    lines = data.splitlines()
    for i in range(0, len(lines), 40):
        guest.send("cat >>/tmp/b64 <<'EOF'\n" + "\n".join(lines[i:i + 40]) + "\nEOF\necho p\"\"ut\n")
        guest.expect(r"put\n")
    guest.run(f"base64 -d /tmp/b64 >{name}")


PYTHON_TESTS = ("test_int test_long test_float test_complex test_bool test_unicode test_bytes test_list test_tuple test_dict test_set test_math test_cmath "
                "test_struct test_array test_re test_json test_zlib test_hashlib test_sort test_itertools test_functools test_generators "
                "test_exceptions test_thread test_threading test_signal test_mmap test_fork1 test_select test_socket test_subprocess").split()


def python(start):
    """Python's own tests of its core types, and of threads, signals, mmap and fork."""
    guest = start(*args(memory="2G"), timeout=LONG)
    shell(guest)
    install(guest, "python3", "libpython3.11-testsuite")
    failed = []
    for name in PYTHON_TESTS:
        begin = time.monotonic()
        out = guest.run(f"timeout 1200 python3 -m test -q {name} >/tmp/log 2>&1 </dev/null; echo result $?; tail -25 /tmp/log")
        good = "result 0\n" in out
        print(f"  {'ok  ' if good else 'FAIL'} {name} {time.monotonic() - begin:.0f} s", flush=True)
        if not good:
            failed.append(out)
    assert not failed, "\n".join(failed)
    power_off(guest)


def tools(start):
    """sqlite, openssl, perl and lua give the answers that they give elsewhere."""
    guest = start(*args(memory="2G"), timeout=LONG)
    shell(guest)
    install(guest, "sqlite3", "openssl", "perl", "lua5.4")
    guest.run("seq 1 200000 >/tmp/data; sha256sum /tmp/data | grep -q ^" + SEQ_SHA256)
    guest.run("for d in md5 sha1 sha224 sha256 sha384 sha512 sha3-256 sha3-512 blake2b512 blake2s256 sm3; do "
              "openssl dgst -r -$d /tmp/data | cut -d' ' -f1 | sed \"s/^/$d /\"; done >/tmp/sums; cat /tmp/sums")
    for name, algorithm in (("md5", "md5"), ("sha512", "sha512"), ("sha3-256", "sha3_256"), ("blake2b512", "blake2b"), ("blake2s256", "blake2s")):
        h = hashlib.new(algorithm, seq_data()).hexdigest()
        guest.run(f"grep -qx '{name} {h}' /tmp/sums")
    guest.run("n=0; for c in $(openssl enc -list | tail -n +2 | tr ' ' '\\n' | grep ^- | grep -vE 'wrap|gcm|ccm|xts'); do "
              "openssl enc $c -pbkdf2 -k secret -in /tmp/data -out /tmp/enc 2>/dev/null || continue; "
              "openssl enc -d $c -pbkdf2 -k secret -in /tmp/enc 2>/dev/null | cmp - /tmp/data || { echo $c; false; break; }; n=$((n + 1)); done && [ $n -gt 30 ]")
    guest.run("openssl genrsa 2048 >/tmp/key 2>/dev/null && openssl dgst -sha256 -sign /tmp/key -out /tmp/sig /tmp/data && "
              "openssl rsa -in /tmp/key -pubout >/tmp/pub 2>/dev/null && openssl dgst -sha256 -verify /tmp/pub -signature /tmp/sig /tmp/data")
    sql = ("create table t(a integer primary key, b int, c text); with recursive n(i) as (select 1 union all select i + 1 from n where i < 100000) "
           "insert into t select i, i * 7919 % 10007, hex(i * i) from n; create index tb on t(b); create unique index tc on t(c); "
           "update t set b = b + 1 where a % 3 = 0; delete from t where b % 11 = 0; vacuum; "
           "select count(*), sum(b), max(c) from t; pragma integrity_check;")
    want = sqlite_here(sql)
    got = guest.run(f"rm -f /root/t.db; sqlite3 /root/t.db \"{sql}\"")
    assert got.split() == want, (got, want)
    sums = [sum(range(k or 1009, 200001, 1009)) for k in range(1009)]
    want = 0
    for v in sums:
        want = (want * 31 + v) % 1000003
    guest.run("perl -e 'my (%h, $s); $h{$_ % 1009} += $_ for 1 .. 200000; $s = ($s * 31 + $h{$_}) % 1000003 for sort { $a <=> $b } keys %h; print $s' "
              f"| grep -qx {want}")
    guest.run(f"lua5.4 -e 'local h, s = {{}}, 0 for i = 1, 200000 do local k = i % 1009 h[k] = (h[k] or 0) + i end for k = 0, 1008 do s = (s * 31 + h[k]) % 1000003 end "
              f"assert(s == {want})'")
    power_off(guest)


def debuggers(start):
    """gdb's breakpoints, watchpoints (debug registers) and single steps, strace and valgrind on a threaded program, 64-bit and 32-bit."""
    guest = start(*args(memory="2G"), timeout=LONG)
    shell(guest)
    install(guest, "gcc", "gcc-multilib", "libc6-dev", "gdb", "strace", "valgrind")
    here = os.path.dirname(os.path.abspath(__file__))
    guest.run("cd /tmp")
    for name in ("debugged.c", "debuggers.sh"):
        with open(os.path.join(here, name), encoding="utf-8") as f:
            put(guest, name, f.read())
    guest.run("bash debuggers.sh")
    guest.run("! dmesg | grep -iE 'traps:|segfault|general protection'")
    power_off(guest)


def seq_data():
    return "".join(f"{i}\n" for i in range(1, 200001)).encode()


SEQ_SHA256 = hashlib.sha256(seq_data()).hexdigest()


def sqlite_here(sql):
    """The same with this machine's sqlite."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    out = []
    for statement in sql.split("; "):
        for row in db.execute(statement.rstrip(";")):
            out.append("|".join(str(v) for v in row))
    return out


TESTS = [systemd, compiler, python, tools, debuggers]

if __name__ == "__main__":
    if not os.path.exists(DISK):
        print("no Debian root disk: run tools/debian-disk first")
        sys.exit(77)
    vm.main(TESTS)
