#!/usr/bin/env python3
"""Every device class and every chip has a fuzz target that exists: fuzz_targets_test.py LODGE MACHINE_FUZZ SOURCE BUILD"""
import glob
import json
import os
import re
import subprocess
import sys

LODGE, MACHINE_FUZZ, SOURCE, BUILD = sys.argv[1:]


def output(*argv):
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True).stdout


def read(path):
    with open(path) as f:
        return f.read()


table = {}
for line in read(os.path.join(SOURCE, "tests/fuzz_targets.txt")).splitlines():
    words = line.split()
    if words and words[0] != "#":
        table[words[0]] = words[1:]

with open(os.path.join(BUILD, "meson-info/intro-tests.json")) as f:
    tests = {t["name"] for t in json.load(f)}
classes = re.findall(r'^name "([^"]+)"', output(LODGE, "qemu", "-device", "help"), re.M)
chips = []
for path in glob.glob(os.path.join(SOURCE, "src/dev/*.h")):
    chips += re.findall(r"^\w[\w *]*?(\w+)_(?:create|init)\(struct", read(path), re.M)
bad = []
if len(classes) < 10 or len(chips) < 5:
    bad.append(f"only {len(classes)} classes and {len(chips)} chips were found: did the format of the help or the headers change?")
for name in classes + chips:
    if not table.get(name):
        bad.append(f"{name} has no fuzz target in tests/fuzz_targets.txt")
for name, targets in table.items():
    bad += [f"{name}: there is no test '{t}'" for t in targets if t not in tests]
driven = output(MACHINE_FUZZ, "--classes").split()
bad += [f"machine-fuzz does not drive {name}" for name in classes if name not in driven]
bad += [f"{name} is in the table and nowhere else" for name in table
        if name not in classes + chips + ["pci_bus", "msix", "irqchip"]]
print("\n".join(bad) if bad else f"{len(classes)} classes, {len(chips)} chips: each has a fuzz target")
sys.exit(1 if bad else 0)
