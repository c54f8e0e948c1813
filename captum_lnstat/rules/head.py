"""From the scores that are explained to the head's cotangent ``u``, wherever it reads the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError, warn_caller
from captum_lnstat.recording.slopes import slopes_at
from captum_lnstat.recording.statistics import stream
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
            _ = self.cotangent
        elif not getattr(self.trace.pooling, "seen", False):
            first = output.flatten(1)[:, 0] if output.dim() > 1 else output
            score = self.scores[0] if self.scores else first
            if score.requires_grad:
                check_start(
                    self.trace, reads(_slope(score, self.stream_end, self.stream_end, besides=bool(self.reads)))
                )

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
        ends: list[Tensor | GradientEdge] = [self.stream_end, *(read.edge for read in self.reads)]
        values = [self.stream_end.detach(), *(read.value for read in self.reads)]
        with torch.enable_grad():
            total = score.sum()
        pairs = zip(slopes_at(total, ends), values, strict=True)
        terms = [0.0 if u is None else float((u * x).flatten(1).sum(1).abs().mean()) for u, x in pairs]
        part = sum(term for term, read in zip(terms[1:], self.reads, strict=True) if read.tokens is None)
        return part / sum(terms) if sum(terms) > 0 else None


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
        yield as_tokens(_slope(scores[0], at, value, besides=besides))[:, :, None]
        return
    at_once = max(FEWEST, HELD // value.numel())
    for start in range(0, len(scores), at_once):
        together = torch.stack([score.sum() for score in scores[start : start + at_once]])
        one_each = torch.eye(len(together), dtype=together.dtype, device=together.device)
        keep = besides or start + at_once < len(scores)
        (slopes,) = slopes_at(together, [at], one_each, keep_graph=keep, unused=besides)
        slopes = value.new_zeros(len(together), *value.shape) if slopes is None else slopes
        tokens = as_tokens(slopes.flatten(0, 1))
        yield tokens.reshape(len(together), len(value), *tokens.shape[1:]).movedim(0, 2)


def _slope(score: Tensor, at: Tensor | GradientEdge, value: Tensor, *, besides: bool) -> Tensor:
    """The gradient of a score at a place; zero where it reads other places only."""
    if not besides:
        return gradients(score, [at])[0]
    with torch.enable_grad():
        total = score.sum()
    (slope,) = slopes_at(total, [at])
    return torch.zeros_like(value) if slope is None else slope


def check_differentiable(score: Tensor) -> None:
    """The score has to be in the graph of the transformer's tokens."""
    if not score.requires_grad:
        raise RecordingError(
            "the score has no gradient at the transformer's tokens: forward_func leaves the graph after the model "
            "(no_grad, inference_mode, detach, numpy, argmax or re-entrant checkpointing). Let it return the model's "
            "scores as they are"
        )


def gradients(score: Float[Tensor, " batch"], at: Sequence[Tensor | GradientEdge]) -> tuple[Tensor, ...]:
    """Gradient of every image's score, which has to depend on every place."""
    check_differentiable(score)
    with torch.enable_grad():
        total = score.sum()
    return slopes_at(total, at, keep_graph=False, unused=False)
