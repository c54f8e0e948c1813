"""Stages of windowed blocks with convolutions before and between them, as in GCViT.

Every block cuts its map into windows that do not shift. Its queries may be the window's own tokens or tokens of a
pyramid that is the same for all windows: either way the output of a place is the recorded attention's average of the
window's values, and that is what relevance and evidence follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, quads, windows
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import block_lists, convolutions, names_of, reads_images
from captum_lnstat.topology.anatomy.geometry import pair
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.base import BlockTopology, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block
from captum_lnstat.trace.steps import Step, Transition
from captum_lnstat.trace.trace import Trace


@register_topology
class ConvolvedTopology(BlockTopology):
    """Stages of blocks with windows that do not shift; convolutions make the patches and halve the grid."""

    family = "windows and convolutions"
    expects = (
        f"convolutions that make the patches, two stages or more of blocks with {BLOCK_PARTS} and a window_size, "
        "convolutions between the stages"
    )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return _is_convolved(model) and not any(_is_convolved(inner) for inner in model.modules() if inner is not model)

    @cached_property
    def _names(self) -> dict[int, str]:
        return names_of(self.model)

    @cached_property
    def _stages(self) -> list[list[Any]]:
        return [list(blocks) for blocks in _block_lists(self.model)]

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        return {self._names[id(block)]: block for stage in self._stages for block in stage}

    @cached_property
    def _stem(self) -> list[nn.Conv2d]:
        """The convolutions defined before the first block."""
        order = list(self.model.modules())
        first = order.index(self._stages[0][0])
        return [convolution for convolution in self.convolutions.values() if order.index(convolution) < first]

    @cached_property
    def _last_norm(self) -> dict[str, nn.Module]:
        """The LayerNorm defined after the last block, if there is one."""
        order = list(self.model.modules())
        last = order.index(self._stages[-1][-1])
        after = [(name, norm) for name, norm in self.norms.items() if order.index(norm) > last]
        return dict(after[:1])

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield self._stem[0]
        yield from self._last_norm.values()
        for block in self.blocks.values():
            yield from block_taps(block)

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        steps: list[Step] = []
        grids: list[Grid] = []
        for stage in self._stages:
            for place, block in enumerate(stage):
                name = self._names[id(block)]
                tokens = recording.call(name).input.read()
                if tokens.dim() != 4:
                    raise RecordingError(
                        f"{name!r} was given {tuple(tokens.shape)}; expected (batch, rows, columns, channels)"
                    )
                grid = tokens.shape[1], tokens.shape[2]
                if place == 0:
                    if steps:
                        steps.append(_between(name, steps[-1], grids[-1], grid, recording))
                    grids.append(grid)
                layout = windows(grid, pair(block.window_size), (0, 0), tokens.device)
                steps.append(residual_block(name, block, recording, layout))
        pooling = pooling_as_read(recording, 0, self._last_norm)
        patch = self._patch(grids[0], image_size)
        covers = (
            "attention cannot see through the convolutions before and between the stages: a token's relevance is "
            f"shared evenly by the 2 x 2 tokens under it, and evidence is found in the last of {len(grids)} stages, on "
            f"{grids[-1][0]} x {grids[-1][1]} tokens"
        )
        return Trace(self.family, tuple(steps), steps[0].before, 0, grids[0], patch, pooling, covers=covers)

    def _patch(self, grid: Grid, image_size: tuple[int, int]) -> tuple[int, int]:
        height = width = 1
        for convolution in self._stem:
            height, width = height * convolution.stride[0], width * convolution.stride[1]
        if grid != (-(-image_size[0] // height), -(-image_size[1] // width)):
            raise UnsupportedModelError(
                f"{image_size[0]} x {image_size[1]} px became {grid[0]} x {grid[1]} tokens; expected convolutions with "
                f"strides of {height} x {width} in all to make the one of the other"
            )
        return height, width


def _is_convolved(model: nn.Module) -> bool:
    return reads_images(convolutions(model)) and len(_block_lists(model)) > 1


def _block_lists(model: nn.Module) -> list[Any]:
    return [
        blocks
        for blocks in block_lists(model).values()
        if all(hasattr(block, "window_size") and not hasattr(block, "shift_size") for block in blocks.children())
    ]


def _between(name: str, below: Step, grid: Grid, after: Grid, recording: Recording) -> Transition:
    """From the end of one stage to the first block, ``name``, of the next."""
    if after != ((grid[0] + 1) // 2, (grid[1] + 1) // 2):
        raise UnsupportedModelError(
            f"{grid[0]} x {grid[1]} tokens became {after[0]} x {after[1]} before {name!r}; expected half as many rows "
            "and columns"
        )
    tokens = stream(recording.call(name).input.read())
    return Transition(f"before {name}", quads(grid, tokens.device), below.after, tokens, after)
