"""From the patch grid to the pixels, keeping the sum."""

from __future__ import annotations

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


def to_pixels(
    grid: Float[Tensor, "batch *grid"],
    image_size: tuple[int, ...],
    patch: tuple[int, ...],
    interpolation: Interpolation = "bilinear",
) -> Float[Tensor, "batch *pixels"]:
    """Spread the relevance of every patch over pixels; the sum over an image stays that of its grid.

    Args:
        grid: Relevance on the patch grid; that of videos has its frames first.
        image_size: Height and width of the image in pixels; frames, height and width of a video.
        patch: Height and width of a patch in pixels; frames, height and width of one of a video.
        interpolation: ``"nearest"``: evenly over the patch. ``"bilinear"``: with the weights of bilinear
            interpolation between patch centres. Over the frames of a patch always evenly.

    Example:
        >>> import torch
        >>> to_pixels(torch.tensor([[[4.0, 0.0]]]), (2, 4), (2, 2), "nearest")[0]
        tensor([[1., 1., 0., 0.],
                [1., 1., 0., 0.]])
    """
    mode = _MODES[interpolation]
    rows = _axis(grid.shape[-2], patch[-2], image_size[-2], mode).to(grid)
    columns = _axis(grid.shape[-1], patch[-1], image_size[-1], mode).to(grid)
    if len(patch) == 3:
        frames = _axis(grid.shape[1], patch[0], image_size[0], _MODES["nearest"]).to(grid)
        grid = torch.einsum("ft,btrc->bfrc", frames, grid)
    return rows @ grid @ columns.T
