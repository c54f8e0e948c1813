"""Randomness that belongs to an image: the same for any order, batch size and number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(name: str, seed: int) -> int:
    """A seed from an image's name and the run's seed.

    Example:
        >>> seed_of("a", 0) == seed_of("a", 0), seed_of("a", 0) == seed_of("b", 0), seed_of("a", 0) == seed_of("a", 1)
        (True, False, False)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(name: str, seed: int) -> Iterator[None]:
    """Torch's random state as it is for this image, and put back afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed_of(name, seed))
        yield
