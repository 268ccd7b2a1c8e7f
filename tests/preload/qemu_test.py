"""Debian's QEMU on softkvm: its machines boot, its snapshots restore, its monitor and gdb show what the guest has.

usage: qemu_test.py LODGE STATE.S TEST..."""
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "boot"))
import vm  # noqa: E402

QEMU = shutil.which("qemu-system-x86_64")


def skip(why):
    print("SKIP: " + why)
    sys.exit(77)


def need(*programs):
    for p in programs:
        if not shutil.which(p):
            skip(f"{p} is not installed")


class Qemu(vm.Vm):
    """QEMU under kvm-run; its monitor on a socket, its first serial line on pipes."""

    def __init__(self, lodge, tmp, *args, accel="kvm"):
        self.path = os.path.join(tmp, f"monitor{time.monotonic_ns()}")
        super().__init__([lodge, "kvm-run", "--", QEMU, "-accel", accel, "-nodefaults", "-display", "none", "-serial", "stdio",
                          "-monitor", f"unix:{self.path},server=on,wait=off", *args], timeout=600)
        self.mon = None

    def hmp(self, command):
        if not self.mon:
            self.mon = self.connect()
            self.prompt()
        self.mon.sendall(command.encode() + b"\n")
        return self.prompt()

    def connect(self):
        for _ in range(600):
            try:
                s = socket.socket(socket.AF_UNIX)
                s.connect(self.path)
                s.settimeout(120)
                return s
            except OSError:
                s.close()
                assert self.proc.poll() is None, "QEMU ended: " + self.proc.stdout.read().decode()
                time.sleep(0.05)
        raise AssertionError("no monitor")

    def prompt(self):
        data = b""
        while not data.endswith(b"(qemu) "):
            more = self.mon.recv(65536)
            assert more, "the monitor was closed"
            data += more
        text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", data.decode("utf-8", "replace")).replace("\r", "")
        return text.split("\n", 1)[1] if "\n" in text else text


def number(text, pattern):
    m = re.search(pattern, text)
    assert m, f"no {pattern!r} in:\n{text}"
    return int(m.group(1), 16)


def same(what, got, want):
    assert got == want, f"{what}: {got:#x}, but the guest has {want:#x}"


# -- a guest of our own: registers, chips, gdb ------------------------------------------------------
def state_guest(source, tmp):
    """The binary, and the addresses of its symbols."""
    need("cc", "objcopy", "nm")
    elf, flat = os.path.join(tmp, "state.elf"), os.path.join(tmp, "state.bin")
    subprocess.run(["cc", "-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", "-o", elf, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", elf, flat], check=True)
    out = subprocess.run(["nm", elf], check=True, stdout=subprocess.PIPE, text=True).stdout
    return flat, {f[2]: int(f[0], 16) for f in (line.split() for line in out.splitlines()) if len(f) == 3}


SEEN = ["CR0", "CR3", "CR4", "EFER", "id", "version", "tpr", "ldr", "dfr", "svr", "lvt timer", "lvt lint0", "lvt lint1", "lvt error",
        "imr0", "imr1"]


def seen_by_guest(q):
    """What the guest wrote down, read back with the monitor."""
    text = q.hmp(f"xp /{2 * len(SEEN)}wx 0x5000")
    words = [int(w, 16) for w in re.findall(r"0x([0-9a-f]{8})", text)]
    assert len(words) == 2 * len(SEEN), text
    return {name: words[2 * i] | words[2 * i + 1] << 32 for i, name in enumerate(SEEN)}


def check_registers(q, seen):
    r = q.hmp("info registers")
    for name in ("CR0", "CR3", "CR4", "EFER"):
        same(name, number(r, name + r"=\s*([0-9a-f]+)"), seen[name])
    want = {"RAX": 0x0123456789abcdef, "RBX": 0xb, "RCX": 0xc, "RDX": 0xd, "RSI": 0x51, "RDI": 0xd1, "RBP": 0xb9, "RSP": 0x9000,
            "R8 ": 0x8182838485868788, "R15": 0x9192939495969798, "DR0": 0x12345678}
    for name, value in want.items():
        same(name, number(r, name + r"=\s*([0-9a-f]+)"), value)
    same("RFL.DF", number(r, r"RFL=([0-9a-f]+)") & 0x400, 0x400)
    same("XMM03", number(r, r"XMM03=[0-9a-f]+ ([0-9a-f]+)"), 0x0123456789abcdef)
    assert re.search(r"FPR0=c90fdaa22168c23[45] 4000", r), r       # QEMU shows what KVM gives: ST(0) first
    same("IDT", number(r, r"IDT=\s*([0-9a-f]+)"), 0x6000)
    assert "CS =0008" in r and "CS64" in r and "HLT=1" in r, r


def check_lapic(q, seen):
    r = q.hmp("info lapic")
    same("SPIV", number(r, r"SPIV\s+0x([0-9a-f]+)"), seen["svr"])
    same("TPR", number(r, r"TPR\s+0x([0-9a-f]+)"), seen["tpr"])
    same("LVTT", number(r, r"LVTT\s+0x([0-9a-f]+)"), seen["lvt timer"])
    same("LVT0", number(r, r"LVT0\s+0x([0-9a-f]+)"), seen["lvt lint0"])
    same("LVT1", number(r, r"LVT1\s+0x([0-9a-f]+)"), seen["lvt lint1"])
    same("LVTERR", number(r, r"LVTERR\s+0x([0-9a-f]+)"), seen["lvt error"])


def check_pic(q, seen):
    r = q.hmp("info pic")
    for n in (0, 1):
        same(f"pic{n} imr", number(r, rf"pic{n}: irr=[0-9a-f]+ imr=([0-9a-f]+)"), seen[f"imr{n}"])
        same(f"pic{n} irq_base", number(r, rf"pic{n}: .*irq_base=([0-9a-f]+)"), 0x50 + 8 * n)


def monitor(lodge, source, tmp):
    """info registers, info lapic and info pic, with the chips in softkvm, half there and in QEMU."""
    kernel, _ = state_guest(source, tmp)
    for chips, cpu in (("on", "host"), ("split", "qemu64"), ("off", "host")):
        q = Qemu(lodge, tmp, "-M", "q35", "-cpu", cpu, "-m", "64M", "-kernel", kernel, accel=f"kvm,kernel-irqchip={chips}")
        try:
            q.expect("K")
            for _ in range(100):
                if "HLT=1" in q.hmp("info registers"):
                    break
                time.sleep(0.05)
            seen = seen_by_guest(q)
            same("tpr written", seen["tpr"], 0x30)
            same("svr written", seen["svr"], 0x1a7)
            same("imr written", seen["imr1"], 0x6e)
            check_registers(q, seen)
            check_lapic(q, seen)
            check_pic(q, seen)
        finally:
            q.kill()


def gdb(lodge, source, tmp):
    """-S, breakpoints in hardware and software, single steps, a watchpoint, registers written."""
    need("gdb")
    kernel, at = state_guest(source, tmp)
    for chips in ("on", "split"):
        sock = os.path.join(tmp, "gdb" + chips)
        q = Qemu(lodge, tmp, "-M", "q35", "-m", "64M", "-kernel", kernel, "-S", "-chardev", f"socket,path={sock},server=on,wait=off,id=g",
                 "-gdb", "chardev:g", accel=f"kvm,kernel-irqchip={chips}")
        try:
            assert "paused" in q.hmp("info status")
            out = run_gdb(sock, at)
        finally:
            q.kill()
        want = ["reset 0xfff0", f"break {at['here']:#x}", "step 0x1111222233334444", "step 0x1111222233334445", "pushed 0x1111222233334445",
                f"soft {at['stepped']:#x} 0x1111222233334445", "swapped 0x1111222233334445", f"watch {at['written']:#x} 0x5a5a",
                f"end {at['done'] + 1:#x} 0x77"]
        got = [line for line in out.splitlines() if line.split(" ")[0] in {w.split(" ")[0] for w in want}]
        assert got == want, f"kernel-irqchip={chips}: wanted\n{want}\ngot\n{got}\nin\n{out}"


def run_gdb(sock, at):
    here, stepped, word, done = (f"{at[k]:#x}" for k in ("here", "stepped", "word", "done"))
    commands = ["set pagination off", "set confirm off", "set architecture i386:x86-64", f"target remote {sock}",
                'printf "reset %#lx\\n", $rip', f"hbreak *{here}", "continue", 'printf "break %#lx\\n", $rip', "delete",
                "stepi", 'printf "step %#lx\\n", $rax', "stepi", 'printf "step %#lx\\n", $rax', "stepi",
                'printf "pushed %#lx\\n", *(long *)$rsp', f"break *{stepped}", "continue", 'printf "soft %#lx %#lx\\n", $rip, $rbx', "delete",
                "stepi", 'printf "swapped %#lx\\n", $rcx', f"watch *(int *){word}", "continue",
                f'printf "watch %#lx %#x\\n", $rip, *(int *){word}', "delete", f"hbreak *{done}", "continue", "delete", "set $rbx=0x77", "stepi",
                'printf "end %#lx %#lx\\n", $rip, $rbx', "kill"]
    argv = ["gdb", "-nx", "-batch"]
    for c in commands:
        argv += ["-ex", c]
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False).stdout


# -- Debian ------------------------------------------------------------------------------------------
def debian(cpus, *more):
    g = vm.guest_dir()
    return ["-m", "512M", "-smp", str(cpus), "-kernel", f"{g}/vmlinuz", "-initrd", f"{g}/initramfs", "-append", "console=ttyS0 panic=-1",
            "-no-reboot", *more]


def disk(tmp, fmt):
    path = os.path.join(tmp, f"disk.{fmt}")
    raw = os.path.join(vm.guest_dir(), "disk.img")
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", fmt, raw, path], check=True)
    return path


def to_shell(q):
    q.expect(r"lodge:/root# ")
    q.send("stty -echo; PS1=; echo rea''dy\n")
    q.expect(r"ready\n")


def boot(q, cpus):
    to_shell(q)
    assert re.search(rf"^{cpus}$", q.run("nproc"), re.M)     # the kernel may say something in between
    assert "file system" in q.run("cat /mnt/README")
    assert "10.0.2." in q.run("ip -4 addr show eth0")
    q.run("wget -q -O /dev/null http://10.0.2.2:1/ || true; dd if=/dev/vda of=/dev/null bs=1M count=64 2>/dev/null")
    q.send("poweroff -f\n")
    assert q.wait() == 0


def direct(lodge, source, tmp):
    """Debian with disk and network: who holds the interrupt chips, processor models, one and two vCPUs."""
    image = disk(tmp, "qcow2")
    for chips, machine, cpu, cpus in (("on", "q35", "host", 2), ("split", "q35", "EPYC", 2), ("off", "pc", "host", 1), ("on", "pc", "qemu64", 1),
                                      ("split", "q35", "Haswell-noTSX", 1)):
        q = Qemu(lodge, tmp, "-M", machine, "-cpu", cpu, *debian(cpus), "-drive", f"file={image},if=virtio,snapshot=on", "-nic",
                 "user,model=virtio-net-pci", accel=f"kvm,kernel-irqchip={chips}")
        try:
            begin = time.monotonic()
            boot(q, cpus)
            print(f"     {chips} {machine} {cpu} {cpus} CPU: {time.monotonic() - begin:.1f} s", flush=True)
        except AssertionError as err:
            raise AssertionError(f"{chips} {machine} {cpu} {cpus}: {err}\n{q.log[-3000:]}") from None
        finally:
            q.kill()


def seabios(lodge, source, tmp):
    """From a disk with a boot loader, by SeaBIOS and syslinux."""
    need("syslinux", "mformat", "mcopy")
    g = vm.guest_dir()
    image, cfg = os.path.join(tmp, "boot.img"), os.path.join(tmp, "syslinux.cfg")
    with open(image, "wb") as f:
        f.truncate(40 << 20)
    with open(cfg, "w", encoding="ascii") as f:
        f.write("SERIAL 0 115200\nDEFAULT l\nLABEL l\nKERNEL /vmlinuz\nINITRD /initrd\nAPPEND console=ttyS0 panic=-1\n")
    subprocess.run(["mformat", "-i", image, "-F", "-v", "LODGE", "::"], check=True)
    for name, to in ((f"{g}/vmlinuz", "vmlinuz"), (f"{g}/initramfs", "initrd"), (cfg, "syslinux.cfg")):
        subprocess.run(["mcopy", "-i", image, name, "::/" + to], check=True)
    subprocess.run(["syslinux", "-i", image], check=True)
    for cpus, bus in ((1, "ide"), (2, "virtio")):
        second = ("-drive", f"file={disk(tmp, 'qcow2')},if=virtio,snapshot=on") if bus == "ide" else ()
        q = Qemu(lodge, tmp, "-M", "q35", "-cpu", "host", "-m", "512M", "-smp", str(cpus), "-no-reboot", "-drive",
                 f"file={image},format=raw,if={bus},snapshot=on", *second, "-nic", "user,model=virtio-net-pci")
        try:
            to_shell(q)
            assert re.search(rf"^{cpus}$", q.run("nproc"), re.M)     # the kernel may say something in between
            q.send("poweroff -f\n")
            assert q.wait() == 0
        except AssertionError as err:
            raise AssertionError(f"{bus} {cpus}: {err}\n{q.log[-3000:]}") from None
        finally:
            q.kill()


def snapshot(lodge, source, tmp):
    """savevm and loadvm of a running machine: processes, files, time go back and go on."""
    image = disk(tmp, "qcow2")
    for chips, cpus in (("on", 2), ("split", 1)):
        q = Qemu(lodge, tmp, "-M", "q35", "-cpu", "host", *debian(cpus), "-drive", f"file={image},if=virtio", "-nic", "none",
                 accel=f"kvm,kernel-irqchip={chips}")
        try:
            to_shell(q)
            q.run("X=before; echo one >/mnt/state; sync; (while :; do :; done) & echo $!")
            assert q.hmp("savevm first").strip() == "(qemu)"
            # `wait`, for this ash ends where SIGCHLD finds it reading its terminal (under TCG as well)
            q.run("X=after; echo two >/mnt/state; sync; kill %1; wait")
            assert "after two" in q.run("echo $X $(cat /mnt/state)")
            assert q.hmp("loadvm first").strip() == "(qemu)"
            assert "before one" in q.run("echo $X $(cat /mnt/state)"), q.log[-500:]
            q.run("jobs | grep -q Running && sleep 0.2 && kill %1 && wait")
            q.run("sha256sum /bin/busybox | cut -c1-8; dmesg | grep -iE 'bug|oops|panic:' | head -n 1 | grep . && false || true")
            assert q.hmp("delvm first").strip() == "(qemu)"
            q.send("poweroff -f\n")
            assert q.wait() == 0
        except AssertionError as err:
            raise AssertionError(f"{chips} {cpus}: {err}\n{q.log[-3000:]}") from None
        finally:
            q.kill()


def uptime(q):
    return float(re.search(r"^up ([0-9.]+)", q.run("echo up $(cat /proc/uptime)"), re.M).group(1))


def migrate(lodge, source, tmp):
    """A running machine moves to another QEMU, whose vCPUs were never in that state: memory that is written meanwhile, registers, time."""
    for log, cpu, cpus in (("", "qemu64", 1), (",dirty-ring-size=4096", "host", 2)):
        path = os.path.join(tmp, f"move{cpus}")
        args = ["-M", "q35", "-cpu", cpu, *debian(cpus), "-nic", "none"]
        q, to = Qemu(lodge, tmp, *args, accel="kvm" + log), None
        try:
            to_shell(q)
            q.run("X=kept; dd if=/dev/urandom of=/tmp/r bs=1M count=16 2>/dev/null; sha256sum /tmp/r >/tmp/sum")
            q.run("(while :; do dd if=/dev/urandom of=/tmp/x bs=64k count=16 2>/dev/null; done) & true")
            to = Qemu(lodge, tmp, *args, "-incoming", f"unix:{path}", accel="kvm" + log)
            assert "inmigrate" in to.hmp("info status")
            q.hmp("migrate_set_parameter max-bandwidth 1G")
            q.hmp("migrate_set_parameter downtime-limit 2000")
            up = uptime(q)
            q.hmp(f"migrate -d unix:{path}")
            state = ""
            for _ in range(1200):
                state = q.hmp("info migrate")
                if re.search("status: (completed|failed|cancelled)", state):
                    break
                time.sleep(0.1)
            assert "status: completed" in state, state
            for _ in range(1200):           # input that comes before would be taken for that of the device before it was loaded
                if "running" in to.hmp("info status"):
                    break
                time.sleep(0.1)
            assert "kept /tmp/r: OK" in to.run("echo $X $(sha256sum -c /tmp/sum)")
            assert up <= uptime(to) < up + 600
            assert re.search(rf"^{cpus}$", to.run("nproc"), re.M)
            to.send("poweroff -f\n")
            assert to.wait() == 0
        except AssertionError as err:
            raise AssertionError(f"{log} {cpu} {cpus}: {err}\n{q.log[-1000:]}\n-- there:\n{to.log[-2000:] if to else ''}") from None
        finally:
            q.kill()
            if to:
                to.kill()


def main():
    lodge, source, names = sys.argv[1], sys.argv[2], sys.argv[3:]
    if not QEMU:
        skip("qemu-system-x86_64 is not installed")
    failed = 0
    for test in (monitor, gdb, direct, seabios, snapshot, migrate):
        if names and test.__name__ not in names:
            continue
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as tmp:
            try:
                test(lodge, source, tmp)
                print(f"ok   {test.__name__} {time.monotonic() - begin:.1f} s")
            except AssertionError as err:
                failed += 1
                print(f"FAIL {test.__name__}: {err}")
    sys.exit(1 if failed else 0)


main()
