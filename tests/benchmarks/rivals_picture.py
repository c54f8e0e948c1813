"""The picture of ``rivals.py``: quality against cost, a panel a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from real_subjects import title
from rivals_cost import Costs

from captum_lnstat.visualize.writing import write_figure

OURS = ("lnstat", "lnstat-contrastive", "evidence", "rollout", "gradient")
BLIND = ("random", "centre")
SLOW = 15  # forward passes from which labels are beside their points, for there is room


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as needs be to be a gap apart.

    >>> apart([0.0, 0.0, 1.0], 0.5)
    [-0.25, 0.25, 1.0]
    """
    up, down = list(heights), list(heights)
    for place in range(1, len(up)):
        up[place] = max(up[place], up[place - 1] + gap)
        down[-1 - place] = min(down[-1 - place], down[-place] - gap)
    return [(one + other) / 2 for one, other in zip(up, down, strict=True)]


def draw(pages: dict[str, tuple[dict[str, float], Costs, set[str]]], path: Path) -> None:
    """Quality against cost, a panel a model."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    across = min(len(pages), 3)
    down = -(-len(pages) // across)
    sheet, axes = plt.subplots(down, across, figsize=(5.4 * across, 6 * down), sharey=True, squeeze=False)
    for axis in axes.flat[len(pages) :]:
        axis.set_visible(False)
    for axis, (model, (total, costs, few)) in zip(axes.flat, pages.items(), strict=False):
        rows = sorted((m for m in total if m not in BLIND and m in costs), key=lambda m: total[m])
        cheap = [method for method in rows if (costs[method]["passes"] or 0) < SLOW]
        beside = 1.5 * max([2.7, *(costs[method]["passes"] or 0 for method in cheap)])
        heights = dict(zip(cheap, apart([total[method] for method in cheap], 0.042), strict=True))
        for method in rows:
            x, y = costs[method]["passes"] or 0.0, total[method]
            colour = "#c0392b" if method in OURS else "#34495e"
            axis.scatter(x, y, s=40, color="white" if method in few else colour, edgecolor=colour, zorder=3)
            label = (beside, heights[method]) if method in heights else (x * 1.12, y)
            axis.annotate(
                method, (x, y), label, va="center", fontsize=8, color=colour,
                weight="bold" if method in OURS else "normal",
                arrowprops={"arrowstyle": "-", "color": "#bdc3c7", "linewidth": 0.6} if method in heights else None,
            )  # fmt: skip
        for height, name in ((total.get("centre"), "a Gaussian in the centre"), (0.0, "a random map")):
            if height is not None:
                axis.axhline(height, color="#95a5a6", linestyle="--", linewidth=1)
                axis.text(0.99, height + 0.01, name, ha="right", fontsize=8, color="#7f8c8d",
                          transform=axis.get_yaxis_transform())  # fmt: skip
        axis.set_xscale("log")
        axis.set_ylim(min(-0.1, *total.values()) - 0.05, 1.12)
        axis.set_xlim(0.85, max(600, 3 * max(costs[m]["passes"] or 1 for m in rows)))
        axis.set_xlabel("cost: forward passes")
        axis.set_title(title(model), fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("quality: 0 a random map, 1 the best row in every column")
    sheet.suptitle(
        "Up is better, left is cheaper. Red: this package's rules; hollow: on fewer photographs", fontsize=11
    )
    sheet.tight_layout()
    write_figure(path, sheet)
    plt.close(sheet)
