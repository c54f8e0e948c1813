"""The page of costs: every method that was measured is on it and in its picture, and nothing covers the bars."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_chart_shows_every_method_and_its_legend_covers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    cost = importlib.import_module("cost")
    record = json.loads(cost.RECORD.read_text())
    figure = cost.methods_chart(record)
    figure.canvas.draw()
    (axes,), (legend,) = figure.axes, figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"torchcam GradCAM", "Captum LayerGradCam", "LNStatAttribution, lnstat"} <= set(shown)
    page = cost.PAGE.read_text()
    assert all(f"| {name} |" in page for name in shown)
    assert all(line in page for line in cost._others_as_cheap(record["time"]))
