"""One image on one sheet: its map, and overlays of several methods, each on a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_lnstat.visualize.canvas import Bar, Likely, Row, distinguished, draw_rows, notes
from captum_lnstat.visualize.colors import DIVERGING, PLAIN, SEQUENTIAL, Look, Scale, colored, overlay

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Map, Picture

# Of so many pictures to a row those are taken that leave the fewest places empty.
_COLUMNS = (3, 4)
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


def draw_sheet(
    image: Picture, panels: Sequence[Panel], title: str, *, look: Look = PLAIN, photo: Picture | None = None,
    beside: Sequence[Likely] = (),
) -> Figure:  # fmt: skip
    """One sheet: image, map and overlay of the first panel, then the overlays of the others.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        panels: At least one.
        title: Shown above them all, on one line.
        look: How maps are laid over the image.
        photo: Shown in the place of the image, as from ``framed``.
        beside: As for ``draw_rows``.

    Returns:
        A figure that belongs to no pyplot state; ``write_sheet`` saves one.

    Raises:
        ValueError: No panel, or as for ``overlay``.
    """
    if not panels:
        raise ValueError("panels is empty; expected at least one")
    first = panels[0]
    scale = Scale.of([first.relevance], signed=first.signed)
    alone = f"{first.title}, map", colored(first.relevance, scale=scale, look=look), Bar.of(scale, look=look)
    return _sheet(image, panels, title, look, photo, beside, alone=[alone])


def draw_targets(
    image: Picture, panels: Sequence[Panel], title: str, *, look: Look = PLAIN, photo: Picture | None = None,
    beside: Sequence[Likely] = (),
) -> Figure:  # fmt: skip
    """One sheet: the image, then the overlays of several maps, such as those of several targets.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        panels: At least one.
        title: Shown above them all, on one line.
        look: How maps are laid over the image.
        photo: As for ``draw_sheet``.
        beside: As for ``draw_rows``.
    """
    return _sheet(image, panels, title, look, photo, beside)


_Cell = tuple[str, "Picture", Bar | None]


def _sheet(
    image: Picture, panels: Sequence[Panel], title: str, look: Look, photo: Picture | None, beside: Sequence[Likely],
    *, alone: Sequence[_Cell] = (),
) -> Figure:  # fmt: skip
    seen = ("image", image, None) if photo is None else ("image (frame: what the model saw)", photo, None)
    cells: list[_Cell] = [seen, *alone]
    for panel in panels:
        scale = Scale.of([panel.relevance], signed=panel.signed)
        drawn = overlay(image, panel.relevance, scale=scale, look=look)
        cells.append((panel.title, drawn, Bar.of(scale, look=look)))
    titles, pictures, bars = zip(*cells, strict=True)
    bars = distinguished(bars)
    columns = min(_COLUMNS, key=lambda count: -len(cells) % count)
    rows = [
        Row("", pictures[start:end], titles=titles[start:end], bars=bars[start:end])
        for start, end in ((start, start + columns) for start in range(0, len(cells), columns))
    ]
    signed = sorted({panel.signed for panel in panels})
    legends = [replace(BARS[each], colormap=look.colors(signed=each), signed=each) for each in signed]
    return draw_rows(rows, title, note=notes(bars, look), legends=legends, beside=beside)
