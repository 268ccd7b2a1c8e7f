#!/usr/bin/env python3
"""Bad input: one clear line on standard error that names what is wrong, a non-zero status, nothing left behind."""
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile

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


def multiboot(path):
    """The smallest image that would run: it stops at once through the debug exit port."""
    code = bytes([0xb0, 0x00, 0xe6, 0xf4, 0xf4])
    base = 0x100000
    words = [0x1BADB002, 0x00010000, -(0x1BADB002 + 0x00010000) & 0xffffffff, base, base, 0, 0, base + 32]
    with open(path, "wb") as f:
        f.write(b"".join(w.to_bytes(4, "little") for w in words) + code)


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
    left = sorted(os.listdir(tmp))
    if left != ["d.img", "empty", "folder", "k", "short"]:
        failures += 1
        print(f"FAIL something was left behind: {left}")

print(f"{failures} failures")
sys.exit(1 if failures else 0)
