"""The README's test command while other programs keep the machine busy: green, every time, in bounded time.

    python tests/check_busy.py                                         three runs beside four busy processes
    python tests/check_busy.py --runs 1 --busy 2 tests/rules -k flops  what is passed on goes to pytest

Run it in the environment that the README's lines above that command make.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Ends by itself, should nobody be left to end it.
BUSY = (
    "import sys, time; end = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: sum(range(100_000))"
)


def test_command() -> list[str]:
    """The last line of the README's commands that install the package and run its tests."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return shlex.split(next(line for block in blocks for line in block.splitlines() if line.startswith("pytest")))


@contextlib.contextmanager
def busy(count: int, seconds: float) -> Iterator[None]:
    """So many processes that compute, at the priority of the tests."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY, str(seconds)]) for _ in range(count)]
    try:
        yield
        ended = [process.pid for process in processes if process.poll() is not None]
        assert not ended, "a busy process has ended before the tests"
    finally:
        for process in processes:
            process.kill()
            process.wait(60)


def run(command: list[str], seconds: float) -> str | None:
    """Run it; what is wrong with how it ended, if anything is."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds / 60:.0f} minutes"
    finally:
        with contextlib.suppress(ProcessLookupError):  # its own processes too, should it have left any
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    return None if code == 0 else f"exit code {code}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=4, help="processes that compute beside it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=25, help="that no run may exceed")
    given, more = parser.parse_known_args()
    seconds, lines = given.minutes * 60, []
    for number in range(1, given.runs + 1):
        begin = time.monotonic()
        with busy(given.busy, seconds + 600):
            wrong = run([*test_command(), *more], seconds)
        taken = time.monotonic() - begin
        lines.append(f"run {number}: {wrong or 'green'} in {taken // 60:.0f} min {taken % 60:.0f} s")
        print(f"== {lines[-1]}, beside {given.busy} busy processes", flush=True)
    print(*lines, sep="\n")
    if not all(": green" in line for line in lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
