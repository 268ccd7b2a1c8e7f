#!/usr/bin/env python3
"""NBD throughput beside qemu-nbd and qemu-img: alternating runs, medians, ratios (above 1: Lodge is faster).

usage: nbd.py BUILD-DIR [--runs N] [--size MIB]
  server: `qemu-img bench` and nbdcopy against lodge nbd and against qemu-nbd
  client: `lodge img bench` and `qemu-img bench` against one qemu-nbd"""
import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time

a = argparse.ArgumentParser()
a.add_argument("build")
a.add_argument("--runs", type=int, default=5)
a.add_argument("--size", type=int, default=256)
a = a.parse_args()
build = os.path.abspath(a.build)
top = tempfile.mkdtemp(prefix="nbd-bench-", dir="/var/tmp")
os.chdir(top)
image, other = os.path.join(top, "disk.raw"), os.path.join(top, "other.raw")
with open(image, "wb") as f:
    for _ in range(a.size):
        f.write(os.urandom(1 << 20))
shutil.copy(image, other)


def serve(tool, path, image):
    p = subprocess.Popen([tool, "-k", path, "-t", "-e", "0", "-f", "raw", "--cache=writeback", image])
    while not os.path.exists(path):
        time.sleep(0.01)
    return p


def timed(args):
    t = time.monotonic()
    subprocess.run(args, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - t


def compare(what, ours, theirs):
    for x in (ours, theirs):
        timed(x)
    r = [(timed(ours), timed(theirs)) for _ in range(a.runs)]
    o, t = (statistics.median(x[i] for x in r) for i in (0, 1))
    print(f"{what:34} lodge {o:6.3f} s  qemu {t:6.3f} s  ratio {t / o:5.2f}", flush=True)


ours, theirs = os.path.join(top, "o"), os.path.join(top, "t")
servers = [serve(os.path.join(build, "lodge-qemu-nbd"), ours, image), serve("qemu-nbd", theirs, other)]


def bench(tool, path, size, depth, write):
    n = {4096: 12000, 65536: 6000, 1 << 20: 800}[size] // (3 if depth == 1 and size == 4096 else 1)
    return [tool, "bench", "-f", "raw", "-c", str(n), "-d", str(depth), "-s", str(size), "-t", "writeback", *(["-w"] if write else []),
            f"nbd:unix:{path}"]


try:
    for size in (4096, 65536, 1 << 20):
        for depth in (1, 32):
            for write in (False, True):
                name = f"{size >> 10:4}k depth {depth:2} {'write' if write else 'read'}"
                compare("server " + name, bench("qemu-img", ours, size, depth, write), bench("qemu-img", theirs, size, depth, write))
                img = os.path.join(build, "lodge-qemu-img")
                compare("client " + name, bench(img, theirs, size, depth, write), bench("qemu-img", theirs, size, depth, write))
    if shutil.which("nbdcopy"):
        compare("server nbdcopy out", ["nbdcopy", f"nbd+unix:///?socket={ours}", "null:"], ["nbdcopy", f"nbd+unix:///?socket={theirs}", "null:"])
        compare("server nbdcopy out, 1 connection", ["nbdcopy", "-C", "1", f"nbd+unix:///?socket={ours}", "null:"],
                ["nbdcopy", "-C", "1", f"nbd+unix:///?socket={theirs}", "null:"])
        compare("server nbdcopy in", ["nbdcopy", image, f"nbd+unix:///?socket={ours}"], ["nbdcopy", image, f"nbd+unix:///?socket={theirs}"])
finally:
    for p in servers:
        p.terminate()
        p.wait()
    os.chdir("/")
    shutil.rmtree(top)
