"""A model's weights as constants of its graph: what only their gradients would need is not kept.

For the gradient of a weight, autograd keeps what the weight was multiplied with: the input of every Linear, about half
of what a transformer's graph holds. No rule takes such a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WEIGHTED: set[Callable[..., Any]] = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.layer_norm,
    torch.layer_norm,
    F.rms_norm,
    F.batch_norm,
    F.group_norm,
    F.multi_head_attention_forward,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mul,
    torch.multiply,
    Tensor.mul,
    Tensor.mul_,
    Tensor.multiply,
    Tensor.__mul__,
    Tensor.__imul__,
    Tensor.__rmul__,
}


def constant(value: Any) -> Any:
    """A parameter without its gradient; anything else as it is.

    Example:
        >>> constant(nn.Linear(2, 1).weight).requires_grad
        False
    """
    return value.detach() if isinstance(value, nn.Parameter) and value.requires_grad else value


def with_constant_weights(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with parameters that have no gradient, if the function is one that multiplies by them."""
    if function not in _WEIGHTED or _watched():
        return args, kwargs
    # What is written into stays itself.
    return (args[:1] + tuple(map(constant, args[1:]))), {name: constant(value) for name, value in kwargs.items()}


def _watched() -> bool:
    """Whether somebody else looks after what is saved for the backward pass.

    Gradient checkpointing runs the calls again, where nobody replaces their weights, and counts what was saved.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("nothing is saved here"):
            return False
    except RuntimeError:
        return True
