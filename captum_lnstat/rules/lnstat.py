"""The default rule: what counted in favour of the class."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.rules.evidence import Part, evidence
from captum_lnstat.rules.head import Head
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.walk import walk
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass

# Part of the map's side by which it is smoothed: half a patch of 14 x 14.
BLUR = 1 / 28


@register(
    "lnstat",
    formula="max(G, 0), G = E smoothed; with one grid, E of the upper third of the blocks",
    options=("residual", "head_fusion", "contrastive"),
    starts=False,
)
def lnstat(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``max(G, 0)`` with ``G`` the evidence ``E``, smoothed: what counted in favour of the class.

    Of the attention, evidence is what a token contributed beyond what the mean value would have. What counts against
    the class is left out, and so is what ended on prefix tokens or belongs to no token.

    Where all blocks see the same grid, only what the upper third of them contributed counts: what the lower blocks
    write is read by the blocks above them, and little of it by the head itself; but what a head that reads patch tokens
    finds there, beyond their mean, is put on them where they are. Through the lower blocks patches share by standard
    deviations, not by variances: less stays where it is, more goes to where it came from. Where stages merge, the lower
    ones alone know where things are: all blocks count, by variances.
    """
    trace = outcome.trace
    part = Part(_upper_third(trace, outcome.head), by_sigma=True) if trace.one_grid else Part()
    return in_favour(outcome, settings, part, BLUR)


def in_favour(outcome: Pass, settings: Settings, part: Part, blur: float) -> tuple[Relevance, ...]:
    """``max(G, 0)`` with ``G`` a part of the evidence, smoothed.

    Args:
        outcome: The traced forward pass.
        settings: As for ``lnstat``.
        part: Of the evidence.
        blur: The standard deviation, in parts of the map's side; 0 leaves it as it is.
    """
    e = walk(outcome.trace, settings, evidence(outcome.trace, outcome.head, settings, part))[0]
    g = torch.stack([one.grid for one in e])
    if blur:
        g = smoothed(g, (blur * g.shape[-2], blur * g.shape[-1]))
    prefix, nothing = torch.zeros_like(e[0].prefix), torch.zeros_like(e[0].padding)
    return tuple(Relevance(grid, prefix, nothing, nothing) for grid in g.clamp(min=0))


def _upper_third(trace: Trace, head: Head) -> int:
    """The first block of the model's upper third, counted from where the trace begins.

    A head that reads the stream at several places has that many models: those of the lowest counts.
    """
    whole = trace.blocks_below + head.lowest(trace)
    return max(0, 2 * whole // 3 - trace.blocks_below)


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
    rows, columns = (_axis(grid.shape[axis], sigma[axis], grid.dtype, grid.device) for axis in (-2, -1))
    return rows @ grid @ columns.T


@lru_cache(16)
@torch.inference_mode(False)
def _axis(cells: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "cell cell"]:
    """Weights of all cells of one axis for the mean at each; every row sums to one, at the border too."""
    place = torch.arange(cells, dtype=dtype, device=device)
    weights = torch.exp(-0.5 * ((place - place[:, None]) / sigma) ** 2)
    return weights / weights.sum(1, keepdim=True)
