"""A Lodge process with its serial console on pipes: send lines, wait for text, collect the exit status."""
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time


class Timeout(Exception):
    pass


def die_with_parent():
    """In the child: a killed test takes its machine with it (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Vm:
    def __init__(self, argv, timeout=300, env=None):
        self.deadline = time.monotonic() + timeout
        self.proc = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, env=env, preexec_fn=die_with_parent)
        self.sel = selectors.DefaultSelector()
        self.sel.register(self.proc.stdout, selectors.EVENT_READ)
        os.set_blocking(self.proc.stdout.fileno(), False)
        self.log = ""
        self.pos = 0

    def _read(self):
        """One piece of output; False at its end."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Timeout()
        if self.sel.select(min(left, 1.0)):
            data = os.read(self.proc.stdout.fileno(), 65536)
            if not data:
                return False
            self.log += data.decode("utf-8", "replace").replace("\r", "")
        return True

    def expect(self, pattern):
        """Wait until `pattern` appears behind what was matched before; the match."""
        rx = re.compile(pattern)
        while True:
            match = rx.search(self.log, self.pos)
            if match:
                self.pos = match.end()
                return match
            try:
                if not self._read():
                    raise AssertionError(f"output ended before {pattern!r}")
            except Timeout:
                raise AssertionError(f"timeout waiting for {pattern!r}") from None

    def send(self, text):
        self.proc.stdin.write(text.encode())
        self.proc.stdin.flush()

    def run(self, command):
        """A command in the guest's shell, which must not echo: its output. Fails when its status is not 0."""
        begin = self.pos
        self.send(f"{command}; echo [status:$?]\n")
        match = self.expect(r"\[status:(\d+)\]\n")
        out = self.log[begin:match.start()]
        assert match.group(1) == "0", f"{command!r} ended with status {match.group(1)}:\n{out}"
        return out

    def wait(self):
        """The exit status, once the output has ended."""
        try:
            while self._read():
                pass
        except Timeout:
            raise AssertionError("timeout waiting for the end") from None
        return self.proc.wait(timeout=10)

    def kill(self):
        if self.proc.poll() is None:
            self.proc.kill()
            self.proc.wait()


def guest_dir():
    """Where tools/guest put the Debian guest; exits with 77 (skip) when it is not there."""
    top = os.environ.get("LODGE_SOURCE", ".")
    path = os.path.join(top, "build", "guest")
    if not os.path.exists(os.path.join(path, "vmlinuz")):
        print("no guest: run './bootstrap guest' first")
        sys.exit(77)
    return path


def main(tests):
    """Run the functions named on the command line (default: all); print the guest's output of one that fails."""
    lodge, names = sys.argv[1], sys.argv[2:]
    failed = 0
    for test in tests:
        if names and test.__name__ not in names:
            continue
        vms = []

        def start(*args, timeout=300, vms=vms):
            vms.append(Vm([lodge, *args], timeout))
            return vms[-1]

        begin = time.monotonic()
        try:
            test(start)
            print(f"ok   {test.__name__} {time.monotonic() - begin:.1f} s")
        except AssertionError as err:
            failed += 1
            print(f"FAIL {test.__name__}: {err}")
            for vm in vms:
                print(vm.log[-6000:])
        finally:
            for vm in vms:
                vm.kill()
    sys.exit(1 if failed else 0)
