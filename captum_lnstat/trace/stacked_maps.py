"""The affine maps of several blocks at once: tokens have their block as the first dimension, and so have the maps.

A kernel that is launched costs a device the same for one block as for twelve. Each class does what the one of the same
name in ``trace.maps`` does, for cotangents of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class StackedMap(Protocol):
    """One affine map a block, on the channels of each token."""

    def pull_back(self, u: Float[Tensor, "block batch place out"], at: Tensor | None) -> Tensor:
        """Return ``M^T u_i`` of each of the tokens ``at``, all by default."""
        ...

    def offset(self, u: Float[Tensor, "block batch place out"]) -> Float[Tensor, "block batch place"] | None:
        """Return ``<u_i, b>`` of every one; ``None`` if there is no ``b``."""
        ...

    def apply(self, x: Float[Tensor, "block batch token in"]) -> Float[Tensor, "block batch token out"]:
        """Return ``M x + b``; a single token stands for all of them."""
        ...


def _each(x: Tensor, matrix: Float[Tensor, "block one other"]) -> Float[Tensor, "block batch token other"]:
    """``x`` times the matrix of its block; tokens that are the same for all blocks are given once."""
    flat = x.expand(len(matrix), *x.shape[1:]).flatten(1, 2)
    return torch.bmm(flat, matrix).view(len(matrix), *x.shape[1:3], -1)


@dataclass(frozen=True)
class _Linears:
    weight: Float[Tensor, "block out in"]
    bias: Float[Tensor, "block out"] | None

    def pull_back(self, u: Tensor, at: Tensor | None) -> Tensor:
        return _each(u, self.weight)

    def offset(self, u: Tensor) -> Tensor | None:
        return None if self.bias is None else _each(u, self.bias[..., None])[..., 0]

    def apply(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return _each(x, self.weight.mT)
        flat = x.expand(len(self.weight), *x.shape[1:]).flatten(1, 2)
        made = torch.baddbmm(self.bias[:, None], flat, self.weight.mT)
        return made.view(len(made), *x.shape[1:3], -1)


@dataclass(frozen=True)
class _Scales:
    gamma: Float[Tensor, "block channel"]

    def pull_back(self, u: Tensor, at: Tensor | None) -> Tensor:
        return u * self.gamma[:, None, None]

    def offset(self, u: Tensor) -> None:
        return None

    def apply(self, x: Tensor) -> Tensor:
        return x * self.gamma[:, None, None]


@dataclass(frozen=True)
class _Norms:
    deviation: Float[Tensor, "block batch token"]
    gamma: Float[Tensor, "block channel"] | None
    beta: Float[Tensor, "block channel"] | None
    centred: bool

    def _linear(self, x: Tensor, at: Tensor | None = None) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x / (self.deviation if at is None else self.deviation[..., at])[..., None]

    def pull_back(self, u: Tensor, at: Tensor | None) -> Tensor:
        return self._linear(u if self.gamma is None else u * self.gamma[:, None, None], at)

    def offset(self, u: Tensor) -> Tensor | None:
        return None if self.beta is None else _each(u, self.beta[..., None])[..., 0]

    def apply(self, x: Tensor) -> Tensor:
        y = self._linear(x)
        y = y if self.gamma is None else y * self.gamma[:, None, None]
        return y if self.beta is None else y + self.beta[:, None, None]


def stacked_path(paths: Sequence[tuple[FrozenMap, ...]], dtype: torch.dtype) -> tuple[StackedMap, ...] | None:
    """The paths of several blocks, map by map; ``None`` if they are not of the same maps.

    Example:
        >>> two = [(FrozenLinear(torch.eye(2)),), (FrozenLinear(2 * torch.eye(2)),)]
        >>> (linear,) = stacked_path(two, torch.float32)
        >>> linear.apply(torch.ones(1, 1, 1, 2)).flatten().tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    if len({len(path) for path in paths}) != 1:
        return None
    found = [_stacked(maps, dtype) for maps in zip(*paths, strict=True)]
    return None if any(one is None for one in found) else tuple(one for one in found if one is not None)


def _stacked(maps: Sequence[FrozenMap], dtype: torch.dtype) -> StackedMap | None:
    linears = [one for one in maps if type(one) is FrozenLinear]
    scales = [one for one in maps if type(one) is FrozenScale and one.gamma.dim() == 1]
    norms = [one for one in maps if type(one) is FrozenNorm]
    if len(linears) == len(maps):
        weights, biases = [one.weight for one in linears], [one.bias for one in linears]
        return _Linears(_joined(weights, dtype), _joined(biases, dtype)) if _alike(weights, biases) else None
    if len(scales) == len(maps):
        return _Scales(_joined([one.gamma for one in scales], dtype))
    if len(norms) == len(maps) and len({one.centred for one in norms}) == 1:
        gammas, betas = [one.gamma for one in norms], [one.beta for one in norms]
        deviations = [one.deviation.flatten(1) for one in norms]
        if _alike(deviations, gammas) and _alike(gammas, betas):
            own = _joined(deviations, dtype)
            return _Norms(own, _joined(gammas, dtype), _joined(betas, dtype), norms[0].centred)
    return None


def _alike(*several: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of each sequence have one shape, or are all missing."""
    return all(len({None if one is None else one.shape for one in tensors}) == 1 for tensors in several)


def _joined(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    # Where they are not all there, none is: ``_alike`` has seen to it.
    known = [tensor.detach() for tensor in tensors if tensor is not None]
    return torch.stack(known).to(dtype) if known else None  # type: ignore[return-value]


def pull_back_stacked(
    path: Sequence[StackedMap], u: Float[Tensor, "block batch place out"], at: Int[Tensor, " place"] | None = None
) -> tuple[Float[Tensor, "block batch place in"], Float[Tensor, "block batch place"] | None]:
    """``M^T u_i`` of the tokens ``at`` through the paths of all blocks, and ``<u_i, b>``, ``None`` for nothing."""
    constant: Tensor | None = None
    for one in reversed(path):
        offset = one.offset(u)
        constant = offset if constant is None else constant if offset is None else constant + offset
        u = one.pull_back(u, at)
    return u, constant


def turned_back(
    path: Sequence[StackedMap], u: Float[Tensor, "block batch place out"]
) -> Float[Tensor, "block batch place in"]:
    """``M^T u_i`` alone, of every token."""
    for one in reversed(path):
        u = one.pull_back(u, None)
    return u


def apply_stacked(path: Sequence[StackedMap], x: Float[Tensor, "block batch token in"]) -> Tensor:
    """Take ``x`` through the paths of all blocks."""
    for one in path:
        x = one.apply(x)
    return x
