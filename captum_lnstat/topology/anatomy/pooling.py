"""How the head reads the tokens, seen from the gradient of its output: no name of a pooling is needed.

A head reads a token by a functional, the gradient of its output there. Tokens that it reads by the same functional are
read as their mean; a token that is read by another one is read for itself. Class-agnostic relevance starts on each of
these readings in equal parts: the class token alone, half on class and half on distillation token, half on the class
token and half spread over the patches. Where every patch is read by another functional (the largest of the tokens, one
pixel of a decoder's map), no start is the same for every class; that of one score is where its own gradient is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.recording import ModuleCall, Recording
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.trace.pooling import AttentionPooling, FixedPooling, Pooling, UndefinedPooling

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Means are read by one functional up to float error; another reading differs by its own size.
SAME = 1e-3
_NO_START = (
    "the head reads the patches neither as their mean nor through one attention to them alone{why}, so where "
    "class-agnostic relevance starts is not defined; expected a class token, a mean over the patches or attention "
    "pooling. "
    "rule='lnstat', 'evidence' and 'gradient' explain one score, and need no such start"
)


@dataclass(frozen=True)
class PoolingAsRead:
    """The pooling of the head of one recorded pass, read off its gradient when it is first asked for.

    Attributes:
        recording: The pass, with its scores.
        prefix: Number of prefix tokens.
        norms: Names of norms outside the blocks. Behind one that reads the whole stream where it ends, a mean is one
            functional for all tokens; before it each has its own, through its own statistics.
        blocks: Names of the blocks, where an attention outside them may pool the tokens.
        neck: Convolutions lie between the blocks and the head. What they make of the tokens is no longer one token
            each, so where all are read, relevance starts on all of them in equal parts.
        set_to: What the model is set to, if it says so: the pooling where the scores leave no graph.
        suffix: Number of tokens behind the patches.
    """

    recording: Recording
    prefix: int
    norms: tuple[str, ...]
    blocks: tuple[str, ...] | None = None
    neck: bool = False
    set_to: Pooling | None = None
    suffix: int = 0
    seen = True

    @cached_property
    def found(self) -> Pooling:
        """Fixed weights, or those of the one attention outside the blocks that reads every patch, or none.

        Raises:
            RecordingError: The scores have no gradient at the end of the stream.
        """
        scores = self.recording.scores
        if self.set_to is not None and (scores is None or not scores.requires_grad):
            return self.set_to
        found = self._as_read(_mixed(scores))[0] or self.set_to
        if found is None:
            raise RecordingError(
                "no score has a gradient at the tokens where the blocks end: the scores are saturated or constant, or "
                "read no token, so what the head reads cannot be seen. Let forward_func return the logits"
            )
        return found

    @property
    def name(self) -> str:
        """Shown by ``describe``."""
        try:
            return self.found.name
        except RecordingError:
            return "nothing at the end of the blocks"

    def start(self, batch: int, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """Weights of the tokens, the same for every class."""
        return self.found.start(batch, fusion)

    def start_of(self, score: Float[Tensor, " batch"], fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """Weights of the tokens for one score; nothing for an image whose score has no gradient.

        Where a start is defined by what the score reads, it is that one; else each token has the share of its gradient
        in the sum of their norms.
        """
        with torch.enable_grad():
            mixed = score.sum()
        found, slope = self._as_read(mixed)
        some = slope.ne(0).flatten(1).any(1)[:, None]
        if found is None:
            return slope.new_zeros(slope.shape[:2])
        if isinstance(found, UndefinedPooling):
            norms = slope.norm(dim=-1)
            shares: Tensor = norms / norms.sum(1, keepdim=True).where(some, norms.new_ones(()))
            return shares
        weights = found.start(len(slope), fusion)
        return weights.where(some, weights.new_zeros(()))

    def _as_read(self, mixed: Tensor) -> tuple[Pooling | None, Float[Tensor, "batch token channel"]]:
        """How a number reads the tokens, by its own name if the model is set to it; ``None`` if it reads none."""
        slope = self._slope(mixed)
        found = self._pooling(slope, mixed)
        same = found is not None and self.set_to is not None and _same_start(found, self.set_to, slope)
        return self.set_to if same else found, slope

    def _pooling(self, slope: Tensor, mixed: Tensor) -> Pooling | None:
        place = _patches_last(slope.shape[1], self.prefix, self.suffix, slope.device)
        slope, prefix = slope[:, place], self.prefix + self.suffix
        sites = [] if self.blocks is None else _outside(self.recording, self.blocks)
        read = slope.ne(0).any(-1).any(0)
        patches = slope[:, prefix:]
        groups = [[token] for token in range(prefix) if bool(read[token])]
        if bool(read[prefix:].any()):
            mean = patches.mean(1, keepdim=True)
            if bool(_same(patches, mean).all()):
                joined = [group for group in groups if bool(_same(slope[:, group], mean).all())]
                groups = [group for group in groups if group not in joined]
                groups.append([*(token for group in joined for token in group), *range(prefix, slope.shape[1])])
            elif self.neck and not groups and bool(read.all()):
                groups = [list(range(slope.shape[1]))]
            else:
                keys = range(patches.shape[1], slope.shape[1] + 1)
                near = [site for site in sites if _shape(site)[0] == len(slope) and _shape(site)[-1] in keys]
                found = _read(mixed, near, slope.shape[1])
                if not groups and len(found) == 1 and not (self.suffix and found[0].skipped):
                    return found[0]
                why = f" ({len(found)} attentions outside the blocks read them)" if len(found) > 1 else ""
                return UndefinedPooling("each patch in its own way", _NO_START.format(why=why))
        if not groups:
            return None
        weights = slope.new_zeros(slope.shape[1])
        for group in groups:
            weights[place[group]] = 1 / (len(groups) * len(group))
        return FixedPooling(_name(groups, prefix), weights, seen=True)

    def _slope(self, mixed: Tensor) -> Float[Tensor, "batch token channel"]:
        """The gradient of a number at the tokens: behind the norms there, if it reads them through these alone."""
        end = self.recording.stream_end
        if end is None:
            raise RecordingError(
                "no score reads the tokens where the blocks end, and this rule begins there; rule='lnstat' and "
                "'evidence' begin wherever the score reads them"
            )
        if not end.requires_grad:
            raise RecordingError(
                "the end of the stream is not in the graph of the scores, so what the head reads cannot be seen; "
                "expected a model and forward_func without no_grad, detach or re-entrant checkpointing"
            )
        # A head may leave the norm unread, or read the stream beside it.
        normed = _normed(self.recording, self.norms)
        outputs = [norm.output.tensor for norm in normed]
        *after, before = torch.autograd.grad(mixed, [*outputs, end], retain_graph=True, allow_unused=True)
        laid = (_as_the_end(slope, norm, end) for slope, norm in zip(after, normed, strict=True))
        seen = [slope for slope in laid if slope is not None]
        slope = seen[0] if len(seen) == 1 and _only_through(seen[0], before) else before
        if slope is None:
            raise RecordingError("the scores do not depend on the tokens where the blocks end")
        return slope.flatten(1, -2).to(accumulation_dtype(slope))


def pooling_as_read(
    recording: Recording,
    prefix: int,
    norms: Iterable[str],
    blocks: Iterable[str] | None = None,
    *,
    neck: bool = False,
    set_to: Pooling | None = None,
    suffix: int = 0,
) -> PoolingAsRead:
    """The pooling of the head of one recorded pass; the arguments are those of ``PoolingAsRead``."""
    names = None if blocks is None else tuple(blocks)
    return PoolingAsRead(recording, prefix, tuple(norms), names, neck, set_to, suffix)


def _patches_last(tokens: int, prefix: int, suffix: int, device: torch.device) -> Int[Tensor, " token"]:
    """The tokens in the order of prefix, suffix and patches."""
    every = torch.arange(tokens, device=device)
    return torch.cat([every[:prefix], every[tokens - suffix :], every[prefix : tokens - suffix]])


def check_images_apart(recording: Recording) -> None:
    """The score of the first image has to read that image alone: with as many images as tokens no shape shows it.

    Raises:
        UnsupportedModelError: It reads a token of every image.
    """
    scores, end = recording.scores, recording.stream_end
    if scores is None or end is None or end.shape[0] != end.shape[1] or not scores.requires_grad:
        return
    with torch.enable_grad():
        first = scores[0].sum()
    (slope,) = torch.autograd.grad(first, end, retain_graph=True, allow_unused=True)
    if slope is not None and bool(slope[1:].any()):
        raise UnsupportedModelError(
            "the score of one image reads a token of every image: the attention, of batch_first=False, was given the "
            "batch first, so the images attend to each other; expected (tokens, batch, channels), or batch_first=True"
        )


def _mixed(scores: Tensor | None) -> Tensor:
    """One number that every score takes part in, no two of them alike."""
    if scores is None or not scores.requires_grad:
        raise RecordingError(
            "the scores have no gradient at the transformer's tokens, so what the head reads cannot be seen; expected "
            "a forward_func that returns the model's scores as they are (no no_grad, detach or argmax after it)"
        )
    with torch.enable_grad():
        each = scores.reshape(len(scores), -1) if scores.dim() else scores.reshape(1, 1)
        weights = torch.linspace(1, 2, each.shape[1], dtype=torch.float64, device=scores.device)
        return (each * weights.to(scores.dtype)).sum()


def _same_start(found: Pooling, other: Pooling, slope: Tensor) -> bool:
    """Whether relevance would start with the same weights; of a pooling attention the gradient shows its tokens."""
    if isinstance(other, AttentionPooling) and not isinstance(found, FixedPooling):
        return not bool(slope[:, : other.skipped].any()) and getattr(found, "queries", None) is None
    if not isinstance(found, FixedPooling):
        return False
    return torch.allclose(found.weights, other.start(1, "mean").to(slope.dtype)[0], atol=1e-6)


def _normed(recording: Recording, norms: Iterable[str]) -> list[ModuleCall]:
    """Calls of the norms that read the whole stream where it ends, its channels last, or first as in LayerNorm2d."""
    end = recording.stream_end
    if end is None:
        return []
    calls = [call for name in norms for call in recording.calls.get(name, ())]
    read = [call for call in calls if call.input.tensor.data_ptr() == end.data_ptr()]
    first, last = end.movedim(-1, 1).shape, end.shape[-1]
    whole = [call for call in read if call.input.tensor.numel() == end.numel()]
    return [c for c in whole if c.input.tensor.shape[-1] == last or c.input.tensor.shape == first]


def _outside(recording: Recording, blocks: Sequence[str]) -> list[AttentionSite]:
    return [site for site in recording.sites if not any(f"{site.module}.".startswith(f"{name}.") for name in blocks)]


def _as_the_end(slope: Tensor | None, norm: ModuleCall, end: Tensor) -> Tensor | None:
    """A norm may read its channels first (``LayerNorm2d``), its tokens before the batch, or rows and columns apart."""
    if slope is None:
        return None
    lies, turned = ((tensor.shape, tensor.stride()) for tensor in (norm.input.tensor, end.transpose(0, 1)))
    if lies == turned != (end.shape, end.stride()):
        return slope.transpose(0, 1)
    if slope.shape == end.shape:
        return slope
    moved = slope.movedim(1, -1)
    return moved if moved.shape == end.shape else slope


def _only_through(after: Tensor, before: Tensor | None) -> bool:
    """Whether the norm's readers read the tokens that are read at all."""
    return before is None or torch.equal(after.ne(0).any(-1).flatten(1), before.ne(0).any(-1).flatten(1))


def _same(slopes: Tensor, mean: Tensor) -> Tensor:
    return (slopes - mean).abs().amax(-1) <= SAME * mean.abs().amax(-1)


def _shape(site: AttentionSite) -> tuple[int, ...]:
    """Of an attention of another form, such as a softmax over the tokens alone, nothing is known."""
    try:
        return site.shape
    except UnsupportedModelError:
        return (0,)


def _read(mixed: Tensor, sites: Sequence[AttentionSite], count: int) -> list[AttentionPooling]:
    """Those of the attentions that a number reads, with the queries of which it does; CoCa has some for a decoder."""
    inside = [site for site in sites if site.output is not None]
    outputs: Any = [site.output for site in inside]
    slopes = torch.autograd.grad(mixed, outputs, retain_graph=True, allow_unused=True) if outputs else ()
    found = []
    for site, slope in zip(inside, slopes, strict=True):
        read = (
            torch.zeros(0, device="cpu")
            if slope is None
            else site.output_gradient(slope).ne(0).any(-1).flatten(0, 1).any(0)
        )
        if bool(read.any()):
            queries = None if bool(read.all()) else read.nonzero()[:, 0]
            found.append(AttentionPooling("attention pooling", site, count - site.shape[3], queries, seen=True))
    return found


def _name(groups: Sequence[Sequence[int]], prefix: int) -> str:
    alone = [group[0] for group in groups if group[-1] < prefix]
    parts = []
    if alone == [0, 1] and len(groups) == 2:
        parts.append("class and distillation token")
    elif alone:
        parts.append("class token" if alone == [0] else f"prefix tokens {', '.join(map(str, alone))}")
    if len(alone) < len(groups):
        parts.append("mean of the patches" if groups[-1][0] >= prefix else "mean of the tokens")
    # Without prefix tokens the patches are all the tokens there are.
    return " and ".join(parts) if prefix else "mean of the tokens"
