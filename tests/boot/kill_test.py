#!/usr/bin/env python3
"""kill -9 of a machine whose guest writes: what the guest was told is flushed is there, and the image is sound.

usage: kill_test.py LODGE WRITER [--kills N] [--format qcow2|raw] [--seed N]; `--kills 200` is the long run. The same image
goes on from kill to kill. A block may hold the last write to it that was flushed, or any later one, or half of neither."""
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time

import vm
from scsi_test import archive_with

GUEST = vm.guest_dir()
BLOCK, RUN_MAX, SIZE = 4096, 20, 48 << 20
READY, TOLD = re.compile(r"WRITER ready (\d+)"), re.compile(r"\nF (\d+)(?=\n)")


def writes(seed, first, blocks):
    """What the guest does: number, first block, count."""
    def step():
        nonlocal seed
        seed = (seed * 1664525 + 1013904223) & 0xffffffff
        return seed >> 8
    seq = first
    while True:
        n = 1 + step() % RUN_MAX
        at = step() % (blocks - n)
        step()
        yield seq, at, n
        seq += 1


def run_and_kill(argv, rnd):
    """The last number the guest reported as flushed, None when it never came so far."""
    guest = vm.Vm(argv, timeout=120)
    guest.expect(READY.pattern)
    wait = time.monotonic() + rnd.uniform(0.02, 0.8)
    while time.monotonic() < wait or not TOLD.search(guest.log):
        assert guest._read(), guest.log[-2000:]
        assert "failed" not in guest.log, guest.log[-500:]
    guest.proc.kill()
    guest.proc.wait()
    while guest._read():
        pass
    assert "failed" not in guest.log, guest.log[-500:]
    return int(TOLD.findall(guest.log)[-1])


def blocks_of(image, fmt, tmp, lodge_img):
    raw = os.path.join(tmp, "raw")
    subprocess.run([lodge_img, "convert", "-f", fmt, "-O", "raw", image, raw], check=True)
    out = []
    with open(raw, "rb") as f:
        for b in range(SIZE // BLOCK):
            data = f.read(BLOCK)
            seq, where = struct.unpack_from("<QQ", data)
            assert data == data[:16] * (BLOCK // 16), f"block {b} is torn"
            assert where == b or seq == 0, f"block {b} holds block {where}"
            out.append(seq)
    return out


def verify(before, after, seed, first, told):
    """`after` must be what the writes make of `before`, all of them up to `told` included."""
    allowed, floor = [{s} for s in before], list(before)
    for seq, at, n in writes(seed, first, SIZE // BLOCK):
        if seq > max(max(after), told):
            break
        for b in range(at, at + n):
            allowed[b].add(seq)
            if seq <= told:
                floor[b] = seq
    for b, seq in enumerate(after):
        assert seq in allowed[b] and seq >= floor[b], f"block {b} holds write {seq}, not {floor[b]} or later"


def check(image, fmt, lodge_img):
    if fmt != "qcow2":
        return
    for tool in (lodge_img, "qemu-img"):
        try:
            p = subprocess.run([tool, "check", image], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        assert p.returncode in (0, 3), p.stdout + p.stderr     # 3: leaked clusters, nothing worse


def main():
    lodge, writer = sys.argv[1:3]
    opts = dict(zip(sys.argv[3::2], sys.argv[4::2]))
    fmt, rnd = opts.get("--format", "qcow2"), random.Random(int(opts.get("--seed", "1")))
    lodge_img = os.path.join(os.path.dirname(os.path.abspath(lodge)), "lodge-qemu-img")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as tmp:
        image, initramfs = os.path.join(tmp, "disk"), archive_with(tmp, {"writer": writer})
        subprocess.run([lodge_img, "create", "-q", "-f", fmt, image, str(SIZE)], check=True)
        before, first = [0] * (SIZE // BLOCK), 1
        for k in range(int(opts.get("--kills", "4"))):
            seed = rnd.getrandbits(32)
            told = run_and_kill([lodge, "qemu", "-accel", "soft", "-kernel", f"{GUEST}/vmlinuz", "-initrd", initramfs, "-m", "256M", "-nodefaults",
                                 "-display", "none", "-serial", "stdio", "-drive", f"file={image},format={fmt},if=virtio,discard=unmap",
                                 "-append", f"console=ttyS0 quiet rdinit=/writer writer.seed={seed} writer.first={first}"], rnd)
            check(image, fmt, lodge_img)
            after = blocks_of(image, fmt, tmp, lodge_img)
            verify(before, after, seed, first, told)
            print(f"kill {k + 1}: {told - first} writes flushed, {max(after) - told if max(after) > told else 0} more found", flush=True)
            before, first = after, max(max(after), told) + 1000


if __name__ == "__main__":
    main()
