"""The default rule: what the model looked at, and what counted in favour of the class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.rules.evidence import evidence
from captum_lnstat.rules.perception import perception
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.walk import walk

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass

# What is left of the weight of a patch that was looked at less than the average one.
FAINT = 20


@register(
    "lnstat",
    formula="max(P - mean P, P / 20) * max(G - median G, 0) in units of the score, G = E smoothed",
    options=("residual", "evidence_residual", "head_fusion", "contrastive"),
)
def lnstat(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``max(P - mean P, P / 20) * max(G - median G, 0)``, scaled to the sum of ``max(G - median G, 0)``.

    ``G`` is the evidence ``E``, smoothed.
    What the model looked at more than at the average patch, and counted in favour of the class more than around a
    typical patch, in units of the score. Evidence is put on the token that a term of the score came from, which had
    mixed with its neighbours by then: it is known no finer than a token of the last stage, so it is smoothed by a
    quarter of its side, by one patch at least. Where exactly the model looked is for ``P`` to say. A patch that was
    looked at less keeps a twentieth of its weight, so that a class that only such patches argue for still gets a map.
    """
    trace = outcome.trace
    (p,), e = walk(trace, settings, perception(trace, settings), evidence(trace, outcome.head, settings))
    sigma = max(1.0, trace.grain[0] / 4), max(1.0, trace.grain[1] / 4)
    grids = _both(p.grid, torch.stack([one.grid for one in e]), sigma)
    prefix, nothing = torch.zeros_like(e[0].prefix), torch.zeros_like(e[0].padding)
    return tuple(Relevance(grid, prefix, nothing, nothing) for grid in grids)


def _both(
    p: Float[Tensor, "batch row column"], e: Float[Tensor, "score batch row column"], sigma: tuple[float, float]
) -> Float[Tensor, "score batch row column"]:
    attention = torch.maximum(p - p.mean((1, 2), keepdim=True), p / FAINT)
    g = smoothed(e, sigma)
    favour = (g - g.flatten(2).median(2).values[..., None, None]).clamp(min=0)
    product = attention * favour
    total = product.sum((2, 3), keepdim=True)
    return torch.where(total > 0, product * favour.sum((2, 3), keepdim=True) / total, product)


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


def _axis(cells: int, sigma: float, like: Tensor) -> Float[Tensor, "cell cell"]:
    """Weights of all cells of one axis for the mean at each; every row sums to one, at the border too."""
    place = torch.arange(cells, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * ((place - place[:, None]) / sigma) ** 2)
    return weights / weights.sum(1, keepdim=True)
