"""One recorded forward pass of the user's forward function, traced, with what a rule may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError, one_line, quietly, warn_caller
from captum_lnstat.recording.devices import reads_no_number
from captum_lnstat.recording.eager import eager, run_eagerly
from captum_lnstat.recording.forward import ForwardArgs, Output, Target, pick_output, run_forward
from captum_lnstat.recording.hooks import hooked
from captum_lnstat.recording.recorder import Differentiable
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.recording.tape import caller_autocast
from captum_lnstat.recording.verdicts import expect
from captum_lnstat.rules.checks import (
    check_axes,
    check_gradients,
    check_model,
    check_numbers,
    check_seen,
    check_size,
    check_start,
    check_stream,
    check_whole,
    draws_at_random,
)
from captum_lnstat.rules.checks import reads as reads_tokens
from captum_lnstat.rules.head import Head, gradients
from captum_lnstat.rules.reads import reads_besides_the_end
from captum_lnstat.rules.stacked_blocks import room_for_maps, stacked
from captum_lnstat.rules.target import contrast, target_score
from captum_lnstat.topology import Topology, find_topology
from captum_lnstat.topology.anatomy.once import looked_up_once
from captum_lnstat.topology.anatomy.pooling import PoolingAsRead
from captum_lnstat.topology.base import followed
from captum_lnstat.trace.own_values import check_own_values
from captum_lnstat.trace.placing import check_rows, placed
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

# Of images with more numbers than that, what is recorded is copied out of the model's way: it costs some per cent of
# the time, which small images need not pay.
COMPACT = 1 << 20


@dataclass(frozen=True)
class Pass:
    """One forward pass. What needs a backward pass is made when a rule asks for it.

    Attributes:
        trace: The way from the patches to the head.
        recording: What the model left.
        output: What ``forward_func`` returned.
        head: The scores that are explained, and their cotangent at the end of the stream.
        image: What the model was given, in the graph of the scores if the whole model is in it.
        again: The same pass of other images, as many and as large.
    """

    trace: Trace
    recording: Recording
    output: Tensor
    head: Head
    image: Tensor
    again: Callable[[Tensor], Pass]

    @property
    def score(self) -> Tensor | None:
        """The first score of every image; ``None`` for a class-agnostic rule without a target."""
        return self.head.values[0] if self.head.values else None

    @cached_property
    def input_times_gradient(self) -> Tensor:
        """The image times the gradient of the score there; the whole model has to be differentiable."""
        slope, gradient = gradients(self.head.scores[0], [self.head.stream_end, self.image])
        check_start(self.trace, reads_tokens(slope))
        dtype = accumulation_dtype(self.image)
        return self.image.detach().to(dtype) * gradient.to(dtype)

    def above(self, block: Block, *, into: bool) -> Pass:
        """The same pass from a block to the head, as ``Trace.above``."""
        return replace(self, trace=self.trace.above(block, into=into))


@looked_up_once()
def run(
    forward_func: Callable[..., Any],
    model: nn.Module,
    image: Tensor,
    targets: Sequence[Target] = (None,),
    additional_forward_args: ForwardArgs = None,
    *,
    class_specific: bool = False,
    contrastive: bool = False,
    differentiable: Differentiable = "head",
    starts: bool = True,
    detailed: bool = False,
    output: Output = None,
) -> Pass:
    """Run ``forward_func`` once and record it. Neither the model, the caller's grad mode nor ``image`` is changed.

    Args:
        forward_func: The function; it runs ``model`` once.
        model: The transformer.
        image: The images.
        targets: The targets that are explained, one for most rules.
        additional_forward_args: Passed on to ``forward_func``.
        class_specific: The rule explains a score; if not, a target need not be given.
        contrastive: The score is that of the target against the other classes.
        differentiable: What of the model has to be, for the rule.
        starts: The rule may start with what the head reads, whatever the class.
        detailed: What the softmaxes read is kept, and how the head was called.
        output: Which of several outputs is explained.
    """
    check_whole(model)
    topology = find_topology(eager(model))
    check_model(topology.model)
    if differentiable != "head":
        check_gradients(topology.model)
    if isinstance(forward_func, nn.Module):
        forward_func = eager(forward_func)
    check_axes(image, topology.axes, topology.model)
    check_numbers(image)
    check_size(image, topology.model, topology.entrance, direct=forward_func is topology.model)
    kind = image.device.type
    autocast = caller_autocast(kind)
    # A caller in inference_mode or no_grad still gets gradients at the head; the trunk has a graph only if asked for.
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable != "head"):
        x = image.detach().clone(memory_format=torch.contiguous_format)
        parameter = next((p for p in topology.model.parameters() if p.is_floating_point()), x)
        if not torch.is_autocast_enabled(kind):
            x = x.to(parameter.dtype)
        leaf = x
        if differentiable != "head":
            x = leaf.requires_grad_().clone()  # not a leaf: a model may normalise it in place
        # What is between a block's input and its attention is followed once: as long as the model is made of the same.
        circumstances = image.shape[1:], hooked(topology.model)
        known = followed(eager(model))
        # An affine pass takes nothing of an attention but what it makes of the stream.
        values = differentiable != "affine" and circumstances not in known and not reads_no_number()
        recorder = topology.recorder(x, differentiable, compact=x.numel() > COMPACT, detailed=detailed, values=values)
        with run_eagerly, recorder:
            returned = run_forward(forward_func, (recorder.marked(x),), None, additional_forward_args)
            returned = pick_output(returned, output)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
        recording = replace(
            recorder.recording, scores=returned, rows=recorder.following.of(returned), tape=recorder.tape
        )
        _check_ran(recording, topology.model)
        scores: tuple[Tensor, ...] = ()
        if contrastive:
            scores = tuple(contrast(returned, target) for target in targets)
        elif class_specific or targets[0] is not None:
            scores = tuple(target_score(returned, target) for target in targets)
        with torch.no_grad():
            check_seen(recording.call(topology.entrance).input.tensor, image)
            trace = _traced(topology, recording, (image.shape[-2], image.shape[-1]))
        # Where no score reads the end of the stream, nobody was given it.
        stream_end = trace.end.detach().requires_grad_() if recording.stream_end is None else recording.stream_end
        with torch.no_grad():
            check_stream(trace, stream_end)
            trace = placed(trace, recording)
            check_rows(recording)
            if values:
                check_own_values(trace, recording)
                known.add(circumstances)
        if recorder.following.other_pixels:
            warn_caller(
                "forward_func gives the transformer other pixels than the images it was given, made by what cannot be "
                "followed (NumPy, a custom operation): the map lies on what the transformer saw. Make them before you "
                "explain them, or with functions of torch"
            )
        channels = topology.channel_axis(recording, image)
        trace = replace(trace, training=draws_at_random(topology.model) is not None, channel_axis=channels)
        if starts and isinstance(trace.pooling, PoolingAsRead):
            _ = trace.pooling.found  # while the graph of the head is there
        reads = reads_besides_the_end(recording, trace, x) if differentiable == "head" else ()
        head = Head(scores, stream_end, trace, reads)
        if differentiable == "head":
            head.check(returned, class_specific=class_specific)
    if differentiable == "head":
        trace = stacked(trace, room_for_maps(x.device))
    again = partial(
        run, forward_func, model, targets=targets, additional_forward_args=additional_forward_args,
        class_specific=class_specific, contrastive=contrastive, differentiable=differentiable, starts=starts,
        detailed=detailed, output=output,
    )  # fmt: skip
    return Pass(trace, recording, returned.detach(), head, leaf, autocast(quietly()(again)))


def _traced(topology: Topology, recording: Recording, size: tuple[int, int]) -> Trace:
    """The trace; what a topology did not look out for is a recording of something else than it knows."""
    try:
        return topology.trace(recording, size)
    except (UnsupportedModelError, RecordingError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError, AssertionError, StopIteration) as error:
        raise RecordingError(
            f"what {type(topology.model).__name__} did in this pass does not fit what its structure says, "
            f"{topology.family!r}, so relevance cannot be placed: {one_line(error) or type(error).__name__}"
        ) from error


def _check_ran(recording: Recording, model: nn.Module) -> None:
    """The model has to have run, and to have returned numbers."""
    if not recording.calls and recording.stream_end is None:
        raise RecordingError(
            f"forward_func never ran {type(model).__name__} on this thread; expected exactly one pass of the model "
            "given as model="
        )
    assert recording.scores is not None
    scores = recording.scores.detach()
    expect(
        scores - scores == 0,
        lambda: RecordingError(
            "the model's output is not finite: a NaN or an overflow on the way makes every map wrong"
        ),
    )
