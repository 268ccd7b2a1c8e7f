#!/usr/bin/env python3
"""`bench` at depth: reads that turn out to be copies are shared among threads, and all requests are made, whoever makes them.

usage: bench_test.py LODGE-QEMU-IMG; 77 where the file system in memory cannot bypass the page cache, or there is one processor"""
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time

from listening import wait_until
from running import run, scratch


def threads(pid):
    """Of the program itself. The kernel's own for a ring do not count, but for a moment they have the program's name."""
    names = []
    for t in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{t}/comm", encoding="ascii") as f:
                names.append(f.read())
        except OSError: # it ended
            pass
    return sum(not n.startswith("iou-") for n in names)


def several(pid, samples=10):
    """Has it several for a while?"""
    for _ in range(samples):
        if threads(pid) < 2:
            return False
        time.sleep(0.01)
    return True


def shared(img, want, *words):
    """Does a run that takes long have several threads?"""
    p = subprocess.Popen([img, "bench", "-q", "-c", "100000000", *words])
    try:
        assert wait_until(lambda: p.poll() is not None or several(p.pid), 60 if want else 2) == want, (words, want)
        assert p.poll() is None, words
    finally:
        p.kill()
        p.wait()


def spoil(image, cluster):
    """A cluster that no read can find: its entry is no multiple of the cluster size."""
    with open(image, "r+b") as f:
        l1 = struct.unpack(">Q", f.read(48)[40:])[0]
        f.seek(l1)
        l2 = struct.unpack(">Q", f.read(8))[0] & (1 << 56) - 512
        f.seek(l2 + 8 * cluster)
        f.write(struct.pack(">Q", 1 << 63 | 0x10200))


def all_made(img, fmt):
    """Each request is made once, before threads take over and after: a disk as long as all of them is written whole, and read without an error."""
    for depth in ("1", "2", "16", "500"):
        for count in ("1", "63", "65", "256"):
            run(img, "create", "-f", fmt, "out", "16M")
            run(img, "bench", "-w", "--pattern=7", "-c", count, "-d", depth, "-s", "64k", "-t", "none", "-f", fmt, "out")
            run("cmp", "-n", str(int(count) << 16), "sevens", "out") if fmt == "raw" else None
            said = run(img, "bench", "-c", count, "-d", depth, "-s", "64k", "-t", "none", "-f", fmt, "out")
            assert f"Sending {count} read requests" in said and "Run completed" in said, said
    # A request that fails after the change ends the run.
    out = run(img, "bench", "-c", "200", "-d", "8", "-s", "64k", "-t", "none", "-f", "qcow2", "cut", ok=(1,))
    assert "Failed request: Input/output error" in out and "completed" not in out, out


def counted(path):
    """Does the kernel count what is read from the device below? It may do without, and layers between may hide it."""
    with mmap.mmap(-1, 1 << 20) as buf:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_inblock
        os.preadv(fd, [buf], 0)
        os.close(fd)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock > before


def on_disk(img):
    """What a device does is no copy, though the kernel makes one request of many that stand side by side, which end together, and a quick device may have ended it
    before anybody looks. Stable writes of an image with tables are made by threads."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as d:
        if subprocess.run(["stat", "-f", "-c", "%T", d], capture_output=True, text=True, check=True).stdout.strip() not in ("ext2/ext3", "xfs"):
            return
        with open(f"{d}/data", "wb") as f:
            f.write(os.urandom(16 << 20)) # what is a hole is a copy of zeroes
        for fmt in ("raw", "qcow2"):
            run(img, "convert", "-f", "raw", "-O", fmt, "-t", "writeback", f"{d}/data", f"{d}/{fmt}")
            if counted(f"{d}/{fmt}"):
                shared(img, False, "-f", fmt, "-t", "none", "-d", "32", "-s", "4k", f"{d}/{fmt}")
            else:
                print(f"skipped: {fmt} on a disk, as the kernel does not count what is read from it")
        shared(img, True, "-f", "qcow2", "-t", "directsync", "-w", "-d", "8", "-s", "4k", f"{d}/qcow2")


def main():
    img = os.path.abspath(sys.argv[1])
    with scratch("bench-", "/dev/shm"):
        with open("sevens", "wb") as f:
            f.write(b"\7" * (16 << 20))
        try:
            os.close(os.open("sevens", os.O_RDONLY | os.O_DIRECT))
        except OSError:
            print("skipped: no O_DIRECT here")
            return 77
        run(img, "convert", "-f", "raw", "-O", "qcow2", "sevens", "cut")
        spoil("cut", 150)
        for fmt in ("raw", "qcow2"):
            all_made(img, fmt)
        if os.sysconf("SC_NPROCESSORS_ONLN") > 1:
            shared(img, True, "-f", "raw", "-t", "none", "-d", "8", "-s", "64k", "sevens")
            shared(img, True, "-f", "qcow2", "-t", "none", "-d", "8", "-s", "64k", "out")
        shared(img, False, "-f", "raw", "-t", "none", "-d", "8", "-s", "64k", "-w", "sevens")   # writes of one file wait for each other
        shared(img, False, "-f", "raw", "-t", "none", "-d", "8", "-s", "64k", "-i", "io_uring", "sevens")
        shared(img, False, "-f", "raw", "-t", "none", "-d", "1", "-s", "64k", "sevens")
        on_disk(img)
        return 0


sys.exit(main())
