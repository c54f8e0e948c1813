"""Checks that a pass has to hold, read at the end: a device is waited for once, and not at each of them.

What does not hold is an error either way, and nothing is returned before all checks have been read. On the CPU, where a
number costs nothing to read, each is read where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from captum_lnstat.recording.devices import has_a_queue

_Check = tuple[Tensor, Callable[[], Exception | None]]
_open: ContextVar[list[_Check] | None] = ContextVar("checks that are read at the end", default=None)


def expect(holds: Tensor, error: Callable[[], Exception]) -> None:
    """Raise ``error()`` unless all of ``holds`` is true; at the end of ``read_at_the_end``, if that has been entered.

    Example:
        >>> expect(torch.tensor([True, False]), lambda: ValueError("the second does not hold"))
        Traceback (most recent call last):
        ...
        ValueError: the second does not hold
    """
    remark(holds, error)


def remark(holds: Tensor, say: Callable[[], Exception | None]) -> None:
    """As ``expect``, for what is no error: ``say`` warns, and returns nothing that could be raised."""
    waiting = _open.get()
    if waiting is not None and has_a_queue(holds.device):
        waiting.append((holds.all(), say))
    elif not bool(holds.all()):
        error = say()
        if error is not None:
            raise error


@contextmanager
def read_at_the_end() -> Iterator[None]:
    """Checks of numbers on a device are read when this is left: the first that does not hold is raised.

    An error that is raised meanwhile gives way to a check before it: it may be what came of it.
    """
    if _open.get() is not None:
        yield  # whoever entered first reads
        return
    waiting: list[_Check] = []
    token = _open.set(waiting)
    try:
        yield
    except Exception as meanwhile:
        failed = _first_failing(waiting)
        if failed is not None:
            raise failed from meanwhile
        raise
    finally:
        _open.reset(token)
    failed = _first_failing(waiting)
    if failed is not None:
        raise failed


def _first_failing(waiting: list[_Check]) -> Exception | None:
    if not waiting:
        return None
    device = waiting[0][0].device
    held = torch.stack([holds.to(device) for holds, _ in waiting]).tolist()
    errors = (say() for holds, (_, say) in zip(held, waiting, strict=True) if not holds)
    return next((error for error in errors if error is not None), None)
