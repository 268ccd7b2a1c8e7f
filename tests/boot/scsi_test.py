#!/usr/bin/env python3
"""Debian's kernel on a virtio-scsi adapter: two units of one disk target, a CD drive, discard, serial numbers, tray, several queues."""
import os
import struct
import subprocess
import tempfile

import vm
from debian_test import power_off, shell

GUEST = vm.guest_dir()
MODULES = ("scsi_common", "scsi_mod", "virtio_scsi", "sd_mod", "cdrom", "sr_mod", "isofs")


def archive_with(tmp, files):
    """The guest's archive with more files (name: path here) behind it: Linux unpacks one after the other."""
    root, names = os.path.join(tmp, "root"), []
    for name, source in files.items():
        folder = os.path.dirname(name)
        if folder and folder not in names:
            names.append(folder)
        os.makedirs(os.path.join(root, folder), exist_ok=True)
        with open(os.path.join(root, name), "wb") as out:
            subprocess.run(["xz", "-dc", source] if source.endswith(".xz") else ["cat", source], stdout=out, check=True)
        os.chmod(os.path.join(root, name), 0o755)
        names.append(name)
    extra = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input="\n".join(names).encode(), stdout=subprocess.PIPE, check=True).stdout
    path = os.path.join(tmp, "initramfs")
    with open(f"{GUEST}/initramfs", "rb") as a, open(path, "wb") as out:
        out.write(a.read())
        out.write(b"\0" * (-out.tell() % 512))
        out.write(extra)
    return path


def modules():
    found = {}
    for folder, _, files in os.walk(f"{GUEST}/modules"):
        found.update({f.split(".")[0].replace("-", "_"): os.path.join(folder, f) for f in files if ".ko" in f})
    return {f"scsi/{m}.ko": found[m] for m in MODULES if m in found}


def both(v, fmt):
    return struct.pack("<" + fmt, v) + struct.pack(">" + fmt, v)


def record(name, lba, size, flags=0):
    r = both(lba, "I") + both(size, "I") + bytes(7) + bytes([flags, 0, 0]) + both(1, "H") + bytes([len(name)]) + name
    r += bytes((len(r) + 2) % 2)
    return bytes([len(r) + 2, 0]) + r


def make_iso(path, text):
    """ISO 9660 with one file: volume descriptors in sectors 16 and 17, path table, root folder, the file."""
    sector = 2048
    root = record(b"\0", 20, sector, 2) + record(b"\1", 20, sector, 2) + record(b"HELLO.TXT;1", 21, len(text))
    pvd = b"\1CD001\1\0" + b" " * 32 + b"LODGE".ljust(32) + bytes(8) + both(32, "I") + bytes(32) + both(1, "H") + both(1, "H") + both(sector, "H")
    pvd += both(10, "I") + struct.pack("<IIII", 18, 0, 0, 0) + record(b"\0", 20, sector, 2)
    pvd = pvd.ljust(881, b" ") + b"\1"
    table = bytes([1, 0]) + struct.pack("<IH", 20, 1) + b"\0\0"
    with open(path, "wb") as f:
        for at, data in ((16, pvd), (17, b"\xffCD001\1"), (18, table), (20, root), (21, text)):
            f.seek(at * sector)
            f.write(data)
        f.truncate(32 * sector)


def blocks(path):
    return os.stat(path).st_blocks * 512


def units(start):
    with tempfile.TemporaryDirectory() as tmp:
        disk, second, iso = (os.path.join(tmp, n) for n in ("disk", "second", "cd.iso"))
        subprocess.run(["cp", "--sparse=always", f"{GUEST}/disk.img", disk], check=True)
        with open(second, "wb") as f:
            f.write(os.urandom(8 << 20))
        make_iso(iso, b"hello from a CD\n")
        guest = start("qemu", "-kernel", f"{GUEST}/vmlinuz", "-initrd", archive_with(tmp, modules()), "-append", "console=ttyS0", "-m", "512M", "-smp", "2",
                      "-nodefaults", "-display", "none", "-serial", "stdio", "-accel", "soft", "-object", "iothread,id=io0", "-object", "iothread,id=io1",
                      "-drive", f"file={disk},format=raw,if=none,id=d0,discard=unmap", "-drive", f"file={second},format=raw,if=none,id=d1,discard=unmap",
                      "-device", "virtio-scsi-pci,id=s0,num_queues=2,iothread=io0:io1", "-device", "scsi-hd,drive=d0,bus=s0.0,scsi-id=3,lun=0,serial=LODGE0001",
                      "-device", "scsi-hd,drive=d1,bus=s0.0,scsi-id=3,lun=1,logical_block_size=512,physical_block_size=4096,rotation_rate=1", "-cdrom", iso)
        shell(guest)
        guest.run("for m in " + " ".join(MODULES) + "; do insmod /scsi/$m.ko 2>/dev/null; done; sleep 1; true")
        guest.run("i=0; while [ ! -b /dev/sdb -o ! -b /dev/sr0 ] && [ $i -lt 20 ]; do sleep 0.5; i=$((i+1)); done; ls /dev/sda /dev/sdb /dev/sr0")
        a, b = ("sda", "sdb") if "3:0" in guest.run("readlink /sys/block/sda/device") else ("sdb", "sda")
        assert guest.run(f"cat /sys/block/{a}/size").strip() == str(os.path.getsize(disk) // 512)
        assert "LODGE0001" in guest.run(f"tail -c +5 /sys/block/{a}/device/vpd_pg80; echo")
        assert guest.run(f"cat /sys/block/{b}/queue/physical_block_size").strip() == "4096"
        assert guest.run(f"cat /sys/block/{b}/queue/rotational").strip() == "0"
        assert guest.run(f"cat /sys/block/{a}/device/type /sys/block/sr0/device/type").split() == ["0", "5"]
        assert guest.run(f"ls /sys/block/{a}/mq | wc -l").strip() == "2"
        guest.run(f"mount -t ext4 -o discard /dev/{a} /mnt && dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null && sync && "
                  "sha256sum /mnt/big >/root/sum && umount /mnt && echo 3 >/proc/sys/vm/drop_caches && "
                  f"mount -t ext4 -o discard /dev/{a} /mnt && sha256sum -c -s /root/sum")
        before = blocks(disk)
        guest.run("rm /mnt/big && echo kept >/mnt/kept && sync && fstrim /mnt && umount /mnt")
        assert blocks(disk) < before - (16 << 20), (before, blocks(disk))
        # the other unit is another disk; write same and discard reach it
        guest.run(f"dd if=/dev/zero of=/dev/{b} bs=1M count=8 conv=fsync 2>/dev/null && blkdiscard /dev/{b} 2>/dev/null || true")
        guest.run(f"[ $(head -c 1M /dev/{b} | tr -d '\\0' | wc -c) = 0 ]")
        guest.run("mkdir -p /cd && mount -t iso9660 -o ro /dev/sr0 /cd")
        assert guest.run("cat /cd/hello.txt").strip() == "hello from a CD"
        guest.run("umount /cd && eject /dev/sr0 && eject -t /dev/sr0; mount -t iso9660 -o ro /dev/sr0 /cd && cat /cd/hello.txt")
        guest.run("echo 1 >/sys/block/" + a + "/device/rescan; ! dmesg | grep -i 'I/O error'")
        guest.run("umount /cd; mount -t ext4 /dev/" + a + " /mnt && cat /mnt/kept && umount /mnt")
        power_off(guest)
        assert subprocess.run(["/sbin/e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    vm.main([units])
