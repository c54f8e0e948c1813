"""How the tokens of the residual stream are laid out in the groups that a block works on: all of them, or windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

# Rows and columns of tokens; of a video frames, rows and columns.
Grid = tuple[int, ...]
PADDING = -1
# So many layouts are remembered.
LAYOUTS = 64


class Layout(Protocol):
    """A way from the tokens of an image to groups and back; groups are counted in the batch, image by image."""

    @property
    def covered(self) -> Bool[Tensor, " token"] | None:
        """Which tokens are in a group; ``None`` if all are."""
        ...

    def gather(self, tokens: Float[Tensor, "batch token rest"]) -> Float[Tensor, "batch_groups member rest"]:
        """Tokens to groups; a padded place gets zeros."""
        ...

    def join(self, groups: Float[Tensor, "batch_groups member rest"], batch: int) -> Float[Tensor, "batch token rest"]:
        """Groups to tokens; what lies on padded places is left out."""
        ...

    def scatter(
        self, groups: Float[Tensor, "batch_groups member rest"], batch: int
    ) -> tuple[Float[Tensor, "batch token rest"], Float[Tensor, "batch rest"]]:
        """Groups to tokens, and, per image, the sum of what lay on padded places."""
        ...


@dataclass(frozen=True)
class WholeImage:
    """Every token is in the one group of its image."""

    covered = None

    def gather(self, tokens: Tensor) -> Tensor:
        return tokens

    def join(self, groups: Tensor, batch: int) -> Tensor:
        return groups

    def scatter(self, groups: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        return groups, groups.new_zeros(batch, groups.shape[-1])


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of equal size; ``index[group, member]`` is a token, or ``PADDING``.

    A token may be in several groups, or in none. What is scattered to a token from several places adds up.

    Attributes:
        index: The tokens of each group.
        tokens: How many tokens there are, those in no group included; as many as the index names by default.
    """

    index: Int[Tensor, "group member"]
    tokens: int | None = None

    @cached_property
    def count(self) -> int:
        """How many tokens there are."""
        return int(self.index.max()) + 1 if self.tokens is None else self.tokens

    @property
    def padded(self) -> bool:
        """Whether any place is padding."""
        return len(self._padded_places) > 0

    @cached_property
    def _places(self) -> Int[Tensor, " place"]:
        return torch.nonzero(self.index.flatten() != PADDING)[:, 0]

    @cached_property
    def _padded_places(self) -> Int[Tensor, " place"]:
        return torch.nonzero(self.index.flatten() == PADDING)[:, 0]

    def real(self, dtype: torch.dtype) -> Float[Tensor, "group member"]:
        """One at every place that holds a token, zero at padding."""
        return self._real if dtype == torch.float32 else self._real.to(dtype)

    @cached_property
    def _real(self) -> Float[Tensor, "group member"]:
        return (self.index != PADDING).float()

    @cached_property
    def places(self) -> Int[Tensor, " place"]:
        """The token of every place, group by group; some token where there is none."""
        return self.index.flatten().clamp(min=0)

    @cached_property
    def _tokens_of_places(self) -> Int[Tensor, " place"]:
        return self.index.flatten()[self._places]

    @cached_property
    def place_of_token(self) -> Int[Tensor, " token"] | None:
        """The place of every token, if each has exactly one."""
        order = self._tokens_of_places.argsort()
        every = torch.arange(self.count, device=self.index.device)
        return self._places[order] if torch.equal(self._tokens_of_places[order], every) else None

    @cached_property
    def covered(self) -> Bool[Tensor, " token"] | None:
        found = torch.zeros(self.count, dtype=torch.bool, device=self.index.device)
        found[self._tokens_of_places] = True
        return None if bool(found.all()) else found

    def gather(self, tokens: Tensor) -> Tensor:
        # Several times faster than to index with the groups themselves.
        flat = tokens.index_select(1, self.places)
        if self.padded:
            flat = flat.index_fill(1, self._padded_places, 0)
        return flat.reshape(-1, self.index.shape[1], *tokens.shape[2:])

    def join(self, groups: Tensor, batch: int) -> Tensor:
        flat = groups.reshape(batch, self.index.numel(), groups.shape[-1])
        if self.place_of_token is not None:
            return flat.index_select(1, self.place_of_token)
        tokens = flat.new_zeros(batch, self.count, flat.shape[-1])
        return tokens.index_add_(1, self._tokens_of_places, flat[:, self._places])

    def scatter(self, groups: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        flat = groups.reshape(batch, self.index.numel(), groups.shape[-1])
        return self.join(groups, batch), flat[:, self._padded_places].sum(1)


@dataclass(frozen=True)
class Cells:
    """Keys that each stand for several tokens, in one group an image: a key's relevance is shared among its tokens.

    The layout of keys that were made of the tokens by pooling or a strided convolution.

    Attributes:
        groups: The tokens under each key, ``(key, token)``; a key without any gives its relevance to padding.
    """

    groups: Groups

    @property
    def covered(self) -> Bool[Tensor, " token"] | None:
        return self.groups.covered

    def gather(self, tokens: Tensor) -> Tensor:
        """Not defined: a key is not made of its tokens alone."""
        raise NotImplementedError("keys that stand for several tokens are read by scatter only")

    def join(self, groups: Tensor, batch: int) -> Tensor:
        return self.scatter(groups, batch)[0]

    def scatter(self, groups: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        shares = even_shares(self.groups, groups.dtype)
        return self.groups.scatter((groups[:, :, None] * shares[..., None]).flatten(0, 1), batch)


def padded(layouts: Sequence[Layout]) -> bool:
    """Whether any place of some layouts is padding."""
    return any(isinstance(one, Groups) and one.padded for one in layouts)


def real_places(layouts: Sequence[Layout]) -> Bool[Tensor, "layout group member"]:
    """Which places of some groups, as many of as many members, hold a token."""
    return torch.stack([one.index != PADDING for one in layouts if isinstance(one, Groups)])


def gather_stacked(
    layouts: Sequence[Layout], tokens: Float[Tensor, "block batch token rest"]
) -> Float[Tensor, "block batch_groups member rest"]:
    """``gather`` of several layouts with as many groups and members, each for its block.

    Example:
        >>> shifted, plain = windows((2, 2), (1, 2), (1, 0)), windows((2, 2), (1, 2), (0, 0))
        >>> tokens = torch.arange(4.0).expand(2, 1, 4)[..., None]
        >>> gather_stacked([shifted, plain], tokens).flatten(2).tolist()
        [[[2.0, 3.0], [0.0, 1.0]], [[0.0, 1.0], [2.0, 3.0]]]
    """
    groups = [layout for layout in layouts if isinstance(layout, Groups)]
    if not groups:
        return tokens
    if all(one is groups[0] for one in groups):
        flat = tokens.index_select(2, groups[0].places)
    else:
        index = _places_of(tuple(groups))[:, None, :, None]
        flat = tokens.gather(2, index.expand(-1, tokens.shape[1], -1, tokens.shape[3]))
    if padded(groups):
        flat = flat * real_places(groups).flatten(1)[:, None, :, None]
    return flat.reshape(len(groups), -1, groups[0].index.shape[1], tokens.shape[3])


@lru_cache(LAYOUTS)
@torch.inference_mode(False)
def _places_of(groups: tuple[Groups, ...]) -> Int[Tensor, "layout place"]:
    return torch.stack([one.places for one in groups])


def even_shares(groups: Groups, dtype: torch.dtype = torch.float32) -> Float[Tensor, "group member"]:
    """The same share for every member of a group; padding gets none, but in a group of nothing else."""
    real = groups.index != PADDING
    real = torch.where(real.any(-1, keepdim=True), real, True)
    return real.to(dtype) / real.sum(-1, keepdim=True)


# The same for every image of a size, and of every block with the same windows.
@lru_cache(LAYOUTS)
@torch.inference_mode(False)
def windows(
    grid: Grid,
    window: Grid,
    shift: Grid,
    device: torch.device | None = None,
    *,
    pad_first: bool = False,
) -> Groups:
    """The windows of a shifted-window attention: roll by ``-shift``, pad right and below, cut into windows.

    Args:
        grid: Rows and columns of tokens, or frames, rows and columns.
        window: Those of a window.
        shift: Those of the cyclic shift.
        device: Where the index lives.
        pad_first: Pad, then roll: the padding moves with the tokens.

    Example:
        >>> windows((2, 3), (2, 2), (0, 1)).index.tolist()
        [[1, 2, 4, 5], [0, -1, 3, -1]]
        >>> windows((2, 3), (2, 2), (0, 1), pad_first=True).index.tolist()
        [[1, 2, 4, 5], [-1, 0, -1, 3]]
    """
    axes = range(len(grid))
    ids = torch.arange(math.prod(grid), device=device).reshape(grid)
    padding = [end for axis in reversed(axes) for end in (0, -grid[axis] % window[axis])]
    if pad_first:
        ids = F.pad(ids, padding, value=PADDING)
    ids = ids.roll([-step for step in shift], dims=tuple(axes))
    if not pad_first:
        ids = F.pad(ids, padding, value=PADDING)
    # Every axis becomes two: which window, which place in it.
    ids = ids.reshape([size for axis in axes for size in (ids.shape[axis] // window[axis], window[axis])])
    ids = ids.permute(*(2 * axis for axis in axes), *(2 * axis + 1 for axis in axes))
    return Groups(ids.reshape(-1, math.prod(window)))


# As windows: the same for every image of a size.
@lru_cache(LAYOUTS)
@torch.inference_mode(False)
def quads(grid: Grid, device: torch.device | None = None) -> Groups:
    """The 2 x 2 children of every merged token, in the order a patch merging joins them: down first, then right.

    Those of a video are of one frame.

    Example:
        >>> quads((2, 3)).index.tolist()
        [[0, 3, 1, 4], [2, 5, -1, -1]]
    """
    ids = torch.arange(math.prod(grid), device=device).reshape(grid)
    ids = F.pad(ids, (0, grid[-1] % 2, 0, grid[-2] % 2), value=PADDING)
    rows, columns = ids.shape[-2] // 2, ids.shape[-1] // 2
    ids = ids.reshape(-1, rows, 2, columns, 2).permute(0, 1, 3, 4, 2)
    return Groups(ids.reshape(-1, 4))
