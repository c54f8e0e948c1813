"""From the model's output to the score that is explained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from captum_lnstat.recording.devices import reads_no_number
from captum_lnstat.recording.forward import Target, select_targets
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.recording.verdicts import expect

if TYPE_CHECKING:
    from jaxtyping import Float


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
    if reads_no_number() and isinstance(target, Tensor):
        return _of_every_image(output, target)
    _check_range(output, target)
    score: Tensor = output if output.dim() == 0 else select_targets(output, target)
    if score.dim() == 0:
        raise ValueError(
            "forward_func returned a single number for the whole batch; expected one output per image, "
            "(batch, classes) or (batch,)"
        )
    if score[0].numel() != 1:  # Captum's type and message; raised, so that python -O raises it too
        raise AssertionError(
            "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
        )
    return score.reshape(len(score))


def _of_every_image(output: Tensor, target: Tensor) -> Float[Tensor, " batch"]:
    """One class an image in a tensor, looked up where it lies."""
    if output.dim() != 2:
        raise ValueError(
            f"forward_func returned {tuple(output.shape)}; expected (batch, classes) for a tensor of one class an image"
        )
    exists = (target >= 0) & (target < output.shape[1])
    expect(exists, lambda: RuntimeError(_no_such_class(int(target[~exists][0]), output)))
    return output.gather(1, target.clamp(0, output.shape[1] - 1)[:, None])[:, 0]


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
