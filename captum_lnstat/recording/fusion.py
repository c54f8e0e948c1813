"""Head fusion: one attention map from the maps of all heads.

``"deviation"`` and ``"variance"`` weigh what the heads bring as well, which is not for here: ``rules.variance``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Union

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.sites import AttentionSite

if TYPE_CHECKING:
    from jaxtyping import Float

HeadFusion = Union[Literal["deviation", "variance", "mean", "max", "min"], Callable[[Tensor], Tensor]]
WEIGHTED = ("deviation", "variance")
PLAIN = ("mean", "max", "min")
# Of a row of positive gradients, the least sum: those of scores are larger by many orders.
NOTHING_POSITIVE = 1e-24


def check_fusion(fusion: HeadFusion, names: tuple[str, ...] = (*WEIGHTED, *PLAIN)) -> None:
    """Raise unless ``fusion`` is one of the names or a callable."""
    if not callable(fusion) and not (isinstance(fusion, str) and fusion in names):
        raise ValueError(
            f"head_fusion is {fusion!r}; expected one of {', '.join(map(repr, names))} or a callable from "
            "(batch, head, query, key) to (batch, query, key)"
        )


class Fuser:
    """Fuses heads as they come, a chunk at a time, into one row-stochastic map.

    ``max`` and ``min`` over heads do not sum to one over the keys any more, nor need a callable's map: each row is
    divided by its sum, so that relevance mass stays conserved. A row of zeros (a query that may see nothing) stays.
    Of ``signed`` maps the positive part is shared out: what is subtracted is not looked at. A row without any takes
    its size.
    """

    def __init__(self, fusion: HeadFusion, heads: int, *, signed: bool = False) -> None:
        self._fusion = fusion
        self._signed = signed
        self._heads = heads
        self._chunks: list[Tensor] = []
        self._running: Tensor | None = None

    def add(self, attention: Float[Tensor, "batch head query key"]) -> None:
        """Take in the maps of some heads."""
        if callable(self._fusion):
            self._chunks.append(attention.clamp(min=0) if self._signed else attention)
        elif self._fusion == "mean":
            part = attention[:, 0] if attention.shape[1] == 1 else attention.sum(1)
            if self._running is None:
                self._running = part / self._heads
            else:
                self._running.add_(part, alpha=1 / self._heads)
        else:
            part = attention.amax(1) if self._fusion == "max" else attention.amin(1)
            pick = torch.maximum if self._fusion == "max" else torch.minimum
            self._running = part if self._running is None else pick(self._running, part)

    def fused(self) -> Float[Tensor, "batch query key"]:
        """The fused map of all heads taken in."""
        if callable(self._fusion):
            stacked = torch.cat(self._chunks, dim=1)
            fused = self._fusion(stacked)
            batch, _, queries, keys = stacked.shape
            if not isinstance(fused, Tensor) or fused.shape != (batch, queries, keys) or bool((fused < 0).any()):
                raise ValueError(
                    f"the head_fusion callable was given (batch, head, query, key) = {tuple(stacked.shape)} and "
                    f"returned {tuple(fused.shape) if isinstance(fused, Tensor) else type(fused).__name__}; expected "
                    f"a tensor of shape {(batch, queries, keys)} without negative entries"
                )
        elif self._running is None:
            raise RecordingError("an attention without heads was recorded; expected at least one")
        elif self._signed:
            positive = self._running.clamp(min=0)
            fused = torch.where(positive.any(-1, keepdim=True), positive, self._running.abs())
        elif self._fusion == "mean":
            return self._running
        else:
            fused = self._running
        total = fused.sum(-1, keepdim=True)
        return torch.where(total > 0, fused / total, fused)


def fuse(site: AttentionSite, fusion: HeadFusion) -> Float[Tensor, "batch query key"]:
    """The head-fused attention of one site."""
    parts = []
    for _, some_heads in site.chunks(whole_maps=callable(fusion)):
        fuser = Fuser(fusion, site.shape[1], signed=site.signed)
        for _, attention in some_heads:
            fuser.add(attention)
        parts.append(fuser.fused())
    return torch.cat(parts, 1)


def rows_of_one(positive: Float[Tensor, "... query key"]) -> Float[Tensor, "... query key"]:
    """Rows divided by their sums, in place; a row of nothing stays one.

    A sum far below ``NOTHING_POSITIVE`` counts as that: a softmax that is sure of one key leaves 1e-40 for the others,
    which float32 may hold or not, and the row would be those alone if the gradient at the one is negative.
    """
    return positive.div_(positive.sum(-1, keepdim=True).clamp_(min=NOTHING_POSITIVE))
