"""Attention sites: one attention computation each, kept as references to the tensors that took part in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Union

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.devices import at_most, has_a_queue
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.statistics import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# So many (batch, head, query, key) entries stay in the cache while all that needs them reads them. More heads, and in a
# long sequence more queries, follow in turns.
CHUNK = 1 << 18
# On a device, where nothing is too large for a cache and every kernel costs, so many.
CHUNK_ON_DEVICE = 1 << 27
# Of fewer queries at a time the products are slow.
QUERIES = 96
# Which queries of a site.
Queries = Union[slice, Tensor]
EVERY = slice(None)


class AttentionSite(ABC):
    """One attention computation: probabilities ``A``, values ``v`` and the output ``A v``.

    Attributes:
        module: Dotted name of the innermost module that was running.
        output: Where what the attention returned is in a graph, if it is in one; the output itself is not kept.
        signed: The maps may hold negative entries and rows that do not sum to one, for they were mixed afterwards.
    """

    module: str
    output: GradientEdge | None
    signed: ClassVar[bool] = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """``(batch, heads, queries, keys)``; windows are counted in the batch."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computed it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it was computed."""

    @abstractmethod
    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Float[Tensor, "batch head query key"]:
        """Attention probabilities after the softmax, in float32 (float64 for a float64 model)."""

    @abstractmethod
    def values(self, heads: slice) -> Float[Tensor, "batch head key channel"]:
        """Values that the probabilities average, in the same dtype."""

    @property
    def uneven(self) -> bool:
        """Whether rows may not sum to one: maps that were mixed, or queries that may be given nothing to see."""
        return self.signed

    def row_sums(self) -> Float[Tensor, "batch query head"]:
        """What the rows of the maps sum to over the keys."""
        parts = [torch.cat([attention.sum(-1) for _, attention in some], 1) for _, some in self.chunks()]
        return torch.cat(parts, 2).transpose(1, 2)

    def scores(self, heads: slice, queries: Queries = EVERY) -> Float[Tensor, "batch head query key"]:
        """What the softmax was given, minus infinity where a key is hidden, in the same dtype."""
        raise UnsupportedModelError(
            f"what the softmax at {self.module!r} was given is not known, since its maps are put together from others"
        )

    @abstractmethod
    def output_gradient(self, gradient: Tensor) -> Float[Tensor, "batch head query channel"]:
        """The gradient at ``output`` as one at ``A v``, head by head."""

    def chunks(
        self, queries: Int[Tensor, " query"] | None = None, *, whole_maps: bool = False, one_head: bool = False
    ) -> Iterator[tuple[Queries, Iterator[tuple[slice, Float[Tensor, "batch head query key"]]]]]:
        """Probabilities in turns of as many entries as fit: some queries at a time, and for them some heads at a time.

        Args:
            queries: The queries wanted; all of them by default.
            whole_maps: All queries at once, some heads at a time.
            one_head: Never more than one head at a time.
        """
        batch, heads, count, keys = self.shape
        wanted = count if queries is None else len(queries)
        entries = at_most(CHUNK_ON_DEVICE if has_a_queue(self.device) else CHUNK)
        at_once = wanted if whole_maps else min(wanted, max(QUERIES, entries // max(1, batch * keys)))
        step = 1 if one_head else max(1, entries // max(1, batch * at_once * keys))
        some_heads = [slice(start, min(start + step, heads)) for start in range(0, heads, step)]
        for start in range(0, wanted, max(1, at_once)):
            some: Queries = slice(start, min(start + at_once, wanted))
            if queries is not None:
                some = queries[some]
            yield some, ((heads_, self.probabilities(heads_, some)) for heads_ in some_heads)


def _four_dimensional(tensor: Tensor, module: str) -> Tensor:
    if tensor.dim() != 4:
        raise UnsupportedModelError(
            f"attention at {module or 'the model'!r} has tensors of shape {tuple(tensor.shape)}; expected "
            "(batch, heads, tokens, channels). A topology for this family has to unfold them first"
        )
    return tensor


def less_the_least(probabilities: Tensor) -> Tensor:
    """Zeros for what is too small to be seen in a row that sums to one.

    A mask of -100 before a softmax leaves 1e-44, and products of such numbers take a CPU twenty times as long.

    Example:
        >>> less_the_least(torch.tensor([1.0, 1e-20, 1e-44]))
        tensor([1.0000e+00, 1.0000e-20, 0.0000e+00])
    """
    if has_a_queue(probabilities.device):
        return probabilities
    return torch.threshold(probabilities, torch.finfo(probabilities.dtype).eps ** 4, 0)


def _scores(query: Tensor, key: Tensor, scale: float, nothing: Tensor) -> Tensor:
    """``scale * q k^T``."""
    if query.shape[1] == 1:
        # Heads lie interleaved in memory: one alone is multiplied where it lies, several would be copied first.
        return torch.baddbmm(nothing, query[:, 0], key[:, 0].transpose(-2, -1), beta=0, alpha=scale)[:, None]
    return (query * scale) @ key.transpose(-2, -1)


@dataclass(frozen=True)
class FusedSite(AttentionSite):
    """``scaled_dot_product_attention``: the probabilities are computed again from q and k when asked for.

    ``A = softmax(scale * q k^T + bias)``, with a boolean mask or ``is_causal`` as a bias of minus infinity.
    Grouped queries share a key head: query head ``h`` reads key head ``h // (heads / key heads)``.
    """

    module: str
    query: Kept
    key: Kept
    value: Kept
    mask: Kept | None
    scale: float | None
    is_causal: bool
    output: GradientEdge | None

    # Read once: the pass is over, and every head and query reads them again.
    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        query, key = self._query, self.key.read()
        batch, heads, queries, _ = _four_dimensional(query, self.module).shape
        return batch, heads, queries, key.shape[-2]

    @cached_property
    def _query(self) -> Tensor:
        query = self.query.read()
        return query.to(accumulation_dtype(query))

    @cached_property
    def _key(self) -> Tensor:
        return self.key.read().to(self._query.dtype)

    @cached_property
    def _value(self) -> Tensor:
        value = self.value.read()
        return value.to(accumulation_dtype(value))

    @cached_property
    def _nothing(self) -> Tensor:
        return self._query.new_empty(())

    @property
    def dtype(self) -> torch.dtype:
        return self.value.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.value.tensor.device

    @property
    def factor(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return 1 / math.sqrt(self.query.tensor.shape[-1]) if self.scale is None else self.scale

    def _grouped(self, tensor: Tensor, heads: slice) -> Tensor:
        groups = self.shape[1] // tensor.shape[1]
        if groups == 1:
            return tensor[:, heads]
        return tensor[:, torch.arange(heads.start, heads.stop, device=tensor.device) // groups]

    def scores(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        return self._masked(heads, queries)[0]

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        scores, nothing = self._masked(heads, queries)
        probabilities = scores.softmax(-1)
        if self.mask is not None:
            probabilities = less_the_least(probabilities)
        if nothing is not None and (has_a_queue(nothing.device) or bool(nothing.any())):
            probabilities.masked_fill_(nothing, 0.0)
        return probabilities

    def _masked(self, heads: slice, queries: Queries) -> tuple[Tensor, Tensor | None]:
        query = self._query[:, heads][:, :, queries]
        scores = _scores(query, self._grouped(self._key, heads), self.factor, self._nothing)
        return scores, self.hide(scores, heads, queries)

    @property
    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """What the scores are products of, in the dtype that they are computed in."""
        return self._query, self._key

    @property
    def plain(self) -> bool:
        """Whether every query head has a key head of its own."""
        return self.shape[1] == self._key.shape[1]

    def hide(self, scores: Tensor, heads: slice = EVERY, queries: Queries = EVERY) -> Tensor | None:
        """Add the mask to scores, in place: the queries that may see nothing, ``None`` if there is no mask.

        They attend to nothing, as in the fused kernel; softmax alone would give NaN.
        """
        hidden = None
        if self.is_causal:
            everyone = torch.ones(self.shape[2:], dtype=torch.bool, device=scores.device)
            hidden = everyone.tril().logical_not()[queries]
        if self.mask is not None:
            mask = self.mask.read()
            if mask.dim() >= 3 and mask.shape[-3] > 1:
                mask = mask[..., heads, :, :]
            if mask.dim() >= 2 and mask.shape[-2] > 1:
                mask = mask[..., queries, :]
            if mask.dtype == torch.bool:
                hidden = ~mask if hidden is None else hidden | ~mask
            else:
                scores += mask.to(scores.dtype)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        if hidden is None and self.mask is None:
            return None
        return (scores if hidden is not None else mask).amax(-1, keepdim=True) == -math.inf

    @property
    def uneven(self) -> bool:
        return self.mask is not None and self.mask.tensor.dtype == torch.bool

    def row_sums(self) -> Tensor:
        batch, heads, queries, _ = self.shape
        if self.mask is None or self.mask.tensor.dtype != torch.bool:
            return self._query.new_ones(batch, queries, heads)
        return self.mask.read().any(-1).expand(batch, heads, queries).transpose(1, 2).to(self._query.dtype)

    def values(self, heads: slice) -> Tensor:
        return self._grouped(self._value, heads)

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class SoftmaxSite(AttentionSite):
    """An explicit softmax followed by a product with the values: the probabilities are the softmax's output."""

    module: str
    attention: Kept
    value: Kept | None
    output: GradientEdge | None
    given: Kept | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = _four_dimensional(self.attention.tensor, self.module).shape
        return batch, heads, queries, keys

    @property
    def dtype(self) -> torch.dtype:
        return (self.value or self.attention).tensor.dtype  # under autocast the softmax itself is in float32

    @property
    def device(self) -> torch.device:
        return self.attention.tensor.device

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        # A softmax in float32 may multiply float64 values.
        attention = self.attention.read()[:, heads][:, :, queries]
        attention = attention.to(accumulation_dtype((self.value or self.attention).tensor))
        return attention if self.signed else less_the_least(attention)

    def scores(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        if self.given is None or self.given.tensor.shape != self.attention.tensor.shape:
            return super().scores(heads, queries)
        given = self.given.read()[:, heads][:, :, queries]
        return given.to(accumulation_dtype(given))

    def values(self, heads: slice) -> Tensor:
        if self.value is None:
            raise RecordingError(
                f"the softmax at {self.module!r} was seen, but not the product of its output with the values, which "
                "every rule reads; expected attention @ values after it, with at most a dropout or a cast between"
            )
        value = self.value.read()[:, heads]
        return value.to(accumulation_dtype(value))

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return gradient
