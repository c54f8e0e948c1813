"""Perception: where what the head reads came from, whatever the class."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_lnstat.rules.relation import Handed
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import _Row, _walk
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, Merging, Transition, Update
from captum_lnstat.trace.trace import Trace


class _Perception:
    """``r <- alpha * r + ((1 - alpha) * r) A``, from the head's class-agnostic start."""

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self._settings = settings
        self.u: Cotangent | None = None
        start = trace.start(settings.head_fusion)
        self.row = _Row(start[..., None], start.ne(0).any(0).nonzero()[:, 0])
        self._kept = self.row.tokens

    def _keep(self, block: Block) -> Tensor:
        return block.residual_share(self._settings.residual)[..., None] * self.row.tokens

    def give(self, block: Block) -> Tensor:
        self._kept = self._keep(block)
        return self.row.tokens - self._kept

    def take(self, block: Block, handed: Tensor, lost: Tensor, said: Handed) -> None:
        self.row.through_block(block, self._kept, handed, lost)

    def beside(self, step: Merging | Update | Transition) -> None:
        """Nothing is said."""


class _RawAttention(_Perception):
    """``r <- r A`` at one block; the other blocks leave ``r`` as it is."""

    def __init__(self, trace: Trace, settings: Settings, chosen: Block) -> None:
        super().__init__(trace, settings)
        self._chosen = chosen

    def _keep(self, block: Block) -> Tensor:
        covered = block.layout.covered
        if block is not self._chosen:
            return self.row.tokens
        return torch.zeros_like(self.row.tokens) if covered is None else self.row.tokens * ~covered[:, None]


def perception(trace: Trace, settings: Settings) -> Relevance:
    """Class-agnostic relevance: how much of the prediction's input came from each patch. Sums to 1, gradient-free."""
    walker = _Perception(trace, settings)
    _walk(trace, [walker], settings)
    return walker.row.relevance(trace)[0]


def raw_attention(trace: Trace, settings: Settings, block: int) -> Relevance:
    """Head-fused attention of one block as the head reads it: ``r A``, no relation of another block. Sums to 1.

    Args:
        trace: The traced forward pass.
        settings: How heads are fused and mergings undone.
        block: Index into the blocks, negative from the last one.
    """
    count = len(trace.blocks)
    if not -count <= block < count:
        raise ValueError(f"block is {block}; expected an index into the {count} blocks, {-count} to {count - 1}")
    walker = _RawAttention(trace, settings, trace.blocks[block])
    _walk(trace, [walker], settings)
    return walker.row.relevance(trace)[0]
