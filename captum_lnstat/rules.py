"""The rules: ways from a traced forward pass to relevance on the patch grid. Formulas are those of the design.

Every relation of a block is ``R = diag(alpha) + diag(1 - alpha) A``, row = token after the block, column = token
before. Only the row vector ``r`` travels, from the head to the image: ``r R = alpha * r + ((1 - alpha) * r) A``,
window by window. No matrix of all tokens against all tokens is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.frozen import per_image, pull_through
from captum_lnstat.fusion import Fuser, HeadFusion
from captum_lnstat.statistics import MergingShare, ResidualShare, accumulation_dtype, merging_share, residual_share
from captum_lnstat.trace import Block, Merging, Trace

if TYPE_CHECKING:
    from jaxtyping import Float


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


class _Walker(Protocol):
    """A row vector on its way from the head to the image."""

    @property
    def covector(self) -> Tensor | None:
        """``u`` of the stream, for a walker that reads what was said about the class."""

    def through_block(self, block: Block, attention: Tensor, said: Tensor | None) -> None: ...

    def through_merging(self, merging: Merging) -> None: ...


class _Row:
    """The row vector ``r`` and the mass that padded places took from it."""

    def __init__(self, tokens: Float[Tensor, "batch token"], settings: Settings) -> None:
        self.tokens = tokens
        self.padding = tokens.new_zeros(len(tokens))
        self._settings = settings

    def mix(self, block: Block, attention: Tensor, tokens: Tensor) -> Tensor:
        """``tokens A``: hand each token's relevance to the tokens it attended to."""
        grouped = block.layout.gather(tokens[..., None])
        mixed, lost = block.layout.scatter(attention.transpose(-2, -1) @ grouped, len(tokens))
        self.padding = self.padding + lost[:, 0]
        return mixed[..., 0]

    def split(self, merging: Merging) -> None:
        """A parent's relevance to its children."""
        shares = merging_share(merging, self._settings.merging)
        children = (self.tokens[..., None] * shares).flatten(0, 1)[..., None]
        tokens, lost = merging.groups.scatter(children, len(self.tokens))
        self.tokens, self.padding = tokens[..., 0], self.padding + lost[:, 0]

    def relevance(self, trace: Trace, constant: Tensor | None = None) -> Relevance:
        prefix, patches = self.tokens[:, : trace.prefix], self.tokens[:, trace.prefix :]
        grid = patches.reshape(len(patches), *trace.grid)
        return Relevance(grid, prefix, self.padding, torch.zeros_like(self.padding) if constant is None else constant)


class _Perception:
    """``r <- alpha * r + ((1 - alpha) * r) A``, from the head's class-agnostic start."""

    covector = None

    def __init__(self, trace: Trace, settings: Settings) -> None:
        self._settings = settings
        self.row = _Row(trace.start(settings.head_fusion), settings)

    def through_block(self, block: Block, attention: Tensor, said: Tensor | None) -> None:
        r, alpha = self.row.tokens, residual_share(block.before, block.attention_update, self._settings.residual)
        self.row.tokens = alpha * r + self.row.mix(block, attention, (1 - alpha) * r)

    def through_merging(self, merging: Merging) -> None:
        self.row.split(merging)


class _RawAttention:
    """``r <- r A`` at one block; the other blocks leave ``r`` as it is."""

    covector = None

    def __init__(self, trace: Trace, settings: Settings, chosen: Block) -> None:
        self._chosen = chosen
        self.row = _Row(trace.start(settings.head_fusion), settings)

    def through_block(self, block: Block, attention: Tensor, said: Tensor | None) -> None:
        if block is self._chosen:
            self.row.tokens = self.row.mix(block, attention, self.row.tokens)

    def through_merging(self, merging: Merging) -> None:
        self.row.split(merging)


class _Evidence:
    """``r <- s * r + ((1 - s) * r) A + c``, collecting on the way what was said for the class.

    ``<u, MLP update>`` is put on the token that the MLP ran on, ``c_j = sum_h sum_i A^h_ij (u_i W_O^h) . v^h_j`` on the
    token it came from, ``<u, input token>`` at the end. With these three the sum over tokens and constant is the score.
    """

    def __init__(self, u: Tensor, constant: Tensor, settings: Settings) -> None:
        self._settings = settings
        self.u = u
        self.constant = constant
        self.row = _Row(u.new_zeros(u.shape[:2]), settings)

    @property
    def covector(self) -> Tensor:
        return self.u

    def through_block(self, block: Block, attention: Tensor, said: Tensor | None) -> None:
        assert said is not None
        r = self.row.tokens + (self.u * block.mlp_update).sum(-1)
        share = residual_share(block.before, block.attention_update, self._settings.evidence_residual)
        heard, lost = block.layout.scatter(said[..., None], len(r))
        self.constant = self.constant + lost[:, 0] + pull_through(block.path, self.u)[1]
        self.row.tokens = share * r + self.row.mix(block, attention, (1 - share) * r) + heard[..., 0]

    def through_merging(self, merging: Merging) -> None:
        self.row.split(merging)
        joined, constant = pull_through(merging.path, self.u)
        channels = merging.children.shape[-1]
        # A padded child is a token of zeros: whatever u is there, nothing was said.
        self.u, _ = merging.groups.scatter(joined.reshape(-1, 4, channels), len(joined))
        self.constant = self.constant + constant

    def at_the_image(self, trace: Trace) -> Relevance:
        self.row.tokens = self.row.tokens + (self.u * trace.tokens).sum(-1)
        return self.row.relevance(trace, self.constant)


def _attend(block: Block, fusion: HeadFusion, u: Tensor) -> tuple[Tensor, Tensor]:
    """The head-fused attention of a block and, for a covector ``u``, what each key's token said to every query."""
    site, fuser = block.site, Fuser(fusion, block.site.shape[1])
    grouped = block.layout.gather(pull_through(block.path, u)[0])
    pulled = grouped.reshape(*grouped.shape[:2], site.shape[1], -1).transpose(1, 2)
    said = pulled.new_zeros(len(pulled), site.shape[3])
    for heads, attention in site.chunks():
        fuser.add(attention)
        said = said + ((attention.transpose(-2, -1) @ pulled[:, heads]) * site.values(heads)).sum((1, 3))
    return fuser.fused(), said


# How far the attention's update may be from what its path makes of A v, in the size of the terms.
WIRING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_WIRING_TOLERANCE = 0.1


def _check_update(block: Block, u: Tensor, said: Tensor) -> None:
    """``<u, attention update>`` has to be what the keys' tokens said, plus the biases."""
    heard, lost = block.layout.scatter(said[..., None], len(u))
    told = heard.sum((1, 2)) + lost[:, 0] + pull_through(block.path, u)[1]
    terms = u * block.attention_update
    error, size = (terms.sum((1, 2)) - told).abs(), terms.abs().sum((1, 2)) + heard.abs().sum((1, 2))
    tolerance = WIRING_TOLERANCE.get(block.site.dtype, HALF_WIRING_TOLERANCE)
    # The update is a difference of two streams, and a small one of large streams is known to their rounding only.
    kind = torch.finfo(block.site.dtype)
    rounding = kind.eps * (u.abs() * (block.before.abs() + kind.smallest_normal)).sum((1, 2))
    if bool((error > tolerance * size + rounding).any()):
        raise RecordingError(
            f"what block {block.name!r} adds to the stream is not its attention's output as recorded: off by "
            f"{float((error / size).max()):.2g} of its size. Its wiring is not one that is known, so no map from it "
            "can be trusted"
        )


def _check_layout(block: Block) -> None:
    members = block.layout.gather(block.before[:1, :, :1]).shape[1]
    if block.site.shape[2:] != (members, members):
        raise UnsupportedModelError(
            f"the attention of {block.name!r} is {block.site.shape[2]} x {block.site.shape[3]}, its tokens are "
            f"{members}; expected attention from token to token (not from channel to channel)"
        )


def _walk(trace: Trace, walkers: Sequence[_Walker], fusion: HeadFusion) -> None:
    for step in reversed(trace.steps):
        if isinstance(step, Merging):
            for walker in walkers:
                walker.through_merging(step)
            continue
        u = next((walker.covector for walker in walkers if walker.covector is not None), None)
        _check_layout(step)
        probe = step.before + step.attention_update if u is None else u
        attention, said = _attend(step, fusion, probe)
        if not trace.training:
            _check_update(step, probe, said)
        for walker in walkers:
            walker.through_block(step, attention, said)


def perception(trace: Trace, settings: Settings) -> Relevance:
    """Class-agnostic relevance: how much of the prediction's input came from each patch. Sums to 1, gradient-free."""
    walker = _Perception(trace, settings)
    _walk(trace, [walker], settings.head_fusion)
    return walker.row.relevance(trace)


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
    _walk(trace, [walker], settings.head_fusion)
    return walker.row.relevance(trace)


def evidence(trace: Trace, u: Tensor, constant: Tensor, settings: Settings) -> Relevance:
    """Class-specific, signed relevance: how much each patch argued for the target. Sums to the target's score.

    Args:
        trace: The traced forward pass.
        u: The head's covector for the target at the end of the stream, ``(batch, token, channel)``.
        constant: ``score - sum_i u_i . x_i`` at the head: its bias and its LayerNorm's beta.
        settings: How relevance is rolled.
    """
    walker = _Evidence(u, constant, settings)
    _walk(trace, [walker], settings.head_fusion)
    return walker.at_the_image(trace)


def lnstat(trace: Trace, u: Tensor, constant: Tensor, settings: Settings) -> tuple[Relevance, Relevance]:
    """``max(P - mean P, P / 20) * max(E - median E, 0)``, scaled to the sum of ``max(E - median E, 0)``.

    What the model looked at more than at the average patch, and counted in favour of the class more than a typical
    patch, in units of the score. A patch that was looked at less keeps a twentieth of its weight, so that a class that
    is argued for only there still gets a map. Returns the relevance and the evidence it was made of.
    """
    looked, argued = _Perception(trace, settings), _Evidence(u, constant, settings)
    _walk(trace, [looked, argued], settings.head_fusion)
    seen, said = looked.row.relevance(trace).grid, argued.at_the_image(trace)
    attention = torch.maximum(seen - seen.mean((1, 2), keepdim=True), seen / FAINT)
    favour = (said.grid - said.grid.flatten(1).median(1).values[:, None, None]).clamp(min=0)
    product = attention * favour
    total = product.sum((1, 2), keepdim=True)
    grid = torch.where(total > 0, product * favour.sum((1, 2), keepdim=True) / total, product)
    nothing = torch.zeros_like(said.padding)
    return Relevance(grid, torch.zeros_like(said.prefix), nothing, nothing), said


def gradient(
    trace: Trace, output_gradients: Sequence[Tensor], settings: Settings, *, keep: bool, normalized: bool
) -> Relevance:
    """Chefer's generic rule with token statistics: ``r <- alpha * r + r A'``, ``A' = E_h[(dA * A)^+]``.

    ``dL/dA = (dL/dO) v^T`` needs the gradient of the attention's output only, so fused kernels stay in place.

    Args:
        trace: The traced forward pass.
        output_gradients: Gradient of the score at the output of each block's attention, first block first.
        settings: How relevance is rolled.
        keep: Take ``alpha = 1`` everywhere, as Chefer et al. (ICCV 2021) do.
        normalized: Divide every row of ``A'`` by its sum and take ``r <- alpha * r + ((1 - alpha) * r) A'``.
    """
    row = _Row(trace.start(settings.head_fusion), settings)
    gradients = list(output_gradients)
    for step in reversed(trace.steps):
        if isinstance(step, Merging):
            row.split(step)
            continue
        _check_layout(step)
        if not trace.training:
            probe = step.before + step.attention_update
            _check_update(step, probe, _attend(step, "mean", probe)[1])
        weighted = _positive_gradient_attention(step, gradients.pop())
        alpha: Tensor | float = 1.0
        if not keep:
            alpha = residual_share(step.before, step.attention_update, settings.residual)
        r = row.tokens
        if normalized:
            total = weighted.sum(-1, keepdim=True)
            weighted = torch.where(total > 0, weighted / total, weighted)
            r = (1 - alpha) * r
        row.tokens = alpha * row.tokens + row.mix(step, weighted, r)
    return row.relevance(trace)


def _positive_gradient_attention(block: Block, output_gradient: Tensor) -> Float[Tensor, "batch query key"]:
    site = block.site
    d_output = site.output_gradient(output_gradient)
    d_output = d_output.to(accumulation_dtype(d_output))
    fuser = Fuser("mean", site.shape[1])
    for heads, attention in site.chunks():
        if d_output.shape[1] != site.shape[1]:
            raise RecordingError(
                f"the output of {site.module!r} has {d_output.shape[1]} heads, its attention {site.shape[1]}"
            )
        d_attention = d_output[:, heads] @ site.values(heads).transpose(-2, -1)
        fuser.add((d_attention * attention).clamp(min=0))
    return fuser.fused()
