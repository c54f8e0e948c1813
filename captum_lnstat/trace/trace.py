"""What a topology makes of a recording: the blocks and mergings from the image to the head, ready for the rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_lnstat.layout import Grid, Groups
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.statistics import accumulation_dtype
from captum_lnstat.trace.pooling import Pooling
from captum_lnstat.trace.steps import Block, Step

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True)
class Trace:
    """The way of one forward pass from the patch tokens to the head.

    Attributes:
        family: What the model was recognised as.
        steps: Blocks and mergings, from the image to the head.
        tokens: The residual stream before the first step.
        prefix: Number of prefix tokens; the patch tokens follow, row by row.
        grid: Rows and columns of patch tokens before the first step; of a video frames, rows and columns.
        patch: Height and width of a patch in pixels; of a video frames, height and width.
        pooling: How the head reads the tokens.
        training: The model was in train mode, so that dropout may stand between what was recorded and what came of it.
        origin: Where the first patch begins, in pixels, if not where the image does; outside it if that is padded.
        place: Which patch token is at each place of the grid, row by row, if they are not in that order; for all images
            or for each.
        covers: What the map leaves out, in words: stages that attention cannot see through.
        gradients: Every attention has an output that a gradient can be taken at.
        blocks_below: How many blocks of the model lie before the first step.
        channel_axis: Which axis of the images has their channels; the others are those of the grid.
        suffix: Number of tokens behind the patch tokens, which count as prefix tokens in what is returned.
        tokens_first: The blocks themselves have their tokens before the batch.
    """

    family: str
    steps: tuple[Step, ...]
    tokens: Float[Tensor, "batch token channel"]
    prefix: int
    grid: Grid
    patch: tuple[int, ...]
    pooling: Pooling
    training: bool = False
    origin: tuple[float, ...] = ()
    place: Int[Tensor, " patch"] | Int[Tensor, "batch patch"] | None = None
    covers: str = ""
    gradients: bool = True
    blocks_below: int = 0
    channel_axis: int = 1
    suffix: int = 0
    tokens_first: bool = False

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks alone, first to last."""
        return tuple(step for step in self.steps if isinstance(step, Block))

    @property
    def end(self) -> Float[Tensor, "batch token channel"]:
        """The residual stream after the last step, where the head begins."""
        return self.steps[-1].after

    def above(self, block: Block, *, into: bool) -> Trace:
        """The way from ``block`` to the head, as if its tokens were the patch tokens of the image.

        Args:
            block: One of ``blocks``.
            into: Begin with the block, at its input. False begins after it, at its output.
        """
        first = self._place_of(block) + (0 if into else 1)
        grid = self._grid_after(first)
        if not into and block.after is block.between:
            # Behind a norm that the stream goes through, the rest of the block is steps of their own.
            while first < len(self.steps) and self.steps[first].name.startswith(f"{block.name}."):
                first += 1
        tokens = block.before if into else self.steps[first - 1].after
        skipped = sum(isinstance(step, Block) for step in self.steps[:first])
        below = self.blocks_below + skipped
        prefix = tokens.shape[1] - math.prod(grid) - self.suffix  # prompts may have come or gone
        return replace(
            self, steps=self.steps[first:], tokens=tokens, prefix=prefix, grid=grid, place=None, blocks_below=below
        )

    @property
    def one_grid(self) -> bool:
        """Whether all blocks see the same grid."""
        return self._grid_after(len(self.steps)) == self.grid

    def _grid_after(self, count: int) -> Grid:
        """Rows and columns of patch tokens after the first ``count`` steps."""
        grid = self.grid
        for step in self.steps[:count]:
            grid = step.grid_after(grid)
        return grid

    def _place_of(self, block: Block) -> int:
        return next(place for place, step in enumerate(self.steps) if step is block)

    def below(self, block: Block | None = None) -> list[Groups]:
        """From ``block``, or from the head, to the image: the tokens under each token, wherever they become fewer."""
        steps = self.steps if block is None else self.steps[: self._place_of(block)]
        return [step.below for step in reversed(steps) if step.below is not None]

    def patches(self, tokens: Float[Tensor, "batch token *rest"]) -> slice:
        """Which of some tokens are the patches before the first step."""
        end = tokens.shape[1] - self.suffix
        return slice(end - math.prod(self.grid), end)

    def on_grid(self, values: Float[Tensor, "batch token *rest"]) -> Float[Tensor, "batch *grid *rest"]:
        """Values of the tokens before the first step at their places on the grid; prefix tokens, if any, left out."""
        patches = values[:, self.patches(values)]
        if self.place is not None and self.place.dim() == 1:
            patches = patches[:, self.place]
        elif self.place is not None:
            patches = patches[torch.arange(len(patches), device=patches.device)[:, None], self.place]
        return patches.reshape(len(patches), *self.grid, *patches.shape[2:])

    def off_grid(self, values: Float[Tensor, "batch token *rest"]) -> Float[Tensor, "batch other *rest"]:
        """Values of the prefix tokens, and of those behind the patches."""
        before = values[:, : self.prefix]
        return torch.cat([before, values[:, values.shape[1] - self.suffix :]], 1) if self.suffix else before

    def start(self, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """The row vector with which class-agnostic relevance starts at the head."""
        weights = self.pooling.start(len(self.tokens), fusion)
        return weights.to(accumulation_dtype(self.tokens))
