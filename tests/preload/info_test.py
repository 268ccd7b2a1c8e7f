"""`lodge kvm-info` in words and as JSON, and what `lodge kvm-run` says to those it cannot serve. usage: info_test.py LODGE"""
import json
import os
import shutil
import subprocess
import sys
import tempfile

lodge = sys.argv[1]


def run(*argv, **more):
    return subprocess.run([lodge, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=100, check=False, **more)


def info():
    words = run("kvm-info")
    assert words.returncode == 0 and words.stdout.startswith("/dev/kvm: "), words
    for title in ("limits:", "capabilities:", "absent:", "CPU features:"):
        assert title in words.stdout, words.stdout
    got = json.loads(run("kvm-info", "--json").stdout)
    device, soft = got["dev-kvm"], got["softkvm"]
    assert device["state"] in ("absent", "no permission", "unusable", "hardware", "software-emulated")
    assert device["state"] in words.stdout.splitlines()[0], words.stdout
    assert os.path.exists("/dev/kvm") or device["state"] == "absent"
    assert ("reason" in device) == (device["state"] == "unusable")
    assert ("instructions-per-second" in device) == (device["state"] not in ("absent", "no permission")) or device["state"] == "unusable"
    assert soft["api-version"] == 12 and soft["instructions-per-second"] > 1000000
    assert soft["capabilities"]["IRQCHIP"] is True and soft["capabilities"]["DIRTY_LOG_RING"] == 1 << 20
    assert "X86_SMM" in soft["absent"] and "lm" in soft["cpu-features"]
    assert run("kvm-info", "--xml").returncode == 2


def refusals():
    for argv, status, text in ((["--", "no-such-program"], 127, "not found"), ([], 2, "Usage"), (["--frob"], 2, "frob")):
        r = run("kvm-run", *argv)
        assert r.returncode == status and text in r.stderr, (argv, r)
    assert "COMMAND" in run("kvm-run", "--help").stdout
    with tempfile.TemporaryDirectory() as tmp:
        script = os.path.join(tmp, "script")
        with open(script, "w", encoding="ascii") as f:
            f.write("#!/bin/sh\nexit 7\n")
        r = run("kvm-run", "--", script)
        assert r.returncode == 126 and "execute" in r.stderr.lower() or "permission" in r.stderr.lower(), r
        os.chmod(script, 0o755)
        assert run("kvm-run", "--", script).returncode == 7
        alone = os.path.join(tmp, "lodge")
        shutil.copy(lodge, alone)
        r = subprocess.run([alone, "kvm-run", "--", "true"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert r.returncode == 0 or "libsoftkvm-preload.so" in r.stderr, r
        static = os.path.join(tmp, "static")
        if subprocess.run(["cc", "-static", "-o", static, "-x", "c", "-"], input="int main(void) { return 0; }", text=True, check=False).returncode == 0:
            r = run("kvm-run", "--", static)
            assert r.returncode not in (0, -11) and "static" in r.stderr, r
            with open(script, "w", encoding="ascii") as f:
                f.write(f"#!{static}\n")
            r = run("kvm-run", "--", script)
            assert r.returncode == 126 and "static" in r.stderr, r
        if os.geteuid() == 0:
            return          # a set-user-id program of root's gives root nothing
        privileged = os.path.join(tmp, "privileged")
        shutil.copy("/bin/true", privileged)
        os.chmod(privileged, 0o4755)
        r = run("kvm-run", "--", privileged)
        assert r.returncode != 0 and "set-user" in r.stderr, r


info()
refusals()
