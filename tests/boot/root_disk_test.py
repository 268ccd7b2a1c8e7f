#!/usr/bin/env python3
"""The Debian root disk that `./bootstrap run` boots: systemd, network, packages; with --long real work in it.

`root_disk_test.py LODGE [TEST...]`; needs build/guest/debian.img (tools/debian-disk), skipped without it. Nothing is written to that disk."""
import os
import re
import subprocess
import sys
import tempfile
import time

import vm

GUEST = vm.guest_dir()
DISK = f"{GUEST}/debian.img"
PROMPT = r"root@lodge:[^\n]*# "


def args(*more, memory="1G", kernel="vmlinuz", initrd="initramfs"):
    return ("qemu", "-kernel", f"{GUEST}/{kernel}", "-initrd", f"{GUEST}/{initrd}", "-append", "console=ttyS0 root=/dev/vda net.ifnames=0",
            "-m", memory, "-drive", f"file={DISK},format=raw,if=virtio,snapshot=on", "-nic", "user", "-accel", "soft", "-nographic", *more)


def shell(guest):
    begin = time.monotonic()
    guest.expect(PROMPT)
    with open(f"/proc/{guest.proc.pid}/stat", encoding="ascii") as f:
        cpu = sum(int(v) for v in f.read().rsplit(")", 1)[1].split()[11:13]) / os.sysconf("SC_CLK_TCK")
    print(f"  prompt after {time.monotonic() - begin:.1f} s, {cpu:.1f} s of CPU time")
    guest.send("bind 'set enable-bracketed-paste off'; stty -echo; PS1=; dmesg -n 1; echo quiet-\"\"now\n")
    guest.expect(r"\nquiet-now\n")


def power_off(guest):
    guest.send("systemctl poweroff\n")
    status = guest.wait()
    assert status == 0, f"exit status {status}"


def systemd(start):
    """Boots to a prompt with the network up, nothing failed, and shuts down."""
    guest = start(*args())
    shell(guest)
    assert "10.0.2.15" in guest.run("ip -4 addr show eth0")
    guest.run("systemctl is-system-running --wait || true; systemd-analyze || true")
    failed = guest.run("systemctl --failed --no-legend --plain")
    assert not failed.strip(), failed
    assert "Debian GNU/Linux 12" in guest.run("cat /etc/os-release")
    guest.run("dpkg --audit && apt-cache policy >/dev/null")
    power_off(guest)


TESTS = [systemd]

if __name__ == "__main__":
    if not os.path.exists(DISK):
        print("no Debian root disk: run tools/debian-disk first")
        sys.exit(77)
    vm.main(TESTS)
