"""Relevance as colours: scales that several maps may share, and colormaps that can be told apart by everybody.

Both colormaps are even in lightness and do not rely on telling red from green: inferno for what has no sign, blue to
red through white for what has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.visualize.maps import Map, Picture

SEQUENTIAL, DIVERGING, STATISTIC = "inferno", "RdBu_r", "cividis"
_GREY = np.array([0.299, 0.587, 0.114])
# A map that varies by less than float error of its size is flat; stretched to full contrast it would show only noise.
_FLAT = 1e-5
# Share of the pixels that a contour is drawn around.
_OUTLINED = 0.2
# Where more than this share of them lies at its edge, they are specks.
_SCATTERED = 0.85
# Per cent of the pixels that may saturate: one hot patch, or one hot pixel of a gradient method, would hide all others.
_SATURATED = 1.0


@dataclass(frozen=True)
class Scale:
    """Which relevance is shown as which colour, for one map or for several.

    Attributes:
        low: Shown as the darkest colour; 0 for a signed scale, where it is white.
        high: Shown as the strongest colour, as is all beyond it.
        signed: Whether negative values mean "against the target": diverging colours, from ``-high`` to ``high``.
    """

    low: float
    high: float
    signed: bool = False

    @classmethod
    def of(cls, maps: Sequence[Map], *, signed: bool = False) -> Scale:
        """The scale that shows all of the maps.

        Args:
            maps: At least one, each of any size.
            signed: False: from the least to the most relevant pixel. True: zero in the middle.

        Returns:
            A scale of full strength for one pixel in a hundred of those that reach highest.

        Raises:
            ValueError: A map holds NaN or infinity, or negative values though it is not signed.

        Example:
            >>> Scale.of([np.array([[1.0, 2.0]]), np.array([[5.0]])]).low
            1.0
        """
        values = np.concatenate([np.ravel(each) for each in maps])
        if not np.isfinite(values).all():
            raise ValueError("relevance holds NaN or infinite values; expected finite ones")
        size = float(np.abs(values).max())
        low = 0.0 if signed else float(values.min())
        if not signed and low < -_FLAT * size:
            raise ValueError(f"relevance goes down to {low:.3g}; expected none below zero, or signed=True")
        height = np.abs(values - low)
        if height.max() <= _FLAT * size:
            return cls(low, low, signed)
        # So little may be relevant at all that the percentile is none of it.
        return cls(low, low + (float(np.percentile(height, 100 - _SATURATED)) or float(height.max())), signed)

    def __call__(self, relevance: Map) -> Map:
        """Relevance on the scale: 0 to 1, or -1 to 1 if it is signed."""
        if self.high <= self.low:
            return np.zeros_like(relevance)
        return np.clip((relevance - self.low) / (self.high - self.low), -1 if self.signed else 0, 1)


@dataclass(frozen=True)
class Look:
    """How a map is laid over an image.

    Attributes:
        colormap: A colormap of matplotlib, in the place of inferno or, for signed maps, of red and blue.
        alpha: How much the strongest relevance covers of the image, 0 to 1; None for what suits the image's colours.
        grey: The image in grey, lifted and flattened, so that colour means relevance alone; or as it is. None: in grey
            below maps with signs, since red and blue of a photograph would be taken for relevance.
        contour: A line around the fifth of the pixels that is most relevant.

    Example:
        >>> overlay(np.zeros((1, 2, 3)), np.array([[0.0, 1.0]]), look=Look("viridis", 1.0)).round(2).tolist()
        [[[0.0, 0.0, 0.0], [0.99, 0.91, 0.14]]]
    """

    colormap: str | None = None
    alpha: float | None = None
    grey: bool | None = None
    contour: bool = False

    def colors(self, *, signed: bool) -> str:
        """The colormap of a map."""
        return self.colormap or (DIVERGING if signed else SEQUENTIAL)

    def fades(self, *, signed: bool) -> bool:
        """Whether the image below a map is in grey."""
        return signed if self.grey is None else self.grey

    def cover(self, *, signed: bool) -> float:
        """``alpha``, or what suits the image's colours."""
        return self.alpha if self.alpha is not None else 0.9 if self.fades(signed=signed) else 0.75


# The photograph in its colours, or below signs in grey; and always in grey.
PLAIN, GREY = Look(), Look(grey=True)


def scaled(relevance: Map, *, signed: bool = False) -> Map:
    """Relevance on the scale of the colours, which is the map's own: units differ from method to method.

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
    return Scale.of([relevance], signed=signed)(relevance)


def colored(relevance: Map, *, signed: bool = False, scale: Scale | None = None, look: Look = PLAIN) -> Picture:
    """Relevance as colours: dark to bright if it is not signed; red for, blue against, white for neither if it is.

    Args:
        relevance: ``(height, width)``.
        signed: As for ``scaled``, which also says what is raised.
        scale: A scale that several maps share, in the place of the map's own.
        look: Its colours.

    Example:
        >>> colored(np.array([[-1.0, 0.0, 1.0]]), signed=True).round(1)
        array([[[0. , 0.2, 0.4],
                [1. , 1. , 1. ],
                [0.4, 0. , 0.1]]])
    """
    scale = scale or Scale.of([relevance], signed=signed)
    return paint(scale(relevance), look.colors(signed=scale.signed), signed=scale.signed)


def paint(values: Map, colormap: str, *, signed: bool | None = None) -> Picture:
    """Values on a scale, 0 to 1 or, signed, -1 to 1, as colours; signed by default for the diverging colours."""
    colors: Any = matplotlib.colormaps[colormap]
    return np.asarray(
        colors((values + 1) / 2 if (colormap == DIVERGING if signed is None else signed) else values)[..., :3]
    )


def overlay(
    image: Picture, relevance: Map, *, signed: bool = False, scale: Scale | None = None, look: Look = PLAIN
) -> Picture:
    """Relevance laid over the image: the more relevant a pixel the more of its colour.

    Args:
        image: ``(height, width, 3)``, values from 0 to 1.
        relevance: ``(height, width)``.
        signed: As for ``scaled``.
        scale: As for ``colored``.
        look: Whether the image is in grey, and the colours of the map.

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
    laid = rgba(relevance, signed=signed, scale=scale, look=look)
    signed = signed if scale is None else scale.signed
    base = faded(image, signed=signed) if look.fades(signed=signed) else image
    weight = look.cover(signed=signed) * laid[..., 3:]
    drawn = np.asarray(base * (1 - weight) + laid[..., :3] * weight)
    if look.contour:
        black, white = outlined(relevance)
        drawn[black], drawn[white] = 0, 1
    return drawn


def rgba(
    relevance: Map, *, signed: bool = False, scale: Scale | None = None, look: Look = PLAIN
) -> Float[np.ndarray, "height width 4"]:
    """Relevance as colours that an image shows through: laid over it at the opacity ``look.cover``, it is ``overlay``.

    Where ``look.fades``, it is laid over the ``faded`` image.

    Args:
        relevance: ``(height, width)``.
        signed: As for ``scaled``.
        scale: As for ``colored``.
        look: The colours.

    Returns:
        Red, green, blue and opacity, ``(height, width, 4)``, values from 0 to 1.

    Example:
        >>> rgba(np.array([[0.0, 1.0]]), look=Look("gray")).tolist()
        [[[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]]
    """
    scale = scale or Scale.of([relevance], signed=signed)
    values = scale(relevance)
    weight = (np.abs(values) ** 0.7)[..., None]
    if scale.signed:
        # The pale middle of the diverging colours would outline every change of sign.
        values = np.sign(values) * (0.4 + 0.6 * np.abs(values))
    laid = np.concatenate([paint(values, look.colors(signed=scale.signed), signed=scale.signed), weight], -1)
    if look.contour:
        black, white = outlined(relevance)
        laid[black], laid[white] = (0, 0, 0, 1), 1
    return laid


def outlined(relevance: Map) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The contour of what is most relevant: its black pixels, and within them its white ones.

    It is drawn around a fifth of the pixels, or around all relevant ones if they are fewer. NaN lies outside. Around
    single pixels, as gradients scatter them, there is none: it would hide the picture.

    Example:
        >>> black, white = outlined(np.array([[-1.0, 0.0, 0.0, 2.0, 2.0, 2.0]]))
        >>> black.astype(int).tolist(), white.astype(int).tolist()
        ([[0, 0, 1, 0, 0, 0]], [[0, 0, 0, 1, 0, 0]])
    """
    inside = relevance >= max(float(np.nanquantile(relevance, 1 - _OUTLINED)), np.finfo(float).tiny)
    width = max(round(max(inside.shape) / 400), 1)
    black, white = _grown(inside, width) & ~inside, _grown(~inside, width) & inside
    scattered = white.sum() > _SCATTERED * inside.sum()
    return black & ~scattered, white & ~scattered


def _grown(region: np.ndarray[Any, Any], steps: int) -> np.ndarray[Any, Any]:
    """A region with the pixels that are at most so many steps beside it."""
    for _ in range(steps):
        padded = np.pad(region, 1)
        region = region | padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
    return region


def faded(image: Picture, *, signed: bool = False) -> Picture:
    """The image as an overlay shows it where nothing is relevant: grey, so that colour means relevance alone.

    Lifted and flattened, so that a dark photograph stays readable and no white wall outshines what is relevant.
    """
    grey = np.repeat((image @ _GREY)[..., None], 3, -1)
    return np.asarray(0.25 + (0.65 if signed else 0.5) * grey)
