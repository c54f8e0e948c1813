"""Where tokens lie when a model coarsens its grid or cuts it into parts: groups of tokens, built from token ids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import PADDING, Grid, Groups, windows
from captum_lnstat.recording.statistics import stream

# A stream as ``(batch, token, channel)``, its channels being last.
channels_last = stream


def channels_first(tensor: Tensor) -> Tensor:
    """A stream as ``(batch, token, channel)``, its channels being the first after the batch."""
    return stream(tensor.movedim(1, -1))


def pair(size: Any) -> Grid:
    """Rows and columns of a size that may be one number for both."""
    rows, columns = size if isinstance(size, tuple | list) else (size, size)
    return int(rows), int(columns)


def squares(grid: Grid, members: int, device: torch.device | None = None) -> Groups:
    """Square windows of so many tokens that do not shift."""
    side = math.isqrt(members)
    return windows(grid, (side, side), (0, 0), device)


def cells(grid: Grid, after: Grid, stride: Grid, device: torch.device | None = None) -> Groups:
    """The tokens of a grid that lie under each token of a coarser one.

    A stride of ``s`` makes ``n / s`` tokens of ``n``, rounded up or down. Rounded up, the last has fewer tokens under
    it; rounded down, tokens beyond the last cell are under none. What a convolution reads beyond its cell is left out:
    cells alone keep an even map even, while overlapping kernels at the borders would gather relevance in a corner.

    Args:
        grid: Rows and columns before.
        after: Rows and columns after.
        stride: Rows and columns of a cell.
        device: Where the index lives.

    Raises:
        UnsupportedModelError: The stride does not make the one of the other.

    Example:
        >>> cells((2, 3), (1, 2), (2, 2)).index.tolist()
        [[0, 1, 3, 4], [2, -1, 5, -1]]
    """
    if any(later not in (n // step, -(-n // step)) for n, later, step in zip(grid, after, stride, strict=True)):
        raise UnsupportedModelError(
            f"a grid of {grid[0]} x {grid[1]} tokens became one of {after[0]} x {after[1]}; expected a stride of "
            f"{stride[0]} x {stride[1]} to make the one of the other"
        )
    ids = torch.arange(grid[0] * grid[1], device=device).reshape(grid)
    missing = [later * step - before for before, later, step in zip(grid, after, stride, strict=True)]
    ids = F.pad(ids, (0, max(0, missing[1]), 0, max(0, missing[0])), value=PADDING)
    ids = ids[: after[0] * stride[0], : after[1] * stride[1]]
    ids = ids.reshape(after[0], stride[0], after[1], stride[1]).transpose(1, 2)
    return Groups(ids.reshape(after[0] * after[1], -1), grid[0] * grid[1])


def strides_of(module: nn.Module) -> Grid:
    """The strides of the convolutions and poolings of a module that runs them one after another, multiplied.

    Example:
        >>> strides_of(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, stride=(1, 2), padding=1)))
        (2, 4)
    """
    rows, columns = 1, 1
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
            stride = pair(part.stride)
            rows, columns = rows * stride[0], columns * stride[1]
    return rows, columns


def adaptive_cells(grid: Grid, after: Grid, device: torch.device | None = None) -> Groups:
    """The tokens that an adaptive average pooling to ``after`` averages for each of its cells; cells may overlap.

    Example:
        >>> adaptive_cells((1, 3), (1, 2)).index.tolist()
        [[0, 1], [1, 2]]
    """
    spans = [
        [(i * before // later, -(-(i + 1) * before // later)) for i in range(later)]
        for before, later in zip(grid, after, strict=True)
    ]
    lists = [
        [row * grid[1] + column for row in range(*rows) for column in range(*columns)]
        for rows in spans[0]
        for columns in spans[1]
    ]
    longest = max(map(len, lists))
    padded = [members + [PADDING] * (longest - len(members)) for members in lists]
    return Groups(torch.tensor(padded, device=device), grid[0] * grid[1])


def lattices(grid: Grid, size: Grid, device: torch.device | None = None) -> Groups:
    """Parts of tokens that lie evenly spread over the whole grid, ``size`` of them in each part.

    Example:
        >>> lattices((2, 4), (1, 2)).index.tolist()
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    steps = grid[0] // size[0], grid[1] // size[1]
    ids = torch.arange(grid[0] * grid[1], device=device).reshape(size[0], steps[0], size[1], steps[1])
    return Groups(ids.permute(1, 3, 0, 2).reshape(steps[0] * steps[1], size[0] * size[1]))


def partition(
    name: str, grid: Grid, sizes: Iterable[Grid], tokens: Tensor, parts: Tensor, device: torch.device | None = None
) -> Groups:
    """The windows or lattices that a model cut its tokens into, recognised by what it cut: bit for bit.

    Args:
        name: Of the block, for messages.
        grid: Rows and columns of tokens.
        sizes: Rows and columns a part may have.
        tokens: What was cut, ``(batch, token, channel)``.
        parts: What came of it, ``(batch * parts, member, channel)``.
        device: Where the index lives.

    Raises:
        RecordingError: What came of it is neither, or could be either.
    """
    found: list[Groups] = []
    if tokens.shape[1] != grid[0] * grid[1]:
        raise RecordingError(
            f"{name!r} cuts {tokens.shape[1]} tokens of {tokens.shape[2]} channels into parts, on a grid of "
            f"{grid[0]} x {grid[1]}; expected as many tokens as the grid has"
        )
    for size in sizes:
        if grid[0] % size[0] or grid[1] % size[1]:
            continue
        for groups in (windows(grid, size, (0, 0), device), lattices(grid, size, device)):
            same = any(torch.equal(groups.index, other.index) for other in found)
            if not same and torch.equal(groups.gather(tokens), parts):
                found.append(groups)
    if len(found) != 1:
        what = "neither windows nor lattices of them" if not found else "the same for windows and for lattices of them"
        raise RecordingError(
            f"the parts that {name!r} cuts its {grid[0]} x {grid[1]} tokens into are {what}; expected parts that can "
            "be told, by tokens that are not all the same"
        )
    return found[0]
