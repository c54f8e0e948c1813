"""Wheel and sdist: built, looked into, installed into an environment of their own, and imported there.

Run ``python tests/check_package.py`` where the package's dependencies, ``build`` and ``twine`` are installed. It is a
script and no test: building fetches setuptools, and what takes how long is for people to read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEEL_BYTES = 12_000_000
# What all public names may bring in beyond torch, timm and Captum, and in how many modules. A count: the seconds are
# printed for people, and are not the same twice on one machine.
LIBRARIES = {"PIL", "click", "matplotlib", "numpy", "safetensors"}
MODULES = 40

# What a stranger does first, with every warning an error, as in ``python -W error``.
FIRST_USE = """
import captum_lnstat
from captum_lnstat import zoo
for name in captum_lnstat.__all__:
    getattr(captum_lnstat, name)
scene = zoo.scenes()[0]
for name in zoo.names():
    print(captum_lnstat.explain(name, scene.image))
print(captum_lnstat.__file__)
"""

# One JSON line: of each step its CPU seconds and the modules that came in with it, but for the standard library's.
IMPORTS = """
import json, sys, time
steps = {}
def step(name, what):
    before, begin = set(sys.modules), time.process_time()
    what()
    seconds, new = time.process_time() - begin, set(sys.modules) - before
    steps[name] = seconds, sorted(one for one in new if one.partition(".")[0] not in sys.stdlib_module_names)
def every():
    for name in captum_lnstat.__all__:
        getattr(captum_lnstat, name)
step("torch and timm", lambda: (__import__("torch"), __import__("timm")))
step("captum_lnstat", lambda: __import__("captum_lnstat"))
import captum_lnstat
step("captum.attr", lambda: __import__("captum.attr"))
step("every public name, after captum.attr", every)
print(json.dumps(steps))
"""


def run(*command: str | Path, **options: object) -> str:
    # Not this tree: what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = tuple(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=600, **options)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """All files of the package that git knows, and nothing else."""
    known = set(run("git", "ls-files", "captum_lnstat", cwd=ROOT).split())
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    if inside != known:
        sys.exit(f"the wheel lacks {sorted(known - inside)} and has {sorted(inside - known)} besides")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {len(inside)} files, {size / 1e6:.1f} MB")
    if size > WHEEL_BYTES:
        sys.exit(f"the wheel is larger than {WHEEL_BYTES / 1e6:.0f} MB")


def check_source(source: Path) -> None:
    """Tests, their helpers, pages and scripts are in the source archive whole."""
    known = set(run("git", "ls-files", "captum_lnstat", "tests", "docs", "examples", cwd=ROOT).split())
    with tarfile.open(source) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    if not known <= inside:
        sys.exit(f"the source archive lacks {sorted(known - inside)}")
    print(f"{source.name}: {len(inside)} files, {source.stat().st_size / 1e6:.1f} MB")


def installed(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment with the wheel, and with the dependencies of the one that runs this."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A path file in a folder that is itself added by one is not read: no editable install of this package comes along.
    folders = [path for path in sys.path if path.endswith("site-packages")]
    Path(site, "dependencies.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return python


def check_imports(python: Path) -> None:
    """The public names bring in what they need and no more: no optional library, no half of a large one."""
    steps = json.loads(run(python, "-c", IMPORTS, cwd=python.parent))
    for step, (seconds, modules) in steps.items():
        print(f"import of {step}: {len(modules)} modules, {seconds:.2f} s of CPU time")
    *_, (_, modules) = steps.values()
    others = [name for name in modules if name.partition(".")[0] != "captum_lnstat"]
    strangers = {name.partition(".")[0] for name in others} - LIBRARIES
    if strangers or len(others) > MODULES:
        sys.exit(f"the public names bring in {len(others)} modules of others, {sorted(strangers)} too many: {others}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # The wheel is built from the sdist, so that the sdist is seen to be complete.
        run(sys.executable, "-m", "build", "-q", "--outdir", work / "dist", ROOT)
        (wheel,), (source,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
        check_contents(wheel)
        check_source(source)
        python = installed(wheel, work / "fresh")
        said = run(python, "-W", "error", "-c", FIRST_USE, cwd=work)
        if not said.splitlines()[-1].startswith(str(work.resolve())):
            sys.exit(f"the package was imported from {said.splitlines()[-1]}")
        print(said, end="")
        print(run(work / "fresh" / "bin" / "captum-lnstat", "--version", cwd=work), end="")
        check_imports(python)


if __name__ == "__main__":
    main()
