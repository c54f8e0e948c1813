"""The link to the repository is to where the clone came from, and to nowhere if that is not on the web."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("_repository", DOCS / "_repository.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://code.example/people/captum-lnstat.git", "https://code.example/people/captum-lnstat"),
        ("https://user:secret@code.example:8443/p/c.git", "https://code.example:8443/p/c"),
        ("/a/folder/captum-lnstat", None),
        ("git@code.example:people/captum-lnstat.git", None),
        (None, None),
    ],
)
def test_the_address_is_that_of_the_clone(origin: str | None, address: str | None, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=60)
    if origin is not None:
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", origin], check=True, timeout=60)
    assert _module().address(tmp_path) == address


def test_a_folder_that_is_no_clone_has_none(tmp_path: Path) -> None:
    assert _module().address(tmp_path / "missing") is None
