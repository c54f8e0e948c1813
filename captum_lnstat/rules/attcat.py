"""AttCAT: what each token says for the class after every block, by how much it is attended to there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.rules.attention_gradient import check_graph, slopes, tokens_in_graph
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import Request, RowVector, Walk, walk
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from captum_lnstat.rules.engine import Pass


def attcat(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``sum_l a_j^l sum_c x_jc^l dy/dx_jc^l``, ``a_j`` the mean over heads and queries of attention to token ``j``."""
    check_graph(outcome)
    return walk(outcome.trace, settings, _attended(outcome))[0]


def _attended(outcome: Pass) -> Walk:
    trace = outcome.trace
    places = [tokens_in_graph(outcome, block) for block in trace.blocks]
    left = list(zip(slopes(outcome, [tokens for tokens, _ in places]), places, strict=True))
    total = RowVector.of(torch.zeros_like(trace.end[..., :1]), None)
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            if step.below is not None:
                raise UnsupportedModelError(
                    f"the attention of {step.name!r} returns fewer tokens than it attends to, so it is not known how "
                    "much each of them is attended to; expected as many"
                )
            slope, (_, as_tokens) = left.pop()
            cat = (as_tokens(slope) * step.after).sum(-1, keepdim=True)
            came = yield Request(step, torch.full_like(cat, 1 / step.site.shape[2]), None)
            total = total.plus(came.rows * cat)
        else:
            total = total.to_children(step, "uniform")
    return total.relevance(trace)
