"""Waiting for a server, for tests that may not connect to find out: some serve one client and end."""
import time


def sockets(path):
    """Sockets of this name: (those that listen, connections that were accepted)."""
    listen = accepted = 0
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as f:
        for line in f:
            w = line.split(None, 7)
            if len(w) == 8 and w[7].rstrip("\n") == path:
                listen += int(w[3], 16) >> 16 & 1
                accepted += not int(w[3], 16) >> 16 & 1
    return listen, accepted


def wait_until(what, seconds=60):
    """Until what() is true: False when that takes longer than any machine should."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def wait_listening(path, process):
    """The name is there a moment before the socket listens. False: the process ended, or does not come to it."""
    return wait_until(lambda: sockets(path)[0] or process.poll() is not None) and bool(sockets(path)[0])
