"""Evidence ``E``: the class score, split exactly over the tokens that its terms came from.

``y_c = sum_i u_i . x_i + constant`` at the end of the stream, and the stream is a sum: of what each attention head
put on each token from each token, of what each MLP put there, and of the input tokens. Each term is put on the token
that it came from, and rolled down by the relations of the blocks below. Of what the attention heads read, the mean
value of the image tells no token from another; what it contributes belongs to the constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.rules.checks import HALF_TOLERANCE, TOLERANCE
from captum_lnstat.rules.head import Head
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.walk import Request, RowVector, Walk, plus, walk
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, Step, Update
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.rules.engine import Pass


@dataclass(frozen=True)
class Part:
    """Which part of the evidence, and how it is rolled.

    Attributes:
        since: The steps before this block are only rolled through: of what is read there, what tells patches apart is
            put on them where they are, the rest belongs to the constant.
        by_sigma: Through them, patches share by standard deviations, not by variances.
    """

    since: int = 0
    by_sigma: bool = False


def evidence(trace: Trace, head: Head, settings: Settings, part: Part = Part()) -> Walk:
    """``r <- alpha * r + ((1 - alpha) * r) W + c``: signed relevance; over tokens and constant it sums to the score.

    Args:
        trace: The traced forward pass.
        head: The scores, and their cotangent at the end of the stream.
        settings: The residual share ``alpha``, how heads are fused, how mergings are undone.
        part: All of it by default.
    """
    u, constant = head.cotangent
    rest = Rest(u, (constant,))
    r = rest.no_relevance()
    rest = rest.unless_unread()
    first, lower = trace.blocks[part.since].before if part.since else None, False
    for step in reversed(trace.steps):
        r, rest = rest.joined(r, head.cotangent_at(step.after))
        if isinstance(step, Block):
            r = r.plus(rest.read_mlp(step))  # <u, MLP update>
            by_sigma = trace.patches(step.between) if lower and part.by_sigma else None
            alpha, shared = step.shares_of(settings.residual, by_sigma)
            came = yield Request(step, shared[..., None] * r.tokens, r.at, rest.u)
            # c_j = sum_h sum_i A^h_ij (u_i W_O^h) . (v^h_j - mean v^h)
            rows, rest = plus(came.rows, came.contributions), rest.plus(came.contributions_padding, came.constant)
            ends = step.below is not None and step.pull_back is None
            read = rest.read(step.base) if ends else None
            r, rest = r.through(step, alpha, rows, came.padding, read), rest.before(step)
            if step.before is first:
                lower, (r, rest) = True, rest.ended(r, step.before, trace.patches(step.before))
        else:
            if isinstance(step, Update):
                r = r.plus(rest.read(step.after, step.before))
            elif step.pull_back is None:
                r = r.plus(rest.read(step.after))
            r, rest = r.to_children(step, settings.merging), rest.before(step)
    r, rest = rest.joined(r, head.cotangent_at(trace.tokens))
    r = r.plus(rest.read(trace.tokens))  # <u, input tokens>
    found = r.relevance(trace, rest.constant)
    check_complete(found, trace, head.values)
    return found


@dataclass(frozen=True)
class Rest:
    """What of the score is on no token yet: ``sum_i u_i . x_i`` and the constant.

    Attributes:
        u: The cotangent at this place of the stream; ``None`` once all has been put on tokens further up.
        constants: What belongs to no token, part by part.
    """

    u: Cotangent | None
    constants: tuple[Float[Tensor, "batch score"], ...]

    @property
    def constant(self) -> Float[Tensor, "batch score"]:
        """All of it: added up where it is read, since each sum is one more kernel."""
        return self.constants[0] if len(self.constants) == 1 else torch.stack(self.constants).sum(0)

    def no_relevance(self) -> RowVector:
        """A row vector of zeros for every score."""
        assert self.u is not None
        u = self.u
        # A score without gradient reads no token: nothing is known of where its zeros are.
        zeros = u.scale.new_zeros(len(u.scale), u.tokens, u.scores)
        return RowVector.of(zeros, u.at if len(u.at) and not u.everywhere else None)

    def unless_unread(self) -> Rest:
        """No cotangent where no token has one: all of the score belongs to the constant."""
        return self if self.u is None or len(self.u.at) else replace(self, u=None)

    def read(self, after: Tensor, before: Tensor | None = None) -> Float[Tensor, "batch token score"] | None:
        """``<u_i, after_i - before_i>`` of every token; ``None`` if it is zero everywhere."""
        if self.u is None or after is before:
            return None
        return self.u.spread(self.u.read(after, before))

    def read_mlp(self, block: Block) -> Float[Tensor, "batch token score"] | None:
        """What the MLP of a block added, read in the same way."""
        return None if self.u is None or block.after is block.between else block.mlp_read(self.u)

    def joined(self, r: RowVector, read: tuple[Cotangent, Tensor] | None) -> tuple[RowVector, Rest]:
        """With what the head reads at this place of the stream besides its end, which was part of the constant."""
        if read is None:
            return r, self
        u, taken = read
        both = u if self.u is None else self.u.plus(u)
        return replace(r, at=None), Rest(both, (*self.constants, -taken))

    def plus(self, *constants: Tensor | None) -> Rest:
        """With more that belongs to no token."""
        return replace(self, constants=(*self.constants, *(one for one in constants if one is not None)))

    def ended(self, r: RowVector, tokens: Tensor, patches: slice) -> tuple[RowVector, Rest]:
        """What is on no token yet ends here: what tells patches apart is put on them, all else is constant.

        A head that reads patch tokens reads what they have become so far where they are: ``<u_i, x_i - mean x>``.
        """
        read = self.read(tokens)
        if self.u is None or read is None:
            return r, self
        mean = tokens[:, patches].mean(1, keepdim=True).expand_as(tokens)
        apart = torch.zeros_like(read)
        apart[:, patches] = (read - self.u.spread(self.u.read(mean)))[:, patches]
        return r.plus(apart), Rest(None, (*self.constants, (read - apart).sum(1)))

    def before(self, step: Step) -> Rest:
        """Pulled back through a step; nothing is left where it is not affine: what it says has been read after it."""
        if self.u is None or step.below is None or isinstance(step, Update):
            return self
        if step.pull_back is None:
            return replace(self, u=None)
        u, constant = step.pull_back(self.u)
        # Where the head reads a token that joined on the way, nothing comes from further down.
        return Rest(u, (*self.constants, constant)).unless_unread()


def check_complete(evidence: Sequence[Relevance], trace: Trace, scores: Sequence[Tensor]) -> None:
    """Evidence has to add up to the scores it explains; if it does not, the family was recognised wrongly."""
    if trace.training:
        return
    found = Relevance.joined(evidence)
    score = scores[0] if len(scores) == 1 else torch.cat(tuple(scores))
    terms = torch.cat([found.grid.flatten(1), found.prefix, found.padding[:, None], found.constant[:, None]], 1)
    error = (terms.sum(1) - score).abs()
    size = score.abs() + terms.abs().sum(1)
    coarsest = max({score.dtype, *(block.site.dtype for block in trace.blocks)}, key=lambda d: torch.finfo(d).eps)
    tolerance = TOLERANCE if coarsest in (torch.float32, torch.float64) else HALF_TOLERANCE

    def wrong() -> RecordingError:
        if not bool(error.isfinite().all()):
            return RecordingError(
                "the evidence is not finite: the score has a gradient at the tokens that is infinite or NaN, or "
                "something overflowed. Let forward_func return the logits, in float32"
            )
        return RecordingError(
            f"the evidence of patches, prefix tokens and constant misses the score by up to {float(error.max()):.3g} "
            "(expected float error): the model does something between its blocks that its topology does not know, so "
            "no map from it can be trusted"
        )

    expect(error <= tolerance * size + torch.finfo(coarsest).eps, wrong)


@register(
    "evidence",
    formula="E: r <- alpha * r + ((1 - alpha) * r) W + c, signed; adds up to the score",
    options=("residual", "head_fusion", "contrastive"),
    complete=True,
    starts=False,
)
def evidence_rule(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
    """Evidence alone."""
    return walk(outcome.trace, settings, evidence(outcome.trace, outcome.head, settings))[0]
