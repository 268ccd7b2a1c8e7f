#!/usr/bin/env python3
"""Bad input: one clear line on standard error that names what is wrong, a non-zero status, nothing left behind."""
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile

from bad_input import multiboot

LODGE = sys.argv[1]
SANITIZED = len(sys.argv) > 2 and sys.argv[2] != "none"   # a sanitizer needs all the address space there is
GUESTS = sys.argv[3:]           # images that boot: what of them is cut off must be noticed
failures = 0


def check(words, *argv, status=1, limit=0):
    """Run lodge, with at most `limit` bytes of address space; its only line of errors has all the `words`."""
    global failures

    def confine():
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        p = subprocess.run([LODGE, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           errors="replace", timeout=20, preexec_fn=confine)
    except subprocess.TimeoutExpired:
        failures += 1
        print(f"FAIL {argv}: still running after 20 s")
        return
    lines = [l for l in p.stderr.splitlines() if ": warning: " not in l and ": info: " not in l]
    ok = p.returncode == status and len(lines) == 1 and all(w in lines[0] for w in words)
    if not ok:
        failures += 1
        print(f"FAIL {argv}: status {p.returncode}, wanted {status} and {words} in one line, got:\n{p.stderr}")


def needed(image):
    """How many bytes of the image its headers ask for."""
    if image[:4] == b"\x7fELF":
        wide = image[4] == 2
        off, entsize, n = ((int.from_bytes(image[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58))) if wide else
                           (int.from_bytes(image[a:b], "little") for a, b in ((28, 32), (42, 44), (44, 46))))
        end = off + entsize * n
        for i in range(n):
            h = image[off + i * entsize:off + (i + 1) * entsize]
            o, size = (int.from_bytes(h[a:b], "little") for a, b in (((8, 16), (32, 40)) if wide else ((4, 8), (16, 20))))
            if h[0] in (1, 4):          # PT_LOAD, PT_NOTE
                end = max(end, o + size)
        return end
    return ((image[0x1f1] or 4) + 1) * 512 + int.from_bytes(image[0x1f4:0x1f8], "little") * 16 - 15     # the size is rounded up


def truncated(path, tmp):
    """Images cut off at random places, and at those where a header ends."""
    with open(path, "rb") as f:
        image = f.read()
    end = needed(image)
    rng = random.Random(len(image))
    cut = os.path.join(tmp, "cut")
    for n in [1, 2, 3, 4, 16, 51, 0x1f2, 0x206, 0x263, end - 1] + [rng.randrange(1, end) for _ in range(10)]:
        if 0 < n < end:
            with open(cut, "wb") as f:
                f.write(image[:n])
            check([cut], "run", "--accel", "soft", "--kernel", cut)
    os.unlink(cut)


def devices(k, disk):
    """Devices and their back ends, in QEMU's words; the second word and those that follow are in the message."""
    base = ("qemu", "-nodefaults", "-display", "none", "-accel", "soft", "-kernel", k)
    drive = f"file={disk},format=raw"
    for words, *argv in (
            (["slot 3", "taken"], "-device", "virtio-rng-pci,addr=3", "-device", "virtio-rng-pci,addr=3"),
            (["multifunction=on", "3.1"], "-device", "virtio-rng-pci,addr=3", "-device", "virtio-rng-pci,addr=3.1"),
            (["multifunction=on", "3.1"], "-device", "virtio-rng-pci,addr=3.1", "-device", "virtio-rng-pci,addr=3"),
            (["isa-serial", "0x3f8"], "-device", "isa-serial,index=0", "-device", "isa-serial,index=0"),
            (["isa-debugcon", "overlaps"], "-device", "isa-debugcon", "-device", "isa-debugcon"),
            (["isa-debug-exit", "rtc"], "-device", "isa-debug-exit,iobase=0x70"),
            (["isa-debug-exit", "range"], "-device", "isa-debug-exit,iobase=0xffff"),
            (["romfile"], "-device", "virtio-rng-pci,romfile=x.rom"),
            (["rombar"], "-device", "virtio-rng-pci,rombar=2"),
            (["bootindex", "-2"], "-drive", f"{drive},if=none,id=d", "-device", "virtio-blk-pci,drive=d,bootindex=-2"),
            (["bootindex 1"], "-drive", f"{drive},if=none,id=d", "-device", "virtio-blk-pci,drive=d,bootindex=1", "-netdev",
             "user,id=n", "-device", "virtio-net-pci,netdev=n,bootindex=1"),
            (["bootindex"], "-device", "virtio-rng-pci,bootindex=1"),
            (["virtserialport", "virtio-serial"], "-device", "virtserialport"),
            (["nobus"], "-device", "virtio-rng-pci,bus=nobus.0"),
            (["mac", "zz"], "-nic", "user,mac=zz"), (["unicast"], "-nic", "user,mac=01:00:00:00:00:01"),
            (["e1000"], "-nic", "user,model=e1000"), (["bridge"], "-nic", "bridge"), (["99999"], "-nic", "user,hostfwd=tcp::99999-:22"),
            (["15 characters"], "-nic", "tap,ifname=much-too-long-a-name"),
            (["index", "twice"], "-drive", f"{drive},if=scsi,index=1", "-drive", f"{drive},if=scsi,unit=1"),
            (["index=x"], "-drive", f"{drive},if=virtio,index=x"), (["index=", "unit="], "-drive", f"{drive},if=virtio,index=1,unit=1"),
            (["cache=fast"], "-drive", f"{drive},if=virtio,cache=fast"), (["file="], "-drive", "if=virtio"),
            (["aio=native"], "-drive", f"{drive},if=virtio,aio=native"), (["format 'nope'"], "-drive", f"file={disk},if=virtio,format=nope"),
            (["127.0.0.1:99999"], "-serial", "tcp:127.0.0.1:99999,server=on,wait=off"), (["folder"], "-serial", "file:/nonexistent/folder/x"),
            (["mkfifo"], "-serial", "pipe:/nonexistent/pipe"), (["'d'"], "-chardev", "null,id=c", "-serial", "chardev:d"),
            (["unix:/nonexistent"], "-serial", "unix:/nonexistent/x,server=on,wait=off"),
            (["pid file", "/nonexistent"], "-pidfile", "/nonexistent/pid"), (["log file", "/nonexistent"], "-D", "/nonexistent/log"),
            (["-uuid"], "-uuid", "12"), (["-rtc", "yesterday"], "-rtc", "base=yesterday"), (["order=n"], "-boot", "order=n"),
            (["enforce"], "-cpu", "host,enforce,+tbm,+xop,+amx-int8"),
            (["on or off"], "-cpu", "host,migratable=maybe"), (["host-phys-bits"], "-cpu", "host,host-phys-bits=off"),
            (["-sandbox"], "-sandbox", "maybe"), (["hvf"], "-accel", "hvf"), (["mode", "jit"], "-accel", "soft,mode=jit"),
            (["size=0"], "-object", "memory-backend-ram,id=m,size=0", "-machine", "memory-backend=m"),
            (["nomem"], "-machine", "memory-backend=nomem"), (["nope"], "-object", "nope,id=x"),
            (["dump-guest-core"], "-machine", "q35,dump-guest-core=perhaps"), (["-global", "nope"], "-global", "nope.x=1"),
            (["-global", "colour"], "-global", "virtio-rng-pci.colour=red"), (["sockets"], "-smp", "4,sockets=3")):
        check(words, *base, *argv)


def tools(tmp, disk, folder, missing):
    """The other verbs: no words, wrong words, what is not there."""
    new = os.path.join(tmp, "new")
    size = os.path.getsize(disk)
    for words, *argv in (
            (["Not enough arguments"], "img"), (["frobnicate"], "img", "frobnicate"), (["file name"], "img", "create"),
            (["size"], "img", "create", new), (["size"], "img", "create", new, "0Q"), (["9223372036854775807"], "img", "create", new, "99999999999999G"),
            (["nope"], "img", "create", "-f", "nope", new, "1M"), (["/nonexistent/x"], "img", "create", "/nonexistent/x", "1M"),
            ([folder], "img", "create", folder, "1M"), (["bogus"], "img", "create", "-f", "qcow2", "-o", "bogus=1", new, "1M"),
            (["power of two"], "img", "create", "-f", "qcow2", "-o", "cluster_size=3", new, "1M"),
            ([missing], "img", "create", "-f", "qcow2", "-b", missing, "-F", "raw", new), ([missing], "img", "info", missing),
            ([folder, "directory"], "img", "info", folder), (["qcow2"], "img", "info", "-f", "qcow2", disk),
            (["qcow2"], "img", "convert", "-f", "qcow2", "-O", "raw", disk, new), (["nope"], "img", "convert", "-O", "nope", disk, new),
            (["/nonexistent"], "img", "convert", "-O", "raw", disk, "/nonexistent/x"), (["d.img"], "img", "convert", "-O", "raw", disk, disk),
            (["size"], "img", "resize", "-f", "raw", disk, "abc"), (["positive"], "img", "resize", "-f", "raw", disk, "--", f"-{2 * size}"),
            (["snapshot"], "img", "snapshot", "-c", "s", disk), (["backing file"], "img", "commit", disk),
            ([missing], "img", "map", missing), ([missing], "img", "dd", f"if={missing}", f"of={new}"),
            (["no file open"], "io", "-c", "length"), ([missing], "io", missing), ([folder], "io", folder), (["cache.direct"], "io", "-i", "native", disk),
            (["-T"], "io", "-T", "x", disk), (["discard"], "io", "-d", "nope", disk),
            (["arguments"], "nbd"), (["bogus"], "nbd", "--bogus"), ([missing], "nbd", missing), ([folder], "nbd", "-f", "raw", folder),
            (["99999"], "nbd", "-f", "raw", "-p", "99999", disk), (["/nonexistent"], "nbd", "-f", "raw", "-k", "/nonexistent/s", disk),
            (["Offset"], "nbd", "-f", "raw", "-o", str(2 * size), disk), (["'x'"], "nbd", "-e", "x", disk), (["aio"], "nbd", "--aio=native", disk),
            (["aio=often"], "nbd", "--aio=often", disk), (["detect-zeroes"], "nbd", "--detect-zeroes=unmap", disk),
            (["/dev/nonexistent"], "nbd", "-f", "raw", "-c", "/dev/nonexistent", disk),
            (["bogus"], "storage-daemon", "--bogus"), (["node-name"], "storage-daemon", "--blockdev", "driver=file,filename=x"),
            (["nope"], "storage-daemon", "--blockdev", "driver=nope,node-name=x"),
            ([missing], "storage-daemon", "--blockdev", f"driver=file,filename={missing},node-name=x"),
            (["node-name='x'"], "storage-daemon", "--export", "type=nbd,id=a,node-name=x")):
        check(words, *argv)
    check([missing], "img", "compare", disk, missing, status=2)
    check(["kvm-info", "--bogus"], "kvm-info", "--bogus", status=2)
    check(["kvm-run", "COMMAND"], "kvm-run", status=2)
    if not SANITIZED:       # its library is not built then
        check([missing, "not found"], "kvm-run", missing, status=127)
    if os.path.getsize(disk) != size:
        global failures
        failures += 1
        print("FAIL the disk has another size now")


with tempfile.TemporaryDirectory() as tmp:
    k, disk = os.path.join(tmp, "k"), os.path.join(tmp, "d.img")
    multiboot(k)
    with open(disk, "wb") as f:
        f.truncate(1 << 20)
    empty, short, folder = (os.path.join(tmp, n) for n in ("empty", "short", "folder"))
    open(empty, "wb").close()
    with open(short, "wb") as f:
        f.write(b"\0" * 0x1f1 + b"\x10" + b"\0" * 12 + b"\x55\xaaHdrS" + b"\0" * 10)
    os.mkdir(folder)

    run = ("run", "--accel", "soft")
    qemu = ("qemu", "-nodefaults", "-display", "none", "-accel", "soft")
    missing = os.path.join(tmp, "missing")

    check(["nothing to boot", "--kernel"], *run)
    for path in (missing, empty, short, folder):
        check([path], *run, "--kernel", path)
        check([path], *qemu, "-kernel", path)
    check([missing], *run, "--kernel", k, "--initrd", missing)
    check(["initrd"], *run, "--initrd", missing)
    for path in (missing, folder):
        check([path], *run, "--kernel", k, "--disk", path)
        check([path], *qemu, "-kernel", k, "-drive", f"file={path},if=virtio,format=raw")
    for size in ("0", "-1", "12Q", "", "99999999T", "1.5.2G", "abc"):
        check(["--memory"], *run, "--kernel", k, "--memory", size)
        check(["-m"], *qemu, "-kernel", k, "-m", size)
    check(["cannot allocate"], *qemu, "-kernel", k, "-m", "1T", "-mem-prealloc")
    for n in ("0", "-1", "65", "x", "99999999999999999999"):
        check(["--cpus"], *run, "--kernel", k, "--cpus", n)
        check(["-smp"], *qemu, "-kernel", k, "-smp", n)
    for size in ("1K", "2G", "x", ""):
        check(["code-memory"], *run[:2], f"soft,code-memory={size}", "--kernel", k)
    check(["code-memory", "4 CPUs"], *run[:2], "soft,code-memory=2M", "--kernel", k, "--cpus", "4")
    check(["stats", missing], *run[:2], f"soft,stats={missing}/x", "--kernel", k)
    check(["perf-map"], *run[:2], "soft,perf-map=x", "--kernel", k)
    for key in ("mode=interp", "code-memory=8M", "stats=on", "perf-map=on"):
        check([key.split("=")[0], "softkvm"], *run[:2], f"kvm,{key}", "--kernel", k)
    check(["-smp", "sockets"], *qemu, "-kernel", k, "-smp", "4,sockets=3")
    check(["--kernle", "did you mean --kernel"], *run, "--kernle", k)
    check(["-sdl"], *qemu, "-kernel", k, "-sdl")
    check(["-machine", "isapc"], *qemu, "-kernel", k, "-M", "isapc")
    check(["-machine", "frobnicate"], *qemu, "-kernel", k, "-M", "q35,frobnicate=on")
    check(["cpu", "486sx"], *qemu, "-kernel", k, "-cpu", "486sx")
    check(["nosuchfeature"], *qemu, "-kernel", k, "-cpu", "host,+nosuchfeature")
    check(["virtio-blk-pcy", "did you mean virtio-blk-pci"], *qemu, "-kernel", k, "-device", "virtio-blk-pcy")
    check(["virtio-rng-pci", "colour"], *qemu, "-kernel", k, "-device", "virtio-rng-pci,colour=red")
    check(["nodrive"], *qemu, "-kernel", k, "-device", "virtio-blk-pci,drive=nodrive")
    check(["virtio-blk-pci", "drive"], *qemu, "-kernel", k, "-device", "virtio-blk-pci")
    check(["5"], *qemu, "-kernel", k, "-device", "virtio-rng-pci,addr=5", "-device", "virtio-rng-pci,addr=5")
    check(["addr"], *qemu, "-kernel", k, "-device", "virtio-rng-pci,addr=99")
    check(["id", "twice"], *qemu, "-kernel", k, "-device", "virtio-rng-pci,id=a", "-device", "virtio-rng-pci,id=a")
    check(["if=ide"], *qemu, "-kernel", k, "-drive", f"file={disk},format=raw")
    check(["-drive", "bogus"], *qemu, "-kernel", k, "-drive", f"file={disk},if=virtio,format=raw,bogus=1")
    check(["qcow2"], *qemu, "-kernel", k, "-drive", f"file={disk},if=virtio,format=qcow2")
    check(["-blockdev", "node-name"], *qemu, "-kernel", k, "-blockdev", f"driver=file,filename={disk}")
    check(["JSON"], *qemu, "-kernel", k, "-blockdev", "{nonsense")
    check(["bogus"], *qemu, "-kernel", k, "-netdev", "user,id=n,bogus=1")
    check(["-monitor"], *qemu, "-kernel", k, "-monitor", "stdio")
    with open("/proc/meminfo") as f:
        if "HugePages_Free:        0" in f.read():
            check(["huge pages", "nr_hugepages"], *run, "--kernel", k, "--hugepages")
    check(["unknown verb"], "frobnicate", status=2)
    check(["argument", "missing"], *run, "--kernel")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        check([str(port)], *run, "--kernel", k, "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22")
    sparse = os.path.join(tmp, "sparse")
    with open(sparse, "wb") as f:
        f.truncate(8 << 30)
    for path in GUESTS:
        if not os.path.exists(path):
            print(f"skipped: no {path}")
            continue
        truncated(path, tmp)
        check([sparse, "not fit in guest memory"], *run, "--kernel", path, "--initrd", sparse, "--memory", "256M")
    check([sparse], *run, "--kernel", sparse)
    os.unlink(sparse)
    check(["memory"], *run, "--kernel", k, "--memory", "200T")
    if not SANITIZED:
        check(["memory", "MiB"], *run, "--kernel", k, "--memory", "4G", limit=2 << 30)
    if not os.path.exists("/dev/kvm"):
        check(["/dev/kvm"], "run", "--accel", "kvm", "--kernel", k)
    devices(k, disk)
    tools(tmp, disk, folder, missing)
    left = sorted(os.listdir(tmp))
    if left != ["d.img", "empty", "folder", "k", "short"]:
        failures += 1
        print(f"FAIL something was left behind: {left}")

print(f"{failures} failures")
sys.exit(1 if failures else 0)
