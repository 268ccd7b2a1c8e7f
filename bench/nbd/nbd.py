#!/usr/bin/env python3
"""NBD throughput beside qemu-nbd and qemu-img: alternating runs (A B B A), medians, ratios (above 1: Lodge is faster).

usage: nbd.py BUILD-DIR [--runs N] [--seconds S] [--size MIB] [--dir DIR] [--only 'server nbdcopy*',...] [--list]
  server: `qemu-img bench`, nbdcopy and `qemu-img convert` against lodge nbd and against qemu-nbd
  client: `lodge img` and `qemu-img` against one qemu-nbd
A run takes about S seconds of QEMU's: `bench` has that many requests, what copies a disk does it that often."""
import argparse
import fnmatch
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time

PIN = os.environ.get("PIN_CLIENT", "").split()      # words before the measured program, PIN_SERVER before servers: "taskset -c 0"
PIN_SERVER = os.environ.get("PIN_SERVER", "").split()


def options():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("build")
    a.add_argument("--runs", type=int, default=5)
    a.add_argument("--seconds", type=float, default=2)
    a.add_argument("--size", type=int, default=256)
    a.add_argument("--dir", default="/var/tmp", help="where the served files are")
    a.add_argument("--only", default="*", help="names with * and ?, between commas")
    a.add_argument("--list", action="store_true")
    return a.parse_args()


def timed(args, times=1):
    t = time.monotonic()
    for _ in range(times):
        subprocess.run([*PIN, *args], check=True, stdout=subprocess.DEVNULL)
    return (time.monotonic() - t) / times


def sized(seconds, ours, theirs):
    """Both commands with COUNT in its place, and how often a run does them."""
    if "COUNT" not in theirs:
        timed(ours)
        return ours, theirs, max(1, min(50, round(seconds / timed(theirs))))
    n, took = 100, 0
    while took < seconds / 10:
        n *= 4
        took = timed([w.replace("COUNT", str(n)) for w in theirs])
    n = str(max(1, int(n * seconds / took)))
    return [w.replace("COUNT", n) for w in ours], [w.replace("COUNT", n) for w in theirs], 1


def compare(what, opt, ours, theirs):
    ours, theirs, times = sized(opt.seconds, ours, theirs)
    res = {0: [], 1: []}
    for i in range(opt.runs):
        for k in (0, 1) if i % 2 else (1, 0):
            res[k].append(timed((ours, theirs)[k], times))
    o, t = (statistics.median(res[k]) for k in (0, 1))
    print(f"{what:46} lodge {o:7.3f} s  qemu {t:7.3f} s  ratio {t / o:5.2f} (least {min(res[1]) / min(res[0]):5.2f})", flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A disk on a Unix socket and on a TCP port: two servers of one file, which are not used at once."""

    def __init__(self, tool, image):
        self.path, self.port = image + ".sock", free_port()
        common = ["-t", "-e", "0", "-f", "raw", "--cache=writeback", "--fork"]
        self.pids = []
        for n, how in enumerate((["-k", self.path], ["-b", "127.0.0.1", "-p", str(self.port)])):
            pid = f"{image}.{n}.pid"
            subprocess.run([*PIN_SERVER, *tool, *common, f"--pid-file={pid}", *how, image if n == 0 else image + ".tcp"], check=True)
            with open(pid, encoding="ascii") as f:
                self.pids.append(int(f.read()))

    def name(self, tcp):
        return f"nbd://127.0.0.1:{self.port}" if tcp else f"nbd+unix:///?socket={self.path}"

    def end(self):
        for p in self.pids:
            os.kill(p, 15)


def bench(tool, url, size, depth, write):
    return [tool, "bench", "-f", "raw", "-c", "COUNT", "-d", str(depth), "-s", str(size), "-t", "writeback", *(["-w"] if write else []), url]


def cases(build, image, ours, theirs):
    """Name, Lodge's command, QEMU's."""
    img = os.path.join(build, "lodge-qemu-img")
    out = image + ".out"
    for tcp in (False, True):
        net = " tcp" if tcp else ""
        o, t = ours.name(tcp), theirs.name(tcp)
        for size in (4096, 65536, 1 << 20):
            for depth in (1, 32):
                for write in (False, True):
                    name = f"{size >> 10}k d{depth} {'write' if write else 'read'}{net}"
                    yield "server bench " + name, bench("qemu-img", o, size, depth, write), bench("qemu-img", t, size, depth, write)
                    yield "client bench " + name, bench(img, t, size, depth, write), bench("qemu-img", t, size, depth, write)
        if shutil.which("nbdcopy"):
            yield "server nbdcopy out" + net, ["nbdcopy", o, "null:"], ["nbdcopy", t, "null:"]
            yield "server nbdcopy out, 1 connection" + net, ["nbdcopy", "-C", "1", o, "null:"], ["nbdcopy", "-C", "1", t, "null:"]
            yield "server nbdcopy in" + net, ["nbdcopy", image, o], ["nbdcopy", image, t]
            yield "server nbdcopy in, 1 connection" + net, ["nbdcopy", "-C", "1", image, o], ["nbdcopy", "-C", "1", image, t]
        yield "server convert in" + net, ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, o], ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, t]
        yield "server convert out" + net, ["qemu-img", "convert", "-f", "raw", "-O", "raw", o, out], ["qemu-img", "convert", "-f", "raw", "-O", "raw", t, out]
        yield "client convert in" + net, [img, "convert", "-n", "-f", "raw", "-O", "raw", image, t], ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, t]
        yield "client convert out" + net, [img, "convert", "-f", "raw", "-O", "raw", t, out], ["qemu-img", "convert", "-f", "raw", "-O", "raw", t, out]
        yield "client convert out qcow2" + net, [img, "convert", "-f", "raw", "-O", "qcow2", t, out], ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", t, out]
        yield "client compare" + net, [img, "compare", "-f", "raw", "-F", "raw", t, t], ["qemu-img", "compare", "-f", "raw", "-F", "raw", t, t]


def main():
    opt = options()
    build, top = os.path.abspath(opt.build), tempfile.mkdtemp(prefix="nbd-bench-", dir=opt.dir)
    names = [os.path.join(top, n) for n in ("source", "lodge", "qemu")]
    servers = []
    try:
        for name in names:
            for tail in ("", ".tcp"):
                with open(name + tail, "wb") as f:
                    for _ in range(opt.size):
                        f.write(os.urandom(1 << 20))
        servers = [Server([os.path.join(build, "lodge-qemu-nbd")], names[1]), Server(["qemu-nbd"], names[2])]
        for what, ours, theirs in cases(build, names[0], *servers):
            if any(fnmatch.fnmatch(what, w) for w in opt.only.split(",")):
                if opt.list:
                    print(what)
                else:
                    compare(what, opt, ours, theirs)
    finally:
        for s in servers:
            s.end()
        shutil.rmtree(top, ignore_errors=True)


if __name__ == "__main__":
    main()
