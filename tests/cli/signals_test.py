#!/usr/bin/env python3
"""SIGTERM, SIGINT and SIGHUP at any moment of a machine's life: it ends soon, and what it made is gone. signals_test.py LODGE [VMLINUZ]

Early, before the signal is Lodge's to take, it dies by it; later the status is 0.
"""
import os
import signal
import subprocess
import sys
import tempfile
import time

import bad_input

LODGE = sys.argv[1]
KERNELS = [k for k in sys.argv[2:] if os.path.exists(k)]
SOON = 60       # seconds; a hundred times what it takes
signal.signal(signal.SIGHUP, signal.SIG_DFL)      # nohup(1) would have it ignored from the start
failures = 0


def start(tmp, *argv):
    return subprocess.Popen([LODGE, *argv, "-pidfile", os.path.join(tmp, "pid"), "-chardev",
                             f"socket,id=s,path={tmp}/socket,server=on,wait=off", "-device", "isa-debugcon,chardev=s"],
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(what, p, tmp, known, allowed):
    global failures
    try:
        _, err = p.communicate(timeout=SOON)
    except subprocess.TimeoutExpired:
        p.kill()
        p.communicate()
        failures += 1
        print(f"FAIL {what}: still there after {SOON} s")
        return
    left = [n for n in os.listdir(tmp) if n not in known]
    early = p.returncode < 0 # died of the signal: nobody could remove a socket that was just made
    if p.returncode not in allowed or err or ("pid" in left if early else left):
        failures += 1
        print(f"FAIL {what}: status {p.returncode}, left {left}, said {err.decode(errors='replace')}")


def rounds(tmp, what, argv, delays):
    known = os.listdir(tmp)
    for i, delay in enumerate(delays):
        sig = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[i % 3]
        p = start(tmp, *argv)
        time.sleep(delay)
        p.send_signal(sig)
        if i % 2 and p.poll() is None:
            p.send_signal(sig)      # once more, while it ends
        finish(f"{what}: {sig.name} after {delay} s", p, tmp, known, (0, -sig))
        for name in ("socket", "pid"):
            if os.path.exists(os.path.join(tmp, name)):
                os.unlink(os.path.join(tmp, name))


def when_it_runs(tmp, what, argv, sig):
    """The pid file is written once all is set up: from then on the status is 0."""
    known = os.listdir(tmp)
    p = start(tmp, *argv)
    deadline = time.monotonic() + SOON
    while not os.path.exists(os.path.join(tmp, "pid")) and p.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    p.send_signal(sig)
    finish(f"{what}: {sig.name} when it runs", p, tmp, known, (0,))


with tempfile.TemporaryDirectory() as tmp:
    tiny, initrd, disk = (os.path.join(tmp, n) for n in ("tiny", "initrd", "disk"))
    bad_input.multiboot(tiny)
    for path, size in ((initrd, 200 << 20), (disk, 1 << 20)):
        with open(path, "wb") as f:
            f.truncate(size)
    base = ("qemu", "-nodefaults", "-display", "none", "-accel", "soft", "-drive", f"file={disk},format=raw,if=virtio", "-snapshot")
    idle = (*base, "-kernel", tiny)
    loading = (*base, "-kernel", tiny, "-m", "512M", "-initrd", initrd)
    rounds(tmp, "idle guest", idle, (0, 0.01, 0.02, 0.05, 0.1, 0.3))
    rounds(tmp, "while loading", loading, (0, 0.02, 0.05, 0.1, 0.2, 0.4))
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        when_it_runs(tmp, "idle guest", idle, sig)
        when_it_runs(tmp, "four vCPUs", (*idle, "-smp", "4"), sig)
    for k in KERNELS:
        boot = (*base, "-kernel", k, "-m", "256M", "-smp", "2", "-serial", f"file:{tmp}/serial", "-append", "console=ttyS0")
        with open(os.path.join(tmp, "serial"), "wb"):
            pass
        rounds(tmp, "booting", boot, (0.2, 0.7, 1.5))
        when_it_runs(tmp, "booting", boot, signal.SIGTERM)
print(f"{failures} failures")
sys.exit(1 if failures else 0)
