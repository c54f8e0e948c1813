"""Attention weighted by its share of the variance that it brings to a token.

The LayerNorm that reads ``x' = x + d`` divides by its standard deviation, so what a source brings to the variance of
the update is what is seen of it. With ``e_i = M_i sum_j A_ij w_j`` (``trace.deviations``), it splits exactly:

    var(e_i) = sum_j sum_h A^h_ij cov(M_i^h w_j^h, e_i).

A token is spread over its sources by what each accounts for, ``W_ij ~ max(0, sum_h A^h_ij <q_i^h, w_j^h>)`` with
``q_i = M_i^T (e_i - mean e_i)``, every row divided by its sum. A source that is attended to and brings nothing gets
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.deviations import Deviations
from captum_lnstat.trace.maps import pull_back
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# What is no more than so many times the smallest number is known too coarsely to be divided by.
LEAST = 1 << 24


class VarianceWeights:
    """``W`` of some of a block's queries at a time, from the maps of its heads as they come.

    A row in which nothing is positive, such as where all values are the same, is that of the mean over the heads.
    """

    def __init__(self, block: Block, found: Deviations, wanted: Int[Tensor, " query"] | None) -> None:
        tokens = found.update.shape[1]
        at = torch.arange(tokens, device=found.update.device) if wanted is None else wanted
        e = found.update if wanted is None else found.update[:, wanted]
        centred = (e - e.mean(-1, keepdim=True))[:, :, None]
        u = Cotangent(at, e.new_ones(e.shape[:2]), centred, torch.arange(len(at), device=at.device), tokens)
        pulled, _ = pull_back(block.path, u)
        q = pulled.dense()[:, :, 0]
        # Only where every token is in the one group of its image are some queries wanted and not all.
        q = q if wanted is not None else block.layout.gather(q)
        # (group, head, query, channel) and (group, head, channel, key)
        self._q = q.reshape(*q.shape[:2], block.site.shape[1], -1).transpose(1, 2)
        self._w = found.values.transpose(-2, -1)
        self._first = 0
        self._start()

    def _start(self) -> None:
        self._weights: Tensor | None = None
        self._plain: Tensor | None = None

    def add(self, heads: slice, attention: Float[Tensor, "group head query key"]) -> None:
        """Take in the maps of some heads, for the queries that come next."""
        q, w = self._q[:, heads, self._first : self._first + attention.shape[2]], self._w[:, heads]
        if attention.shape[1] == 1:
            one, plain = torch.bmm(q[:, 0], w[:, 0]), attention[:, 0]
            weights = one.mul_(plain) if self._weights is None else self._weights.addcmul_(one, plain)
        else:
            weights, plain = (q @ w).mul_(attention).sum(1), attention.sum(1)
            weights = weights if self._weights is None else self._weights.add_(weights)
        self._weights, self._plain = weights, plain if self._plain is None else self._plain + plain

    def fused(self) -> Float[Tensor, "group query key"]:
        """``W`` of these queries: the maps of all heads have been taken in."""
        assert self._weights is not None
        assert self._plain is not None
        weights, plain = self._weights.clamp_(min=0), self._plain.clamp(min=0)
        total = weights.sum(-1, keepdim=True)
        enough = total > LEAST * torch.finfo(total.dtype).tiny
        total = torch.where(enough, total, plain.sum(-1, keepdim=True))
        # A row of zeros, of a query that may see nothing, stays one.
        found = torch.where(enough, weights, plain).div_(torch.where(total > 0, total, 1.0))
        self._first += weights.shape[1]
        self._start()
        return found
