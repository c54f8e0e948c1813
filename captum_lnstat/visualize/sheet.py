"""One image on one sheet: its map, and overlays of several methods, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_lnstat.visualize.canvas import Bar, Row, draw_rows
from captum_lnstat.visualize.colors import DIVERGING, GREY, SEQUENTIAL, Look, Scale, colored, overlay

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


def draw_sheet(image: Picture, panels: Sequence[Panel], title: str, *, look: Look = GREY) -> Figure:
    """One sheet: image, map and overlay of the first panel, then the overlays of the others, three to a row.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        panels: At least one.
        title: Shown above them all, on one line.
        look: How maps are laid over the image.

    Returns:
        A figure that belongs to no pyplot state; ``write_sheet`` saves one.

    Raises:
        ValueError: No panel, or as for ``overlay``.
    """
    if not panels:
        raise ValueError("panels is empty; expected at least one")
    scales = [Scale.of([panel.relevance], signed=panel.signed) for panel in panels]
    first = panels[0]
    cells: list[tuple[str, Picture, Bar | None]] = [("image", image, None)]
    own = Bar.of(scales[0], look=look)
    cells.append((first.title, colored(first.relevance, scale=scales[0], look=look), own))
    cells.append((f"{first.title}, overlay", overlay(image, first.relevance, scale=scales[0], look=look), own))
    cells += [
        (panel.title, overlay(image, panel.relevance, scale=scale, look=look), Bar.of(scale, look=look))
        for panel, scale in zip(panels[1:], scales[1:], strict=True)
    ]
    return _sheet(cells, title, {panel.signed for panel in panels}, look)


def draw_targets(image: Picture, panels: Sequence[Panel], title: str, *, look: Look = GREY) -> Figure:
    """One sheet: the image, then the overlays of several maps, such as those of several targets.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        panels: At least one.
        title: Shown above them all, on one line.
        look: How maps are laid over the image.
    """
    scales = [Scale.of([panel.relevance], signed=panel.signed) for panel in panels]
    cells: list[tuple[str, Picture, Bar | None]] = [("image", image, None)]
    cells += [
        (panel.title, overlay(image, panel.relevance, scale=scale, look=look), Bar.of(scale, look=look))
        for panel, scale in zip(panels, scales, strict=True)
    ]
    return _sheet(cells, title, {panel.signed for panel in panels}, look)


def _sheet(cells: Sequence[tuple[str, Picture, Bar | None]], title: str, signed: set[bool], look: Look) -> Figure:
    rows = []
    for start in range(0, len(cells), _COLUMNS):
        titles, pictures, bars = zip(*cells[start : start + _COLUMNS], strict=True)
        rows.append(Row("", pictures, titles=titles, bars=bars))
    legends = [replace(BARS[each], colormap=look.colors(signed=each), signed=each) for each in sorted(signed)]
    return draw_rows(rows, title, note=legends)
