"""The core of the suite, on the versions of ``tests/oldest-requirements.txt``; with any others it says so and stops.

A script and no test, since it needs an environment of its own. Warnings are no errors in it: old versions of other
libraries warn about newer ones of a third.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent
CORE = (
    "test_readme.py",
    "test_captum_page.py",
    "test_zoo.py",
    "test_feature_mask.py",
    "test_statistics.py",
    "test_recording.py",
)
# What timm 1.0.17's Swins (padding, windows a stage, dynamic sizes) and torch 2.4.1 (grouped queries, rows that may see
# nothing) do not have themselves.
NOT_THERE = (
    "swin2-padded",
    "windows-per-stage",
    "dynamic",
    "always-partition",
    "swin2-resized",
    "grouped_queries",
    "blind",
)


def main() -> int:
    text = (TESTS / "oldest-requirements.txt").read_text(encoding="utf-8")
    for name, wanted in re.findall(r"^([\w-]+)==(\S+)$", text, re.M):
        if version(name).split("+")[0] != wanted:
            sys.exit(f"{name} is {version(name)}; expected {wanted}, as in tests/oldest-requirements.txt")
    command = [sys.executable, "-m", "pytest", "-o", "filterwarnings=", "-k", f"not ({' or '.join(NOT_THERE)})"]
    return subprocess.run(
        [*command, *sys.argv[1:], *(str(TESTS / name) for name in CORE)], check=False, cwd=TESTS.parent
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
