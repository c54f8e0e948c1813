"""AGCAM: positive gradients of attention, guided by the sigmoid of what the softmax was given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.recording.sites import AttentionSite, Queries
from captum_lnstat.rules.attention_gradient import check_graph, observed, output_edge, slopes, start_of
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.steps import Block

if TYPE_CHECKING:
    from captum_lnstat.rules.engine import Pass


def agcam(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``sum_l sum_h sum_i r_i (dA)^+_ij * sigmoid(S)_ij``, with ``r`` the weights that the head reads tokens with.

    Below a merging, a token is read with an even part of the weight of the token it became part of.
    """
    check_graph(outcome)
    trace = outcome.trace
    read = start_of(trace, outcome.head.scores[0], settings)
    total = replace(read, tokens=torch.zeros_like(read.tokens), at=None)
    wiring = None if trace.training else Wiring()
    left = list(slopes(outcome, [output_edge(block) for block in trace.blocks]))
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            came, heads = observed(step, read, left.pop(), wiring, _guided), step.site.shape[1]
            padding = None if came.padding is None else heads * came.padding
            total = total.through(step, None, heads * came.rows, padding)
        else:
            total = total.to_children(step, "uniform")
        read = read.to_children(step, "uniform")
    if wiring is not None:
        wiring.verify()
    return total.relevance(trace)


def _guided(site: AttentionSite, heads: slice, queries: Queries, d_attention: Tensor, a: Tensor) -> Tensor:
    return d_attention.mul_(site.scores(heads, queries).sigmoid())
