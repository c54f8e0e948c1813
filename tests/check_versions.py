"""The suite on the newest versions, on those that a plain install resolves, and on the oldest that are promised.

    python tests/check_versions.py                         all of it on all three
    python tests/check_versions.py newest oldest --quick   what hangs most on versions, on two of them

Each has an environment of its own, with what ``tests/versions/NAME.txt`` pins; it is made if it is not there yet. With
``--prepare`` nothing is run. A script and no test, for Python 3.11 or later: it downloads some gigabytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
VERSIONS = ROOT / "tests" / "versions"
QUICK = (
    "recording/test_recording.py",
    "recording/test_writing_in_place.py",
    "recording/test_statistics.py",
    "attribution/test_compiled.py",
    "rules/test_flops.py",
    "docs/test_readme.py",
)
# On torch 2.6 the scores of a pooling head differ by rounding (1e-15 in float64) when the graph is kept.
OTHERWISE_ON_THE_OLDEST = "bit_identical and vit-map"
# Seconds. An installation downloads torch and the libraries of a GPU.
INSTALLATION, SUITE = 3600, 5400


def requirements(name: str) -> list[str]:
    """What pip is asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = ["-r", str(VERSIONS / f"{name}.txt")]
    return [*pinned, *project["dependencies"], *project["optional-dependencies"]["test"]]


def environment(name: str, folder: Path) -> Path:
    """The Python of an environment with these versions."""
    home, asked = folder / name, "\n".join([*requirements(name), (VERSIONS / f"{name}.txt").read_text("utf-8")])
    python, ready = home / "bin" / "python", home / "asked-for.txt"
    if ready.is_file() and ready.read_text(encoding="utf-8") == asked:
        return python
    print(f"{name}: making {home}", flush=True)
    venv.create(home, clear=True, with_pip=True)
    variables = dict(os.environ)
    if name != "plain":
        variables["PIP_CONSTRAINT"] = os.devnull  # what is pinned here is not for the machine to hold back
    command = [str(python), "-m", "pip", "install", "-q", *requirements(name)]
    subprocess.run(command, check=True, env=variables, timeout=INSTALLATION)
    ready.write_text(asked, encoding="utf-8")
    return python


def check(name: str, python: Path, quick: bool, more: list[str]) -> bool:
    """Whether the suite is green."""
    show = (
        "import torch, torchvision, timm, captum as c; print(*(m.__version__ for m in (torch, torchvision, timm, c)))"
    )
    versions = subprocess.run([str(python), "-c", show], check=True, capture_output=True, text=True, timeout=600).stdout
    print(f"== {name}: torch, torchvision, timm, captum {versions}", end="", flush=True)
    command = [str(python), "-m", "pytest", *more]
    if name == "oldest":  # old versions of some libraries warn about newer ones of others
        command += ["-o", "filterwarnings=", "-k", f"not ({OTHERWISE_ON_THE_OLDEST})"]
    if quick:
        command += [str(ROOT / "tests" / file) for file in QUICK]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, cwd=ROOT, env=variables, timeout=SUITE).returncode == 0


def main() -> None:
    every = sorted(file.stem for file in VERSIONS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--quick", action="store_true", help="run a part of the suite")
    parser.add_argument("--prepare", action="store_true", help="make the environments, and run nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="where the environments are")
    given, more = parser.parse_known_args()
    unknown = [name for name in given.names if name not in every]
    if unknown:
        parser.error(f"unknown versions {unknown[0]!r}; expected some of {', '.join(every)}")
    pythons = {name: environment(name, given.folder.resolve()) for name in given.names}
    failed = [] if given.prepare else [n for n, python in pythons.items() if not check(n, python, given.quick, more)]
    if failed:
        sys.exit(f"the suite fails on {', '.join(failed)}")


if __name__ == "__main__":
    main()
