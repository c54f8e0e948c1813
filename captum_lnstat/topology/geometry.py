"""Where tokens lie when a model coarsens its grid or cuts it into parts: groups of tokens, built from token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import PADDING, Groups, windows
from captum_lnstat.statistics import stream

Grid = tuple[int, int]


def channels_last(tensor: Tensor) -> Tensor:
    """A stream as ``(batch, token, channel)``, its channels being last."""
    return stream(tensor)


def channels_first(tensor: Tensor) -> Tensor:
    """A stream as ``(batch, token, channel)``, its channels being the first after the batch."""
    return stream(tensor.movedim(1, -1))


def cells(grid: Grid, after: Grid, stride: Grid, device: torch.device | None = None) -> Groups:
    """The tokens of a grid that lie under each token of a coarser one.

    A stride of ``s`` makes ``n / s`` tokens of ``n``, rounded up or down. Rounded up, the last has fewer tokens under
    it; rounded down, tokens beyond the last cell are under none.

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


def footprints(
    grid: Grid, after: Grid, stride: Grid, centre: tuple[float, float], device: torch.device | None = None
) -> Groups:
    """The tokens under each token of a coarser grid whose convolution or pooling reads beyond its cell.

    Each token covers ``stride`` tokens around the middle of what it reads, so that all together cover every token
    evenly. A token covered by half is named once, one that is covered whole twice.

    Args:
        grid: Rows and columns before.
        after: Rows and columns after.
        stride: Rows and columns that a token covers.
        centre: Where the middle of what the first token reads lies, in tokens before.
        device: Where the index lives.

    Example:
        >>> footprints((1, 4), (1, 2), (1, 2), (0.0, 0.0)).index.tolist()
        [[-1, 0, 0, 1], [1, 2, 2, 3]]
        >>> footprints((1, 4), (1, 2), (1, 2), (0.0, 0.5)).index.tolist()
        [[0, 1], [2, 3]]
    """
    if all(middle == (step - 1) / 2 for middle, step in zip(centre, stride, strict=True)):
        return cells(grid, after, stride, device)
    cells(grid, after, stride)  # raises if the one is not made of the other
    rows, columns = (
        _covered(count, later, step, middle, device)
        for count, later, step, middle in zip(grid, after, stride, centre, strict=True)
    )
    ids = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    real = (rows >= 0)[:, None, :, None] & (columns >= 0)[None, :, None, :]
    return Groups(torch.where(real, ids, PADDING).reshape(after[0] * after[1], -1), grid[0] * grid[1])


def _covered(count: int, after: int, stride: int, centre: float, device: torch.device | None) -> Tensor:
    """Along one side, the token at each half step under each token after it; padding beyond the sides."""
    if centre == (stride - 1) / 2:
        steps, size = torch.arange(stride, device=device) - (stride - 1) / 2, stride
    else:
        steps, size = (torch.arange(2 * stride, device=device) + 0.5) / 2 - stride / 2, 2 * stride
    places = (torch.arange(after, device=device) * stride + centre)[:, None] + steps
    tokens = places.round().long().reshape(after, size)
    return torch.where((tokens >= 0) & (tokens < count), tokens, PADDING)


@dataclass(frozen=True)
class Reach:
    """What modules that ran one after another read for each token: how far apart, and around where."""

    stride: Grid
    centre: tuple[float, float]


def reach_of(module: nn.Module) -> Reach:
    """Strides of the convolutions and poolings of a module multiplied, and the middle of what the first token reads.

    Example:
        >>> reach_of(nn.Conv2d(1, 1, 3, stride=2, padding=1))
        Reach(stride=(2, 2), centre=(0.0, 0.0))
        >>> reach_of(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 1, 1)))
        Reach(stride=(2, 2), centre=(0.5, 0.5))
    """
    stride, centre = [1, 1], [0.0, 0.0]
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d):
            for axis in (0, 1):
                kernel, step, dilation = (_of(part, what, axis, 1) for what in ("kernel_size", "stride", "dilation"))
                padding = (kernel - 1) * dilation / 2 if part.padding == "same" else _of(part, "padding", axis, 0)
                centre[axis] += ((kernel - 1) * dilation / 2 - padding) * stride[axis]
                stride[axis] *= step
    return Reach((stride[0], stride[1]), (centre[0], centre[1]))


def _of(part: nn.Module, what: str, axis: int, default: int) -> int:
    value = getattr(part, what, default)
    pair = value if isinstance(value, tuple | list) else (value, value)
    return default if isinstance(value, str) else int(pair[axis])


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
