"""Models whose attention pools its queries: Hiera and its relatives.

The tokens lie in the order in which pooling takes a token from each quarter of them: where they are on the image
follows from how often that is done, and is checked against the tokens before they were put in this order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, Groups, Layout, WholeImage
from captum_lnstat.recording.eager import named
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import convolutions, grid_of, patch_of, reads_images
from captum_lnstat.topology.anatomy.parts import (
    BLOCK_PARTS,
    BlockParts,
    channels_of,
    is_residual_block,
    layers,
    parts_of,
)
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.projections import is_projection
from captum_lnstat.topology.anatomy.unfolding import cut
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block, with_pooled_queries
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

COVERS = "The grid is that of the first block: the convolution below it reads beyond its patch."


@register_topology
class PooledTopology(BlockTopology):
    """Blocks without anything between them, some of which widen the stream and take the largest of several tokens."""

    family = "pooled"
    expects = f"one convolution that makes the patches, and blocks with {BLOCK_PARTS}, some of which widen the stream"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return innermost(model, _is_pooled)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in named(self.model).items() if is_residual_block(part)}

    @cached_property
    def _others(self) -> dict[str, nn.Module]:
        """Modules outside the blocks: what they were given and returned tells the order of the tokens."""
        inside = {id(part) for block in self.blocks.values() for part in block.modules()}
        around = {id(part) for part in self.model.modules() if any(id(child) in inside for child in part.modules())}
        return {name: part for name, part in named(self.model).items() if id(part) not in around and name}

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from self._others.values()
        for block in self.blocks.values():
            yield from block_taps(block)
            parts = parts_of(block)
            yield getattr(block, parts.norms[0])
            yield from _linears(block).values()

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        first_grid = grid = grid_of(recording, self.entrance)
        steps = list[Block]()
        for name, block in self.blocks.items():
            steps.append(_block(name, block, recording, grid))
            grid = steps[-1].grid or grid
        tokens = steps[0].before
        pools = len({parts_of(block).out.out_features for block in self.blocks.values()}) - 1
        order = _pooling_order(first_grid, pools, tokens.device)
        self._check_order(recording, order, tokens)
        patch = patch_of(self.convolutions, recording, first_grid, image_size)
        pooling = pooling_as_read(recording, 0, self.norms, self.blocks)
        place = order.argsort()
        return Trace(self.family, tuple(steps), tokens, 0, first_grid, patch, pooling, place=place, covers=COVERS)

    def _check_order(self, recording: Recording, order: Tensor, tokens: Tensor) -> None:
        """Some module was given or returned the tokens row by row, before they were put in order."""
        seen = [
            kept.tensor for name in self._others for c in recording.calls.get(name, ()) for kept in (c.input, c.output)
        ]
        rows = [t for t in seen if t.dim() == 3 and t.shape == tokens.shape and t.data_ptr() != tokens.data_ptr()]
        if not any(torch.equal(stream(t.detach())[:, order], tokens) for t in rows):
            raise UnsupportedModelError(
                f"the first block saw {tokens.shape[1]} tokens, and no module was seen to have them in the order of "
                "the image's rows that pooling would have put so; expected them in the order in which they are pooled"
            )


def _block(name: str, block: nn.Module, recording: Recording, grid: Grid) -> Block:
    parts = parts_of(block)
    site = cut(recording.site(f"{name}.{parts.attention}"))
    call = recording.call(name)
    if call.input.tensor.dim() != 3 or call.output.tensor.dim() != 3:
        raise UnsupportedModelError(
            f"{name!r} was given {tuple(call.input.tensor.shape)} and returned {tuple(call.output.tensor.shape)}; "
            "expected (batch, tokens, channels), in the order in which tokens are pooled"
        )
    batch, before, after = len(call.input.tensor), call.input.tensor.shape[1], call.output.tensor.shape[1]
    windows, _, queries, keys = site.shape
    windows //= batch
    if (before, after) != (windows * keys, windows * queries):
        raise RecordingError(
            f"{name!r} makes {after} tokens of {before} by attention from {queries} to {keys} in {windows} windows; "
            "expected every token in one window"
        )
    device = call.input.tensor.device
    layout, others = _every(windows, queries, device), _every(windows, keys, device)
    read = residual_block(name, block, recording, layout, site, pooled=True)
    if read.before.shape == read.after.shape:
        return read
    stride = math.isqrt(before // after)
    if stride * stride * after != before or grid[0] % stride or grid[1] % stride:
        raise UnsupportedModelError(
            f"{name!r} makes {after} tokens of {before} on a grid of {grid[0]} x {grid[1]}; expected it to pool squares"
        )
    under = Groups(torch.arange(before, device=device).reshape(-1, after).T.contiguous(), before)
    shortcut, below = _shortcut(block, parts, before // after), (grid[0] // stride, grid[1] // stride)
    return with_pooled_queries(replace(read, keys=others), shortcut, call.input.read(), under, below, block.training)


def _every(windows: int, members: int, device: torch.device) -> Layout:
    """Windows whose tokens lie as far apart in the sequence as there are windows."""
    if windows == 1:
        return WholeImage()
    return Groups(torch.arange(windows * members, device=device).reshape(members, windows).T.contiguous())


def _shortcut(block: nn.Module, parts: BlockParts, stride: int) -> Callable[[Tensor], Tensor]:
    linears = _linears(block)
    if len(linears) > 1:
        raise UnsupportedModelError(f"a block has Linears {', '.join(linears)} of its own; expected one at most")
    norm: nn.Module = getattr(block, parts.norms[0])
    return partial(_largest, norm, next(iter(linears.values()), None), stride)


def _largest(norm: Any, linear: Any, stride: int, x: Tensor) -> Tensor:
    """What the pooled attention is added to; without a Linear, largest and mean side by side."""
    if linear is not None:
        x = linear(norm(x))
    pooled = x.reshape(len(x), stride, -1, x.shape[-1])
    return pooled.amax(1) if linear is not None else torch.cat([pooled.amax(1), pooled.mean(1)], -1)


def _pooling_order(grid: Grid, pools: int, device: torch.device) -> Tensor:
    """The tokens of a grid, row by row, in an order in which each pooling takes one of each quarter of them.

    Example:
        >>> _pooling_order((2, 4), 1, torch.device("cpu")).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    ids = torch.arange(grid[0] * grid[1], device=device).reshape(1, *grid)
    for _ in range(pools):
        rows, columns = ids.shape[1:]
        if rows % 2 or columns % 2:
            raise UnsupportedModelError(f"a grid of {grid[0]} x {grid[1]} tokens cannot be halved {pools} times")
        ids = ids.reshape(-1, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3).reshape(-1, rows // 2, columns // 2)
    return ids.flatten()


def _linears(block: nn.Module) -> dict[str, nn.Module]:
    """Linears that are children of the block itself."""
    return {name: child for name, child in block.named_children() if is_projection(child)}


def _widens(block: nn.Module) -> bool:
    first, second, *_ = (channels_of(getattr(block, norm)) for norm in parts_of(block).norms)
    return bool(first != second)


def _is_pooled(model: nn.Module) -> bool:
    blocks = [part for part in model.modules() if is_residual_block(part)]
    if not any(map(_widens, blocks)) or any(layers(block, nn.Conv2d) for block in blocks):
        return False
    found = convolutions(model, blocks)
    return len(found) == 1 and reads_images(found)
