"""One image on one sheet: its map, and overlays of several methods, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_lnstat.visualize.canvas import Bar, Row, draw_rows
from captum_lnstat.visualize.colors import DIVERGING, SEQUENTIAL, colored, overlay

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Map, Picture

_COLUMNS = 3
BARS = {
    False: Bar(SEQUENTIAL, "least relevant", "most relevant"),
    True: Bar(DIVERGING, "against the target", "for the target"),
}


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
    cells = [("image", image), (first.title, colored(first.relevance, signed=first.signed))]
    cells.append((f"{first.title}, overlay", overlay(image, first.relevance, signed=first.signed)))
    cells += [(panel.title, overlay(image, panel.relevance, signed=panel.signed)) for panel in panels[1:]]
    rows = []
    for start in range(0, len(cells), _COLUMNS):
        titles, pictures = zip(*cells[start : start + _COLUMNS], strict=True)
        rows.append(Row("", pictures, titles=titles))
    return draw_rows(rows, title, note=[BARS[signed] for signed in sorted({panel.signed for panel in panels})])
