"""Attention blocks of hierarchical models: what they are built of, and how each is read from a recording."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.frozen import FrozenLinear, FrozenMap, FrozenScale
from captum_lnstat.layout import Cells, Groups, Layout, WholeImage, windows
from captum_lnstat.recording import Recording
from captum_lnstat.sites import AttentionSite, FusedSite, SoftmaxSite
from captum_lnstat.statistics import stream
from captum_lnstat.topology.affine import is_affine, pull_by_autograd
from captum_lnstat.topology.cut import cut
from captum_lnstat.topology.geometry import (
    Grid,
    adaptive_cells,
    channels_first,
    footprints,
    partition,
    reach_of,
)
from captum_lnstat.topology.parts import find_parts, has_heads
from captum_lnstat.topology.residual import block_taps, residual_block
from captum_lnstat.topology.units import Stream, layout_of
from captum_lnstat.trace import Block, Update

_SPATIAL = (nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)


class Reader(ABC):
    """One attention block.

    Attributes:
        block: The module.
        channels_first: Whether a map that it is given has its channels before its rows.
    """

    channels_first: ClassVar[bool] = False

    def __init__(self, block: nn.Module) -> None:
        self.block: Any = block

    @classmethod
    @abstractmethod
    def reads(cls, module: nn.Module) -> bool:
        """Whether a module is a block of this build."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the stream after it."""

    @abstractmethod
    def taps(self) -> Iterator[nn.Module]:
        """The modules whose calls ``steps`` reads."""

    def order(self, name: str, recording: Recording, grid: Grid | None) -> Tensor | None:
        """The order of the tokens, if they are not row by row."""
        return None

    @abstractmethod
    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        """The block, and what is added after it, from the stream that it was given."""


def reader_of(module: nn.Module) -> type[Reader] | None:
    """What reads a module, if it is an attention block."""
    return next((reader for reader in READERS if reader.reads(module)), None)


class ResidualReader(Reader):
    """Two norms, an attention and an MLP; windows, lattices, the whole image, or keys of a coarser grid."""

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        return find_parts(module) is not None

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        parts = find_parts(block)
        assert parts is not None
        self.parts = parts
        self.attention: nn.Module = getattr(block, parts.attention)

    @property
    def width(self) -> int:
        return self.parts.out.out_features

    @property
    def _spatial(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.attention.named_modules() if isinstance(part, _SPATIAL)}

    def taps(self) -> Iterator[nn.Module]:
        yield from block_taps(self.block)
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
        side = math.isqrt(members)
        if value.shape[3] != members or count * members != grid[0] * grid[1]:
            return None
        return windows(grid, (side, side), (0, 0), given.device).index.flatten()

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        site = cut(recording.site(f"{name}.{self.parts.attention}"))
        layout, keys = self._layouts(name, recording, before, site)
        block = residual_block(name, self.block, recording, layout, site, joined_norm=keys is None)
        if before.order is not None:
            block = replace(block, path=_joined_as_seen(block))
        return [replace(block, keys=keys)]

    def _layouts(
        self, name: str, recording: Recording, before: Stream, site: AttentionSite
    ) -> tuple[Layout, Layout | None]:
        groups, _, queries, keys = site.shape
        batch, tokens, device = len(before.tokens), before.tokens.shape[1], before.tokens.device
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
        side = math.isqrt(queries)
        attended = recording.calls.get(f"{name}.{self.parts.attention}", ())
        parts = attended[0].input.read() if len(attended) == 1 else None
        if parts is None or len(parts) != groups or stream(parts).shape[1] != queries:
            # The attention cuts its windows itself. That they are these is checked with the update it makes.
            return windows(before.grid, (side, side), (0, 0), device), None
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
        return Cells(_under(first, before.grid, grid, device))


def _under(module: nn.Module, grid: Grid, after: Grid, device: torch.device) -> Groups:
    reach = reach_of(module)
    return footprints(grid, after, reach.stride, reach.centre, device)


def _joined_as_seen(block: Block) -> tuple[FrozenMap, ...]:
    """The block's path for heads that are joined one after another, or channel by channel: as the first token says."""
    (linear,) = block.path
    assert isinstance(linear, FrozenLinear)
    heads = slice(0, block.site.shape[1])
    first = torch.tensor([0], device=block.before.device)
    joined = (block.site.probabilities(heads, first)[:1] @ block.site.values(heads)[:1])[0, :, 0]
    update = block.attention_update[0, 0]
    weight = linear.weight.detach().to(joined.dtype)
    alternating = weight.unflatten(1, (joined.shape[1], -1)).transpose(1, 2).flatten(1)
    bias = 0 if linear.bias is None else linear.bias.detach().to(joined.dtype)
    errors = [(w @ joined.flatten() + bias - update).abs().amax() for w in (weight, alternating)]
    return (linear,) if errors[0] <= errors[1] else (FrozenLinear(alternating, linear.bias),)


def _sides(members: int) -> list[Grid]:
    return [(side, members // side) for side in range(1, members + 1) if not members % side]


class SequentialReader(Reader):
    """A sequence of norm and attention, and a sequence of norm and MLP, on parts that the block cuts from a map."""

    channels_first = True

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        chains = _chains(module)
        return len(chains) == 2 and has_heads(chains[0]) and not has_heads(chains[1]) and bool(_linears(chains[0]))

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._names = [name for name, child in block.named_children() if child in _chains(block)]
        self._attending, self._mlp = _chains(block)
        self._out = _linears(self._attending)[-1]

    @property
    def width(self) -> int:
        return self._out.out_features

    def taps(self) -> Iterator[nn.Module]:
        yield self.block

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        first, second = (recording.norm(f"{name}.{chain}") for chain in self._names)
        site = cut(recording.site(f"{name}.{self._names[0]}"))
        parts, between = first.input.read(), second.input.read()
        side = math.isqrt(site.shape[2])
        groups = partition(
            name, before.grid, [(side, side)], before.tokens, stream(parts.flatten(0, -3)), before.tokens.device
        )
        after = channels_first(recording.call(name).output.read())
        middle, _ = groups.scatter(stream(between.flatten(0, -3)), len(before.tokens))
        path = (FrozenLinear(self._out.weight, self._out.bias),)
        return [Block(name, site, groups, before.tokens, middle, after, path)]


def _chains(module: nn.Module) -> list[nn.Module]:
    """Children that are sequences beginning with a norm."""
    return [
        child
        for child in module.children()
        if isinstance(child, nn.Sequential) and len(child) and isinstance(child[0], nn.LayerNorm)
    ]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


class MapReader(Reader):
    """Attention and MLP of 1 x 1 convolutions on a map with channels first, behind a shortcut that may coarsen it."""

    channels_first = True

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        attending = [child for child in module.children() if has_heads(child)]
        norms = [child for child in module.children() if _first_norm(child) is not None and not has_heads(child)]
        return len(attending) == 1 and len(norms) == 2 and _is_pointwise(attending[0])

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        children = dict(block.named_children())
        ((self._attention_name, self._attention),) = ((n, c) for n, c in children.items() if has_heads(c))
        self._norms = [n for n, c in children.items() if _first_norm(c) is not None and not has_heads(c)]
        self._out = [part for part in self._attention.modules() if isinstance(part, nn.Conv2d)][-1]
        self._shortcuts = [n for n, c in children.items() if _is_shortcut(c) and n not in self._norms]

    @property
    def width(self) -> int:
        return self._out.out_channels

    def taps(self) -> Iterator[nn.Module]:
        yield self.block
        for name in (*self._shortcuts, *self._norms):
            yield getattr(self.block, name)

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        call = recording.call(name)
        returned = call.output.tensor
        after, grid = channels_first(call.output.read()), (int(returned.shape[-2]), int(returned.shape[-1]))
        between = channels_first(recording.call(f"{name}.{self._norms[1]}").input.read())
        site = recording.site(f"{name}.{self._attention_name}")
        path: list[FrozenMap] = [FrozenLinear(self._out.weight.flatten(1), self._out.bias)]
        scale = _scale(self.block, self.width)
        if scale is not None:
            path.append(FrozenScale(scale))
        block = Block(name, site, WholeImage(), before.tokens, between, after, tuple(path))
        if grid == before.grid and before.tokens.shape == after.shape:
            return [block]
        return [self._coarsening(name, block, recording, before, grid)]

    def _coarsening(self, name: str, block: Block, recording: Recording, before: Stream, grid: Grid) -> Block:
        given = recording.call(name).input
        found = [n for n in self._shortcuts if recording.calls.get(f"{name}.{n}")]
        around = next((n for n in found if _around(recording, f"{name}.{n}", given.tensor, block.after)), None)
        if around is None:
            raise UnsupportedModelError(
                f"{name!r} makes a grid of {grid[0]} x {grid[1]} tokens of {before.grid[0]} x {before.grid[1]}, and no "
                "shortcut in it does; expected a pooling, and a convolution where it widens the stream"
            )
        shortcut: nn.Module = getattr(self.block, around)
        carried = channels_first(recording.call(f"{name}.{around}").output.read())
        under = _under(shortcut, before.grid, grid, before.tokens.device)
        pull = pull_by_autograd(
            f"{name}.{around}",
            shortcut,
            given.read(),
            (channels_first, channels_first),
            before.tokens,
            carried,
            shortcut.training,
        )
        return replace(block, keys=Cells(under), skip=under, carried=carried, grid=grid, pull=pull)


def _around(recording: Recording, name: str, given: Tensor, after: Tensor) -> bool:
    call = recording.call(name)
    same = call.input.tensor.data_ptr() == given.data_ptr()
    return same and stream(call.output.tensor.movedim(1, -1)).shape == after.shape


def _first_norm(module: nn.Module) -> nn.LayerNorm | None:
    """A norm, or the norm that a sequence begins with."""
    if isinstance(module, nn.Sequential) and len(module):
        module = module[0]
    return module if isinstance(module, nn.LayerNorm) else None


def _is_pointwise(attention: nn.Module) -> bool:
    layers = [part for part in attention.modules() if isinstance(part, nn.Conv2d)]
    return len(layers) >= 2 and all(layer.kernel_size == (1, 1) for layer in layers) and not _linears_of(attention)


def _linears_of(attention: nn.Module) -> list[nn.Linear]:
    """Linears of the attention that are as wide as its tokens; those of a position bias are not."""
    widths = {part.in_channels for part in attention.modules() if isinstance(part, nn.Conv2d)}
    return [linear for linear in _linears(attention) if linear.in_features in widths and linear.out_features in widths]


def _is_shortcut(module: nn.Module) -> bool:
    return is_affine(module) and any(isinstance(part, _SPATIAL) for part in module.modules())


def _scale(block: nn.Module, width: int) -> Tensor | None:
    """LayerScale of the attention: the first parameter of one value per channel that is alone in a child."""
    for child in block.children():
        parameters = list(child.parameters())
        if len(parameters) == 1 and parameters[0].shape == (width,):
            return parameters[0]
    return None


class LocalReader(Reader):
    """Attention in windows, a depthwise convolution, an MLP; the norms are inside the attention and the MLP."""

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        children = list(module.children())
        attending = [child for child in children if has_heads(child)]
        inner = [child for child in children if len(_norms_of(child)) == 1]
        return len(attending) == 1 and len(inner) == 2 and inner[0] is attending[0] and not _norms_in(children)

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        children = dict(block.named_children())
        self._attention, self._mlp = (name for name, child in children.items() if len(_norms_of(child)) == 1)
        self._out = _linears(children[self._attention])[-1]
        self._local = [
            name
            for name, child in children.items()
            if is_affine(child) and any(isinstance(part, nn.Conv2d) for part in child.modules())
        ]

    @property
    def width(self) -> int:
        return self._out.out_features

    def taps(self) -> Iterator[nn.Module]:
        yield self.block
        yield getattr(self.block, self._mlp)
        for name in self._local:
            yield getattr(self.block, name)

    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        site = cut(recording.site(f"{name}.{self._attention}"))
        after, read = stream(recording.call(name).output.read()), recording.call(f"{name}.{self._mlp}").input.read()
        path = (FrozenLinear(self._out.weight, self._out.bias),)
        side = math.isqrt(site.shape[2])
        layout = windows(before.grid, (side, side), (0, 0), before.tokens.device)
        mixed = stream(read)
        if not self._local:
            return [Block(name, site, layout, before.tokens, mixed, after, path)]
        (local,) = self._local
        call = recording.call(f"{name}.{local}")
        way = layout_of(f"{name}.{local}", call.output.read(), Stream(mixed, before.grid))
        between = way(call.input.read())
        block = Block(name, site, layout, before.tokens, between, between, path)
        return [block, Update(f"{name}.{local}", between, mixed), Update(f"{name}.{self._mlp}", mixed, after)]


def _norms_of(module: nn.Module) -> list[nn.LayerNorm]:
    return [part for part in module.modules() if isinstance(part, nn.LayerNorm)]


def _norms_in(children: list[nn.Module]) -> bool:
    return any(isinstance(child, nn.LayerNorm) for child in children)


READERS: tuple[type[Reader], ...] = (ResidualReader, SequentialReader, MapReader, LocalReader)
