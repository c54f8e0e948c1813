"""AttCAT: what each token says for the class after every block, by how much it is attended to there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.rules.attention_gradient import check_graph, slopes, tokens_in_graph
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import Request, RowVector, Walk, walk
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from captum_lnstat.rules.engine import Pass


def attcat(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``sum_l a_j^l sum_c x_jc^l dy/dx_jc^l``, ``a_j`` the mean over heads and queries of attention to token ``j``."""
    check_graph(outcome)
    # Not in the walk: an error of a user's backward hook could become another one in a generator.
    places = [tokens_in_graph(outcome, block) for block in outcome.trace.blocks]
    found = slopes(outcome, [tokens for tokens, _ in places])
    tokens = [as_tokens(slope) for slope, (_, as_tokens) in zip(found, places, strict=True)]
    return walk(outcome.trace, settings, _attended(outcome.trace, tokens))[0]


def _attended(trace: Trace, slopes_after: list[Tensor]) -> Walk:
    total = RowVector.of(torch.zeros_like(trace.end[..., :1]), None)
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            if step.below is not None:
                raise UnsupportedModelError(
                    f"the attention of {step.name!r} returns fewer tokens than it attends to, so it is not known how "
                    "much each of them is attended to; expected as many"
                )
            cat = (slopes_after.pop() * step.after).sum(-1, keepdim=True)
            came = yield Request(step, torch.full_like(cat, 1 / step.site.shape[2]), None)
            total = total.plus(came.rows * cat)
        else:
            total = total.to_children(step, "uniform")
    return total.relevance(trace)
