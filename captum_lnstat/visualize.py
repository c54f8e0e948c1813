"""Pictures for people: relevance in colour, laid over the image, and several methods beside each other on one sheet.

Everything is drawn through matplotlib's objects, never through pyplot, so nothing here needs a display or touches the
figures and backends of the program that calls it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from captum.attr import IntegratedGradients
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_lnstat.attribution import LNStatAttribution, Rule
from captum_lnstat.baselines import AttentionRollout, GenericAttention

if TYPE_CHECKING:
    from jaxtyping import Float

    Picture = Float[np.ndarray, "height width 3"]
    Map = Float[np.ndarray, "height width"]

INTEGRATED_STEPS = 32
# Steps of IntegratedGradients that are in memory at once; more is no faster on a CPU and large models need the room.
INTEGRATED_BATCH = 8

_SEQUENTIAL, _DIVERGING = "inferno", "RdBu_r"
_GREY = np.array([0.299, 0.587, 0.114])
# A map that varies by less than float error of its size is flat; stretched to full contrast it would show only noise.
_FLAT = 1e-5
# Per cent of the pixels that may saturate: one hot patch, or one hot pixel of a gradient method, would hide all others.
_SATURATED = 1.0


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


def to_picture(inputs: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]) -> Picture:
    """The image that the model saw, from its input: normalisation undone, channels last, values from 0 to 1.

    Args:
        inputs: One normalised image, ``(3, height, width)``.
        mean: Mean of every channel that the transform subtracted.
        std: Deviation of every channel that it divided by.

    Raises:
        ValueError: ``inputs`` is not one RGB image.

    Example:
        >>> import torch
        >>> to_picture(torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1), (0.5,) * 3, (0.5,) * 3)
        array([[[0. , 0.5, 1. ]]])
    """
    if inputs.dim() != 3 or len(inputs) != 3:
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; expected (3, height, width)")
    pixels = inputs.detach().cpu().double().numpy().transpose(1, 2, 0)
    return np.asarray((pixels * np.asarray(std) + np.asarray(mean)).clip(0, 1))


def to_map(attribution: Float[Tensor, "channel height width"]) -> Map:
    """One image's attribution as a map: summed over the channels.

    Example:
        >>> import torch
        >>> to_map(torch.ones(3, 1, 2))
        array([[3., 3.]])
    """
    return np.asarray(attribution.detach().cpu().double().sum(0).numpy())


def scaled(relevance: Map, *, signed: bool = False) -> Map:
    """Relevance on the scale of the colours, which is each map's own: units differ from method to method.

    Args:
        relevance: ``(height, width)``.
        signed: False: from the least to the most relevant pixel, 0 to 1. True: -1 to 1 with zero kept at 0.

    Returns:
        ``(height, width)``. The strongest pixels, one in a hundred, are all given full strength.

    Raises:
        ValueError: The map holds NaN or infinity, or negative values though it is not signed.

    Example:
        >>> scaled(np.array([[1.0, 2.0, 3.0]])).round(1)
        array([[0. , 0.5, 1. ]])
        >>> scaled(np.array([[-1.0, 0.0, 4.0]]), signed=True).round(1)
        array([[-0.3,  0. ,  1. ]])
        >>> scaled(np.array([[2.0, 2.0]]))
        array([[0., 0.]])
    """
    if not np.isfinite(relevance).all():
        raise ValueError("relevance holds NaN or infinite values; expected finite ones")
    size = float(np.abs(relevance).max())
    low = 0.0 if signed else float(relevance.min())
    if not signed and low < -_FLAT * size:
        raise ValueError(f"relevance goes down to {low:.3g}; expected none below zero, or signed=True")
    height = np.abs(relevance - low)
    if height.max() <= _FLAT * size:
        return np.zeros_like(relevance)
    # So little may be relevant at all that the percentile is none of it.
    limit = float(np.percentile(height, 100 - _SATURATED)) or float(height.max())
    return np.clip((relevance - low) / limit, -1, 1)


def colored(relevance: Map, *, signed: bool = False) -> Picture:
    """Relevance as colours: dark to bright if it is not signed; red for, blue against, white for neither if it is.

    Args:
        relevance: ``(height, width)``.
        signed: As for ``scaled``, which also says what is raised.

    Example:
        >>> colored(np.array([[-1.0, 0.0, 1.0]]), signed=True).round(1)
        array([[[0. , 0.2, 0.4],
                [1. , 1. , 1. ],
                [0.4, 0. , 0.1]]])
    """
    return _paint(scaled(relevance, signed=signed), signed)


def _paint(values: Map, signed: bool) -> Picture:
    colormap = matplotlib.colormaps[_DIVERGING if signed else _SEQUENTIAL]
    return np.asarray(colormap((values + 1) / 2 if signed else values)[..., :3])


def overlay(image: Picture, relevance: Map, *, signed: bool = False) -> Picture:
    """Relevance laid over the image: the image in grey, and the more relevant a pixel the more of its colour.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        relevance: ``(height, width)``.
        signed: As for ``scaled``.

    Returns:
        ``(height, width, 3)``, values from 0 to 1.

    Raises:
        ValueError: Image and relevance are not of one size, or as for ``scaled``.

    Example:
        >>> overlay(np.ones((1, 2, 3)), np.array([[0.0, 1.0]])).shape
        (1, 2, 3)
    """
    if image.shape != (*relevance.shape, 3):
        raise ValueError(
            f"image has shape {image.shape} and relevance {relevance.shape}; expected (height, width, 3) and (height, "
            "width) of one size"
        )
    values = scaled(relevance, signed=signed)
    grey = np.repeat((image @ _GREY)[..., None], 3, -1)
    # Lifted and flattened, so that a dark photograph stays readable and no white wall outshines what is relevant.
    base = 0.25 + (0.65 if signed else 0.5) * grey
    weight = 0.9 * (np.abs(values) ** 0.7)[..., None]
    # The pale middle of the diverging colours would outline every change of sign.
    paint = _paint(np.sign(values) * (0.4 + 0.6 * np.abs(values)) if signed else values, signed)
    return np.asarray(base * (1 - weight) + paint * weight)


def comparison(
    model: nn.Module,
    inputs: Float[Tensor, "1 3 height width"],
    target: int,
    *,
    rule: Rule = "lnstat",
    during: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> tuple[Panel, ...]:
    """The maps of a sheet: ``rule``, attention rollout, Chefer's generic rule and Captum's IntegratedGradients.

    Args:
        model: The transformer, in eval mode.
        inputs: One image, ``(1, 3, height, width)``, normalised for it.
        target: The class that all of them explain.
        rule: The rule of ``LNStatAttribution``.
        during: Called with the name of each method; the method runs inside the context manager that it returns.

    Raises:
        UnsupportedModelError, RecordingError, ValueError: As for ``LNStatAttribution.attribute``.
    """
    steps = IntegratedGradients(model)

    def integrated() -> Tensor:
        attribution: Tensor = steps.attribute(
            inputs, target=target, n_steps=INTEGRATED_STEPS, internal_batch_size=INTEGRATED_BATCH
        )
        return attribution

    methods: tuple[tuple[str, Callable[[], Tensor], bool], ...] = (
        (f"rule {rule}", lambda: LNStatAttribution(model, rule=rule).attribute(inputs, target), rule == "evidence"),
        ("attention rollout", lambda: AttentionRollout(model).attribute(inputs, target), False),
        ("Chefer et al. 2021", lambda: GenericAttention(model).attribute(inputs, target), False),
        ("IntegratedGradients", integrated, True),
    )
    panels = []
    for title, attribute, signed in methods:
        with during(title):
            panels.append(Panel(title, to_map(attribute()[0]), signed))
    return tuple(panels)


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
        bar.imshow(_paint(np.linspace(-1.0 if signed else 0.0, 1.0, 256)[None], signed), aspect="auto")
        bar.set_axis_off()
        ends = ("against the target", "for the target") if signed else ("least relevant", "most relevant")
        for x, end, side in zip((-0.04, 1.04), ends, ("right", "left"), strict=True):
            bar.text(x, 0.5, end, transform=bar.transAxes, ha=side, va="center", fontsize=9, color=_FAINT)


def write_sheet(path: str | Path, image: Picture, panels: Sequence[Panel], title: str) -> Path:
    """Draw a sheet and write it as one file, or, if anything fails, leave nothing behind.

    Args:
        path: Where to; the suffix says the format: png, jpg, pdf, svg and whatever else matplotlib writes.
        image: As for ``draw_sheet``.
        panels: As for ``draw_sheet``.
        title: As for ``draw_sheet``.

    Returns:
        ``path``. A file that was there before is replaced in one step.

    Raises:
        ValueError: As for ``draw_sheet``, or matplotlib does not write such files.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image, panel = np.ones((8, 8, 3)), Panel("a map", np.eye(8))
        ...     write_sheet(Path(folder, "sheet.png"), image, [panel], "a title").name
        'sheet.png'
    """
    path = Path(path)
    figure = draw_sheet(image, panels, title)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            figure.savefig(file, format=path.suffix[1:] or "png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
