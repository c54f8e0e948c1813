"""A video and its map: frames beside each other, their overlays below, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from captum_lnstat.visualize.canvas import Bar, Row, draw_rows
from captum_lnstat.visualize.colors import Scale, overlay
from captum_lnstat.visualize.maps import to_map, to_picture

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.visualize.maps import Map, Picture

# More columns than these are too small to read.
_FRAMES = 8


def frame_sheet(
    inputs: Float[Tensor, "channel frame height width"],
    attribution: Float[Tensor, "channel frame height width"],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
    *,
    signed: bool = False,
    most: int = _FRAMES,
) -> Figure:
    """The frames of one video, and the map laid over each.

    Args:
        inputs: The video, normalised for the model, channels first; ``inputs.transpose(0, 1)`` of a model that takes
            the frames first. Three channels, or one.
        attribution: Of the video, of the same shape.
        mean: Mean of every channel that the transform subtracted.
        std: Deviation of every channel that it divided by.
        title: Shown above.
        signed: The rule was ``"evidence"``.
        most: So many frames are shown at most, evenly spaced, the first and the last among them.

    Returns:
        A figure of two rows; ``write_figure`` saves it. All frames are on one scale, so that a frame without anything
        relevant stays dark.

    Raises:
        ValueError: Not one video and its attribution, or as for ``overlay``.

    Example:
        >>> import torch
        >>> video = torch.rand(3, 4, 16, 16)
        >>> len(frame_sheet(video, video, (0, 0, 0), (1, 1, 1), "a video of itself", most=2).axes)
        5
    """
    if inputs.dim() != 4 or inputs.shape != attribution.shape or len(inputs) not in (1, 3) or most < 1:
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)}, attribution {tuple(attribution.shape)}, most is {most}; expected "
            "(3, frame, height, width), or one channel, for both, and at least one frame"
        )
    count = inputs.shape[1]
    shown = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    maps: list[Map] = [to_map(attribution[:, frame]) for frame in range(count)]
    scale = Scale.of(maps, signed=signed)
    pictures: list[Picture] = [to_picture(inputs[:, frame].expand(3, -1, -1), mean, std) for frame in shown]
    overlays = [overlay(picture, maps[frame], scale=scale) for picture, frame in zip(pictures, shown, strict=True)]
    rows = [Row("frames", tuple(pictures)), Row("relevance", tuple(overlays), Bar.of(scale), "one scale for all")]
    return draw_rows(rows, title, titles=[f"frame {frame}" for frame in shown])
