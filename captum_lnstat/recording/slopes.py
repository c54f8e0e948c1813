"""Gradients of what a recorded pass returned, at places of its graph; torch's errors in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from captum_lnstat.errors import RecordingError


def slopes_at(
    of: Tensor,
    at: Sequence[Tensor | GradientEdge],
    one_each: Tensor | None = None,
    *,
    keep_graph: bool = True,
    unused: bool = True,
) -> tuple[Any, ...]:
    """The gradient of a number at each place; the parameters' ``.grad`` stays as it is.

    Args:
        of: The number; with ``one_each`` several, in one dimension.
        at: Tensors, or where tensors are in the graph.
        one_each: The identity matrix: the gradients of several numbers, one after the other.
        keep_graph: Others will be asked for.
        unused: A place that the number does not depend on has ``None``; False refuses it.

    Raises:
        RecordingError: There is none, or a part of the graph would have to be run again, where nothing is recorded.
    """
    places: Any = list(at)  # torch takes both kinds, mixed
    try:
        found: tuple[Any, ...] = torch.autograd.grad(
            of, places, one_each, retain_graph=keep_graph, allow_unused=unused, is_grads_batched=one_each is not None
        )
        return found
    except RuntimeError as error:
        if "checkpoint" in str(error):
            raise RecordingError(
                "what the score is read through runs under torch.utils.checkpoint, which runs it again for every "
                "gradient, without what was recorded of it; expected one pass. Call the head, and forward_func, "
                "without checkpointing; the model may checkpoint its blocks"
            ) from error
        if "not have been used in the graph" not in str(error):
            raise
        raise RecordingError(
            "the score does not depend on every recorded attention or token, or the head holds a layer that lets no "
            "gradient through (quantised, detached); expected a forward_func that returns the scores of one pass of "
            "the model"
        ) from error
