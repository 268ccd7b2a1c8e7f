#!/usr/bin/env python3
"""
Threads, signals, mappings, fork, locks and code that changes, all at once in the busybox guest on two vCPUs (stress.c).

    stress_test.py LODGE STRESS [--seconds 600] [--cpus 2]

20 seconds in CI; ten minutes is the long run.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

import debian_test
import vm

ap = argparse.ArgumentParser()
ap.add_argument("lodge")
ap.add_argument("stress")
ap.add_argument("--seconds", type=int, default=20)
ap.add_argument("--cpus", type=int, default=2)
opts = ap.parse_args()


def stress(start):
    with tempfile.TemporaryDirectory() as tmp:
        disk = debian_test.disk_copy(tmp)
        subprocess.run(["/sbin/debugfs", "-w", "-R", f"write {opts.stress} stress", disk], check=True, capture_output=True)
        guest = start(*debian_test.args(disk, "--cpus", str(opts.cpus)), timeout=120 + 3 * opts.seconds)
        debian_test.shell(guest)
        guest.run("cp /mnt/stress /tmp/stress && chmod 755 /tmp/stress")
        out = guest.run(f"/tmp/stress {opts.seconds}")
        assert "stress ok:" in out, out
        print("  " + out.strip().splitlines()[-1])
        bad = [line for line in guest.run("dmesg").splitlines()
               if re.search(r"WARNING|BUG:|Call Trace|Oops|soft lockup|rcu:.*stall|unstable", line)]
        assert not bad, "\n".join(bad)
        debian_test.power_off(guest)


sys.argv = sys.argv[:2]
vm.main([stress])
