"""A test that waits for ever is ended, its stacks are shown, and the others run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HANGS = """
import ctypes, time

def test_before():
    pass

def test_that_hangs():
    ctypes.CDLL(None).pause()  # nothing that Python could interrupt

def test_after():
    pass
"""


def test_a_test_that_hangs_is_ended(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "setup.cfg"), "--rootdir", str(tmp_path), str(tmp_path)]
    command += ["-p", "no:cacheprovider", "-n", "1", "-o", "faulthandler_timeout=4", "--timeout", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout
    assert "test_that_hangs" in done.stdout
    assert "in test_that_hangs" in done.stderr
