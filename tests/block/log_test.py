#!/usr/bin/env python3
"""The filters blklogwrites and preallocate. A log is read back and replayed: all of it gives the file, and each flush in it an image that is good; sequences without
parts of sectors give the very log that qemu-io writes. A preallocated file is longer while it is open and ends where its image does when it is closed.

usage: log_test.py LODGE-QEMU-IO LODGE-QEMU-IMG; exit status 77 without qemu-io and qemu-img"""
import os
import random
import shutil
import struct
import subprocess
import sys
import time

from running import run, scratch

MAGIC, FLUSH, DISCARD = 0x6A736677736872, 1, 4
MIB = 1 << 20
LOG = "driver=blklogwrites,file.driver=file,file.filename=disk,log.driver=file,log.filename=log"


def commands(tool, how, cmds, ok=(0,)):
    return run(tool, *(w for c in cmds for w in ("-c", c)), *how, ok=ok)


def fresh(size, old_log=None):
    for name, data in (("disk", b""), ("log", old_log or b"")):
        with open(name, "wb") as f:
            f.write(data)
    os.truncate("disk", size)


def read_log(data):
    """Sector size and (sector, sectors, flags, data) of each entry that counts."""
    magic, version, count, size = struct.unpack_from("<QQQI", data)
    assert (magic, version) == (MAGIC, 1) and not any(data[28:size]), (hex(magic), version)
    at, out = size, []
    for _ in range(count):
        sector, n, flags, length = struct.unpack_from("<QQQQ", data, at)
        assert not length and not any(data[at + 32:at + size]), (at, length)
        body = b"" if flags & DISCARD else data[at + size:at + size + n * size]
        assert flags & DISCARD or len(body) <= n * size
        out.append((sector, n, flags, body.ljust(0 if flags & DISCARD else n * size, b"\0")))
        at += size + len(out[-1][3])
    return size, out


def replay(before, size, entries):
    """What a disk of content `before` holds after the entries; a discarded place may hold anything, here zeroes."""
    d = bytearray(before)
    for sector, n, flags, body in entries:
        at, length = sector * size, n * size
        d.extend(bytes(max(0, at + length - len(d))))
        d[at:at + length] = bytes(length) if flags & DISCARD else body
    return bytes(d)


SAME = [
    ("", "write -P 1 0 4k", "write -z 8k 4k", "discard 16k 4k", "flush", "flush", "write -P 2 512 512", "write -P 7 1000 5000", "read -P 7 1000 5000"),
    (",log-sector-size=4k", "write -P 1 0 4k", "write -z 8k 4k", "discard 16k 4k", "flush", "write -P 2 512 512", "write -P 7 1000 5000"),
    (",log-super-update-interval=2", "write -P 1 0 64k", "write -P 2 64k 1M", "write -z 512k 1M", "discard 16k 4k"),
    (",log-append=on", "write -P 1 0 4k", "length"),
    ("", "length"),
    ("", "read 0 64k", "flush"),
]


def same_logs(io):
    for options, *cmds in SAME:
        got = []
        for tool in ("qemu-io", io):
            fresh(4 * MIB)
            for _ in range(2 if "append" in options else 1):
                commands(tool, ["-t", "writeback", "--image-opts", LOG + options], cmds)
            got.append([open(n, "rb").read() for n in ("disk", "log")])
        assert got[0] == got[1], (options, cmds, [len(x) for g in got for x in g])


def through(io):
    """Write-through: each write's log says that it is stable before the next begins. Read-only: nothing is logged."""
    fresh(MIB)
    commands(io, ["-t", "writethrough", "--image-opts", LOG], ["write -P 1 0 4k", "write -z 8k 4k", "write -P 3 100 100"])
    _, entries = read_log(open("log", "rb").read())
    assert [e[2] for e in entries] == [0, FLUSH] * 3, entries
    fresh(MIB)
    commands(io, ["-r", "--image-opts", LOG], ["read -P 0 0 1M", "write 0 4k"], ok=(1,))
    assert os.path.getsize("log") == 0


def replayed(io, img, seed):
    """A qcow2 image on a logged file: at each flush the replayed file is a good image that holds what was written before."""
    rnd = random.Random(seed)
    run(img, "create", "-q", "-f", "qcow2", "-o", rnd.choice(("cluster_size=4k", "cluster_size=64k", "cluster_size=64k,extended_l2=on")), "disk", "8M")
    before = open("disk", "rb").read()
    open("log", "wb").close()
    cmds, model, states = [], bytearray(8 * MIB), []
    for _ in range(60):
        off, n = rnd.randrange(8 * MIB // 512 - 400) * 512, rnd.randrange(1, 400) * 512
        kind = rnd.random()
        if kind < 0.2:
            cmds.append("flush")
            states.append(bytes(model))
            continue
        byte = rnd.randrange(1, 256) if kind < 0.8 else 0
        cmds.append(f"write -P {byte} {off} {n}" if byte else f"write -z {off} {n}")
        model[off:off + n] = bytes([byte]) * n
    out = commands(io, ["-t", "writeback", "--image-opts", "driver=qcow2,file." + LOG.replace(",", ",file.") + rnd.choice(("", ",file.log-sector-size=4096"))], cmds)
    assert "failed" not in out, out
    size, entries = read_log(open("log", "rb").read())
    after, end = open("disk", "rb").read(), replay(before, size, entries)
    assert end[:len(after)] == after and not any(end[len(after):]), "the log is not what was written"
    flushes = [i for i, e in enumerate(entries) if e[2] & FLUSH]
    assert len(flushes) >= len(states)
    found = 0
    for i in flushes:
        with open("again", "wb") as f:
            f.write(replay(before, size, entries[:i]))
        run("qemu-img", "check", "-q", "again", ok=(0, 3)) # 3: leaked clusters
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "again", "again.raw")
        now = open("again.raw", "rb").read()
        if found < len(states) and now == states[found]:
            found += 1
        while found < len(states) and states[found] == now:
            found += 1
    assert found == len(states), (found, len(states), "flushed states in the log")


def super_block(entries=0, size=512, magic=MAGIC, version=1):
    return struct.pack("<QQQI", magic, version, entries, size).ljust(512, b"\0")


def hostile(io):
    """Logs to append to that lie: an error that says so, at once."""
    entry = struct.pack("<QQQQ", 0, 1, 0, 0).ljust(512, b"\0") + bytes(512)
    for log, says in ((super_block(magic=1), "magic"), (super_block(version=2), "version 2"), (super_block(size=0), "sector size 0"), (super_block(size=48), "sector size 48"),
                      (super_block(size=1 << 31), "sector size"), (super_block(entries=2 ** 64 - 1) + entry, "log ends before entry"), (super_block(entries=1), "log ends before entry 0"),
                      (super_block(entries=1) + struct.pack("<QQQQ", 0, 1 << 63, 0, 0).ljust(512, b"\0"), "longer than the log"),
                      (super_block(entries=1) + struct.pack("<QQQQ", 0, 0, 1 << 40, 0).ljust(512, b"\0"), "Invalid flags 0x10000000000 in log entry 0"), (b"x" * 10, "magic")):
        fresh(MIB, log)
        out = commands(io, ["--image-opts", LOG + ",log-append=on"], ["write -P 1 0 4k"], ok=(1,))
        assert says in out, (says, out)
        assert open("log", "rb").read() == log
    fresh(MIB, super_block(1) + entry)
    commands(io, ["-t", "writeback", "--image-opts", LOG + ",log-append=on"], ["write -P 9 512 512"])
    assert [e[:3] for e in read_log(open("log", "rb").read())[1]] == [(0, 1, 0), (1, 1, 0), (0, 0, FLUSH)]
    os.truncate("disk", 1000 * 512) # a disk whose end is no whole sector of the log
    out = commands(io, ["--image-opts", "driver=blklogwrites,file.driver=raw,file.file.filename=disk,file.size=512,log.filename=log,log-sector-size=4k"], ["length"], ok=(1,))
    assert "no multiple of the log's sectors" in out, out
    out = commands(io, ["--image-opts", LOG.replace("log.filename=log", "log.filename=/dev/full")], ["write 0 4k"], ok=(1,))
    assert "/dev/full" in out, out


def sparse_log(io):
    """A log of nothing but a size is not read sector by sector: holes are entries of no sectors."""
    n = (1 << 42) // 512
    how = ["--image-opts", LOG + ",log-append=on"]
    for entries, status, says in ((n - 1, 0, "1 MiB"), (n, 1, "log ends before entry"), (1 << 60, 1, "log ends before entry")):
        fresh(MIB, super_block(entries))
        os.truncate("log", n * 512)
        began = time.monotonic()
        assert says in commands(io, how, ["length"], ok=(status,)), entries
        assert time.monotonic() - began < 20, "the log was read"
    # A qcow2 image that shows one cluster of entries everywhere: the same.
    fresh(MIB, b"")
    run("qemu-img", "create", "-q", "-f", "qcow2", "log.qcow2", "256G")
    with open("entries", "wb") as f:
        f.write(super_block((1 << 38) // 512 - 200) + bytes(65024) + struct.pack("<QQQQ", 0, 0, FLUSH, 0).ljust(512, b"\0") * 128)
    run("qemu-io", "-f", "qcow2", "-c", "write -s entries 0 128k", "log.qcow2")
    with open("log.qcow2", "r+b") as f:
        head = f.read(104)
        l1 = int.from_bytes(head[40:48], "big")
        f.seek(l1)
        table = f.read(8)
        f.seek(int.from_bytes(table, "big") & ~(1 << 63))
        l2 = f.read(16)
        f.seek(-16, os.SEEK_CUR)
        f.write(l2[:8] + l2[8:] * 8191)
        second = (f.seek(0, os.SEEK_END) + 65535) // 65536 * 65536
        f.seek(second)
        f.write(l2[8:] * 8192)
        f.seek(l1)
        f.write(table + (second | 1 << 63).to_bytes(8, "big") * 511)
    began = time.monotonic()
    assert "more log entries than" in commands(io, ["--image-opts", LOG.replace("log.filename=log", "log.driver=qcow2,log.file.filename=log.qcow2") + ",log-append=on"], ["length"], ok=(1,))
    assert time.monotonic() - began < 20, "the log was read"
    # What is in it counts as before: a write in the middle of holes, and what comes after.
    entry = struct.pack("<QQQQ", 3, 2, 0, 0).ljust(512, b"\0") + b"d" * 1024
    with open("log", "r+b") as f:
        f.truncate(0)
        f.write(super_block(1000 + 1 + 500))
        f.seek(512 * 1001)
        f.write(entry)
        f.truncate(512 * (1 + 1000 + 3 + 500))
    commands(io, ["-t", "writeback", *how], ["write -P 9 512 512"])
    found = [e[:3] for e in read_log(open("log", "rb").read())[1]]
    assert found == [(0, 0, 0)] * 1000 + [(3, 2, 0)] + [(0, 0, 0)] * 500 + [(1, 1, 0), (0, 0, FLUSH)], [e for e in found if any(e)]


def zero_runs(img):
    """`convert` onto what is there: a run of zeroes that it finds in data is one request, as a run of data is."""
    rnd = random.Random(3)
    with open("source", "wb") as f: # data for the file system, all of it
        f.write(rnd.randbytes(300 * 1024) + bytes(1100 * 1024) + rnd.randbytes(72 * 1024) + bytes(4096) + rnd.randbytes(4096) + bytes(50 * 1024))
    fresh(os.path.getsize("source"))
    with open("disk", "r+b") as f:
        f.write(b"x" * os.path.getsize("source"))
    before = open("disk", "rb").read()
    run(img, "convert", "-n", "-f", "raw", "--target-image-opts", "source", LOG)
    size, entries = read_log(open("log", "rb").read())
    requests = [e for e in entries if not e[2] & FLUSH]
    assert len(requests) == 6, [e[:3] for e in entries]
    assert replay(before, size, entries) == open("source", "rb").read() == open("disk", "rb").read()


def log_full(io):
    """A log that cannot grow: the request fails, and what the log says before is whole."""
    fresh(MIB)
    out = run(io, "-t", "writeback", "-c", "write -P 1 0 4k", "-c", "flush", "-c", "write -P 2 4k 64k", "-c", "write -P 3 8k 512", "-c", "flush", "--image-opts", LOG, ok=(1,), limit=16384)
    assert "write failed" in out, out
    size, entries = read_log(open("log", "rb").read())
    assert [e[:3] for e in entries] == [(0, 8, 0), (0, 0, FLUSH), (16, 1, 0), (0, 0, FLUSH)], entries
    assert replay(bytes(MIB), size, entries)[:4096] == b"\1" * 4096


# --- preallocate ---

PRE = "driver=qcow2,file.driver=preallocate,file.file.driver=file,file.file.filename=pre.q"


def while_open(io, how, cmds):
    """Size of the file and blocks it has, of a program that did `cmds` and waits; the program is returned."""
    p = subprocess.Popen([io, "-t", "writeback", *how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    p.stdin.write("".join(c + "\n" for c in cmds) + "length\n")
    p.stdin.flush()
    end = time.monotonic() + 60
    while "MiB\n" not in (line := p.stdout.readline()) or "ops" in line:
        assert time.monotonic() < end and p.poll() is None
    st = os.stat("pre.q")
    return st.st_size, st.st_blocks * 512, p


def image(img):
    run(img, "create", "-q", "-f", "qcow2", "pre.q", "64M")
    return os.path.getsize("pre.q")


def preallocated(io, img):
    cmds = ["write -P 1 0 1M", "write -z 8M 1M", "write -P 2 4M 3M"]
    for options, sizes in (("", lambda n: 128 * MIB <= n <= 132 * MIB and not n % MIB), (",file.prealloc-size=5M,file.prealloc-align=512k", lambda n: 5 * MIB <= n <= 10 * MIB and not n % (MIB // 2)),
                           (",file.prealloc-size=0,file.prealloc-align=16M", lambda n: n == 16 * MIB)):
        image(img)
        run(io, *(w for c in cmds for w in ("-c", c)), "pre.q")
        want = os.path.getsize("pre.q")
        image(img)
        size, blocks, p = while_open(io, ["--image-opts", PRE + options], cmds)
        assert sizes(size) and blocks >= size - 256 * 1024, (options, size, blocks) # the file may have had a hole before
        p.communicate(timeout=60)
        assert p.returncode == 0 and os.path.getsize("pre.q") == want, (options, os.path.getsize("pre.q"), want)
        run("qemu-img", "check", "-q", "pre.q")
        out = run("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -P 2 4M 3M", "-c", "read -P 0 8M 1M", "-c", "read -P 0 9M 8M", "pre.q")
        assert "failed" not in out, out


def killed(io, img):
    """What stays after kill -9 is a good image with room behind it."""
    image(img)
    size, _, p = while_open(io, ["--image-opts", PRE], ["write -P 1 0 1M", "flush"])
    p.kill()
    p.wait()
    p.stdin.close()
    p.stdout.close()
    assert os.path.getsize("pre.q") == size > 128 * MIB
    run("qemu-img", "check", "-q", "pre.q")
    assert "failed" not in run("qemu-io", "-c", "read -P 1 0 1M", "pre.q")


def no_room(io, img):
    """Where there is no room for more than is written, that is written all the same; and read-only files stay as they are."""
    was = image(img)
    out = run(io, "-r", "-c", "read -P 0 0 1M", "--image-opts", PRE)
    assert "failed" not in out and os.path.getsize("pre.q") == was
    cmds = ["write -P 1 0 1M", "write -P 2 2M 1M", "flush", "read -P 1 0 1M"]
    out = run(io, *(w for c in cmds for w in ("-c", c)), "--image-opts", PRE, limit=8 * MIB)
    assert "failed" not in out and os.path.getsize("pre.q") < 4 * MIB, out
    run("qemu-img", "check", "-q", "pre.q")
    run(img, "resize", "-q", "--image-opts", PRE, "80M") # the file grows from where it ends
    run("qemu-img", "check", "-q", "pre.q")
    out = run(io, "-c", "truncate 3M", "-c", "write -P 4 2M 1M", "-c", "truncate 1M", "-c", "length", "-f", "raw",
              'json:{"driver":"preallocate","file":{"driver":"file","filename":"disk"}}')
    assert os.path.getsize("disk") == MIB and "1 MiB" in out, out


def main():
    if len(sys.argv) < 3 or not shutil.which("qemu-io") or not shutil.which("qemu-img"):
        print("SKIP: no qemu-io and qemu-img (package qemu-utils)")
        return 77
    io, img = (os.path.abspath(a) for a in sys.argv[1:3])
    with scratch("log-", "/var/tmp"):
        same_logs(io)
        through(io)
        for seed in range(4):
            replayed(io, img, seed)
        hostile(io)
        sparse_log(io)
        zero_runs(img)
        log_full(io)
        preallocated(io, img)
        killed(io, img)
        no_room(io, img)
    with scratch("log-", "/dev/shm" if os.path.isdir("/dev/shm") else None):    # tmpfs makes files longer by other means
        preallocated(io, img)
    print("logs and preallocation: well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
