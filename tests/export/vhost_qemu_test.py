#!/usr/bin/env python3
"""Debian's QEMU boots from a disk that Lodge's storage daemon serves, split and packed rings, raw and qcow2; two machines after each other.

usage: vhost_qemu_test.py LODGE-QEMU-STORAGE-DAEMON BOOT-SECTOR; exit status 77 without qemu-system-x86_64"""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time


def wait_for(path, p):
    """Until somebody listens: the name is there a moment before that."""
    end = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as s:
            if not s.connect_ex(path):
                return
        assert p.poll() is None and time.monotonic() < end, "nobody listens at the socket"
        time.sleep(0.01)


def main():
    daemon, sector = (os.path.abspath(x) for x in sys.argv[1:3])
    if not shutil.which("qemu-system-x86_64") or not shutil.which("qemu-img"):
        print("skipped: no qemu-system-x86_64, or no qemu-img")
        return 77
    top = tempfile.mkdtemp(prefix="vhost-qemu-", dir="/var/tmp")
    os.chdir(top)
    try:
        for fmt in ("raw", "qcow2"):
            with open("disk.raw", "wb") as f:
                f.truncate(4 << 20)
                f.write(open(sector, "rb").read(512))
                f.seek(8 * 512)
                f.write(b"from the daemon\n\0")
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", fmt, "disk.raw", "disk"], check=True)
            path = os.path.join(top, "vu")
            p = subprocess.Popen([daemon, "--blockdev", "driver=file,node-name=f,filename=disk", "--blockdev", f"driver={fmt},node-name=d,file=f",
                                  "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on,num-queues=2"])
            try:
                wait_for(path, p)
                for packed in ("off", "on"):
                    q = subprocess.run(["qemu-system-x86_64", "-accel", "tcg", "-M", "q35,memory-backend=m", "-m", "64", "-object",
                                        "memory-backend-memfd,id=m,size=64M,share=on", "-chardev", f"socket,id=c,path={path}", "-device",
                                        f"vhost-user-blk-pci,chardev=c,num-queues=2,packed={packed},bootindex=0", "-display", "none", "-net", "none",
                                        "-debugcon", "stdio", "-device", "isa-debug-exit,iobase=0x501", "-no-reboot"],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=200)
                    assert q.returncode == 33 and b"from the daemon" in q.stdout, (fmt, packed, q.returncode, q.stdout)
            finally:
                p.terminate()
                assert p.wait(timeout=60) == 0
            subprocess.run(["qemu-img", "convert", "-O", "raw", "disk", "out.raw"], check=True)
            data = open("out.raw", "rb").read()
            assert data[20 * 512:20 * 512 + 16] == b"from the daemon\n", fmt
        print("ok")
        return 0
    finally:
        os.chdir("/")
        shutil.rmtree(top, ignore_errors=True)


sys.exit(main())
