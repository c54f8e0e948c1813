"""One image on one sheet: its map, and overlays of several methods, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_lnstat.visualize.colors import DIVERGING, SEQUENTIAL, colored, overlay, paint

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Map, Picture


@dataclass(frozen=True)
class Panel:
    """One method's map on a sheet.

    Attributes:
        title: A few words, shown above it.
        relevance: ``(height, width)``, as large as the image.
        signed: Whether negative values mean "against the target": diverging colours, zero in the middle.
    """

    title: str
    relevance: Map
    signed: bool = False


_PANEL, _GAP, _MARGIN = 2.9, 0.14, 0.2  # inches
_TITLE, _HEADLINE, _LEGEND = 0.28, 0.4, 0.5
_COLUMNS = 3
_INK, _FAINT = "#222222", "#666666"


def draw_sheet(image: Picture, panels: Sequence[Panel], title: str) -> Figure:
    """One sheet: image, map and overlay of the first panel, then the overlays of the others, three to a row.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        panels: At least one.
        title: Shown above them all, on one line.

    Returns:
        A figure that belongs to no pyplot state; ``write_sheet`` saves one.

    Raises:
        ValueError: No panel, or as for ``overlay``.
    """
    if not panels:
        raise ValueError("panels is empty; expected at least one")
    first = panels[0]
    cells: list[tuple[str, Any]] = [("image", image), (first.title, colored(first.relevance, signed=first.signed))]
    cells.append((f"{first.title}, overlay", overlay(image, first.relevance, signed=first.signed)))
    cells += [(panel.title, overlay(image, panel.relevance, signed=panel.signed)) for panel in panels[1:]]

    rows = -(-len(cells) // _COLUMNS)
    cell_height = _PANEL * image.shape[0] / image.shape[1]
    width = 2 * _MARGIN + _COLUMNS * _PANEL + (_COLUMNS - 1) * _GAP
    height = _HEADLINE + rows * (cell_height + _TITLE) + (rows - 1) * _GAP + _LEGEND
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    # Class names may hold a dollar sign, which is no mathematics.
    figure.text(
        0.5, 1 - 0.5 * _HEADLINE / height, title, ha="center", va="center", fontsize=11.5, color=_INK, parse_math=False
    )
    for place, (name, pixels) in enumerate(cells):
        row, column = divmod(place, _COLUMNS)
        left = _MARGIN + column * (_PANEL + _GAP)
        top = height - _HEADLINE - row * (cell_height + _TITLE + _GAP)
        box = (left / width, (top - _TITLE - cell_height) / height, _PANEL / width, cell_height / height)
        _draw_cell(figure, box, name, pixels)
    _draw_legends(figure, sorted({panel.signed for panel in panels}))
    return figure


def _draw_cell(figure: Figure, box: tuple[float, float, float, float], name: str, pixels: Picture) -> None:
    axes = figure.add_axes(box)
    # Smooth where a pixel would show as a block; resampled with care where it would not.
    small = max(pixels.shape[:2]) < _PANEL * figure.dpi
    axes.imshow(pixels, interpolation="bicubic" if small else "antialiased", aspect="auto")
    axes.set_title(name, fontsize=10, color=_INK, pad=4, parse_math=False)
    axes.set_axis_off()


def _draw_legends(figure: Figure, kinds: Sequence[bool]) -> None:
    """What the colours mean, below the panels: one bar for each kind of map on the sheet."""
    width, height = figure.get_size_inches()
    for place, signed in enumerate(kinds):
        middle = (place + 0.5) / len(kinds)
        bar = figure.add_axes((middle - 0.7 / width, 0.2 / height, 1.4 / width, 0.12 / height))
        bar.imshow(
            paint(np.linspace(-1.0 if signed else 0.0, 1.0, 256)[None], DIVERGING if signed else SEQUENTIAL),
            aspect="auto",
        )
        bar.set_axis_off()
        ends = ("against the target", "for the target") if signed else ("least relevant", "most relevant")
        for x, end, side in zip((-0.04, 1.04), ends, ("right", "left"), strict=True):
            bar.text(x, 0.5, end, transform=bar.transAxes, ha=side, va="center", fontsize=9, color=_FAINT)
