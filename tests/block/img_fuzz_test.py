#!/usr/bin/env python3
"""Damaged images and the image tool's verbs.

First qcow2 images with one deliberate damage each: `check` and `check -r all` end with qemu-img's exit status, and where they say that all is well
afterwards qemu-img agrees. Then images of every format with random bytes where the format keeps its tables: info, check, map, convert,
compare, measure and writing end with an error or without, never by a signal or a sanitizer, and in bounded time and memory.

usage: img_fuzz_test.py LODGE-QEMU-IMG LODGE-QEMU-IO [IMAGES-PER-FORMAT [SEED]]; exit status 77 without qemu-img and qemu-io"""
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile

from running import scratch

COPIED = 1 << 63
FORMATS = {"raw": 4096, "qcow2": 6 * 65536, "vmdk": 2 * 65536, "vdi": 4096, "vpc": 4096, "vhdx": 3 << 20}     # where the tables are
VERBS = ("info --output=json", "check", "check -r all", "map --output=json", "convert -O raw {} out", "convert -c -O qcow2 {} out", "measure -O qcow2 {}")


def number(image, off):
    with open(image, "rb") as f:
        f.seek(off)
        return int.from_bytes(f.read(8), "big")


def be(v):
    return v.to_bytes(8, "big")


def make_good():
    with open("raw", "wb") as f:
        f.write(b"raw!" * (16 * 1024))
        f.seek(1 << 20)
        f.write(random.Random(1).randbytes(190000))
        f.truncate(3 << 20)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "raw", "q"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 512k 100k", "-c", "write -z 2M 64k", "q"], check=True, stdout=subprocess.DEVNULL)
    shutil.copy("q", "snap")
    subprocess.run(["qemu-img", "snapshot", "-c", "one", "snap"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 9 1M 130k", "snap"], check=True, stdout=subprocess.DEVNULL)


def damages():
    """(image, [(offset, bytes)]) by name."""
    table, l1 = number("q", 48), number("q", 40)
    block, l2 = number("q", table), number("q", l1) & ~COPIED
    entry = number("q", l2)
    sblock, snaps = number("snap", number("snap", 48)), number("snap", 64)
    return {
        "none": ("q", []), "refcount 0": ("q", [(block + 10, b"\0\0")]), "refcount 3": ("q", [(block + 10, b"\0\3")]),
        "leak": ("q", [(block + 2 * (os.path.getsize("q") // 65536 - 1), b"\0\2")]), "count behind the end": ("q", [(block + 120, b"\0\1")]),
        "outside": ("q", [(l2 + 40, be(COPIED | 0x7fff0000))]), "unaligned": ("q", [(l2, be(entry | 0x200))]),
        "not COPIED": ("q", [(l2, be(entry & ~COPIED))]), "L1 not COPIED": ("q", [(l1, be(number("q", l1) & ~COPIED))]),
        "L1 outside": ("q", [(l1, be(COPIED | 0x7fff0000))]), "reserved": ("q", [(l2, be(entry | 1 << 57))]),
        "data is refcount table": ("q", [(l2 + 56, be(COPIED | table))]), "data is L2": ("q", [(l2 + 56, be(COPIED | l2))]),
        "data is L1": ("q", [(l2 + 56, be(COPIED | l1))]), "twice": ("q", [(l2 + 56, be(entry))]), "no refcounts": ("q", [(table, be(0))]),
        "refcount table outside": ("q", [(48, be(1 << 40))]),
        "refcount block outside": ("q", [(table, be(0x7fff0000))]), "refcount block uncounted": ("q", [(block + 2 * (block >> 16), b"\0\0")]),
        "all counts 0": ("q", [(block, bytes(64))]), "compressed outside": ("q", [(l2 + 56, be(1 << 62 | 5 << 54 | 0x7f000000))]),
        "snapshot's L1 outside": ("snap", [(snaps, be(0x7fff0000))]), "snapshot's count low": ("snap", [(sblock + 10, b"\0\1")]),
        "snapshot's count high": ("snap", [(sblock + 10, b"\0\7")]), "dirty": ("q", [(72, be(1)), (block + 10, b"\0\0")]), "corrupt": ("q", [(72, be(2))]),
    }


def patch(image, edits):
    with open(image, "r+b") as f:
        for off, data in edits:
            f.seek(off)
            f.write(data)


def limits():
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (100, 100))


def run(*argv):
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=300, preexec_fn=limits, check=False)
    if p.returncode < 0 or p.returncode not in (0, 1, 2, 3, 4, 63) or "Sanitizer" in p.stderr or "runtime error" in p.stderr:
        raise SystemExit(f"FAIL {' '.join(argv)}: status {p.returncode}\n{p.stdout[-500:]}{p.stderr[-3000:]}\nthe image is kept: {keep()}")
    return p.returncode


def keep():
    path = tempfile.mkdtemp(prefix="img-fuzz-kept-", dir="/var/tmp")
    for name in os.listdir("."):
        if name.startswith("w."):
            shutil.copy(name, path)
    return path


def compare_repairs(img):
    make_good()
    for name, (base, edits) in damages().items():
        got = []
        for tool in ("qemu-img", img):
            shutil.copy(base, "w.qcow2")
            patch("w.qcow2", edits)
            got.append((run(tool, "check", "w.qcow2"), run(tool, "check", "-r", "all", "w.qcow2"), run("qemu-img", "check", "w.qcow2")))
        if got[0] != got[1]:
            raise SystemExit(f"FAIL {name}: check, check -r all, then qemu-img's check: qemu-img {got[0]}, lodge {got[1]}")


def mutate(rnd, data, fmt):
    where = min(FORMATS[fmt], len(data))
    for _ in range(rnd.randrange(1, 6)):
        at = rnd.randrange(rnd.choice((min(512, where), where)))
        for _ in range(50):
            if any(data[at:at + 8]):
                break
            at = rnd.randrange(where)
        n = rnd.choice((1, 2, 4, 8))
        value = rnd.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1, rnd.getrandbits(64), 65536, 512))
        data[at:at + n] = (value % 256**n).to_bytes(n, rnd.choice(("big", "little")))
    if rnd.random() < 0.1:
        del data[rnd.randrange(len(data)):]


def fuzz(img, io, fmt, rnd):
    with open(f"good.{fmt}", "rb") as f:
        data = bytearray(f.read())
    mutate(rnd, data, fmt)
    image = f"w.{fmt}"
    opts = [] if rnd.random() < 0.3 else ["-f", fmt]
    for verb in VERBS:
        with open(image, "wb") as f:
            f.write(data)
        words = (verb if "{}" in verb else verb + " {}").format(image).split()
        run(img, words[0], *opts, *words[1:])
        if os.path.exists("out"):
            os.unlink("out")
    run(img, "compare", *opts, *(["-F", fmt] if opts else []), image, f"good.{fmt}")
    run(io, *opts, "-c", "write 0 64k", "-c", "write -z 1M 128k", "-c", "discard 512k 64k", "-c", "read 1500k 64k", "-c", "flush", image)
    run(io, *opts, "-r", "-c", "read 0 64k", "-c", "read 1M 1M", "-c", "map", "-c", "info", image)


def main():
    img, io = (os.path.abspath(x) for x in sys.argv[1:3])
    if not shutil.which("qemu-io") or not shutil.which("qemu-img"):
        print("skipped: no qemu-io, or no qemu-img")
        return 77
    images, seed = int(sys.argv[3]) if len(sys.argv) > 3 else 6, int(sys.argv[4]) if len(sys.argv) > 4 else 1
    with scratch("img-fuzz-", "/var/tmp"):
        compare_repairs(img)
        for fmt in FORMATS:
            subprocess.run(["qemu-img", "convert", "-O", fmt, "snap" if fmt == "qcow2" else "q", f"good.{fmt}"], check=True)
        shutil.copy("snap", "good.qcow2")
        for k in range(images):
            for i, fmt in enumerate(FORMATS):
                fuzz(img, io, fmt, random.Random(seed * 1000003 + k * 16 + i))
        print(f"{len(damages())} damages, {images * len(FORMATS)} images")
    return 0


sys.exit(main())
