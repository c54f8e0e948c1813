"""Attention blocks of hierarchical models: two norms, an attention and an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.layout import Cells, Grid, Groups, Layout, WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import AttentionSite, FusedSite, SoftmaxSite
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.geometry import adaptive_cells, channels_first, channels_last, partition, squares
from captum_lnstat.topology.anatomy.parts import find_parts, layers
from captum_lnstat.topology.anatomy.unfolding import cut
from captum_lnstat.topology.anatomy.units import Stream
from captum_lnstat.topology.readers.base import SPATIAL, PartsReader, Reader, under
from captum_lnstat.topology.readers.cascaded import CascadedReader
from captum_lnstat.topology.readers.maps import LocalReader, MapReader, SequentialReader
from captum_lnstat.topology.readers.multiscale import MultiscaleReader
from captum_lnstat.topology.residual import residual_block
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap
from captum_lnstat.trace.steps import Block, Update


def reader_of(module: nn.Module) -> type[Reader] | None:
    """What reads a module, if it is an attention block."""
    return next((reader for reader in READERS if reader.reads(module)), None)


class ResidualReader(PartsReader):
    """Two norms, an attention and an MLP; windows, lattices, the whole image, or keys of a coarser grid."""

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        parts = find_parts(module)
        if parts is None:
            return False
        # An MLP may hold a convolution; one more is something that is done to the stream before.
        others = [child for name, child in module.named_children() if name != parts.attention]
        return sum(bool(layers(child, nn.Conv2d)) for child in others) < 2

    @property
    def _spatial(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.attention.named_modules() if isinstance(part, SPATIAL)}

    def taps(self) -> Iterator[nn.Module]:
        yield from super().taps()
        yield self.attention
        yield getattr(self.block, self.parts.norms[0])
        yield from self._spatial.values()

    def order(self, name: str, recording: Recording, grid: Grid | None) -> Tensor | None:
        """Of a block that is given windows, ``(batch, window, member, channel)``: window by window."""
        given = recording.call(name).input.tensor
        site = recording.site(f"{name}.{self.parts.attention}")
        value = site.value.tensor if isinstance(site, FusedSite | SoftmaxSite) and site.value is not None else None
        if value is None or value.dim() != 5 or given.dim() != 4 or grid is None:
            return None
        count, members = given.shape[1:3]
        if value.shape[3] != members or count * members != grid[0] * grid[1]:
            return None
        return squares(grid, members, given.device).index.flatten()

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        site = cut(recording.site(f"{name}.{self.parts.attention}"))
        layout, keys = self._layouts(name, recording, before, site)
        laid = channels_first if self.reads_channels_first(name, recording) else channels_last
        block = residual_block(name, self.block, recording, layout, site, joined_norm=keys is None, laid=laid)
        if before.order is not None:
            block = replace(block, path=_joined_as_seen(block))
        return [replace(block, keys=keys)]

    def _layouts(
        self, name: str, recording: Recording, before: Stream, site: AttentionSite
    ) -> tuple[Layout, Layout | None]:
        groups, heads, queries, keys = site.shape
        batch, tokens, device = len(before.tokens), before.tokens.shape[1], before.tokens.device
        if heads * keys == self.parts.out.in_features and groups == batch and queries == keys != tokens:
            raise UnsupportedModelError(
                f"{type(self.attention).__name__} at {f'{name}.{self.parts.attention}'!r} attends from channel to "
                f"channel, {queries} x {keys} in each head for {tokens} tokens; expected attention from token to token"
            )
        if groups == batch and queries == tokens:
            whole = WholeImage()
            reduced = self._reduced(f"{name}.{self.parts.attention}", recording, before, keys)
            if reduced is None and keys != tokens:
                raise UnsupportedModelError(
                    f"{name!r} has {keys} keys for {tokens} tokens, and no convolution or pooling in it returned so "
                    "many; expected keys that lie on a grid"
                )
            return whole, reduced
        if before.order is not None:
            return Groups(torch.arange(tokens, device=device).reshape(-1, queries)), None
        attended = recording.calls.get(f"{name}.{self.parts.attention}", ())
        parts = attended[0].input.read() if len(attended) == 1 else None
        if parts is None or len(parts) != groups or stream(parts).shape[1] != queries:
            # The attention cuts its windows itself. That they are these is checked with the update it makes.
            return squares(before.grid, queries, device), None
        sizes = [(parts.shape[1], parts.shape[2])] if parts.dim() == 4 else _sides(queries)
        normed = stream(recording.call(f"{name}.{self.parts.norms[0]}").output.read())
        return partition(name, before.grid, sizes, normed, stream(parts), device), None

    def _reduced(self, name: str, recording: Recording, before: Stream, keys: int) -> Cells | None:
        ran = {part: f"{name}.{inner}" for inner, part in self._spatial.items() if f"{name}.{inner}" in recording.calls}
        grids = {part: recording.call(dotted).output.tensor.shape[-2:] for part, dotted in ran.items()}
        on_grid = [(part, (int(grid[0]), int(grid[1]))) for part, grid in grids.items() if grid[0] * grid[1] == keys]
        if not on_grid or before.prefix:
            return None
        device, (first, grid) = before.tokens.device, on_grid[0]
        if isinstance(first, nn.AdaptiveAvgPool2d):
            return Cells(adaptive_cells(before.grid, grid, device))
        return Cells(under(first, before.grid, grid, device))


def _joined_as_seen(block: Block) -> tuple[FrozenMap, ...]:
    """The block's path for heads that are joined one after another, or channel by channel: as the first token shows."""
    (linear,) = block.path
    assert isinstance(linear, FrozenLinear)
    heads = slice(0, block.site.shape[1])
    first = torch.tensor([0], device=block.before.device)
    joined = (block.site.probabilities(heads, first)[:1] @ block.site.values(heads)[:1])[0, :, 0]
    update = block.attention_update[0, 0]
    weight = linear.weight.detach().to(joined.dtype)
    alternating = weight.reshape(len(weight), joined.shape[1], -1).transpose(1, 2).flatten(1)
    bias = 0 if linear.bias is None else linear.bias.detach().to(joined.dtype)
    errors = [(w @ joined.flatten() + bias - update).abs().amax() for w in (weight, alternating)]
    return (linear,) if errors[0] <= errors[1] else (FrozenLinear(alternating, linear.bias),)


def _sides(members: int) -> list[Grid]:
    return [(side, members // side) for side in range(1, members + 1) if not members % side]


READERS: tuple[type[Reader], ...] = (
    MultiscaleReader,
    ResidualReader,
    SequentialReader,
    MapReader,
    LocalReader,
    CascadedReader,
)
