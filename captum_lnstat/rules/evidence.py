"""Evidence: an exact split of the score over the tokens that it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.rules.checks import (
    HALF_TOLERANCE,
    TOLERANCE,
)
from captum_lnstat.rules.relation import Handed
from captum_lnstat.rules.relevance import Relevance, Settings, per_image
from captum_lnstat.rules.walk import _Row, _walk
from captum_lnstat.trace.cotangent import Cotangent, to_children
from captum_lnstat.trace.maps import pull_back
from captum_lnstat.trace.steps import Block, Merging, Transition, Update
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


class _Evidence:
    """``r <- s * r + ((1 - s) * r) A + c``, collecting on the way what was said for the class.

    ``<u, MLP update>`` is put on the token that the MLP ran on, ``c_j = sum_h sum_i A^h_ij (u_i W_O^h) . v^h_j`` on the
    token it came from, ``<u, input token>`` at the end. With these three the sum over tokens and constant is the score.
    """

    def __init__(self, u: Cotangent, constant: Float[Tensor, "batch score"], settings: Settings) -> None:
        self._settings = settings
        self.u: Cotangent | None = u
        self.constant = constant
        self.row = _Row(u.spread(u.scale.new_zeros(*u.scale.shape, u.scores)), u.at)
        self._kept = self.row.tokens

    def _add(self, said: Tensor) -> None:
        assert self.u is not None
        self.row.tokens = self.row.tokens + self.u.spread(said)

    def _keep(self, block: Block) -> Tensor:
        return block.residual_share(self._settings.evidence_residual)[..., None] * self.row.tokens

    def give(self, block: Block) -> Tensor:
        if self.u is not None and block.after is not block.between:
            self._add(self.u.read(block.after, block.between))
        self._kept = self._keep(block)
        return self.row.tokens - self._kept

    def take(self, block: Block, handed: Tensor, lost: Tensor, said: Handed) -> None:
        keep = self._kept
        if self.u is not None:
            assert said.said is not None
            assert said.said_lost is not None
            assert said.constant is not None
            handed = handed + said.said
            self.constant = self.constant + said.said_lost + said.constant
            if block.pull_back is not None:
                self._pull_back(block.pull_back)
            elif block.skip is not None:
                # The pooling between is not affine: what the tokens after it say is put under them.
                keep = keep + self.u.spread(self.u.read(block.base))
                self.u = None
        self.row.through_block(block, keep, handed, lost)

    def beside(self, step: Merging | Update | Transition) -> None:
        if self.u is None:
            return
        if isinstance(step, Update):
            self._add(self.u.read(step.after, step.before))
        elif isinstance(step, Merging):
            joined, constant = pull_back(step.path, self.u)
            # A padded child is a token of zeros: whatever u is there, nothing was said.
            self.u, self.constant = to_children(joined, step.groups), self.constant + constant.sum(1)
        elif step.pull_back is not None:
            self._pull_back(step.pull_back)
        else:
            self._add(self.u.read(step.after))
            self.u = None

    def _pull_back(self, pull_back: Callable[[Cotangent], tuple[Cotangent, Tensor]]) -> None:
        assert self.u is not None
        u, constant = pull_back(self.u)
        # Where the head reads a token that joined on the way, nothing is said from here down.
        self.u, self.constant = u if len(u.at) else None, self.constant + constant

    def at_the_image(self, trace: Trace) -> tuple[Relevance, ...]:
        if self.u is not None:
            self._add(self.u.read(trace.tokens))
            self.u = None
        return self.row.relevance(trace, self.constant)


def evidence(trace: Trace, u: Cotangent, constant: Tensor, settings: Settings) -> tuple[Relevance, ...]:
    """Class-specific, signed relevance: how much each patch argued for the target. Sums to the target's score.

    Args:
        trace: The traced forward pass.
        u: The head's cotangent at the end of the stream, for one score or several.
        constant: ``score - sum_i u_i . x_i`` at the head, ``(batch, score)``: its bias and its LayerNorm's beta.
        settings: How relevance is rolled.

    Returns:
        One for every score.
    """
    walker = _Evidence(u, constant, settings)
    _walk(trace, [walker], settings)
    return walker.at_the_image(trace)


def check_complete(evidence: Relevance, trace: Trace, score: Tensor) -> None:
    """Evidence has to add up to the score it explains; if it does not, the family was recognised wrongly."""
    if trace.training:
        return
    error = (evidence.total - score.to(evidence.total.dtype)).abs()
    size = score.abs() + evidence.constant.abs() + per_image(evidence.grid.abs()) + evidence.prefix.abs().sum(1)
    coarsest = max({score.dtype, *(block.site.dtype for block in trace.blocks)}, key=lambda d: torch.finfo(d).eps)
    tolerance = TOLERANCE if coarsest in (torch.float32, torch.float64) else HALF_TOLERANCE
    if not bool((error <= tolerance * size + torch.finfo(coarsest).eps).all()):
        raise RecordingError(
            f"the evidence of patches, prefix tokens and constant misses the score by up to {float(error.max()):.3g} "
            "(expected float error): the model does something between its blocks that its topology does not know, so "
            "no map from it can be trusted"
        )
