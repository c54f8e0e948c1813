"""Comparison sheets: methods by rows, images by columns, with what a colour means beside every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_lnstat.attribution.methods import METHODS, Method, method_of_rule
from captum_lnstat.recording.forward import Output
from captum_lnstat.visualize.canvas import Bar, Row, distinguished, draw_rows, notes
from captum_lnstat.visualize.colors import PLAIN, Look, Scale, overlay
from captum_lnstat.visualize.maps import to_map
from captum_lnstat.visualize.sheet import Panel

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.visualize.maps import Map, Picture

ScaleOf = Literal["method", "map", "shared"]
SCALES: tuple[ScaleOf, ...] = get_args(ScaleOf)
_NOTES = {
    "method": "one scale a row",
    "map": "every map on a scale of its own",
    "shared": "one scale: relevance in multiples of the mean size of its map",
}


def comparison(
    model: nn.Module,
    inputs: Float[Tensor, "1 3 height width"],
    target: int,
    *,
    rule: str = "lnstat",
    output: Output = None,
    during: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[Panel, ...]:
    """The maps of one image: ``rule``, attention rollout, Chefer's generic rule and Captum's IntegratedGradients.

    Args:
        model: The transformer, in eval mode.
        inputs: One image, ``(1, 3, height, width)``, normalised for it.
        target: The class that all of them explain.
        rule: The rule of ``LNStatAttribution``.
        output: As for ``LNStatAttribution``.
        during: Called with the name of each method; the method runs inside the context manager that it returns.

    Raises:
        UnsupportedModelError, RecordingError, ValueError: As for ``LNStatAttribution.attribute``.
    """
    own = replace(method_of_rule(rule), title=f"rule {rule}")
    panels = []
    for method in (own, METHODS["attention-rollout"], METHODS["chefer"], METHODS["ig"]):
        with during(method.title):
            attribution = method.make(model, output)(inputs, target)
        panels.append(Panel(method.title, to_map(attribution[0]), method.signed))
    return tuple(panels)


@dataclass(frozen=True)
class ComparedImage:
    """A column of a comparison sheet.

    Attributes:
        title: What is shown above it; lines are kept.
        image: ``(height, width, 3)``, as the model saw it.
        maps: One for every method, as large as the image.
        photo: Shown in the place of the image, as from ``framed``.
    """

    title: str
    image: Picture
    maps: tuple[Map, ...]
    photo: Picture | None = None


def compare_sheet(
    images: Sequence[ComparedImage],
    methods: Sequence[Method],
    title: str,
    *,
    scale: ScaleOf = "method",
    look: Look = PLAIN,
) -> Figure:
    """Several methods on several images.

    Args:
        images: The columns.
        methods: The rows, in the order of every image's maps.
        title: Shown above them all.
        scale: ``"method"``: one scale for each method, its numbers beside its row. ``"map"``: every map on its own.
            ``"shared"``: one for all of them, in multiples of the mean size of each map, since the methods' own units
            differ.
        look: How maps are laid over the images.

    Returns:
        A figure that belongs to no pyplot state. The sheet says which scale it uses.

    Raises:
        ValueError: No image or no method, maps and methods that differ in number, an unknown scale, or as for
            ``overlay``.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; expected one of {', '.join(map(repr, SCALES))}")
    if not images or not methods:
        raise ValueError(f"{len(images)} images and {len(methods)} methods; expected at least one of each")
    for image in images:
        if len(image.maps) != len(methods):
            raise ValueError(f"{image.title!r} has {len(image.maps)} maps for {len(methods)} methods; expected as many")
    columns = [image.maps for image in images]
    if scale == "shared":
        columns = [tuple(each / (np.abs(each).mean() or 1.0) for each in maps) for maps in columns]
    top = Scale.of([np.abs(each) for maps in columns for each in maps]).high if scale == "shared" else 0.0
    photos = [image.image if image.photo is None else image.photo for image in images]
    seen = "" if all(image.photo is None for image in images) else "the frame is what the model saw"
    rows = [Row("image", tuple(photos), note=seen)]
    for place, method in enumerate(methods):
        maps = [column[place] for column in columns]
        if scale == "shared":
            shown = [Scale(0.0, top, method.signed)] * len(maps)
        elif scale == "method":
            shown = [Scale.of(maps, signed=method.signed)] * len(maps)
        else:
            shown = [Scale.of([each], signed=method.signed) for each in maps]
        cells = tuple(
            overlay(image.image, each, scale=one, look=look)
            for image, each, one in zip(images, maps, shown, strict=True)
        )
        unit = method.unit if scale == "method" else ""
        bar = Bar.of(None if scale == "map" else shown[0], signed=method.signed, look=look)
        bars = distinguished([Bar.of(one, look=look) for one in shown]) if scale == "map" else ()
        rows.append(Row(method.title, cells, bar, unit, bars=bars))
    if scale == "method":
        marked = distinguished([row.bar for row in rows])
        rows = [replace(row, bar=bar) for row, bar in zip(rows, marked, strict=True)]
    note = notes([bar for row in rows for bar in (row.bar, *row.bars)], look, _NOTES[scale])
    return draw_rows(rows, title, titles=[image.title for image in images], note=note)
