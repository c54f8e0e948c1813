"""The backward pass of a score, and who rolls relevance while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.checks import check_start, reads
from captum_lnstat.errors import RecordingError
from captum_lnstat.head import gradients
from captum_lnstat.listened import Play
from captum_lnstat.relation import PositiveGradient, hear_again
from captum_lnstat.sites import FusedSite, SoftmaxSite
from captum_lnstat.trace import Block, Trace


class Rolling(Protocol):
    """Takes row vectors through the blocks, last block first."""

    def begin(self, block: Block) -> PositiveGradient:
        """The gradient has reached a block: who hears its maps."""
        ...

    def end(self, block: Block, heard: PositiveGradient) -> None:
        """It has heard them all."""
        ...


@dataclass(frozen=True)
class BackwardPass:
    """The backward pass from a score to the first block's attention; it can run once.

    The gradient at one attention is dropped before the next is reached: none of all blocks is kept.

    Attributes:
        score: One value an image, in the graph of the forward pass.
        stream_end: The residual stream where the head begins.
    """

    score: Tensor
    stream_end: Tensor

    def run(self, trace: Trace, rolling: Rolling) -> None:
        """Call ``rolling`` for every block, last to first. What was put on the graph to that end is taken off it.

        Raises:
            RecordingError: The score does not depend on every block's attention, or reads other tokens than the head
                was recognised to read.
        """
        first, *others = trace.blocks
        takers = [_Taker(block, rolling) for block in others]
        try:
            for taker in takers:
                taker.attach()
            with torch.enable_grad():
                slope, last = gradients(self.score, [self.stream_end, output_edge(first)])
        finally:
            for taker in takers:
                taker.detach()
        missed = [taker.block.name for taker in takers if not taker.reached]
        if missed:
            raise RecordingError(
                f"the score does not depend on the attention of {missed[-1]!r}; expected a forward_func that returns "
                "the scores of one pass of the model"
            )
        # The blocks above have been rolled through by now; whether they should have been is seen before it counts.
        check_start(trace, reads(slope))
        roll(first, rolling, partial(hear_again, first.site, last))


class _Taker:
    """Waits at the output of one block's attention for the gradient."""

    def __init__(self, block: Block, rolling: Rolling) -> None:
        self.block, self._rolling = block, rolling
        self.reached = False
        self._take_off: Callable[[], None] | None = None

    def attach(self) -> None:
        edge = output_edge(self.block)
        node: Any = edge.node
        site = getattr(node, "site", None)
        if isinstance(site, FusedSite | SoftmaxSite) and site.shape == self.block.site.shape:
            node.listener = self._take
            self._take_off = partial(setattr, node, "listener", None)
        else:
            self._take_off = node.register_prehook(partial(self._hook, edge.output_nr)).remove

    def detach(self) -> None:
        if self._take_off is not None:
            self._take_off()

    def _take(self, play: Play) -> None:
        self.reached = True
        roll(self.block, self._rolling, play)

    def _hook(self, index: int, slopes: tuple[Tensor | None, ...]) -> None:
        slope = slopes[index]
        if slope is not None:
            self._take(partial(hear_again, self.block.site, slope))


def roll(block: Block, rolling: Rolling, play: Play) -> None:
    """Take the row vectors through a block, whose maps and gradients are played to them."""
    heard = rolling.begin(block)
    play(heard)
    rolling.end(block, heard)


def output_edge(block: Block) -> GradientEdge:
    """Where the output of a block's attention is in the graph."""
    assert block.site.output is not None
    return block.site.output
