"""Attention weighted by its share of the variance that it brings to a token.

The LayerNorm that reads ``x' = x + d`` divides by its standard deviation, so what a source brings to the variance of
the update is what is seen of it. With ``e_i = M_i sum_j A_ij w_j`` (``trace.deviations``), it splits exactly:

    var(e_i) = sum_j sum_h A^h_ij cov(M_i^h w_j^h, e_i).

A token is spread over its sources by what each accounts for, ``W_ij ~ max(0, sum_h A^h_ij <q_i^h, w_j^h>)`` with
``q_i = M_i^T (e_i - mean e_i) / sigma_i``, every row divided by its sum, so that ``sigma_i`` does not matter. A source
that is attended to and brings nothing gets nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.devices import has_a_queue
from captum_lnstat.recording.sites import Queries
from captum_lnstat.trace.deviations import Deviations
from captum_lnstat.trace.maps import pull_back_each
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# What is no more than so many times the smallest number is known too coarsely to be divided by.
LEAST = 1 << 24


class VarianceWeights:
    """``r W`` for some of a block's queries at a time, from the maps of its heads as they come.

    A row in which nothing is positive, such as where all values are the same, is that of the mean over the heads.
    """

    def __init__(self, block: Block, found: Deviations, wanted: Int[Tensor, " query"] | None) -> None:
        self._site = block.site
        u = found.direction if wanted is None else found.direction[:, wanted]
        q = pull_back_each(block.path, u, wanted)
        # Only where every token is in the one group of its image are some queries wanted and not all.
        q = q if wanted is not None else block.layout.gather(q)
        # (group, head, query, channel) and (group, head, channel, key)
        self._q = q.reshape(*q.shape[:2], block.site.shape[1], -1).transpose(1, 2)
        self._w = found.values.transpose(-2, -1)
        # Most maps have no row for which the mean is needed. A device would have to be waited for to know.
        self._sums_up = has_a_queue(q.device)
        self._first = 0
        self._start()

    def _start(self) -> None:
        self._weights: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, heads: slice, attention: Float[Tensor, "group head query key"]) -> None:
        """Take in the maps of some heads, for the queries that come next."""
        q, w = self._q[:, heads, self._first : self._first + attention.shape[2]], self._w[:, heads]
        if attention.shape[1] == 1:
            one = torch.bmm(q[:, 0], w[:, 0])
            one_map = attention[:, 0]
            self._weights = one.mul_(one_map) if self._weights is None else self._weights.addcmul_(one, one_map)
        else:
            some = (q @ w).mul_(attention).sum(1)
            self._weights = some if self._weights is None else self._weights.add_(some)
        if self._sums_up:
            self._sum = attention.sum(1) if self._sum is None else self._sum.add_(attention.sum(1))

    def spread(self, rows: Float[Tensor, "group row query"], queries: Queries) -> Float[Tensor, "group row key"]:
        """``r W`` for the part of ``r`` at these queries: the maps of all heads have been taken in."""
        assert self._weights is not None
        weights = self._weights.clamp_(min=0)
        total = weights.sum(-1)[:, None]
        enough = total > LEAST * torch.finfo(total.dtype).tiny
        found = (rows / torch.where(enough, total, torch.inf)) @ weights
        if self._sums_up or not bool(enough.all()):
            # A row of zeros, of a query that may see nothing, stays one.
            mean = self._sum_of_heads(queries).clamp(min=0)
            total = mean.sum(-1)[:, None]
            found += (rows / torch.where(enough | (total <= 0), torch.inf, total)) @ mean
        self._first += weights.shape[1]
        self._start()
        return found

    def _sum_of_heads(self, queries: Queries) -> Float[Tensor, "group query key"]:
        if self._sum is not None:
            return self._sum
        heads = range(self._site.shape[1])
        return torch.stack([self._site.probabilities(slice(h, h + 1), queries)[:, 0] for h in heads]).sum(0)
