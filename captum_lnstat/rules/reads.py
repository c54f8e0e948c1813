"""What a score reads besides the end of the residual stream: earlier places of it, and the image by another path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from captum_lnstat.recording.places import IMAGE
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Read:
    """A place that the score reads.

    Attributes:
        name: Name of the module that returned what is read; ``IMAGE`` for the images.
        edge: Where that is in the graph of the score.
        value: What was returned.
        tokens: The residual stream of the trace that it is; ``None`` if it is none, so that it is in no map.
        channels_first: Its channels stand before its rows.
    """

    name: str
    edge: GradientEdge
    value: Tensor
    tokens: Float[Tensor, "batch token channel"] | None = None
    channels_first: bool = False

    def as_tokens(self, value: Tensor) -> Float[Tensor, "batch token channel"]:
        """A tensor of its shape as the residual stream."""
        return stream(value.movedim(1, -1) if self.channels_first else value)


def reads_besides_the_end(recording: Recording, trace: Trace, image: Tensor) -> tuple[Read, ...]:
    """The places besides the end of the stream that what ``forward_func`` returned depends on by itself."""
    scores = recording.scores
    if scores is None or scores.grad_fn is None:
        return ()
    reached = _reached(scores.grad_fn)
    found = [(name, edge) for name, edge in recording.places.items() if edge.node in reached]
    return tuple(_read(name, edge, recording, trace, image) for name, edge in found)


def _read(name: str, edge: GradientEdge, recording: Recording, trace: Trace, image: Tensor) -> Read:
    """The place, at the tokens of the trace that are what was returned there."""
    calls = recording.calls.get(name, ())
    seen = recording.inside.get(name, image.new_zeros(0))
    value = image if name == IMAGE else calls[-1].output.tensor.detach() if calls else seen
    if name == IMAGE or value.dim() < 3:
        return Read(name, edge, value)
    for tokens in (trace.tokens, *(step.after for step in trace.steps)):
        for first in (False, True):
            read = Read(name, edge, value, tokens, first)
            seen = read.as_tokens(value)
            if seen.shape == tokens.shape and torch.equal(seen, tokens):
                return read
    return Read(name, edge, value)


def _reached(node: Any, stop: Any = None) -> set[Any]:
    """The nodes of the graph that a node depends on, but for what another one depends on."""
    reached, waiting = {node}, [node]
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is not None and before is not stop and before not in reached:
                reached.add(before)
                waiting.append(before)
    return reached


def reads_elsewhere(score: Tensor, stream_end: Tensor, image: Tensor) -> bool:
    """Whether a score reads the image by another way than through the end of the stream, all of it in one graph."""
    past = _reached(score.grad_fn, stop=get_gradient_edge(stream_end).node)
    return get_gradient_edge(image).node in past


def same_memory(one: Tensor, another: Tensor) -> bool:
    """Two references to the same tokens."""
    same = one.data_ptr() == another.data_ptr() and one.shape == another.shape and one.stride() == another.stride()
    return one is another or same


def left_out(beside: Sequence[Read], share: float | None) -> str:
    """What to say of a score that reads the image by another path than the residual stream."""
    names = ", ".join(read.name for read in beside)
    about = "what comes that way" if share is None else "less than 1%" if share < 0.01 else f"about {share:.0%}"
    part = about if share is None else f"{about} of it, to first order,"
    return (
        f"the score reads {names} by another path than the residual stream: {part} is in no map. Explain a score of "
        "the transformer alone (another forward_func, or output=), or keep in mind what the map leaves out"
    )
