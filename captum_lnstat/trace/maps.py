"""Affine maps of the residual stream once LayerNorm statistics are frozen; how a cotangent is pulled back through them.

With its statistics frozen, ``LN(x) = gamma * (x - mean(x)) / sigma + beta`` is affine, and so is every other step
between an attention's output and the residual stream. For an affine ``f(x) = M x + b``,
``<u, f(x)> = <M^T u, x> + <u, b>``: ``pull_back(u)`` returns ``M^T u`` and ``<u, b>``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.recording.recording import NormCall
from captum_lnstat.trace.cotangent import Cotangent, PullBack

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class FrozenMap(Protocol):
    """An affine map on the channels of each token."""

    def pull_back(self, u: Cotangent) -> tuple[Cotangent, Float[Tensor, "batch place score"] | None]:
        """Return ``M^T u``, and ``<u_i, b>`` of every token that ``u`` is at, ``None`` if there is no ``b``."""
        ...

    def pull_back_each(self, u: Float[Tensor, "batch place out"], at: Tensor | None) -> Tensor:
        """Return ``M^T u_i`` where each of the tokens ``at`` (all by default) has a cotangent of its own."""
        ...

    def apply(self, x: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token out"]:
        """Return ``M x + b``; a single token stands for all of them."""
        ...


def _of(tokens: Tensor, at: Tensor | None) -> Tensor:
    return tokens if at is None else tokens[:, at]


@dataclass(frozen=True)
class FrozenLinear:
    """``f(x) = W x + b``."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None

    def pull_back(self, u: Cotangent) -> tuple[Cotangent, Tensor | None]:
        constant = None if self.bias is None else u.read_vector(self.bias)
        return u.with_directions(u.directions @ self.weight.detach().to(u.directions.dtype)), constant

    def pull_back_each(self, u: Tensor, at: Tensor | None) -> Tensor:
        return u @ self.weight.detach().to(u.dtype)

    def apply(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        return F.linear(x, self.weight.detach().to(x.dtype), bias)


@dataclass(frozen=True)
class FrozenScale:
    """``f(x) = gamma * x``: LayerScale, one ``gamma`` for all tokens, or a gate held constant, one for each."""

    gamma: Float[Tensor, "*batch_tokens channel"]

    def pull_back(self, u: Cotangent) -> tuple[Cotangent, None]:
        gamma = self.gamma.detach().to(u.directions.dtype)
        scaled = u.with_directions(u.directions * gamma) if gamma.dim() <= 1 else u.times(gamma.flatten(1, -2))
        return scaled, None

    def pull_back_each(self, u: Tensor, at: Tensor | None) -> Tensor:
        gamma = self.gamma.detach().to(u.dtype)
        return u * (gamma if gamma.dim() <= 1 else _of(gamma.flatten(1, -2), at))

    def apply(self, x: Tensor) -> Tensor:
        gamma = self.gamma.detach().to(x.dtype)
        return x * (gamma if gamma.dim() <= 1 else gamma.flatten(1, -2))


@dataclass(frozen=True)
class FrozenNorm:
    """``f(x) = gamma * (x - mean(x)) / sigma + beta`` with ``sigma`` of the recorded token.

    The mean is part of the linear map (each part of ``x`` loses its own mean); only ``sigma`` is frozen. An RMSNorm
    subtracts none, and ``sigma`` is its root mean square.
    """

    deviation: Float[Tensor, "batch *tokens"]
    gamma: Tensor | None
    beta: Tensor | None
    centred: bool = True

    @classmethod
    def of(cls, norm: NormCall) -> FrozenNorm:
        """A recorded norm as an affine map, its standard deviation held constant."""
        return cls((norm.statistics.variance + norm.eps).sqrt(), norm.weight, norm.bias, norm.centred)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def pull_back(self, u: Cotangent) -> tuple[Cotangent, Tensor | None]:
        constant = None if self.beta is None else u.read_vector(self.beta)
        scaled = u.directions if self.gamma is None else u.directions * self.gamma.detach().to(u.directions.dtype)
        centred = u.with_directions(self._centre(scaled))
        return centred.scaled(1 / self.deviation.flatten(1).to(u.scale.dtype)), constant

    def pull_back_each(self, u: Tensor, at: Tensor | None) -> Tensor:
        scaled = u if self.gamma is None else u * self.gamma.detach().to(u.dtype)
        return self._centre(scaled) / _of(self.deviation.flatten(1).to(u.dtype), at)[..., None]

    def apply(self, x: Tensor) -> Tensor:
        y = self._centre(x) / self.deviation.flatten(1).to(x.dtype)[..., None]
        y = y if self.gamma is None else y * self.gamma.detach().to(x.dtype)
        return y if self.beta is None else y + self.beta.detach().to(x.dtype)


def pull_back(path: Iterable[FrozenMap], u: Cotangent) -> tuple[Cotangent, Float[Tensor, "batch place score"]]:
    """Pull ``u`` from the end of a path of maps to its beginning, collecting the constants of every token."""
    start, constant = u, None
    for step in reversed(list(path)):
        u, offset = step.pull_back(u)
        constant = offset if constant is None else constant if offset is None else constant + offset
    if constant is None:
        constant = start.scale.new_zeros(*start.scale.shape, start.scores)
    return u, constant


def pull_back_each(
    path: Iterable[FrozenMap], u: Float[Tensor, "batch place out"], at: Int[Tensor, " place"] | None = None
) -> Float[Tensor, "batch place channel"]:
    """Pull a cotangent of its own for each of the tokens ``at`` from the end of a path to its beginning."""
    for step in reversed(list(path)):
        u = step.pull_back_each(u, at)
    return u


def apply(path: Iterable[FrozenMap], x: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token out"]:
    """Take ``x`` from the beginning of a path of maps to its end."""
    for step in path:
        x = step.apply(x)
    return x


def pulled_through(*path: FrozenMap) -> PullBack:
    """The pull-back of a step that is a path of maps, with the constants of all tokens added up."""

    def pull(u: Cotangent) -> tuple[Cotangent, Tensor]:
        before, constant = pull_back(path, u)
        return before, constant.sum(1)

    return pull
