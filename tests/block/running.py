"""Running a command, for tests of the tools."""
import resource
import subprocess


def run(*argv, ok=(0,), limit=None, timeout=300):
    """What it says, both streams. A status that is not one of `ok` ends the test; files may not become longer than `limit` bytes."""
    def limits():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    p = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, preexec_fn=limits if limit else None, check=False)
    if p.returncode not in ok:
        raise SystemExit(f"FAIL {' '.join(argv)}: status {p.returncode}\n{p.stdout[-800:]}{p.stderr[-800:]}")
    return p.stdout + p.stderr
