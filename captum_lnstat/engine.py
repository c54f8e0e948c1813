"""One recorded forward pass of the user's forward function, traced, with what a rule needs from the score."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat._compat import _run_forward
from captum_lnstat._typing import ForwardArgs, Target
from captum_lnstat.errors import RecordingError
from captum_lnstat.frozen import per_image
from captum_lnstat.head import contrast, gradients, head_covector, target_score
from captum_lnstat.recording import Recorder, Recording
from captum_lnstat.rules import Relevance
from captum_lnstat.topology import Topology, find_topology
from captum_lnstat.trace import Trace

# How far evidence may be from the score, relative to its size. Float error is far below; another wiring far above.
TOLERANCE = 1e-2
HALF_TOLERANCE = 0.2


@dataclass(frozen=True)
class Needs:
    """What a rule needs from a forward pass.

    Attributes:
        target: A target; rules that are class-agnostic need none.
        covector: The head's covector at the end of the stream.
        contrastive: The score is that of the target against the other classes.
        output_gradients: The gradient of the score at every attention's output, hence the trunk's graph.
    """

    target: bool = False
    covector: bool = False
    contrastive: bool = False
    output_gradients: bool = False


@dataclass(frozen=True)
class Pass:
    """What one forward pass gives a rule; fields that were not needed are ``None``."""

    trace: Trace
    recording: Recording
    output: Tensor
    score: Tensor | None
    u: Tensor | None
    constant: Tensor | None
    output_gradients: tuple[Tensor, ...] | None
    training: bool


def eager(module: nn.Module) -> nn.Module:
    """The module inside DataParallel and torch.compile wrappers, which runs eagerly on one device."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def check_image(image: object) -> Tensor:
    """The image batch, or an error that says what is wrong with it."""
    if not isinstance(image, Tensor):
        raise TypeError(f"inputs is a {type(image).__name__}; expected a torch.Tensor or a tuple with one")
    if image.dim() != 4:
        raise ValueError(f"inputs has shape {tuple(image.shape)}; expected (batch, channels, height, width)")
    if image.numel() == 0:
        raise ValueError(f"inputs has shape {tuple(image.shape)}; expected at least one image")
    if not image.is_floating_point():
        raise TypeError(f"inputs is of {image.dtype}; expected a floating-point image, normalised for the model")
    if not bool(torch.isfinite(image).all()):
        raise ValueError("inputs holds NaN or infinite values; expected finite ones, since no map can be right for it")
    return image


def run(
    forward_func: Callable[..., Any],
    model: nn.Module,
    image: Tensor,
    target: Target,
    additional_forward_args: ForwardArgs,
    needs: Needs,
) -> Pass:
    """Run ``forward_func`` once and record it. Neither the model, the caller's grad mode nor ``image`` is changed."""
    topology = find_topology(eager(model))
    _check_model(topology.model)
    if isinstance(forward_func, nn.Module):
        forward_func = eager(forward_func)
    # A caller in inference_mode or no_grad still gets gradients at the head; the trunk has a graph only if asked for.
    with torch.inference_mode(False), torch.set_grad_enabled(needs.output_gradients):
        x = image.detach().clone(memory_format=torch.contiguous_format)
        parameter = next((p for p in topology.model.parameters() if p.is_floating_point()), x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(parameter.dtype)
        if needs.output_gradients:
            x.requires_grad_()
        recorder = Recorder(topology.model, topology.taps, topology.head_begins, cut=not needs.output_gradients)
        with recorder:
            output = _logits(_run_forward(forward_func, (x,), None, additional_forward_args))
    # The hook at the head has switched gradients on; leaving the context above has put the caller's mode back.
    with torch.inference_mode(False), torch.enable_grad():
        return _read(topology, recorder.recording, output, (x.shape[-2], x.shape[-1]), target, needs)


def _read(
    topology: Topology, recording: Recording, output: Tensor, image_size: tuple[int, int], target: Target, needs: Needs
) -> Pass:
    if recording.stream_end is None:
        raise RecordingError(
            f"forward_func never ran {type(topology.model).__name__} on this thread; expected exactly one pass of the "
            "model given as model="
        )
    score = u = constant = output_gradients = None
    if needs.contrastive:
        score = contrast(output, target)
    elif needs.target or target is not None:
        score = target_score(output, target)
    with torch.no_grad():
        trace = topology.trace(recording, image_size)
    if needs.covector and score is not None:
        u, constant = head_covector(score, recording.stream_end)
        _check_start(trace, u)
    if needs.output_gradients and score is not None:
        outputs = [block.site.output for block in trace.blocks]
        missing = [block.name for block, site_output in zip(trace.blocks, outputs, strict=True) if site_output is None]
        if missing:
            raise RecordingError(
                f"the attention of {missing[0]} is not in the graph of the score, so it has no gradient; expected a "
                "model and forward_func without no_grad, detach or re-entrant checkpointing"
            )
        output_gradients = gradients(score, [out for out in outputs if out is not None])
    detached = None if score is None else score.detach()
    training = topology.model.training
    return Pass(trace, recording, output.detach(), detached, u, constant, output_gradients, training)


def _logits(output: Any) -> Tensor:
    """The scores: a tensor, or the ``logits`` of a Hugging Face output."""
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"forward_func returned a {type(output).__name__}; expected a tensor of scores. Pass a function that picks "
            "one, and the model as model="
        )
    return output


def _check_model(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_inference():
        raise RecordingError(
            f"the parameters of {type(model).__name__} were made under torch.inference_mode, so no gradient can be "
            "taken even at its head; build or load the model outside inference_mode"
        )
    if model.training:
        warnings.warn(
            f"{type(model).__name__} is in train mode: dropout and stochastic depth make the explanation of this pass "
            "random. Call model.eval() first",
            stacklevel=4,
        )


def _check_start(trace: Trace, u: Tensor) -> None:
    """The head may only read the tokens that the topology says it reads."""
    read = u.ne(0).any(-1)
    unexpected = read & trace.start("mean").eq(0)
    if bool(unexpected.any()):
        token = int(unexpected.nonzero()[0, 1])
        raise RecordingError(
            f"the head reads token {token}, but pooling was recognised as {trace.pooling.name!r}, which does not; "
            "expected the head of the family. A model with a pooling of its own needs a topology of its own"
        )


def check_complete(evidence: Relevance, outcome: Pass) -> None:
    """Evidence has to add up to the score it explains; if it does not, the family was recognised wrongly."""
    score = outcome.score
    if score is None or outcome.training:
        return
    error = (evidence.total - score.to(evidence.total.dtype)).abs()
    size = 1 + evidence.constant.abs() + per_image(evidence.grid.abs())
    tolerance = TOLERANCE if outcome.output.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    if not bool((error <= tolerance * size).all()):
        raise RecordingError(
            f"the evidence of patches, prefix tokens and constant misses the score by up to {float(error.max()):.3g} "
            "(expected float error): the model does something between its blocks that its topology does not know, so "
            "no map from it can be trusted"
        )
