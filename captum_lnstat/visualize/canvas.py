"""Rows of pictures with words to their left, above and below, and bars to their right: what all larger sheets are."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_lnstat.visualize.colors import DIVERGING, PLAIN, Look, Scale, paint

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Picture

DPI = 120
INK, FAINT, RULE = "#222222", "#666666", "#e4e4e4"
# The name of a class, its probability in words and as a number.
Likely = tuple[str, str, float]
# Inches. Cells shrink until they fit the width of a page, then the sheet becomes wider.
_PAGE, _LARGEST, _SMALLEST, _GAP = 12.0, 2.9, 1.05, 0.08
_LABEL, _BAR, _LINE, _HEAD, _FOOT, _MARGIN = 1.5, 0.95, 0.16, 0.45, 0.32, 0.12
# Behind the numbers of scales that are not one, and what it means.
DIFFERS = "\N{NOT EQUAL TO}"
DIFFER = f"{DIFFERS} scales differ: the same colour is not the same relevance"
# To the right of all: the likeliest classes.
_CLASSES = 2.3
# Below a cell that has a bar of its own.
_UNDER, _TITLE_LINE = 0.22, 0.2
# Characters that fit on an inch of the two sizes of text.
_LETTERS, _SMALL_LETTERS = 13, 15


@dataclass(frozen=True)
class Bar:
    """What the colours of a row mean.

    Attributes:
        colormap: Its name in matplotlib.
        low: What is written at the lower end.
        high: What is written at the upper end.
        middle: What is written between them.
        signed: Whether zero is in its middle; by default it is for the diverging colours.
    """

    colormap: str
    low: str
    high: str
    middle: str = ""
    signed: bool | None = None

    @property
    def ramp(self) -> Picture:
        """Its colours from the lower end to the upper one, one row."""
        signed = self.colormap == DIVERGING if self.signed is None else self.signed
        return paint(np.linspace(-1.0 if signed else 0.0, 1.0, 256)[None], self.colormap, signed=signed)

    @classmethod
    def of(cls, scale: Scale | None, *, signed: bool = False, look: Look = PLAIN) -> Bar:
        """The bar of a scale, with its numbers; without a scale, of maps that each have their own."""
        colormap = look.colors(signed=signed if scale is None else scale.signed)
        if scale is None:
            ends = ("against", "for") if signed else ("least", "most")
            return cls(colormap, *ends, signed=signed)
        if scale.signed:
            return cls(colormap, f"{-scale.high:.2g}", f"{scale.high:.2g}", "0", signed=True)
        return cls(colormap, f"{scale.low:.2g}", f"{scale.high:.2g}", signed=False)


def distinguished(bars: Sequence[Bar | None]) -> tuple[Bar | None, ...]:
    """The same, each with a mark if their ends differ: one colour is not one relevance."""
    if len({(bar.low, bar.high) for bar in bars if bar is not None}) < 2:
        return tuple(bars)
    return tuple(bar and replace(bar, high=f"{bar.high} {DIFFERS}") for bar in bars)


def notes(bars: Sequence[Bar | None], look: Look, *others: str) -> str:
    """What has to be known to read a sheet, in words."""
    differ = any(bar is not None and bar.high.endswith(DIFFERS) for bar in bars)
    line = "line: the fifth of the pixels with the most relevance" if look.contour else ""
    return "; ".join(filter(None, (*others, DIFFER if differ else "", line)))


@dataclass(frozen=True)
class Row:
    """A row of a sheet.

    Attributes:
        label: What it shows, in a few words.
        cells: Pictures, ``(height, width, 3)`` each; nothing where a place stays empty.
        bar: What its colours mean.
        note: Said below the label, in small letters.
        titles: Above each of its cells, if they differ from row to row.
        bars: Below each of its cells, what its own colours mean; nothing below a picture.
    """

    label: str
    cells: tuple[Picture | None, ...]
    bar: Bar | None = None
    note: str = ""
    titles: tuple[str, ...] = ()
    bars: tuple[Bar | None, ...] = ()


def draw_rows(
    rows: Sequence[Row], title: str, *, titles: Sequence[str] = (), note: str = "", legends: Sequence[Bar] = (),
    beside: Sequence[Likely] = (),
) -> Figure:  # fmt: skip
    """Draw rows of pictures below each other.

    Args:
        rows: At least one, with at least one cell.
        title: Shown above them all; its lines are kept.
        titles: Shown above the columns; lines are kept, long ones are broken.
        note: Shown below them all, in words.
        legends: Shown below them all: what the colours mean.
        beside: Shown to their right: classes, and how likely each is.

    Returns:
        A figure that belongs to no pyplot state.

    Raises:
        ValueError: There is nothing to draw.

    Example:
        >>> draw_rows([Row("grey", (np.full((8, 8, 3), 0.5),))], "a title").axes[0].get_title()
        ''
    """
    columns = max((len(row.cells) for row in rows), default=0)
    if not columns:
        raise ValueError("rows holds no picture; expected at least one row with a cell")
    cell = min(_LARGEST, max(_SMALLEST, _PAGE / columns - _GAP))
    heights = [cell * max((p.shape[0] / p.shape[1] for p in row.cells if p is not None), default=1.0) for row in rows]
    under = [_UNDER * any(row.bars) for row in rows]
    above = [_wrapped(titles, cell), *(_wrapped(row.titles, cell) for row in rows)]
    lines = [max((text.count("\n") + 1 for text in texts), default=0) * _LINE for texts in above]
    begin = _MARGIN + (_LABEL if any(row.label for row in rows) else 0)
    right = begin + columns * (cell + _GAP) + (_BAR if any(row.bar for row in rows) else _MARGIN - _GAP)
    width = right + (_CLASSES if beside else 0)
    feet = [bool(legends), bool(note)]
    head = _HEAD + _TITLE_LINE * title.count("\n")
    height = (
        head
        + lines[0]
        + sum(heights)
        + sum(under)
        + sum(lines[1:])
        + _GAP * len(rows)
        + max(_FOOT * sum(feet), _MARGIN)
    )
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    fitting = "\n".join(_fitting(line, width) for line in title.splitlines())
    write(figure, 0.5 * width, height - 0.5 * head, fitting, 11.5)
    top = height - head - lines[0]
    lefts = [begin + column * (cell + _GAP) for column in range(columns + 1)]
    _write_above(figure, above[0], top, lefts, cell)
    for place, row in enumerate(rows):
        top -= lines[place + 1]
        _write_above(figure, above[place + 1], top, lefts, cell)
        _draw_row(figure, row, top, lefts, cell, heights[place])
        top -= heights[place] + under[place] + _GAP
    write(figure, 0.5 * right, 0.5 * _FOOT, note, 9, color=FAINT)
    for place, bar in enumerate(legends):
        _draw_legend(figure, bar, right * (place + 0.5) / len(legends), _FOOT * (0.5 + bool(note)))
    _draw_classes(figure, beside, right, height - head - lines[0] - lines[1])
    return figure


def _draw_classes(figure: Figure, classes: Sequence[Likely], left: float, top: float) -> None:
    """The likeliest classes: below each name a bar, as long as it is likely."""
    length = _CLASSES - 2 * _MARGIN
    for place, (name, words, share) in enumerate(classes):
        y = top - 0.1 - 0.42 * place
        write(figure, left, y, textwrap.shorten(name, int(0.8 * length * _LETTERS), placeholder="..."), 9, ha="left")
        write(figure, left + length, y, words, 9, ha="right", color=FAINT)
        for color, part in ((RULE, 1.0), (INK, share)):
            axes = axes_at(figure, left, y - 0.2, max(part * length, 0.01), 0.06)
            axes.add_patch(Rectangle((0, 0), 1, 1, color=color, linewidth=0))


def _wrapped(texts: Sequence[str], cell: float) -> list[str]:
    """Every text on lines that fit above a cell, three at most."""
    letters = max(int(cell * _LETTERS), 8)
    found = []
    for text in texts:
        lines = [line for part in text.splitlines() for line in _lines(part, letters)]
        found.append("\n".join([*lines[:2], textwrap.shorten(" ".join(lines[2:]), letters, placeholder="...")])
                     if len(lines) > 3 else "\n".join(lines))  # fmt: skip
    return found


def _lines(text: str, letters: int) -> list[str]:
    """Lines of so many letters: words, and of a word that is longer the parts between dots and underscores."""
    found = []
    for line in textwrap.wrap(text, letters, break_long_words=False) or [""]:
        while len(line) > letters:
            cut = max(line.rfind(mark, 0, letters) for mark in "._-/") + 1 or letters
            found.append(line[:cut])
            line = line[cut:]
        found.append(line)
    return found


def _fitting(title: str, width: float) -> str:
    return textwrap.shorten(title, int(width * 10.5), placeholder="...")


def _write_above(figure: Figure, texts: Sequence[str], bottom: float, lefts: Sequence[float], cell: float) -> None:
    for left, text in zip(lefts, texts, strict=False):
        write(figure, left + 0.5 * cell, bottom + 0.06, text, 8.5, va="baseline")


def _draw_row(figure: Figure, row: Row, top: float, lefts: Sequence[float], cell: float, height: float) -> None:
    middle = top - 0.5 * height
    label = textwrap.fill(row.label, int(_LABEL * (_LETTERS - 1.5)), break_long_words=False)
    note = textwrap.fill(row.note, int(_LABEL * _SMALL_LETTERS)) if row.note else ""
    below = 0.5 * (label.count("\n") + 1) * _LINE * 1.1
    write(figure, _MARGIN, middle + (0.5 * _LINE if note else 0), label, 9.5, ha="left")
    if note:
        write(figure, _MARGIN, middle + 0.5 * _LINE - below - 0.02, note, 7.5, ha="left", va="top", color=FAINT)
    for left, pixels in zip(lefts, row.cells, strict=False):
        if pixels is not None:
            draw_pixels(axes_at(figure, left, top - height, cell, height), pixels, cell)
    for left, bar in zip(lefts, row.bars, strict=False):
        if bar is not None:
            _draw_under(figure, bar, left, top - height - 0.5 * _UNDER, cell)
    if row.bar is not None:
        _draw_bar(figure, row.bar, lefts[len(row.cells)] + 0.05, middle, min(0.85 * height, 1.5))


def _draw_bar(figure: Figure, bar: Bar, left: float, middle: float, height: float) -> None:
    axes = axes_at(figure, left, middle - 0.5 * height, 0.11, height)
    axes.imshow(bar.ramp[:, ::-1].swapaxes(0, 1), aspect="auto", interpolation="bilinear")
    for text, y in ((bar.high, 0.5 * height - 0.06), (bar.middle, 0.0), (bar.low, 0.06 - 0.5 * height)):
        write(figure, left + 0.17, middle + y, text, 8, ha="left", color=FAINT)


def _draw_under(figure: Figure, bar: Bar, left: float, middle: float, cell: float) -> None:
    """A lying bar below a cell, with its numbers at both ends."""
    axes_at(figure, left + 0.3 * cell, middle - 0.04, 0.3 * cell, 0.08).imshow(bar.ramp, aspect="auto")
    write(figure, left + 0.27 * cell, middle, bar.low, 7.5, ha="right", color=FAINT)
    write(figure, left + 0.63 * cell, middle, bar.high, 7.5, ha="left", color=FAINT)


def _draw_legend(figure: Figure, bar: Bar, middle: float, y: float) -> None:
    """A lying bar in the foot, with its ends in words."""
    axes_at(figure, middle - 0.7, y - 0.06, 1.4, 0.12).imshow(bar.ramp, aspect="auto")
    write(figure, middle - 0.76, y, bar.low, 9, ha="right", color=FAINT)
    write(figure, middle + 0.76, y, bar.high, 9, ha="left", color=FAINT)


def draw_pixels(axes: Axes, pixels: Picture, width: float) -> None:
    """Pixels in axes that are so many inches wide: smooth where one would show as a block, its shape kept."""
    # Few pixels are patches, whose borders are worth seeing; a small photograph is better smooth.
    count = max(pixels.shape[:2])
    kind = "nearest" if count <= 32 else "bicubic" if count < width * DPI else "antialiased"
    axes.imshow(pixels, interpolation=kind, aspect="equal")


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without ticks, in inches from the left and from below."""
    across, up = figure.get_size_inches()
    axes = figure.add_axes((left / across, bottom / up, width / across, height / up))
    axes.set_axis_off()
    return axes


def write(
    figure: Figure, x: float, y: float, text: str, size: float, *, ha: str = "center", va: str = "center",
    color: str = INK,
) -> None:  # fmt: skip
    """Words at a place in inches from the left and from below."""
    across, up = figure.get_size_inches()
    # Class names may hold a dollar sign, which is no mathematics.
    figure.text(x / across, y / up, text, ha=ha, va=va, fontsize=size, color=color, parse_math=False, linespacing=1.1)
