#!/usr/bin/env python3
"""The vhost-user-blk export against a front end written here: memory by descriptor, rings, configuration, stopping and going on, and a
front end that lies about all of it.

usage: vhost_blk_test.py LODGE-QEMU-STORAGE-DAEMON [ROUNDS [SEED]]; exit status 77 where Python lacks eventfd"""
import array
import mmap
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_NUM, SET_ADDR, SET_BASE, GET_BASE, SET_KICK, SET_CALL, SET_ERR = 8, 9, 10, 11, 12, 13, 14
GET_PROTO, SET_PROTO, GET_QUEUES, SET_ENABLE, GET_CONFIG, SET_CONFIG = 15, 16, 17, 18, 24, 25
MEM, UVA, GPA = 4 << 20, 0x7f0000000000, 0x100000000
SIZE = 1 << 20
STEP = 60           # seconds that one answer may take on a machine with other things to do
running = []        # daemons, to be ended whatever happens


def connect(path):
    """The name is there a moment before the socket listens."""
    end = time.monotonic() + STEP
    while True:
        s = socket.socket(socket.AF_UNIX)
        try:
            s.connect(path)
            return s
        except (FileNotFoundError, ConnectionRefusedError):
            s.close()
            assert time.monotonic() < end and running[-1].poll() is None, "nobody listens at the socket"
            time.sleep(0.01)


class Front:
    """One connection: 4 MiB of guest memory at GPA, which the front end has at UVA. Rings at 0 + queue * 64 KiB, data from 1 MiB."""

    def __init__(self, path, features=None):
        self.s = connect(path)
        self.s.settimeout(STEP)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, MEM)
        self.m = mmap.mmap(self.fd, MEM)
        self.fds = []
        self.avail, self.used = {}, {}
        self.offered = self.ask(GET_FEATURES)
        self.features = features or (1 << 32 | 1 << 30 | 1 << 9 | 1 << 13 | 1 << 14 | 1 << 28) & self.offered

    def send(self, req, payload=b"", fds=(), flags=1, size=None):
        head = struct.pack("<III", req, flags, len(payload) if size is None else size)
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.s.sendmsg([head + payload], anc)

    def recv(self):
        head = self.s.recv(12, socket.MSG_WAITALL)
        if len(head) < 12:
            raise ConnectionError("closed")
        req, flags, size = struct.unpack("<III", head)
        assert flags & 7 == 5, flags
        return self.s.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, req, payload=b""):
        self.send(req, payload)
        out = self.recv()
        return struct.unpack("<Q", out)[0] if len(out) == 8 and req != GET_BASE else out

    def tell(self, req, payload=b"", fds=(), ok=True):
        """With an acknowledgement."""
        self.send(req, payload, fds, flags=9)
        assert (struct.unpack("<Q", self.recv())[0] == 0) == ok, req

    def setup(self, queues=1, size=64):
        assert self.offered >> 30 & 1 and self.offered >> 32 & 1
        proto = self.ask(GET_PROTO)
        assert proto & (1 | 1 << 3 | 1 << 9) == (1 | 1 << 3 | 1 << 9), proto
        self.send(SET_PROTO, struct.pack("<Q", 1 | 1 << 3 | 1 << 9))
        self.send(SET_OWNER)
        self.tell(SET_FEATURES, struct.pack("<Q", self.features))
        self.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA, MEM, UVA, 0), [self.fd])
        self.size = size
        self.kick, self.call = [], []
        for q in range(queues):
            self.start(q)

    def start(self, q, base=0):
        ring = q * 65536
        kick, call = os.eventfd(0), os.eventfd(0)
        self.tell(SET_NUM, struct.pack("<II", q, self.size))
        self.tell(SET_BASE, struct.pack("<II", q, base))
        self.tell(SET_ADDR, struct.pack("<IIQQQQ", q, 0, UVA + ring, UVA + ring + 32768, UVA + ring + 16384, 0))
        self.tell(SET_CALL, struct.pack("<Q", q), [call])
        self.tell(SET_ENABLE, struct.pack("<II", q, 1))
        self.tell(SET_KICK, struct.pack("<Q", q), [kick])
        self.kick[q:q + 1], self.call[q:q + 1] = [kick], [call]
        if base == 0:
            self.avail[q] = self.used[q] = 0

    def post(self, q, bufs, slot=0):
        """A chain of (address in guest memory, length, writable) from descriptor `slot` on."""
        ring = q * 65536
        for i, (addr, n, write) in enumerate(bufs):
            last = i == len(bufs) - 1
            struct.pack_into("<QIHH", self.m, ring + (slot + i) * 16, addr, n, (0 if last else 1) | (2 if write else 0), slot + i + 1)
        struct.pack_into("<H", self.m, ring + 16384 + 4 + 2 * (self.avail[q] % self.size), slot)
        self.avail[q] = (self.avail[q] + 1) & 0xffff
        struct.pack_into("<H", self.m, ring + 16384 + 2, self.avail[q])

    def wait(self, q, n=1):
        os.eventfd_write(self.kick[q], 1)
        self.used[q] = (self.used[q] + n) & 0xffff
        end = time.monotonic() + STEP
        while struct.unpack_from("<H", self.m, q * 65536 + 32768 + 2)[0] != self.used[q]:
            assert time.monotonic() < end, "no answer"
            if select.select([self.call[q]], [], [], 0.2)[0]:
                os.eventfd_read(self.call[q])

    def request(self, q, kind, sector, data=None, length=0):
        """A whole virtio-blk request: (status, data read)."""
        base = GPA + (1 << 20) + q * 65536 * 4
        off = base - GPA
        self.m[off:off + 16] = struct.pack("<IIQ", kind, 0, sector)
        bufs = [(base, 16, False)]
        if data is not None:
            self.m[off + 512:off + 512 + len(data)] = data
            bufs.append((base + 512, len(data), False))
        elif length:
            bufs.append((base + 512, length, True))
        self.m[off + 16] = 0xff
        bufs.append((base + 16, 1, True))
        self.post(q, bufs)
        self.wait(q)
        return self.m[off + 16], bytes(self.m[off + 512:off + 512 + length])

    def close(self):
        self.s.close()
        for fd in self.kick + self.call + [self.fd]:
            os.close(fd)
        self.m.close()


def start(*extra, env=None):
    path = os.path.join(os.getcwd(), "vu")
    p = subprocess.Popen([daemon, "--blockdev", "driver=raw,node-name=d,file.driver=file,file.filename=disk.raw", "--export",
                          f"vhost-user-blk,id=disk0,node-name=d,addr.type=unix,addr.path={path},num-queues=4" + "".join(extra)],
                         stdout=subprocess.DEVNULL, stderr=open("log", "w"), env=env)
    running.append(p)
    return p, path


def stop(p):
    p.terminate()
    try:
        status = p.wait(timeout=STEP)
    except subprocess.TimeoutExpired:
        raise AssertionError("the daemon does not end after SIGTERM") from None
    running.remove(p)
    assert status == 0, (status, open("log").read()[-2000:])
    assert not os.path.exists("vu")


def test_requests():
    """Reads, writes, flush, discard, zeroes, identity on all queues; configuration; a stop and a start that go on."""
    model = bytearray(random.Random(1).randbytes(SIZE))
    open("disk.raw", "wb").write(model)
    p, path = start(",writable=on")
    for turn in range(2):
        f = Front(path)
        f.setup(4)
        assert f.ask(GET_QUEUES) == 4
        cfg = f.ask(GET_CONFIG, struct.pack("<III", 0, 60, 0) + bytes(60))[12:]
        assert struct.unpack_from("<Q", cfg)[0] == SIZE // 512 and struct.unpack_from("<H", cfg, 34)[0] == 4
        assert f.request(0, 8, 0, length=20)[1].startswith(b"disk0\0")
        for q in range(4):
            data = random.Random(turn * 4 + q).randbytes(8192)
            assert f.request(q, 1, 16 * q, data)[0] == 0
            model[q * 8192:(q + 1) * 8192] = data
            assert f.request(3 - q, 0, 0, length=65536) == (0, bytes(model[:65536]))
        assert f.request(0, 4, 0)[0] == 0
        assert f.request(1, 13, 0, struct.pack("<QII", 100, 8, 1))[0] == 0
        model[100 * 512:108 * 512] = bytes(4096)
        assert f.request(2, 0, 96, length=8192) == (0, bytes(model[96 * 512:112 * 512]))
        assert f.request(0, 99, 0, length=512)[0] == 2
        assert f.request(0, 0, SIZE // 512, length=512)[0] == 1
        assert f.request(0, 1, SIZE // 512 - 1, bytes(1024))[0] == 1
        assert f.request(0, 0, 1 << 60, length=512)[0] == 1
        # Stop queue 1 and let it go on where it was.
        f.send(GET_BASE, struct.pack("<II", 1, 0))
        index, base = struct.unpack("<II", f.recv())
        assert (index, base) == (1, f.avail[1])
        f.start(1, base)
        assert f.request(1, 0, 0, length=512) == (0, bytes(model[:512]))
        f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA, MEM, UVA, 0), [f.fd])      # under running queues
        assert f.request(2, 0, 0, length=512) == (0, bytes(model[:512]))
        f.tell(SET_CONFIG, struct.pack("<III", 32, 1, 0) + b"\0")
        assert f.request(2, 1, 0, bytes(512))[0] == 0
        model[:512] = bytes(512)
        f.close()
    stop(p)
    assert open("disk.raw", "rb").read() == model
    p, path = start()
    f = Front(path)
    f.setup(1)
    assert f.offered >> 5 & 1 and f.request(0, 1, 0, bytes(512))[0] == 1
    f.close()
    stop(p)


def gone(f):
    try:
        f.ask(GET_FEATURES)
        return False
    except (ConnectionError, OSError):
        return True


def test_liars():
    """Memory that is not there, rings outside of it, impossible sizes: refused or hung up on; chains that point elsewhere stop their queue."""
    open("disk.raw", "wb").truncate(SIZE)
    p, path = start(",writable=on")
    f = Front(path)
    f.setup(1)
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA, MEM * 2, UVA, 0), [f.fd], ok=False)         # longer than the file
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, 2**64 - 4096, 8192, UVA, 0), [f.fd], ok=False)   # wraps
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA, MEM, UVA, 2**64 - 4096), [f.fd], ok=False)
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA + 1, 4096, UVA, 0), [f.fd], ok=False)
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQQQQQ", 2, 0, GPA, 8192, UVA, 0, GPA + 4096, 4096, UVA, 0), [f.fd, f.fd], ok=False)
    f.tell(SET_NUM, struct.pack("<II", 0, 65536), ok=False)
    f.tell(SET_NUM, struct.pack("<II", 99, 64), ok=False)
    f.tell(SET_ENABLE, struct.pack("<II", 0xffffffff, 1), ok=False)
    f.tell(SET_KICK, struct.pack("<Q", 77), [f.fd], ok=False)
    f.tell(SET_FEATURES, struct.pack("<Q", 2**64 - 1), ok=False)
    f.tell(SET_CONFIG, struct.pack("<III", 0xfffffff0, 32, 0) + bytes(32), ok=False)
    f.tell(200, ok=False)
    f.tell(SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, GPA, MEM, UVA, 0), [f.fd])
    f.tell(SET_BASE, struct.pack("<II", 0, 5), ok=False)            # while it runs
    f.ask(GET_BASE, struct.pack("<II", 0, 0))
    f.start(0)
    assert f.request(0, 0, 0, length=512)[0] == 0
    f.tell(SET_ADDR, struct.pack("<IIQQQQ", 0, 0, UVA + MEM - 16, UVA, UVA, 0), ok=False)
    f.close()
    for bufs in ([(GPA + MEM - 8, 16, False), (GPA, 1, True)], [(0, 16, False)], [(GPA, 0, False)], [(2**64 - 8, 16, False)], [(GPA, 16, True)]):
        f = Front(path)
        f.setup(1)
        f.post(0, bufs)
        os.eventfd_write(f.kick[0], 1)
        time.sleep(0.05)
        assert not gone(f)
        f.close()
    for raw in (struct.pack("<III", SET_MEM_TABLE, 1, 0xffffffff), struct.pack("<III", GET_FEATURES, 2, 0), struct.pack("<III", SET_NUM, 1, 4) + bytes(4),
                struct.pack("<III", GET_CONFIG, 1, 12) + struct.pack("<III", 0, 0xffffffff, 0), b"\xff" * 400):
        f = Front(path)
        f.kick = f.call = []
        f.s.send(raw)
        assert gone(f), raw
        f.close()
    f = Front(path)
    f.kick = f.call = []
    f.send(SET_OWNER, fds=[f.fd] * 20)                              # more descriptors than any message has
    gone(f)
    f.close()
    f = Front(path)
    f.setup(1)
    assert f.request(0, 0, 0, length=512) == (0, bytes(512))
    f.close()
    n = len(os.listdir(f"/proc/{p.pid}/fd"))
    assert n < 40, f"{n} descriptors are open: some leak"
    stop(p)


def test_endless():
    """Rings that lie over each other, so that each answer is the next request: the connection ends all the same, and so does the daemon."""
    open("disk.raw", "wb").truncate(SIZE)
    p, path = start(",writable=on")
    for queues in (1, 4):
        f = Front(path)
        f.setup(queues)
        for q in range(queues):
            ring = q * 65536
            f.ask(GET_BASE, struct.pack("<II", q, 0))
            struct.pack_into("<QIHHQIHH", f.m, MEM // 2 + q * 32, GPA + MEM // 4, 16, 1, 1, GPA + MEM // 4 + 512 * (q + 1), 1, 2, 0)     # reads nothing
            for i in range(f.size):     # whatever an answer leaves among the available heads names it
                struct.pack_into("<QIHH", f.m, ring + i * 16, GPA + MEM // 2 + q * 32, 32, 4, 0)
            struct.pack_into("<HH", f.m, ring + 16384, 0, 1)
            f.tell(SET_ADDR, struct.pack("<IIQQQQ", q, 0, UVA + ring, UVA + ring + 16384, UVA + ring + 16384, 0))
            f.tell(SET_KICK, struct.pack("<Q", q), [f.kick[q]])
        before = struct.unpack_from("<H", f.m, 16384 + 2)[0]
        end = time.monotonic() + STEP
        while struct.unpack_from("<H", f.m, 16384 + 2)[0] == before:
            assert time.monotonic() < end, "the ring does not feed itself"
            time.sleep(0.001)
        assert len(f.ask(GET_BASE, struct.pack("<II", 0, 0))) == 8
        f.close()
    f = Front(path)                     # a pipe that the front end leaves blocking, full: no write() into it may wait
    f.setup(1)
    r, w = os.pipe()
    os.set_blocking(w, False)
    while True:
        try:
            os.write(w, bytes(4096))
        except BlockingIOError:
            break
    os.set_blocking(w, True)
    f.tell(SET_CALL, struct.pack("<Q", 0), [w])
    assert f.request(0, 0, 0, length=512)[0] == 0
    f.ask(GET_BASE, struct.pack("<II", 0, 0))
    f.tell(SET_KICK, struct.pack("<Q", 0), [f.fd], ok=False)        # a file is always ready
    f.close()
    os.close(r)
    os.close(w)
    f = Front(path)
    f.setup(1)
    assert f.request(0, 0, 0, length=512)[0] == 0
    stop(p)
    f.close()


def test_random(rounds, seed):
    """
    Random messages and random rings; the daemon lives and serves the next one. Two queues, or a queue and a worker, may be told to use the same
    bytes: that is the guest's race with itself, which ThreadSanitizer cannot tell from ours. The other tests have its reports.
    """
    open("disk.raw", "wb").truncate(SIZE)
    p, path = start(",writable=on", env=dict(os.environ, TSAN_OPTIONS=os.environ.get("TSAN_OPTIONS", "") + ":report_bugs=0"))
    rnd = random.Random(seed)
    numbers = (0, 1, 2, 3, 4, 5, 8, 63, 64, 65, 255, 256, 1024, 4096, MEM - 1, MEM, GPA, UVA, UVA + 16384, UVA + 32768, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    event = os.eventfd(1)
    for k in range(rounds):
        f = Front(path)
        f.kick = f.call = []
        try:
            if k % 2:
                f.setup(2)
            if k % 4 == 3:
                f.m[0:65536] = rnd.randbytes(65536) if k % 8 == 7 else b"".join(struct.pack("<Q", rnd.choice(numbers)) for _ in range(8192))
                os.eventfd_write(f.kick[0], 1)
            for _ in range(rnd.randrange(1, 12)):
                req = rnd.choice((2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 16, 18, 24, 25, 31, 32, 34, 37, 38))
                size = {2: 8, 8: 8, 9: 40, 10: 8, 11: 8, 12: 8, 13: 8, 14: 8, 16: 8, 18: 8, 37: 40, 38: 40}.get(req, rnd.choice((0, 12, 40, 72)))
                payload = b"".join(struct.pack("<Q", rnd.choice(numbers)) for _ in range(9))[:size] if rnd.random() < 0.8 else rnd.randbytes(size)
                f.send(req, payload, rnd.choice(([], [], [f.fd], [event], [f.fd, event])), flags=rnd.choice((1, 1, 9)))
        except (ConnectionError, OSError, AssertionError):
            pass
        f.close()
        assert p.poll() is None, (k, p.returncode, open("log").read()[-2000:])
    os.close(event)
    f = Front(path)
    f.setup(1)
    assert f.request(0, 0, 0, length=512)[0] == 0
    f.close()
    stop(p)


daemon = os.path.abspath(sys.argv[1])
if not hasattr(os, "eventfd"):
    if os.path.exists("/usr/bin/python3") and os.environ.get("VU_REEXEC") != "1":
        os.execve("/usr/bin/python3", ["/usr/bin/python3"] + sys.argv, dict(os.environ, VU_REEXEC="1"))
    print("skipped: this Python has no eventfd")
    sys.exit(77)
top = tempfile.mkdtemp(prefix="vhost-blk-", dir="/var/tmp")
os.chdir(top)
try:
    test_requests()
    print("ok requests", flush=True)
    test_liars()
    print("ok liars", flush=True)
    test_endless()
    print("ok endless", flush=True)
    test_random(int(sys.argv[2]) if len(sys.argv) > 2 else 300, int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    print("ok random")
finally:
    for p in running:
        p.kill()
        p.wait()
    os.chdir("/")
    shutil.rmtree(top, ignore_errors=True)
