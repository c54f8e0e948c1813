"""One block's relation, applied to row vectors, and the contributions of its values to the scores.

The probabilities of a site are computed again some at a time, used for everything that needs them, and dropped. No map
of all queries against all keys is kept.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.layout import WholeImage
from captum_lnstat.recording.fusion import Fuser, HeadFusion
from captum_lnstat.recording.sites import Queries
from captum_lnstat.rules.many_scores import read_many
from captum_lnstat.rules.variance import VarianceWeights
from captum_lnstat.rules.wiring import Probe, Wiring, read_values
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import pull_back
from captum_lnstat.trace.steps import Block, check_layout

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Up to so many directions in u, contributions are summed over the queries before the values are read, not after.
FEW = 16
# Up to so many, the directions are weighted with what reads them, and not the values read with each.
FEW_TO_WEIGH = 4
# With many scores what is read is wider than a window is large up to so many directions.
FEW_OF_MANY_SCORES = 64
# From so many row vectors on, the heads' maps are fused before they are multiplied, not the products after.
WIDE = 16


@dataclass(frozen=True)
class Propagated:
    """What a block's attention made of row vectors, at the tokens before the block.

    Attributes:
        rows: ``r A`` for every row vector given.
        padding: What of it fell on padded places, if there are any.
        contributions: ``c_j``: what each token's values, less their mean, contributed to every score, if there was a
            cotangent and they are not part of ``rows``.
        contributions_padding: What padded places contributed.
        constant: What the mean value and the biases on the way contributed.
    """

    rows: Float[Tensor, "batch token row"]
    padding: Float[Tensor, "batch row"] | None
    contributions: Float[Tensor, "batch token score"] | None = None
    contributions_padding: Float[Tensor, "batch score"] | None = None
    constant: Float[Tensor, "batch score"] | None = None

    def of(self, rows: slice) -> Propagated:
        """The same for some of the row vectors."""
        padding = None if self.padding is None else self.padding[..., rows]
        return replace(self, rows=self.rows[..., rows], padding=padding)


def propagate(
    block: Block,
    rows: Float[Tensor, "batch token row"],
    at: Int[Tensor, " place"] | None = None,
    u: Cotangent | None = None,
    fusion: HeadFusion = "mean",
    wiring: Wiring | None = None,
) -> Propagated:
    """``r A`` with ``A`` as ``fusion`` says, and ``c_j = sum_h sum_i A^h_ij (u_i W_O^h) . (v^h_j - mean v^h)``.

    Args:
        block: The block.
        rows: Row vectors at the tokens after the attention.
        at: The only tokens at which they are not zero, if that is known.
        u: Cotangent of the stream.
        fusion: How the heads become one for ``r A``, ``"deviation"`` or ``"variance"`` for ``W``; contributions are
            summed over the heads as they are.
        wiring: Where the block's update is compared with what the attention was seen to do.
    """
    check_layout(block)
    site, keys, count = block.site, block.keys or block.layout, rows.shape[-1]
    contributions = None if u is None else _Contributions(block, u)
    probe = None if wiring is None else Probe(block)
    additive = fusion == "mean" and not site.signed and count < WIDE  # no head-fused map is needed
    # What is multiplied with every head's map from the left, side by side.
    columns = [rows] if additive else []
    columns += [part.columns for part in (contributions, probe) if part is not None and part.columns is not None]
    wanted, grouped = queries_wanted(block, at, u), block.layout.gather(rows).transpose(-2, -1)
    lefts = block.layout.gather(torch.cat(columns, -1)).transpose(-2, -1) if columns else grouped[:, :0]
    products = lefts.new_zeros(len(lefts), site.shape[1], lefts.shape[1], site.shape[3])
    mixed = rows.new_zeros(len(grouped), count, site.shape[3])
    weights = None
    if fusion == "deviation":
        weights = VarianceWeights(block, block.deviations, wanted)
    elif fusion == "variance":
        weights = VarianceWeights(block, block.deviations_from_mean(False), wanted)
    for queries, some_heads in site.chunks(wanted, whole_maps=callable(fusion)):
        left, fuser = lefts[:, :, queries], Fuser(fusion, site.shape[1], signed=site.signed)
        for heads, attention in some_heads:
            add_product(products, heads, left, attention)
            if weights is not None:
                weights.add(heads, attention)
            elif not additive:
                fuser.add(attention)
            for part in (contributions, probe):
                if part is not None and part.columns is None:
                    part.add(queries, heads, attention)
        if weights is not None:
            mixed += weights.spread(grouped[:, :, queries], queries)
        elif not additive:
            mixed += grouped[:, :, queries] @ fuser.fused()
    ends = [0, *itertools.accumulate(part.shape[-1] for part in columns)]
    shares = [(products[:, :, slice(*pair)], lefts[:, slice(*pair)]) for pair in itertools.pairwise(ends)]
    if additive:
        mixed = shares.pop(0)[0].mean(1)
    if contributions is not None and contributions.columns is not None:
        contributions.add_products(*shares.pop(0))
    if probe is not None and probe.columns is not None:
        probe.add_products(shares.pop(0)[0])
    if wiring is not None and probe is not None:
        wiring.note(probe.compared(wanted))
    below, padding = keys.scatter(mixed.transpose(-2, -1), len(rows))
    if contributions is None:
        return Propagated(below, padding)
    return Propagated(below, padding, *keys.scatter(contributions.total, len(rows)), contributions.constant)


def queries_wanted(block: Block, at: Tensor | None, u: Cotangent | None) -> Tensor | None:
    """The queries that matter; ``None`` for all."""
    if at is None or not isinstance(block.layout, WholeImage):
        return None
    if u is not None:
        at = torch.unique(torch.cat([at, u.at]))
    return at if 2 * len(at) < block.between.shape[1] else None


class _Contributions:
    """Collects what the values of a block, less their mean, contribute to the scores; what the mean does is constant.

    Of a cotangent with few directions ``p_k``: ``sum_k (sum_{i of kind k} s_i A_ij) (p_k . v_j)``, where nothing wide
    is multiplied with a map. The inner sums are the ``columns`` times the map, head by head. With more directions there
    are no columns, and the cotangent of each query is carried to the keys as it is.
    """

    def __init__(self, block: Block, u: Cotangent) -> None:
        self._site = block.site
        if block.layout.covered is not None:
            u = u.scaled(block.layout.covered.to(u.scale.dtype)[None])  # no bias reaches a token that takes no part
        pulled, constant = pull_back(block.path, u)
        self.constant = constant.sum(1)
        batch, heads = len(u.scale), block.site.shape[1]
        self._values, self._mean = block.deviations.values, block.deviations.common
        self.columns: Tensor | None = None
        if u.kinds <= (FEW if u.scores == 1 else FEW_OF_MANY_SCORES):
            # What is given to torch's own one_hot is read, to see whether it is in bounds.
            kinds = torch.arange(pulled.kinds, device=pulled.kind.device)
            one_hot = (pulled.kind[:, None] == kinds).to(u.scale.dtype)
            self.columns = pulled.spread(pulled.scale[..., None] * one_hot)
            # (batch, kind, score, head, head channel)
            self._directions = pulled.directions.reshape(batch, pulled.kinds, u.scores, heads, -1)
        else:
            grouped = block.layout.gather(pulled.spread(pulled.dense().flatten(2)))
            split = grouped.reshape(*grouped.shape[:2], u.scores, heads, -1)
            self._dense = split.permute(0, 3, 1, 2, 4)  # (group, head, query, score, head channel)
        self.total = u.scale.new_zeros(block.site.shape[0], block.site.shape[3], u.scores)

    def add(self, queries: Queries, heads: slice, attention: Float[Tensor, "group head query key"]) -> None:
        """Without columns: the maps of some heads, for some queries."""
        values, pulled = self._values[:, heads], self._dense[:, heads][:, :, queries]
        carried = attention.transpose(-2, -1) @ pulled.flatten(3)
        carried = carried.reshape(*carried.shape[:3], *pulled.shape[3:])
        self.total += (carried * values[:, :, :, None]).sum((1, 4))
        whole = carried.sum(2)  # (group, head, score, channel)
        whole = whole.reshape(len(self._mean), -1, *whole.shape[1:]).sum(1)
        self.constant = self.constant + torch.einsum("bhsc,bhc->bs", whole, self._mean[:, heads])

    def add_products(
        self, products: Float[Tensor, "group head kind key"], columns: Float[Tensor, "group kind query"]
    ) -> None:
        """With columns: their products with the maps of all heads."""
        values, directions = self._values, self._directions
        # What the mean value contributes, which belongs to no token.
        weight = products.sum(-1).reshape(len(self._mean), -1, *products.shape[1:3]).sum(1)  # (batch, head, kind)
        self.constant = self.constant + torch.einsum("bhk,bkshc,bhc->bs", weight, directions, self._mean)
        if directions.shape[2] == 1 and 1 < directions.shape[1] <= FEW_TO_WEIGH:
            # The directions that read each key, weighted: as large as the values, which are read where they lie.
            every = directions[:, :, 0].transpose(1, 2).repeat_interleave(len(values) // len(directions), 0)
            self.total = torch.linalg.vecdot(products.transpose(-2, -1) @ every, values).sum(1)[..., None]
            return
        if directions.shape[2] == 1:
            read = read_values(values, directions[:, :, 0].permute(0, 2, 3, 1))
            self.total = (products * read.transpose(-2, -1)).sum((1, 2))[..., None]
            return
        self.total = read_many(products, values, directions.flatten(3), columns.any(-1))


def add_product(
    total: Float[Tensor, "group head column key"],
    heads: slice,
    left: Float[Tensor, "group column query"],
    attention: Float[Tensor, "group some_heads query key"],
) -> None:
    """Add the product of the same columns with the maps of some heads to theirs."""
    if attention.shape[1] == 1:
        total[:, heads.start] += torch.bmm(left, attention[:, 0])
    else:
        total[:, heads] += left[:, None] @ attention
