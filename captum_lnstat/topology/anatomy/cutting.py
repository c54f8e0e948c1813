"""Patches that a Linear reads: images cut by a rearrangement, not by a convolution.

Nothing of the cutting is a module that could be asked. Where the patches lie is seen from their pixels: the patch of
a token has the pixels of one cell of the image, in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid
from captum_lnstat.recording.eager import named
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import convolutions, outside


def patch_linear(model: nn.Module, lists: Iterable[nn.Module]) -> str | None:
    """The name of the Linear that can read patches: the first outside the blocks, defined before them.

    Where there is a convolution outside the blocks, that makes the patches.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, 2)
        >>> patch_linear(nn.ModuleDict({"embed": nn.Linear(12, 8), "blocks": nn.ModuleList([block])}), [block])
        'embed'
    """
    blocks = list(lists)
    found = outside(model, blocks, nn.Linear)
    if not found or convolutions(model, blocks):
        return None
    order = {id(module): place for place, module in enumerate(model.modules())}
    name, linear = next(iter(found.items()))
    # A list may be put together from blocks that lie elsewhere, and then is no module of the model.
    parts = [order[id(part)] for block in blocks for part in block.modules() if id(part) in order]
    return name if order[id(linear)] < min(parts) else None


def patch_taps(model: nn.Module, linear: str) -> Iterable[nn.Module]:
    """The Linear and every module around it: one of them is given the images."""
    modules, parts = named(model), linear.split(".")
    return [modules[".".join(parts[:end])] for end in range(len(parts) + 1)]


def grid_of_patches(recording: Recording, linear: str, norms: Iterable[str]) -> tuple[Grid, Grid]:
    """Rows and columns of patches, and height and width of one in pixels.

    Args:
        recording: The pass.
        linear: Name of the Linear that reads the patches.
        norms: Names of norms outside the blocks: one may read the patches before the Linear does.

    Raises:
        UnsupportedModelError: What was read is not the images cut into patches, row by row.
    """
    parts = linear.split(".")
    around = [call for end in range(len(parts)) for call in recording.calls.get(".".join(parts[:end]), ())]
    given = [call.input.read() for call in around if call.input.tensor.dim() == 4]
    if not given:
        raise RecordingError(f"no module around {linear!r} was given images; expected (batch, channels, height, width)")
    images, read = given[-1], recording.call(linear).input
    # A norm of the patches stands before the Linear; behind it their pixels cannot be seen.
    known = set(norms)
    cut = [norm.input for norm in recording.norms if norm.module in known and _as_many(norm.input.tensor, images)]
    cut += [read] if _as_many(read.tensor, images) else []
    for kept in cut:
        found = _cells(images, kept.read())
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{linear!r} reads {tuple(read.tensor.shape)} where the image is {tuple(images.shape)}, and that is not the "
        "image cut into patches, row by row, each with the pixels of its cell and no others; expected such patches, or "
        "a convolution that makes them"
    )


def check_others(recording: Recording, linear: str, others: Iterable[str], counts: tuple[int, int], width: int) -> None:
    """No other Linear may make the tokens beside the patches: of what they show of the image there would be no map.

    Args:
        recording: The pass.
        linear: Name of the Linear that reads the patches.
        others: Names of the Linears outside the blocks.
        counts: How many tokens stand before the patches and behind them.
        width: Channels of the stream.

    Raises:
        UnsupportedModelError: One has made as many.
    """
    for name in others:
        for call in recording.calls.get(name, ()) if name != linear else ():
            made = call.output.tensor
            if made.dim() == 3 and made.shape[1] in counts and made.shape[2] == width:
                raise UnsupportedModelError(
                    f"{name!r} made {made.shape[1]} tokens beside the patches of {linear!r}: what they show of the "
                    "image is not on the grid. Expected class, distillation and register tokens there"
                )


def _as_many(patches: Tensor, images: Tensor) -> bool:
    """Whether there are as many numbers in the patches as in the images, and as many patches of each."""
    return patches.dim() in (3, 4) and len(patches) == len(images) and patches.numel() == images.numel()


def _cells(images: Tensor, patches: Tensor) -> tuple[Grid, Grid] | None:
    channels, height, width = images.shape[1:]
    pixels, rest = divmod(patches.shape[-1], channels)
    tokens = patches[0].flatten(0, -2)
    sizes = [(size, pixels // size) for size in range(1, pixels + 1) if not pixels % size]
    sizes = [(h, w) for h, w in sizes if not height % h and not width % w]
    for h, w in () if rest else sorted(sizes, key=lambda size: abs(size[0] - size[1])):
        grid = height // h, width // w
        if patches.dim() == 4 and grid != tuple(patches.shape[1:3]):
            continue
        cells = images[0].reshape(channels, grid[0], h, grid[1], w).permute(1, 3, 0, 2, 4).reshape(len(tokens), -1)
        if _same_pixels(cells, tokens):
            return grid, (h, w)
    return None


def _same_pixels(cells: Tensor, tokens: Tensor) -> bool:
    """Whether every token has the pixels of its cell, in any order: the same extremes, sum and sum of squares."""
    if not torch.equal(torch.stack(cells.aminmax(dim=-1)), torch.stack(tokens.aminmax(dim=-1))):
        return False
    cells, tokens = cells.double(), tokens.double()
    sums = (cells.sum(-1), tokens.sum(-1)), (cells.square().sum(-1), tokens.square().sum(-1))
    return all(bool(torch.isclose(one, other, rtol=1e-9, atol=1e-9).all()) for one, other in sums)
