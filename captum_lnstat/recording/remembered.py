"""What was worked out of the same functions, shapes and numbers before, whatever model they ran in.

Where tokens come from follows from what moved them alone, unless other tensors say where to. So it need not be worked
out again for the next images; and nothing has to be forgotten, since what a result follows from is all in its number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")
# So many are remembered; then all are forgotten.
MANY = 512
_PLAIN = {int, float, str, bool, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout}

_lock = threading.Lock()
_numbers: dict[Any, int] = {}
_made: dict[int, Any] = {}
_last = 0


class _NoNumberError(Exception):
    """A value that cannot be compared with another one."""


def number_of(*parts: Any) -> int | None:
    """The number of all that something follows from: the same for the same; ``None`` if it cannot be told.

    Args:
        *parts: Functions, numbers, strings, and sequences, slices and dictionaries of these. What else there is has to
            have a ``number`` of its own.

    Example:
        >>> number_of("narrow", [1, 2]) == number_of("narrow", (1, 2)) != number_of("narrow", (1, 3))
        True
        >>> number_of(torch.zeros(1)) is None
        True
    """
    global _last
    try:
        key = tuple(_plain(part) for part in parts)
    except _NoNumberError:
        return None
    with _lock:
        if len(_numbers) >= MANY:
            _numbers.clear()
            _made.clear()
        if key not in _numbers:
            _last += 1  # a number is never given twice
            _numbers[key] = _last
        return _numbers[key]


def remembered(number: int | None, make: Callable[[], Made]) -> Made:
    """What was made for a number; made now if it is new, or none. It must not be changed by whom it is given to."""
    if number is None:
        return make()
    with _lock:
        if number in _made:
            found: Made = _made[number]
            return found
    found = make()
    with _lock:
        _made[number] = found
    return found


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # True is not 1, and 1 not 1.0
    if isinstance(value, tuple | list):
        return tuple(_plain(one) for one in value)
    if kind is dict:
        return tuple((name, _plain(one)) for name, one in sorted(value.items()))
    if kind is slice:
        return "slice", _plain((value.start, value.stop, value.step))
    own = getattr(value, "number", None)
    if type(own) is int:
        return "number", own
    if callable(value) and own is None and not isinstance(value, type):
        return value
    raise _NoNumberError
