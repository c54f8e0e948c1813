"""The how-to's example runs as it stands, and is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from captum_lnstat.testing.family import check_layout, ground, planted_images, wake
from captum_lnstat.topology import base, find_topology

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(base, "_FAMILIES", list(base._FAMILIES))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def test_the_example_passes_the_kit(example, capsys):
    report = example["report"]
    assert report.description.family == "column"
    assert report.description.grid == (4, 6)
    assert report.placement["lnstat"].hits == report.placement["lnstat"].regions >= 9
    assert example["grid"].shape == (1, 4, 6)


def test_without_it_the_map_would_be_transposed_and_the_kit_says_so(example, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(base, "_FAMILIES", [family for family in base._FAMILIES if family.family != "column"])
    model = wake(example["ColumnViT"]())
    assert find_topology(model).family == "plain"
    place = ground(model, (32, 48))
    with pytest.raises(AssertionError, match="layout: a stimulus"):
        check_layout(model, *planted_images(place), place.regions)
