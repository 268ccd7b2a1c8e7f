#!/usr/bin/env python3
"""./bootstrap where something is wrong: a wrong word, no root, no network, no Debian. One clear line, a status, nothing installed.

The machine that it sees is made of stand-ins: a folder with what of the system it may find. bootstrap_test.py SOURCE
"""
import os
import shutil
import subprocess
import sys
import tempfile

SOURCE = sys.argv[1]
TOOLS = ["bash", "sed", "cut", "grep", "tail", "head", "cat", "rm", "mktemp", "readlink", "dirname", "awk"]
failures = 0


def check(what, argv, status, words, stand_ins=None, lines=1):
    """Run it with a PATH of TOOLS and `stand_ins` (name: script); its last line of errors has all `words`."""
    global failures
    with tempfile.TemporaryDirectory() as tmp:
        for tool in TOOLS:
            os.symlink(shutil.which(tool), os.path.join(tmp, tool))
        for name, script in (stand_ins or {}).items():
            path = os.path.join(tmp, name)
            with open(path, "w") as f:
                f.write(f"#!/bin/bash\n{script}\n")
            os.chmod(path, 0o755)
        env = {"PATH": tmp, "HOME": tmp, "TMPDIR": tmp, "LC_ALL": "C"}
        before = sorted(os.listdir(tmp))
        p = subprocess.run([os.path.join(SOURCE, "bootstrap"), *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           timeout=120, env=env)
        told = [l for l in p.stderr.splitlines() if not l.startswith("==>")]
        left = sorted(os.listdir(tmp)) != before
        ok = p.returncode == status and len(told) == lines and all(w in told[-1] for w in words) and not left
        if not ok:
            failures += 1
            print(f"FAIL {what}: status {p.returncode}, wanted {status} and {words}; left something: {left}; got:\n{p.stderr}")


MISSING = {"dpkg-query": "exit 1"}
ROOT = {**MISSING, "id": "echo 0"}
USER = {**MISSING, "id": "echo 1000", "sudo": "exit 1"}
check("an unknown command", ["frobnicate"], 2, ["frobnicate", "help"])
check("an unknown kind", ["build", "fast"], 1, ["fast", "asan"], ROOT)
check("an unknown kind of test", ["test", "asan", "fast"], 1, ["fast", "asan"], ROOT)
check("no root", ["build"], 1, ["no root rights", "apt-get install", "meson"], USER)
check("no network", ["build"], 1, ["apt-get update", "Could not resolve"],
      {**ROOT, "apt-get": "echo Err:1 http://mirror bookworm; echo E: Could not resolve 'mirror' >&2; exit 100"})
check("a package that is not there", ["build"], 1, ["apt-get install", "Unable to locate"],
      {**ROOT, "apt-get": "[ $1 = update ] && exit 0; echo E: Unable to locate package meson >&2; exit 100"})
# elsewhere: the list of what it needs, then what it did not find
with open(os.path.join(SOURCE, "packages.txt")) as f:
    needed = sum(line.split()[:1] == ["build"] for line in f)
check("another distribution", ["build"], 1, ["missing: gcc"], {}, lines=needed + 2)
print(f"{failures} failures")
sys.exit(1 if failures else 0)
