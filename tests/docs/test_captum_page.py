"""docs/captum.md: its code runs, and the tests that it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "captum.md").read_text(encoding="utf-8")


def test_the_snippets_run_in_order() -> None:
    mpl.use("Agg")
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert snippets
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "captum.md", "exec"), names)
    assert names["smooth"].shape == names["attribution"].shape == names["ablated"].shape == names["images"].shape
    assert torch.isfinite(torch.cat([names["unfaithful"], names["sensitive"]])).all()


def test_every_test_named_is_there() -> None:
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) >= 30
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not name or name in defined, f"{file} has no {name}"


def test_every_subject_has_a_row() -> None:
    rows = [int(number) for number in re.findall(r"^\| (\d+)\. .* \| .* \| .*test_.* \|$", PAGE, re.M)]
    assert rows == list(range(1, 20))


def test_private_helpers_are_imported_in_one_place() -> None:
    for file in (ROOT / "captum_lnstat").rglob("*.py"):
        imported = re.findall(r"^(?:from|import) (captum[.\w]*)", file.read_text(encoding="utf-8"), re.M)
        private = [name for name in imported if name.startswith("captum.") and "._" in name]
        assert not private or file.name == "forward.py", file
