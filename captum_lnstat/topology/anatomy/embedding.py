"""What a model is made of by structure: lists of blocks, and the convolutions that make the patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid
from captum_lnstat.recording.eager import named, names_and_modules
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.once import once
from captum_lnstat.topology.anatomy.parts import Layer, is_residual_block
from captum_lnstat.topology.anatomy.projections import ADAPTED
from captum_lnstat.trace.placing import places_before

LISTS = (nn.ModuleList, nn.Sequential)
# A convolution that reads images has few input channels; one between two stages reads features, which are more.
IMAGE_CHANNELS = 16


@once
def names_of(model: nn.Module) -> dict[int, str]:
    """The names that a recording has for modules, by their ``id``: for one wrapped by ``torch.compile``, too."""
    return {id(module): name for name, module in names_and_modules(model)}


def block_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Lists of nothing but residual blocks, by name, in the order in which they are defined."""
    return lists_of(model, is_residual_block)


def lists_of(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Lists of nothing but modules of a kind, by name; a list may have a ``None`` where one was left out."""
    lists = {name: module for name, module in named(model).items() if isinstance(module, LISTS)}
    held = {name: list(module.children()) for name, module in lists.items()}
    return {name: module for name, module in lists.items() if held[name] and all(map(is_one, held[name]))}


def outside(model: nn.Module, blocks: Iterable[nn.Module], kind: type[Layer]) -> dict[str, Layer]:
    """Modules of a kind by name, in the order in which they are defined; those in ``blocks`` are left out."""
    inside = {id(part) for block in blocks for part in block.modules()}
    return {name: part for name, part in named(model).items() if isinstance(part, kind) and id(part) not in inside}


def convolutions(model: nn.Module, but_in: Iterable[nn.Module] = ()) -> dict[str, nn.Conv2d]:
    """Convolutions of ``model`` by name, in the order in which they are defined; those in ``but_in`` are left out.

    So are those of an adapter around a convolution, which make of its input what is added to its output.

    Example:
        >>> list(convolutions(nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 8, 2))))
        ['0', '2']
    """
    return outside(model, [*but_in, *_beside_adapted(model)], nn.Conv2d)


def _beside_adapted(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if ADAPTED in module._modules:
            yield from (child for name, child in module.named_children() if name != ADAPTED)


def reads_images(found: Mapping[str, nn.Conv2d]) -> bool:
    """Whether the first of some convolutions can be one that reads images."""
    return bool(found) and next(iter(found.values())).in_channels < IMAGE_CHANNELS


def grid_of(recording: Recording, convolution: str) -> Grid:
    """Rows and columns of what a convolution returned; frames, rows and columns if it is one of videos."""
    return tuple(map(int, recording.call(convolution).output.tensor.shape[2:]))


def pooled_after(recording: Recording, block: str, grid: Grid) -> tuple[Grid, Grid] | None:
    """Rows and columns of patches and how large one is, if the last convolution's ``grid`` was seen to be pooled."""
    places = places_before(recording, block)
    seen = () if places is None else tuple(places.lattice.shape[1:])
    if places is None or len(seen) != len(grid) or math.prod(seen) >= math.prod(grid):
        return None
    return seen, tuple(abs(int(step)) for step in places.lattice.pitch)


def patch_of(
    found: Mapping[str, nn.Conv2d], recording: Recording, grid: Grid, image_size: tuple[int, int]
) -> tuple[int, int]:
    """Height and width of a patch in pixels: the strides of convolutions that ran one after another.

    Raises:
        UnsupportedModelError: Such patches do not cover the image: the convolutions do not follow each other, or
            something between them has a stride of its own.
    """
    height, width = 1, 1
    for name, convolution in found.items():
        if name in recording.calls:
            height, width = height * convolution.stride[0], width * convolution.stride[1]
    ran = {name: found[name] for name in found if name in recording.calls}
    sides = list(zip(image_size, grid, strict=True))
    exactly = all(_make(ran.values(), pixels, axis) == cells for axis, (pixels, cells) in enumerate(sides))
    fits = [abs(pixels - cells * cell) < cell for (pixels, cells), cell in zip(sides, (height, width), strict=True)]
    if not exactly and not all(fits):
        raise UnsupportedModelError(
            f"the convolutions before the blocks, of strides that make {height} x {width} px, turn {image_size[0]} x "
            f"{image_size[1]} px into {grid[0]} x {grid[1]} tokens; expected them to follow each other, and nothing "
            "with a stride between them"
        )
    return height, width


def _make(found: Iterable[nn.Conv2d], size: int, axis: int) -> int | None:
    """How many cells convolutions make of a size, one after another; ``None`` if they pad by name."""
    for one in found:
        if isinstance(one.padding, str):
            return None
        reach = one.dilation[axis] * (one.kernel_size[axis] - 1) + 1
        size = (size + 2 * one.padding[axis] - reach) // one.stride[axis] + 1
    return size


def around_patches(recording: Recording, tokens: int, patches: int) -> tuple[int, int]:
    """How many tokens stand before the patches and behind them, from how they were joined.

    Raises:
        UnsupportedModelError: It cannot be seen how.
    """
    found = _around(recording.joins, tokens, patches)
    if found is None:
        check_prefix_first(recording, tokens, tokens - patches, seen=True)
        return tokens - patches, 0
    return found


def _around(joins: Sequence[tuple[int, ...]], tokens: int, patches: int) -> tuple[int, int] | None:
    """By the last joining that made so many tokens, and by those that made the largest of its parts."""
    if tokens == patches:
        return 0, 0
    place = next((place for place, parts in reversed(list(enumerate(joins))) if sum(parts) == tokens), None)
    if place is None:
        return None
    parts = joins[place]
    large = [index for index, part in enumerate(parts) if part >= patches]
    inner = _around(joins[:place], parts[large[0]], patches) if len(large) == 1 and len(parts) > 1 else None
    if inner is None:
        return None
    return sum(parts[: large[0]]) + inner[0], inner[1] + sum(parts[large[0] + 1 :])


def check_one_row_an_image(recording: Recording, entrance: str, tokens: Tensor) -> None:
    """Tokens that were cut into windows before a block that attends among all that it is given are in more rows.

    Raises:
        RecordingError: There are not as many rows of tokens as images.
    """
    images = len(recording.call(entrance).input.tensor)
    if len(tokens) != images:
        raise RecordingError(
            f"the first block was given {len(tokens)} rows of {tokens.shape[1]} tokens for {images} images: they were "
            "cut into windows, or put together, before it; expected one row an image, with all of its patches"
        )


def check_prefix_first(recording: Recording, tokens: int, prefix: int, *, seen: bool) -> None:
    """Tokens that are no patches have to be joined before the patches, where the prefix is looked for.

    Args:
        recording: The pass.
        tokens: Number of tokens that the first block was given.
        prefix: How many of them are no patches.
        seen: The joining has to have been seen.

    Raises:
        UnsupportedModelError: They were joined in another order, or it cannot be seen how.
    """
    joined = [parts for parts in recording.joins if sum(parts) == tokens and len(parts) > 1]
    if not prefix or (not joined and not seen):
        return
    if not joined or not _ends_with(joined[-1], tokens - prefix, recording.joins):
        how = f"joined in parts of {', '.join(map(str, joined[-1]))} tokens" if joined else "not joined by torch.cat"
        raise UnsupportedModelError(
            f"the first block saw {tokens} tokens, {tokens - prefix} of them patches, {how}; expected the patches last "
            "and every other token before them. A model with another order needs a topology of its own"
        )


def _ends_with(parts: tuple[int, ...], patches: int, joins: Sequence[tuple[int, ...]]) -> bool:
    """Whether the last of some parts is the patches, or was itself joined of parts with these last."""
    inside = [other for other in joins if sum(other) == parts[-1] and len(other) > 1]
    return parts[-1] == patches or bool(inside and _ends_with(inside[-1], patches, joins))
