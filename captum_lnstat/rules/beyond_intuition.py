"""Beyond Intuition: how tokens come together (perception), times how what comes of it is used (feedback)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.sites import Queries
from captum_lnstat.rules.attention_gradient import bare, check_graph, feed, output_edge, slopes, start_of
from captum_lnstat.rules.relation import propagate, queries_wanted
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import RowVector
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.maps import apply
from captum_lnstat.trace.steps import Block, Step

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from captum_lnstat.rules.engine import Pass

Approximation = Literal["token", "head"]


def beyond_intuition(
    outcome: Pass, settings: Settings, approximation: Approximation, steps: int
) -> tuple[Relevance, ...]:
    """``sum_i r_i P_ij F_ij``: the rows of ``P`` and ``F`` of the tokens that the head reads, by the weights ``r``.

    Args:
        outcome: The pass of the images themselves, the last of ``steps``.
        settings: Not read.
        approximation: How ``P`` takes the linear maps of a block into account.
        steps: Passes of the images times ``k / steps``, over which ``dA`` is averaged in ``F``.
    """
    check_graph(outcome)
    trace, last = outcome.trace, outcome.trace.blocks[-1]
    start = start_of(trace, outcome.head.scores[0], settings)
    at = torch.arange(start.tokens.shape[1], device=start.tokens.device) if start.at is None else start.at
    same = trace.end.shape[1] == last.between.shape[1]
    feedback = _Feedback(last, queries_wanted(last, at, None) if same else None, steps)
    wanted = trace.blocks if approximation == "head" else trace.blocks[-1:]
    found = slopes(outcome, [output_edge(block) for block in wanted])
    feed(last.site, found[-1], feedback, bare)
    for step in range(1, steps):
        _feed_again(outcome.again(outcome.image.detach() * (step / steps)), feedback)
    one_hot = torch.eye(start.tokens.shape[1], dtype=start.tokens.dtype, device=at.device)[:, at]
    p = RowVector.of(one_hot.expand(len(start.tokens), -1, -1), start.at)
    f, left, wiring = p.tokens, list(found), None if trace.training else Wiring()
    for one in reversed(trace.steps):
        if not isinstance(one, Block):
            p, f = p.to_children(one, "uniform"), _to_all_children(one, f)
            continue
        f = feedback.rows(f) if one is last else _to_all_children(one, f)
        heads: HeadFusion = _by_importance(one, left.pop()) if approximation == "head" else "mean"
        came = propagate(one, p.tokens, p.at, None, heads, wiring)
        gain = _gain(one) if approximation == "token" else 1
        p = p.through(one, None, came.rows * gain, came.padding)
    if wiring is not None:
        wiring.verify()
    both = (start.tokens[:, at, 0][:, None] * p.tokens * f).sum(-1, keepdim=True)
    return RowVector.of(both, None).relevance(trace)


class _Sum:
    """Reads the maps of one attention and their gradients; what it makes of them is added up as they come."""

    def __init__(self, block: Block, wanted: Int[Tensor, " query"] | None = None) -> None:
        self._block, self.wanted = block, wanted

    def end_chunk(self, queries: Queries) -> None:
        """All heads of these queries have been added."""

    def finish(self, queries: Int[Tensor, " query"] | None) -> None:
        """All of one pass has been added."""


class _Feedback(_Sum):
    """``F = E_h (mean over passes of dA)^+`` of one block, for some of its queries."""

    def __init__(self, block: Block, wanted: Int[Tensor, " query"] | None, passes: int) -> None:
        super().__init__(block, wanted)
        self._passes = passes
        groups, heads, queries, keys = block.site.shape
        count = queries if wanted is None else len(wanted)
        self._sum = block.before.new_zeros(groups, heads, count, keys)

    def add(self, queries: Queries, heads: slice, attention: Tensor, weighted: Tensor) -> None:
        """``dA`` of some heads and queries."""
        if self.wanted is not None and isinstance(queries, Tensor):
            queries = torch.searchsorted(self.wanted, queries)
        self._sum[:, heads, queries] += weighted

    def rows(self, rows: Float[Tensor, "batch token row"]) -> Float[Tensor, "batch token_before row"]:
        """Row vectors times ``F``."""
        left = self._block.layout.gather(rows).transpose(-2, -1)
        left = left if self.wanted is None else left[:, :, self.wanted]
        maps = (self._sum / self._passes).clamp(min=0).mean(1)
        keys = self._block.keys or self._block.layout
        return keys.scatter((left @ maps).transpose(-2, -1), len(rows))[0]


def _feed_again(outcome: Pass, feedback: _Feedback) -> None:
    last = outcome.trace.blocks[-1]
    (slope,) = slopes(outcome, [output_edge(last)])
    feed(last.site, slope, feedback, bare)


def _to_all_children(step: Step, values: Float[Tensor, "batch token row"]) -> Float[Tensor, "batch token_before row"]:
    """Every token before a step with the value of the token that it became part of."""
    if step.below is None:
        return values
    children = values[:, :, None].expand(-1, -1, step.below.index.shape[1], -1).flatten(0, 1)
    total, count = (step.below.scatter(some, len(values))[0] for some in (children, torch.ones_like(children)))
    return torch.where(count > 0, total / count, 0)


def _gain(block: Block) -> Float[Tensor, "batch token 1"]:
    """How much longer a token's value is, once projected, than the token: ``||v_j W_O|| / ||x_j||``."""
    if block.below is not None:
        raise UnsupportedModelError(
            f"the attention of {block.name!r} returns fewer tokens than it attends to, so what becomes of each of them "
            "is not known; expected as many, or approximation='head'"
        )
    keys, batch = block.keys or block.layout, len(block.before)
    values = block.site.values(slice(0, block.site.shape[1])).transpose(1, 2).flatten(2)
    total, count = (keys.scatter(some, batch)[0] for some in (values, torch.ones_like(values)))
    values = torch.where(count > 0, total / count, 0)
    linear = apply(block.path, values) - apply(block.path, torch.zeros_like(values))
    length = block.before.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, linear.norm(dim=-1, keepdim=True) / length, 0)


class _Importance(_Sum):
    """``sum_ij A_ij dA_ij`` of every head."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.sums = block.before.new_zeros(block.site.shape[:2])

    def add(self, queries: Queries, heads: slice, attention: Tensor, weighted: Tensor) -> None:
        """``dA * A`` of some heads and queries."""
        self.sums[:, heads] += weighted.sum((2, 3))


def _by_importance(block: Block, slope: Tensor) -> Callable[[Tensor], Tensor]:
    """Heads fused by ``theta_h = I_h / sum I``, ``I_h = |sum_ij A_ij dA_ij|`` over all windows of an image."""
    found = _Importance(block)
    feed(block.site, slope, found)
    images = len(block.before)
    theta = found.sums.reshape(images, -1, found.sums.shape[1]).sum(1).abs()
    total = theta.sum(1, keepdim=True)
    theta = torch.where(total > 0, theta / total, 0).repeat_interleave(len(found.sums) // images, 0)
    return lambda maps: torch.einsum("gh,ghqk->gqk", theta, maps)
