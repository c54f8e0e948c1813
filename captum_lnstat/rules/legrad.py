"""LeGrad: every block's own score, by how sensitive it is to the block's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.rules.attention_gradient import bare, check_graph, observed, output_edge, slopes, tokens_in_graph
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.walk import RowVector
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, Step, Update

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass


def legrad(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """``E_l E_hi (ds_l / dA_l)^+``, with ``s_l`` the score of the mean of the tokens after block ``l``.

    Where tokens are merged above a block, its width is not the head's: ``s_l`` is there what its tokens say in the
    direction that the mean of the last tokens is read in, pulled back through the mergings.
    """
    check_graph(outcome)
    trace = outcome.trace
    slopes(outcome, [], keep_graph=True)
    total = RowVector.of(torch.zeros_like(trace.end[..., :1]), None)
    wiring = None if trace.training else Wiring()
    u: Cotangent | None = None
    for step in reversed(trace.steps):
        if isinstance(step, Block):
            direction = _direction(outcome, step.after) if u is None else u.spread(u.dense())[:, :, 0]
            tokens, as_tokens = tokens_in_graph(outcome, step)
            with torch.enable_grad():
                score = (as_tokens(tokens) * direction).sum()
            (slope,) = slopes_at(score, [output_edge(step)], unused=False)
            every = torch.full_like(step.between[..., :1], 1 / (step.site.shape[2] * len(trace.blocks)))
            came = observed(step, RowVector.of(every, None), slope, wiring, bare)
            total = total.through(step, None, came.rows, came.padding)
        else:
            total = total.to_children(step, "uniform")
        if step.below is not None:
            u = _before(step, u or Cotangent.of(_direction(outcome, trace.end)[:, :, None]))
    if wiring is not None:
        wiring.verify()
    return total.relevance(trace)


def _direction(outcome: Pass, tokens: Tensor) -> Float[Tensor, "batch token channel"]:
    """The gradient, at every one of some tokens, of the score that the head gives their mean."""
    scores, tape = outcome.recording.scores, outcome.recording.tape
    assert scores is not None
    assert tape is not None
    with torch.enable_grad():
        (chosen,) = slopes_at(outcome.head.scores[0].sum(), [scores])
        mean = tokens.mean(1).requires_grad_()
        again = tape.of_one_token(mean, scores)
        (slope,) = slopes_at((again * chosen).sum(), [mean], unused=False)
    everywhere: Tensor = (slope / tokens.shape[1])[:, None].expand_as(tokens)
    return everywhere


def _before(step: Step, u: Cotangent) -> Cotangent:
    if isinstance(step, Update) or step.pull_back is None:
        raise UnsupportedModelError(
            f"what {step.name!r} does to the tokens is not affine, so the blocks below it have no score of their own; "
            "expected plain transformers, or stages with patch mergings. rule='gradient' takes this model"
        )
    return step.pull_back(u)[0]
