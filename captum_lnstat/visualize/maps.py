"""From tensors to what is drawn: pictures with values from 0 to 1, maps of one value a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    Picture = Float[np.ndarray, "height width 3"]
    Map = Float[np.ndarray, "height width"]


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
