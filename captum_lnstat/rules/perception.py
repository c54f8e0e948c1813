"""Perception ``P``: how much of what the head reads came from each patch, whatever the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.walk import Request, RowVector, Walk, walk
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass

ShareOf = Callable[[Block], "Float[Tensor, 'batch token']"]


def perception(trace: Trace, settings: Settings, share: ShareOf | None = None) -> Walk:
    """``r <- alpha * r + ((1 - alpha) * r) W``, from what the head reads. Sums to 1, no gradient of any kind.

    Args:
        trace: The traced forward pass.
        settings: The residual share, how heads are fused, how mergings are undone.
        share: The residual share ``alpha`` of a block, if not that of the settings.
    """
    r = RowVector.start(trace, settings)
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            alpha, rest = step.shares_of(settings.residual) if share is None else whole(share(step))
            came = yield Request(step, rest[..., None] * r.tokens, r.at)
            r = r.through(step, alpha, came.rows, came.padding)
        else:
            r = r.to_children(step, settings.merging)
    return r.relevance(trace)


@register(
    "rollout",
    formula="P: r <- alpha * r + ((1 - alpha) * r) W, class-agnostic, sums to 1",
    options=("residual", "head_fusion"),
    class_specific=False,
    head_fusion="variance",
)
def rollout(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """Perception alone."""
    return walk(outcome.trace, settings, perception(outcome.trace, settings))[0]


def raw_attention(outcome: Pass, settings: Settings, block: int) -> tuple[Relevance, ...]:
    """Head-fused attention of one block as the head reads it: ``r A``, no relation of another block. Sums to 1.

    Args:
        outcome: The traced forward pass.
        settings: How heads are fused and mergings undone.
        block: Index into the blocks, negative from the last one.
    """
    trace = outcome.trace
    count = len(trace.blocks)
    if not -count <= block < count:
        raise ValueError(f"block is {block}; expected an index into the {count} blocks, {-count} to {count - 1}")
    chosen = trace.blocks[block]

    def share(one: Block) -> Tensor:
        everything, covered = keep_all(one), one.layout.covered
        if one is not chosen:
            return everything
        return everything * 0 if covered is None else everything * ~covered

    return walk(trace, settings, perception(trace, settings, share))[0]


def whole(alpha: Float[Tensor, "batch token"]) -> tuple[Tensor, Tensor]:
    """A share and the rest."""
    return alpha, 1 - alpha


def keep_all(block: Block) -> Float[Tensor, "batch token"]:
    """A residual share of 1: every token keeps all of its relevance."""
    return block.between.new_ones(block.between.shape[:2])
