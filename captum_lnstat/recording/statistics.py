"""Token statistics at the LayerNorms, and the residual and merging shares that follow from them.

A LayerNorm reads a token ``x`` only as ``(x - mean) / sigma``. The part of a sum ``x' = x + d`` that comes from ``x``
therefore survives in proportion to the spread of ``x`` and ``d`` over the channels, not to their length: the mean is
invisible to everything that reads the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


ResidualShare = Literal["deviation", "update", "ratio", "half"]
# A variance of so many of the smallest numbers is none.
NO_VARIANCE = 4


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Statistics and relevance are computed in float32, or in float64 for a float64 tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def stream(tokens: Tensor) -> Tensor:
    """The residual stream as (batch, token, channel), whatever its layout was, in the accumulation dtype."""
    return tokens.flatten(1, -2).to(accumulation_dtype(tokens))


@dataclass(frozen=True)
class TokenStatistics:
    """Mean and biased variance over the channels of each token, in float32 (float64 for a float64 model).

    Of an RMSNorm, which subtracts nothing: 0 and the mean square.
    """

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


def token_variance(
    x: Float[Tensor, "batch *tokens channel"], *, centred: bool = True
) -> Float[Tensor, "batch *tokens"]:
    """Biased variance of every token over its channels; if not ``centred``, its mean square."""
    return normalised(x, centred=centred)[1]


def mean_square(x: Float[Tensor, "*tokens channel"]) -> Float[Tensor, "*tokens"]:
    """Of every token over its channels: what an RMSNorm divides by, squared."""
    x = x.detach().to(accumulation_dtype(x))
    return torch.linalg.vecdot(x, x) / x.shape[-1]  # type: ignore[no-any-return]


def normalised(
    x: Float[Tensor, "batch *tokens channel"], *, centred: bool = True
) -> tuple[Float[Tensor, "batch *tokens channel"], Float[Tensor, "batch *tokens"]]:
    """``(x - mean) / sigma`` of every token over its channels, and its biased variance; zeros where that is zero.

    If not ``centred``, as an RMSNorm has it: ``x / rms`` and the mean square.

    Example:
        >>> import torch
        >>> normalised(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
        (tensor([[-1.,  1.],
                [ 0.,  0.]]), tensor([1., 0.]))
    """
    x = x.detach().to(accumulation_dtype(x))
    if not centred:
        square = F.threshold(mean_square(x), 2 * NO_VARIANCE * torch.finfo(x.dtype).tiny, 0.0)
        return x * torch.where(square > 0, square, torch.inf).rsqrt()[..., None], square
    direction, inverse = standardised(x)
    return direction, F.threshold(inverse.reciprocal().square(), 2 * NO_VARIANCE * torch.finfo(x.dtype).tiny, 0.0)


def standardised(
    x: Float[Tensor, "batch *tokens channel"], *, centred: bool = True
) -> tuple[Float[Tensor, "batch *tokens channel"], Float[Tensor, "batch *tokens"]]:
    """``(x - mean) / sigma`` of every token and ``1 / sigma``, which is large but finite where all channels are alike.

    If not ``centred``: ``x / rms`` and ``1 / rms``.
    """
    x = x.detach().to(accumulation_dtype(x))
    none = NO_VARIANCE * torch.finfo(x.dtype).tiny
    if not centred:
        inverse = (mean_square(x) + none).rsqrt()
        return x * inverse[..., None], inverse
    # The kernel of a LayerNorm reads the tokens once for all three; torch.var is several times slower.
    direction, _, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, none)
    return direction, inverse[..., 0]


def residual_shares(
    before: Float[Tensor, "batch token channel"],
    update: Float[Tensor, "batch token channel"],
    form: ResidualShare,
    *,
    centred: bool = True,
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]]:
    """Share of each token after an attention that is the token before it, between 0 and 1; and the rest.

    The rest is found for itself: of a share of all but nothing, the difference from one is rounding.

    Args:
        before: The residual stream ``x`` before the attention's update ``d`` is added.
        update: The update ``d``.
        form: ``"update"``: ``var(x) / (var(x) + var(d))``. ``"ratio"``: ``min(1, var(x) / var(x + d))``, from the
            statistics of the two LayerNorms that read the stream. ``"half"``: 1/2, as attention rollout assumes.
        centred: The norm that reads the stream subtracts the mean. An RMSNorm does not: mean squares, not variances.

    Returns:
        alpha and ``1 - alpha``, one value per token. A token of no variance at all, before and after, keeps half.
    """
    if form == "half":
        half = before.new_full(before.shape[:-1], 0.5, dtype=accumulation_dtype(before))
        return half, half
    own = token_variance(before, centred=centred)
    if form == "ratio":
        share = ratio_share(own, token_variance(before + update, centred=centred))
        return share, 1 - share
    if form == "update":
        other = token_variance(update, centred=centred)
        return update_share(own, other), update_share(other, own)
    raise ValueError(f"residual is {form!r}; expected 'ratio', 'update' or 'half'")


def ratio_share(own: Float[Tensor, "batch token"], joined: Float[Tensor, "batch token"]) -> Tensor:
    """``min(1, own / joined)``: the residual share from the variances at the two LayerNorms."""
    nothing_left = torch.where(own > 0, 1.0, 0.5).to(own.dtype)
    return torch.where(joined > 0, own / joined, nothing_left).clamp(max=1.0)


def shares_of_inverses(
    own: Float[Tensor, "*token"], update: Float[Tensor, "*token"]
) -> tuple[Float[Tensor, "*token"], Float[Tensor, "*token"]]:
    """``own / (own + update)`` and ``update / (own + update)`` of two variances, from ``1 / sigma`` of both.

    These are as ``standardised`` gives them.

    Example:
        >>> shares_of_inverses(torch.tensor([1.0]), torch.tensor([0.5]))
        (tensor([0.2000]), tensor([0.8000]))
    """
    squared = torch.stack([update, own]).square_()
    shares = squared.div_(squared.sum(0))
    share, rest = F.threshold(shares, torch.finfo(own.dtype).eps ** 4, 0.0)  # what has no variance has no share
    return share, rest


def update_share(own: Float[Tensor, "batch token"], update: Float[Tensor, "batch token"]) -> Tensor:
    """``own / (own + update)``: the residual share from the variances of a token and of what is added to it."""
    whole = own + update
    return torch.where(whole > 0, own / whole, 0.5)


def shares_by_sigma(
    own: Float[Tensor, "*any token"], update: Float[Tensor, "*any token"], tokens: slice
) -> tuple[Float[Tensor, "*any token"], Float[Tensor, "*any token"]]:
    """Of some tokens the shares of standard deviations, ``sigma / (sigma + sigma')``, from those of variances.

    Args:
        own: Shares of variances.
        update: The rest of each.
        tokens: Which; the others stay as they are.

    Example:
        >>> shares_by_sigma(torch.tensor([0.8, 0.8]), torch.tensor([0.2, 0.2]), slice(1, 2))
        (tensor([0.8000, 0.6667]), tensor([0.2000, 0.3333]))
    """
    sizes = own[..., tokens].sqrt(), update[..., tokens].sqrt()
    whole = sizes[0] + sizes[1]
    found = []
    for shares, size in zip((own, update), sizes, strict=True):
        parts = shares[..., : tokens.start], size / whole, shares[..., tokens.stop :]
        found.append(torch.cat([part for part in parts if part.shape[-1]], -1))
    return found[0], found[1]
