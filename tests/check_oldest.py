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
    "test_attribution.py",
    "test_baselines.py",
    "test_captum_page.py",
    "test_completeness.py",
    "test_feature_mask.py",
    "test_layer.py",
    "test_outputs.py",
    "test_readme.py",
    "test_recording.py",
    "test_statistics.py",
    "test_zoo.py",
    "families/test_swin.py",
)


def main() -> int:
    text = (TESTS / "oldest-requirements.txt").read_text(encoding="utf-8")
    for name, wanted in re.findall(r"^([\w-]+)==(\S+)$", text, re.M):
        if version(name).split("+")[0] != wanted:
            sys.exit(f"{name} is {version(name)}; expected {wanted}, as in tests/oldest-requirements.txt")
    command = [sys.executable, "-m", "pytest", "-o", "filterwarnings=", *sys.argv[1:]]
    return subprocess.run([*command, *(str(TESTS / name) for name in CORE)], check=False, cwd=TESTS.parent).returncode


if __name__ == "__main__":
    sys.exit(main())
