"""Whether a number of a tensor can be read at once, or the device that it lies on has to be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# On these a number is there when the function that makes it returns. All others have a queue: to read one number stops
# until all that was launched has run, and no more is launched meanwhile.
AT_ONCE = {"cpu"}
# For an entry of attention maps: the scores, the maps and what they are weighted with, in float32, and as much again
# for the relation and what the kernels take.
BYTES_PER_ENTRY = 20
_memory: ContextVar[int | None] = ContextVar("bytes that attention maps may take at once", default=None)
_nothing_read: ContextVar[bool] = ContextVar("every device is worked with as if it had a queue", default=False)


def has_a_queue(device: torch.device) -> bool:
    """Whether to read a number from a device takes as long as all that it was given to do."""
    return device.type not in AT_ONCE or _nothing_read.get()


def reads_no_number() -> bool:
    """Whether ``as_if_queued`` has been entered: what is computed is to depend on no number of the images."""
    return _nothing_read.get()


@contextmanager
def as_if_queued() -> Iterator[None]:
    """Inside, the CPU is worked with as a device that has to be waited for: whole maps, and hardly a number read."""
    token = _nothing_read.set(True)
    try:
        yield
    finally:
        _nothing_read.reset(token)


@contextmanager
def maps_within(memory: int | None) -> Iterator[None]:
    """Inside, attention maps and what is made of them take at most so many bytes at once; ``None``: as many as fit."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def at_most(entries: int) -> int:
    """So many entries of maps, or as many as ``maps_within`` allows.

    Example:
        >>> with maps_within(2000):
        ...     at_most(1 << 20)
        100
    """
    memory = _memory.get()
    return entries if memory is None else min(entries, memory // BYTES_PER_ENTRY)
