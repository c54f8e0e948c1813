"""The backward pass of a score, and who rolls relevance while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.attention_backward import Hearing, Play
from captum_lnstat.recording.fusion import Fuser
from captum_lnstat.recording.sites import AttentionSite, FusedSite, Queries, SoftmaxSite
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.rules.checks import check_start, reads
from captum_lnstat.rules.head import gradients
from captum_lnstat.rules.relation import (
    _wanted,
    add_product,
    check_layout,
)
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import _hand_to_children, _Row
from captum_lnstat.rules.wiring import Probe, Wiring
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float, Int


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


class _PositiveGradients:
    """``r <- alpha * r + r A'``, ``A' = E_h[(dA * A)^+]``, rolled block by block while the backward pass runs."""

    def __init__(self, trace: Trace, settings: Settings, *, keep: bool, normalized: bool) -> None:
        self._settings, self._keep, self._normalized = settings, keep, normalized
        start = trace.start(settings.head_fusion)
        self.row = _Row(start[..., None], start.ne(0).any(0).nonzero()[:, 0])
        self._steps = list(trace.steps)
        self.wiring = None if trace.training else Wiring()

    def begin(self, block: Block) -> PositiveGradient:
        self._down_to(block)
        r = self.row.tokens
        self._kept = r if self._keep else block.residual_share(self._settings.residual)[..., None] * r
        given = r - self._kept if self._normalized else r
        return PositiveGradient(block, given, self.row.at, self._normalized, self.wiring)

    def end(self, block: Block, heard: PositiveGradient) -> None:
        self.row.through_block(block, self._kept, *heard.handed())

    def _down_to(self, block: Block | None) -> None:
        while self._steps and (step := self._steps.pop()) is not block:
            if isinstance(step, Block):
                raise RecordingError(
                    f"the gradient reached block {'' if block is None else block.name!r} before {step.name!r}, which "
                    "stands above it; expected blocks that follow one another"
                )
            _hand_to_children([self.row], step, self._settings)

    def at_the_image(self, trace: Trace) -> Relevance:
        self._down_to(None)
        if self.wiring is not None:
            self.wiring.verify()
        return self.row.relevance(trace)[0]


def gradient(trace: Trace, backward: BackwardPass, settings: Settings, *, keep: bool, normalized: bool) -> Relevance:
    """Chefer's generic rule with token statistics: ``r <- alpha * r + r A'``, ``A' = E_h[(dA * A)^+]``.

    ``dL/dA = (dL/dO) v^T`` needs the gradient of the attention's output only, so fused kernels stay in place. ``r``
    goes from the head to the image as the gradient does, so each block is rolled through when the gradient reaches it.

    Args:
        trace: The traced forward pass.
        backward: The backward pass of the score.
        settings: How relevance is rolled.
        keep: Take ``alpha = 1`` everywhere, as Chefer et al. (ICCV 2021) do.
        normalized: Divide every row of ``A'`` by its sum and take ``r <- alpha * r + ((1 - alpha) * r) A'``.
    """
    rolled = _PositiveGradients(trace, settings, keep=keep, normalized=normalized)
    backward.run(trace, rolled)
    return rolled.at_the_image(trace)


class PositiveGradient:
    """Collects ``r A'`` of one block, ``A' = E_h[(dA * A)^+]``, from its maps and their gradients.

    Args:
        block: The block.
        rows: Row vectors at the tokens after the attention.
        at: The only tokens at which they are not zero, if that is known.
        normalized: Divide every row of ``A'`` by its sum.
        wiring: Where the block's update is compared with what the attention was seen to do.
    """

    def __init__(
        self,
        block: Block,
        rows: Float[Tensor, "batch token row"],
        at: Int[Tensor, " place"] | None,
        normalized: bool,
        wiring: Wiring | None,
    ) -> None:
        check_layout(block)
        self._block, self._normalized, self._wiring = block, normalized, wiring
        self.wanted = _wanted(block, at, None)
        site, self._batch = block.site, len(rows)
        self._rows = block.layout.gather(rows).transpose(-2, -1)
        self._probe = None if wiring is None else Probe(block)
        columns = None if self._probe is None else self._probe.columns
        self._probing = None if columns is None else block.layout.gather(columns).transpose(-2, -1)
        self._heard = self._rows.new_zeros(len(self._rows), site.shape[1], 1, site.shape[3])
        self._mixed = self._rows.new_zeros(*self._rows.shape[:2], site.shape[3])
        self._fuser = Fuser("mean", site.shape[1])

    def add(self, queries: Queries, heads: slice, attention: Tensor, weighted: Tensor) -> None:
        """``A`` and ``dA * A`` of some heads and queries; the second is overwritten."""
        if self._probing is not None:
            add_product(self._heard, heads, self._probing[:, :, queries], attention)
        elif self._probe is not None:
            self._probe.add(queries, heads, attention)
        self._fuser.add(weighted.clamp_(min=0))

    def turn(self, queries: Queries) -> None:
        """All heads of these queries have been added."""
        weighted = self._fuser.fused()
        if self._normalized:
            total = weighted.sum(-1, keepdim=True)
            weighted = torch.where(total > 0, weighted / total, weighted)
        self._mixed += self._rows[:, :, queries] @ weighted
        self._fuser = Fuser("mean", self._block.site.shape[1])

    def end(self, heard: Int[Tensor, " query"] | None) -> None:
        """All has been added: of these queries, ``None`` for all, the wanted ones among them."""
        if self._probe is None or self._wiring is None:
            return
        if self._probing is not None:
            self._probe.hear(self._heard)
        self._wiring.note(self._block.name, self._probe.excess(heard))

    def handed(self) -> tuple[Float[Tensor, "batch token row"], Float[Tensor, "batch row"]]:
        """``r A'`` at the tokens before the block, and what of it fell on padded places."""
        keys = self._block.keys or self._block.layout
        return keys.scatter(self._mixed.transpose(-2, -1), self._batch)


def hear_again(site: AttentionSite, output_gradient: Tensor, hearing: Hearing) -> None:
    """Make the maps of a site and their gradients, ``dA = (dL/dO) v^T``, for one who has not heard them."""
    d_output = site.output_gradient(output_gradient)
    d_output = d_output.to(accumulation_dtype(d_output))
    if d_output.shape[1] != site.shape[1]:
        raise RecordingError(
            f"the output of {site.module!r} has {d_output.shape[1]} heads, its attention {site.shape[1]}"
        )
    values = site.values(slice(0, site.shape[1])).transpose(-2, -1)
    for queries, turns in site.chunks(hearing.wanted):
        for heads, attention in turns:
            d_attention = product(d_output[:, heads][:, :, queries], values[:, heads])
            hearing.add(queries, heads, attention, d_attention.mul_(attention))
        hearing.turn(queries)
    hearing.end(hearing.wanted)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, head by head; that of a head alone where it lies in memory."""
    return left @ right if left.shape[1] > 1 else torch.bmm(left[:, 0], right[:, 0])[:, None]
