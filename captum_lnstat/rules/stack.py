"""A stack of blocks of one shape: what is worked out for all of them, each thing when it is first asked for.

The formulas are those of ``rules.variance``, ``rules.relation``, ``rules.wiring`` and ``trace.deviations``; the tests
hold them to the same dense matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from captum_lnstat.layout import WholeImage, gather_stacked, padded, real_places
from captum_lnstat.recording.fusion import HeadFusion, rows_of_one
from captum_lnstat.recording.stacked_sites import stacked_probabilities, stacked_values
from captum_lnstat.recording.statistics import shares_by_sigma, shares_of_inverses, standardised
from captum_lnstat.rules.variance import LEAST
from captum_lnstat.rules.wiring import PROBED, ROUNDED, Comparison, Wiring, length_of, probes, scattered
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.deviations import less_the_mean
from captum_lnstat.trace.stacked_maps import StackedMap, apply_stacked, pull_back_stacked, turned_back
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from jaxtyping import Float


Made = TypeVar("Made")


class Stack:
    """Some blocks of one shape, and what is worked out for all of them; each thing when it is first asked for.

    Args:
        blocks: The blocks, first to last; they need not follow one another.
        path: From their joined heads to their updates.
    """

    def __init__(self, blocks: Sequence[Block], path: tuple[StackedMap, ...]) -> None:
        self.names = tuple(block.name for block in blocks)
        self._blocks, self._path = blocks, path
        self._layouts = tuple(block.layout for block in blocks)
        self._centred = blocks[0].centred
        self._known: dict[Any, tuple[Cotangent | None, Any]] = {}
        self._noted: Wiring | None = None

    def forget(self) -> None:
        """Let go of all that was worked out."""
        self._known = {}

    def _once(self, name: Any, make: Callable[[], Made], *, u: Cotangent | None = None) -> Made:
        """What goes by a name, made when it is first asked for, or for another cotangent ``u``."""
        if name not in self._known or self._known[name][0] is not u:
            self._known[name] = u, make()
        made: Made = self._known[name][1]
        return made

    def _streams(self, name: str) -> Float[Tensor, "block batch token channel"]:
        """The stream at a place of every block: its ``"base"``, ``"between"`` or ``"after"``."""
        return self._once(name, lambda: torch.stack([getattr(block, name) for block in self._blocks]))

    @property
    def _update(self) -> Float[Tensor, "block batch token channel"]:
        return self._once("update", lambda: self._streams("between") - self._streams("base"))

    @property
    def _values(self) -> Float[Tensor, "block group head key channel"]:
        return self._once("values", lambda: stacked_values([block.site for block in self._blocks]))

    @property
    def _attention(self) -> Float[Tensor, "block group head query key"]:
        """The maps of all heads."""
        return self._once("attention", lambda: stacked_probabilities([block.site for block in self._blocks]))

    def _by_image(self, values: Float[Tensor, "block group *rest"]) -> Float[Tensor, "block batch groups *rest"]:
        return values.view(len(values), len(self._blocks[0].base), -1, *values.shape[2:])

    def _by_head(self, tokens: Float[Tensor, "block batch token channel"]) -> Tensor:
        """Of every query and head, ``(block, group, head, query, channel)``."""
        grouped = gather_stacked(self._layouts, tokens)
        return self._heads(grouped)

    def _heads(self, joined: Float[Tensor, "block group query channel"]) -> Tensor:
        return joined.view(*joined.shape[:3], self._blocks[0].site.shape[1], -1).transpose(2, 3)

    def _common(self, from_mean: bool) -> Float[Tensor, "block batch head channel"]:
        """As ``trace.deviations``: ``m``, the mean value, or zero."""

        def common() -> Tensor:
            values = self._by_image(self._values)
            return self._mean_value(values) if from_mean else values.new_zeros(*values.shape[:2], *values.shape[3::2])

        return self._once(("m", from_mean), common)

    def _apart(self, from_mean: bool) -> Float[Tensor, "block group head key channel"]:
        """``w``, the values less that."""

        def apart() -> Tensor:
            return (self._by_image(self._values) - self._common(True)[:, :, None, :, None]).flatten(1, 2)

        return self._once("w", apart) if from_mean else self._values

    def _deviations(self, from_mean: bool) -> tuple[Tensor, Tensor]:
        """The direction and ``1 / sigma`` of ``e``, the update less what ``m`` makes of it."""

        def deviations() -> tuple[Tensor, Tensor]:
            made = apply_stacked(self._path, self._common(from_mean).flatten(2)[:, :, None])
            return standardised(self._update - made, centred=self._centred)

        return self._once(("e", from_mean), deviations)

    def _mean_value(self, values: Float[Tensor, "block batch group head key channel"]) -> Tensor:
        if not padded(self._layouts):
            return values.mean((2, 4))
        real = real_places(self._layouts).to(values.dtype)
        return torch.einsum("lbghkc,lgk->lbhc", values, real / real.sum((1, 2), keepdim=True))

    def relation(self, fusion: HeadFusion) -> Float[Tensor, "block group query key"]:
        """What an update is shared by: ``W``, attention weighted by what it brings, or the mean of the heads."""
        return self._once(("relation", fusion), lambda: self._relation(fusion))

    def _relation(self, fusion: HeadFusion) -> Tensor:
        mean = self._attention.mean(2)
        return mean if fusion == "mean" else self._weighted(fusion == "deviation", mean)

    def _weighted(self, from_mean: bool, mean: Float[Tensor, "block group query key"]) -> Tensor:
        """``W_ij ~ max(0, sum_h A^h_ij <q_i^h, w_j^h>)``; a row in which nothing is positive is that of the mean."""
        q = self._by_head(turned_back(self._path, self._deviations(from_mean)[0]))
        weights = (q @ self._apart(from_mean).mT).mul_(self._attention).sum(2).clamp_(min=0)
        tiny = torch.finfo(weights.dtype).tiny
        weights.add_(mean, alpha=LEAST * tiny)  # lost in what is not nothing
        return weights.div_(weights.sum(-1, keepdim=True).clamp_(min=tiny))

    def shares(
        self, by_sigma: slice | None
    ) -> tuple[Float[Tensor, "block batch token"], Float[Tensor, "block batch token"]]:
        """The residual shares of the form ``"deviation"``, and the rest, as ``Block.shares_of``."""
        shares = self._once("shares", self._shares)
        if by_sigma is None:
            return shares
        # A slice has no hash before Python 3.12.
        return self._once(("shares", by_sigma.start, by_sigma.stop), lambda: shares_by_sigma(*shares, by_sigma))

    def _shares(self) -> tuple[Tensor, Tensor]:
        base = self._streams("base")
        apart = less_the_mean(base.flatten(0, 1)).view_as(base)
        _, inverse = standardised(apart, centred=self._centred)
        return shares_of_inverses(inverse, self._deviations(True)[1])

    def _carried(self, u: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``sum_i A^h_ij M_i^T u_i`` for every key and head, image by image; and the maps' constants, token by token.

        Where the tokens of all images have the same, the first dimension of the batch may be one.
        """
        pulled, constant = pull_back_stacked(self._path, u, at)
        attention = self._attention if at is None else self._attention.index_select(3, at)
        split = self._by_head(pulled) if at is None else self._heads(pulled)
        return self._by_image(attention).mT @ split.view(len(pulled), pulled.shape[1], -1, *split.shape[2:]), constant

    def contributions(self, u: Cotangent) -> tuple[Float[Tensor, "block group key"], Float[Tensor, "block batch"]]:
        """``c_j`` of every key for one score, and what the mean values and the maps' constants contributed."""
        return self._once("contributions", lambda: self._contributed(u), u=u)

    def _contributed(self, u: Cotangent) -> tuple[Tensor, Tensor]:
        whole = all(isinstance(layout, WholeImage) for layout in self._layouts)
        at = u.at if whole and not u.everywhere else None
        dense = u.everywhere_dense if at is None else u.dense()
        carried, offset = self._carried(dense[None, :, :, 0], at)
        total = (carried * self._by_image(self._apart(True))).sum((3, 5)).flatten(1, 2)
        constant = (carried.sum((2, 4)) * self._common(True)).sum((2, 3))
        return total, constant if offset is None else constant + offset.sum(2)

    def mlp_reads(self, u: Cotangent) -> Float[Tensor, "block batch token"]:
        """``<u_i, MLP update_i>`` of every token, for one score."""
        return self._once("mlp", lambda: self._read_mlps(u), u=u)

    def _read_mlps(self, u: Cotangent) -> Tensor:
        update = self._streams("after") - self._streams("between")
        return (update * u.everywhere_dense[:, :, 0]).sum(3)

    def positive_gradients(
        self, slopes: Mapping[str, Tensor], normalized: bool
    ) -> Float[Tensor, "block group query key"]:
        """``A' = E_h[(dA * A)^+]``, with ``dA = dO v^T`` and the ``dO`` of every block by its name."""
        return self._once("gradients", lambda: self._positive(slopes, normalized))

    def _positive(self, slopes: Mapping[str, Tensor], normalized: bool) -> Tensor:
        d_output = torch.stack([slopes[name] for name in self.names])
        mean = (d_output @ self._values.mT).mul_(self._attention).clamp_(min=0).mean(2)
        return rows_of_one(mean) if normalized else mean

    def note(self, wiring: Wiring) -> None:
        """Have the updates of all blocks looked at, once in a walk; those that are not walked through, too."""
        if self._noted is not wiring:
            self._noted = wiring
            wiring.note(self._compared())

    def _compared(self) -> Comparison:
        """The updates from both sides, as in ``rules.wiring``."""
        update, base, dtype = self._update, self._streams("base"), self._blocks[0].site.dtype
        tokens, channels = update.shape[2:]
        u = probes(self.names, tokens, channels, update.device, update.dtype)
        carried, offset = self._carried(u)
        found: Tensor = torch.linalg.vecdot(carried.flatten(2), self._by_image(self._values).flatten(2))
        found = found if offset is None else found + offset.sum(2)
        terms = (update * u).sum(3)
        kind, size = torch.finfo(dtype), ROUNDED * length_of(min(PROBED, channels))
        z = scattered(tokens, update.device, update.dtype, size * kind.eps / channels**0.5)[:, None]
        streams = torch.linalg.vector_norm(base * z, dim=(2, 3))
        typical, least = torch.linalg.vector_norm(terms, dim=2), size * kind.smallest_normal * length_of(tokens)
        return Comparison(self.names, found, terms.sum(2), typical, streams, dtype, least)
