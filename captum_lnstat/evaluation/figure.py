"""The figure of a run: one panel a number, one line a method, its value and its interval."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_lnstat.evaluation.summary import FEW, NOTHING
from captum_lnstat.visualize.canvas import DPI, FAINT, INK, axes_at, write

_FIRST, _OTHER, _RULE = "#b3400e", "#33506b", "#dddddd"
_COLUMNS, _WIDE, _LINE, _HEAD = 4, 2.4, 0.24, 0.62


def draw(summary: dict[str, Any], title: str) -> Figure:
    """Value and 95 % interval of every method, in the order in which they were given; the first one in red.

    Args:
        summary: Of ``captum_lnstat.evaluation.summary.summarize``.
        title: One line above it.
    """
    methods = summary["methods"]
    names = list(dict.fromkeys(name for method in methods.values() for name in method["metrics"]))
    columns = min(_COLUMNS, max(1, len(names)))
    rows = -(-max(1, len(names)) // columns)
    label = min(3.2, 0.4 + 0.085 * max(map(len, methods)))
    panel = _LINE * len(methods) + _HEAD
    width, height = label + columns * _WIDE + 0.3, 0.75 + rows * (panel + 0.25)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    write(figure, 0.3, height - 0.25, title, 10.5, ha="left")
    for place, name in enumerate(names):
        row, column = divmod(place, columns)
        top = height - 0.55 - row * (panel + 0.25) - 0.3
        tall = _LINE * len(methods)
        axes = axes_at(figure, label + column * _WIDE + 0.15, top - tall, _WIDE - 0.35, tall)
        _panel(axes, name, methods, labelled=column == 0)
    note = f"bars: 95 % bootstrap interval over images; none of fewer than {FEW} values" if names else NOTHING
    write(figure, 0.3, 0.14, note, 8, ha="left", color=FAINT)
    return figure


def _panel(axes: Axes, name: str, methods: dict[str, Any], *, labelled: bool) -> None:
    axes.set_axis_on()
    shown = [
        (line, method["metrics"][name]) for line, method in enumerate(methods.values()) if name in method["metrics"]
    ]
    for line, entry in shown:
        colour, (low, high) = (_FIRST if line == 0 else _OTHER), entry["interval"]
        if entry["n"] >= FEW:
            axes.plot([low, high], [line, line], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([entry["value"]], [line], "o", color=colour, markersize=4.5)
    if shown and shown[0][0] == 0:
        axes.axvline(shown[0][1]["value"], color=_FIRST, linewidth=0.6, alpha=0.5, zorder=0)
    higher = shown[0][1]["higher_is_better"]
    arrow = "" if higher is None else "  (higher is better)" if higher else "  (lower is better)"
    axes.set_title(name, fontsize=9.5, color=INK, loc="left", pad=10, parse_math=False)
    axes.text(0, 1, arrow.strip(), transform=axes.transAxes, fontsize=7, color=FAINT, va="bottom")
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_yticks(range(len(methods)), list(methods) if labelled else [""] * len(methods))
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=2, labelsize=7.5, labelcolor=FAINT, color=_RULE)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color=_RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)


def png(summary: dict[str, Any], title: str) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    draw(summary, title).savefig(buffer, format="png")
    return buffer.getvalue()
