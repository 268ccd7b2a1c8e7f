#!/usr/bin/env python3
"""Bad input: one clear line on standard error that names what is wrong, a non-zero status, nothing left behind."""
import os
import socket
import subprocess
import sys
import tempfile

LODGE = sys.argv[1]
failures = 0


def check(words, *argv, status=1, cwd=None):
    """Run lodge; its only line of errors has all the `words`."""
    global failures
    try:
        p = subprocess.run([LODGE, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, cwd=cwd)
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
    check(["unknown verb"], "frobnicate", status=2)
    check(["argument", "missing"], *run, "--kernel")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        check([str(port)], *run, "--kernel", k, "--net", f"user,hostfwd=tcp:127.0.0.1:{port}-:22")
    if not os.path.exists("/dev/kvm"):
        check(["/dev/kvm"], "run", "--accel", "kvm", "--kernel", k)
    left = sorted(os.listdir(tmp))
    if left != ["d.img", "empty", "folder", "k", "short"]:
        failures += 1
        print(f"FAIL something was left behind: {left}")

print(f"{failures} failures")
sys.exit(1 if failures else 0)
