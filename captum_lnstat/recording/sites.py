"""Attention sites: one attention computation each, kept as references to the tensors that took part in it."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.devices import has_a_queue
from captum_lnstat.recording.kept import Kept, edge
from captum_lnstat.recording.statistics import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# So many (batch, head, query, key) entries stay in the cache while all that needs them reads them. More heads, and in a
# long sequence more queries, follow in turns.
CHUNK = 1 << 18
# Of fewer queries at a time the products are slow.
QUERIES = 96
# Which queries of a site.
Queries = Union[slice, Tensor]
EVERY = slice(None)
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


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

    @abstractmethod
    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Float[Tensor, "batch head query key"]:
        """Attention probabilities after the softmax, in float32 (float64 for a float64 model)."""

    @abstractmethod
    def values(self, heads: slice) -> Float[Tensor, "batch head key channel"]:
        """Values that the probabilities average, in the same dtype."""

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
        at_once = wanted if whole_maps else min(wanted, max(QUERIES, CHUNK // max(1, batch * keys)))
        step = 1 if one_head else max(1, CHUNK // max(1, batch * at_once * keys))
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
    def factor(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return 1 / math.sqrt(self.query.tensor.shape[-1]) if self.scale is None else self.scale

    def _grouped(self, tensor: Tensor, heads: slice) -> Tensor:
        groups = self.shape[1] // tensor.shape[1]
        if groups == 1:
            return tensor[:, heads]
        return tensor[:, torch.arange(heads.start, heads.stop, device=tensor.device) // groups]

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        query = self._query[:, heads][:, :, queries]
        scores = _scores(query, self._grouped(self._key, heads), self.factor, self._nothing)
        nothing = self.hide(scores, heads, queries)
        probabilities = scores.softmax(-1)
        if nothing is not None and (has_a_queue(nothing.device) or bool(nothing.any())):
            probabilities.masked_fill_(nothing, 0.0)
        return probabilities

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

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = _four_dimensional(self.attention.tensor, self.module).shape
        return batch, heads, queries, keys

    @property
    def dtype(self) -> torch.dtype:
        return (self.value or self.attention).tensor.dtype  # under autocast the softmax itself is in float32

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        # A softmax in float32 may multiply float64 values.
        attention = self.attention.read()[:, heads][:, :, queries]
        return attention.to(accumulation_dtype((self.value or self.attention).tensor))

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


@dataclass(frozen=True)
class MultiHeadSite(AttentionSite):
    """``multi_head_attention_forward`` of ``torch.nn.MultiheadAttention``: q, k and v come from its arguments."""

    module: str
    arguments: dict[str, Any]
    output: GradientEdge | None

    @classmethod
    def of(
        cls, module: str, output: Tensor, keep: Callable[[Tensor], Kept], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> MultiHeadSite:
        """The site of a call that returned ``output``."""
        arguments = _MULTI_HEAD.bind(*args, **kwargs)
        arguments.apply_defaults()
        named = dict(arguments.arguments)
        for name in ("query", "key", "value", "attn_mask", "key_padding_mask"):
            named[name] = None if named[name] is None else keep(named[name])
        return cls(module, named, edge(output))

    @cached_property
    def unpacked(self) -> FusedSite:
        """The same attention as q, k, v and an additive mask, heads split."""
        a = self.arguments
        if any(a.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or a["add_zero_attn"]:
            raise UnsupportedModelError(
                f"nn.MultiheadAttention at {self.module!r} adds keys of its own (bias_k, static_k or add_zero_attn); "
                "expected attention among the tokens only"
            )
        sources = [a[name].read() for name in ("query", "key", "value")]
        if a.get("use_separate_proj_weight"):
            weights = [a[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        else:
            weights = list(a["in_proj_weight"].chunk(3))
        biases = a["in_proj_bias"].chunk(3) if a["in_proj_bias"] is not None else (None,) * 3
        q, k, v = (
            self._split(F.linear(x, w.detach(), None if b is None else b.detach()), a["num_heads"])
            for x, w, b in zip(sources, weights, biases, strict=True)
        )
        return FusedSite(
            module=self.module,
            query=Kept.of(q),
            key=Kept.of(k),
            value=Kept.of(v),
            mask=self._mask(q),
            scale=None,
            is_causal=False,
            output=self.output,
        )

    def _split(self, tokens: Tensor, heads: int) -> Tensor:
        """(tokens, batch, channels), or (tokens, channels) unbatched, to (batch, heads, tokens, head channels)."""
        if tokens.dim() == 2:
            tokens = tokens[:, None]
        length, batch, channels = tokens.shape
        return tokens.reshape(length, batch, heads, channels // heads).permute(1, 2, 0, 3)

    def _mask(self, query: Tensor) -> Kept | None:
        a = self.arguments
        mask = None
        for name in ("attn_mask", "key_padding_mask"):
            given = a.get(name)
            if given is None:
                continue
            given = given.read()
            # In MultiheadAttention True means "may not attend", the reverse of scaled_dot_product_attention.
            if given.dtype == torch.bool:
                given = torch.zeros(given.shape, dtype=query.dtype, device=given.device).masked_fill(given, -math.inf)
            if name == "key_padding_mask":
                given = given.reshape(-1, 1, 1, given.shape[-1])
            elif given.dim() == 3:
                given = given.reshape(-1, a["num_heads"], *given.shape[1:])
            mask = given if mask is None else mask + given
        return None if mask is None else Kept.of(mask)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.unpacked.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.unpacked.dtype

    def probabilities(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        return self.unpacked.probabilities(heads, queries)

    def values(self, heads: slice) -> Tensor:
        return self.unpacked.values(heads)

    def output_gradient(self, gradient: Tensor) -> Tensor:
        weight = self.arguments["out_proj_weight"].detach()
        return self._split(gradient @ weight, self.arguments["num_heads"])


def stacked_probabilities(sites: Sequence[AttentionSite]) -> Float[Tensor, "site batch head query key"]:
    """The whole maps of several sites of one shape. No number is read of them: a device need not be waited for."""
    fused = [site.unpacked if isinstance(site, MultiHeadSite) else site for site in sites]
    alike = [
        site
        for site in fused
        if isinstance(site, FusedSite) and site.plain and site.factor == getattr(fused[0], "factor", None)
    ]
    if len(alike) < len(sites):
        return torch.stack([site.probabilities(slice(0, site.shape[1])) for site in sites])
    query, key = (torch.stack(tensors) for tensors in zip(*((s._query, s._key) for s in alike), strict=True))
    flat = torch.baddbmm(query.new_empty(()), query.flatten(0, 2), key.flatten(0, 2).mT, beta=0, alpha=alike[0].factor)
    scores = flat.view(*query.shape[:3], *flat.shape[1:])
    nothing = [site.hide(one) for site, one in zip(alike, scores, strict=True)]
    probabilities = scores.softmax(-1)
    for one, hidden in zip(probabilities, nothing, strict=True):
        if hidden is not None:
            one.masked_fill_(hidden, 0.0)
    return probabilities


def stacked_values(sites: Sequence[AttentionSite]) -> Float[Tensor, "site batch head key channel"]:
    """The values of several sites of one shape."""
    return torch.stack([site.values(slice(0, site.shape[1])) for site in sites])
