#!/usr/bin/env python3
"""VMDK, VDI, VHD and VHDX images as qemu-img makes them read as qemu-img reads them; bad ones are refused.

usage: foreign_test.py LODGE-QEMU-IMG; exit status 77 without qemu-img."""
import json
import os
import random
import shutil
import subprocess
import sys

from running import scratch

KINDS = [("vmdk", f"subformat={s}") for s in ("monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse",
                                              "twoGbMaxExtentFlat")] + [
    ("vmdk", "compat6=on"), ("vdi", None), ("vdi", "static=on"), ("vpc", None), ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"), ("vhdx", None), ("vhdx", "subformat=fixed"), ("vhdx", "block_size=1M")]
SIZE = 9 * 1024 * 1024 + 512 * 7


def run(*args, status=0):
    p = subprocess.run(args, capture_output=True, text=True, timeout=120)
    if p.returncode != status:
        raise SystemExit(f"FAIL {' '.join(args)}: status {p.returncode}, not {status}\n{p.stdout}{p.stderr}")
    return p.stdout if status == 0 else p.stderr


def make_source():
    rnd = random.Random(5)
    with open("src.raw", "wb") as f:
        f.truncate(SIZE)
        for _ in range(20):
            f.seek(rnd.randrange(SIZE // 512 - 200) * 512)
            f.write(rnd.randbytes(rnd.randrange(1, 200) * 512))


def one(fmt, options, n):
    image = f"i{n}.{fmt}"
    run(qemu, "convert", "-O", fmt, *(("-o", options) if options else ()), "src.raw", image)
    run(qemu, "convert", "-f", fmt, "-O", "raw", image, "theirs.raw")
    run(lodge, "convert", "-f", fmt, "-O", "raw", image, "ours.raw")
    run("cmp", "theirs.raw", "ours.raw")
    run(lodge, "compare", "-f", fmt, "-F", "raw", image, "theirs.raw")
    ours, theirs = (json.loads(run(t, "info", "--output=json", "-f", fmt, image)) for t in (lodge, qemu))
    for key in ("virtual-size", "format", "cluster-size"):
        assert ours.get(key) == theirs.get(key), (fmt, options, key, ours.get(key), theirs.get(key))
    if not (options or "").endswith("fixed,force_size=on"):  # a fixed VHD has no magic in front
        assert json.loads(run(lodge, "info", "--output=json", image))["format"] == fmt
    # Cut off in the middle: an error, never zeroes in silence.
    big = max((f for f in os.listdir(".") if f.startswith(f"i{n}")), key=os.path.getsize)
    os.truncate(big, os.path.getsize(big) // 2)
    assert "i" in run(lodge, "convert", "-f", fmt, "-O", "raw", image, "cut.raw", status=1)
    assert not os.path.exists("cut.raw"), "a half image was left"
    return 1


def parent():
    run(qemu, "create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "over.vmdk")
    run("qemu-io", "-f", "vmdk", "-c", "write -P 7 1M 300k", "over.vmdk")
    run(qemu, "convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "theirs.raw")
    run(lodge, "convert", "-f", "vmdk", "-O", "raw", "over.vmdk", "ours.raw")
    run("cmp", "theirs.raw", "ours.raw")


def refused():
    run(qemu, "create", "-f", "vdi", "w.vdi", "4M")
    message = run(lodge, "resize", "-f", "vdi", "w.vdi", "8M", status=1)
    assert "convert" in message and len(message.splitlines()) == 1, message
    message = run(lodge, "create", "-f", "vdi", "new.vdi", "4M", status=1)
    assert "vdi" in message and not os.path.exists("new.vdi"), message


lodge = os.path.abspath(sys.argv[1])
qemu = shutil.which("qemu-img")
if not qemu:
    print("SKIP: no qemu-img")
    sys.exit(77)
with scratch("foreign-", None):
    make_source()
    run(qemu, "convert", "-O", "vmdk", "src.raw", "base.vmdk")
    done = sum(one(*k, n) for n, k in enumerate(KINDS))
    parent()
    refused()
print(f"{done} images, a parent, what is refused")
