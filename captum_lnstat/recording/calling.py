"""What modules are given and return first, however they are called and whatever holds what they return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def first_given(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """The first argument of ``forward``, by place or by keyword; ``None`` if it was given nothing.

    Example:
        >>> first_given(nn.Identity(), (1, 2), {}), first_given(nn.Identity(), (), {"mask": 3, "input": 1})
        (1, 1)
    """
    if inputs:
        return inputs[0]
    if not keywords:
        return None
    named = (name for name in inspect.signature(module.forward).parameters if name in keywords)
    return keywords[next(named, next(iter(keywords)))]


def with_first(
    value: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any], given: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another in the place of the first, as a hook before a module returns them."""
    if inputs:
        return (value, *inputs[1:]), dict(keywords)
    return (), {name: value if one is given else one for name, one in keywords.items()}


def first_returned(output: Any) -> Any:
    """What a module returned, or the first tensor in what it returned; that itself where there is none.

    Example:
        >>> import torch
        >>> first_returned({"logits": torch.tensor(1.0), "loss": None}), first_returned((torch.tensor(2.0), "maps"))
        (tensor(1.), tensor(2.))
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        return output[0] if output else output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list) else None
    if parts is None:
        parts = getattr(output, "__dict__", {}).values()
    return next((part for part in parts if isinstance(part, Tensor)), output)
