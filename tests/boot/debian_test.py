#!/usr/bin/env python3
"""Boots Debian's cloud kernel with Lodge and works in it: disk, network, CPUs, power off."""
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import vm

GUEST = vm.guest_dir()
PROMPT = r"lodge:[^\n]*# "


def args(disk, *more, append="console=ttyS0"):
    return ("run", "--kernel", f"{GUEST}/vmlinuz", "--initrd", f"{GUEST}/initramfs", "--append", append,
            "--memory", "512M", "--disk", disk, "--net", "user", "--accel", "soft", *more)


def disk_copy(tmp):
    path = os.path.join(tmp, "disk.img")
    subprocess.run(["cp", "--sparse=always", f"{GUEST}/disk.img", path], check=True)
    return path


class Server:
    """An HTTP server on the loopback interface with one folder."""

    def __init__(self, folder):
        def handler(*a):
            return Quiet(*a, directory=folder)
        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self.httpd.server_address[1]
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def shell(guest):
    guest.expect(r"'poweroff' or Ctrl-D ends the machine")
    guest.expect(PROMPT)
    guest.send("stty -echo; PS1=; dmesg -n 1; echo quiet-\"\"now\n")
    guest.expect(r"\nquiet-now\n")


def power_off(guest):
    guest.send("poweroff -f\n")
    status = guest.wait()
    assert status == 0, f"exit status {status}"


def lockstep(start, whole=False):
    """Translator and interpreter side by side from the first instruction: no difference on the way."""
    guest = start("run", "--kernel", f"{GUEST}/vmlinuz", "--initrd", f"{GUEST}/initramfs", "--append", "console=ttyS0 earlyprintk=ttyS0",
                  "--memory", "512M", "--accel", "soft,mode=lockstep", timeout=7200 if whole else 900)
    if whole:
        shell(guest)
        power_off(guest)
        counted = re.search(r"lockstep: .* no difference", guest.log)
        assert counted, "the machine ended without a summary"
        print(counted.group())
    else:
        guest.expect(r"Linux version")
    assert "first difference" not in guest.log, "translator and interpreter differ"
    assert "error: lockstep" not in guest.log, "the comparison came to its end"


def lockstep_whole(start):
    lockstep(start, True)


def one_cpu(start):
    with tempfile.TemporaryDirectory() as tmp:
        disk = disk_copy(tmp)
        guest = start(*args(disk))
        shell(guest)
        assert guest.run("nproc").strip() == "1"
        assert "10.0.2.15" in guest.run("ip -4 addr show eth0")
        guest.run("echo kept >/mnt/kept && sync")
        folder = os.path.join(tmp, "www")
        os.mkdir(folder)
        shutil.copy(f"{GUEST}/vmlinuz", folder)
        server = Server(folder)
        guest.run(f"wget -q -O /tmp/k http://10.0.2.2:{server.port}/vmlinuz")
        want = hashlib.sha256(open(f"{GUEST}/vmlinuz", "rb").read()).hexdigest()
        assert want in guest.run("sha256sum /tmp/k")
        power_off(guest)
        # what was synced is in the image, as e2fsprogs sees it
        out = subprocess.run(["/sbin/debugfs", "-R", "cat /kept", disk], capture_output=True, text=True, check=True)
        assert out.stdout == "kept\n", out
        fsck = subprocess.run(["/sbin/e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
        assert fsck.returncode == 0, fsck.stdout


def four_cpus(start):
    with tempfile.TemporaryDirectory() as tmp:
        guest = start(*args(disk_copy(tmp), "--cpus", "4"))
        shell(guest)
        assert guest.run("nproc").strip() == "4"
        assert guest.run("grep -c ^processor /proc/cpuinfo").strip() == "4"
        work = "for i in 1 2 3 4; do (dd if=/dev/urandom bs=64k count=16 2>/dev/null | gzip | gunzip | sha256sum >/dev/null && echo done$i) & done; wait"
        out = guest.run(work)
        for i in "1234":
            assert f"done{i}" in out, out
        dmesg = guest.run("dmesg")
        bad = [line for line in dmesg.splitlines()
               if re.search(r"WARNING|BUG:|Call Trace|Oops|soft lockup|rcu:.*stall|unstable|firmware bug", line, re.I)]
        assert not bad, "\n".join(bad)
        power_off(guest)


def many_cpus(start, n):
    """By hand, many more CPUs than the host has: all come up, each of them works, one goes away and comes back, power off."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        guest = start(*args(disk_copy(tmp), "--cpus", str(n)), timeout=1800)
        shell(guest)
        print(f"  {n} CPUs: shell after {time.monotonic() - begin:.0f} s")
        assert guest.run("cat /sys/devices/system/cpu/online").strip() == f"0-{n - 1}"
        assert guest.run("grep -c ^processor /proc/cpuinfo").strip() == str(n)
        work = f"(i=0; while [ $i -lt {n} ]; do (taskset $(printf %x $((1 << i))) sh -c 'seq 2000 | sha256sum' >/tmp/out.$i) & i=$((i + 1)); done; wait)"     # without the shell's notes about jobs
        guest.run(work)
        assert guest.run("cat /tmp/out.* | sort -u | wc -l").strip() == "1"
        assert guest.run("ls /tmp/out.* | wc -l").strip() == str(n)
        last = f"/sys/devices/system/cpu/cpu{n - 1}/online"
        guest.run(f"echo 0 >{last} && [ $(nproc) = {n - 1} ] && echo 1 >{last} && [ $(nproc) = {n} ]")
        log = guest.run("dmesg").splitlines()
        slow = [line for line in log if re.search(r"soft lockup|rcu:.*stall|unstable", line)]
        print("\n".join(["  the kernel found this host slow:"] + slow) if slow else "  nothing in the kernel's log about time")
        bad = [line for line in log if re.search(r"WARNING|BUG:|Call Trace|Oops|firmware bug", line, re.I) and "soft lockup" not in line]
        assert slow or not bad, "\n".join(bad)
        power_off(guest)
        print(f"  off after {time.monotonic() - begin:.0f} s")


def sixteen_cpus(start):
    many_cpus(start, 16)


def sixty_four_cpus(start):
    many_cpus(start, 64)


def killed_after_sync(start):
    """A disk that was flushed is intact after kill -9."""
    with tempfile.TemporaryDirectory() as tmp:
        disk = disk_copy(tmp)
        guest = start(*args(disk))
        shell(guest)
        guest.run("for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/f$i bs=64k count=4 2>/dev/null; done; cd /mnt; sha256sum f* >sums; sync")
        sums = guest.run("cat /mnt/sums")
        guest.kill()
        subprocess.run(["/sbin/e2fsck", "-fy", disk], capture_output=True, check=False)
        for line in sums.strip().splitlines():
            want, name = line.split()
            data = subprocess.run(["/sbin/debugfs", "-R", f"cat /{name}", disk], capture_output=True, check=True).stdout
            assert hashlib.sha256(data).hexdigest() == want, name


def program_32bit(start):
    """A static i386 program under the 64-bit kernel gives what it gives natively."""
    with tempfile.TemporaryDirectory() as tmp:
        program = os.path.join(tmp, "g32")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guest32.c")
        subprocess.run(["cc", "-m32", "-O1", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-pie", "-no-pie", "-mno-sse",
                        "-o", program, source], check=True)
        disk = disk_copy(tmp)
        subprocess.run(["/sbin/debugfs", "-w", "-R", f"write {program} g32", disk], check=True, capture_output=True)
        guest = start(*args(disk))
        shell(guest)
        got = guest.run("cp /mnt/g32 /tmp/g32 && chmod 755 /tmp/g32 && /tmp/g32 && /tmp/g32")
        assert re.fullmatch(r"(32-bit ok [0-9a-f]{8}\n)\1", got), got
        try:
            native = subprocess.run([program], capture_output=True, text=True, check=True).stdout
            assert got == native * 2, (got, native)
        except OSError:
            print("  this host runs no 32-bit programs: not compared")
        power_off(guest)


def other_kernel(start, flavour):
    """Another of Debian's kernels (tools/guest --kernel): disk, network, two CPUs, nothing bad in its log."""
    folder = f"{GUEST}/{flavour}"
    if not os.path.exists(f"{folder}/initramfs"):
        print(f"no {flavour} kernel: run 'tools/guest --kernel {flavour}' first")
        sys.exit(77)
    with tempfile.TemporaryDirectory() as tmp:
        guest = start("run", "--kernel", f"{folder}/vmlinuz", "--initrd", f"{folder}/initramfs", "--append", "console=ttyS0", "--memory", "1G",
                      "--disk", f"{disk_copy(tmp)},format=raw", "--net", "user", "--accel", "soft", "--cpus", "2")
        shell(guest)
        print("  " + guest.run("uname -r").strip())
        assert guest.run("nproc").strip() == "2"
        assert "10.0.2.15" in guest.run("ip -4 addr show eth0")
        guest.run("dd if=/dev/urandom of=/mnt/f bs=64k count=64 2>/dev/null; sync; echo 3 >/proc/sys/vm/drop_caches; sha256sum /mnt/f")
        bad = [line for line in guest.run("dmesg").splitlines() if re.search(r"WARNING|BUG:|Call Trace|Oops|soft lockup|rcu:.*stall", line)]
        assert not bad, "\n".join(bad)
        power_off(guest)


def kernel_generic(start):
    other_kernel(start, "generic")


def kernel_backports(start):
    other_kernel(start, "backports")


def kernel_testing(start):
    other_kernel(start, "testing")


def kernel_32bit(start, flavour):
    """Debian's 32-bit kernel with 32-bit programs: legacy paging, two CPUs; started by lodge, and by QEMU on softkvm."""
    folder = f"{GUEST}/{flavour}"
    if not os.path.exists(f"{folder}/initramfs"):
        print(f"no {flavour} kernel: run 'tools/guest --kernel {flavour}' first")
        sys.exit(77)
    files = ["-kernel", f"{folder}/vmlinuz", "-initrd", f"{folder}/initramfs", "-append", "console=ttyS0 panic=-1", "-m", "512", "-smp", "2"]
    work_in_32bit(start("qemu", "-accel", "soft", "-nographic", "-nodefaults", "-serial", "stdio", "-no-reboot", *files))
    if not shutil.which("qemu-system-x86_64"):
        print("  no QEMU: only lodge started it")
        return
    work_in_32bit(start("kvm-run", "--", "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-nodefaults", "-display", "none", "-serial", "stdio",
                        "-no-reboot", *files))


def work_in_32bit(guest):
    shell(guest)
    assert guest.run("uname -m").strip() == "i686"
    assert guest.run("nproc").strip() == "2"
    want = hashlib.sha256(b"".join(b"%d\n" % i for i in range(1, 200001))).hexdigest()
    for line in guest.run("(seq 200000 | sha256sum) & (seq 200000 | gzip | gunzip | sha256sum); wait").strip().splitlines():
        assert line.split()[0] == want, line
    guest.run("i=0; while [ $i -lt 300 ]; do (exit 0); i=$((i + 1)); done")
    bad = [line for line in guest.run("dmesg").splitlines() if re.search(r"WARNING: CPU|BUG:|Call Trace|Oops|soft lockup|rcu:.*stall", line)]
    assert not bad, "\n".join(bad)
    power_off(guest)


def kernel_i686(start):
    kernel_32bit(start, "i686")


def kernel_i686_pae(start):
    kernel_32bit(start, "i686-pae")


if __name__ == "__main__":
    vm.main([one_cpu, four_cpus, killed_after_sync, program_32bit, kernel_generic, kernel_backports, kernel_testing, kernel_i686,
             kernel_i686_pae, lockstep] +
            [t for t in (lockstep_whole, sixteen_cpus, sixty_four_cpus) if t.__name__ in sys.argv])
