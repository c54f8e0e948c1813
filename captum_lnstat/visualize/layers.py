"""How relevance descends: what every block, and every head of it, passes on, with the token statistics that decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from captum_lnstat.attribution.descent import BlockRelevance, HeadRelevance
from captum_lnstat.visualize.canvas import Bar, Row, distinguished, draw_rows, notes
from captum_lnstat.visualize.colors import PLAIN, STATISTIC, Look, Scale, overlay, paint

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Map, Picture

# More columns than these are too small to read: every second, third, ... block is shown, always the last.
_BLOCKS, _HEAD_BLOCKS, _HEADS = 12, 6, 8

_Record = TypeVar("_Record")


def layer_sheet(
    blocks: Sequence[BlockRelevance],
    image: Picture,
    title: str,
    *,
    signed: bool = False,
    most: int = _BLOCKS,
    look: Look = PLAIN,
) -> Figure:
    """Relevance on its way down, with the residual shares and token variances that steer it.

    Args:
        blocks: From ``descend``, the image's end first.
        image: ``(height, width, 3)``, as the model saw it.
        title: Shown above.
        signed: The rule was ``"evidence"``.
        most: So many blocks are shown at most, evenly spaced; the sheet says so.
        look: How maps are laid over the image.

    Returns:
        A figure of three rows, read from the last block to the image. Relevance and variance are on a scale of their
        own at each block, since their size changes from stage to stage; the shares are all on 0 to 1.
    """
    shown = _spaced(blocks, most)[::-1]
    maps = [_array(block.relevance) for block in shown]
    scales = [Scale.of([each], signed=signed) for each in maps]
    cells = [
        overlay(image, _enlarged(each, block.cell, image), scale=scale, look=look)
        for each, block, scale in zip(maps, shown, scales, strict=True)
    ]
    bars = distinguished([Bar.of(scale, look=look) for scale in scales])
    shares = [paint(_array(block.residual), STATISTIC) for block in shown]
    # Outlier tokens have a hundred times the variance of the others: a scale of powers shows both.
    spread = [np.log10(np.maximum(_array(block.variance), 1e-12)) for block in shown]
    variances = [paint(Scale.of([each - each.min()])(each - each.min()), STATISTIC) for each in spread]
    rows = [
        Row(
            "relevance at the tokens that the block reads",
            tuple(cells),
            Bar.of(None, signed=signed, look=look),
            "own scale each",
            bars=bars,
        ),
        Row(
            "residual share",
            tuple(shares),
            Bar(STATISTIC, "0", "1"),
            "of each token after the attention: 1 keeps it, 0 replaces it",
            tuple(f"mean {float(block.residual.mean()):.2f}" for block in shown),
        ),
        Row(
            "token variance",
            tuple(variances),
            Bar(STATISTIC, "least", "most"),
            "at the first LayerNorm, powers of ten",
            tuple(span(10 ** each.min(), 10 ** each.max()) for each in spread),
        ),
    ]
    note = notes(bars, look, "from the head (left) to the image (right)" + _left_out(blocks, shown))
    return draw_rows(rows, title, titles=[block.name for block in shown], note=note)


def head_sheet(
    blocks: Sequence[HeadRelevance], image: Picture, title: str, *, most: int = _HEAD_BLOCKS, look: Look = PLAIN
) -> Figure:
    """What every attention head passes on: blocks below each other, one scale a block.

    Args:
        blocks: From ``descend_heads``, the image's end first.
        image: ``(height, width, 3)``, as the model saw it.
        title: Shown above.
        most: So many blocks are shown at most, evenly spaced; the sheet says so.
        look: How maps are laid over the image.
    """
    shown = _spaced(blocks, most)[::-1]
    rows = []
    for block in shown:
        maps = [_array(head) for head in block.heads]
        scale = Scale.of(maps)
        cells = [overlay(image, _enlarged(each, block.cell, image), scale=scale, look=look) for each in maps]
        lines = math.ceil(len(cells) / _HEADS)
        wide = math.ceil(len(cells) / lines)
        for start in range(0, len(cells), wide):
            titles = tuple(f"head {number}" for number in range(start, min(start + wide, len(cells))))
            words = ("", "") if start else (block.name, "share per token")
            row = tuple(cells[start : start + wide])
            rows.append(Row(words[0], row, Bar.of(scale, look=look), words[1], titles))
    note = "from the head of the model (above) to the image (below), one scale a block" + _left_out(blocks, shown)
    return draw_rows(rows, title, note=notes([], look, note))


def _spaced(blocks: Sequence[_Record], most: int) -> list[_Record]:
    """At most so many, evenly spaced, the last always among them."""
    if not blocks or most < 1:
        raise ValueError(f"{len(blocks)} blocks, at most {most} of them; expected at least one of each")
    if len(blocks) <= most:
        return list(blocks)
    places = np.linspace(len(blocks) - 1, 0, most).round().astype(int)[::-1]
    return [blocks[place] for place in places]


def span(low: float, high: float) -> str:
    """Both ends in words, with a digit more than tells them apart, and one alone where none does.

    Example:
        >>> span(0.5, 120.0), span(0.999, 1.001), span(1.0, 1.0)
        ('0.5 to 120', '0.999 to 1.001', '1')
    """
    for digits in range(2, 7):
        if f"{low:.{digits}g}" != f"{high:.{digits}g}":
            return f"{_short(low, digits + 1)} to {_short(high, digits + 1)}"
    return _short(low, 2)


def _short(value: float, digits: int) -> str:
    """So many digits, or the whole ones of a large number."""
    return f"{value:.{max(digits, len(str(int(value))))}g}" if value < 1e5 else f"{value:.{digits}g}"


def _left_out(blocks: Sequence[_Record], shown: Sequence[_Record]) -> str:
    return "" if len(shown) == len(blocks) else f"; {len(shown)} of {len(blocks)} blocks"


def _array(tensor: Tensor) -> Map:
    return np.asarray(tensor.detach().cpu().double().numpy())


def _enlarged(grid: Map, cell: tuple[int, int], image: Picture) -> Map:
    """Every pixel of the image gets the value of the token that it lies in, or of the last one if it lies in none."""
    rows, columns = (
        np.minimum(np.arange(pixels) // size, cells - 1)
        for pixels, size, cells in zip(image.shape[:2], cell, grid.shape, strict=True)
    )
    return np.asarray(grid[rows][:, columns])
