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
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.topology.anatomy.reading import mixed_scores, slope_at_the_end
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
        found = self._as_read(mixed_scores(scores))[0] or self.set_to
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
        return weights * some

    def _as_read(self, mixed: Tensor) -> tuple[Pooling | None, Float[Tensor, "batch token channel"]]:
        """How a number reads the tokens, by its own name if the model is set to it; ``None`` if it reads none."""
        slope = slope_at_the_end(self.recording, self.norms, mixed)
        found = self._pooling(slope, mixed)
        same = found is not None and self.set_to is not None and _same_start(found, self.set_to, slope)
        return self.set_to if same else found, slope

    def _pooling(self, slope: Tensor, mixed: Tensor) -> Pooling | None:
        prefix, place = self.prefix + self.suffix, None
        if self.suffix:
            place = _patches_last(slope.shape[1], self.prefix, self.suffix, slope.device)
            slope = slope[:, place]
        sites = [] if self.blocks is None else _outside(self.recording, self.blocks)
        patches = slope[:, prefix:]
        alike = _same(slope, patches.mean(1, keepdim=True))
        facts = torch.stack([patches.any(), alike[:, prefix:].all()])
        if prefix:
            facts = torch.cat([slope[:, :prefix].ne(0).any(-1).any(0), alike[:, :prefix].all(0), facts])
        # All that is decided by, in one look: a device is waited for once.
        *each, some, as_mean = facts.tolist()
        groups = [[token] for token in range(prefix) if each[token]]
        if some:
            if as_mean:
                joined = [group for group in groups if each[prefix + group[0]]]
                groups = [group for group in groups if group not in joined]
                groups.append([*(token for group in joined for token in group), *range(prefix, slope.shape[1])])
            elif self.neck and not groups and bool(slope.any(-1).any(0).all()):
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
            weights[group if place is None else place[group]] = 1 / (len(groups) * len(group))
        return FixedPooling(_name(groups, prefix), weights, seen=True)


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


def _same_start(found: Pooling, other: Pooling, slope: Tensor) -> bool:
    """Whether relevance would start with the same weights; of a pooling attention the gradient shows its tokens."""
    if isinstance(other, AttentionPooling) and not isinstance(found, FixedPooling):
        return not bool(slope[:, : other.skipped].any()) and getattr(found, "queries", None) is None
    if not isinstance(found, FixedPooling):
        return False
    return torch.allclose(found.weights, other.start(1, "mean").to(slope.dtype)[0], atol=1e-6)


def _outside(recording: Recording, blocks: Sequence[str]) -> list[AttentionSite]:
    return [site for site in recording.sites if not any(f"{site.module}.".startswith(f"{name}.") for name in blocks)]


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
    slopes = slopes_at(mixed, outputs) if outputs else ()
    found = []
    for site, slope in zip(inside, slopes, strict=True):
        read = (
            torch.zeros(0, device="cpu")
            if slope is None
            else site.output_gradient(slope).ne(0).any(-1).flatten(0, 1).any(0)
        )
        which = [query for query, is_read in enumerate(read.tolist()) if is_read]
        if which:
            queries = None if len(which) == len(read) else torch.tensor(which, device=read.device)
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
