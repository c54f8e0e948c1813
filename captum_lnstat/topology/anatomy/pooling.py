"""How the head reads the tokens, seen from the gradient of its output: no name of a pooling is needed.

A head reads a token by a functional, the gradient of its output there. Tokens that it reads by the same functional are
read as their mean; a token that is read by another one is read for itself. Class-agnostic relevance starts on each of
these readings in equal parts: the class token alone, half on class and half on distillation token, half on the class
token and half spread over the patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.trace.pooling import AttentionPooling, FixedPooling, Pooling

# Means are read by one functional up to float error; another reading differs by its own size.
SAME = 1e-3


def pooling_as_read(
    recording: Recording, prefix: int, norms: Iterable[str], blocks: Iterable[str] | None = None, *, neck: bool = False
) -> Pooling:
    """The pooling of the head of one recorded pass.

    Args:
        recording: The pass, with its scores.
        prefix: Number of prefix tokens.
        norms: Names of norms outside the blocks. Behind one that reads the whole stream where it ends, a mean is one
            functional for all tokens; before it each has its own, through its own statistics.
        blocks: Names of the blocks, where an attention outside them may pool the tokens.
        neck: Convolutions lie between the blocks and the head. What they make of the tokens is no longer one token
            each, so where all are read, relevance starts on all of them in equal parts.

    Returns:
        Fixed weights, or the weights of the one attention outside the blocks that reads every patch.

    Raises:
        RecordingError: The scores have no gradient at the end of the stream.
        UnsupportedModelError: The patches are read in another way than as their mean or by one attention.
    """
    slope = _slope(recording, _normed(recording, norms))
    sites = [] if blocks is None else _outside(recording, tuple(blocks))
    read = slope.ne(0).any(-1).any(0)
    patches = slope[:, prefix:]
    groups = [[token] for token in range(prefix) if bool(read[token])]
    if bool(read[prefix:].any()):
        mean = patches.mean(1, keepdim=True)
        if bool(_same(patches, mean).all()):
            joined = [group for group in groups if bool(_same(slope[:, group], mean).all())]
            groups = [group for group in groups if group not in joined]
            groups.append([*(token for group in joined for token in group), *range(prefix, slope.shape[1])])
        elif neck and not groups and bool(read.all()):
            groups = [list(range(slope.shape[1]))]
        elif groups or not (found := [site for site in sites if _reads_patches(site, slope, prefix)]):
            raise UnsupportedModelError(
                "the head reads the patches neither as their mean nor through one attention, so where class-agnostic "
                "relevance starts is not defined; expected a class token, a mean over the patches or attention pooling"
            )
        else:
            return _attention_pooling(found, slope.shape[1])
    if not groups:
        raise RecordingError("the scores do not depend on any token where the blocks end; expected the head to read it")
    weights = slope.new_zeros(slope.shape[1])
    for group in groups:
        weights[group] = 1 / (len(groups) * len(group))
    return FixedPooling(_name(groups, prefix), weights, seen=True)


def _normed(recording: Recording, norms: Iterable[str]) -> list[Tensor]:
    """Outputs of the norms that read the whole stream where it ends, its channels last, or first as in LayerNorm2d."""
    end = recording.stream_end
    if end is None:
        return []
    calls = [call for name in norms for call in recording.calls.get(name, ())]
    read = [call for call in calls if call.input.tensor.data_ptr() == end.data_ptr()]
    first, last = end.movedim(-1, 1).shape, end.shape[-1]
    whole = [call for call in read if call.input.tensor.numel() == end.numel()]
    return [c.output.tensor for c in whole if c.input.tensor.shape[-1] == last or c.input.tensor.shape == first]


def _outside(recording: Recording, blocks: Sequence[str]) -> list[AttentionSite]:
    return [site for site in recording.sites if not any(f"{site.module}.".startswith(f"{name}.") for name in blocks)]


def _slope(recording: Recording, normed: Sequence[Tensor]) -> Tensor:
    scores, end = recording.scores, recording.stream_end
    if scores is None or end is None or not scores.requires_grad:
        raise RecordingError(
            "the scores have no gradient at the transformer's tokens, so what the head reads cannot be seen; expected "
            "a forward_func that returns the model's scores as they are (no no_grad, detach or argmax after it)"
        )
    if not end.requires_grad:
        raise RecordingError(
            "the end of the stream is not in the graph of the scores, so what the head reads cannot be seen; expected "
            "a model and forward_func without no_grad, detach or re-entrant checkpointing"
        )
    # One number that every score takes part in, no two of them alike.
    with torch.enable_grad():
        each = scores.reshape(len(scores), -1) if scores.dim() else scores.reshape(1, 1)
        weights = torch.linspace(1, 2, each.shape[1], dtype=torch.float64, device=scores.device)
        mixed = (each * weights.to(scores.dtype)).sum()
    # A head may leave the norm unread, or read the stream beside it.
    *after, before = torch.autograd.grad(mixed, [*normed, end], retain_graph=True, allow_unused=True)
    seen = [slope for slope in (_channels_last(slope, end) for slope in after) if slope is not None]
    slope = seen[0] if len(seen) == 1 and _only_through(seen[0], before) else before
    if slope is None:
        raise RecordingError("the scores do not depend on the tokens where the blocks end")
    return slope.flatten(1, -2).to(accumulation_dtype(slope))


def _channels_last(slope: Tensor | None, end: Tensor) -> Tensor | None:
    """A norm that takes channels first (``LayerNorm2d``) returns them first; one may read rows and columns apart."""
    if slope is None or slope.shape == end.shape:
        return slope
    moved = slope.movedim(1, -1)
    return moved if moved.shape == end.shape else slope


def _only_through(after: Tensor, before: Tensor | None) -> bool:
    """Whether the norm's readers read the tokens that are read at all."""
    return before is None or torch.equal(after.ne(0).any(-1).flatten(1), before.ne(0).any(-1).flatten(1))


def _same(slopes: Tensor, mean: Tensor) -> Tensor:
    return (slopes - mean).abs().amax(-1) <= SAME * mean.abs().amax(-1)


def _reads_patches(site: AttentionSite, slope: Tensor, prefix: int) -> bool:
    batch, _, _, keys = site.shape
    return batch == len(slope) and slope.shape[1] - prefix <= keys <= slope.shape[1]


def _attention_pooling(sites: Sequence[AttentionSite], count: int) -> AttentionPooling:
    if len(sites) > 1:
        raise UnsupportedModelError(
            f"{len(sites)} attentions outside the blocks read the patches; expected one, which pools them"
        )
    return AttentionPooling("attention pooling", sites[0], count - sites[0].shape[3])


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
