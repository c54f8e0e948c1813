"""What was found in a module, as long as the structure of the model it is in cannot have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from torch import nn

Found = TypeVar("Found")
Known = dict[tuple[Callable[..., Any], int], Any]
_known: ContextVar[Known | None] = ContextVar("parts found while the structure of a model cannot change", default=None)


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Inside, what was found in a module holds: every family looks for the same in the same modules."""
    token = _known.set({} if _known.get() is None else _known.get())
    try:
        yield
    finally:
        _known.reset(token)


def known_so_far() -> Known | None:
    """What has been found in modules since ``looked_up_once`` was entered; it is added to until that is left."""
    return _known.get()


def recall(known: Known) -> None:
    """Until ``looked_up_once`` is left, what was found before in the same modules holds."""
    if _known.get() is not None:
        _known.set(known)


def once(find: Callable[[nn.Module], Found]) -> Callable[[nn.Module], Found]:
    """While ``looked_up_once`` holds, a module is looked through once.

    What is found is remembered beside the model, and must not hold it.
    """

    @wraps(find)
    def look_up(module: nn.Module) -> Found:
        known = _known.get()
        if known is None:
            return find(module)
        key = find, id(module)
        if key not in known:
            known[key] = find(module)
        found: Found = known[key]
        return found

    return look_up
