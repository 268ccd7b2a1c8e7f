#!/usr/bin/env python3
"""A chain of images under random operations, each by a program of its own (so everything is reopened all the time), beside a
model in memory: writes, zeroes, discards, compressed writes, snapshots, resizing, committing, rebasing, flattening, bitmaps.
After each step the disk must be what the model says, every image clean, and what was written be in the bitmap.

usage: chain_test.py LODGE-QEMU-IMG LODGE-QEMU-IO LODGE-QEMU-NBD [--steps N] [--seed N]"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

from running import scratch

GRAN = 65536
KINDS = ["-o cluster_size=4k", "", "-o extended_l2=on,cluster_size=16k", "-o compat=0.10", "-o lazy_refcounts=on,refcount_bits=64", "-o compression_type=zstd"]


class Disk:
    def __init__(self, o, rnd):
        self.o, self.rnd, self.n = o, rnd, 0
        self.now = bytearray()
        self.snaps = {}
        self.must, self.tracked = set(), False
        self.history, self.failed, self.peer = [], False, shutil.which("qemu-img")

    def img(self, *a, ok=(0,)):
        self.history.append("img " + " ".join(a))
        p = subprocess.run([self.o.img, *a], capture_output=True, text=True, timeout=300, check=False)
        self.failed = p.returncode != 0
        if p.returncode not in ok:
            self.fail(f"status {p.returncode}: {p.stdout}{p.stderr}")
        return p.stdout

    def fail(self, why):
        print("\n".join(self.history[-self.o.tail:]))
        sys.exit(f"FAIL: {why}")

    # --- the chain: image 0 is raw, each other one names the one before ---

    def start(self):
        self.now = bytearray(3 << 20)
        self.img("create", "-q", "-f", "raw", "i0", str(len(self.now)))
        self.push()

    def name(self, n=None):
        return f"i{self.n if n is None else n}"

    def push(self):
        kind = self.rnd.choice(KINDS).split()
        below = "raw" if self.n == 0 else "qcow2"
        self.n += 1
        self.img("create", "-q", "-f", "qcow2", *kind, "-b", self.name(self.n - 1), "-F", below, self.name())
        self.snaps, self.tracked, self.must = {}, False, set()
        if "compat=0.10" not in " ".join(kind) and self.rnd.random() < 0.7:
            self.img("bitmap", "--add", "-g", str(GRAN), self.name(), "b")
            self.tracked = True

    def touched(self, off, length):
        self.must.update(range(off // GRAN, (off + length - 1) // GRAN + 1))

    # --- what may happen ---

    def span(self):
        length = min(self.rnd.choice((512, 4096, 16384, 70144, 400 * 512)), len(self.now))
        return self.rnd.randrange((len(self.now) - length) // 512 + 1) * 512, length

    def guest(self):
        cmds = []
        for _ in range(self.rnd.randint(1, 6)):
            off, length = self.span()
            what = self.rnd.random()
            if what < 0.6:
                v = self.rnd.randrange(1, 256)
                cmds.append(f"write -q -P {v} {off} {length}")
                self.now[off:off + length] = bytes([v]) * length
            elif what < 0.8:
                cmds.append(f"write -q -z {'-u ' if what < 0.7 else ''}{off} {length}")
                self.now[off:off + length] = bytes(length)
            else:
                cs = self.cluster()
                off = off // cs * cs
                length = min(cs, len(self.now) - off)
                v = self.rnd.randrange(1, 256)
                cmds.append(f"write -q -c -P {v} {off} {length}")
                self.now[off:off + length] = bytes([v]) * length
            self.touched(off, length)
        self.history += ["io " + c for c in cmds]
        p = subprocess.run([self.o.io, "-f", "qcow2", *[x for c in cmds for x in ("-c", c)], self.name()], capture_output=True, text=True, timeout=300, check=False)
        if p.returncode or p.stdout:
            self.fail(f"io: {p.stdout}{p.stderr}")

    def cluster(self):
        return json.loads(self.img("info", "--output=json", self.name()))["cluster-size"]

    def snapshot(self):
        what = self.rnd.choice("cad")
        if what == "c" or not self.snaps:
            if len(self.snaps) < 3:
                s = f"s{self.rnd.randrange(1 << 30)}"
                self.img("snapshot", "-c", s, self.name())
                self.snaps[s] = bytes(self.now)
            return
        s = self.rnd.choice(sorted(self.snaps))
        self.img("snapshot", "-" + what, s, self.name())
        if what == "a":
            self.now = bytearray(self.snaps[s])
            self.must.clear()       # a smaller disk has no more than that
            self.touched(0, len(self.now))
        else:
            del self.snaps[s]

    def resize(self):
        size = self.rnd.randrange(1 << 20, 5 << 20) // 512 * 512
        v2 = json.loads(self.img("info", "--output=json", self.name()))["format-specific"]["data"]["compat"] == "0.10"
        if v2 and self.snaps:
            return
        self.img("resize", "-q", "--shrink", self.name(), str(size))
        self.now = self.now[:size] + bytes(max(0, size - len(self.now)))
        self.must = {i for i in self.must if i * GRAN < size}

    def forget(self):
        """What a snapshot does not hold itself it reads from the backing file, which has just changed."""
        for s in sorted(self.snaps):
            self.img("snapshot", "-d", s, self.name())
        self.snaps = {}

    def commit(self):
        if self.n < 2 and self.rnd.random() < 0.5:
            return
        # 1: a version 2 image with snapshots cannot grow to the size of the one above it; nothing has changed then
        self.img("commit", "-q", *(["-d"] if self.rnd.random() < 0.5 else []), self.name(), ok=(0, 1))
        self.forget()

    def pop(self):
        """What the top holds goes below, and the top away. Its own snapshots go with it."""
        if self.n < 2:
            return
        self.img("commit", "-q", "-d", self.name(), ok=(0, 1))
        if self.failed:
            return
        os.unlink(self.name())
        self.n -= 1
        info = json.loads(self.img("info", "--output=json", self.name()))
        size = info["virtual-size"]
        self.img("convert", "-f", "qcow2", "-O", "raw", self.name(), "out")
        with open("out", "rb") as f:                    # what lies beyond the upper one's end is the lower one's
            f.seek(len(self.now))
            self.now = self.now[:size] + f.read()
        self.snaps, self.tracked, self.must = {}, False, set()
        for s in info.get("snapshots", []):
            self.img("snapshot", "-d", s["name"], self.name())
        if any(b["name"] == "b" for b in info["format-specific"]["data"].get("bitmaps", [])):
            self.img("bitmap", "--remove", self.name(), "b")

    def rebase(self):
        """Onto the one below the backing file, or onto nothing and back: the disk stays as it is."""
        if self.n < 2:
            return
        to = self.rnd.randrange(self.n - 1)
        self.img("rebase", "-f", "qcow2", "-b", self.name(to), "-F", "raw" if to == 0 else "qcow2", self.name())
        for i in range(to + 1, self.n):
            os.unlink(self.name(i))
        os.rename(self.name(), self.name(to + 1))
        self.n = to + 1
        self.forget()

    # --- what must hold ---

    def check(self):
        out = self.img("convert", "-f", "qcow2", "-O", "raw", self.name(), "out")
        with open("out", "rb") as f:
            got = f.read()
        if got != self.now:
            at = next((i for i, (a, b) in enumerate(zip(got, self.now)) if a != b), min(len(got), len(self.now)))
            self.fail(f"the disk differs from {at} on ({len(got)} and {len(self.now)} bytes) {out}")
        for i in range(1, self.n + 1):
            self.img("check", "-q", self.name(i))
        if self.peer and self.rnd.random() < 0.3:
            p = subprocess.run([self.peer, "check", self.name()], capture_output=True, text=True, timeout=300, check=False)
            if p.returncode:
                self.fail(f"qemu-img check: {p.stdout}{p.stderr}")
        if self.tracked:
            self.check_bitmap()

    def check_bitmap(self):
        """Through a server, as a backup program reads it; NBD's map shows what is dirty as no data."""
        sock = os.path.abspath("s")
        # --fork: it returns when it serves
        p = subprocess.run([self.o.nbd, "--fork", "--pid-file", "pid", "-t", "-r", "-k", sock, "-B", "b", "-f", "qcow2", self.name()], timeout=300, check=False)
        if p.returncode:
            self.fail("lodge nbd does not start")
        try:
            name = 'json:{"driver":"raw","file":{"driver":"nbd","path":"%s","x-dirty-bitmap":"qemu:dirty-bitmap:b"}}' % sock
            extents = json.loads(self.img("map", "--output=json", name))
        finally:
            with open("pid", encoding="ascii") as f:
                pid = int(f.read())
            os.kill(pid, signal.SIGTERM)
            while os.path.exists(f"/proc/{pid}/exe"):    # its image is ours again
                time.sleep(0.005)
        dirty = set()
        for e in extents:
            if not e["data"] and e["length"]:
                dirty.update(range(e["start"] // GRAN, (e["start"] + e["length"] - 1) // GRAN + 1))
        if self.must - dirty:
            self.fail(f"written and not in the bitmap: {sorted(self.must - dirty)[:10]}, in it: {sorted(dirty)[:20]}")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("img")
    ap.add_argument("io")
    ap.add_argument("nbd")
    ap.add_argument("--steps", type=int, default=60)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--tail", type=int, default=25, help="commands to show after a failure")
    o = ap.parse_args()
    o.img, o.io, o.nbd = (os.path.abspath(x) for x in (o.img, o.io, o.nbd))
    with scratch("chain-", None):
        disk = Disk(o, random.Random(o.seed))
        disk.start()
        steps = [disk.guest] * 10 + [disk.snapshot] * 4 + [disk.resize] * 2 + [disk.commit, disk.commit, disk.push, disk.push, disk.pop, disk.rebase]
        for k in range(o.steps):
            disk.rnd.choice(steps)()
            disk.check()
            if disk.n > 6:
                disk.pop()
    print(f"{o.steps} steps, seed {o.seed}: the disk is what it should be")


if __name__ == "__main__":
    main()
