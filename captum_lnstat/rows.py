"""Rows of a gradient that are not zero: a score that reads one token has a gradient at that token alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# Rows are picked out where they are fewer than one in so many.
FEW = 4
# So many of them are looked at first.
SAMPLE = 64


def few_rows(gradient: Float[Tensor, "row *rest"]) -> Int[Tensor, " row"] | None:
    """The rows that are not zero, ascending, if they are few; ``None`` if not, and off the CPU.

    One entry of some rows is looked at first: a gradient at every token shows in them, and is not read. On another
    device, the answer would have to be waited for.

    Example:
        >>> gradient = torch.zeros(8, 2)
        >>> gradient[3] = 1
        >>> few_rows(gradient), few_rows(gradient + 1)
        (tensor([3]), None)
    """
    if gradient.device.type != "cpu" or gradient.numel() == 0:
        return None
    sample = gradient[:: -(-len(gradient) // SAMPLE)].flatten(1)[:, 0]
    if FEW * int(sample.count_nonzero()) > len(sample):
        return None
    found = gradient.ne(0).flatten(1).any(1).nonzero()[:, 0]
    return found if FEW * len(found) <= len(gradient) else None


def either(one: Int[Tensor, " row"] | None, other: Int[Tensor, " row"] | None) -> Int[Tensor, " row"] | None:
    """The rows of both, ascending; ``None`` is all of them."""
    return None if one is None or other is None else torch.unique(torch.cat([one, other]))
