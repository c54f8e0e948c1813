"""Blocks whose attention pools queries, keys and values, each to its own grid: MViT v2 and its relatives.

What a query adds to itself, where the pooled queries are added to the attention's output, counts with the MLP: it is
put on the token after the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.layout import PADDING, Cells, Grid, Groups, WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import grid_of
from captum_lnstat.topology.anatomy.parts import find_parts
from captum_lnstat.topology.anatomy.projections import is_projection
from captum_lnstat.topology.anatomy.units import Stream
from captum_lnstat.topology.readers.base import PartsReader, under
from captum_lnstat.topology.residual import residual_block, with_pooled_queries
from captum_lnstat.trace.steps import Block, Update


class MultiscaleReader(PartsReader):
    """An attention with one pooling each for queries, keys and values, and a shortcut that pools where they do."""

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        parts = find_parts(module)
        return parts is not None and len(_poolings(getattr(module, parts.attention))) == 3

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.poolings = _poolings(self.attention)
        self.pooled_shortcut = next((c for c in block.children() if isinstance(c, nn.MaxPool2d | nn.AvgPool2d)), None)
        self.widened = next((c for c in block.children() if is_projection(c)), None)

    def taps(self) -> Iterator[nn.Module]:
        yield from super().taps()
        yield from self.poolings.values()
        yield from (part for part in self.attention.children() if isinstance(part, nn.LayerNorm))

    def _grid_of(self, index: int, name: str, recording: Recording) -> Grid:
        pooling = f"{name}.{self.parts.attention}.{list(self.poolings)[index]}"
        return grid_of(recording, pooling)

    def grid_after(self, name: str, recording: Recording, grid: Grid) -> Grid:
        return self._grid_of(0, name, recording)

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        site = recording.site(f"{name}.{self.parts.attention}")
        read = residual_block(name, self.block, recording, WholeImage(), site, joined_norm=False, pooled=True)
        own = self._own(name, recording)
        if own is not None:
            read = replace(read, between=read.between - own)
        if read.after.shape[-1] != self.width:
            raise UnsupportedModelError(
                f"{name!r} widens its stream at the MLP, from {self.width} channels to {read.after.shape[-1]}; "
                "expected it to do so at the attention (expand_attn=True)"
            )
        poolings = list(self.poolings.values())
        grid, keys = self._grid_of(0, name, recording), self._grid_of(2, name, recording)
        device = before.tokens.device
        over = Cells(_with_prefix(under(poolings[2], before.grid, keys, device), before.prefix))
        read = replace(read, keys=over)
        if grid == before.grid and self.widened is None:
            return [read]
        given = recording.call(name).input.read()
        below = _with_prefix(under(poolings[0], before.grid, grid, device), before.prefix)
        return [with_pooled_queries(read, self._shortcut(before), given, below, grid, self.block.training)]

    def _own(self, name: str, recording: Recording) -> Tensor | None:
        """What the pooled queries add to the attention's output, behind the Linear: ``W q``."""
        if not getattr(self.attention, "residual_pooling", False):
            return None
        norms = [n for n, part in self.attention.named_children() if isinstance(part, nn.LayerNorm)]
        if len(norms) != 3:
            raise UnsupportedModelError(
                f"{name!r} adds its pooled queries to the attention's output, and has {len(norms)} norms for queries, "
                "keys and values; expected three"
            )
        queries = recording.call(f"{name}.{self.parts.attention}.{norms[0]}").output.read()
        joined = stream(queries.transpose(1, 2).flatten(2))
        weight = self.parts.out.map(f"{name}.{self.parts.attention}", queries).weight
        return joined @ weight.detach().to(joined.dtype).T

    def _shortcut(self, before: Stream) -> Callable[[Tensor], Tensor]:
        norm: nn.Module = getattr(self.block, self.parts.norms[0])
        return partial(_shortcut, norm, self.widened, self.pooled_shortcut, before.prefix, before.grid)


def _shortcut(norm: Any, widened: Any, pooled: Any, prefix: int, grid: Grid, x: Tensor) -> Tensor:
    """What the attention's update is added to."""
    if widened is not None:
        x = widened(norm(x))
    if pooled is None:
        return x
    patches = x[:, prefix:].reshape(len(x), *grid, -1).movedim(-1, 1)
    return torch.cat([x[:, :prefix], pooled(patches).flatten(2).transpose(1, 2)], 1)


def _poolings(attention: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    return {name: part for name, part in attention.named_children() if isinstance(part, kinds)}


def _with_prefix(groups: Groups, prefix: int) -> Groups:
    """The same groups behind prefix tokens that stay what they are."""
    if not prefix:
        return groups
    own = groups.index.new_full((prefix, groups.index.shape[1]), PADDING)
    own[:, 0] = torch.arange(prefix, device=own.device)
    behind = torch.where(groups.index == PADDING, PADDING, groups.index + prefix)
    return Groups(torch.cat([own, behind]), groups.count + prefix)
