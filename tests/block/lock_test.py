#!/usr/bin/env python3
"""Image locks: what each side's tools may do with an image that the other side's io tool holds, to read or to write.

usage: lock_test.py LODGE-QEMU-IMG LODGE-QEMU-IO; 77 without qemu-img and qemu-io"""
import os
import shutil
import subprocess
import sys

from running import scratch

LOOKS = ("info -f {f} {i}", "map -f {f} {i}", "compare -f {f} -F {f} {i} {i}", "bench -c 1 -f {f} {i}", "dd -f {f} if={i} of=out bs=64k", "map -f qcow2 {o}")
COPIES = ("convert -f {f} -O raw {i} out",)
WRITES = ("resize -f {f} {i} +1M", "convert -f raw -O {f} other {i}")


class Holder:
    """An io tool that has the image open until the end of the block."""

    def __init__(self, *argv):
        self.p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.p.stdin.write("length\n")
        self.p.stdin.flush()
        line = self.p.stdout.readline()
        assert "MiB" in line, (argv, line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.p.communicate(timeout=60)


def fresh(fmt):
    for n in ("image", "over", "other", "out"):
        if os.path.exists(n):
            os.unlink(n)
    for words in (("-f", fmt, "image", "4M"), ("-f", "qcow2", "-b", "image", "-F", fmt, "over"), ("-f", "raw", "other", "1M")):
        subprocess.run(["qemu-img", "create", "-q", *words], check=True)


def status(img, words, fmt):
    p = subprocess.run([img, *words.format(f=fmt, i="image", o="over").split()], capture_output=True, text=True, timeout=60, check=False)
    return p.returncode, p.stderr


def expect(img, words, fmt, allowed, what):
    code, said = status(img, words, fmt)
    assert (code == 0) == allowed, (what, os.path.basename(img), words, fmt, code, said)
    if not allowed:
        assert "image" in said and ("lock" in said or "another program" in said), (words, said)


def check(holder, img, fmt, write):
    fresh(fmt)
    what = f"{os.path.basename(holder)} {'writes' if write else 'reads'}"
    with Holder(holder, *([] if write else ["-r"]), "-f", fmt, "image"):
        for words in LOOKS if fmt == "raw" or not write else LOOKS[::4]:   # a raw image has no metadata that a writer might be changing
            expect(img, words, fmt, fmt == "raw" or not write, what)
        for words in COPIES:
            expect(img, words, fmt, not write, what)
        for words in WRITES if write or fmt == "qcow2" else ():
            expect(img, words, fmt, False, what)
        if write:
            for words in ("info -U -f {f} {i}", "map -U -f {f} {i}", "convert -U -f {f} -O raw {i} out"):
                expect(img, words, fmt, True, what)
    for words in (*LOOKS, *COPIES, *WRITES):
        expect(img, words, fmt, True, "nobody holds it any more")


def main():
    img, io = (os.path.abspath(a) for a in sys.argv[1:3])
    if not shutil.which("qemu-img") or not shutil.which("qemu-io"):
        print("skipped: no qemu-img and qemu-io")
        return 77
    with scratch("lock-", "/var/tmp"):
        for holder, tool in (("qemu-io", img), (io, "qemu-img")):
            for fmt in ("raw", "qcow2"):
                for write in (False, True):
                    check(holder, tool, fmt, write)
        check(io, img, "raw", True)
    return 0


sys.exit(main())
