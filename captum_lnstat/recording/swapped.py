"""Arguments of a function with other tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def swapped(value: Any, other: Callable[[Tensor], Tensor]) -> Any:
    """The same with ``other`` of every tensor in its place; the very same if that changes none."""
    if isinstance(value, Tensor):
        return other(value)
    if isinstance(value, dict):
        found = {key: swapped(one, other) for key, one in value.items()}
        return value if all(found[key] is value[key] for key in value) else found
    if isinstance(value, tuple | list):
        parts = [swapped(one, other) for one in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple, or not
    return value
