"""Token statistics at the LayerNorms, and the residual and merging shares that follow from them.

A LayerNorm reads a token ``x`` only as ``(x - mean) / sigma``. The part of a sum ``x' = x + d`` that comes from ``x``
therefore survives in proportion to the spread of ``x`` and ``d`` over the channels, not to their length: the mean is
invisible to everything that reads the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.trace import Merging

ResidualShare = Literal["ratio", "update", "half"]
MergingShare = Literal["uniform", "variance"]


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Statistics and relevance are computed in float32, or in float64 for a float64 tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def stream(tokens: Tensor) -> Tensor:
    """The residual stream as (batch, token, channel), whatever its layout was, in the accumulation dtype."""
    return tokens.flatten(1, -2).to(accumulation_dtype(tokens))


@dataclass(frozen=True)
class TokenStatistics:
    """Mean and biased variance over the channels of each token, in float32 (float64 for a float64 model)."""

    mean: Float[Tensor, "batch *tokens"]
    variance: Float[Tensor, "batch *tokens"]

    def flat(self) -> TokenStatistics:
        """The tokens in one dimension, ``(batch, token)``."""
        return TokenStatistics(self.mean.flatten(1), self.variance.flatten(1))


def token_statistics(x: Float[Tensor, "batch *tokens channel"], channel_dims: int = 1) -> TokenStatistics:
    """Mean and biased variance of every token over its last ``channel_dims`` dimensions.

    Example:
        >>> import torch
        >>> statistics = token_statistics(torch.tensor([[1.0, 3.0]]))
        >>> statistics.mean, statistics.variance
        (tensor([2.]), tensor([1.]))
    """
    dims = tuple(range(-channel_dims, 0))
    variance, mean = torch.var_mean(x.detach().to(accumulation_dtype(x)), dims, correction=0)
    return TokenStatistics(mean, variance)


def token_variance(x: Float[Tensor, "batch *tokens channel"]) -> Float[Tensor, "batch *tokens"]:
    """Biased variance of every token over its channels."""
    return token_statistics(x).variance


def residual_share(
    before: Float[Tensor, "batch token channel"],
    update: Float[Tensor, "batch token channel"],
    form: ResidualShare,
) -> Float[Tensor, "batch token"]:
    """Share of each token after an attention that is the token before it, between 0 and 1.

    Args:
        before: The residual stream ``x`` before the attention's update ``d`` is added.
        update: The update ``d``.
        form: ``"ratio"``: ``min(1, var(x) / var(x + d))``, from the statistics of the two LayerNorms that read the
            stream. ``"update"``: ``var(x) / (var(x) + var(d))``. ``"half"``: 1/2, as attention rollout assumes.

    Returns:
        alpha, one value per token. A token of no variance at all, before and after, keeps half.
    """
    if form == "half":
        return before.new_full(before.shape[:-1], 0.5, dtype=accumulation_dtype(before))
    own = token_variance(before)
    if form == "ratio":
        return ratio_share(own, token_variance(before + update))
    if form == "update":
        return _share(own, own + token_variance(update))
    raise ValueError(f"residual is {form!r}; expected 'ratio', 'update' or 'half'")


def ratio_share(own: Float[Tensor, "batch token"], joined: Float[Tensor, "batch token"]) -> Tensor:
    """``min(1, own / joined)``: the residual share from the variances at the two LayerNorms."""
    return _share(own, joined).clamp(max=1.0)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, torch.where(part > 0, 1.0, 0.5).to(part.dtype))


def merging_share(merging: Merging, form: MergingShare) -> Float[Tensor, "batch parent child"]:
    """Share of a merged token that each of its four children gets; padded children get none.

    Args:
        merging: The patch merging.
        form: ``"uniform"``: the same for every child. ``"variance"``: the child's share of the variance that the
            merging's LayerNorm divides by. Where the norm reads the joined children (Swin v1) that is the sum of
            ``(x_kc - mean)^2`` over the child's channels; where it reads the parent (Swin v2), the variance of the
            child's part ``W_k x_k`` of it.
    """
    index = merging.groups.index
    real = (index >= 0).to(accumulation_dtype(merging.children))
    batch = len(merging.children)
    if form == "uniform":
        weight = real.expand(batch, -1, -1)
    elif form == "variance":
        gathered = merging.groups.gather(merging.children)
        children = gathered.reshape(batch, -1, *gathered.shape[1:])
        if merging.norm_first:
            centred = children - children.mean((-2, -1), keepdim=True)
            weight = torch.linalg.vecdot(centred, centred) * real
        else:
            weights = merging.reduction.to(children.dtype).reshape(len(merging.reduction), index.shape[1], -1)
            weight = token_variance(torch.einsum("bpkc,okc->bpko", children, weights)) * real
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, real)
    else:
        raise ValueError(f"merging is {form!r}; expected 'uniform' or 'variance'")
    return weight / weight.sum(-1, keepdim=True)
