"""From the model's output to the score that is explained, and from the score to the head's cotangent ``u``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, warn_caller
from captum_lnstat.recording.forward import Target, select_targets
from captum_lnstat.recording.statistics import accumulation_dtype, stream
from captum_lnstat.rules.checks import check_start, reads
from captum_lnstat.rules.reads import Read, left_out, same_memory
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

# Gradients of so many entries are held at once, those of a few scores at least.
HELD = 1 << 19
FEWEST = 4


@dataclass(frozen=True)
class Head:
    """From the end of the residual stream to the scores that are explained.

    Attributes:
        scores: One value an image, for every target; in the graph of the head.
        stream_end: The residual stream where the head begins.
        trace: What was recognised, for what the head may read.
        reads: What the scores read besides, earlier in the stream or by another path.
    """

    scores: tuple[Float[Tensor, " batch"], ...]
    stream_end: Tensor
    trace: Trace
    reads: tuple[Read, ...] = ()

    @cached_property
    def values(self) -> tuple[Float[Tensor, " batch"], ...]:
        """The scores alone."""
        return tuple(score.detach() for score in self.scores)

    @cached_property
    def cotangent(self) -> tuple[Cotangent, Float[Tensor, "batch score"]]:
        """``u`` with ``score = sum_i u_i . x_i + constant`` at the end of the stream, and the constant."""
        with torch.enable_grad():
            u, constant = head_cotangent(self.scores, self.stream_end, besides=bool(self.reads))
        check_start(self.trace, u.reads())
        return u, constant

    @cached_property
    def _earlier(self) -> list[tuple[Tensor, Cotangent, Float[Tensor, "batch score"]]]:
        """Earlier places of the stream: their tokens, ``u`` there, and what the score takes from them."""
        found = []
        with torch.enable_grad():
            for read in self.reads:
                if read.tokens is not None:
                    slopes = list(_slopes(self.scores, read.edge, read.value, read.as_tokens, besides=True))
                    u = Cotangent.of_parts(slopes)
                    if len(u.at):
                        found.append((read.tokens, u, u.read(read.tokens).sum(1)))
        return found

    def cotangent_at(self, tokens: Tensor) -> tuple[Cotangent, Float[Tensor, "batch score"]] | None:
        """``u`` at an earlier place of the stream that the scores read, and ``sum_i u_i . x_i``; if they do."""
        return next(((u, taken) for place, u, taken in self._earlier if same_memory(place, tokens)), None)

    def lowest(self, trace: Trace) -> int:
        """How many blocks of ``trace`` lie below the lowest place of the stream that the scores read."""
        places = [trace.tokens, *(step.after for step in trace.steps)]
        read = [any(same_memory(place, tokens) for tokens, _, _ in self._earlier) for place in places]
        steps = trace.steps[: read.index(True)] if True in read else trace.steps
        return sum(isinstance(step, Block) for step in steps)

    def check(self, output: Tensor, *, class_specific: bool) -> None:
        """What the head reads is checked for every rule; one whose forward_func leaves the graph cannot be."""
        if self.reads:
            self._say_what_is_left_out(class_specific)
        if class_specific:
            assert self.cotangent
        elif not getattr(self.trace.pooling, "seen", False):
            first = output.flatten(1)[:, 0] if output.dim() > 1 else output
            score = self.scores[0] if self.scores else first
            if score.requires_grad:
                check_start(self.trace, reads(_slope(score, self.stream_end, bool(self.reads))))

    @cached_property
    def left_out(self) -> str:
        """What no map holds, since the scores read it by another path than the residual stream; empty if nothing."""
        beside = [read for read in self.reads if read.tokens is None]
        if not beside or not self.scores:
            return left_out(beside, None) if beside else ""
        # What forward_func returned may hold more than the scores that are explained.
        share = next((share for score in self.scores if (share := self._share_of(beside, score)) != 0), 0.0)
        return "" if share == 0 else left_out(beside, share)

    def _say_what_is_left_out(self, class_specific: bool) -> None:
        """Warn of what a map leaves out of the scores, which are read besides the end of the stream."""
        if self.left_out:
            warn_caller(self.left_out)
        earlier = [read.name for read in self.reads if read.tokens is not None]
        if earlier and not class_specific:
            warn_caller(
                f"the score reads the residual stream at {', '.join(earlier)}, too; a class-agnostic rule begins at "
                "its end alone: rule='lnstat' and 'evidence' begin at every place that is read"
            )

    def _share_of(self, beside: Sequence[Read], score: Tensor) -> float | None:
        """How much of a score comes from some of the places, to first order, among all that it is read from."""
        if any(read.value.numel() == 0 for read in beside):
            return None
        ends = [self.stream_end, *(read.edge for read in self.reads)]
        values = [self.stream_end.detach(), *(read.value for read in self.reads)]
        with torch.enable_grad():
            total = score.sum()
        with not_run_again():
            slopes = torch.autograd.grad(total, ends, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        pairs = zip(slopes, values, strict=True)
        terms = [0.0 if u is None else float((u * x).flatten(1).sum(1).abs().mean()) for u, x in pairs]
        part = sum(term for term, read in zip(terms[1:], self.reads, strict=True) if read.tokens is None)
        return part / sum(terms) if sum(terms) > 0 else None


def plain_target(target: Any) -> Any:
    """Numpy integers as Python's own: Captum refuses them, and an argmax in numpy gives one."""
    if isinstance(target, Tensor) and target.is_inference():
        return target.clone()
    if isinstance(target, np.integer):
        return int(target)
    if isinstance(target, list) and target and all(isinstance(t, np.integer) for t in target):
        return [int(t) for t in target]
    return target


def target_score(output: Tensor, target: Target) -> Float[Tensor, " batch"]:
    """The output that ``target`` selects, one value an image; Captum's own rules, checks and messages."""
    target = plain_target(target)
    _check_range(output, target)
    score: Tensor = output if output.dim() == 0 else select_targets(output, target)
    if score.dim() == 0:
        raise ValueError(
            "forward_func returned a single number for the whole batch; expected one output per image, "
            "(batch, classes) or (batch,)"
        )
    assert score[0].numel() == 1, (
        "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    )
    return score.reshape(len(score))


def _check_range(output: Tensor, target: Any) -> None:
    """Refuse a class that is not there before it is looked up: on a GPU, the look-up would end the process.

    Of Captum's types for each form: IndexError for one class, which may count from the end, RuntimeError for one class
    an image. Every other mistake in a target is left to Captum's own checks.
    """
    if output.dim() != 2 or isinstance(target, bool):
        return
    classes = output.shape[1]
    if isinstance(target, tuple) and len(target) == 1:
        target = target[0]
    elif isinstance(target, Tensor) and target.numel() == 1 and not target.is_floating_point():
        target = target.item()
    if isinstance(target, int):
        if not -classes <= target < classes:
            raise IndexError(_no_such_class(target, output))
        return
    if isinstance(target, Tensor) and target.dtype in (torch.int64, torch.int32):
        target = target.flatten().tolist()
    if isinstance(target, list) and len(target) == len(output) and all(isinstance(t, int) for t in target):
        for seen in target:
            if not 0 <= seen < classes:
                raise RuntimeError(_no_such_class(seen, output))


def _no_such_class(seen: int, output: Tensor) -> str:
    classes = output.shape[1]
    return (
        f"target {seen} is none of the {classes} classes that forward_func scores: index {seen} is out of bounds for "
        f"dimension 1 with size {classes}. Expected 0 to {classes - 1}"
    )


def contrast(output: Tensor, target: Target) -> Float[Tensor, " batch"]:
    """The target's output minus the mean of the other classes' outputs, weighted by their probabilities.

    ``y_c - sum_{k != c} p_k / (1 - p_c) y_k`` with ``p = softmax(y)`` held constant.
    """
    if output.dim() != 2 or output.shape[1] < 2:
        raise ValueError(
            f"contrastive evidence compares a class with the others, but the model returned {tuple(output.shape)}; "
            "expected (batch, classes) with at least two classes. Pass contrastive=False"
        )
    score = target_score(output, target)
    classes = torch.arange(output.shape[1], device=output.device).expand_as(output)
    chosen = target_score(classes, target)
    logits = output.detach().to(accumulation_dtype(output))
    others = logits.scatter(1, chosen[:, None], -math.inf).softmax(1)
    return score - (others.to(output.dtype) * output).sum(1)


def head_cotangent(
    scores: Sequence[Float[Tensor, " batch"]], stream_end: Tensor, *, besides: bool = False
) -> tuple[Cotangent, Float[Tensor, "batch score"]]:
    """``u`` with ``score = sum_i u_i . x_i + constant`` at the end of the residual stream, and the constant.

    The LayerNorms of the head were recorded with frozen statistics, so for a head of norms, pooling and linear layers
    this is exact. For any other head it is the first-order expansion, the remainder being part of the constant.

    Args:
        scores: The scores.
        stream_end: The end of the stream.
        besides: They read something else as well, or instead.
    """
    u = Cotangent.of_parts(_slopes(scores, stream_end, stream_end, stream, besides=besides))
    read = u.read(stream(stream_end.detach())).sum(1)
    values = torch.stack([score.detach() for score in scores], 1)
    return u, values.to(read.dtype) - read


def _slopes(
    scores: Sequence[Float[Tensor, " batch"]],
    at: Tensor | GradientEdge,
    value: Tensor,
    as_tokens: Callable[[Tensor], Tensor],
    *,
    besides: bool,
) -> Iterator[Float[Tensor, "batch token score channel"]]:
    """The gradient of every score at a place, that of some scores in one backward pass."""
    check_differentiable(scores[0])
    if len(scores) == 1:
        yield as_tokens(_slope(scores[0], at, besides, value))[:, :, None]
        return
    at_once = max(FEWEST, HELD // value.numel())
    for start in range(0, len(scores), at_once):
        together = torch.stack([score.sum() for score in scores[start : start + at_once]])
        one_each = torch.eye(len(together), dtype=together.dtype, device=together.device)
        keep = besides or start + at_once < len(scores)
        where: Any = [at]  # torch takes an edge in a list, too
        (slopes,) = torch.autograd.grad(
            together, where, one_each, retain_graph=keep, is_grads_batched=True, allow_unused=besides
        )
        slopes = value.new_zeros(len(together), *value.shape) if slopes is None else slopes
        tokens = as_tokens(slopes.flatten(0, 1))
        yield tokens.reshape(len(together), len(value), *tokens.shape[1:]).movedim(0, 2)


def _slope(score: Tensor, at: Tensor | GradientEdge, besides: bool, value: Tensor | None = None) -> Tensor:
    """The gradient of a score at a place; zero where it reads other places only."""
    if not besides:
        return gradients(score, [at])[0]
    with torch.enable_grad(), not_run_again():
        total = score.sum()
        (slope,) = torch.autograd.grad(total, [at], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    return torch.zeros_like(at if value is None else value) if slope is None else slope


def check_differentiable(score: Tensor) -> None:
    """The score has to be in the graph of the transformer's tokens."""
    if not score.requires_grad:
        raise RecordingError(
            "the score has no gradient at the transformer's tokens: forward_func leaves the graph after the model "
            "(no_grad, inference_mode, detach, numpy, argmax or re-entrant checkpointing). Let it return the model's "
            "scores as they are"
        )


@contextmanager
def not_run_again() -> Iterator[None]:
    """Gradient checkpointing around the whole model runs it again, where nothing is recorded: that is refused."""
    try:
        yield
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise RecordingError(
            "forward_func runs the model under torch.utils.checkpoint, which runs it again for every gradient, without "
            "what was recorded; expected one pass. Call the model itself; it may checkpoint its own blocks"
        ) from error


def gradients(score: Float[Tensor, " batch"], at: Sequence[Tensor | GradientEdge]) -> tuple[Tensor, ...]:
    """Gradient of every image's score; the parameters' ``.grad`` stays as it is."""
    check_differentiable(score)
    try:
        with torch.enable_grad(), not_run_again():
            total = score.sum()
            return torch.autograd.grad(total, list(at))  # type: ignore[arg-type]  # torch takes both, mixed
    except RuntimeError as error:
        if "not have been used in the graph" not in str(error):
            raise
        raise RecordingError(
            "the score does not depend on every recorded attention or token, or the head holds a layer that lets no "
            "gradient through (quantised, detached); expected a forward_func that returns the scores of one pass of "
            "the model"
        ) from error
