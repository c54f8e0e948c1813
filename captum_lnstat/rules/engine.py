"""One recorded forward pass of the user's forward function, traced, with what a rule needs from the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.eager import eager, run_eagerly
from captum_lnstat.recording.forward import ForwardArgs, Output, Target, _run_forward, pick_output
from captum_lnstat.recording.recorder import Recorder
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.rules.checks import check_model, check_seen, check_size, check_start, check_stream, reads
from captum_lnstat.rules.gradient import BackwardPass
from captum_lnstat.rules.head import check_differentiable, contrast, gradients, head_cotangent, target_score
from captum_lnstat.topology import Topology, find_topology
from captum_lnstat.topology.anatomy.parts import looked_up_once
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.pooling import FixedPooling
from captum_lnstat.trace.trace import Trace

# Of images with more numbers than that, what is recorded is copied out of the model's way: it costs some per cent of
# the time, which small images need not pay.
COMPACT = 1 << 20


@dataclass(frozen=True)
class Needs:
    """What a rule needs from a forward pass.

    Attributes:
        target: A target; rules that are class-agnostic need none.
        cotangent: The head's cotangent at the end of the stream.
        contrastive: The score is that of the target against the other classes.
        output_gradients: The gradient of the score at every attention's output, hence the trunk's graph.
        input_gradient: Input times gradient with everything in the model frozen that is not affine.
    """

    target: bool = False
    cotangent: bool = False
    contrastive: bool = False
    output_gradients: bool = False
    input_gradient: bool = False

    @property
    def graph(self) -> bool:
        """The trunk runs with a graph."""
        return self.output_gradients or self.input_gradient


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives a rule; fields that were not needed are ``None``.

    With several targets ``u`` and ``constant`` are those of all of their ``scores``; ``score`` is the first.
    """

    trace: Trace
    recording: Recording
    output: Tensor
    score: Tensor | None
    scores: tuple[Tensor, ...]
    u: Cotangent | None
    constant: Tensor | None
    backward: BackwardPass | None
    input_times_gradient: Tensor | None


@looked_up_once()
def run(
    forward_func: Callable[..., Any],
    model: nn.Module,
    image: Tensor,
    target: Target,
    additional_forward_args: ForwardArgs,
    needs: Needs,
    output: Output = None,
    more_targets: Sequence[Target] = (),
) -> Pass:
    """Run ``forward_func`` once and record it. Neither the model, the caller's grad mode nor ``image`` is changed."""
    topology = find_topology(eager(model))
    check_model(topology.model)
    if isinstance(forward_func, nn.Module):
        forward_func = eager(forward_func)
    check_size(image, topology.model, topology.entrance, direct=forward_func is topology.model)
    # A caller in inference_mode or no_grad still gets gradients at the head; the trunk has a graph only if asked for.
    with torch.inference_mode(False), torch.set_grad_enabled(needs.graph):
        x = image.detach().clone(memory_format=torch.contiguous_format)
        parameter = next((p for p in topology.model.parameters() if p.is_floating_point()), x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(parameter.dtype)
        leaf = x
        if needs.graph:
            x = leaf.requires_grad_().clone()  # not a leaf: a model may normalise it in place
        recorder = Recorder(
            topology.model,
            topology.taps,
            topology.head_begins,
            topology.head_follows,
            channels_first=topology.channels_first,
            cut=not needs.graph,
            compact=x.numel() > COMPACT,
            freeze="everything" if needs.input_gradient else "head",
        )
        with run_eagerly, recorder:
            returned = _run_forward(forward_func, (x,), None, additional_forward_args)
            scores = pick_output(returned, output)
    # The hook at the head has switched gradients on; leaving the context above has put the caller's mode back.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        recording = replace(recorder.recording, scores=scores)
        return _read(topology, recording, scores, image, leaf, (target, *more_targets), needs)


def _read(
    topology: Topology,
    recording: Recording,
    output: Tensor,
    image: Tensor,
    leaf: Tensor,
    targets: Sequence[Target],
    needs: Needs,
) -> Pass:
    if recording.stream_end is None:
        raise RecordingError(
            f"forward_func never ran {type(topology.model).__name__} on this thread; expected exactly one pass of the "
            "model given as model="
        )
    if not bool(torch.isfinite(output).all()):
        raise RecordingError("the model's output is not finite: a NaN or an overflow on the way makes every map wrong")
    u = constant = backward = input_times_gradient = None
    scores: tuple[Tensor, ...] = ()
    if needs.contrastive:
        scores = tuple(contrast(output, target) for target in targets)
    elif needs.target or targets[0] is not None:
        scores = tuple(target_score(output, target) for target in targets)
    score = scores[0] if scores else None
    with torch.no_grad():
        check_seen(recording.call(topology.entrance).input.tensor, image)
        trace = topology.trace(recording, (image.shape[-2], image.shape[-1]))
        trace = replace(trace, training=topology.model.training)
        check_stream(trace, recording.stream_end)
    if needs.cotangent and score is not None:
        u, constant = head_cotangent(scores, recording.stream_end)
        check_start(trace, u.reads())
    elif not needs.graph and not (isinstance(trace.pooling, FixedPooling) and trace.pooling.seen):
        # What the head reads is checked for every rule; one whose forward_func leaves the graph cannot be.
        read = score if score is not None else output.flatten(1)[:, 0] if output.dim() > 1 else output
        if read.requires_grad:
            check_start(trace, reads(gradients(read, [recording.stream_end])[0]))
    if needs.output_gradients and "gradient" not in trace.rules:
        defined = ", ".join(map(repr, trace.rules))
        raise UnsupportedModelError(
            f"the attention of {type(topology.model).__name__} has no output that a gradient can be taken at, so rules "
            f"with the gradient of attention are not defined for it; expected one of {defined}"
        )
    if needs.output_gradients and score is not None:
        missing = [block for block in trace.blocks if block.site.output is None]
        if missing:
            raise RecordingError(
                f"the attention of {missing[0].name} is not in the graph of the score, so it has no gradient; expected "
                "a model and forward_func without no_grad, detach or re-entrant checkpointing"
            )
        check_differentiable(score)
        backward = BackwardPass(score, recording.stream_end)
    if needs.input_gradient and score is not None:
        slope, gradient = gradients(score, [recording.stream_end, leaf])
        check_start(trace, reads(slope))
        dtype = accumulation_dtype(leaf)
        input_times_gradient = leaf.detach().to(dtype) * gradient.to(dtype)
    known = tuple(score.detach() for score in scores)
    first = known[0] if known else None
    return Pass(trace, recording, output.detach(), first, known, u, constant, backward, input_times_gradient)
