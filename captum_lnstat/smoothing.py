"""A grid seen a little out of focus: a weighted mean over the patches around each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def _axis(cells: int, sigma: float, like: Tensor) -> Float[Tensor, "cell cell"]:
    """Weights of all cells of one axis for the mean at each; every row sums to one, at the border too."""
    place = torch.arange(cells, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * ((place - place[:, None]) / sigma) ** 2)
    return weights / weights.sum(1, keepdim=True)


def smoothed(
    grid: Float[Tensor, "*batch row column"], sigma: tuple[float, float]
) -> Float[Tensor, "*batch row column"]:
    """Mean over the grid around every patch, weighted by a Gaussian of the distance.

    Args:
        grid: Values on the patch grid.
        sigma: Standard deviation in patches, down and across; more than zero.

    Returns:
        As large as ``grid``. Nothing beyond the border is invented: the weights of what is there sum to one.

    Example:
        >>> import torch
        >>> smoothed(torch.tensor([[[0.0, 1.0, 0.0]]]), (1.0, 0.5))
        tensor([[[0.1192, 0.7870, 0.1192]]])
    """
    rows, columns = _axis(grid.shape[-2], sigma[0], grid), _axis(grid.shape[-1], sigma[1], grid)
    return rows @ grid @ columns.T
