#!/usr/bin/env python3
"""Images that Lodge writes are clean and equal for Debian's qemu-img, and the reverse, over a matrix of options.

usage: interchange_test.py LODGE-QEMU-IMG [--full]; exit status 77 without qemu-img."""
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time

from listening import wait_listening

SIZE = 3 * 1024 * 1024 + 512 * 7
cases = 0
what = ""


def run(*args, ok=(0,)):
    p = subprocess.run(args, capture_output=True, text=True, timeout=300)
    if p.returncode not in ok:
        shutil.copytree(".", "/tmp/interchange-failed", dirs_exist_ok=True) if os.environ.get("KEEP") else None
        raise SystemExit(f"FAIL [{what}] {' '.join(args)}: status {p.returncode}\n{p.stdout}{p.stderr}")
    return p.stdout


def clean(tool, image):
    out = json.loads(run(tool, "check", "--output=json", image))
    assert not out.get("leaks") and not out.get("corruptions") and not out["check-errors"], (tool, image, out)


def same(a, b, fa=None, fb=None):
    for tool in (qemu, lodge):
        run(tool, "compare", *(("-f", fa) if fa else ()), *(("-F", fb) if fb else ()), a, b)


def make_raw(path, seed):
    rnd = random.Random(seed)
    with open(path, "wb") as f:
        f.truncate(SIZE)
        for _ in range(24):
            n = rnd.choice((512, 4096, 65536, 200000))
            f.seek(rnd.randrange(0, SIZE - n) // 512 * 512)
            f.write(rnd.choice((rnd.randbytes(n), bytes([rnd.randrange(1, 256)]) * n, bytes(n),
                                (rnd.randbytes(20011) * 10)[:n])))  # repeats farther back than 4 KiB
        f.truncate(SIZE)


def options():
    """Every cluster size and refcount width, versions, compression, subclusters, preallocation."""
    for cs in (512, 1024, 4096, 16384, 65536, 262144, 2097152):
        yield f"cluster_size={cs},compat=0.10", cs
        for bits in (1, 2, 4, 8, 16, 32, 64):
            if not full and bits not in (1, 16) and cs not in (512, 65536):
                continue
            yield f"cluster_size={cs},refcount_bits={bits}", cs
        if cs >= 16384:
            yield f"cluster_size={cs},extended_l2=on", cs
        yield f"cluster_size={cs},compression_type=zstd,lazy_refcounts=on", cs
    for p in ("metadata", "falloc", "full"):
        for cs in (4096, 65536):
            yield f"cluster_size={cs},preallocation={p}", cs
        yield f"cluster_size=65536,extended_l2=on,preallocation={p}", 65536
    yield "data_file=DATA", 65536
    yield "data_file=DATA,data_file_raw=on", 65536


def one(opts, cs, maker, other, raw, compress):
    """`maker` converts, both check and compare, `other` reads it back, snapshots and changes it, maker must see that."""
    global cases, what
    cases += 1
    what = f"{opts} made by {maker}"
    for f in ("a.qcow2", "b.raw", "c.qcow2"):
        if os.path.exists(f):
            os.unlink(f)
    data = "DATA" in opts
    if data and os.path.exists("ext.raw"):
        os.unlink("ext.raw")
    o = opts.replace("DATA", "ext.raw")
    if data:
        run(maker, "create", "-q", "-f", "qcow2", "-o", o, "a.qcow2", str(SIZE))
        run(maker, "convert", "-n", "-f", "raw", "-O", "qcow2", raw, "a.qcow2")
    else:
        run(maker, "convert", *(["-c"] if compress else []), "-f", "raw", "-O", "qcow2", "-o", o, raw, "a.qcow2")
    for tool in (qemu, lodge):
        clean(tool, "a.qcow2")
    same(raw, "a.qcow2", "raw", "qcow2")
    run(other, "convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "b.raw")
    with open(raw, "rb") as f, open("b.raw", "rb") as g:
        assert f.read() == g.read(), (opts, maker)
    if data:
        return
    # snapshots, writes over them, going back
    # going to a snapshot needs one reference more for a moment in QEMU than 2 bits can count
    # (and many small compressed clusters share one that narrow counts can not count twice)
    widths = {"refcount_bits=1", "refcount_bits=2"} | ({"refcount_bits=4", "refcount_bits=8"} if compress else set())
    narrow = bool(widths & set(opts.split(",")))
    if not narrow:
        run(other, "snapshot", "-c", "one", "a.qcow2")
        for tool in (qemu, lodge):
            clean(tool, "a.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 12345 77777", "-c", "write -z 1M 300k", "-c", "discard 2M 256k", "a.qcow2")
    for tool in (qemu, lodge):
        clean(tool, "a.qcow2")
    run(maker, "convert", "-f", "qcow2", "-O", "qcow2", "a.qcow2", "c.qcow2")
    same("a.qcow2", "c.qcow2", "qcow2", "qcow2")
    if not narrow:
        run(maker, "snapshot", "-c", "two", "a.qcow2")
        run(other, "snapshot", "-a", "one", "a.qcow2")
        for tool in (qemu, lodge):
            clean(tool, "a.qcow2")
        same(raw, "a.qcow2", "raw", "qcow2")
        run(maker, "snapshot", "-a", "two", "a.qcow2")
        same("c.qcow2", "a.qcow2", "qcow2", "qcow2")
        run(other, "snapshot", "-d", "one", "a.qcow2")
        clean(lodge, "a.qcow2")
        run(maker, "snapshot", "-d", "two", "a.qcow2")
        for tool in (qemu, lodge):
            clean(tool, "a.qcow2")
        same("c.qcow2", "a.qcow2", "qcow2", "qcow2")
    for size in (SIZE + 5 * 1024 * 1024, 1024 * 1024 + 1024):
        run(other, "resize", "--shrink", "a.qcow2", str(size))
        for tool in (qemu, lodge):
            clean(tool, "a.qcow2")
        run(other, "resize", "--shrink", "c.qcow2", str(size))
        same("c.qcow2", "a.qcow2", "qcow2", "qcow2")


def plain(extents):
    """QEMU looks for holes of the file inside of allocated clusters when it guesses preallocation; leave that out."""
    out = []
    for e in extents:
        if e["data"]:
            e["zero"] = False
            if out and out[-1]["data"] and out[-1]["depth"] == e["depth"] and out[-1].get("offset", -1) + out[-1]["length"] == e.get("offset"):
                out[-1]["length"] += e["length"]
                continue
        out.append(e)
    return out


def chain(opts, maker, other, raw, seed):
    """Backing files: writes into an overlay, rebase, commit; all against a raw file with the same writes."""
    global cases, what
    cases += 1
    what = f"chain {opts} made by {maker}"
    rnd = random.Random(seed)
    for f in ("base.qcow2", "mid.qcow2", "top.qcow2", "flat.raw", "empty.qcow2"):
        if os.path.exists(f):
            os.unlink(f)
    run(maker, "convert", "-f", "raw", "-O", "qcow2", "-o", opts, raw, "base.qcow2")
    run(other, "create", "-q", "-f", "qcow2", "-o", opts, "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2")
    run(maker, "create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", str(SIZE + 1024 * 1024))
    shutil.copy(raw, "flat.raw")
    os.truncate("flat.raw", SIZE + 1024 * 1024)
    for image in ("mid.qcow2", "top.qcow2"):
        cmds = []
        for _ in range(12):
            n = rnd.choice((512, 5000, 70000)) // 512 * 512
            off = rnd.randrange(0, SIZE - n) // 512 * 512
            cmds += ["-c", rnd.choice((f"write -P {rnd.randrange(1, 255)} {off} {n}", f"write -z {off} {n}", f"write -zu {off} {n}"))]
        run("qemu-io", "-f", "qcow2", *cmds, image)
        run("qemu-io", "-f", "raw", *cmds, "flat.raw")
    same("flat.raw", "top.qcow2", "raw", "qcow2")
    for image in ("base.qcow2", "mid.qcow2", "top.qcow2"):
        for tool in (qemu, lodge):
            clean(tool, image)
    maps = [plain(json.loads(run(t, "map", "--output=json", "top.qcow2"))) for t in (qemu, lodge)]
    assert "extended_l2" in opts or maps[0] == maps[1], (what, [d for d in zip(*maps) if d[0] != d[1]][:1])
    run(maker, "rebase", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    same("flat.raw", "top.qcow2", "raw", "qcow2")
    run(other, "commit", "-q", "top.qcow2")
    same("flat.raw", "base.qcow2", "raw", "qcow2")
    same("flat.raw", "top.qcow2", "raw", "qcow2")
    run(maker, "rebase", "-b", "", "top.qcow2")
    same("flat.raw", "top.qcow2", "raw", "qcow2")
    for image in ("base.qcow2", "top.qcow2"):
        for tool in (qemu, lodge):
            clean(tool, image)


def amend(raw):
    global cases, what
    for bits in (1, 2, 8, 64, 16):
        cases += 1
        run(lodge, "convert", "-f", "raw", "-O", "qcow2", raw, "m.qcow2")
        run(lodge, "amend", "-o", f"refcount_bits={bits}", "m.qcow2")
        clean(qemu, "m.qcow2")
        same(raw, "m.qcow2", "raw", "qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -z 0 1M", "m.qcow2")
    run(qemu, "convert", "-O", "raw", "m.qcow2", "m.raw")
    for version in ("0.10", "1.1"):
        run(lodge, "amend", "-o", f"compat={version}", "m.qcow2")
        clean(qemu, "m.qcow2")
        same("m.raw", "m.qcow2", "raw", "qcow2")
        assert json.loads(run(qemu, "info", "--output=json", "m.qcow2"))["format-specific"]["data"]["compat"] == version


def amend_refused():
    """What version 2 cannot say is named, with what to do, and the image stays as it is."""
    run(qemu, "create", "-q", "-f", "qcow2", "am.qcow2", "2M")
    run("qemu-io", "-c", "write -P 3 0 128k", "-c", "write -z 0 64k", "am.qcow2")
    run(lodge, "snapshot", "-c", "with zeroes", "am.qcow2")
    run(lodge, "bitmap", "--add", "am.qcow2", "bits")
    before = open("am.qcow2", "rb").read()
    p = subprocess.run([lodge, "amend", "-o", "compat=0.10", "am.qcow2"], capture_output=True, text=True, check=False)
    assert p.returncode == 1 and "bitmap --remove" in p.stderr, p.stderr
    assert open("am.qcow2", "rb").read() == before
    run(lodge, "bitmap", "--remove", "am.qcow2", "bits")
    run(lodge, "amend", "-o", "compat=0.10", "am.qcow2")
    clean(qemu, "am.qcow2")


def amend_snapshots(seed, cs):
    """Version 2 has no zero clusters: those of snapshots, which share tables and clusters, become holes, or clusters where a backing file would show through.
    (qemu-img writes zeroes to what a zero cluster still holds, though another snapshot shows it: what is right is said by each snapshot before.)"""
    global what
    what, rnd, unit, size = f"amend, seed {seed}", random.Random(seed), max(cs, 4096), 2 << 20
    backing = rnd.random() < 0.7
    run(qemu, "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cs}", *(("-b", "raw", "-F", "raw") if backing else ()), "z.qcow2", str(size))
    names = []
    for n in range(rnd.randint(2, 5)):
        cmds = [f"{rnd.choice((f'write -P {rnd.randint(1, 255)}', 'write -z', 'write -z', 'write -zu', 'discard'))} {at} {rnd.randint(1, 4) * unit}"
                for at in (rnd.randrange(0, size // unit - 4) * unit for _ in range(rnd.randint(0, 12)))]
        run(rnd.choice(("qemu-io", lodge_io)), "-f", "qcow2", "-d", "unmap", *(x for c in cmds for x in ("-c", c)), "z.qcow2")
        names.append(f"s{n}")
        run(rnd.choice((qemu, lodge)), "snapshot", "-c", names[-1], "z.qcow2")
    for n in names:
        run(qemu, "convert", "-l", n, "-O", "raw", "z.qcow2", n)
    run(lodge, "amend", "-o", "compat=0.10", "z.qcow2")
    clean(qemu, "z.qcow2")
    clean(lodge, "z.qcow2")
    while names:
        for n in names:
            run(rnd.choice((qemu, lodge)), "snapshot", "-a", n, "z.qcow2")
            same(n, "z.qcow2", "raw", "qcow2")
        run(rnd.choice((qemu, lodge)), "snapshot", "-d", names.pop(rnd.randrange(len(names))), "z.qcow2")
        clean(qemu, "z.qcow2")


def log_lines(size):
    """What a system writes down about itself: short repeats with numbers among them, where lazy matching tells."""
    rnd, out, t = random.Random(7), [], 0
    while size > 0:
        t += rnd.randrange(90)
        out.append(f"Nov {1 + t // 86400 % 30:2} {t // 3600 % 24:02}:{t // 60 % 60:02}:{t % 60:02} host " + rnd.choice((
            f"sshd[{rnd.randrange(30000)}]: Accepted publickey for root from 192.168.1.{rnd.randrange(256)} port {rnd.randrange(65536)} ssh2",
            f"systemd[1]: Started Session {rnd.randrange(3000)} of user root.", f"cron[{rnd.randrange(30000)}]: (root) CMD (run-parts /etc/cron.hourly)",
            f"kernel: usb 1-{rnd.randrange(8)}: new high-speed USB device number {rnd.randrange(128)}")) + "\n")
        size -= len(out[-1])
    return "".join(out).encode()


def packed_sizes():
    """Compressed images are at most 2 % larger than qemu-img's: logs, this folder's sources, programs."""
    global what
    here = os.path.dirname(os.path.abspath(__file__))
    sources = b"".join(open(os.path.join(here, f), "rb").read() for f in sorted(os.listdir(here)) if f.endswith((".c", ".py")))
    for name, data in (("log", log_lines(4 << 20)), ("sources", sources), ("program", open(shutil.which("qemu-img"), "rb").read())):
        with open("in.raw", "wb") as f:
            f.write(data[:len(data) // 65536 * 65536])
        for cs in (512, 4096, 65536, 2097152):
            what = f"size of {name} in clusters of {cs}"
            size = {}
            for tool in (qemu, lodge):
                run(tool, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cs}", "in.raw", "z.qcow2")
                size[tool] = os.path.getsize("z.qcow2")
            assert size[lodge] <= size[qemu] * 1.02, (what, size)


def dirty(image, bitmap):
    """Dirty ranges as QEMU's NBD server tells them."""
    sock = os.path.abspath("sock")
    server = subprocess.Popen(["qemu-nbd", "-t", "-k", sock, "-r", "-f", "qcow2", "-B", bitmap, image])
    try:
        assert wait_listening(sock, server), "qemu-nbd does not serve"
        out = json.loads(run(qemu, "map", "--output=json", "--image-opts",
                             f"driver=nbd,server.type=unix,server.path={sock},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"))
    finally:
        server.terminate()
        server.wait()
    return [(e["start"], e["length"]) for e in out if not e["data"]]


def names(image):
    data = json.loads(run(qemu, "info", "--output=json", image))["format-specific"]["data"]
    return {b["name"]: sorted(b["flags"]) for b in data.get("bitmaps", [])}


def bitmaps(opts, maker, other):
    """Both programs add, write, resize, merge, clear and remove; the bits are what was written, and nothing else."""
    global cases, what
    cases += 1
    what = f"bitmaps {opts} made by {maker}"
    for f in ("bm.qcow2", "bm2.qcow2"):
        if os.path.exists(f):
            os.unlink(f)
    run(maker, "create", "-q", "-f", "qcow2", "-o", opts, "bm.qcow2", "16M")
    run(maker, "bitmap", "--add", "-g", "64k", "bm.qcow2", "on")
    run(maker, "bitmap", "--add", "-g", "16k", "--disable", "bm.qcow2", "off")
    assert names("bm.qcow2") == {"on": ["auto"], "off": []}, names("bm.qcow2")
    run(lodge_io, "-f", "qcow2", "-c", "write 0 1k", "-c", "write 1M 130k", "-c", "discard 2M 64k", "bm.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write 3M 64k", "bm.qcow2")
    run(lodge_io, "-f", "qcow2", "-c", "write -z 4M 64k", "bm.qcow2")
    k = 1024
    want = [(0, 64 * k), (1024 * k, 192 * k), (2048 * k, 64 * k), (3072 * k, 64 * k), (4096 * k, 64 * k)]
    assert dirty("bm.qcow2", "on") == want, dirty("bm.qcow2", "on")
    assert dirty("bm.qcow2", "off") == []
    for tool in (qemu, lodge):
        clean(tool, "bm.qcow2")
    run(other, "bitmap", "--merge", "on", "bm.qcow2", "off")
    assert dirty("bm.qcow2", "off") == want
    run(maker, "bitmap", "--clear", "bm.qcow2", "on")
    assert dirty("bm.qcow2", "on") == []
    run(lodge, "resize", "-q", "bm.qcow2", "33M")
    run(lodge_io, "-f", "qcow2", "-c", "write 32M 512", "bm.qcow2")
    assert dirty("bm.qcow2", "on")[-1] == (32 * 1024 * k, 64 * k)
    run(lodge, "resize", "-q", "--shrink", "bm.qcow2", "2M")
    assert dirty("bm.qcow2", "off") == want[:2], dirty("bm.qcow2", "off")
    run(lodge, "convert", "-O", "qcow2", "--bitmaps", "bm.qcow2", "bm2.qcow2")
    assert names("bm2.qcow2") == names("bm.qcow2") and dirty("bm2.qcow2", "off") == want[:2]
    for image in ("bm.qcow2", "bm2.qcow2"):
        for tool in (qemu, lodge):
            clean(tool, image)
    # killed while writing: in use, so nobody believes it; only removing works
    p = subprocess.Popen([lodge_io, "-f", "qcow2", "-c", "write 0 64k", "-c", "sleep 60000", "bm.qcow2"], stdout=subprocess.PIPE)
    p.stdout.readline()
    p.kill()
    p.wait()
    assert "in-use" in names("bm.qcow2")["on"], names("bm.qcow2")
    run(lodge, "bitmap", "--clear", "bm.qcow2", "on", ok=(1,))
    run(other, "check", "-q", "-r", "all", "bm.qcow2", ok=(0, 3))
    run(other, "bitmap", "--remove", "bm.qcow2", "on")
    run(lodge, "bitmap", "--remove", "bm.qcow2", "off")
    assert names("bm.qcow2") == {}
    for tool in (qemu, lodge):
        clean(tool, "bm.qcow2")


def bitmaps_of_nothing():
    """QEMU opens no image that has a bitmap of 0 bits: nothing may make one."""
    run(lodge, "create", "-q", "-f", "qcow2", "none.qcow2", "0")
    run(lodge, "bitmap", "--add", "none.qcow2", "b", ok=(1,))
    run(lodge, "snapshot", "-c", "empty", "none.qcow2")
    run(lodge, "resize", "-q", "none.qcow2", "1M")
    run(lodge, "bitmap", "--add", "none.qcow2", "b")
    run(lodge, "resize", "-q", "--shrink", "none.qcow2", "0", ok=(1,))
    run(lodge, "snapshot", "-a", "empty", "none.qcow2", ok=(1,))
    assert names("none.qcow2") == {"b": ["auto"]}
    for tool in (qemu, lodge):
        clean(tool, "none.qcow2")
    run(lodge, "bitmap", "--remove", "none.qcow2", "b")
    run(lodge, "snapshot", "-a", "empty", "none.qcow2")
    for tool in (qemu, lodge):
        clean(tool, "none.qcow2")


def zero_with_backing():
    """--target-is-zero beside a backing file, whose data would show through: an error (qemu-img says so, too, but ends with 0)."""
    run(lodge, "convert", "-O", "qcow2", "raw", "zb.qcow2")
    run(lodge, "create", "-q", "-f", "qcow2", "-b", "zb.qcow2", "-F", "qcow2", "zo.qcow2")
    run(lodge, "convert", "-n", "--target-is-zero", "-B", "zb.qcow2", "-F", "qcow2", "-O", "qcow2", "raw", "zo.qcow2", ok=(1,))
    same("raw", "zo.qcow2", "raw", "qcow2")


if len(sys.argv) < 2 or not shutil.which("qemu-img") or not shutil.which("qemu-io"):
    print("SKIP: no qemu-img (package qemu-utils)")
    sys.exit(77)
lodge, qemu, full = os.path.abspath(sys.argv[1]), "qemu-img", "--full" in sys.argv
lodge_io = lodge.replace("qemu-img", "qemu-io")
with tempfile.TemporaryDirectory(dir="/var/tmp") as d:
    os.chdir(d)
    make_raw("raw", 1)
    for (i, (opts, cs)), direction in itertools.product(enumerate(options()), (0, 1)):
        if not full and (i + direction) % 3 and cs not in (512, 65536):
            continue
        pair = (lodge, qemu) if direction else (qemu, lodge)
        one(opts, cs, *pair, "raw", (i & 1 or "zstd" in opts) and "prealloc" not in opts and "data_file" not in opts)
    for i, opts in enumerate(("cluster_size=512", "cluster_size=65536", "cluster_size=65536,extended_l2=on", "compat=0.10,cluster_size=4096",
                              "cluster_size=2M")):
        chain(opts, lodge, qemu, "raw", i)
        chain(opts, qemu, lodge, "raw", i + 10)
    for opts in ("cluster_size=65536", "cluster_size=512", "cluster_size=4096,extended_l2=off,refcount_bits=1"):
        bitmaps(opts, lodge, qemu)
        bitmaps(opts, qemu, lodge)
    bitmaps_of_nothing()
    zero_with_backing()
    amend("raw")
    amend_refused()
    for seed in range(60 if full else 12):
        amend_snapshots(seed, (512, 4096, 65536)[seed % 3])
    packed_sizes()
    run(lodge, "convert", "-C", "-O", "raw", "m.qcow2", "o.raw")
    same("o.raw", "m.qcow2", "raw", "qcow2")
    begin = time.monotonic()
    run(lodge, "convert", "-r", "4M", "-O", "qcow2", "raw", "r.qcow2")
    assert time.monotonic() - begin > 0.6
    same("raw", "r.qcow2", "raw", "qcow2")
    print(f"{cases} combinations")
