"""Videos: tokens of several frames (tubelets), cut out by a convolution over frames, rows and columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid
from captum_lnstat.topology.anatomy.embedding import outside

if TYPE_CHECKING:
    from jaxtyping import Float

# In another order than theirs, what is left of tokens differs by as much as they do.
SAME = 0.02


def tubelet_convolutions(model: nn.Module, but_in: Iterable[nn.Module] = ()) -> dict[str, nn.Conv3d]:
    """Convolutions over frames, rows and columns by name; those in ``but_in`` are left out."""
    return outside(model, but_in, nn.Conv3d)


def sizes(size: Any, axes: int) -> Grid:
    """Sizes along so many axes, of which one number may stand for all.

    Example:
        >>> sizes(7, 2), sizes([2, 4, 4], 3)
        ((7, 7), (2, 4, 4))
    """
    several = size if isinstance(size, tuple | list) else (size,) * axes
    if len(several) != axes:
        raise UnsupportedModelError(f"a window of {tuple(several)} on a grid of {axes} axes; expected {axes} sizes")
    return tuple(int(one) for one in several)


def patch_of(convolution: nn.Conv2d | nn.Conv3d, given: Iterable[int], made: Iterable[int]) -> tuple[int, ...]:
    """The pixels of a patch along every axis of a convolution: its strides.

    Args:
        convolution: The one that makes the patches.
        given: The sizes of what it was given.
        made: The sizes of what it returned.

    Raises:
        UnsupportedModelError: Such patches do not cover the video.
    """
    strides = tuple(map(int, convolution.stride))
    for size, count, stride in zip(given, made, strides, strict=True):
        if abs(size - count * stride) >= stride:
            raise UnsupportedModelError(
                f"a convolution with strides of {' x '.join(map(str, strides))} makes {count} tokens of {size} pixels "
                f"or frames; expected patches of {stride} side by side"
            )
    return strides


def channel_axis(videos: Tensor, seen: Tensor) -> int:
    """Which axis of videos has their channels: 1, or 2 where the frames come first.

    Args:
        videos: What ``forward_func`` was given, five axes, the last two height and width.
        seen: What the convolution that makes the tubelets was given, ``(batch, channel, frame, height, width)``; it
            may be padded.

    Raises:
        RecordingError: Neither order makes the one of the other.
        UnsupportedModelError: Both do.

    Example:
        >>> channel_axis(torch.zeros(1, 8, 3, 16, 16), torch.zeros(1, 3, 8, 16, 16))
        2
    """
    orders = {axis: videos if axis == 1 else videos.transpose(1, 2) for axis in (1, 2)}
    fits = [axis for axis, ordered in orders.items() if _covers(seen, ordered)]
    if not fits:
        raise RecordingError(
            f"the transformer cuts videos of shape {tuple(seen.shape)} into tokens, forward_func was given "
            f"{tuple(videos.shape)}; expected as many frames and channels, in any order. Change the number of frames "
            "before you explain them"
        )
    if len(fits) == 2:
        inside = seen[:, : videos.shape[1], : videos.shape[2], : videos.shape[3], : videos.shape[4]]
        fits = [axis for axis, ordered in orders.items() if torch.equal(ordered.to(inside), inside)]
    if len(fits) != 1:
        raise UnsupportedModelError(
            f"which axis of videos of shape {tuple(videos.shape)} has the frames and which the channels cannot be "
            "told: they are as many, and what the transformer was given does not show it. Explain videos of another "
            "number of frames"
        )
    return fits[0]


def _covers(seen: Tensor, ordered: Tensor) -> bool:
    """The same channels; no fewer frames, and less than twice as many: what is padded is less than a tubelet."""
    return seen.shape[1] == ordered.shape[1] and ordered.shape[2] <= seen.shape[2] < 2 * ordered.shape[2]


def place_of_tubelets(
    model: nn.Module, tubelets: Tensor, tokens: Tensor, grid: Grid, likely: tuple[int, int, int] = (0, 1, 2)
) -> Tensor | None:
    """Which token is at each place of the grid, frame by frame and row by row; ``None`` if they are in that order.

    The first block is given what the convolution made, plus a position. An order is the right one if what is left
    without the convolution's part is a position: something that the model holds, or the sum of one for the frame and
    one for the place in it.

    Args:
        model: The transformer.
        tubelets: What the convolution made, ``(batch, channel, frame, row, column)``.
        tokens: What the first block was given, ``(batch, token, channel)``; those of the tubelets are the last.
        grid: Frames, rows and columns.
        likely: The order of these axes that is tried first: of a video that is the same everywhere, any fits.

    Raises:
        UnsupportedModelError: No order leaves a position.
    """
    count, channels = math.prod(grid), tokens.shape[2]
    patches = tokens[:, -count:]
    if tubelets.shape[1] == channels:
        spread = (tubelets - tubelets.mean((2, 3, 4), keepdim=True)).abs().amax()
        rounding = 8 * torch.finfo(tubelets.dtype).eps * patches.abs().amax()
        bar = torch.maximum(SAME * spread, rounding)
        for order in sorted(itertools.permutations(range(3)), key=lambda order: order != likely):
            turned, back = [grid[axis] for axis in order], [order.index(axis) for axis in range(3)]
            left = patches - tubelets.permute(0, *(axis + 2 for axis in order), 1).flatten(1, 3)
            on_grid = left.reshape(len(left), *turned, channels).permute(0, *(axis + 1 for axis in back), 4)
            if _is_additive(on_grid, bar) or any(_same(left, one[-count:], bar) for one in _held(model, tokens, count)):
                ids = torch.arange(count, device=tokens.device).reshape(turned)
                return None if order == (0, 1, 2) else ids.permute(back).flatten()
    raise UnsupportedModelError(
        f"the first block of {type(model).__name__} is given tokens that are not those of the convolution over frames, "
        "rows and columns plus a position, in any order of its axes, so where they lie in the video cannot be seen; "
        "expected an embedding of one such convolution and positions"
    )


def _is_additive(left: Float[Tensor, "batch frame row column channel"], bar: Tensor) -> bool:
    """The same for every video, and the sum of something for the frame and something for the place in it."""
    first = left[0].flatten(1, 2)
    sums = first.mean(0) + first.mean(1, keepdim=True) - first.mean((0, 1))
    return _same(left.flatten(2, 3), sums, bar)


def _same(seen: Tensor, expected: Tensor, bar: Tensor) -> bool:
    return bool(((seen - expected).abs() <= bar).all())


def _held(model: nn.Module, tokens: Tensor, count: int) -> Iterator[Float[Tensor, "token channel"]]:
    """What a model holds for every token, or every one of the tubelets, as parameters, buffers or plain attributes."""
    channels = tokens.shape[2]
    for module in model.modules():
        for held in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            sized = isinstance(held, Tensor) and held.numel() in (count * channels, tokens[0].numel())
            if sized and held.shape[-1] == channels:
                yield held.detach().reshape(-1, channels).to(tokens)
