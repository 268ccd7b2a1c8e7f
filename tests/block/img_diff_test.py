#!/usr/bin/env python3
"""lodge-qemu-img beside Debian's qemu-img: the same words on copies of the same files must give the same standard output and
the same exit status, and say something on standard error when the other does.

usage: img_diff_test.py LODGE-QEMU-IMG [--only TEXT] [--part N]
Skips (77) without qemu-img."""
import argparse
import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile

MIB = 1 << 20


def fixtures(d, qemu):
    """One image of each kind, by Debian's tools, in the folder `d`."""
    def img(*a):
        subprocess.run([qemu, *a], cwd=d, check=True, stdout=subprocess.DEVNULL)

    def io(name, *cmds):
        args = [x for c in cmds for x in ("-c", c)]
        subprocess.run(["qemu-io", *args, name], cwd=d, check=True, stdout=subprocess.DEVNULL)
    with open(f"{d}/raw", "wb") as f:
        f.write(b"raw!" * (16 * 1024))
        f.seek(3 * MIB)
        f.write(random.Random(1).randbytes(4096) * 48)  # the same each time: whether it shrinks depends on it
        f.truncate(5 * MIB + 1024)
    with open(f"{d}/ragged", "wb") as f:
        f.write(b"x" * 1000)
    img("create", "-q", "-f", "qcow2", "empty", "8M")
    img("create", "-q", "-f", "qcow2", "-o", "compat=0.10,cluster_size=4k", "v2", "8M")
    img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=16k,lazy_refcounts=on", "sub", "8M")
    img("create", "-q", "-f", "qcow2", "-o", "data_file=ext.data,data_file_raw=on", "ext", "2M")
    img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1,compression_type=zstd", "zstd", "2M")
    img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "meta", "2M")
    img("convert", "-O", "qcow2", "raw", "q")
    img("convert", "-c", "-O", "qcow2", "raw", "packed")
    io("q", "write -P 7 1M 100k", "write -z 2M 64k", "discard 3M 64k")
    shutil.copy(f"{d}/q", f"{d}/snap")
    img("snapshot", "-c", "one", "snap")
    io("snap", "write -P 9 1M 300k")
    img("snapshot", "-c", "two words", "snap")
    img("create", "-q", "-f", "qcow2", "-b", "q", "-F", "qcow2", "over")
    io("over", "write -P 5 512k 192k", "write -z 4M 128k")
    img("create", "-q", "-f", "qcow2", "-b", "over", "-F", "qcow2", "top", "6M")
    io("top", "write -P 6 640k 64k")
    img("create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "onraw")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "nowhere", "-F", "qcow2", "orphan", "1M")
    shutil.copy(f"{d}/q", f"{d}/bits")
    img("bitmap", "--add", "bits", "b0")
    img("bitmap", "--add", "-g", "128k", "--disable", "bits", "b1")
    io("bits", "write -P 3 1M 64k")
    for fmt, opts in (("vmdk", ""), ("vdi", ""), ("vpc", ""), ("vhdx", "")):
        img("convert", "-O", fmt, *(["-o", opts] if opts else []), "raw", fmt)
    img("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "raw", "vmdk.stream")
    img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", "raw", "flat.vmdk")
    img("convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "raw", "two.vmdk")
    img("convert", "-O", "vdi", "-o", "static=on", "raw", "vdi.static")
    img("convert", "-O", "vpc", "-o", "subformat=fixed,force_size=on", "raw", "vpc.fixed")
    img("convert", "-O", "vpc", "-o", "force_size=on", "raw", "vpc.forced")
    img("convert", "-O", "vhdx", "-o", "subformat=fixed", "raw", "vhdx.fixed")
    img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k", "subs", "8M")
    io("subs", "write -P 1 0 100k", "write -P 2 1M 3k", "write -z 70k 4k")
    img("create", "-q", "-f", "qcow2", "-o", "data_file=part.data", "part", "4M")
    io("part", "write -P 1 0 100k", "write -P 2 1M 64k", "write -z 2M 64k", "write -P 1 3M 64k", "write -z 3M 64k")
    img("create", "-q", "-f", "qcow2", "-b", "part", "-F", "qcow2", "onpart")
    io("onpart", "write -P 4 1M 100k", "write -z 0 64k")
    img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=16", "old", "4M")
    io("old", "write -P 1 0 100k")
    img("snapshot", "-c", "2", "old")
    io("old", "write -P 2 0 100k", "write -z 1M 64k")
    img("snapshot", "-c", "x", "old")
    img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "small", "1M")
    io("small", "write -P 1 0 100k", "write -P 2 500k 10k")
    img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "tail", "4M")
    io("tail", "write -P 1 4032k 1k")       # the file ends inside the last cluster
    os.truncate(f"{d}/tail", os.path.getsize(f"{d}/tail") // 65536 * 65536 - 65536 + 1024)
    damage(d)


def damage(d):
    """Images with a leak, a bad entry and the dirty bit."""
    def patch(name, *edits):
        shutil.copy(f"{d}/q", f"{d}/{name}")
        with open(f"{d}/{name}", "r+b") as f:
            for off, data in edits:
                f.seek(off)
                f.write(data)
    with open(f"{d}/q", "rb") as f:
        h = f.read(104)
        table = int.from_bytes(h[48:56], "big")
        f.seek(table)
        block = int.from_bytes(f.read(8), "big")
        l1 = int.from_bytes(h[40:48], "big")
        f.seek(l1)
        l2 = int.from_bytes(f.read(8), "big") & ~(1 << 63)
        clusters = os.path.getsize(f"{d}/q") >> 16
    patch("leaky", (block + 2 * (clusters + 3), b"\0\1"), (block + 2 * (clusters + 4), b"\0\1"), ((clusters + 5) << 16, b"\0"))
    patch("broken", (l2 + 8 * 5, (0x8000000000000000 | 0x7fff0000).to_bytes(8, "big")))
    patch("under", (block + 2 * 5, b"\0\0"))
    patch("dirty", (72, (1).to_bytes(8, "big")))
    patch("corrupt", (72, (2).to_bytes(8, "big")))
    patch("feature", (72, (1 << 20).to_bytes(8, "big")))
    with open(f"{d}/trunc", "wb") as f:
        f.write(h[:50])


KINDS = ["raw", "ragged", "empty", "v2", "sub", "ext", "zstd", "meta", "q", "packed", "snap", "over", "top", "onraw", "bits", "vmdk", "vdi", "vpc",
         "vhdx", "vmdk.stream", "flat.vmdk", "two.vmdk", "vdi.static", "vpc.fixed", "vpc.forced", "vhdx.fixed"]
BAD = ["leaky", "broken", "under", "dirty", "corrupt", "feature", "trunc", "orphan", "missing"]


FINER = ("vdi", "vpc", "vhdx")          # Lodge sees holes and places there that QEMU does not look for


def cases():
    """Each case is a list of commands (or of one), run one after the other on fresh copies."""
    for k in KINDS + BAD:
        yield f"info {k}"
        yield f"info --output=json {k}"
        yield f"check {k}"
        yield f"check --output=json {k}"
        yield f"snapshot -l {k}"
        if k != "ragged" and not k.startswith(FINER):
            yield f"map {k}"
            yield f"map --output=json {k}"
            yield f"measure -O qcow2 {k}"
        yield f"compare raw {k}"
        yield f"convert -O raw {k} out ; compare out {k} ; info out"
        yield f"dd if={k} of=out bs=64k count=3 skip=1 -O qcow2 ; compare out {k} ; map out"
        if k != "ragged":
            yield f"bench -c 3 {k}"
    for k in ("q", "top", "sub", "v2", "ext", "bits", "snap"):
        yield f"info -f qcow2 --backing-chain {k}"
        yield f"info --backing-chain --output=json {k}"
        for out in ("raw", "qcow2"):
            for extra in ("", "-o cluster_size=4k", "-o extended_l2=on", "-o preallocation=full", "-o compat=0.10,refcount_bits=16", "-o preallocation=metadata"):
                yield f"measure -O {out} {extra} {k}"
                yield f"measure --output=json -O {out} {extra} {k}"
    for size in ("0", "1", "512", "1M", "1000000", "10G", "3T", "-1", "1.5G", "1x", "99999999999999999999", "8E", ""):
        yield f"measure -O qcow2 --size '{size}'"
        yield f"measure --output=json --size '{size}'"
        yield f"create -f qcow2 new '{size}' ; info new"
        yield f"create -f raw new '{size}' ; info new"
        yield f"resize q '{size}' ; info q"
        yield f"resize --shrink q '{size}' ; info q"
        yield f"resize q '+{size}' ; info q"
        yield f"resize --shrink q '-{size}' ; info q"
        yield f"resize -f raw raw '+{size}' ; info raw"
    yield from [
        "measure -O luks --size 1G", "measure -O vmdk --size 1G", "measure --size 1G q", "measure", "measure q raw", "measure -O nonsense --size 1",
        "measure -O qcow2 -o refcount_bits=1 --size 10G", "measure -O qcow2 -o cluster_size=2M,extended_l2=on --size 10G", "measure -O qcow2 -l one snap",
        "measure -O qcow2 -o encrypt.format=luks --size 1G", "measure -O qcow2 -l nothing snap", "measure -O raw -o preallocation=full --size 1G",
    ]
    for o in ("", "-o compat=0.10", "-o compat=v3", "-o compat=0.9", "-o cluster_size=512", "-o cluster_size=1", "-o cluster_size=3k", "-o cluster_size=4M",
              "-o cluster_size=2M", "-o refcount_bits=3", "-o refcount_bits=64", "-o refcount_bits=128", "-o lazy_refcounts=on", "-o lazy_refcounts=maybe",
              "-o compat=0.10,lazy_refcounts=on", "-o compat=0.10,refcount_bits=8", "-o compat=0.10,extended_l2=on", "-o extended_l2=on,cluster_size=4k",
              "-o compression_type=zstd", "-o compression_type=lz4", "-o compat=0.10,compression_type=zstd", "-o preallocation=metadata",
              "-o preallocation=falloc", "-o preallocation=full", "-o preallocation=some", "-o data_file=d", "-o data_file=d,data_file_raw=on",
              "-o data_file_raw=on", "-o compat=0.10,data_file=d", "-o nonsense=1", "-o encryption=on", "-o encrypt.format=luks", "-o size=4M",
              "-o backing_file=q,backing_fmt=qcow2", "-o backing_file=q", "-b q", "-b q -F qcow2", "-b q -F raw", "-b nowhere -F qcow2", "-u -b nowhere -F qcow2",
              "-b q -F nonsense", "-b raw -F raw -o preallocation=metadata", "-o data_file=d -b q -F qcow2", "-o data_file=d,data_file_raw=on -b q -F qcow2",
              "-q", "-o preallocation=falloc -b q -F qcow2", "-o compat=1.1 -o compat=0.10"):
        yield f"create -f qcow2 {o} new 3M ; info new ; check new"
        yield f"create -f qcow2 {o} new ; info new"
        yield f"create -f raw {o} new 3M" + ("" if "metadata" in o else " ; info new")      # QEMU leaves an empty file
    yield from [
        "create -f nonsense new 1M", "create", "create -f qcow2", "create -f qcow2 new 1M extra", "create -f qcow2 dir/new 1M", "create -f qcow2 . 1M",
        "create new 1M ; info new", "create -f raw q 1M ; info q", "create -F qcow2 -f qcow2 new 1M", "create -f qcow2 -b q -F qcow2 q 1M",
    ]
    for v in ("amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "map", "measure", "snapshot", "rebase", "resize"):
        yield v
        yield f"{v} --nonsense"
        yield f"{v} -X"
        yield f"{v} missing"
        yield f"{v} -f"
        yield f"{v} -f nonsense q"
        yield f"{v} q raw v2 sub"
        for long in ("--salvage", "--shrink", "--output=json", "--output=xml", "--size=1", "--backing-chain", "--bitmaps", "--force", "--target-is-zero",
                     "--add", "--repair=all", "--format=qcow2", "--start-offset=0", "--no-drain", "--preallocation=off", "--image-opts", "--object=x", "--force-share"):
            yield f"{v} {long}"
            yield f"{v} {long} missing"
    yield from ["", "nonsense", "-Z", "--nonsense"]
    # several -o; what does not go together
    yield from [
        "create -f qcow2 -o refcount_bits=8 -o lazy_refcounts=on -o cluster_size=4k,extended_l2=off new 1M ; info new", "create -f qcow2 -o refcount_bits=8 -o refcount_bits=32 new 1M ; info new",
        "create -f qcow2 -o data_file=dd -o data_file_raw=on new 1M ; info new", "amend -o compat=0.10 -o refcount_bits=16 q ; info q", "amend -o lazy_refcounts=on -o size=9M q ; info q",
        "measure --size 1G -o cluster_size=4k -o refcount_bits=64 -O qcow2", "convert -O qcow2 -o cluster_size=4k -o compat=0.10 q out ; info out", "create -f qcow2 -o encryption=off new 1M ; info new",
        "create -f qcow2 -o '' new 1M", "create -f qcow2 -o , new 1M", "create -f qcow2 -o ,cluster_size=4k new 1M", "create -f qcow2 -o cluster_size=4k, new 1M", "convert -O qcow2 -o '' q out", "amend -o '' q",
        "convert -C --salvage q out", "convert -c -O qcow2 -o preallocation=full q out", "convert -c -O qcow2 -o preallocation=metadata q out", "convert -c -O qcow2 -o preallocation=off q out ; compare q out",
        "convert -n -o cluster_size=4k -O qcow2 q empty", "convert -n -c -o preallocation=off -O qcow2 q empty", "create -u -b q -F qcow2 -f qcow2 new", "create -u -b nowhere -F qcow2 -f qcow2 new",
        "create -u -b q -F qcow2 -f qcow2 new 1M ; info new", "create -u -f qcow2 -o size=1M -b q -F qcow2 new ; info new", "create -f qcow2 -b '' new 1M", "create -f qcow2 -o backing_file= new 1M", "create -u -f qcow2 -b '' new",
    ]
    for o in ("compat=0.10,lazy_refcounts=on", "data_file_raw=on", "compat=0.10,data_file=x", "compat=0.10,extended_l2=on", "compat=0.10,compression_type=zstd", "compat=0.10,refcount_bits=8", "compat=0.10,extended_l2=on,cluster_size=4k"):
        yield f"measure -O qcow2 --size 1M -o {o} ; measure -O qcow2 -o {o} q"
    for k in ("leaky", "broken", "dirty", "corrupt", "q", "top", "raw", "vmdk", "packed"):
        for r in ("leaks", "all", "none") if k != "broken" else ("none",):
            yield f"check -r {r} {k} ; check {k} ; info {k}"
            yield f"check -r {r} --output=json {k} ; check --output=json {k}"
        yield f"check -q {k}"
        yield f"check -f raw {k}"
        yield f"check -f qcow2 {k}"
        yield f"check -T none {k}"
        yield f"check -T nonsense {k}"
        yield f"check -U {k}"
    yield from [
        "snapshot -c a q ; snapshot -c a q ; snapshot -l q ; snapshot -d a q ; snapshot -l q", "snapshot -a one snap ; compare snap q", "snapshot -a 1 snap ; compare snap q",
        "snapshot -a nothing snap", "snapshot -d nothing snap", "snapshot -d one snap ; check snap ; snapshot -q -l snap", "snapshot -l -c x q", "snapshot q", "snapshot snap",
        "snapshot -c x raw", "snapshot -a x raw", "snapshot -d x raw", "snapshot -l raw", "snapshot -c '' q ; snapshot -l q", "snapshot -c x vmdk", "snapshot -q -c x q",
        "snapshot -c x v2 ; snapshot -c y v2 ; resize v2 9M ; info v2 ; snapshot -a x v2 ; info v2", "snapshot -c x over ; commit over ; info over ; compare over q",
        "snapshot -c 1 q ; snapshot -c 2 q ; snapshot -a 2 q ; snapshot -d 1 q ; snapshot -l q", "snapshot -U -l snap", "snapshot -f qcow2 -l snap", "snapshot -a", "snapshot -l",
        "compare q raw", "compare q q", "compare -q q raw", "compare -s q raw", "compare -s q q", "compare raw ragged", "compare -s raw ragged", "compare q missing",
        "compare missing q", "compare -f raw -F raw q q", "compare -f raw q raw", "compare -T none q q", "compare -T nonsense q q", "compare q", "compare q q q",
        "compare -U q q", "compare over q", "compare top over", "compare -s packed raw", "compare vmdk raw", "compare broken q", "compare top q",
        "compare -q missing q", "compare -f nonsense q q", "compare --image-opts driver=qcow2,file.filename=q raw", "compare -f raw --image-opts q raw",
    ]
    for words in ("info --image-opts driver=file,filename=raw", "info --image-opts driver=file,filename=q", "info --output=json --image-opts driver=file,filename=q", "info --image-opts driver=raw,file.driver=file,file.filename=raw",
                  "info 'json:{\"driver\":\"file\",\"filename\":\"q\"}'", "check --image-opts driver=file,filename=q", "map --image-opts driver=file,filename=q", "info 'json:{\"file\":{\"driver\":\"file\",\"filename\":\"q\"}}'",
                  "convert -O qcow2 --image-opts driver=file,filename=q out ; info out ; compare -f raw q out", "measure -O qcow2 --image-opts driver=file,filename=raw"):
        yield f"{words} ; snapshot -l q"
    for k in ("raw", "vmdk", "vhdx", "vdi", "q"):
        yield f"convert -l one -O raw {k} out ; measure -O qcow2 -l one {k} ; check -r all {k} ; check -r leaks --output=json {k} ; info {k}"
    yield "convert --image-opts -l one -O raw driver=throttle,throttle-group=t,file.driver=qcow2,file.file.filename=snap out ; info snap"
    yield "convert --image-opts -l one -O raw driver=copy-on-read,file.driver=qcow2,file.file.filename=snap out ; info snap"
    for k in ("subs", "part", "old", "small", "tail"):
        yield f"check {k} ; check --output=json {k} ; map --output=json {k} ; map {k}"
    yield from [
        "snapshot -d 1 old ; snapshot -l old", "snapshot -d 2 old ; snapshot -l old ; check old", "snapshot -a 2 old ; check old", "convert -l 2 -O raw old out ; compare old out",
        "snapshot -d x old ; amend -o compat=0.10 old ; info old ; check old ; snapshot -a 2 old ; map --output=json old", "resize --shrink v2 4M ; snapshot -c a v2 ; amend -o compat=1.1 v2 ; amend -o compat=0.10 v2 ; info v2 ; check v2",
        "snapshot -d x old ; snapshot -c y old ; resize old 5M ; amend -o compat=0.10 old ; info old",
        "amend -o compat=0.10 old ; info old ; check old ; convert -l x -O raw old out ; snapshot -a x old ; map --output=json old ; compare old out ; check old",
    ]
    for o in ("", ",cluster_size=1M"):
        for p in ("metadata", "falloc", "full"):
            yield f"create -f qcow2 -o extended_l2=on,preallocation={p}{o} new 3M ; map --output=json new ; resize --preallocation={p} new 5M ; convert -O raw new out ; info out"
    for o in ("", "-o extended_l2=on", "-o data_file=dd"):      # zeroes of its own, not clusters full of them
        yield f"create -f qcow2 {o} new 2M ; rebase -b meta -F qcow2 new ; map --output=json new ; create -f qcow2 {o} new 5M ; rebase -b raw -F raw new ; map new ; check new"
    yield "create -f qcow2 -o extended_l2=on,cluster_size=256k new 1000000 ; resize --preallocation=falloc new +512 ; resize new +512 ; info new ; check new"
    for p in ("metadata", "falloc", "full"):    # the cluster in which the old end lies shows the backing file
        yield f"create -f qcow2 -o cluster_size=2M -b raw -F raw new 3500k ; resize --preallocation={p} new 3700k ; check new ; resize --shrink new 3500k ; convert -O raw new a ; resize -f raw --shrink raw 3500k ; compare a raw"
    for l in ("snapshot.id=1,snapshot.name=one", "snapshot.name=1", "snapshot.id=one", "snapshot.id=1,snapshot.name=nothing", "snapshot.id=2", "snapshot.bad=1", "snapshot.name=,snapshot.id=1"):
        yield f"convert -l {l} -O raw snap out ; info out ; measure -O qcow2 -l {l} snap"
    unreadable = "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=q,file.inject-error.0.event=l2_load"
    yield f"convert --salvage --image-opts -O raw {unreadable} out ; info out"
    yield f"convert --salvage --image-opts -O raw {unreadable},file.inject-error.0.once=on out ; compare out q"
    yield "convert --bitmaps -o compat=0.10 -O qcow2 q out"
    yield "amend -o size=0 q ; info q ; compare q raw"
    yield "snapshot -c x over ; commit over ; rebase -u -b '' over ; map --output=json over"     # emptied in spite of it
    yield "snapshot -c x over ; commit over ; snapshot -a x over ; compare over q ; snapshot -d x over ; check over ; compare over q"
    yield "create -f qcow2 new 0 ; snapshot -c a new ; check new ; resize new 1M ; snapshot -c b new ; check new ; snapshot -a a new ; check new ; info new ; resize new 2M ; snapshot -d a new ; check new"
    for s in ("9M", "--shrink 2M", "--shrink 1000k"):   # a snapshot of a disk that had another size
        for k in ("snap", "v2", "old"):
            yield f"snapshot -c then {k} ; resize {s.replace(' ', ' ' + k + ' ') if ' ' in s else k + ' ' + s} ; convert -l then -O raw {k} out ; info out ; measure -O qcow2 -l then {k} ; compare {k} out"
    yield "snapshot -c then over ; resize over 9M ; rebase -u -b meta -F qcow2 over ; convert -l then -O raw over out ; info out ; compare over out"
    for p in ("metadata", "falloc", "full"):    # what is allocated does not hide the backing file
        yield f"create -f qcow2 -o extended_l2=on,preallocation={p} -b raw -F raw new ; compare new raw ; map --output=json new ; check new ; rebase -b '' new ; compare new raw"
        yield f"create -f qcow2 -o extended_l2=on -b raw -F raw new 2M ; resize --preallocation={p} new 7M ; compare new raw ; check new"
    for o in ("", "-u", "-p", "-q"):
        yield from [f"rebase {o} -b q -F qcow2 top ; info top ; map --output=json top", f"rebase {o} -b '' top ; info top ; map --output=json top", f"rebase {o} top",
                    f"rebase {o} -b nowhere -F qcow2 top ; info top", f"rebase {o} -b q top ; info top", f"rebase {o} -b raw -F raw over ; info over ; check over",
                    f"rebase {o} -b raw -F qcow2 over ; info over", f"rebase {o} -b q -F nonsense over", f"rebase {o} -b q -F qcow2 raw", f"rebase {o} -b empty -F qcow2 q ; map --output=json q",
                    f"rebase {o} -F qcow2 -b top top", f"commit {o.replace('-u', '-d')} top ; info top ; map --output=json over ; info over",
                    f"commit {o.replace('-u', '-d')} -b q top ; info top ; compare top q"]
    yield from [
        "commit q", "commit raw", "commit -b nowhere top", "commit -d over ; map over ; compare over q", "commit orphan", "commit -t nonsense top", "commit -t none over ; compare over q",
        "commit onraw ; compare onraw raw", "commit onpart ; compare onpart part ; info onpart", "commit -d onpart ; compare onpart part", "commit -r 100M over ; compare over q", "commit -b over top", "commit -f raw top", "commit -p over", "commit missing",
        "amend -o compat=0.10 q ; info q ; check q", "amend -o compat=1.1 v2 ; info v2", "amend -o lazy_refcounts=on q ; info q", "amend -o lazy_refcounts=off sub ; info sub",
        "amend -o refcount_bits=64 q ; info q ; check q", "amend -o refcount_bits=1 q ; info q ; check q", "amend -o refcount_bits=1 snap ; info snap",
        "amend -o backing_file=raw,backing_fmt=raw q ; info q", "amend -o backing_file= top ; info top", "amend -o size=16M q ; info q", "amend -o cluster_size=4k q",
        "amend -o cluster_size=64k q", "amend -o preallocation=full q", "amend -o nonsense=1 q", "amend -o compat=0.10 sub", "amend -o compat=0.10,lazy_refcounts=on q",
        "amend -o compression_type=zstd q", "amend -o data_file=x q", "amend -o data_file_raw=off ext ; info ext", "amend -o extended_l2=on q", "amend -o size=1 raw",
        "amend -f raw -o size=1M raw", "amend -o size=16M vmdk", "amend -o help -f qcow2", "amend -o ? -f raw", "amend q", "amend -o", "amend -p -o compat=0.10 q", "amend -q -o compat=0.10 q",
        "amend --force -o compat=0.10 q", "amend -t nonsense -o compat=0.10 q", "amend -o compat=0.10 zstd", "amend -o encrypt.format=luks q",
        "dd if=q of=out", "dd if=q of=out bs=1M", "dd if=q of=out bs=0", "dd if=q of=out bs=x", "dd if=q of=out count=0", "dd if=q of=out skip=999999 bs=64k ; info out", "dd if=raw of=out bs=64k count=3 skip=4 ; info out",
        "dd if=raw of=out bs=64k count=3 skip=3 ; info out",
        "dd if=q of=out bs=1000 count=3 ; info out", "dd if=q", "dd of=out", "dd if=q of=out nonsense=1", "dd if=q of=out nonsense", "dd if=missing of=out", "dd -f raw if=q of=out bs=64k ; info out",
        "dd -O nonsense if=q of=out", "dd -O qcow2 if=q of=out bs=64k ; compare q out ; check out", "dd -U if=q of=out bs=1M count=1 ; info out", "dd if=ragged of=out ; info out",
        "dd if=q of=out bs=3G", "dd if=q of=out count=-1", "dd --image-opts if=driver=qcow2,file.filename=q of=out bs=1M ; info out", "dd if=raw of=out skip=1 bs=1M ; info out",
    ]
    for o in ("", "-p", "-c", "-n", "-W", "-m 4", "-m 0", "-m 99", "-m x", "-S 0", "-S 512", "-S 64k", "-S 100", "-S 4M", "-S x", "-C", "-C -c", "-C -S 4k", "-q", "-q -p", "-t none",
              "-T none", "-T nonsense", "-r 1G", "-r x", "-U", "--salvage", "-l one", "--target-is-zero", "--target-is-zero -n", "--bitmaps", "--skip-broken-bitmaps",
              "-o cluster_size=4k", "-o help", "-o compat=0.10", "-o nonsense=on", "-o size=16M", "-o size=1M", "-B raw -F raw", "-B raw", 
              "-c -o compression_type=zstd", "-o preallocation=metadata", "-o preallocation=full", "-S 0 -o preallocation=falloc", "-c -S 0", "-o data_file=dd", "-o extended_l2=on",
              "-o data_file=dd,data_file_raw=on", "-f raw", "-f nonsense", "-l nothing", "-l snapshot.name=one", "-l snapshot.id=1", "-l snapshot.id=7", "--image-opts"):
        for out in ("raw", "qcow2"):
            if out == "qcow2" or not any(x in o for x in ("--bitmaps", "metadata")):    # QEMU leaves a file where it fails
                yield f"convert {o} -O {out} snap out ; info out ; compare snap out ; check out"
        yield f"convert {o} -O qcow2 bits out ; info out"
        yield f"convert {o} -O qcow2 v2 empty ; info empty ; compare v2 empty"
    yield from [
        "convert q", "convert", "convert q out out2 ; info out2", "convert -O raw q raw ragged out ; info out", "convert -O nonsense q out", "convert -O luks q out",
        "convert -n -O qcow2 q missing", "convert -n -O raw q ragged", "convert -O qcow2 q q", "convert -c -O raw q out", "convert -m 1 -O qcow2 -B q -F qcow2 over out ; info out ; map --output=json out ; compare out over",
        "convert -O qcow2 missing out", "convert -O qcow2 q raw -B q -F qcow2 out", "convert -O qcow2 -l one q raw out",
        "convert --target-image-opts -n q driver=qcow2,file.filename=empty ; compare q empty", "convert --target-image-opts q driver=qcow2,file.filename=out",
        "convert --target-image-opts -n -O qcow2 q driver=qcow2,file.filename=empty", "convert --image-opts driver=qcow2,file.filename=q -O raw out ; compare q out",
        "convert --image-opts driver=raw,file.filename=q -O raw out ; info out", 
        "convert --image-opts -f qcow2 driver=qcow2,file.filename=q out", "convert --image-opts nonsense=1 out", "convert json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"q\"}} -O raw out ; compare out q",
        "convert json:{ out", "info json:{\"driver\":\"qcow2\",\"file.filename\":\"q\"}",
        "info json:{\"file.filename\":\"q\"}", "info nbd:unix:/nowhere", "convert -O qcow2 --bitmaps raw out ; info out", "convert -O raw --bitmaps bits out", "convert --bitmaps --skip-broken-bitmaps -O qcow2 bits out ; info --output=json out",
        "convert -O raw ragged out ; info out", "convert -O qcow2 ragged out ; info out ; compare ragged out", "convert -n -c -O qcow2 q empty ; compare q empty ; check empty", "convert -O qcow2 . out", "convert q .",
        "convert -m 1 -O qcow2 top out ; map --output=json out", "convert -S 0 -O qcow2 top out ; compare out top", "convert -m 1 -c -O qcow2 q out ; map --output=json out",
        "convert -O qcow2 -o cluster_size=4k,extended_l2=off sub out ; check out ; compare sub out",
    ]
    yield from [
        "bitmap --add q x ; info q", "bitmap --add q x ; bitmap --add q x", "bitmap --remove bits b0 ; info bits", "bitmap --remove q x", "bitmap --clear bits b0", "bitmap --disable bits b0 ; info bits",
        "bitmap --enable bits b1 ; info bits", "bitmap --merge b0 bits b1", "bitmap --merge nothing bits b1", "bitmap --add --merge b0 -b bits q x ; info q", "bitmap --add --merge b0 -b bits -F qcow2 q x ; info q",
        "bitmap --add -g 4k q x ; info q", "bitmap --add -g 3k q x", "bitmap --add -g 1 q x", "bitmap -g 64k --remove bits b0", "bitmap bits b0", "bitmap --add bits", "bitmap --add raw x", "bitmap --add v2 x", "bitmap --add vmdk x",
        "bitmap --add --disable --enable --clear q x ; info --output=json q", "bitmap -b bits --add q x", "bitmap -F qcow2 --add q x", "bitmap --add -f raw q x", "bitmap --add '' q ''", "bitmap --clear --merge b0 bits b1",
        "bitmap --enable bits b0", "bitmap --add --image-opts driver=qcow2,file.filename=q x ; info q",
    ]
    for o in ("--start-offset=1M", "--start-offset=1M --max-length=64k", "-s 1M -l 1M", "--start-offset=100M", "--max-length=0", "--start-offset=x", "--max-length=x", "--start-offset=1000", "--max-length=1000", "-s 1k -l 70000", "-f raw"):
        yield f"map {o} top"
        yield f"map --output=json {o} top"
        yield f"map --output=json {o} raw"
    for o in ("-c 0", "-d 1", "-s 1M", "-S 1M", "-o 1M", "-w", "-w --flush-interval=2", "-w --flush-interval=2 --no-drain", "--flush-interval=2", "-w --pattern=7", "-w --pattern=256",
              "-w --pattern=x", "-n", "-t none", "-t nonsense", "-i threads", "-i native", "-i native -n", "-i io_uring", "-i nonsense", "-U", "-s x", "-d x", "-d -1", "--pattern=1", "--no-drain", "-w -d 4 --flush-interval=3", "-w --flush-interval=3 -d 2 -c 9 --no-drain"):
        yield f"bench -c 4 -f qcow2 {o} q ; compare q snap"
    for v in ("1", "3000000000", "2147483648", "10k", "0x2", "1.5", "x", "-1", "99999999999999999999"):     # (QEMU never ends with a depth of 0)
        for o in ("-c 2 -c", "-c 2 -d", "-c 2 -s", "-c 2 -S", "-c 2 -o", "-c 2 -d 1 -w --flush-interval", "-c 2 -w --pattern") if v != "1.5" else ("-d", "-c"):
            if not (o.endswith("-s") and v in ("1", "0x2")):      # (bytes of a ragged request, which QEMU counts past the end)
                yield f"bench -f raw {o} {v} raw"
        yield f"convert -m {v} -O raw q out"
        for o in ("cluster_size", "refcount_bits"):
            yield f"measure -O qcow2 -o {o}={v} --size 1M"
    yield from ["measure -O qcow2 -o refcount_bits=0 --size 1M", "measure -O qcow2 -o refcount_bits=8,compat=0.10 --size 1M", "measure -O qcow2 -o extended_l2=on,cluster_size=4k --size 1M",
                "info --image-opts driver=host_device,filename=raw", "info --image-opts driver=qcow2,file.driver=host_device,file.filename=q"]
    for o in ("--preallocation=off", "--preallocation=metadata", "--preallocation=falloc", "--preallocation=full", "--preallocation=some", "-q", "-f raw", "--shrink", "-U", "--shrink -q"):
        for k, s in (("q", "+1M"), ("q", "-1M"), ("q", "7M"), ("raw", "+1M"), ("raw", "2M"), ("over", "+3M"), ("snap", "+1M"), ("snap", "1M"), ("v2", "9M"), ("ext", "3M"), ("sub", "9M"), ("vmdk", "9M"), ("bits", "9M"), ("bits", "2M")):
            grown = "" if "alloc" in o else f" ; map --output=json {k}"      # where the new clusters are is for each to choose
            yield f"resize {o} {k} {s} ; info {k} ; check {k}{grown}"
    yield from [
        "create -u -f qcow2 -b 'a,b,,c' -F raw new 1M ; info new", "create -f qcow2 -o data_file=a,,b new 1M ; info new", "info --image-opts driver=qcow2,file.filename=q", "info -f raw q", "info -f qcow2 raw", "info -f nonsense q", "info q q", "info -U q", "info .", "info ''",
        "info --output=xml q", "info --output q", "info --backing-chain orphan", "info nonsense:q", "create c:d 1M", "create -f qcow2 nosuch:x 1M ; info ./nosuch:x", "create file:c:d 1M ; info ./c:d ; info c:d", "convert -O raw q c:d", "convert -O raw q file:c:d ; compare q ./c:d", "convert -O raw c:d out", "dd if=q of=c:d", "create -u -f qcow2 -F raw -b c:d t 1M ; info t ; map t", "create host_device:raw 1M", "info host_device:raw", "create blkdebug::x 1M", "rebase -F raw -b c:d over", "info ./q", "info file:q", "info -T none q", "check --image-opts driver=qcow2,file.filename=leaky",
        "map --image-opts driver=qcow2,file.filename=q", "resize --image-opts driver=qcow2,file.filename=q 9M ; info q", "snapshot --image-opts -l driver=qcow2,file.filename=snap",
        "rebase --image-opts -u -b raw -F raw driver=qcow2,file.filename=q ; info q", "commit --image-opts driver=qcow2,file.filename=over", "measure --image-opts driver=qcow2,file.filename=q",
        "amend --image-opts -o compat=0.10 driver=qcow2,file.filename=q ; info q", "bench -c 2 --image-opts driver=qcow2,file.filename=q",
    ]


VOLATILE = [
    (re.compile(r"^(?:Supported|Amend|Creation) .*:\n(?:  .*\n)+", re.M), "OPTIONS\n"),
    (re.compile(r"\s+\(\d+\.\d+/100%\)[\r\n]+"), ""), (re.compile(r"\d+\.\d+% fragmented"), "X% fragmented"), (re.compile(r'("fragmented-clusters": )\d+'), r"\1X"),
    (re.compile(r"(disk size: ).*"), r"\1X"), (re.compile(r'("actual-size": )\d+'), r"\1X"), (re.compile(r"Run completed in .* seconds"), "Run completed"),
    (re.compile(r'("date-n?sec": )\d+'), r"\1X"), (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
]


NEEDS = {"over": ["q"], "top": ["over", "q"], "onraw": ["raw"], "ext": ["ext.data"], "part": ["part.data"], "onpart": ["part", "part.data"], "flat.vmdk": ["flat-flat.vmdk"], "two.vmdk": ["two-s001.vmdk"]}


def copy_named(made, d, commands):
    """Into a new folder: the files that the words name, and what those need."""
    os.mkdir(d)
    names = set(re.split(r"[^\w.-]+", commands))
    for n in sorted(names):
        for f in [n, *NEEDS.get(n, [])] if os.path.isfile(f"{made}/{n}") else []:
            if not os.path.exists(f"{d}/{f}"):
                subprocess.run(["cp", "--sparse=always", f"{made}/{f}", f"{d}/{f}"], check=True)


def run(tool, d, commands, env):
    out = []
    for c in commands.split(" ; "):
        p = subprocess.run(f"exec '{tool}' {c.replace('json:{', 'json:' + chr(92) + '{').replace(chr(34), chr(92) + chr(34)).replace(chr(92) * 2 + chr(34), chr(92) + chr(34))}",
                           shell=True, cwd=d, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, env=env, check=False)
        text = p.stdout.decode("utf-8", "replace")
        for rx, to in VOLATILE:
            text = rx.sub(to, text)
        out.append((p.returncode, text, p.stderr.decode("utf-8", "replace")))
    return out


# Where a file was just made by each tool, its clusters may stand elsewhere.
PLACES = [(re.compile(r'"offset": \d+'), '"offset": X'), (re.compile(r"^(0x?[0-9a-f]*\s+0x[0-9a-f]+\s+)0x[0-9a-f]+", re.M), r"\1X"),
          (re.compile(r"(Image end offset: )\d+"), r"\1X"), (re.compile(r'("image-end-offset": )\d+'), r"\1X")]
CHANGES = ("convert", "dd", "rebase", "commit", "amend", "resize", "snapshot", "bitmap", "check -r", "create")


def same(commands, a, b):
    moved = False
    for c, x, y in zip(commands, a, b):
        out = [x[1], y[1]]
        for rx, to in PLACES if moved else []:
            out = [rx.sub(to, s) for s in out]
        if y[0] == 0 and "QEMU disk image utility" in y[1] and x[0]:
            continue                    # measure answers what it does not know with its help page
        quiet = x[0] and y[0] and c.startswith(("create", "convert"))     # a refused command: how much it said before
        if x[0] != y[0] or bool(x[2]) != bool(y[2]) or (out[0] != out[1] and not quiet):
            return False
        moved |= c.startswith(CHANGES)
    return True


ALWAYS = ("extended_l2=on,preallocation", "resize --preallocation=metadata new 7M", "commit onpart", "a,b,,c", "data_file=a,,b", "check subs", "check part", "check small", "check tail", "snapshot -d 1 old", "snapshot -d x old", "driver=file", "-l one ", "compat=0.10 old ; info old ; check old ; conv", " -B ", "bench -f raw -c 2", "measure -O qcow2 -o refcount_bits", "host_device", "--bitmaps", "check -r all q", "check -r leaks leaky", "snapshot -c then snap", "snapshot -c then over", "create -f qcow2 new 0 ;", "extended_l2=on,preallocation=metadata", "new 2M ; rebase -b meta", "new 1000000 ; resize", "size=0", "snapshot.id=1,", "--salvage --image-opts", "new 3500k ; resize", "snapshot -c x over ; commit", " -o lazy_refcounts=on -o ", " -o data_file_raw=on new", "-C --salvage", "-c -O qcow2 -o preallocation", "create -u -b q -F qcow2 -f qcow2 new", "--size 1M -o compat=0.10,")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("lodge")
    ap.add_argument("--only", default="", help="cases with this text in them")
    ap.add_argument("--part", type=int, default=1, help="one case of so many (and all of ALWAYS)")
    o = ap.parse_args()
    qemu = shutil.which("qemu-img")
    if not qemu or not shutil.which("qemu-io"):
        print("qemu-img is not installed: skipped")
        sys.exit(77)
    lodge, env = os.path.abspath(o.lodge), dict(os.environ, LC_ALL="C", TZ="UTC", ASAN_OPTIONS="detect_leaks=0")
    bad = 0
    with tempfile.TemporaryDirectory(prefix="img-diff-") as top:
        made = f"{top}/made"
        os.mkdir(made)
        fixtures(made, qemu)
        todo = [c for i, c in enumerate(cases()) if o.only in c and (i % o.part == 0 or any(a in c for a in ALWAYS))]

        def one(k):
            res = []
            for tool in (lodge, qemu):
                d = f"{top}/{k % 2}/d"          # the same name for both: it shows in messages
                copy_named(made, d, todo[k])
                res.append(run(tool, d, todo[k], env))
                shutil.rmtree(d)
            return res

        os.mkdir(f"{top}/0")
        os.mkdir(f"{top}/1")
        halves = [range(i, len(todo), 2) for i in (0, 1)]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            results = {}
            for f in [pool.submit(lambda h: {k: one(k) for k in h}, h) for h in halves]:
                results.update(f.result())
        for k, c in enumerate(todo):
            words = c.split(" ; ")
            if same(words, *results[k]):
                continue
            bad += 1
            print(f"=== {c}")
            for w, l, q in zip(words, *results[k]):
                if l[:2] != q[:2] or bool(l[2]) != bool(q[2]):
                    print(f"--- {w}\nlodge {l[0]}\n{l[1]}{l[2]}qemu {q[0]}\n{q[1]}{q[2]}", flush=True)
    print(f"{len(todo)} cases, {bad} differ")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
