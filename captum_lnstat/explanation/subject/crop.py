"""What a model sees of an image: measured by sending test images through the transform, whoever wrote it.

A transform resizes, crops and normalises. Two images of one colour show the normalisation, an image whose red and
green rise from left to right and from top to bottom shows which of its pixels became which of the model's. Nothing is
taken from the transform's source, so a map can be laid on the image itself to the pixel, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Box = tuple[float, float, float, float]

# The ramps are straight lines to within so many of 255 levels, or the transform is no resizing and cropping.
_STRAIGHT = 2.0
# The outer part of the model's image, where resizing filters see the border.
_BORDER = 0.06
# So many pixels of the image at its border are seen by resizing filters that reach over it.
_FILTER = 2.5
_SNAP = 0.75
# Where bars begin and end, as a share of what is seen; their levels leave room for filters that overshoot.
_EDGE, _DARK, _LEVELS, _CONTRAST = 0.15, 30, 30, 165


@dataclass(frozen=True)
class View:
    """How the pixels of a model's input and those of an image belong together.

    Attributes:
        mean: What the transform subtracts from every channel, whose values go from 0 to 1.
        std: What it divides every channel by.
        size: Height and width of the model's input.
        image_size: Width and height of the image.
        measured: Left, top, right and bottom of what the model sees, in pixels of the image, as they were measured;
            nothing if that is no upright rectangle, as for a transform that pads, turns or draws at random.
        normalised: White becomes more than black in every channel, so that ``mean`` and ``std`` could be measured.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    image_size: tuple[int, int]
    measured: Box | None = None
    normalised: bool = True

    @property
    def box(self) -> Box | None:
        """``measured``, but what ends less than a pixel from the border ends there: 8 bits measure no better."""
        if self.measured is None:
            return None
        edges = zip(self.measured, (0, 0, *self.image_size), strict=True)
        return tuple(float(border) if abs(edge - border) < _SNAP else edge for edge, border in edges)  # type: ignore[return-value]

    @property
    def cut(self) -> tuple[tuple[int, int], int, int] | None:
        """Height and width that the image is resized to, top and left of what is cut out of it: whole pixels."""
        if self.measured is None:
            return None
        left, top, right, bottom = self.measured
        across, down = self.size[1] / (right - left), self.size[0] / (bottom - top)
        width, height = self.image_size
        return (round(height * down), round(width * across)), round(top * down), round(left * across)


def measure(transform: Callable[[Image.Image], Tensor], size: tuple[int, int], like: View | None = None) -> View:
    """The view that a transform gives of an image of a size.

    Args:
        transform: From a Pillow image to ``(channel, height, width)``.
        size: Width and height of the image.
        like: The view of an image of another size, whose normalisation need not be measured again.

    Example:
        >>> from torchvision.transforms import CenterCrop, Compose, Normalize, ToTensor
        >>> view = measure(Compose([CenterCrop(32), ToTensor(), Normalize((0.5,) * 3, (0.25,) * 3)]), (64, 48))
        >>> [round(edge, 1) for edge in view.box], [round(mean, 2) for mean in view.mean]
        ([16.0, 8.0, 48.0, 40.0], [0.5, 0.5, 0.5])
    """
    view = replace(like, image_size=size, measured=None) if like else _normalisation(transform, size)
    if not view.normalised:
        return view
    ramps = _two(transform, _ramps(size), view)
    columns, rows = _line(ramps[0], size[0]), _line(ramps[1].T, size[1])
    if columns is None or rows is None:
        return view
    (left, right), (top, bottom) = columns, rows
    box = (left * size[0], top * size[1], right * size[0], bottom * size[1])
    return _sharper(transform, replace(view, size=(ramps.shape[1], ramps.shape[2]), measured=box))


def _normalisation(transform: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> View:
    black, white = (_through(transform, Image.new("RGB", size, color)) for color in ("black", "white"))
    low, high = np.median(black, (1, 2)), np.median(white, (1, 2))
    inner = (black.shape[1], black.shape[2])
    if black.shape != white.shape or not (high > low).all():
        return View((0.0,) * len(low), (1.0,) * len(low), inner, size, normalised=False)
    std = 1 / (high - low)
    # float32 measures no finer; transforms are given fewer digits.
    mean, std = np.round(-low * std, 6), np.round(std, 6)
    return View(tuple(map(float, mean)), tuple(map(float, std)), inner, size)


def _through(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> Float[np.ndarray, "channel row column"]:
    return np.asarray(transform(image).detach().cpu().double().numpy())


def _two(
    transform: Callable[[Image.Image], Tensor], image: Image.Image, view: View
) -> Float[np.ndarray, "2 row column"]:
    """Red and green of an image after the transform, its normalisation undone.

    Of a transform to another number of channels than three: each as a grey image, and the mean of the channels.
    """
    mean, std = np.reshape(view.mean, (-1, 1, 1)), np.reshape(view.std, (-1, 1, 1))
    if len(view.mean) == 3:
        return np.asarray((_through(transform, image) * std + mean)[:2])
    greys = (Image.merge("RGB", (band,) * 3) for band in image.split()[:2])
    return np.stack([(_through(transform, grey) * std + mean).mean(0) for grey in greys])


def _ramps(size: tuple[int, int]) -> Image.Image:
    """Red: how far right a pixel is. Green: how far down. In 8 bits, rounded differently from line to line."""
    width, height = size
    right, down = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    # Rounding that is even over the lines, so that their mean is the exact value.
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = right * 255 + (np.arange(height)[:, None] * 0.618034) % 1
    pixels[..., 1] = down[:, None] * 255 + (np.arange(width) * 0.618034) % 1
    return Image.fromarray(pixels)


def _line(ramp: Float[np.ndarray, "row column"], pixels: int) -> tuple[float, float] | None:
    """Where the columns begin and end in the image of so many, 0 to 1, if the ramp is one rising line in all rows."""
    count = ramp.shape[1]
    border = min(int(np.ceil(max(_BORDER, _FILTER / pixels) * count)), (count - 2) // 2)
    across = min(int(np.ceil(_BORDER * len(ramp))), (len(ramp) - 1) // 2)
    inner = ramp[across : len(ramp) - across, border : count - border]
    where = (np.arange(count)[border : count - border] + 0.5) / count
    slope, start = np.polyfit(where, inner.mean(0), 1)
    off = np.abs(inner - (start + slope * where)).mean(0)
    if slope <= 0 or float(off.max()) > _STRAIGHT / 255:
        return None
    return float(start), float(start + slope)


def _sharper(transform: Callable[[Image.Image], Tensor], view: View) -> View:
    """The box by the edges of bright bars: an area is measured to a hundredth of a pixel, where a ramp is not."""
    assert view.measured is not None
    left, top, right, bottom = view.measured
    across, down = (
        (math.ceil(first + _EDGE * (last - first)), math.floor(last - _EDGE * (last - first)))
        for first, last in ((left, right), (top, bottom))
    )
    if min(across[1] - across[0], down[1] - down[0]) < 2 * _FILTER:
        return view
    width, height = view.image_size
    bars = np.full((height, width, 3), _DARK, np.uint8)
    # Levels differ from line to line, so that the mean over them is finer than a level.
    bars[..., 0] += np.linspace(0, _LEVELS, height, dtype=np.uint8)[:, None]
    bars[..., 1] += np.linspace(0, _LEVELS, width, dtype=np.uint8)
    bars[:, slice(*across), 0] += _CONTRAST
    bars[slice(*down), :, 1] += _CONTRAST
    values = 255 * _two(transform, Image.fromarray(bars), view)
    columns, rows = _ends(values[0], across), _ends(values[1].T, down)
    if columns is None or rows is None:
        return view
    return replace(view, measured=(columns[0], rows[0], columns[1], rows[1]))


def _ends(lines: Float[np.ndarray, "line pixel"], bar: tuple[int, int]) -> tuple[float, float] | None:
    """Where the model's image begins and ends in the image, by where the bar does in both."""
    values = (lines - lines[:, :1]) / _CONTRAST
    profile = values.mean(0)
    middle = len(profile) // 2
    before, after = middle - profile[:middle].sum(), middle + profile[middle:].sum()
    scale = (bar[1] - bar[0]) / (after - before)
    begin = bar[0] - before * scale
    # A filter that takes the nearest pixel moves edges to whole ones; the ramp is better then.
    between = bool(((values > 0.02) & (values < 0.98)).any())
    return (float(begin), float(begin + len(profile) * scale)) if between or abs(scale - 1) < 1e-3 else None


def on_image(grid: Float[np.ndarray, "row column"], box: Box, size: tuple[int, int]) -> Float[np.ndarray, "y x"]:
    """The patch grid on the pixels of the image: bilinear between patch centres, constant outside of them.

    Args:
        grid: A value for every patch of what the model saw.
        box: Where that lies in the image, in pixels.
        size: Width and height of the image.

    Returns:
        ``(height, width)``. Values outside the box are NaN: the model did not see these pixels.

    Example:
        >>> on_image(np.array([[1.0, 3.0]]), (0, 0, 4, 2), (4, 2))
        array([[1. , 1.5, 2.5, 3. ],
               [1. , 1.5, 2.5, 3. ]])
    """
    left, top, right, bottom = box
    columns, inside_x = _weights(grid.shape[1], left, right, size[0])
    rows, inside_y = _weights(grid.shape[0], top, bottom, size[1])
    values: np.ndarray[Any, Any] = rows @ grid @ columns.T
    values[~(inside_y[:, None] & inside_x)] = np.nan
    return values


def _weights(cells: int, start: float, end: float, pixels: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """How much of each cell every pixel of one axis shows, and which pixels the model saw."""
    where = (np.arange(pixels) + 0.5 - start) / (end - start)
    centres = np.arange(cells)
    weights = np.stack([np.interp(where * cells - 0.5, centres, row) for row in np.eye(cells)], 1)
    # A box that is measured may miss the border by a hundredth of a pixel.
    slack = 0.02 / max(end - start, 1)
    return weights, (where >= -slack) & (where <= 1 + slack)
