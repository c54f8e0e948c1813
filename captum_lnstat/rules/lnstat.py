"""A grid seen a little out of focus: a weighted mean over the patches around each patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.rules.evidence import _Evidence
from captum_lnstat.rules.perception import _Perception
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import _walk
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.trace import Trace

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


# What is left of the weight of a patch that was looked at less than the average one.
FAINT = 20


def lnstat(
    trace: Trace, u: Cotangent, constant: Tensor, settings: Settings
) -> tuple[tuple[Relevance, ...], tuple[Relevance, ...]]:
    """``max(P - mean P, P / 20) * max(G - median G, 0)``, scaled to the sum of ``max(G - median G, 0)``.

    ``G`` is the evidence ``E``, smoothed.
    What the model looked at more than at the average patch, and counted in favour of the class more than around a
    typical patch, in units of the score. Evidence is put on the token that said it, which has heard from its
    neighbours: it is known no finer than a token of the last stage, so it is smoothed by a quarter of its side, by one
    patch at least. Where exactly it was looked is for ``P`` to say. A patch that was looked at less keeps a twentieth
    of its weight, so that a class that is argued for only there still gets a map.

    Returns:
        For every score the relevance, and for every score the evidence it was made of.
    """
    looked, argued = _Perception(trace, settings), _Evidence(u, constant, settings)
    _walk(trace, [looked, argued], settings)
    (seen,), said = looked.row.relevance(trace), argued.at_the_image(trace)
    prefix, nothing = torch.zeros_like(said[0].prefix), torch.zeros_like(said[0].padding)
    sigma = max(1.0, trace.grain[0] / 4), max(1.0, trace.grain[1] / 4)
    grids = _both(seen.grid, torch.stack([one.grid for one in said]), sigma)
    return tuple(Relevance(grid, prefix, nothing, nothing) for grid in grids), said


def _both(
    seen: Float[Tensor, "batch row column"], said: Float[Tensor, "score batch row column"], sigma: tuple[float, float]
) -> Float[Tensor, "score batch row column"]:
    attention = torch.maximum(seen - seen.mean((1, 2), keepdim=True), seen / FAINT)
    around = smoothed(said, sigma)
    favour = (around - around.flatten(2).median(2).values[..., None, None]).clamp(min=0)
    product = attention * favour
    total = product.sum((2, 3), keepdim=True)
    return torch.where(total > 0, product * favour.sum((2, 3), keepdim=True) / total, product)
