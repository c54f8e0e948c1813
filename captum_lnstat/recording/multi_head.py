"""The attention of ``torch.nn.MultiheadAttention``: q, k and v from what its one function was called with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.kept import Kept, edge
from captum_lnstat.recording.sites import EVERY, AttentionSite, FusedSite, Queries

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


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

    def scores(self, heads: slice, queries: Queries = EVERY) -> Tensor:
        return self.unpacked.scores(heads, queries)

    def values(self, heads: slice) -> Tensor:
        return self.unpacked.values(heads)

    def output_gradient(self, gradient: Tensor) -> Tensor:
        weight = self.arguments["out_proj_weight"].detach()
        return self._split(gradient @ weight, self.arguments["num_heads"])
