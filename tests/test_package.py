"""The package as it is imported and described: what comes in with it, and what its files say of each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import captum_lnstat

ROOT = Path(__file__).parent.parent
INIT = ROOT / "captum_lnstat" / "__init__.py"

# What only an extra brings, or a tool of a user's own. torchvision comes with timm, tqdm with Captum.
OPTIONAL = (
    "transformers", "gradio", "torchmetrics", "scipy", "sklearn", "pandas", "pyarrow", "h5py", "pycocotools", "quantus",
    "jaxtyping", "hypothesis", "pytest", "selenium", "sphinx", "IPython", "cv2", "skimage", "lightning", "tensorboard",
    "pytorch_lightning", "wandb",
)  # fmt: skip


def _python(code: str, *options: str) -> str:
    run = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_it_imports_nothing_else() -> None:
    heavy = ("torch", "timm", "captum", "matplotlib", "numpy", "PIL", "click")
    loaded = _python("import sys, captum_lnstat; print(*sys.modules)").split()
    assert "captum_lnstat" in loaded
    assert not set(heavy) & set(loaded)


def test_every_name_without_a_warning_and_without_what_is_optional() -> None:
    code = f"""
        import sys
        for name in {OPTIONAL!r}:
            sys.modules[name] = None  # "import name" raises an ImportError
        import captum_lnstat
        print(*(name for name in captum_lnstat.__all__ if getattr(captum_lnstat, name) is not None))
        import captum_lnstat.metrics, captum_lnstat.testing.family, captum_lnstat.visualize
        from captum_lnstat.training import MapCallback, log_maps
    """
    assert _python(code, "-W", "error").split() == captum_lnstat.__all__


def test_it_does_the_same_without_asserts() -> None:
    """``python -O`` runs no ``assert``: none may do what is needed later, or be an error that is promised."""
    code = """
        import torch
        from captum_lnstat import LNStatAttribution, zoo
        torch.manual_seed(0)
        image, maps = torch.randn(1, 3, 64, 64), []
        for name in zoo.names():
            model = zoo.load(name).model
            for rule in ("lnstat", "evidence", "rollout", "gradient"):
                method = LNStatAttribution(model, rule=rule)
                maps.append(float(method.relevance(image, target=1).double().std()))
        mean = lambda x: model.forward_features(x).mean((1, 2))  # a start that is found out by what is read
        maps.append(float(LNStatAttribution(mean, model).relevance(image).double().std()))
        try:
            LNStatAttribution(model).attribute(image)
        except AssertionError as error:
            print(error)
        print(*maps)
    """
    plain, without = _python(code), _python(code, "-O")
    assert plain == without
    assert plain.startswith("Target not provided when necessary")


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(INIT.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        for name in node.names:
            seen[name.asname or name.name] = node.module.removeprefix("captum_lnstat").removeprefix(".") or name.name
    assert seen == captum_lnstat._HOMES
    assert sorted([*seen, "__version__"]) == sorted(captum_lnstat.__all__)
    assert set(captum_lnstat.__all__) <= set(dir(captum_lnstat))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'captum_lnstat' has no attribute 'LNStat'"):
        _ = captum_lnstat.LNStat  # type: ignore[attr-defined]


def test_every_folder_of_modules_is_a_package() -> None:
    """Packages are found by their ``__init__.py``; a folder without one would be missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[tool.setuptools.packages.find]\ninclude = ["captum_lnstat*"]' in text
    for file in (ROOT / "captum_lnstat").rglob("*.py"):
        assert (file.parent / "__init__.py").is_file(), file


def test_version_and_licence_are_the_same_everywhere() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    fields = dict(re.findall(r"^([\w-]+): \"?([^\"\n]*)\"?$", text, re.M))
    assert fields["version"] == captum_lnstat.__version__
    assert f'license = "{fields["license"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(captum_lnstat.__version__)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)


def test_lower_bounds_are_the_versions_that_were_run() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[(.*?)\]", text, re.M | re.S)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests" / "versions" / "oldest.txt").read_text("utf-8"), re.M)
    )
    assert len(bounds) == len(listed.split(",")) - 1
    for name, bound in bounds.items():
        parts = [int(part) for part in bound.split(".")]
        run = [int(part) for part in pinned[name].split(".")]
        assert run[: len(parts)] == parts, f"{name}: {bound} in pyproject.toml, {pinned[name]} was run"
        assert not any(run[len(parts) :]), f"{name}: {pinned[name]} was run, {bound} was not"
