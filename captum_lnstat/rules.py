"""The rules: ways from a traced forward pass to relevance on the patch grid. Formulas are those of the design.

Every relation of a block is ``R = diag(alpha) + diag(1 - alpha) A``, row = token after the block, column = token
before. Only the row vector ``r`` travels, from the head to the image: ``r R = alpha * r + ((1 - alpha) * r) A``,
window by window. No matrix of all tokens against all tokens is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from captum_lnstat.covector import Covector, to_children
from captum_lnstat.errors import RecordingError
from captum_lnstat.frozen import per_image, pull_through
from captum_lnstat.fusion import HeadFusion
from captum_lnstat.layout import Groups, even_shares
from captum_lnstat.relation import Handed, PositiveGradient, hand_down
from captum_lnstat.smoothing import smoothed
from captum_lnstat.statistics import MergingShare, ResidualShare, merging_share
from captum_lnstat.trace import Block, Merging, Trace, Transition, Update
from captum_lnstat.wiring import Wiring

if TYPE_CHECKING:
    from jaxtyping import Float

    from captum_lnstat.backward import BackwardPass


# What is left of the weight of a patch that was looked at less than the average one.
FAINT = 20


@dataclass(frozen=True)
class Settings:
    """What a rule may be told.

    Attributes:
        residual: How the residual share of a token follows from its statistics.
        head_fusion: How the maps of the heads become one.
        merging: How a merged token hands its relevance to its children.
        evidence_residual: The residual share with which evidence, once found, is rolled down.
    """

    residual: ResidualShare = "ratio"
    head_fusion: HeadFusion = "mean"
    merging: MergingShare = "variance"
    evidence_residual: ResidualShare = "half"


@dataclass(frozen=True)
class Relevance:
    """Relevance of every patch, and where the rest of it went.

    Attributes:
        grid: Relevance on the patch grid.
        prefix: What ended on the prefix tokens.
        padding: What padded places of windows took.
        constant: What belongs to no token: biases and the LayerNorms' betas.
    """

    grid: Float[Tensor, "batch row column"]
    prefix: Float[Tensor, "batch token"]
    padding: Float[Tensor, " batch"]
    constant: Float[Tensor, " batch"]

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The sum of everything: 1 for perception, the target's score for evidence."""
        return per_image(self.grid) + self.prefix.sum(1) + self.padding + self.constant

    @classmethod
    def joined(cls, parts: Sequence[Relevance]) -> Relevance:
        """Those of several scores as one batch, score by score."""
        fields = ((one.grid, one.prefix, one.padding, one.constant) for one in parts)
        return cls(*map(torch.cat, zip(*fields, strict=True)))


class _Row:
    """Row vectors on their way from the head to the image, and the mass that padded places took from them."""

    def __init__(self, tokens: Float[Tensor, "batch token row"], at: Tensor | None) -> None:
        self.tokens = tokens
        self.at = at  # the only tokens at which they are not zero, if that is known
        self.padding = tokens.new_zeros(len(tokens), tokens.shape[-1])

    def split(self, groups: Groups, shares: Float[Tensor, "batch parent child"]) -> None:
        """A parent's relevance to its children."""
        children = (self.tokens[:, :, None] * shares[..., None]).flatten(0, 1)
        self.tokens, lost = groups.scatter(children, len(self.tokens))
        self.padding, self.at = self.padding + lost, None

    def through_block(self, block: Block, keep: Tensor, handed: Tensor, lost: Tensor) -> None:
        """What each token keeps, and what the attention hands down."""
        self.tokens, self.padding = keep, self.padding + lost
        if block.skip is not None:
            self.split(block.skip, even_shares(block.skip, keep.dtype)[None])
        self.tokens, self.at = self.tokens + handed, None

    def relevance(self, trace: Trace, constant: Tensor | None = None) -> tuple[Relevance, ...]:
        """One for every row vector."""
        prefix, patches = self.tokens[:, : trace.prefix], self.tokens[:, trace.prefix :]
        if trace.place is not None:
            patches = patches[:, trace.place]
        grid = patches.reshape(len(patches), *trace.grid, -1).movedim(-1, 0).contiguous()
        constant = torch.zeros_like(self.padding) if constant is None else constant
        return tuple(
            Relevance(grid[i], prefix[..., i], self.padding[..., i], constant[..., i]) for i in range(len(grid))
        )


class _Walker(Protocol):
    """Row vectors, and perhaps a covector, on their way from the head to the image."""

    row: _Row
    u: Covector | None

    def give(self, block: Block) -> Tensor:
        """What goes through the block's attention."""

    def take(self, block: Block, handed: Tensor, lost: Tensor, said: Handed) -> None:
        """What came out of it."""

    def beside(self, step: Merging | Update | Transition) -> None:
        """A step that is no attention: what it says, before the row is handed down."""


class _Perception:
    """``r <- alpha * r + ((1 - alpha) * r) A``, from the head's class-agnostic start."""

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self._settings = settings
        self.u: Covector | None = None
        start = trace.start(settings.head_fusion)
        self.row = _Row(start[..., None], start.ne(0).any(0).nonzero()[:, 0])
        self._kept = self.row.tokens

    def _keep(self, block: Block) -> Tensor:
        return block.residual_share(self._settings.residual)[..., None] * self.row.tokens

    def give(self, block: Block) -> Tensor:
        self._kept = self._keep(block)
        return self.row.tokens - self._kept

    def take(self, block: Block, handed: Tensor, lost: Tensor, said: Handed) -> None:
        self.row.through_block(block, self._kept, handed, lost)

    def beside(self, step: Merging | Update | Transition) -> None:
        """Nothing is said."""


class _RawAttention(_Perception):
    """``r <- r A`` at one block; the other blocks leave ``r`` as it is."""

    def __init__(self, trace: Trace, settings: Settings, chosen: Block) -> None:
        super().__init__(trace, settings)
        self._chosen = chosen

    def _keep(self, block: Block) -> Tensor:
        covered = block.layout.covered
        if block is not self._chosen:
            return self.row.tokens
        return torch.zeros_like(self.row.tokens) if covered is None else self.row.tokens * ~covered[:, None]


class _Evidence:
    """``r <- s * r + ((1 - s) * r) A + c``, collecting on the way what was said for the class.

    ``<u, MLP update>`` is put on the token that the MLP ran on, ``c_j = sum_h sum_i A^h_ij (u_i W_O^h) . v^h_j`` on the
    token it came from, ``<u, input token>`` at the end. With these three the sum over tokens and constant is the score.
    """

    def __init__(self, u: Covector, constant: Float[Tensor, "batch score"], settings: Settings) -> None:
        self._settings = settings
        self.u: Covector | None = u
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
            if block.pull is not None:
                self._pull(block.pull)
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
            joined, constant = pull_through(step.path, self.u)
            # A padded child is a token of zeros: whatever u is there, nothing was said.
            self.u, self.constant = to_children(joined, step.groups), self.constant + constant.sum(1)
        elif step.pull is not None:
            self._pull(step.pull)
        else:
            self._add(self.u.read(step.after))
            self.u = None

    def _pull(self, pull: Callable[[Covector], tuple[Covector, Tensor]]) -> None:
        assert self.u is not None
        u, constant = pull(self.u)
        # Where the head reads a token that joined on the way, nothing is said from here down.
        self.u, self.constant = u if len(u.at) else None, self.constant + constant

    def at_the_image(self, trace: Trace) -> tuple[Relevance, ...]:
        if self.u is not None:
            self._add(self.u.read(trace.tokens))
            self.u = None
        return self.row.relevance(trace, self.constant)


def _at(walkers: Sequence[_Walker]) -> Tensor | None:
    known = [walker.row.at for walker in walkers]
    return None if any(at is None for at in known) else torch.unique(torch.cat([at for at in known if at is not None]))


def _walk(trace: Trace, walkers: Sequence[_Walker], settings: Settings) -> None:
    wiring = None if trace.training else Wiring()
    for step in reversed(trace.steps):
        if not isinstance(step, Block):
            for walker in walkers:
                walker.beside(step)
            _hand_to_children([walker.row for walker in walkers], step, settings)
            continue
        given = [walker.give(step) for walker in walkers]
        u = next((walker.u for walker in walkers if walker.u is not None), None)
        came = hand_down(step, torch.cat(given, -1), _at(walkers), u, settings.head_fusion, wiring)
        first = 0
        for walker, part in zip(walkers, given, strict=True):
            its = slice(first, first + part.shape[-1])
            walker.take(step, came.rows[..., its], came.rows_lost[..., its], came)
            first = its.stop
    if wiring is not None:
        wiring.verify()


def _hand_to_children(rows: Sequence[_Row], step: Merging | Update | Transition, settings: Settings) -> None:
    if isinstance(step, Update):
        return
    if isinstance(step, Merging):
        shares = merging_share(step, settings.merging)
    else:
        shares = even_shares(step.groups, rows[0].tokens.dtype)[None]
    for row in rows:
        row.split(step.groups, shares)


def perception(trace: Trace, settings: Settings) -> Relevance:
    """Class-agnostic relevance: how much of the prediction's input came from each patch. Sums to 1, gradient-free."""
    walker = _Perception(trace, settings)
    _walk(trace, [walker], settings)
    return walker.row.relevance(trace)[0]


def raw_attention(trace: Trace, settings: Settings, block: int) -> Relevance:
    """Head-fused attention of one block as the head reads it: ``r A``, no relation of another block. Sums to 1.

    Args:
        trace: The traced forward pass.
        settings: How heads are fused and mergings undone.
        block: Index into the blocks, negative from the last one.
    """
    count = len(trace.blocks)
    if not -count <= block < count:
        raise ValueError(f"block is {block}; expected an index into the {count} blocks, {-count} to {count - 1}")
    walker = _RawAttention(trace, settings, trace.blocks[block])
    _walk(trace, [walker], settings)
    return walker.row.relevance(trace)[0]


def evidence(trace: Trace, u: Covector, constant: Tensor, settings: Settings) -> tuple[Relevance, ...]:
    """Class-specific, signed relevance: how much each patch argued for the target. Sums to the target's score.

    Args:
        trace: The traced forward pass.
        u: The head's covector at the end of the stream, for one score or several.
        constant: ``score - sum_i u_i . x_i`` at the head, ``(batch, score)``: its bias and its LayerNorm's beta.
        settings: How relevance is rolled.

    Returns:
        One for every score.
    """
    walker = _Evidence(u, constant, settings)
    _walk(trace, [walker], settings)
    return walker.at_the_image(trace)


def lnstat(
    trace: Trace, u: Covector, constant: Tensor, settings: Settings
) -> tuple[tuple[Relevance, ...], tuple[Relevance, ...]]:
    """``max(P - mean P, P / 20) * max(G - median G, 0)``, scaled to the sum of ``max(G - median G, 0)``.

    ``G`` is the evidence ``E``, smoothed.
    What the model looked at more than at the average patch, and counted in favour of the class more than around a
    typical patch, in units of the score. Evidence is put on the token that said it, which has heard from its
    neighbours: it is known no finer than a token of the last stage, so it is smoothed by a quarter of its side, by one
    patch at least. Where exactly it was looked is for ``P`` to say. A patch that was looked at less keeps a twentieth
    of its weight, so that a class that is argued for only there still gets a map.

    Returns:
        For every score the relevance, and for every score the evidence it was made of.
    """
    looked, argued = _Perception(trace, settings), _Evidence(u, constant, settings)
    _walk(trace, [looked, argued], settings)
    (seen,), said = looked.row.relevance(trace), argued.at_the_image(trace)
    prefix, nothing = torch.zeros_like(said[0].prefix), torch.zeros_like(said[0].padding)
    sigma = max(1.0, trace.grain[0] / 4), max(1.0, trace.grain[1] / 4)
    grids = _both(seen.grid, torch.stack([one.grid for one in said]), sigma)
    return tuple(Relevance(grid, prefix, nothing, nothing) for grid in grids), said


def _both(
    seen: Float[Tensor, "batch row column"], said: Float[Tensor, "score batch row column"], sigma: tuple[float, float]
) -> Float[Tensor, "score batch row column"]:
    attention = torch.maximum(seen - seen.mean((1, 2), keepdim=True), seen / FAINT)
    around = smoothed(said, sigma)
    favour = (around - around.flatten(2).median(2).values[..., None, None]).clamp(min=0)
    product = attention * favour
    total = product.sum((2, 3), keepdim=True)
    return torch.where(total > 0, product * favour.sum((2, 3), keepdim=True) / total, product)


class _PositiveGradients:
    """``r <- alpha * r + r A'``, ``A' = E_h[(dA * A)^+]``, rolled block by block while the backward pass runs."""

    def __init__(self, trace: Trace, settings: Settings, *, keep: bool, normalized: bool) -> None:
        self._settings, self._keep, self._normalized = settings, keep, normalized
        start = trace.start(settings.head_fusion)
        self.row = _Row(start[..., None], start.ne(0).any(0).nonzero()[:, 0])
        self._steps = list(trace.steps)
        self.wiring = None if trace.training else Wiring()

    def begin(self, block: Block) -> PositiveGradient:
        self._down_to(block)
        r = self.row.tokens
        self._kept = r if self._keep else block.residual_share(self._settings.residual)[..., None] * r
        given = r - self._kept if self._normalized else r
        return PositiveGradient(block, given, self.row.at, self._normalized, self.wiring)

    def end(self, block: Block, heard: PositiveGradient) -> None:
        self.row.through_block(block, self._kept, *heard.handed())

    def _down_to(self, block: Block | None) -> None:
        while self._steps and (step := self._steps.pop()) is not block:
            if isinstance(step, Block):
                raise RecordingError(
                    f"the gradient reached block {'' if block is None else block.name!r} before {step.name!r}, which "
                    "stands above it; expected blocks that follow one another"
                )
            _hand_to_children([self.row], step, self._settings)

    def at_the_image(self, trace: Trace) -> Relevance:
        self._down_to(None)
        if self.wiring is not None:
            self.wiring.verify()
        return self.row.relevance(trace)[0]


def gradient(trace: Trace, backward: BackwardPass, settings: Settings, *, keep: bool, normalized: bool) -> Relevance:
    """Chefer's generic rule with token statistics: ``r <- alpha * r + r A'``, ``A' = E_h[(dA * A)^+]``.

    ``dL/dA = (dL/dO) v^T`` needs the gradient of the attention's output only, so fused kernels stay in place. ``r``
    goes from the head to the image as the gradient does, so each block is rolled through when the gradient reaches it.

    Args:
        trace: The traced forward pass.
        backward: The backward pass of the score.
        settings: How relevance is rolled.
        keep: Take ``alpha = 1`` everywhere, as Chefer et al. (ICCV 2021) do.
        normalized: Divide every row of ``A'`` by its sum and take ``r <- alpha * r + ((1 - alpha) * r) A'``.
    """
    rolled = _PositiveGradients(trace, settings, keep=keep, normalized=normalized)
    backward.run(trace, rolled)
    return rolled.at_the_image(trace)
