"""The gradient of a score at attention maps, and at the tokens after blocks, for the rules that are made of them.

``dL/dA = (dL/dO) v^T`` needs the gradient at the attention's output ``O = A v`` only, so fused kernels stay in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, UnsupportedModelError, warn_caller
from captum_lnstat.recording.attention_backward import Observer
from captum_lnstat.recording.fusion import Fuser, rows_of_one
from captum_lnstat.recording.sites import AttentionSite, Queries
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.recording.statistics import accumulation_dtype, stream
from captum_lnstat.rules.checks import check_start, reads
from captum_lnstat.rules.head import check_differentiable
from captum_lnstat.rules.reads import reads_elsewhere
from captum_lnstat.rules.relation import Propagated, add_product, queries_wanted
from captum_lnstat.rules.relevance import Settings
from captum_lnstat.rules.rule import layer_rule_names
from captum_lnstat.rules.walk import RowVector
from captum_lnstat.rules.wiring import Probe, Wiring
from captum_lnstat.topology.anatomy.pooling import PoolingAsRead
from captum_lnstat.trace.steps import Block, Step, check_layout
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from captum_lnstat.rules.engine import Pass

# From ``dA``, which may be overwritten, and ``A`` of some heads and queries to what maps are weighted with.
Weigh = Callable[[AttentionSite, slice, Queries, Tensor, Tensor], Tensor]


def check_graph(outcome: Pass) -> None:
    """Every attention has to be in the graph of the first score.

    Raises:
        UnsupportedModelError: An attention has no output that a gradient can be taken at.
        RecordingError: The score, or an attention, is not in the graph.
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
            "the score reads the image besides the end of the residual stream, and a rule with gradients of attention "
            "begins at that end alone: rule='lnstat' and 'evidence' begin at every place of the stream that is read, "
            "and say what else is"
        )


def output_edge(block: Block) -> GradientEdge:
    """Where the output of a block's attention is in the graph."""
    assert block.site.output is not None
    return block.site.output


def slopes(outcome: Pass, at: Sequence[Tensor | GradientEdge], *, keep_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradient of the first score at places of its graph, from one backward pass."""
    with torch.enable_grad():
        total = outcome.head.scores[0].sum()
    places = [outcome.head.stream_end, *at]
    read, *found = slopes_at(total, places, keep_graph=keep_graph, unused=False)
    check_start(outcome.trace, reads(read))
    return tuple(found)


def start_of(trace: Trace, score: Float[Tensor, " batch"], settings: Settings) -> RowVector:
    """What the head reads for the score; where a topology says it for every class, what that says."""
    if not isinstance(trace.pooling, PoolingAsRead):
        return RowVector.start(trace, settings)
    return RowVector.starting(trace.pooling.start_of(score, settings.head_fusion).to(accumulation_dtype(trace.tokens)))


def tokens_in_graph(outcome: Pass, step: Step) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a step returned, in the graph of the score, and the way from a tensor of its shape to its tokens.

    Raises:
        UnsupportedModelError: No module returned it.
    """
    calls = outcome.recording.calls
    for call in (*calls.get(step.name, ()), *(call for some in calls.values() for call in some)):
        output = call.output.tensor
        for as_tokens in (stream, _channels_first):
            if output.requires_grad and output.dim() >= 3:
                tokens = as_tokens(output.detach())
                if tokens.shape == step.after.shape and torch.equal(tokens, step.after):
                    return output, as_tokens
    raise UnsupportedModelError(
        f"no module returns the tokens after {step.name!r}, so no gradient can be taken there; expected blocks that "
        "are modules. The methods that need attention's gradients alone, such as rule='gradient', take this model"
    )


def _channels_first(value: Tensor) -> Tensor:
    return stream(value.movedim(1, -1))


class PositiveGradient:
    """Collects ``r A'`` of one block, ``A' = E_h[(dA * A)^+]``, from its maps and their gradients.

    Fed with other weights than ``dA * A``, these take their place.

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
            weighted = rows_of_one(weighted)
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


def by_head(site: AttentionSite, output_gradient: Tensor) -> Float[Tensor, "group head query channel"]:
    """``dL/dO`` as at a site's output, as one at ``A v``, head by head."""
    d_output = site.output_gradient(output_gradient)
    if d_output.shape[1] != site.shape[1]:
        raise RecordingError(
            f"the output of {site.module!r} has {d_output.shape[1]} heads, its attention {site.shape[1]}"
        )
    return d_output.to(accumulation_dtype(d_output))


def feed(site: AttentionSite, output_gradient: Tensor, observer: Observer, weigh: Weigh | None = None) -> None:
    """Make the maps of a site and their gradients, ``dA = (dL/dO) v^T``, where no backward pass of ours made them.

    Args:
        site: The attention.
        output_gradient: ``dL/dO`` as at the site's output.
        observer: What reads them.
        weigh: What it gets besides ``A``; by default ``dA * A``.
    """
    d_output = by_head(site, output_gradient)
    values = site.values(slice(0, site.shape[1])).transpose(-2, -1)
    for queries, some_heads in site.chunks(observer.wanted):
        for heads, attention in some_heads:
            d_attention = _product(d_output[:, heads][:, :, queries], values[:, heads])
            weighted = (weigh or _times_attention)(site, heads, queries, d_attention, attention)
            observer.add(queries, heads, attention, weighted)
        observer.end_chunk(queries)
    observer.finish(observer.wanted)


def observed(block: Block, rows: RowVector, slope: Tensor, wiring: Wiring | None, weigh: Weigh) -> Propagated:
    """``r A'`` of a block, with ``A'`` the mean over heads of the positive part of other weights than ``dA * A``."""
    observer = PositiveGradient(block, rows.tokens, rows.at, False, wiring)
    feed(block.site, slope, observer, weigh)
    return observer.propagated()


def _times_attention(site: AttentionSite, heads: slice, queries: Queries, d_attention: Tensor, a: Tensor) -> Tensor:
    return d_attention.mul_(a)


def bare(site: AttentionSite, heads: slice, queries: Queries, d_attention: Tensor, a: Tensor) -> Tensor:
    """``dA`` as it is."""
    return d_attention


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, head by head; that of a head alone where it lies in memory."""
    return left @ right if left.shape[1] > 1 else torch.bmm(left[:, 0], right[:, 0])[:, None]
