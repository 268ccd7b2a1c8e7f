#!/usr/bin/env python3
"""Descriptions of nodes (--image-opts, json: names, --blockdev, -drive): Lodge takes what QEMU takes, refuses what it refuses, and a guest would read the same.

usage: graph_test.py LODGE-QEMU-IO LODGE; exit status 77 without qemu-io and qemu-img"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

FILE = "file.driver=file,file.filename="
TOP = f"driver=qcow2,{FILE}top.q"
# options | what qemu-io does with them; both must end alike and find the same
CASES = [
    (TOP, "read -P 2 0 64k", "read -P 1 64k 64k", "read -P 0 1M 64k"),
    (f"{TOP},backing.driver=qcow2,backing.{FILE}other.q", "read -P 2 0 64k", "read -P 3 64k 64k", "read -P 1 64k 64k"),
    (f"{TOP},backing.driver=raw,backing.{FILE}raw", "read -P 7 64k 64k"),
    (f"{TOP},backing.driver=raw,backing.offset=64k,backing.size=64k,backing.{FILE}raw", "read -P 8 64k 64k", "read -P 0 64k 64k"),
    (f"{TOP},backing.driver=qcow2,backing.{FILE}top2.q,backing.backing.driver=qcow2,backing.backing.{FILE}other.q", "read -P 3 64k 64k"),
    (f"{TOP},backing=nothing", "length"),
    (f"{TOP},backing.driver=qcow2,backing.{FILE}nothing.q", "length"),
    (f"{TOP},lazy-refcounts=on", "write -P 9 64k 64k", "read -P 9 64k 64k"),
    (f"driver=qcow2,{FILE}old.q,lazy-refcounts=on", "length"),
    (f"driver=qcow2,{FILE}old.q,lazy-refcounts=off", "length"),
    (f"{TOP},l2-cache-size=1M,refcount-cache-size=512k,cache-clean-interval=1", "write -P 9 64k 64k", "sleep 1100", "read -P 9 64k 64k", "read -P 0 3M 64k"),
    (f"{TOP},cache-size=2M,l2-cache-entry-size=4k", "read -P 2 0 64k"),
    (f"{TOP},cache-size=2M,l2-cache-size=4M", "length"),
    (f"{TOP},cache-size=2M,refcount-cache-size=4M", "length"),
    (f"{TOP},cache-size=2M,refcount-cache-size=1M,l2-cache-size=1M", "length"),
    (f"{TOP},l2-cache-entry-size=1000", "length"),
    (f"{TOP},l2-cache-entry-size=256k", "length"),
    (f"{TOP},l2-cache-size=x", "length"),
    (f"{TOP},pass-discard-request=on,pass-discard-snapshot=off,pass-discard-other=on", "discard 0 64k", "read -P 0 0 64k"),
    (f"{TOP},pass-discard-request=maybe", "length"),
    (f"{TOP},overlap-check=all", "write -P 9 0 64k"),
    (f"{TOP},overlap-check.template=cached,overlap-check.inactive-l2=on", "write -P 9 0 64k"),
    (f"{TOP},overlap-check=foo", "length"),
    (f"{TOP},overlap-check.main-header=foo", "length"),
    (f"{TOP},data-file.driver=file,data-file.filename=raw", "length"),
    (f"driver=qcow2,{FILE}data.q", "read -P 5 0 64k"),
    (f"driver=qcow2,{FILE}data.q,data-file.driver=file,data-file.filename=raw", "read -P 7 64k 64k", "read -P 8 64k 64k"),
    (f"driver=qcow2,{FILE}data.q,data-file.driver=file,data-file.filename=nothing", "length"),
    (f"driver=raw,{FILE}raw", "length", "read -P 7 64k 64k"),
    (f"driver=raw,offset=128k,{FILE}raw", "length", "read -P 8 0 64k", "write -P 9 0 64k", "write -z 64k 64k", "discard 64k 64k", "truncate 1M", "length"),
    (f"driver=raw,offset=64k,size=128k,{FILE}raw", "length", "read -P 7 0 64k", "read -P 8 64k 64k", "read 128k 512", "write -P 9 120k 16k", "truncate 1M"),
    (f"driver=raw,offset=100,size=512,{FILE}raw", "length", "write -P 9 0 512", "read -P 9 0 512"),
    (f"driver=raw,size=100,{FILE}raw", "length"),
    (f"driver=raw,offset=1M,size=4M,{FILE}raw", "length"),
    (f"driver=raw,offset=5M,{FILE}raw", "length"),
    (f"driver=raw,l2-cache-size=1M,{FILE}raw", "length"),
    (f"driver=qcow2,offset=1M,{FILE}top.q", "length"),
    (f"{FILE}top.q,l2-cache-size=1M", "length"),
    (f"driver=raw,file.locking=off,{FILE}raw", "length"),
    ('json:{"driver":"qcow2","file":{"driver":"file","filename":"top.q"},"backing":null}', "read -P 0 64k 64k", "read -P 1 64k 64k"),
    ('json:{"driver":"qcow2","file":{"driver":"file","filename":"top.q"}}', "read -P 0 64k 64k", "read -P 1 64k 64k"),
    ("driver=null-co,size=64k,read-zeroes=on", "length", "read -P 0 0 64k", "write -P 9 0 4k", "read -P 0 0 4k", "write -z 0 64k", "discard 0 4k", "read 64k 512", "map"),
    ("driver=null-aio,size=1M,latency-ns=1000,read-zeroes=on", "length", "read -P 0 4k 8k", "flush", "truncate 2M"),
    ("driver=null-co", "length"),
    ("driver=null-co,filename=x", "length"),
    ("driver=raw,offset=64k,file.driver=null-co,file.size=128k,file.read-zeroes=on", "length", "read -P 0 0 64k"),
    ("driver=qcow2,file.driver=null-co,file.read-zeroes=on", "length"),
    ('json:{"driver":"raw","file":{"driver":"null-co","size":131072,"read-zeroes":true}}', "length", "read -P 0 0 64k"),
    ('json:{"driver":"raw","offset":65536,"size":65536,"file":{"driver":"file","filename":"raw"}}', "length", "read -P 7 0 64k"),
]
bad = 0


def fail(text):
    global bad
    bad += 1
    print("graph_test:", text)


def run(*argv, cwd=None):
    p = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=300, check=False)
    return p.returncode, p.stdout.decode("utf-8", "replace")


def make(d):
    def img(*a):
        if run("qemu-img", *a, cwd=d)[0]:
            raise SystemExit("graph_test: qemu-img " + " ".join(a))

    def io(name, fmt, *cmds):
        run("qemu-io", "-f", fmt, *[w for c in cmds for w in ("-c", c)], name, cwd=d)
    for name, byte in (("base.q", 1), ("other.q", 3), ("old.q", 4)):
        img("create", "-f", "qcow2", *(["-o", "compat=0.10"] if name == "old.q" else []), name, "4M")
        io(name, "qcow2", f"write -P {byte} 0 256k")
    for name in ("top.q", "top2.q"):
        img("create", "-f", "qcow2", "-b", "base.q", "-F", "qcow2", name)
    io("top.q", "qcow2", "write -P 2 0 64k")
    img("create", "-f", "qcow2", "-o", "data_file=ext", "data.q", "4M")
    io("data.q", "qcow2", "write -P 5 0 128k")
    img("create", "-f", "raw", "raw", "4M")
    io("raw", "raw", "write -P 7 64k 64k", "write -P 8 128k 64k")


def words(program, text, cmds):
    """`text` may be whole options of the program, a name, or options of an image."""
    how = text.split(" ") if " " in text else [text] if text.startswith("json:") else ["--image-opts", text]
    return [program, *[w for c in cmds for w in ("-c", c)], *how]


def findings(out):
    """Without what depends on time."""
    return [x for x in out.splitlines() if " ops; " not in x]


def cases(tmp, io, table):
    for n, (text, *cmds) in enumerate(table):
        got = []
        for name, program in (("q", "qemu-io"), ("l", io)):
            d = os.path.join(tmp, f"{n}{name}")
            run("cp", "-a", os.path.join(tmp, "images"), d) # holes stay holes
            r, out = run(*words(program, text, cmds), cwd=d)
            if r < 0:
                fail(f"{text}: {program} died of signal {-r}")
            check = [run("qemu-img", "check", "-q", i, cwd=d)[0] for i in ("top.q", "data.q", "four.q") if i in text]
            with open(os.path.join(d, "raw"), "rb") as f:
                got.append((r, findings(out), check, f.read()))
            shutil.rmtree(d)
        for what, a, b in zip(("status", "output", "check", "raw file"), *got):
            if isinstance(a, list):
                while a and b and a[0] == b[0]:
                    a, b = a[1:], b[1:]
            if a != b:
                fail(f"{text}: {what}: qemu-io {a!r:.300}, lodge {b!r:.300}")


def serve(daemon, d, nodes, export):
    """A daemon that serves `export`; None when it gave up."""
    sock = os.path.join(d, "s")
    p = subprocess.Popen([*daemon, *[w for n in nodes for w in ("--blockdev", n)], "--nbd-server", f"addr.type=unix,addr.path={sock}",
                          "--export", f"nbd,id=e,node-name={export},name=x"], cwd=d, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while p.poll() is None and time.monotonic() < end:
        if run("qemu-img", "info", f"nbd+unix:///x?socket={sock}")[0] == 0:
            return p, sock
        time.sleep(0.1)
    if p.poll() is None:
        p.kill()
        p.wait()
        fail(f"{daemon}: not ready after 60 seconds: {nodes}")
    return None, sock


GRAPHS = [
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=file,node-name=bf,filename=other.q", "driver=qcow2,node-name=b,file=bf,read-only=on",
           "driver=qcow2,node-name=q,file=f,backing=b,l2-cache-size=1048576"], ("read -P 2 0 64k", "read -P 3 64k 64k")),
    ("q", ["driver=file,node-name=f,filename=top.q", '{"driver":"qcow2","node-name":"q","file":"f","backing":null}'], ("read -P 2 0 64k", "read -P 0 64k 64k")),
    ("q", ["driver=file,node-name=f,filename=data.q", "driver=file,node-name=d,filename=raw", "driver=qcow2,node-name=q,file=f,data-file=d"],
     ("read -P 7 64k 64k",)),
    ("w", ["driver=file,node-name=f,filename=raw", "driver=raw,node-name=w,file=f,offset=65536,size=65536"], ("length", "read -P 7 0 64k")),
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=qcow2,node-name=q,file=f,backing=nothing"], ()),
    ("q", ["driver=file,node-name=f,filename=raw", "driver=raw,node-name=q,file=f,backing=f"], ()),
    ("q", ["driver=file,node-name=f,filename=top.q,read-only=on", "driver=qcow2,node-name=q,file=f"], ()),
    ("q", ["driver=file,node-name=f,filename=top.q,read-only=on", "driver=qcow2,node-name=q,file=f,read-only=on"], ("read -P 2 0 64k",)),
    ("r", ["driver=file,node-name=f,filename=raw,read-only=on", "driver=raw,node-name=r,file=f"], ("read -P 7 64k 64k",)),
    ("n", ["driver=null-co,node-name=n,size=65536,read-zeroes=on"], ("length", "read -P 0 0 64k")),
]


def graphs(tmp, lodge, table, objects=()):
    daemons = [[lodge, "storage-daemon"]]
    if shutil.which("qemu-storage-daemon"):
        daemons.append(["qemu-storage-daemon"])
    for export, nodes, cmds in table:
        for daemon in daemons:
            d = tempfile.mkdtemp(dir=tmp)
            shutil.copytree(os.path.join(tmp, "images"), d, dirs_exist_ok=True)
            p, sock = serve([*daemon, *objects], d, nodes, export)
            if bool(p) != bool(cmds):
                fail(f"{daemon[-1]}: {nodes}: {'taken' if p else 'refused'}")
            if not p:
                continue
            r, out = run("qemu-io", "-r", "-f", "raw", *[w for c in cmds for w in ("-c", c)], f"nbd+unix:///x?socket={sock}")
            if r or "failed" in out:
                fail(f"{daemon[-1]}: {nodes}: {out}")
            p.send_signal(signal.SIGTERM)
            if p.wait(timeout=60):
                fail(f"{daemon[-1]}: {nodes}: exit status {p.returncode}")


# -drive of a machine whose kernel is not there: the drive was taken when that is what is complained about.
DRIVES = {
    True: ["file=top.q", "file=top.q,cache.direct=on", "file=top.q,cache.writeback=off,cache.no-flush=off", "file=top.q,driver=qcow2", "file=top.q,node-name=n0",
           "file.driver=file,file.filename=top.q,driver=qcow2", "file=top.q,auto-read-only=on", "file=top.q,force-share=on,readonly=on",
           "file=top.q,file.locking=off,l2-cache-size=1M", "file=top.q,file.aio=threads", "file=top.q,backing.driver=qcow2,backing.file.filename=other.q",
           "driver=raw,file.filename=raw,offset=64k,size=64k", "file=top.q,lazy-refcounts=on,overlap-check=all,pass-discard-other=on"],
    False: ["file=top.q,cache.direct=x", "file=top.q,driver=qcow2,format=raw", "file=top.q,file.filename=top.q", "file=top.q,discard=foo",
            "file=raw,format=raw,l2-cache-size=1M", "file=top.q,l2-cache-size=4M,cache-size=1M", "file=top.q,backing.file.filename=nothing.q"],
}


def drives(tmp, lodge, table):
    for good, texts in table.items():
        for text in texts:
            p = subprocess.run([lodge, "qemu", "-nodefaults", "-display", "none", "-kernel", "/nonexistent/kernel", "-drive", "if=virtio," + text],
                               cwd=os.path.join(tmp, "images"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=300, check=False)
            if p.returncode < 1 or (b"/nonexistent/kernel" in p.stderr) != good:
                fail(f"-drive {text}: status {p.returncode}: {p.stderr!r}")


# Drives without a medium: good for a CD drive alone. The last word says what the message has to name.
EMPTY = [
    (["-drive", "if=none,id=d,media=cdrom", "-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=d", "-device", "scsi-hd,drive=d"], "scsi-hd: property 'drive'"),
    (["-drive", "if=scsi,media=cdrom", "-drive", "if=none,id=d", "-device", "virtio-blk-pci,drive=d"], "virtio-blk-pci: property 'drive'"),
    (["-drive", "if=virtio"], "needs media"),
]


def empty(lodge):
    for argv, names in EMPTY:
        p = subprocess.run([lodge, "qemu", "-nodefaults", "-display", "none", "-accel", "soft", "-kernel", lodge, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                           timeout=300, check=False)
        if p.returncode < 1 or names.encode() not in p.stderr:
            fail(f"{argv}: status {p.returncode}: {p.stderr!r}")


def holes(tmp, io):
    """What a deleted snapshot alone held is given back to the file system, unless the options say otherwise."""
    img = os.path.join(os.path.dirname(io), "lodge-qemu-img")
    name = os.path.join(tmp, "snap.q")
    run(img, "create", "-f", "qcow2", name, "64M")
    run("qemu-io", "-c", "write -P 1 0 16M", name)
    run(img, "snapshot", "-c", "a", name)
    run("qemu-io", "-c", "write -P 2 0 16M", name)
    before = os.stat(name).st_blocks
    run(img, "snapshot", "-d", "a", name)
    if os.stat(name).st_blocks > before * 3 // 4:
        fail(f"a deleted snapshot's clusters stay in the file: {before} blocks, then {os.stat(name).st_blocks}")
    r, out = run("qemu-io", "-c", "read -P 2 0 16M", name)
    if r or "failed" in out or run("qemu-img", "check", name)[0]:
        fail("after deleting a snapshot: " + out)


def main():
    io, lodge = (os.path.abspath(a) for a in sys.argv[1:3])
    if not shutil.which("qemu-io") or not shutil.which("qemu-img"):
        print("graph_test: skipped, qemu-io and qemu-img are not installed")
        return 77
    with tempfile.TemporaryDirectory() as tmp:
        os.mkdir(os.path.join(tmp, "images"))
        make(os.path.join(tmp, "images"))
        cases(tmp, io, CASES)
        graphs(tmp, lodge, GRAPHS)
        drives(tmp, lodge, DRIVES)
        empty(lodge)
        holes(tmp, io)
    print(f"graph_test: {len(CASES)} descriptions, {len(GRAPHS)} graphs, {sum(map(len, DRIVES.values()))} drives, {bad} failures")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
