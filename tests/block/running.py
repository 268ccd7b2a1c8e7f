"""Running a command, and where, for tests of the tools."""
import contextlib
import os
import resource
import shutil
import subprocess
import tempfile


@contextlib.contextmanager
def scratch(name, where):
    """In a directory of its own below `where`, which goes away with all that is in it."""
    top = tempfile.mkdtemp(prefix=name, dir=where)
    os.chdir(top)
    try:
        yield
    finally:
        os.chdir("/")
        shutil.rmtree(top, ignore_errors=True)


def run(*argv, ok=(0,), limit=None, timeout=300):
    """What it says, both streams. A status that is not one of `ok` ends the test; files may not become longer than `limit` bytes."""
    def limits():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    p = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, preexec_fn=limits if limit else None, check=False)
    if p.returncode not in ok:
        raise SystemExit(f"FAIL {' '.join(argv)}: status {p.returncode}\n{p.stdout[-800:]}{p.stderr[-800:]}")
    return p.stdout + p.stderr
