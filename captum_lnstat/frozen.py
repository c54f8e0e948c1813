"""Affine maps of the residual stream once LayerNorm statistics are frozen, and how a covector is pulled through them.

With its statistics frozen, ``LN(x) = gamma * (x - mean(x)) / sigma + beta`` is affine, and so is every other step
between an attention's output and the residual stream. For an affine ``f(x) = M x + b``,
``<u, f(x)> = <M^T u, x> + <u, b>``: ``pull(u)`` returns ``M^T u`` and ``<u, b>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.covector import Covector
from captum_lnstat.statistics import accumulation_dtype
from captum_lnstat.weights import writable

if TYPE_CHECKING:
    from jaxtyping import Float


class FrozenMap(Protocol):
    """An affine map on the channels of each token."""

    def pull(self, u: Covector) -> tuple[Covector, Float[Tensor, "batch place score"]]:
        """Return ``M^T u`` and ``<u_i, b>`` of every token that ``u`` is at."""
        ...


def per_image(values: Float[Tensor, "batch *rest"]) -> Float[Tensor, " batch"]:
    """Sum everything but the batch."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _nothing(u: Covector) -> Tensor:
    return u.scale.new_zeros(*u.scale.shape, u.scores)


@dataclass(frozen=True)
class FrozenLinear:
    """``f(x) = W x + b``."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None

    def pull(self, u: Covector) -> tuple[Covector, Tensor]:
        constant = _nothing(u) if self.bias is None else u.read_vector(self.bias)
        return u.with_directions(u.directions @ self.weight.detach().to(u.directions.dtype)), constant


@dataclass(frozen=True)
class FrozenScale:
    """``f(x) = gamma * x``: LayerScale, one ``gamma`` for all tokens, or a gate held constant, one for each."""

    gamma: Float[Tensor, "*batch_tokens channel"]

    def pull(self, u: Covector) -> tuple[Covector, Tensor]:
        gamma = self.gamma.detach().to(u.directions.dtype)
        scaled = u.with_directions(u.directions * gamma) if gamma.dim() <= 1 else u.times(gamma.flatten(1, -2))
        return scaled, _nothing(u)


@dataclass(frozen=True)
class FrozenNorm:
    """``f(x) = gamma * (x - mean(x)) / sigma + beta`` with ``sigma`` of the recorded token.

    The mean is part of the linear map (each part of ``x`` loses its own mean); only ``sigma`` is frozen.
    """

    deviation: Float[Tensor, "batch *tokens"]
    gamma: Tensor | None
    beta: Tensor | None

    def pull(self, u: Covector) -> tuple[Covector, Tensor]:
        constant = _nothing(u) if self.beta is None else u.read_vector(self.beta)
        scaled = u.directions if self.gamma is None else u.directions * self.gamma.detach().to(u.directions.dtype)
        centred = u.with_directions(scaled - scaled.mean(-1, keepdim=True))
        return centred.scaled(1 / self.deviation.flatten(1).to(u.scale.dtype)), constant


def pull_through(path: Iterable[FrozenMap], u: Covector) -> tuple[Covector, Float[Tensor, "batch place score"]]:
    """Pull ``u`` from the end of a path of maps to its beginning, collecting the constants of every token."""
    constant = _nothing(u)
    for step in reversed(list(path)):
        u, offset = step.pull(u)
        constant = constant + offset
    return u, constant


def returns_moments(x: Tensor) -> bool:
    """Whether the kernel of a LayerNorm gives mean and ``1 / sigma`` of every token of ``x`` in full precision."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


class FrozenLayerNorm(torch.autograd.Function):
    """``F.layer_norm`` in value; in the backward pass its standard deviation is a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.dims = dims = tuple(range(-len(shape), 0))
        if returns_moments(x):
            normed, _, inverse = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        else:
            normed = F.layer_norm(x, list(shape), weight, bias, eps)
            inverse = (x.detach().to(accumulation_dtype(x)).var(dims, correction=0, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(inverse, weight)
        return writable(normed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, weight = ctx.saved_tensors
        # With many scores at once this is large: no more copies of it than the one.
        scaled = gradient * inverse
        scaled = scaled if weight is None else scaled.mul_(weight)
        return scaled.sub_(scaled.mean(ctx.dims, keepdim=True)).to(gradient.dtype), None, None, None, None
