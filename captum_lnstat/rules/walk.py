"""The walk from the head to the image that several rules share: row vectors, and each attention map made once.

Every relation of a block is ``R = diag(alpha) + diag(1 - alpha) A``, row = token after the block, column = token
before. ``A`` stands for the relation that an update is shared by: attention weighted by what it brings, ``W``, or the
map that the heads were fused to. Only the row vector ``r`` travels, from the head to the image:
``r R = alpha * r + ((1 - alpha) * r) A``, window by window. No matrix of all tokens against all tokens is ever built.

A rule is a generator. It goes through the steps of the trace, last to first; at a block it yields a ``Request``, what
it wants propagated through the attention, and receives what came of it, ``Propagated``.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.devices import has_a_queue
from captum_lnstat.rules.relation import Propagated, propagate
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.stacked_blocks import StackedBlock
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, MergingShare, Step
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Request:
    """What a rule wants from the attention of a block.

    Attributes:
        block: The block.
        rows: Row vectors at the tokens after the attention, to be multiplied with its map.
        at: The only tokens at which they are not zero, if that is known.
        u: Cotangent of the stream after the attention, whose value contributions are wanted.
    """

    block: Block
    rows: Float[Tensor, "batch token row"]
    at: Int[Tensor, " place"] | None
    u: Cotangent | None = None


Walk = Generator[Request, Propagated, tuple[Relevance, ...]]


@dataclass(frozen=True)
class RowVector:
    """Row vectors on their way from the head to the image.

    Attributes:
        tokens: A value at every token, for every row vector.
        at: The only tokens at which they are not zero, if that is known.
        padding: What padded places took from them on the way.
    """

    tokens: Float[Tensor, "batch token row"]
    at: Int[Tensor, " place"] | None
    padding: Float[Tensor, "batch row"]

    @classmethod
    def of(cls, tokens: Float[Tensor, "batch token row"], at: Tensor | None) -> RowVector:
        """Row vectors that nothing has been taken from."""
        return cls(tokens, at, tokens.new_zeros(len(tokens), tokens.shape[-1]))

    @classmethod
    def start(cls, trace: Trace, settings: Settings) -> RowVector:
        """What the head reads, whatever the class."""
        return cls.starting(trace.start(settings.head_fusion))

    @classmethod
    def starting(cls, weights: Float[Tensor, "batch token"]) -> RowVector:
        """One row vector, whose zeros are seen."""
        at = None if has_a_queue(weights.device) else weights.ne(0).any(0).nonzero()[:, 0]
        return cls.of(weights[..., None], at if at is not None and len(at) else None)

    def plus(self, values: Float[Tensor, "batch token row"] | None) -> RowVector:
        """With something put on the tokens; ``None`` is nothing."""
        return replace(self, tokens=plus(self.tokens, values))

    def through(
        self,
        block: Block,
        alpha: Float[Tensor, "batch token"] | None,
        rows: Tensor,
        padding: Tensor | None,
        read: Tensor | None = None,
    ) -> RowVector:
        """Before a block: what its tokens keep of it, and what the attention propagated to the tokens it read.

        Args:
            block: The block.
            alpha: The share that the tokens keep; ``None`` is all.
            rows: What was propagated.
            padding: What of that fell on padded places.
            read: What the tokens have besides.
        """
        lost = plus(self.padding, padding)
        if alpha is not None and block.below is None and read is None:
            return RowVector(torch.addcmul(rows, alpha[..., None], self.tokens), None, lost)
        kept = plus(self.tokens if alpha is None else alpha[..., None] * self.tokens, read)
        return RowVector(kept, None, lost).to_children(block, "uniform").plus(rows)

    def to_children(self, step: Step, merging: MergingShare) -> RowVector:
        """Before a step: relevance of a token goes to the tokens below it."""
        if step.below is None:
            return self
        children = (self.tokens[:, :, None] * step.shares(merging)[..., None]).flatten(0, 1)
        if not step.below.padded:
            return RowVector(step.below.join(children, len(self.tokens)), None, self.padding)
        tokens, lost = step.below.scatter(children, len(self.tokens))
        return RowVector(tokens, None, self.padding + lost)

    def relevance(self, trace: Trace, constant: Tensor | None = None) -> tuple[Relevance, ...]:
        """At the image: one relevance for every row vector."""
        prefix, grid = trace.off_grid(self.tokens), trace.on_grid(self.tokens).movedim(-1, 0).contiguous()
        constant = torch.zeros_like(self.padding) if constant is None else constant
        return tuple(
            Relevance(grid[i], prefix[..., i], self.padding[..., i], constant[..., i]) for i in range(len(grid))
        )


def plus(values: Tensor, more: Tensor | None) -> Tensor:
    """The sum; ``None`` is nothing."""
    return values if more is None else values + more


def walk(trace: Trace, settings: Settings, *rules: Walk) -> list[tuple[Relevance, ...]]:
    """Run rules from the head to the image side by side, so that each attention map is made once for all of them.

    Args:
        trace: The traced forward pass.
        settings: How heads are fused.
        *rules: Rules that have just begun, all of this trace.

    Returns:
        What each rule returned.

    Raises:
        RecordingError: The attention of a block is not what was added to the stream there.
    """
    wiring = None if trace.training else Wiring()
    requests = [advance(rule) for rule in rules]
    for block in reversed(trace.blocks):
        wanted = [request for request in requests if isinstance(request, Request)]
        u = next((request.u for request in wanted if request.u is not None), None)
        rows = wanted[0].rows if len(wanted) == 1 else torch.cat([request.rows for request in wanted], -1)
        if isinstance(block, StackedBlock) and block.takes(u, settings.head_fusion):
            came = block.propagate(rows, u, settings.head_fusion, wiring, alone=len(wanted) == 1)
        else:
            known = [request.at for request in wanted if request.at is not None]
            at = torch.unique(torch.cat(known)) if len(known) == len(wanted) else None
            came = propagate(block, rows, at, u, settings.head_fusion, wiring)
        block.forget()
        if wiring is not None and block is trace.blocks[0]:
            wiring.verify()
        ends = itertools.accumulate((request.rows.shape[-1] for request in wanted), initial=0)
        parts = [came.of(slice(*pair)) for pair in itertools.pairwise(ends)]
        requests = [advance(rule, part) for rule, part in zip(rules, parts, strict=True)]
    return [result for result in requests if not isinstance(result, Request)]


def advance(rule: Walk, answer: Propagated | None = None) -> Request | tuple[Relevance, ...]:
    """To the rule's next request, or to what it returns."""
    try:
        return next(rule) if answer is None else rule.send(answer)
    except StopIteration as end:
        relevance: tuple[Relevance, ...] = end.value
        return relevance
