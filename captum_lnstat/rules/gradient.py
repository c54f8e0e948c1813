"""Chefer's generic rule with token statistics: row vectors rolled while the backward pass of the score runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, UnsupportedModelError, warn_caller
from captum_lnstat.recording.attention_backward import Feed, Observer
from captum_lnstat.recording.fusion import Fuser
from captum_lnstat.recording.sites import AttentionSite, FusedSite, Queries, SoftmaxSite
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.rules.checks import check_start, reads
from captum_lnstat.rules.head import check_differentiable, gradients
from captum_lnstat.rules.perception import ShareOf
from captum_lnstat.rules.reads import reads_elsewhere
from captum_lnstat.rules.relation import Propagated, add_product, queries_wanted
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import layer_rule_names, register
from captum_lnstat.rules.walk import Request, RowVector, Walk, advance
from captum_lnstat.rules.wiring import Probe, Wiring
from captum_lnstat.topology.anatomy.pooling import PoolingAsRead
from captum_lnstat.trace.steps import Block, check_layout
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float, Int

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
            alpha = step.residual_share(settings.residual) if share is None else share(step)
            kept = alpha[..., None] * r.tokens
            came = yield Request(step, r.tokens - kept if settings.normalized else r.tokens, r.at)
            r = r.through(step, kept, came.rows, came.padding)
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
    trace, score = outcome.trace, outcome.head.scores[0]
    if not trace.gradients:
        raise UnsupportedModelError(
            f"the attention of this {trace.family} transformer has no output that a gradient can be taken at, so rules "
            f"with the gradient of attention are not defined for it; expected one of "
            f"{', '.join(map(repr, layer_rule_names()))}"
        )
    missing = [block for block in trace.blocks if block.site.output is None]
    if missing:
        raise RecordingError(
            f"the attention of {missing[0].name} is not in the graph of the score, so it has no gradient; expected "
            "a model and forward_func without no_grad, detach or re-entrant checkpointing"
        )
    check_differentiable(score)
    if reads_elsewhere(score, outcome.head.stream_end, outcome.image):
        warn_caller(
            "the score reads the image besides the end of the residual stream, and rule='gradient' begins at that end "
            "alone: rule='lnstat' and 'evidence' begin at every place of the stream that is read, and say what else is"
        )
    rolled = _BackwardWalk(trace, settings, positive_gradients(trace, settings, _start(trace, score, settings), share))
    first, *others = trace.blocks
    waiting = [_AtBlock(block, rolled) for block in others]
    try:
        for one in waiting:
            one.attach()
        slope, last = gradients(score, [outcome.head.stream_end, _output_edge(first)])
    finally:
        for one in waiting:
            one.detach()
    missed = [one.block.name for one in waiting if not one.reached]
    if missed:
        raise RecordingError(
            f"the score does not depend on the attention of {missed[-1]!r}; expected a forward_func that returns "
            "the scores of one pass of the model"
        )
    # The blocks above have been rolled through by now; whether they should have been is seen before it counts.
    check_start(trace, reads(slope))
    return rolled.to_the_image(partial(_feed_again, first.site, last))


def _start(trace: Trace, score: Float[Tensor, " batch"], settings: Settings) -> RowVector:
    """What the head reads for the score; where a topology says it for every class, what that says."""
    if not isinstance(trace.pooling, PoolingAsRead):
        return RowVector.start(trace, settings)
    return RowVector.starting(trace.pooling.start_of(score, settings.head_fusion).to(accumulation_dtype(trace.tokens)))


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
        edge = _output_edge(self.block)
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
            self._take(partial(_feed_again, self.block.site, slope))


def _output_edge(block: Block) -> GradientEdge:
    """Where the output of a block's attention is in the graph."""
    assert block.site.output is not None
    return block.site.output


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
        self.wanted = queries_wanted(block, at, None)
        site, self._batch = block.site, len(rows)
        self._rows = block.layout.gather(rows).transpose(-2, -1)
        self._probe = None if wiring is None else Probe(block)
        columns = None if self._probe is None else self._probe.columns
        self._probing = None if columns is None else block.layout.gather(columns).transpose(-2, -1)
        self._products = self._rows.new_zeros(len(self._rows), site.shape[1], 1, site.shape[3])
        self._mixed = self._rows.new_zeros(*self._rows.shape[:2], site.shape[3])
        self._fuser = Fuser("mean", site.shape[1])

    def add(self, queries: Queries, heads: slice, attention: Tensor, weighted: Tensor) -> None:
        """``A`` and ``dA * A`` of some heads and queries; the second is overwritten."""
        if self._probing is not None:
            add_product(self._products, heads, self._probing[:, :, queries], attention)
        elif self._probe is not None:
            self._probe.add(queries, heads, attention)
        self._fuser.add(weighted.clamp_(min=0))

    def end_chunk(self, queries: Queries) -> None:
        """All heads of these queries have been added."""
        weighted = self._fuser.fused()
        if self._normalized:
            total = weighted.sum(-1, keepdim=True)
            weighted = torch.where(total > 0, weighted / total, weighted)
        self._mixed += self._rows[:, :, queries] @ weighted
        self._fuser = Fuser("mean", self._block.site.shape[1])

    def finish(self, queries: Int[Tensor, " query"] | None) -> None:
        """All has been added: of these queries, ``None`` for all, the wanted ones among them."""
        if self._probe is None or self._wiring is None:
            return
        if self._probing is not None:
            self._probe.add_products(self._products)
        self._wiring.note(self._probe.compared(queries))

    def propagated(self) -> Propagated:
        """``r A'`` at the tokens before the block, and what of it fell on padded places."""
        keys = self._block.keys or self._block.layout
        return Propagated(*keys.scatter(self._mixed.transpose(-2, -1), self._batch))


def _feed_again(site: AttentionSite, output_gradient: Tensor, observer: Observer) -> None:
    """Make the maps of a site and their gradients, ``dA = (dL/dO) v^T``, where no backward pass of ours made them."""
    d_output = site.output_gradient(output_gradient)
    d_output = d_output.to(accumulation_dtype(d_output))
    if d_output.shape[1] != site.shape[1]:
        raise RecordingError(
            f"the output of {site.module!r} has {d_output.shape[1]} heads, its attention {site.shape[1]}"
        )
    values = site.values(slice(0, site.shape[1])).transpose(-2, -1)
    for queries, some_heads in site.chunks(observer.wanted):
        for heads, attention in some_heads:
            d_attention = _product(d_output[:, heads][:, :, queries], values[:, heads])
            observer.add(queries, heads, attention, d_attention.mul_(attention))
        observer.end_chunk(queries)
    observer.finish(observer.wanted)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, head by head; that of a head alone where it lies in memory."""
    return left @ right if left.shape[1] > 1 else torch.bmm(left[:, 0], right[:, 0])[:, None]
