"""From the patch grid to the pixels, keeping the sum."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

Interpolation = Literal["bilinear", "nearest"]
_MODES = {"bilinear": "linear", "nearest": "nearest-exact"}


def check_interpolation(interpolation: Interpolation) -> None:
    """Raise unless ``interpolation`` is known."""
    if not isinstance(interpolation, str) or interpolation not in _MODES:
        raise ValueError(f"interpolation is {interpolation!r}; expected {' or '.join(map(repr, _MODES))}")


def _axis(cells: int, cell: int, pixels: int, mode: str) -> Float[Tensor, "pixel cell"]:
    """How much of each cell's relevance every pixel of one image axis gets; each column sums to one."""
    weights = F.interpolate(torch.eye(cells, dtype=torch.float64, device="cpu")[None], size=cells * cell, mode=mode)[
        0
    ].T
    # An image padded to whole patches ends inside the last one: its relevance stays on the pixels that exist.
    weights = weights[:pixels]
    weights = weights / weights.sum(0, keepdim=True)
    # Pixels past the last whole patch, which an unpadded embedding never reads, get nothing.
    return F.pad(weights, (0, 0, 0, pixels - len(weights)))


def _axis_from(start: float, cells: int, cell: int, pixels: int, interpolation: str) -> Float[Tensor, "pixel cell"]:
    """The same for cells of which the first begins elsewhere than the image; one beside it is at its border."""
    place = (torch.arange(pixels, dtype=torch.float64, device="cpu") + 0.5 - start) / cell - 0.5
    apart = place[:, None].clamp(0, cells - 1) - torch.arange(cells, device="cpu")
    weights = (1 - apart.abs()).clamp(min=0) if interpolation == "bilinear" else ((apart + 0.5) // 1 == 0).double()
    weights = weights * ((place >= -0.5) & (place <= cells - 0.5))[:, None]
    middles = (start + cell * (torch.arange(cells, device="cpu") + 0.5) - 0.5).round().long().clamp(0, pixels - 1)
    for beside in (weights.sum(0) == 0).nonzero()[:, 0].tolist():
        weights[middles[beside], beside] = 1
    return weights / weights.sum(0, keepdim=True)


@lru_cache(32)
@torch.inference_mode(False)
def _weights(
    start: float, cells: int, cell: int, pixels: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "pixel cell"]:
    """Those of one axis, where they are needed."""
    found = _axis_from(start, cells, cell, pixels, mode) if start else _axis(cells, cell, pixels, _MODES[mode])
    return found.to(device, dtype)


def to_pixels(
    grid: Float[Tensor, "batch *grid"],
    image_size: tuple[int, ...],
    patch: tuple[int, ...],
    interpolation: Interpolation = "bilinear",
    origin: tuple[float, ...] = (),
) -> Float[Tensor, "batch *pixels"]:
    """Spread the relevance of every patch over pixels; the sum over an image stays that of its grid.

    Args:
        grid: Relevance on the patch grid; that of videos has its frames first.
        image_size: Height and width of the image in pixels; frames, height and width of a video.
        patch: Height and width of a patch in pixels; frames, height and width of one of a video.
        interpolation: ``"nearest"``: evenly over the patch. ``"bilinear"``: with the weights of bilinear
            interpolation between patch centres. Over the frames of a patch always evenly.
        origin: Where the first patch begins, in pixels, if not where the image does.

    Example:
        >>> import torch
        >>> to_pixels(torch.tensor([[[4.0, 0.0]]]), (2, 4), (2, 2), "nearest")[0]
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.]])
    """
    modes = [interpolation if axis >= len(patch) - 2 else "nearest" for axis in range(len(patch))]
    axes = zip(origin or (0,) * len(patch), grid.shape[1:], patch, image_size, modes, strict=True)
    spread = [_weights(*axis, grid.dtype, grid.device) for axis in axes]
    if len(patch) == 3:
        grid = torch.einsum("ft,btrc->bfrc", spread[0], grid)
    return spread[-2] @ grid @ spread[-1].T
