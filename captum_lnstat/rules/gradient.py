"""Chefer's generic rule with token statistics: row vectors rolled while the backward pass of the score runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.attention_backward import Feed
from captum_lnstat.recording.sites import FusedSite, SoftmaxSite
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.rules.attention_gradient import PositiveGradient, by_head, check_graph, feed, output_edge, start_of
from captum_lnstat.rules.checks import check_start, reads
from captum_lnstat.rules.head import gradients
from captum_lnstat.rules.perception import ShareOf, whole
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.stacked_blocks import StackedBlock, room_for_maps, stacked
from captum_lnstat.rules.walk import Request, RowVector, Walk, advance
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from captum_lnstat.rules.engine import Pass


def positive_gradients(trace: Trace, settings: Settings, r: RowVector, share: ShareOf | None = None) -> Walk:
    """``r <- alpha * r + ((1 - alpha) * r) A'``, with the rows of ``A' = E_h[(dA * A)^+]`` divided by their sums.

    Without ``settings.normalized``, Chefer's own form: the rows as they are, and ``r <- alpha * r + r A'``.

    Args:
        trace: The traced forward pass.
        settings: How relevance is rolled.
        r: What the head reads for the score.
        share: The residual share ``alpha`` of a block, if not that of the settings.
    """
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            alpha, rest = step.shares_of(settings.residual) if share is None else whole(share(step))
            came = yield Request(step, rest[..., None] * r.tokens if settings.normalized else r.tokens, r.at)
            r = r.through(step, alpha, came.rows, came.padding)
        else:
            r = r.to_children(step, settings.merging)
    return r.relevance(trace)


@register(
    "gradient",
    formula="r <- alpha * r + ((1 - alpha) * r) A', A' = E_h[(dA * A)^+] with rows that sum to 1",
    options=("residual", "contrastive", "normalized"),
    differentiable="model",
    starts=False,
)
def gradient(outcome: Pass, settings: Settings, share: ShareOf | None = None) -> tuple[Relevance, ...]:
    """Positive gradients, rolled while the backward pass runs.

    ``dL/dA = (dL/dO) v^T`` needs the gradient of the attention's output only, so fused kernels stay in place. ``r``
    goes from the head to the image as the gradient does, so each block is rolled through when the gradient reaches it,
    and the gradient at one attention is dropped before the next is reached: none of all blocks is kept.

    Raises:
        UnsupportedModelError: An attention has no output that a gradient can be taken at.
        RecordingError: The score does not depend on every block's attention, or reads other tokens than the head was
            recognised to read.
    """
    score = outcome.head.scores[0]
    check_graph(outcome)
    trace = stacked(outcome.trace, room_for_maps(score.device))
    rule = positive_gradients(trace, settings, start_of(trace, score, settings), share)
    if all(isinstance(block, StackedBlock) for block in trace.blocks):
        return _in_stacks(outcome, trace, rule, settings.normalized)
    rolled = _BackwardWalk(trace, settings, rule)
    first, *others = trace.blocks
    waiting = [_AtBlock(block, rolled) for block in others]
    try:
        for one in waiting:
            one.attach()
        slope, last = gradients(score, [outcome.head.stream_end, output_edge(first)])
    finally:
        for one in waiting:
            one.detach()
    _check_reached(one.block.name for one in waiting if not one.reached)
    # The blocks above have been rolled through by now; whether they should have been is seen before it counts.
    check_start(trace, reads(slope))
    return rolled.to_the_image(partial(feed, first.site, last))


def _in_stacks(outcome: Pass, trace: Trace, rule: Walk, normalized: bool) -> tuple[Relevance, ...]:
    """The same with the gradients of all blocks at once, and then everything of a stack of blocks: few kernels."""
    with torch.enable_grad():
        total = outcome.head.scores[0].sum()
    edges = [output_edge(block) for block in trace.blocks]
    read, *found = slopes_at(total, [outcome.head.stream_end, *edges], keep_graph=False)
    _check_reached(block.name for block, slope in zip(trace.blocks, found, strict=True) if slope is None)
    check_start(trace, reads(read))
    slopes = {block.name: by_head(block.site, slope) for block, slope in zip(trace.blocks, found, strict=True)}
    wiring = None if trace.training else Wiring()
    came = advance(rule)
    while isinstance(came, Request):
        assert isinstance(came.block, StackedBlock)
        came = advance(rule, came.block.propagate_gradient(came.rows, slopes, normalized, wiring))
    if wiring is not None:
        wiring.verify()
    return came


def _check_reached(missed: Iterable[str]) -> None:
    """Raise if the gradient did not reach the attentions of some blocks."""
    names = list(missed)
    if names:
        raise RecordingError(
            f"the score does not depend on the attention of {names[-1]!r}; expected a forward_func that returns the "
            "scores of one pass of the model"
        )


class _BackwardWalk:
    """Takes a rule from block to block as the gradient reaches them, last block first."""

    def __init__(self, trace: Trace, settings: Settings, rule: Walk) -> None:
        self._first, self._normalized = trace.blocks[0], settings.normalized
        self._rule, self._next = rule, advance(rule)
        self._wiring = None if trace.training else Wiring()

    def through(self, block: Block, feed: Feed) -> None:
        """The gradient has reached a block, whose maps and their gradients are fed to the rule's row vectors."""
        request = self._next
        assert isinstance(request, Request)
        if request.block is not block:
            raise RecordingError(
                f"the gradient reached block {block.name!r} before {request.block.name!r}, which stands above it; "
                "expected blocks that follow one another"
            )
        rolling = PositiveGradient(block, request.rows, request.at, self._normalized, self._wiring)
        feed(rolling)
        block.forget()
        if block is self._first and self._wiring is not None:
            self._wiring.verify()
        self._next = advance(self._rule, rolling.propagated())

    def to_the_image(self, feed: Feed) -> tuple[Relevance, ...]:
        """The first block, and what comes of it all."""
        self.through(self._first, feed)
        assert not isinstance(self._next, Request)
        return self._next


class _AtBlock:
    """Waits at the output of one block's attention for the gradient."""

    def __init__(self, block: Block, rolled: _BackwardWalk) -> None:
        self.block, self._rolled = block, rolled
        self.reached = False
        self._take_off: Callable[[], None] | None = None

    def attach(self) -> None:
        edge = output_edge(self.block)
        node: Any = edge.node
        site = getattr(node, "site", None)
        if isinstance(site, FusedSite | SoftmaxSite) and site.shape == self.block.site.shape:
            node.observer = self._take
            self._take_off = partial(setattr, node, "observer", None)
        else:
            self._take_off = node.register_prehook(partial(self._hook, edge.output_nr)).remove

    def detach(self) -> None:
        if self._take_off is not None:
            self._take_off()

    def _take(self, feed: Feed) -> None:
        self.reached = True
        self._rolled.through(self.block, feed)

    def _hook(self, index: int, slopes: tuple[Tensor | None, ...]) -> None:
        slope = slopes[index]
        if slope is not None:
            self._take(partial(feed, self.block.site, slope))
