"""Cotangents of tokens in the form in which they stay small: few directions, a factor for every token.

At a head that reads a mean of normalised tokens every token has the same cotangent but for its ``1 / sigma``; a head
that reads the class token leaves all others without one. Both stay so through blocks (the cotangent of a stream is the
same above and below a residual block), and each patch merging makes four directions of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.layout import PADDING, Groups
from captum_lnstat.recording.devices import has_a_queue

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# So many units of rounding apart, two cotangents are the same direction.
SAME_DIRECTION = 64


@dataclass(frozen=True)
class Cotangent:
    """``u_i = scale_i * directions[kind_i]`` for the tokens ``at``, nothing for the others; for one score or several.

    Attributes:
        at: The tokens that have one, ascending.
        scale: A factor for each of them.
        directions: The directions, for every score.
        kind: Which direction each of the tokens has.
        tokens: How many tokens there are.
    """

    at: Int[Tensor, " place"]
    scale: Float[Tensor, "batch place"]
    directions: Float[Tensor, "batch kind score channel"]
    kind: Int[Tensor, " place"]
    tokens: int

    @classmethod
    def of(cls, u: Float[Tensor, "batch token score channel"]) -> Cotangent:
        """The same cotangents, in as few directions as there are: one if all are parallel, else one a token."""
        return cls.of_parts([u])

    @classmethod
    def of_parts(cls, parts: Iterable[Float[Tensor, "batch token some_scores channel"]]) -> Cotangent:
        """As ``of``, from the cotangents of some scores after those of others; each part is read as it comes."""
        known: list[Cotangent] = []
        coming = iter(parts)
        for u in coming:
            if has_a_queue(u.device):  # which tokens have one, and whether they are parallel, would have to be read
                return cls.written_out(torch.cat([u, *coming], 2))
            known.append(cls._of_part(u, known[-1] if known else None))
        first = known[0]
        if all(part._differs_in_directions_only(first) for part in known[1:]):
            return first.with_directions(torch.cat([part.directions for part in known], 2))
        at = torch.unique(torch.cat([part.at for part in known]))
        u = torch.cat([part.spread(part.dense())[:, at] for part in known], 2)
        return cls._parallel(at, u, first.tokens) or cls._apart(at, u, first.tokens)

    @classmethod
    def written_out(cls, u: Float[Tensor, "batch token score channel"]) -> Cotangent:
        """One direction a token, whatever they are."""
        every, one = _counted(u.shape[1], u.device), _ones(u.dtype, u.device)
        found = cls(every, one.expand(u.shape[:2]), u, every, u.shape[1])
        found.__dict__["everywhere_dense"] = u  # as ``cached_property`` would have it
        return found

    @classmethod
    def _of_part(cls, u: Tensor, like: Cotangent | None) -> Cotangent:
        """In one direction at the tokens and with the scale that are known, if that is what it is."""
        some = u.abs().amax((2, 3)).ne(0).any(0)  # much faster than to compare every number
        at, tokens = some.nonzero()[:, 0], len(some)
        u = u if len(at) == tokens else u[:, at]
        if len(at) < 2:
            return cls._apart(at, u, tokens)
        if like is not None and like.kinds == 1 and torch.equal(like.at, at):
            # The same token as that of the other parts, where the scale is 1.
            one = like.with_directions(u[torch.arange(len(u), device=u.device), like._longest][:, None])
            if one._is(u):
                return one
        return cls._parallel(at, u, tokens) or cls._apart(at, u, tokens)

    @classmethod
    def _apart(cls, at: Tensor, u: Tensor, tokens: int) -> Cotangent:
        return cls(at, u.new_ones(u.shape[:2]), u, torch.arange(len(at), device=u.device), tokens)

    @classmethod
    def _parallel(cls, at: Tensor, u: Tensor, tokens: int) -> Cotangent | None:
        if len(at) < 2:
            return None
        flat = u.flatten(2)
        longest = flat.square().sum(-1).argmax(1)
        one = flat[torch.arange(len(flat), device=u.device), longest]
        # In float64: the rounding of long sums would look like another direction.
        exact = one.double()
        length = exact.square().sum(-1, keepdim=True)
        scale = torch.where(length > 0, (flat.double() @ exact[..., None])[..., 0] / length, 0).to(u.dtype)
        found = cls(at, scale, one.reshape(len(u), 1, *u.shape[2:]), torch.zeros_like(at), tokens)
        return found if found._is(u) else None

    def _is(self, u: Float[Tensor, "batch place score channel"]) -> bool:
        """Whether the one direction is that of every token, but for rounding."""
        apart = torch.addcmul(u, self.scale[..., None, None], self.directions, value=-1).abs_().amax((2, 3))
        allowed = SAME_DIRECTION * torch.finfo(u.dtype).eps * self.scale.abs() * self.directions.abs().amax((2, 3))
        return not bool((apart > allowed).any())

    def _differs_in_directions_only(self, other: Cotangent) -> bool:
        same = ((self.at, other.at), (self.kind, other.kind), (self.scale, other.scale))
        return all(torch.equal(one, another) for one, another in same)

    @property
    def _longest(self) -> Int[Tensor, " batch"]:
        """The token at which a cotangent of one direction is that direction itself."""
        return (self.scale - 1).abs().argmin(1)

    @property
    def everywhere(self) -> bool:
        """Every token has one."""
        return len(self.at) == self.tokens

    @property
    def kinds(self) -> int:
        """How many directions there are."""
        return self.directions.shape[1]

    @property
    def scores(self) -> int:
        """How many scores there are."""
        return self.directions.shape[2]

    @cached_property
    def _by_kind(self) -> tuple[Tensor, Tensor] | None:
        """The order in which tokens of a kind stand together and the way back, if there are as many of every kind."""
        if not self.kinds:
            return None
        counts = torch.bincount(self.kind, minlength=self.kinds)
        if bool((counts != counts[0]).any()):
            return None
        order = self.kind.argsort(stable=True)
        return order, order.argsort()

    @cached_property
    def _of_places(self) -> Float[Tensor, "batch place channel"]:
        """Each token's direction, of the one score there is: read with in every block of a stage."""
        return self.directions[:, :, 0].index_select(1, self.kind)

    def dense(self) -> Float[Tensor, "batch place score channel"]:
        """The cotangents of the tokens ``at``, written out."""
        return self.directions.index_select(1, self.kind).mul_(self.scale[..., None, None])

    @cached_property
    def everywhere_dense(self) -> Float[Tensor, "batch token score channel"]:
        """Those of all tokens, written out."""
        return self.spread(self.dense())

    def read(
        self, x: Float[Tensor, "batch token channel"], before: Float[Tensor, "batch token channel"] | None = None
    ) -> Float[Tensor, "batch place score"]:
        """``<u_i, x_i>`` of the tokens ``at``, or ``<u_i, x_i - before_i>``."""
        x = x if self.everywhere else x[:, self.at]
        if before is not None:
            x = x - (before if self.everywhere else before[:, self.at])
        if self.everywhere and self.kinds == self.tokens and self.scores == 1:
            return (x * self.everywhere_dense[:, :, 0]).sum(-1, keepdim=True)
        if self.kinds == 1:
            product = x @ self.directions[:, 0].transpose(-2, -1)
        elif self.scores == 1:
            product = torch.linalg.vecdot(x, self._of_places)[..., None]
        elif self._by_kind is not None:
            # As many tokens of every kind: one product for all of them.
            order, back = self._by_kind
            sorted_x = x[:, order].reshape(len(x), self.kinds, -1, x.shape[-1])
            product = (sorted_x @ self.directions.transpose(-2, -1)).flatten(1, 2)[:, back]
        else:
            product = x.new_empty(*x.shape[:2], self.scores)
            for kind in range(self.kinds):
                its = (self.kind == kind).nonzero()[:, 0]
                product[:, its] = x[:, its] @ self.directions[:, kind].transpose(-2, -1)
        return self.scale[..., None] * product

    def reads(self) -> Bool[Tensor, "batch token"]:
        """Which tokens have one that is not zero, image by image."""
        some = self.directions.ne(0).flatten(2).any(-1)[:, self.kind] & self.scale.ne(0)
        return self.spread(some[..., None])[..., 0]

    def unread(self) -> Bool[Tensor, "batch score"]:
        """The scores that have none at any token: they have no gradient there."""
        some = self.directions.ne(0).any(-1)[:, self.kind] & self.scale.ne(0)[..., None]
        return ~some.any(1)

    def read_vector(self, b: Float[Tensor, " channel"]) -> Float[Tensor, "batch place score"]:
        """``<u_i, b>``: the same vector at every token, such as a bias."""
        return self.scale[..., None] * (self.directions @ b.detach().to(self.scale.dtype))[:, self.kind]

    def spread(self, values: Float[Tensor, "batch place rest"]) -> Float[Tensor, "batch token rest"]:
        """Values at the tokens ``at``, zero at the others."""
        if self.everywhere:
            return values
        out = values.new_zeros(len(values), self.tokens, *values.shape[2:])
        out[:, self.at] = values
        return out

    def plus(self, other: Cotangent) -> Cotangent:
        """The sum of two, of the same tokens and scores."""
        return Cotangent.of(self.spread(self.dense()) + other.spread(other.dense()))

    def with_directions(self, directions: Tensor) -> Cotangent:
        """Other directions, in other channels perhaps."""
        return replace(self, directions=directions)

    def scaled(self, factor: Float[Tensor, "batch token"]) -> Cotangent:
        """Each token's cotangent times a number."""
        return replace(self, scale=self.scale * (factor if self.everywhere else factor[:, self.at]))

    def times(self, factor: Float[Tensor, "batch token channel"]) -> Cotangent:
        """Each token's cotangent times a vector of its own, channel by channel."""
        factor = factor if self.everywhere else factor[:, self.at]
        kind = torch.arange(len(self.at), device=self.at.device)
        return replace(self, directions=self.dense() * factor[:, :, None], scale=torch.ones_like(self.scale), kind=kind)


@lru_cache(64)
@torch.inference_mode(False)
def _counted(count: int, device: torch.device) -> Int[Tensor, " place"]:
    return torch.arange(count, device=device)


@lru_cache(16)
@torch.inference_mode(False)
def _ones(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "1 1"]:
    return torch.ones(1, 1, dtype=dtype, device=device)


# From the cotangent after a step to the cotangent before it and the constant, ``(batch, score)``.
PullBack = Callable[[Cotangent], tuple[Cotangent, Tensor]]


def to_children(joined: Cotangent, groups: Groups) -> Cotangent:
    """From the cotangents of joined children, ``(child, channel)`` flat, to those of the children.

    Every direction becomes one for each of the places in a group. They are numbered as they first appear, row by row:
    those that a row of windows has are neighbours then.
    """
    members = groups.index.shape[1]
    batch, kinds, scores, _ = joined.directions.shape
    channels = joined.directions.shape[-1] // members
    if joined.kinds == joined.tokens and groups.place_of_token is not None:
        each = joined.everywhere_dense.reshape(batch, -1, scores, members, channels).transpose(2, 3).flatten(1, 2)
        return Cotangent.written_out(each.index_select(1, groups.place_of_token))
    split = joined.directions.reshape(batch, kinds, scores, members, channels).transpose(2, 3)
    parents = groups.index[joined.at]  # (place, member)
    real = parents != PADDING
    at, order = parents[real].sort()
    kind = (joined.kind[:, None] * members + torch.arange(members, device=at.device))[real][order]
    scale = joined.scale[:, :, None].expand(-1, -1, members)[:, real][:, order]
    seen, number = _as_they_appear(kind)
    return Cotangent(at, scale, split.flatten(1, 2)[:, seen], number, groups.count)


def _as_they_appear(kind: Int[Tensor, " place"]) -> tuple[Int[Tensor, " kind"], Int[Tensor, " place"]]:
    """The kinds there are, in the order of their first places, and the number of each place's kind among them."""
    kinds, inverse = torch.unique(kind, return_inverse=True)
    places = torch.arange(len(kind), device=kind.device)
    first = torch.full_like(kinds, len(kind)).scatter_reduce_(0, inverse, places, "amin")
    order = first.argsort()
    return kinds[order], order.argsort()[inverse]
