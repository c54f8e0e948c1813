"""What a topology makes of a recording: the blocks and mergings from the image to the head, ready for the rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from captum_lnstat.frozen import FrozenMap
from captum_lnstat.fusion import HeadFusion, fuse
from captum_lnstat.layout import Groups, Layout
from captum_lnstat.sites import AttentionSite
from captum_lnstat.statistics import accumulation_dtype

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Block:
    """One transformer block: ``x' = x + attention update``, ``x'' = x' + mlp update``.

    Attributes:
        name: Dotted name of the block.
        site: Its attention.
        layout: How the stream's tokens become the site's queries and keys.
        before: ``x``, the residual stream before the block.
        attention_update: What the attention added to each token.
        mlp_update: What the MLP added to each token.
        path: The affine maps from the site's output, heads joined, to the attention update.
    """

    name: str
    site: AttentionSite
    layout: Layout
    before: Float[Tensor, "batch token channel"]
    attention_update: Float[Tensor, "batch token channel"]
    mlp_update: Float[Tensor, "batch token channel"]
    path: tuple[FrozenMap, ...]


@dataclass(frozen=True)
class Merging:
    """A patch merging: the children of each parent are joined along the channels and mapped to it.

    Attributes:
        name: Dotted name of the merging.
        groups: The children of each parent; padding where the grid was odd.
        children: The residual stream before the merging.
        path: The affine maps from the joined children to the parent.
        norm_first: True if the LayerNorm reads the joined children, False if it reads the parent.
        reduction: Weight of the linear map, ``(parent channels, joined channels)``.
    """

    name: str
    groups: Groups
    children: Float[Tensor, "batch child channel"]
    path: tuple[FrozenMap, ...]
    norm_first: bool
    reduction: Float[Tensor, "out in"]


class Pooling(Protocol):
    """How the head reads the tokens, whatever the class: where perception starts."""

    @property
    def name(self) -> str:
        """Shown by ``describe``."""
        ...

    def start(self, batch: int, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """Weights of the tokens, summing to one."""
        ...


@dataclass(frozen=True)
class FixedPooling:
    """Fixed weights: the class token, several prefix tokens, or the mean over the patches."""

    name: str
    weights: Float[Tensor, " token"]

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        return self.weights.expand(batch, -1)


@dataclass(frozen=True)
class AttentionPooling:
    """A latent query attends to the tokens: its head-fused attention. ``skipped`` leading tokens are not read."""

    name: str
    site: AttentionSite
    skipped: int

    def start(self, batch: int, fusion: HeadFusion) -> Tensor:
        attention = fuse(self.site, fusion).mean(1)
        attention = attention / attention.sum(-1, keepdim=True)
        return attention if not self.skipped else _prepend_zeros(attention, self.skipped)


def _prepend_zeros(rows: Tensor, count: int) -> Tensor:
    padded = rows.new_zeros(len(rows), count + rows.shape[1])
    padded[:, count:] = rows
    return padded


@dataclass(frozen=True)
class Trace:
    """The way of one forward pass from the patch tokens to the head.

    Attributes:
        family: What the model was recognised as.
        steps: Blocks and mergings, from the image to the head.
        tokens: The residual stream before the first step.
        prefix: Number of prefix tokens; the patch tokens follow, row by row.
        grid: Rows and columns of patch tokens before the first step.
        patch: Height and width of a patch in pixels.
        pooling: How the head reads the tokens.
        training: The model was in train mode, so that dropout may stand between what was recorded and what came of it.
    """

    family: str
    steps: tuple[Block | Merging, ...]
    tokens: Float[Tensor, "batch token channel"]
    prefix: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    pooling: Pooling
    training: bool = False

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks alone, first to last."""
        return tuple(step for step in self.steps if isinstance(step, Block))

    def above(self, block: Block, *, into: bool) -> Trace:
        """The way from ``block`` to the head, as if its tokens were the patch tokens of the image.

        Args:
            block: One of ``blocks``.
            into: Begin with the block, at its input. False begins after it, at its output.
        """
        index = next(i for i, step in enumerate(self.steps) if step is block)
        grid = self.grid
        for step in self.steps[:index]:
            if isinstance(step, Merging):
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        after = block.before + block.attention_update + block.mlp_update
        steps, tokens = (self.steps[index:], block.before) if into else (self.steps[index + 1 :], after)
        return replace(self, steps=steps, tokens=tokens, grid=grid)

    def start(self, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """The row vector with which class-agnostic relevance starts at the head."""
        weights = self.pooling.start(len(self.tokens), fusion)
        return weights.to(accumulation_dtype(self.tokens))
