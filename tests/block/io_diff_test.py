#!/usr/bin/env python3
"""lodge io beside Debian's qemu-io: the same commands on copies of the same images; standard output (but for figures of time), exit status and,
where the images may differ in nothing but their layout, what a guest would read afterwards.

usage: io_diff_test.py LODGE-QEMU-IO; exit status 77 without qemu-io and qemu-img"""
import json
import os
import re
import shutil
import subprocess
import sys

from running import scratch

# Each line: program options | commands, in order. The image is a.qcow2 unless the options name one.
CASES = """
|length|info|map
-f raw r.raw|length|info|map|alloc 0 64k
e.qcow2|info|length
|read 0 512|read -q 0 64k|read -v 60 40|r 0 1k|read -C 0 512
|write -P 5 0 4k|read -P 5 -s 512 -l 512 0 4k|read -P 6 -s 512 -l 512 0 4k|read -P 5 -l 100 0 4k|read -P 5 -s 4000 0 4k
|read -s 5 0 4k
|read -P 1 -s 5k 0 4k
|read 0|read|write 0|discard 0|readv 5
|read -x 0 512|write -y 0 512|discard -z 0 512
|read x 512|read 0 x|read 0x200 0x10|read 99E 1
|read -P 256 0 512|read -P x 0 512|read -P 0x10 0 512
|read 100 512|write 100 512|read -P 0xcd 100 512
|read 8M 512|write 8M 512|discard 8M 512|read 0 3G|write 0 3G|write -z 0 3G|discard 0 3G|readv 0 3G|writev 0 2G 1G
|write -z -c 0 64k|write -f 0 64k|write -zu 0 64k|write -z 100 5000|write -nz 0 64k
|write -z -P 1 0 64k|write -n 0 64k|write -u 0 64k|write -b -z 0 512|write -c -f 0 64k|write -s src -P 1 0 512
|write -s src 0 512|read -v 0 64|write -s nosrc 0 512|write -s empty 0 512
|write -c 1M 64k|read -P 0xcd 1M 64k|write -c 0 512
|writev 0 512 1k|readv -P 0xcd 0 512 1k|readv -v 0 16 16|writev -P 7 8M 512
|aio_write 0 512 1k|aio_flush|read -P 0xcd 0 1536
|aio_read 1G 512|aio_flush
|aio_write 1G 512|aio_flush
|aio_write -z 0 512 512|aio_write -u 0 512|aio_read -x 0 1
|aio_read -i 0 512|aio_write -i 0 512
|aio_read -P 9 0 512|aio_flush|length
|discard 0 64k|discard -q 64k 64k|discard 10 64k|d 0 1M|map
|alloc 0 64k|alloc 0|alloc|alloc 0 1|alloc 9M 1|alloc 100k 1M|a 1500k 3M|alloc x|alloc 0 1 2
|map 0|length 1|flush 1|info 1|close 1
|truncate|truncate 9M|length|truncate 10x|truncate -m foo 9M|truncate -m falloc 10M|t 8M|length|truncate -x 1 2
|sleep|sleep x|sleep 1
|sigraise 0|sigraise x|sigraise 100
|sigraise 15|length
|abort|length
|close|length|open a.qcow2|length|open a.qcow2|c|l
|open|open nofile|length
|close|open -r a.qcow2|write 0 512|write -z 0 512|discard 0 512|truncate 1M|aio_write 0 512|read 0 512
|close|open -o driver=qcow2 a.qcow2|length|close|open -o driver=qcow2,file.filename=a.qcow2|length
|close|open -o driver=raw a.qcow2|read -v 0 4
|close|open -x a.qcow2|open a.qcow2 b|open -t foo a.qcow2|open -d foo a.qcow2|open -i foo a.qcow2|open -U a.qcow2
|close|open -s a.qcow2|write -P 9 0 512|read -P 9 0 512|close|open a.qcow2|read -P 0 0 512
|reopen -r|write 0 512|reopen -w|write 0 512|reopen -c none|length|reopen -c foo|reopen -r -w|length|reopen x
|reopen -o driver=raw|length
|quit|length
|flush|f|foo|help foo|5
|break x y|remove_break|resume|wait_break
-r|write 0 512|read 0 512
-s|write -P 9 0 512|read -P 9 0 512
-r -U|read 0 512
-U|read 0 512
-n|write 0 64k|read -P 0xcd 0 64k
-m -n|write 0 64k|read -P 0xcd 0 64k
-t writethrough -d ignore|write 0 64k|discard 0 64k|read -P 0xcd 0 64k|map
-t foo|length
-d foo|length
-i foo|length
-i native|length
-n -k|length
-n -i native|write 0 4k
-i threads|length
-f raw|length
-f foo|length
--image-opts driver=qcow2,file.filename=a.qcow2|length|write 0 64k
--image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2|length
--object secret,id=s,data=x|length
--object foo,id=s|length
--cmd length --read-only --format qcow2 a.qcow2|write 0 1
nofile|length
a.qcow2 b|length
--bad|length
"""


def normal(text):
    """Without figures of time, and errors without their words."""
    text = re.sub(r"; \d\d\.\d\d sec \([0-9.e+]+ \w+/sec and [0-9.]+ ops/sec\)", "; T", text)
    text = re.sub(r"; \d+:\d\d:\d\d\.\d\d \([0-9.e+]+ \w+/sec and [0-9.]+ ops/sec\)", "; T", text)
    return re.sub(r"^(\d+,\d+),\d+:\d\d:\d\d\.\d\d,[0-9.]+,[0-9.]+$", r"\1,T", text, flags=re.M)


def prepare():
    qemu = ["qemu-img", "create", "-q", "-f"]
    subprocess.run([*qemu, "qcow2", "a.qcow2", "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 3 1500k 200k", "a.qcow2"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*qemu, "qcow2", "-o", "extended_l2=on,lazy_refcounts=on", "e.qcow2", "1G"], check=True)
    subprocess.run([*qemu, "raw", "r.raw", "1M"], check=True)
    with open("src", "wb") as f:
        f.write(b"hello world")
    open("empty", "wb").close()


def usage_lines(text):
    """Usage is in the program's own words."""
    text = text.split("Usage: ")[0]
    return "\n".join(line.split(" -- ")[0] if re.match(r"\w+ .*-- ", line) and not line.startswith("Parsing") else line for line in text.splitlines())


def run(tool, opts, cmds, feed):
    words = opts.split()
    if not any(w.endswith((".qcow2", ".raw", "nofile", "b")) for w in words):
        words.append("a.qcow2")
    if feed:
        p = subprocess.run([tool, *words], input="\n".join(cmds), capture_output=True, text=True, timeout=300, check=False)
    else:
        p = subprocess.run([tool, *[w for c in cmds for w in ("-c", c)], *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    return usage_lines(normal(p.stdout)), p.returncode, p.stderr


def content():
    subprocess.run(["qemu-img", "check", "-q", "a.qcow2"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", "a.qcow2", "content"], check=True)
    with open("content", "rb") as f:
        return f.read()


def compare(lodge, n, opts, cmds, feed):
    got = []
    for tool in ("qemu-io", lodge):
        d = f"{n}-{os.path.basename(tool)}-{feed}"
        shutil.copytree("base", d)
        os.chdir(d)
        try:
            got.append((*run(tool, opts, cmds, feed), content()))
        finally:
            os.chdir("..")
            shutil.rmtree(d)
    theirs, ours = got
    # open's and reopen's usage says what each can do; only Lodge has no -C.
    for what, a, b in (("output", theirs[0], ours[0].replace("[-rsnkU] [-i aio]", "[-rsCnkU]")), ("status", theirs[1], ours[1]), ("content", theirs[3], ours[3])):
        if a != b:
            shown = (a, b) if what != "content" else ("", "differs")
            print(f"FAIL {what}: {opts or '-'} | {' | '.join(cmds)}\n--- qemu-io\n{shown[0]}\n--- lodge\n{shown[1]}\n--- stderr\n{theirs[2]}\n--\n{ours[2]}")
            return 1
    return 0


# Zeroes and discards, in each shape of image: what is zero afterwards, without being stored, is so with both.
ZEROES = ["write -P 5 0 1500k", "write -z 64k 128k", "write -z -u 256k 64k", "write -z 330k 4k", "write -z 390k 200k", "write -z -n 640k 64k", "write -z -n 706k 64k", "write -z -n 512 512",
          "discard 900k 200k", "write -P 7 100k 3k", "write -z 65024 4k", "write -c -P 9 2M 64k", "write -z 2050k 20k", "write -z -u 1400k 500k", "write -z -n 3M 64k"]
SHAPES = ["cluster_size=64k", "cluster_size=4k", "extended_l2=on", "data_file=d", "data_file=d,data_file_raw=on", "extended_l2=on,data_file=d", "extended_l2=on,data_file=d,data_file_raw=on"]


def stored(name):
    """What is kept of the disk, and where a reader is told that it is zero."""
    out = []
    for e in json.loads(subprocess.run(["qemu-img", "map", "--output=json", name], check=True, capture_output=True).stdout):
        if out and out[-1][2] == e["data"]:
            out[-1][1] = e["start"] + e["length"]
        else:
            out.append([e["start"], e["start"] + e["length"], e["data"]])
    return out


def zeroes(lodge, shape):
    got = []
    for tool in ("qemu-io", lodge):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, "a.qcow2", "4M"], check=True)
        said = run(tool, "-d unmap", ZEROES, False)[:2]
        data = content()
        raw = None
        if "data_file_raw" in shape:
            with open("d", "rb") as f:
                raw = f.read() == data
        disk = os.stat("d").st_blocks if "data_file" in shape else 0
        got.append((said, data, stored("a.qcow2"), raw, disk))
        for name in ("a.qcow2", "d", "content"):
            if os.path.exists(name):
                os.remove(name)
    a, b = got
    if a[:4] == b[:4] and b[4] <= a[4] + 128:
        return 0
    print(f"FAIL zeroes in an image with {shape}\n--- qemu-io\n{a[0]}\n{a[2:]}\n--- lodge\n{b[0]}\n{b[2:]}\ncontent {'same' if a[1] == b[1] else 'differs'}")
    return 1


def zeroes_over_nothing(lodge, shape):
    """Parts of clusters that are zero in the backing file, too: they get entries of their own."""
    got = []
    for tool in ("qemu-io", lodge):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "below", "4M"], check=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "below", "-F", "qcow2", "-o", shape, "a.qcow2"], check=True)
        subprocess.run(["qemu-io", "-c", "write -P 7 2M 1k", "below"], check=True, stdout=subprocess.DEVNULL)
        said = run(tool, "", ["write -z 4k 3k", "write -z 200k 1k", "write -z 1M 64k", "write -z 1500k 100k", "write -z 2049k 1k"], False)[:2]
        got.append((said, subprocess.run(["qemu-img", "map", "--output=json", "a.qcow2"], check=True, capture_output=True).stdout))
        os.remove("a.qcow2")
        os.remove("below")
    if got[0] == got[1]:
        return 0
    print(f"FAIL zeroes over a backing file without data, {shape}\n--- qemu-io\n{got[0]}\n--- lodge\n{got[1]}")
    return 1


def main():
    lodge = os.path.abspath(sys.argv[1])
    if not shutil.which("qemu-io") or not shutil.which("qemu-img"):
        print("skipped: no qemu-io, or no qemu-img")
        return 77
    failed = n = 0
    with scratch("io-diff-", "/var/tmp"):
        os.mkdir("base")
        os.chdir("base")
        prepare()
        os.chdir("..")
        for line in CASES.strip().splitlines():
            opts, *cmds = line.split("|")
            for feed in (False, True) if n % 7 == 1 and "aio" not in line else (False,):
                failed += compare(lodge, n, opts, cmds, feed)
                n += 1
        for shape in SHAPES:
            failed += zeroes(lodge, shape)
            n += 1
        for shape in ("cluster_size=64k", "cluster_size=4k", "extended_l2=on", "data_file=d"):
            failed += zeroes_over_nothing(lodge, shape)
            n += 1
    print(f"{n} cases, {failed} differ")
    return failed != 0


sys.exit(main())
