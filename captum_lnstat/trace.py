"""What a topology makes of a recording: the blocks and mergings from the image to the head, ready for the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Union

import torch
from torch import Tensor

from captum_lnstat.covector import Covector
from captum_lnstat.frozen import FrozenMap
from captum_lnstat.fusion import HeadFusion, fuse
from captum_lnstat.layout import Groups, Layout
from captum_lnstat.sites import AttentionSite
from captum_lnstat.statistics import (
    ResidualShare,
    TokenStatistics,
    accumulation_dtype,
    ratio_share,
    residual_share,
    token_statistics,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from captum_lnstat.recording import NormCall


@dataclass(frozen=True)
class Block:
    """One transformer block: ``between = x + attention update``, ``after = between + mlp update``.

    Attributes:
        name: Dotted name of the block.
        site: Its attention.
        layout: How the tokens of ``between`` become the site's queries.
        before: ``x``, the residual stream before the block.
        between: The stream with the attention's update; what the MLP's norm reads, if it comes first.
        after: The stream with the MLP's update; ``between`` itself if no MLP follows.
        path: The affine maps from the site's output, heads joined, to the attention update.
        keys: How the tokens of ``before`` became the site's keys, if not as the queries.
        skip: For an attention that pools its queries: the tokens of ``before`` under each token after it.
        carried: For such a block: what of ``before`` the update is added to, after the pooling.
        grid: For such a block: rows and columns of tokens after it.
        norms: The calls of the LayerNorms that read ``base`` and ``between``, if they did; their statistics are known.
        pull: For such a block: from the covector of ``carried`` to that of ``before``, as in a ``Transition``.
        post_norm: The update was normalised before it was added, and no LayerNorm reads the stream.
    """

    name: str
    site: AttentionSite
    layout: Layout
    before: Float[Tensor, "batch token channel"]
    between: Float[Tensor, "batch query_token out_channel"]
    after: Float[Tensor, "batch query_token out_channel"]
    path: tuple[FrozenMap, ...]
    keys: Layout | None = None
    skip: Groups | None = None
    carried: Float[Tensor, "batch query_token out_channel"] | None = None
    grid: tuple[int, int] | None = None
    norms: tuple[NormCall, NormCall] | None = None
    pull: Callable[[Covector], tuple[Covector, Tensor]] | None = None
    post_norm: bool = False

    @property
    def base(self) -> Float[Tensor, "batch query_token out_channel"]:
        """What the attention's update is added to."""
        return self.before if self.carried is None else self.carried

    @property
    def attention_update(self) -> Float[Tensor, "batch query_token out_channel"]:
        """What the attention added to each token."""
        return self.between - self.base

    @property
    def mlp_update(self) -> Float[Tensor, "batch query_token out_channel"]:
        """What the MLP added to each token."""
        return self.after - self.between

    @cached_property
    def statistics(self) -> tuple[TokenStatistics, TokenStatistics]:
        """Of every token before and after the attention's update: what the block's two LayerNorms read."""
        first, second = self.norms or (None, None)
        return _statistics(self.base, first), _statistics(self.between, second)

    def residual_share(self, form: ResidualShare) -> Float[Tensor, "batch query_token"]:
        """Share of each token after the attention that is the token before it; 1 where it takes no part.

        ``"ratio"`` is a ratio of what two LayerNorms read. In a post-norm block they do not read the stream: the
        update was given its variance by the norm, and ``var(x) / (var(x) + var(d))`` is what the statistics say.
        """
        if form == "half":
            share = self.base.new_full(self.base.shape[:2], 0.5)
        elif form == "ratio" and not self.post_norm:
            own, joined = self.statistics
            share = ratio_share(own.variance, joined.variance)
        else:
            share = residual_share(self.base, self.attention_update, "update" if form == "ratio" else form)
        covered = self.layout.covered
        return share if covered is None else torch.where(covered, share, 1.0)


def _statistics(tokens: Tensor, norm: NormCall | None) -> TokenStatistics:
    """Those of the LayerNorm if it read just these tokens, else computed."""
    if norm is not None and norm.input.tensor.data_ptr() == tokens.data_ptr():
        known = norm.statistics.flat()
        if known.variance.shape == tokens.shape[:2]:
            return known
    return token_statistics(tokens)


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
        after: The residual stream after the merging.
    """

    name: str
    groups: Groups
    children: Float[Tensor, "batch child channel"]
    path: tuple[FrozenMap, ...]
    norm_first: bool
    reduction: Float[Tensor, "out in"]
    after: Float[Tensor, "batch parent out"]

    @property
    def before(self) -> Float[Tensor, "batch child channel"]:
        """The stream before the merging."""
        return self.children


@dataclass(frozen=True)
class Update:
    """Something added to each token in place: an MLP of its own, a positional or depthwise convolution.

    Evidence: ``<u, after - before>`` is put on the token. Relevance stays where it is.

    Attributes:
        name: Dotted name of the module.
        before: The residual stream before it.
        after: The residual stream after it.
    """

    name: str
    before: Float[Tensor, "batch token channel"]
    after: Float[Tensor, "batch token channel"]


@dataclass(frozen=True)
class Transition:
    """A change of the tokens that is no attention: a convolutional stage, a pooling, tokens put in another order.

    A token's relevance is shared evenly among the tokens that lie under it. Where ``pull`` is not known, the evidence
    ``<u, after>`` is put on the tokens after it, and what was said below is not told apart.

    Attributes:
        name: Dotted name of the module.
        groups: The tokens before it under each token after it. A token with none (a class token that joins here)
            gives its relevance to padding.
        before: The residual stream before it.
        after: The residual stream after it.
        grid: Rows and columns of patch tokens after it.
        pull: From the covector after it to the covector before it and the constant, ``(batch, score)``, if it is
            affine.
    """

    name: str
    groups: Groups
    before: Float[Tensor, "batch token channel"]
    after: Float[Tensor, "batch token_after out_channel"]
    grid: tuple[int, int]
    pull: Callable[[Covector], tuple[Covector, Tensor]] | None = None


# Every rule there is.
RULES = ("lnstat", "evidence", "rollout", "gradient")

Step = Union[Block, Merging, Update, Transition]


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
    """Fixed weights: the class token, several prefix tokens, or the mean over the patches.

    Attributes:
        name: Shown by ``describe``.
        weights: The weight of every token, with a sum of one.
        seen: They were read off the gradient of the head, not off the structure of the model.
    """

    name: str
    weights: Float[Tensor, " token"]
    seen: bool = False

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
        place: Which patch token is at each place of the grid, row by row, if they are not in that order.
        covers: What the map leaves out, in words: stages that attention cannot see through.
        rules: The rules that are defined for the model.
    """

    family: str
    steps: tuple[Step, ...]
    tokens: Float[Tensor, "batch token channel"]
    prefix: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    pooling: Pooling
    training: bool = False
    place: Int[Tensor, " patch"] | None = None
    covers: str = ""
    rules: tuple[str, ...] = RULES

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
        first = index if into else index + 1
        grid = self._grid_after(first)
        tokens = block.before if into else block.after
        return replace(self, steps=self.steps[first:], tokens=tokens, grid=grid, place=None)

    @property
    def grain(self) -> tuple[float, float]:
        """Height and width of a patch token at the head, in patches of the grid: 1 where no stage is coarser."""
        last = self._grid_after(len(self.steps))
        return self.grid[0] / last[0], self.grid[1] / last[1]

    def _grid_after(self, count: int) -> tuple[int, int]:
        """Rows and columns of patch tokens after the first ``count`` steps."""
        grid = self.grid
        for step in self.steps[:count]:
            if isinstance(step, Merging):
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            elif not isinstance(step, Update) and step.grid is not None:
                grid = step.grid
        return grid

    def start(self, fusion: HeadFusion) -> Float[Tensor, "batch token"]:
        """The row vector with which class-agnostic relevance starts at the head."""
        weights = self.pooling.start(len(self.tokens), fusion)
        return weights.to(accumulation_dtype(self.tokens))
