"""Figures that other tests of the process left open are none of these tests' business."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def no_figures() -> None:
    """None is open when a test begins."""
    plt.close("all")
