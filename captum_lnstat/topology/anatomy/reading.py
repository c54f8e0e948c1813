"""What a head reads of the tokens where the blocks end: the gradient of its scores there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.recording import ModuleCall, Recording
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.recording.statistics import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


def mixed_scores(scores: Tensor | None) -> Tensor:
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


def slope_at_the_end(recording: Recording, norms: Iterable[str], mixed: Tensor) -> Float[Tensor, "batch token channel"]:
    """The gradient of a number at the tokens where the blocks end.

    Args:
        recording: The pass, with its scores.
        norms: Names of norms outside the blocks; behind those that read the tokens there, if the number reads them
            through these alone.
        mixed: The number, in the graph of the scores.

    Raises:
        RecordingError: It does not depend on the tokens there.
    """
    end = recording.stream_end
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
    normed = _normed(recording, norms)
    outputs = [norm.output.tensor for norm in normed]
    *after, before = slopes_at(mixed, [*outputs, end])
    laid = (_as_the_end(slope, norm, end) for slope, norm in zip(after, normed, strict=True))
    seen = [slope for slope in laid if slope is not None]
    slope = _through_alone(seen[0], before) if len(seen) == 1 else before
    if slope is None:
        raise RecordingError("the scores do not depend on the tokens where the blocks end")
    return slope.flatten(1, -2).to(accumulation_dtype(slope))


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


def _through_alone(after: Tensor, before: Tensor | None) -> Tensor:
    """The gradient behind a norm, if its readers read all the tokens that are read; else the one before it."""
    if before is None:
        return after
    behind, all_read = after.ne(0).any(-1).flatten(1), before.ne(0).any(-1).flatten(1)
    if behind.shape != all_read.shape or after.shape[-1] != before.shape[-1]:
        return before
    alone = (behind == all_read).all()  # not read: a device need not be waited for
    return torch.where(alone, after.reshape(before.shape).to(before.dtype), before)


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
    (slope,) = slopes_at(first, [end])
    if slope is not None and bool(slope[1:].any()):
        raise UnsupportedModelError(
            "the score of one image reads a token of every image: the attention, of batch_first=False, was given the "
            "batch first, so the images attend to each other; expected (tokens, batch, channels), or batch_first=True"
        )
