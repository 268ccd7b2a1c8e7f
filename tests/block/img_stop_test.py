#!/usr/bin/env python3
"""Runs of the image tool that do not get to their end: a signal, or a file that may not grow any more. Nothing half stands under a
final name, what was changed in place is still a good image with the old content, and the message names the file and the reason.

usage: img_stop_test.py LODGE-QEMU-IMG; 77 without qemu-img"""
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from running import run, scratch

MIB = 1 << 20
SIZE = 16 * MIB


def prepare():
    rnd = random.Random(8)
    with open("a.raw", "wb") as f:
        f.write(rnd.randbytes(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", str(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", str(SIZE))
    run("qemu-img", "convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "-f", "raw", "a.raw", "top.qcow2")


def unfinished(name):
    return [n for n in os.listdir(".") if n.startswith(name) and n != name]


def stopped(sig, name, started, *argv):
    """Send the signal when started() says that the work is under way; -r makes it last."""
    p = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not started():
        assert p.poll() is None and time.monotonic() < end, (argv, "did not begin")
        time.sleep(0.01)
    p.send_signal(sig)
    p.communicate(timeout=60)
    assert p.returncode == -sig, (argv, sig, p.returncode)


def convert(img):
    def under_way():
        return any(os.stat(n).st_blocks * 512 > MIB for n in unfinished("out")) # data, not only a size
    for fmt in ("raw", "qcow2"):
        for there in (False, True):
            for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
                if there:
                    run(img, "create", "-f", fmt, "out", "1M")
                stopped(sig, "out", under_way, img, "convert", "-r", "8M", "-m", "1", "-f", "raw", "-O", fmt, "a.raw", "out")
                assert not os.path.exists("out"), (fmt, sig, "half an image")
                left = unfinished("out")
                assert not left or sig == signal.SIGKILL, (fmt, sig, left)
                for n in left:
                    os.unlink(n)
    # A name with a colon, said to be a file's.
    run(img, "create", "-f", "qcow2", "file:x:y", "1M")
    run(img, "convert", "-f", "raw", "-O", "qcow2", "a.raw", "file:x:z")
    assert sorted(n for n in os.listdir(".") if ":" in n) == ["x:y", "x:z"]
    run("qemu-img", "compare", "-f", "raw", "a.raw", "./x:z")
    # What stands there stays when nothing can be made of the source.
    run(img, "create", "-f", "raw", "out", "3M")
    for bad in (("-f", "qcow2", "a.raw"), ("-f", "raw", "nothere")):
        run(img, "convert", "-O", "raw", *bad, "out", ok=(1,))
        assert os.path.getsize("out") == 3 * MIB and not unfinished("out"), bad
    os.unlink("out")


def too_large(img):
    """As a full disk, but for the reason's name."""
    for words in (("convert", "-f", "raw", "-O", "raw", "a.raw", "out"), ("convert", "-f", "raw", "-O", "qcow2", "a.raw", "out"),
                  ("convert", "-c", "-f", "raw", "-O", "qcow2", "a.raw", "out"), ("create", "-f", "raw", "-o", "preallocation=full", "out", "16M"),
                  ("create", "-f", "qcow2", "-o", "preallocation=full", "out", "16M")):
        out = run(img, *words, ok=(1,), limit=4 * MIB)
        assert "File too large" in out.splitlines()[-1], (words, out)
        said = [x for x in out.splitlines() if x.startswith("qemu-img:")]
        assert len(said) == 1 and said[0].startswith("qemu-img: out: ") and "out: out" not in said[0], (words, out) # nothing about a file that is gone
        assert "error while writing" not in said[0] or "choose another place" in said[0], (words, out)
        assert not os.path.exists("out") and not unfinished("out"), (words, os.listdir("."))
    for words, images in ((("commit", "t.qcow2"), ("b.qcow2", "t.qcow2")), (("rebase", "-b", "", "u.qcow2"), ("u.qcow2",)),
                          (("resize", "--preallocation=full", "t.qcow2", "64M"), ("t.qcow2",))):
        shutil.copy("base.qcow2", "b.qcow2")
        shutil.copy("top.qcow2", "t.qcow2")
        run("qemu-img", "rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "t.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "u.qcow2")
        limit = max(8 * MIB, os.path.getsize("t.qcow2") + MIB) if words[0] == "resize" else 8 * MIB
        out = run(img, *words, ok=(1,), limit=limit)
        assert any("File too large" in x and x.startswith("qemu-img: " + images[0]) for x in out.splitlines()), (words, out)
        for i in images:
            run("qemu-img", "check", i, ok=(0, 3))
        assert "identical" in run("qemu-img", "compare", "-F", "raw", images[-1], "a.raw"), words


def unreadable(img):
    """The source is named that cannot be read."""
    bad = "driver=raw,file.driver=blkdebug,file.image.filename=a.raw,file.inject-error.0.event=read_aio,file.inject-error.0.errno=5"
    out = run(img, "convert", "--image-opts", "driver=raw,file.filename=a.raw", bad, "-O", "raw", "out", ok=(1,))
    assert "a.raw: error while reading: Input/output error" in out and not os.path.exists("out"), out


def commit(img):
    for sig in (signal.SIGTERM, signal.SIGKILL):
        shutil.copy("base.qcow2", "b.qcow2")
        shutil.copy("top.qcow2", "t.qcow2")
        run("qemu-img", "rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", "t.qcow2")
        stopped(sig, "b.qcow2", lambda: os.path.getsize("b.qcow2") > 2 * MIB, img, "commit", "-r", "8M", "t.qcow2")
        for i in ("b.qcow2", "t.qcow2"):
            run("qemu-img", "check", i, ok=(0, 3))
        assert "identical" in run("qemu-img", "compare", "-F", "raw", "t.qcow2", "a.raw"), sig
        run(img, "commit", "-q", "t.qcow2")
        assert "identical" in run("qemu-img", "compare", "-F", "raw", "b.qcow2", "a.raw"), sig


def main():
    img = os.path.abspath(sys.argv[1])
    if not shutil.which("qemu-img"):
        print("skipped: no qemu-img")
        return 77
    with scratch("img-stop-", "/var/tmp"):
        prepare()
        for part in (convert, too_large, unreadable, commit):
            part(img)
        return 0


sys.exit(main())
