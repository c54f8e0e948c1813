"""Plain encoders of any library: an embedding with convolutions, one list of residual blocks, a head of any kind.

Nothing is looked up by name. The grid is the shape of what the last convolution of the embedding returned, prefix
tokens are those that the first block sees beyond it, and how the head reads the tokens is seen from its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, Layout, WholeImage, windows
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import (
    LISTS,
    block_lists,
    check_prefix_first,
    convolutions,
    grid_of,
    patch_of,
    reads_images,
)
from captum_lnstat.topology.anatomy.joining import with_new_tokens
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS, has_heads
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block
from captum_lnstat.trace.trace import Trace


@register_topology
class EncoderTopology(BlockTopology):
    """Prefix tokens, then patch tokens row by row, through one list of blocks; attention among all of them."""

    family = "plain"
    expects = f"a convolution that makes the patches and one list of blocks with {BLOCK_PARTS}"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return innermost(model, _holds_encoder)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        ((name, blocks),) = block_lists(self.model).items()
        return {f"{name}.{child}".lstrip("."): block for child, block in blocks.named_children()}

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from self.convolutions.values()
        yield from self.norms.values()
        for block in self.blocks.values():
            yield from block_taps(block)

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        batch = len(recording.call(self.entrance).input.tensor)
        embedding, neck = self._around_blocks(recording)
        grid = grid_of(recording, list(embedding)[-1])
        patch = patch_of(embedding, recording, grid, image_size)
        ran = {name: self.blocks[name] for name in recording.up_to_the_last(list(self.blocks))}
        layouts = {name: _layout(name, block, recording, batch, grid) for name, block in ran.items()}
        blocks = tuple(residual_block(name, block, recording, layouts[name]) for name, block in ran.items())
        tokens = blocks[0].before
        prefix = tokens.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise RecordingError(
                f"the first block saw {tokens.shape[1]} tokens; expected a grid of {grid[0]} x {grid[1]} and prefix "
                "tokens before it. Tokens that were dropped or merged cannot be placed on the image"
            )
        check_prefix_first(recording, tokens.shape[1], prefix, seen=True)
        steps, covers = with_new_tokens(blocks, recording, grid)
        at_head = steps[-1].after.shape[1] - grid[0] * grid[1]
        pooling = pooling_as_read(recording, at_head, self.norms, self.blocks, neck=bool(neck))
        return Trace(self.family, steps, tokens, prefix, grid, patch, pooling, covers=covers)

    def _around_blocks(self, recording: Recording) -> tuple[dict[str, nn.Conv2d], dict[str, nn.Conv2d]]:
        """The convolutions that ran before the first block, and those that ran after the last."""
        order = list(recording.calls)
        names = recording.up_to_the_last(list(self.blocks))
        first, last = order.index(names[0]), order.index(names[-1])
        ran = [(order.index(name), name) for name in self.convolutions if name in recording.calls]
        before, after = ([name for place, name in ran if place < first], [name for place, name in ran if place > last])
        if not before or len(before) + len(after) < len(ran):
            raise UnsupportedModelError(
                f"of the convolutions {', '.join(name for _, name in ran)} some ran between the blocks, or none before "
                "them; expected an embedding of convolutions, the blocks, and a head"
            )
        return {name: self.convolutions[name] for name in before}, {name: self.convolutions[name] for name in after}


def _layout(name: str, block: nn.Module, recording: Recording, batch: int, grid: Grid) -> Layout:
    """All tokens, or, where a block takes the map of tokens and has a window size, windows padded right and below."""
    tokens = recording.call(name).input.tensor
    window, shift = getattr(block, "window_size", 0), getattr(block, "shift_size", 0)
    if tokens.dim() == 3 and len(tokens) == batch:
        return WholeImage()
    if tokens.shape[:-1] == (batch, *grid) and isinstance(window, int) and shift == 0:
        return windows(grid, (window, window), (0, 0), tokens.device) if window else WholeImage()
    raise UnsupportedModelError(
        f"{name!r} was given {tuple(tokens.shape)} with window_size {window!r} and shift_size {shift!r}; expected "
        f"({batch}, tokens, channels), or {(batch, *grid)} and channels with windows that are not shifted"
    )


def _holds_encoder(model: nn.Module) -> bool:
    lists = block_lists(model)
    if len(lists) != 1 or not reads_images(convolutions(model, lists.values())):
        return False
    # Attention in layers of another build, as XCiT's among the channels: more than this family knows of.
    inside = {id(part) for blocks in lists.values() for part in blocks.modules()}
    others = [part for part in model.modules() if id(part) not in inside and isinstance(part, LISTS) and len(part) > 0]
    return not any(all(map(has_heads, layers)) and inside.isdisjoint(map(id, layers.modules())) for layers in others)
