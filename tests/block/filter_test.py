#!/usr/bin/env python3
"""Nodes above nodes: throttle and formats in any order, beside qemu-io and qemu-storage-daemon; what only Lodge's programs can show.

usage: filter_test.py LODGE-QEMU-IO LODGE; exit status 77 without qemu-io and qemu-img"""
import os
import shutil
import sys
import tempfile
import time

import graph_test as g

T = "--object throttle-group,id=g,x-iops-total=2000 --image-opts "
THROTTLE = [
    (T + "driver=throttle,throttle-group=g,file.driver=qcow2,file.file.driver=file,file.file.filename=top.q", "read -P 2 0 64k", "read -P 1 64k 64k",
     "write -P 3 0 8k", "length", "map", "alloc 0 1M", "discard 0 64k", "write -z 1M 64k", "read -P 0 1M 64k", "truncate 5M", "length"),
    (T + "driver=throttle,throttle-group=g,file.filename=top.q", "length", "map"),
    (T + "driver=qcow2,file.driver=throttle,file.throttle-group=g,file.file.filename=top.q", "read -P 1 64k 64k", "write -P 5 1M 64k", "write -c -P 6 2M 64k",
     "read -P 6 2M 64k", "map", "info"),
    (T + "driver=raw,file.driver=throttle,file.throttle-group=g,file.file.filename=raw", "read -P 7 64k 64k", "map", "discard 0 64k", "truncate 5M", "length"),
    (T + "driver=raw,offset=64k,file.driver=throttle,file.throttle-group=g,file.file.filename=raw", "read -P 7 0 64k", "write -P 9 0 512", "length"),
    (T + "driver=throttle,throttle-group=g,file.driver=throttle,file.throttle-group=g,file.file.driver=file,file.file.filename=raw", "read -P 7 64k 64k", "write -P 9 0 512"),
    (T + "driver=qcow2,file.driver=file,file.filename=data.q,data-file.driver=throttle,data-file.throttle-group=g,data-file.file.driver=file,data-file.file.filename=raw",
     "read -P 7 64k 64k", "write -P 6 64k 4k", "read -P 6 64k 4k"),
    ("--image-opts driver=throttle,throttle-group=none,file.filename=top.q", "length"),
    (T + "driver=throttle,file.filename=top.q", "length"),
    (T + "driver=throttle,throttle-group=g", "length"),
    (T + "driver=throttle,throttle-group=g,file=nothing", "length"),
    (T + "driver=throttle,throttle-group=g,foo=bar,file.filename=top.q", "length"),
    ("--object throttle-group,id=g,x-bps-total=1,x-bps-read=1 --image-opts driver=throttle,throttle-group=g,file.filename=top.q", "length"),
    ("driver=raw,file.driver=qcow2,file.file.driver=file,file.file.filename=top.q", "read -P 1 64k 64k", "map", "length", "write -P 5 1M 64k", "truncate 5M", "length"),
    ("driver=raw,offset=64k,file.driver=qcow2,file.file.driver=file,file.file.filename=top.q", "read -P 1 0 64k", "map", "length", "write -P 5 1M 64k"),
    ("driver=qcow2,file.driver=raw,file.offset=1M,file.file.driver=file,file.file.filename=inside", "read -P 2 0 64k", "write -P 5 2M 1M", "read -P 5 2M 1M", "map"),
    ("driver=qcow2,file.driver=qcow2,file.file.driver=file,file.file.filename=nest.q", "read -P 4 0 128k", "write -P 5 1M 1M", "read -P 5 1M 1M", "read -P 0 3M 64k"),
    ('json:{"driver":"qcow2","file":{"driver":"raw","offset":1048576,"file":{"driver":"file","filename":"inside"}}}', "read -P 2 0 64k", "length"),
    ("driver=qcow2,file.driver=vmdk,file.file.driver=file,file.file.filename=top.q", "length"),
]
COR_CMDS = ("read -P 1 70000 100", "read -P 0 1M 512", "map", "read -P 1 100k 100k", "map", "write -P 3 200k 1k", "read -P 3 200k 1k", "read -P 1 201k 55k",
            "read -P 0 3100k 996k", "map", "discard 0 64k", "read 0 64k", "write -c -P 6 2M 64k", "read -P 6 2M 64k", "flush", "map", "length")
CHAIN = ('{"driver":"qcow2","node-name":"n3","file":{"driver":"file","filename":"t3.q"},"backing":{"driver":"qcow2","node-name":"n2","file":{"driver":"file",'
         '"filename":"top.q"},"backing":{"driver":"qcow2","node-name":"n1","file":{"driver":"file","filename":"base.q"}}}}')
COR = [
    *[(how, *COR_CMDS) for how in (
        "--image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=top.q", "-C top.q", "-C -f qcow2 old2.q", "-C small.q", "-C data2.q", "-C zstd.q",
        "--image-opts driver=raw,file.driver=copy-on-read,file.file.driver=qcow2,file.file.file.filename=top.q",
        T + "driver=copy-on-read,file.driver=throttle,file.throttle-group=g,file.file.driver=qcow2,file.file.file.filename=top.q",
        T + "driver=throttle,throttle-group=g,file.driver=copy-on-read,file.file.driver=qcow2,file.file.file.filename=top.q")],
    ("-C -r top.q", "length"),
    ("-C -f raw raw", "read 0 64k", "map"),
    ("-r --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=top.q", "length"),
    ("driver=copy-on-read,file.filename=top.q", "read 0 64k", "map"),
    ("driver=copy-on-read", "length"),
    *[(f'json:{{"driver":"copy-on-read",{bottom}"file":{CHAIN}}}', "read -P 2 0 64k", "read -P 1 64k 64k", "read -P 0 1M 64k", "map", "read 0 4M", "map")
      for bottom in ('"bottom":"n2",', '"bottom":"n1",', '"bottom":"nobody",', "")],
]
DEBUG_CMDS = ("read 0 4k", "read 64k 4k", "write 1M 100", "write 1M 64k", "flush", "read -P 205 1M 64k", "write -c 2M 64k", "read -P 205 2M 64k", "discard 0 64k",
              "write 3M 1k", "write 3M 1k", "flush")
D = "driver=qcow2,file.driver=blkdebug,file.image.filename=top.q,file.inject-error.0."
R = "driver=raw,file.driver=blkdebug,file.image.filename=raw,"
RAW_CMDS = ("read 0 4k", "read 0 4k", "write 64k 4k", "read -P 205 64k 4k", "write -z 64k 4k", "discard 64k 64k", "flush", "write 1k 512", "flush", "flush",
            "read 1000 100", "write -z 5k 90k", "discard 3k 120k", "map", "truncate 5M", "length")
BLKDEBUG = [
    *[(f"{D}event={e},file.inject-error.0.once=on,file.inject-error.0.errno=28", *DEBUG_CMDS) for e in (
        "l1_update", "l2_load", "l2_update", "l2_alloc_write", "l2_alloc_cow_read", "read_aio", "read_backing_aio", "write_aio", "refblock_load",
        "cluster_alloc", "flush_to_os", "pwritev", "pwritev_done", "none", "reftable_load", "refblock_update_part", "cluster_free",
        "read_compressed", "vmstate_save", "l1_shrink_write_table", "pwritev_rmw_head")],
    *[(f"{D}event={e}", *DEBUG_CMDS[:7]) for e in ("read_aio", "read_backing_aio", "foo", "write_aio,file.inject-error.0.iotype=read", "none,file.inject-error.0.iotype=discard",
                                                  "none,file.inject-error.0.foo=1", "none,file.inject-error.0.errno=x", "none,file.inject-error.0.once=x",
                                                  "none,file.inject-error.0.iotype=x", "none,file.inject-error.0.sector=x", "write_aio,file.inject-error.0.immediately=on")],
    *[(f"{D}event={e},file.inject-error.0.once=on", "write -c 2M 64k", "write -c 2M 64k", "read -P 205 2M 64k") for e in ("cluster_alloc_bytes",)],
    (f"{D}event=none,file.inject-error.0.sector=100000", "read 0 64k", "write 0 64k"),
    (f"{D}event=write_aio,file.inject-error.0.state=2,file.set-state.0.event=write_aio,file.set-state.0.state=1,file.set-state.0.new_state=2",
     "write 0 4k", "write 0 4k", "write 0 4k", "read 0 4k"),
    (f"{D}event=write_aio,file.inject-error.1.event=read_aio,file.inject-error.0.once=on,file.inject-error.1.errno=28", "write 0 4k", "write 0 4k", "read 0 4k", "write 0 4k"),
    *[(R + f"file.inject-error.0.event=none,file.inject-error.0.{o}", *RAW_CMDS) for o in (
        "iotype=read", "iotype=write", "iotype=write-zeroes", "iotype=discard", "iotype=flush", "sector=2", "sector=130", "sector=-1", "errno=5,file.inject-error.0.once=on", "errno=0",
        "errno=28,file.inject-error.0.sector=8")],
    *[(R + f"file.{o}", *RAW_CMDS) for o in ("align=511", "max-transfer=5000", "max-transfer=16k", "opt-write-zero=64k", "max-write-zero=16k", "opt-discard=64k", "max-discard=64k",
                                             "opt-write-zero=64k,file.max-write-zero=16k", "opt-discard=64k,file.max-discard=1k", "max-transfer=3G", "inject-error.event=none",
                                             "set-state.event=none", "set-state.0.state=1", "image=x", "foo=1", "config=no-such", "config=c1", "config=bad1", "config=bad2",
                                             "config=bad3", "config=bad4", "config=bad5", "config=empty", "max-transfer=16k,file.inject-error.0.event=none,file.inject-error.0.sector=40")],
    *[(name, *DEBUG_CMDS) for name in ("-f qcow2 blkdebug:c1:top.q", "-f qcow2 blkdebug::top.q", "-f qcow2 blkdebug:nothing:top.q",
                                       "-f qcow2 blkdebug:top.q", "-f qcow2 blkdebug:", "-f raw blkdebug::blkdebug:c1:raw", "-r blkdebug:c1:top.q", "-f qcow2 blkdebug:c1:nothing")],
    ("-f qcow2 blkdebug:c2:top.q", "write 0 4k", "write 0 4k", "write 0 4k", "read 0 4k"),
    ('json:{"driver":"qcow2","file":{"driver":"blkdebug","image":{"driver":"file","filename":"top.q"},"inject-error":[{"event":"write_aio","once":true,"errno":28,"sector":-1}],'
     '"set-state":[{"event":"pwritev","state":1,"new_state":2}]}}', *DEBUG_CMDS),
    ("driver=blkdebug,image.driver=qcow2,image.file.filename=top.q,inject-error.0.event=none,inject-error.0.sector=4", "read 0 1k", "read 2k 1k", "write 1k 2k", "map", "length"),
]
I = "-f qcow2 blkdebug::top.q"
BREAKS = [
    (I, "break write_aio A", "aio_write 0 4k", "wait_break A", "resume A", "aio_flush", "aio_write 64k 4k", "aio_flush", "read -P 205 0 4k"),
    (I, "break write_aio A", "break pwritev B", "aio_write 0 4k", "wait_break A", "resume A", "wait_break B", "resume B", "aio_flush"),
    (I, "break foo A", "length"), (I, "resume A"), (I, "remove_break A"), ("top.q", "break write_aio A"), ("top.q", "resume A"), ("top.q", "remove_break A"),
    (I, "break write_aio A", "remove_break A", "aio_write 0 4k", "aio_flush", "resume A"),
    (I, "break read_backing_aio A", "aio_read -P 1 64k 4k", "wait_break A", "resume A", "aio_flush", "aio_read -P 2 0 4k", "aio_flush"),
]
V = "--image-opts driver=blkverify,"
Q = "driver=quorum,children.0.driver=raw,children.0.file.filename=raw,children.1.driver=qcow2,children.1.file.filename=four.q"
THIRD = ",children.2.driver=raw,children.2.file.filename=raw3"
PAIR_CMDS = ("read -P 0 0 64k", "read -P 7 64k 64k", "write -P 3 8k 4k", "write -P 4 512 1k", "discard 0 64k", "flush", "map", "length", "truncate 5M", "length", "read 0 4M")
MIRRORS = [
    ("blkverify:raw4:four.q", *PAIR_CMDS[:8]), ("-r blkverify:raw:four.q", "read 0 4k", "write 0 4k"), ("-f qcow2 blkverify:raw:four.q", "length"),
    *[(name, "length") for name in ("blkverify:raw4", "blkverify:raw4:", "blkverify:", "blkverify:nothing:raw", "blkverify::raw4", "blkverify:inside:four.q", "blkverify:raw:base.q")],
    (V + "raw.driver=file,raw.filename=raw4,test.driver=qcow2,test.file.filename=four.q", "read 0 64k", "write 0 100"),
    (V + "raw.driver=file,raw.filename=raw4", "length"), (V + "test.driver=qcow2,test.file.filename=four.q", "length"),
    (V + "raw.filename=raw4,test.file.filename=four.q", "length", "read 64k 4k"), (V + "raw.filename=raw4,test.filename=four.q", "length"),
    *[(Q + o, *PAIR_CMDS) for o in (
        "", ",vote-threshold=0", ",vote-threshold=3", ",vote-threshold=2,blkverify=on,rewrite-corrupted=on", ",vote-threshold=1,blkverify=on", ",read-pattern=fifo",
        ",vote-threshold=1,read-pattern=fifo", ",vote-threshold=2,read-pattern=foo", ",vote-threshold=2,foo=1", ",vote-threshold=x", THIRD + ",vote-threshold=2",
        THIRD + ",vote-threshold=3", THIRD + ",vote-threshold=2,rewrite-corrupted=on", ",children.2.driver=raw,children.2.file.filename=inside,vote-threshold=2",
        ",children.3.driver=raw,children.3.file.filename=raw3,vote-threshold=2", ",children.2.filename=raw3,vote-threshold=2")],
    ("driver=quorum,vote-threshold=1", "length"),
    ('json:{"driver":"quorum","vote-threshold":1,"children":[{"driver":"raw","file":{"driver":"file","filename":"raw"}},{"driver":"qcow2","file":{"driver":"file","filename":"four.q"}}]}',
     "read -P 7 64k 64k", "write -P 5 0 4k", "length"),
    (Q + ",children.2.driver=raw,children.2.file.driver=blkdebug,children.2.file.image.filename=raw3,children.2.file.inject-error.0.event=none,vote-threshold=2", *PAIR_CMDS),
    (Q + ",children.2.driver=raw,children.2.file.driver=blkdebug,children.2.file.image.filename=raw3,children.2.file.inject-error.0.event=none,vote-threshold=3", *PAIR_CMDS),
]
Z = "driver=compress,file.driver=qcow2,file.file.filename=top.q"
COMPRESS = [
    (Z, "write -P 3 1M 128k", "read -P 3 1M 128k", "write -P 5 100000 70000", "read -P 5 100000 70000",
     "read -P 1 64k 34464", "write -z 2M 64k", "read -P 0 2M 64k", "discard 2M 64k", "map", "flush", "length"),
    ("-t writeback --image-opts " + Z, "write -P 3 1M 128k", "flush", "read -P 3 1M 128k"),
    (T + "driver=compress,file.driver=throttle,file.throttle-group=g,file.file.driver=qcow2,file.file.file.filename=top.q", "write -P 3 1M 128k", "read -P 3 1M 128k"),
    ("driver=compress,file.filename=top.q", "length"), ("driver=compress,file.driver=raw,file.file.filename=raw", "length"),
    ("driver=compress,file.driver=qcow2,file.file.filename=data.q", "length", "write 0 64k"),
    ("-r --image-opts " + Z, "read -P 2 0 64k", "write 0 512"),
]
L = "driver=blklogwrites,log.filename=log,"
P = "driver=qcow2,file.driver=preallocate,file.file.filename=top.q"
LOGS = [
    (L + "file.driver=raw,file.file.filename=raw", "read -P 7 64k 64k", "write -P 3 8k 4k", "write -P 4 100 1k", "discard 0 64k", "flush", "map", "length", "truncate 5M", "length"),
    (L + "file.driver=qcow2,file.file.filename=top.q", "read -P 2 0 64k", "write -P 3 100k 100k", "read -P 3 100k 100k", "write -z 1M 64k", "map", "length"),
    ("driver=qcow2,file.driver=blklogwrites,file.log.filename=log,file.file.filename=top.q", "read -P 2 0 64k", "write -P 3 100k 100k", "write -c -P 6 2M 64k", "read -P 6 2M 64k",
     "discard 0 64k", "map"),
    ("-r --image-opts " + L + "file.filename=raw", "read -P 7 64k 64k", "write 0 4k"),
    *[(L + "file.filename=raw" + o, "write -P 3 8k 4k", "read -P 3 8k 4k") for o in (
        "", ",log-append=on", ",log-append=on,log-sector-size=512", ",log-append=x", ",log-sector-size=0", ",log-sector-size=16", ",log-sector-size=513", ",log-sector-size=16M",
        ",log-sector-size=64k", ",log-sector-size=x", ",log-sector-size=-1", ",log-super-update-interval=0", ",log-super-update-interval=x", ",log-super-update-interval=1", ",foo=1")],
    ("driver=blklogwrites,log.filename=log", "length"), ("driver=blklogwrites,file.filename=raw", "length"), (L + "file.filename=nothing", "length"),
    ("driver=blklogwrites,log.filename=nothing,file.filename=raw", "length"), ("driver=blklogwrites,log.filename=raw,log.read-only=on,file.filename=raw3", "length", "write 0 4k"),
    (P, "read -P 2 0 64k", "write -P 3 1M 1M", "read -P 3 1M 1M", "write -z 2M 1M", "discard 0 64k", "map", "length", "truncate 8M", "length"),
    ("-r --image-opts " + P, "read -P 2 0 64k", "write 0 64k"),
    *[(P + o, "write -P 3 1M 1M", "read -P 3 1M 1M", "length") for o in (
        ",file.prealloc-size=1M", ",file.prealloc-size=0", ",file.prealloc-size=x", ",file.prealloc-size=-1", ",file.prealloc-align=0", ",file.prealloc-align=511", ",file.prealloc-align=1000",
        ",file.prealloc-align=512", ",file.prealloc-align=x", ",file.foo=1")],
    ("driver=preallocate,file.filename=raw", "read -P 7 64k 64k", "write -P 3 8k 4k", "write 4M 4k", "truncate 5M", "length", "write 4M 4k", "length"), ("driver=preallocate", "length"),
    ("driver=preallocate,file.filename=nothing", "length"),
]
CONFIGS = {"c1": '[inject-error]\nevent = "write_aio"\nerrno = "28"\nonce = "on"\n', "c2": '# two\n\n[set-state "a"]\nevent = "write_aio"\nstate = "1"\nnew_state = "2"\n'
           '[inject-error "b"]\n  event = "write_aio"\n  state = "2"\n', "bad1": "[inject-error]\nevent = write_aio\n", "bad2": 'event = "write_aio"\n', "bad3": '[foo]\nevent = "none"\n',
           "bad4": '[inject-error]\nevent = "write_aio"\nfoo = "x"', "bad5": '[inject-error]\n \nevent = "write_aio"', "empty": "", "log": ""}
GROUP = ["--object", "throttle-group,id=g,x-iops-total=2000"]
GRAPHS = [
    ("t", ["driver=file,node-name=f,filename=top.q", "driver=qcow2,node-name=q,file=f", "driver=throttle,node-name=t,throttle-group=g,file=q"],
     ("read -P 2 0 64k", "read -P 1 64k 64k")),
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=throttle,node-name=t,throttle-group=g,file=f", "driver=qcow2,node-name=q,file=t"],
     ("read -P 2 0 64k", "read -P 1 64k 64k")),
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=file,node-name=bf,filename=other.q,read-only=on", "driver=qcow2,node-name=b,file=bf,read-only=on",
           "driver=throttle,node-name=t,throttle-group=g,file=b,read-only=on", "driver=qcow2,node-name=q,file=f,backing=t"], ("read -P 2 0 64k", "read -P 3 64k 64k")),
    ("t", ["driver=file,node-name=f,filename=top.q", "driver=throttle,node-name=t,throttle-group=none,file=f"], ()),
    ("q", ["driver=file,node-name=f0,filename=raw", "driver=raw,node-name=r0,file=f0", "driver=file,node-name=f1,filename=four.q", "driver=qcow2,node-name=r1,file=f1",
           "driver=quorum,node-name=q,vote-threshold=2,children.0=r0,children.1=r1"], ("length", "read -P 7 64k 64k")),
    ("v", ["driver=file,node-name=f0,filename=raw", "driver=file,node-name=f1,filename=four.q", "driver=qcow2,node-name=r1,file=f1",
           "driver=blkverify,node-name=v,raw=f0,test=r1"], ("length", "read -P 7 64k 64k")),
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=blkdebug,node-name=d,image=f,align=4096", "driver=qcow2,node-name=q,file=d"], ("read -P 2 0 64k",)),
    ("l", ["driver=file,node-name=f,filename=top.q", "driver=file,node-name=d,filename=log", "driver=qcow2,node-name=q,file=f", "driver=blklogwrites,node-name=l,file=q,log=d"],
     ("read -P 2 0 64k",)),
    ("l", ["driver=file,node-name=f,filename=top.q", "driver=blklogwrites,node-name=l,file=f,log=nothing"], ()),
    ("q", ["driver=file,node-name=f,filename=top.q", "driver=preallocate,node-name=p,file=f,prealloc-size=1048576", "driver=qcow2,node-name=q,file=p"], ("read -P 2 0 64k",)),
    ("c", ["driver=file,node-name=f,filename=top.q", "driver=qcow2,node-name=q,file=f", "driver=copy-on-read,node-name=c,file=q"], ("read -P 1 64k 64k",)),
    ("c", ["driver=file,node-name=f,filename=top.q,read-only=on", "driver=qcow2,node-name=q,file=f,read-only=on", "driver=copy-on-read,node-name=c,file=q"], ()),
]
DRIVES = {
    True: ["file.driver=raw,file.file.filename=top.q,format=qcow2", "file=top.q,copy-on-read=on", "file=top.q,copy-on-read=on,readonly=on",
           Q + ",vote-threshold=2", "driver=copy-on-read,file.driver=qcow2,file.file.filename=top.q,cache=none,serial=x", "file=blkdebug:c1:top.q,format=qcow2",
           "file.driver=blkdebug,file.image.filename=top.q,format=qcow2", "driver=null-co,size=1M", "file=blkverify:raw4:four.q,format=raw",
           P + ",file.prealloc-size=1M", L + "file.driver=raw,file.file.filename=raw"],
    False: ["file.driver=throttle,file.throttle-group=none,file.file.filename=top.q,format=qcow2", "file=top.q,copy-on-read=maybe", Q + ",vote-threshold=5", "driver=copy-on-read,file=top.q", "driver=nonsense,file=top.q",
            "driver=copy-on-read,file.driver=qcow2,file.file.filename=top.q,readonly=on", "driver=null-co,size=1M,foo=1", P + ",file.prealloc-size=x",
            "driver=blklogwrites,file.filename=raw"],
}


def more_images(d):
    """An image 1 MiB into a file, and one in a disk that is an image itself."""
    g.run("qemu-img", "create", "-f", "raw", "inside", "1M", cwd=d)
    with open(os.path.join(d, "inside"), "ab") as f, open(os.path.join(d, "top.q"), "rb") as t:
        f.write(t.read())
    for name in ("raw3", "raw4"):
        shutil.copy(os.path.join(d, "raw"), os.path.join(d, name))
    g.run("qemu-io", "-f", "raw", "-c", "write -P 9 0 4k", "-c", "write -P 0 128k 64k", "raw3", cwd=d)
    g.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "raw", "four.q", cwd=d)
    for name, text in CONFIGS.items():
        with open(os.path.join(d, name), "w", encoding="utf-8") as f:
            f.write(text)
    for name, how, size in (("t3.q", "cluster_size=64k", None), ("old2.q", "compat=0.10", "4M"), ("small.q", "cluster_size=4k", "5001k"), ("sub.q", "extended_l2=on,cluster_size=128k", "4M"),
                            ("data2.q", "data_file=ext2", "4M"), ("zstd.q", "compression_type=zstd,cluster_size=2M", "4000k")):
        back = "top.q" if name == "t3.q" else "base.q"
        g.run("qemu-img", "create", "-f", "qcow2", "-b", back, "-F", "qcow2", "-o", how, name, *([size] if size else []), cwd=d)
    for name in ("old2.q", "small.q", "sub.q", "data2.q", "zstd.q"):
        g.run("qemu-io", "-c", "write -P 2 0 10k", name, cwd=d)
    g.run("qemu-img", "create", "-f", "qcow2", "nest.q", "16M", cwd=d)
    g.run("qemu-img", "create", "-f", "qcow2", "n.q", "4M", cwd=d)
    g.run("qemu-io", "-c", "write -P 4 0 256k", "n.q", cwd=d)
    g.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", "n.q", "nest.q", cwd=d)


def slow(tmp, io):
    """40 requests beyond the burst at 40 a second: the limit of a node below qcow2 holds."""
    d = os.path.join(tmp, "images")
    start = time.monotonic()
    r, out = g.run(io, "--object", "throttle-group,id=g,x-iops-total=40", *(w for n in range(44) for w in ("-c", f"read -P 7 {64 + n}k 512")), "--image-opts",
                   "driver=raw,file.driver=throttle,file.throttle-group=g,file.file.filename=raw", cwd=d)
    took = time.monotonic() - start
    if r or "failed" in out or took < 0.9:
        g.fail(f"44 reads at 40 a second took {took:.2f} s, status {r}: {out:.200}")


def main():
    io, lodge = (os.path.abspath(a) for a in sys.argv[1:3])
    if not shutil.which("qemu-io") or not shutil.which("qemu-img"):
        print("filter_test: skipped, qemu-io and qemu-img are not installed")
        return 77
    with tempfile.TemporaryDirectory() as tmp:
        os.mkdir(os.path.join(tmp, "images"))
        g.make(os.path.join(tmp, "images"))
        more_images(os.path.join(tmp, "images"))
        g.cases(tmp, io, THROTTLE + COR + BLKDEBUG + BREAKS + MIRRORS + COMPRESS + LOGS)
        g.graphs(tmp, lodge, GRAPHS, GROUP)
        g.drives(tmp, lodge, DRIVES)
        slow(tmp, io)
    print(f"filter_test: {len(THROTTLE + COR + BLKDEBUG + BREAKS + MIRRORS + COMPRESS + LOGS)} descriptions, {len(GRAPHS)} graphs, {g.bad} failures")
    return bool(g.bad)


if __name__ == "__main__":
    sys.exit(main())
