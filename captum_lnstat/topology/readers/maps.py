"""Attention blocks that are built otherwise: of sequences, of 1 x 1 convolutions, with a convolution before the MLP."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.layout import Cells, Grid, WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.affine import is_affine, pull_back_by_autograd
from captum_lnstat.topology.anatomy.geometry import channels_first, partition, squares
from captum_lnstat.topology.anatomy.parts import has_heads, layers
from captum_lnstat.topology.anatomy.projections import projections
from captum_lnstat.topology.anatomy.unfolding import cut
from captum_lnstat.topology.anatomy.units import Stream, layout_of
from captum_lnstat.topology.readers.base import SPATIAL, Reader, under
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenScale
from captum_lnstat.trace.steps import Block, Update


class SequentialReader(Reader):
    """A sequence of norm and attention, and a sequence of norm and MLP, on parts that the block cuts from a map."""

    channels_first = True

    @classmethod
    def reads(cls, module: nn.Module) -> bool:
        chains = _chains(module)
        attending = [chain for chain in chains if has_heads(chain)]
        return len(chains) == 2 and attending == chains[:1] and bool(projections(chains[0]))

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._names = [name for name, child in block.named_children() if child in _chains(block)]
        self._attending, self._mlp = _chains(block)
        self._out = projections(self._attending)[-1]

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
        path = (self._out.map(f"{name}.{self._names[0]}", parts),)
        return [Block(name, site, groups, before.tokens, middle, after, path)]


def _chains(module: nn.Module) -> list[nn.Module]:
    """Children that are sequences beginning with a norm."""
    return [
        child
        for child in module.children()
        if isinstance(child, nn.Sequential) and len(child) and isinstance(child[0], nn.LayerNorm)
    ]


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
        self._out = layers(self._attention, nn.Conv2d)[-1]
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
        below = under(shortcut, before.grid, grid, before.tokens.device)
        pull_back = pull_back_by_autograd(
            f"{name}.{around}",
            shortcut,
            given.read(),
            (channels_first, channels_first),
            before.tokens,
            carried,
            shortcut.training,
        )
        return replace(block, keys=Cells(below), below=below, carried=carried, grid=grid, pull_back=pull_back)


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
    """Whether convolutions of 1 x 1 stand for its Linears; those of a position bias are not as wide as its tokens."""
    found = layers(attention, nn.Conv2d)
    widths = {convolution.in_channels for convolution in found}
    linears = [(linear.in_features, linear.out_features) for linear in projections(attention)]
    pointwise = len(found) >= 2 and all(convolution.kernel_size == (1, 1) for convolution in found)
    return pointwise and not any(widths.issuperset(linear) for linear in linears)


def _is_shortcut(module: nn.Module) -> bool:
    return is_affine(module) and any(isinstance(part, SPATIAL) for part in module.modules())


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
        inner = [child for child in children if len(layers(child, nn.LayerNorm)) == 1]
        normed = any(isinstance(child, nn.LayerNorm) for child in children)
        return len(inner) == 2 and attending == inner[:1] and not normed

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        children = dict(block.named_children())
        self._attention, self._mlp = (name for name, child in children.items() if len(layers(child, nn.LayerNorm)) == 1)
        self._out = projections(children[self._attention])[-1]
        self._local = [name for name, child in children.items() if is_affine(child) and layers(child, nn.Conv2d)]

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
        path = (self._out.map(f"{name}.{self._attention}", read),)
        layout = squares(before.grid, site.shape[2], before.tokens.device)
        mixed = stream(read)
        if not self._local:
            return [Block(name, site, layout, before.tokens, mixed, after, path)]
        (local,) = self._local
        call = recording.call(f"{name}.{local}")
        way = layout_of(f"{name}.{local}", call.output.read(), Stream(mixed, before.grid))
        between = way(call.input.read())
        block = Block(name, site, layout, before.tokens, between, between, path)
        return [block, Update(f"{name}.{local}", between, mixed), Update(f"{name}.{self._mlp}", mixed, after)]
