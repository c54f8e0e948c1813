"""Attention with a backward pass of its own: the maps and their gradient are made once, for all that need them.

The kernel's backward pass makes ``A`` and ``dA`` from queries, keys and values, and drops them. A rule that weights
maps with their gradients would make both again; here it reads them while they are there. The output is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_lnstat.recording.constant_weights import either, few_rows, plain, writable
from captum_lnstat.recording.sites import FusedSite, Queries, SoftmaxSite, less_the_least

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Observer(Protocol):
    """What reads the maps of one attention and their gradients, some at a time."""

    @property
    def wanted(self) -> Int[Tensor, " query"] | None:
        """The queries that matter to it; ``None`` for all."""
        ...

    def add(
        self,
        queries: Queries,
        heads: slice,
        attention: Float[Tensor, "group head query key"],
        weighted: Float[Tensor, "group head query key"],
    ) -> None:
        """``A`` and ``dA * A`` of some heads and queries. The second may be overwritten."""
        ...

    def end_chunk(self, queries: Queries) -> None:
        """All heads of these queries have been added."""
        ...

    def finish(self, queries: Int[Tensor, " query"] | None) -> None:
        """All has been added: of these queries, ``None`` for all, the wanted ones among them."""
        ...


# Feeds an observer the maps of an attention and their gradients.
Feed = Callable[[Observer], None]


class ObservedAttention(torch.autograd.Function):
    """``scaled_dot_product_attention`` in value; its backward pass goes in pieces that fit the cache.

    With ``A = softmax(scale * q k^T + mask)`` and ``dO`` the gradient at ``O = A v``:

        ``dA = dO v^T``, ``dS = A * dA - A * sum(A * dA)``,
        ``dq = scale * dS k``, ``dk = scale * dS^T q``, ``dv = A^T dO``

    Queries of no gradient are left out where few have one: in the last block of a model whose head reads the class
    token. The observer is set at the node for the backward pass, as a function that is given a ``Feed``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, site: FusedSite) -> Tensor:
        ctx.site, ctx.observer = site, None
        # Detached, as without a graph: which kernel runs hangs on what requires a gradient.
        q, k, v = query.detach(), key.detach(), value.detach()
        output = F.scaled_dot_product_attention(q, k, v, mask, is_causal=site.is_causal, scale=site.scale)
        return writable(output)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        slopes = _Slopes(ctx.site)
        if ctx.observer is None:
            _feed(ctx.site, d_output, slopes, None)
        else:
            ctx.observer(partial(_feed, ctx.site, d_output, slopes))
        return slopes.query, slopes.key, slopes.value, None, None


class _Slopes:
    """Collects the gradients at queries, keys and values, one head after the other."""

    def __init__(self, site: FusedSite) -> None:
        self._site = site
        self._q, self._k = site.query.read(), site.key.read()
        self._scale = site.factor
        # Heads side by side, as the Linear below them has its channels.
        self.query, self.key, self.value = (
            part.new_zeros(part.transpose(1, 2).shape).transpose(1, 2) for part in (self._q, self._k, site.value.read())
        )

    def add(
        self,
        queries: Queries,
        heads: slice,
        attention: Float[Tensor, "group head query key"],
        weighted: Float[Tensor, "group head query key"],
        d_averaged: Float[Tensor, "group head query channel"],
    ) -> None:
        """With ``weighted = A * dA``."""
        if attention.shape[1] == 1:
            self._add_one(queries, heads.start, attention[:, 0], weighted[:, 0], d_averaged[:, 0])
            return
        self.value[:, heads] += attention.mT @ d_averaged
        d_scores = torch.addcmul(weighted, attention, weighted.sum(-1, keepdim=True), value=-1).mul_(self._scale)
        self.query[:, heads][:, :, queries] = d_scores @ self._k[:, heads]
        self.key[:, heads] += d_scores.mT @ self._q[:, heads][:, :, queries]

    def _add_one(self, queries: Queries, head: int, attention: Tensor, weighted: Tensor, d_averaged: Tensor) -> None:
        """A head alone, where it lies in memory."""
        self.value[:, head].baddbmm_(attention.transpose(1, 2), d_averaged)
        d_scores = torch.addcmul(weighted, attention, weighted.sum(-1, keepdim=True), value=-1)
        self.query[:, head][:, queries] = (d_scores @ self._k[:, head]).mul_(self._scale)
        self.key[:, head].baddbmm_(d_scores.transpose(1, 2), self._q[:, head][:, queries], alpha=self._scale)


def _feed(site: FusedSite, d_output: Tensor, slopes: _Slopes, observer: Observer | None) -> None:
    wanted = few_rows(d_output.movedim(2, 0))
    if observer is not None:
        wanted = either(wanted, observer.wanted)
    values = site.value.read().transpose(-2, -1)
    for queries, some_heads in site.chunks(wanted, one_head=True):
        for heads, attention in some_heads:
            d_averaged = d_output[:, heads][:, :, queries]
            weighted = _product(d_averaged, values[:, heads]).mul_(attention)
            slopes.add(queries, heads, attention, weighted, d_averaged)
            if observer is not None:
                observer.add(queries, heads, attention, weighted)
        if observer is not None:
            observer.end_chunk(queries)
    if observer is not None:
        observer.finish(wanted)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, head by head; that of a head alone where it lies in memory."""
    return left @ right if left.shape[1] > 1 else (left[:, 0] @ right[:, 0])[:, None]


class ObservedProduct(torch.autograd.Function):
    """``A v`` of maps that the model made; its observer reads ``dA = dO v^T`` in the backward pass. ``dv = A^T dO``."""

    @staticmethod
    def forward(ctx: Any, attention: Tensor, value: Tensor, site: SoftmaxSite) -> Tensor:
        ctx.save_for_backward(attention, value)
        ctx.site, ctx.observer = site, None
        return writable(attention @ value)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, None]:
        attention, value = ctx.saved_tensors
        few = few_rows(d_output.movedim(2, 0))
        d_output = (d_output if few is None else d_output[:, :, few]).contiguous()
        d_attention = d_output @ value.transpose(-2, -1)
        d_value = less_the_least(attention if few is None else attention[:, :, few]).transpose(-2, -1) @ d_output
        if few is not None:
            d_attention = torch.zeros_like(attention).index_copy_(2, few, d_attention)
        if ctx.observer is not None:
            ctx.observer(partial(_feed_maps, ctx.site, d_attention))
        return d_attention, d_value, None


def _feed_maps(site: SoftmaxSite, d_attention: Tensor, observer: Observer) -> None:
    for queries, some_heads in site.chunks(observer.wanted):
        for heads, attention in some_heads:
            observer.add(queries, heads, attention, d_attention[:, heads][:, :, queries] * attention)
        observer.end_chunk(queries)
    observer.finish(observer.wanted)


def can_be_observed(site: FusedSite, dropout: float, mask: Tensor | None) -> bool:
    """Whether the backward pass here is that of the call: full precision, no dropout, on the CPU.

    On other devices, and in half precision, the kernel's own is faster, and is taken.
    """
    q, k, v = site.query.tensor, site.key.tensor, site.value.tensor
    return (
        _full_precision(q, k, v)
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and dropout == 0
        and not (mask is not None and mask.requires_grad)
    )


def product_can_be_observed(site: SoftmaxSite, attention: Tensor, value: Tensor) -> bool:
    """Whether a product is that of the maps as the softmax made them: no dropout or cast stands between."""
    made = site.attention.tensor
    return (
        _full_precision(attention, value)
        and attention.data_ptr() == made.data_ptr()
        and attention.stride() == made.stride()
        and attention.shape[:2] == value.shape[:2]
    )


def _full_precision(*tensors: Tensor) -> bool:
    dtypes = {tensor.dtype for tensor in tensors}
    return plain(*tensors) and dtypes <= {torch.float32, torch.float64} and all(t.dim() == 4 for t in tensors)
