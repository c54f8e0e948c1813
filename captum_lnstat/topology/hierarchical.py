"""Hierarchical models: attention blocks of growing width, and between them what coarsens the grid.

MaxViT, CoAtNet, PVT, Twins, TinyViT and their relatives. Nothing is looked up by name: the attention blocks are found
by what they are built of, and everything else that ran between the first and the last of them is a step of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid
from captum_lnstat.recording.eager import recorded_name
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import convolutions, reads_images
from captum_lnstat.topology.anatomy.geometry import channels_first, channels_last
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.units import Stream, reads_channels_first, unit_steps, unit_taps
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.topology.readers.base import Reader
from captum_lnstat.topology.readers.residual import reader_of
from captum_lnstat.trace.steps import Step, Transition
from captum_lnstat.trace.trace import Trace

COVERS = (
    "The grid is that of the first attention block: what the convolutions below it ({below}) did is not told apart. "
    "What convolutions between the blocks added is counted at the token that they added it to."
)
PUT_DOWN = "At {names} evidence is put on the tokens: from there down it is rolled, and not told apart any more."


@dataclass(frozen=True)
class _Item:
    """A module on the way: an attention block, or something between."""

    name: str
    module: nn.Module
    reader: Reader | None


@register_topology
class HierarchicalTopology(BlockTopology):
    """Blocks of at least two widths, convolutions before the first, and something that coarsens the grid between."""

    family = "hierarchical"
    expects = "attention blocks of growing width, with convolutions or patch embeddings between them"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return innermost(model, _is_hierarchy)

    @cached_property
    def _items(self) -> list[_Item]:
        return list(_items_of(self.model))

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        return {item.name: item.module for item in self._items if item.reader is not None}

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield next(iter(self.convolutions.values()))
        yield from self.norms.values()
        for item in self._items:
            yield from unit_taps(item.module) if item.reader is None else item.reader.taps()

    @property
    def places(self) -> Iterable[nn.Module]:
        end = self._items.index(self._last)
        return [item.module for item in self._items[: end + 1]]

    @property
    def head_follows(self) -> nn.Module:
        return self._last.module

    @cached_property
    def _last(self) -> _Item:
        """The last block, or a convolution that runs after it.

        That is the last one beside it in the same module, or, where the last stage is one block, that of a list with
        one convolution for each stage (the position convolutions of Twins, behind the first block of a stage).
        """
        place = max(place for place, item in enumerate(self._items) if item.reader is not None)
        parent = self._items[place].name.rpartition(".")[0]
        last = self._items[place]
        for item in self._items[place + 1 :]:
            if not parent or item.name.rpartition(".")[0] != parent or not convolutions(item.module):
                break
            last = item
        if last is not self._items[place]:
            return last
        stages = [item.name.rpartition(".")[0] for item in self._items if item.reader is not None]
        later = [item for item in self._items[place + 1 :] if convolutions(item.module) and "." in item.name]
        beside = [item for item in later if item.name.rpartition(".")[0] == later[0].name.rpartition(".")[0]]
        alone = stages.count(stages[-1]) == 1 and len(beside) == len(set(stages)) > 1
        return beside[-1] if alone else last

    @property
    def channels_first(self) -> bool:
        return [item.reader for item in self._items if item.reader is not None][-1].channels_first

    @property
    def width(self) -> int | None:
        return None if self._last.reader is None else self._last.reader.width

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        below, between = self._ran(recording)
        streams = self._streams(recording, below, between)
        inside = {id(p) for item in self._items for p in item.module.parameters()}
        positions = [p for p in self.model.parameters() if id(p) not in inside]
        steps = list[Step]()
        for item, before, after in zip(between, streams, [*streams[1:], self._end(recording, streams)], strict=True):
            if item.reader is not None:
                steps += item.reader.steps(item.name, recording, before)
            else:
                steps += unit_steps(item.name, item.module, recording, before, after, positions)
        first = streams[0]
        names = [item.name for item in between if item.reader is not None]
        readers = [item.reader for item in between if item.reader is not None]
        pooling = pooling_as_read(recording, streams[-1].prefix, self.norms, names)
        return Trace(
            self.family,
            tuple(steps),
            first.tokens,
            first.prefix,
            first.grid,
            _patch(image_size, first.grid),
            pooling,
            place=None if first.order is None else first.order.argsort(),
            gradients=all(r.gradients for r in readers),
            covers=_covers(below, steps, readers),
        )

    def _ran(self, recording: Recording) -> tuple[list[_Item], list[_Item]]:
        """What ran before the first block, and what ran from there to the last block, without what did nothing."""
        order = list(recording.calls)
        ran = sorted((i for i in self._items if i.name in recording.calls), key=lambda item: order.index(item.name))
        blocks = [place for place, item in enumerate(ran) if item.reader is not None]
        end = next((place for place, item in enumerate(ran) if item is self._last), -1)
        if not blocks or blocks[-1] > end:
            raise RecordingError(
                f"the last block of {type(self.model).__name__} to be defined was not the last to run; expected its "
                "blocks to run in their order"
            )
        ran = [item for item in ran[: end + 1] if item.reader is not None or not _passes(recording, item.name)]
        first = next(place for place, item in enumerate(ran) if item.reader is not None)
        return ran[:first], ran[first:]

    def _end(self, recording: Recording, streams: list[Stream]) -> Stream:
        """The stream that the last module returned, where that is no block."""
        returned = recording.call(self._last.name).output.read()
        layout = channels_first if returned.dim() == 4 and self.channels_first else channels_last
        return Stream(layout(returned), streams[-1].grid, streams[-1].order)

    def _streams(self, recording: Recording, below: list[_Item], items: list[_Item]) -> list[Stream]:
        """The stream that each of the items was given."""
        grid = None
        for item in below:
            grid = _grid_from_unit(item, recording) or grid
        streams, order = list[Stream](), None
        for item in items:
            given = recording.call(item.name).input.read()
            first = (
                item.reader.reads_channels_first(item.name, recording)
                if item.reader
                else reads_channels_first(item.module, recording, item.name)
            )
            tokens = channels_first(given) if first else channels_last(given)
            if item.reader is not None:
                order = item.reader.order(item.name, recording, grid)
            elif order is not None:
                tokens = tokens[:, order]
            if given.dim() == 4 and (item.reader is None or order is None):
                rows, columns = given.shape[-2:] if first else given.shape[1:3]
                grid = int(rows), int(columns)
            if grid is None or tokens.shape[1] < grid[0] * grid[1]:
                seen = "no grid" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
                raise UnsupportedModelError(
                    f"{item.name!r} was given {tuple(given.shape)}, and the convolutions before it left {seen}; "
                    "expected its tokens to be on the grid of the last convolution"
                )
            streams.append(Stream(tokens, grid, order))
            if item.reader is not None:
                grid = item.reader.grid_after(item.name, recording, grid)
            else:
                grid = _grid_from_unit(item, recording) or grid
        return streams


def _covers(below: list[_Item], steps: list[Step], readers: list[Reader]) -> str:
    covers = [COVERS.format(below=", ".join(item.name for item in below) or "none")]
    closed = [step.name for step in steps if isinstance(step, Transition) and step.pull_back is None]
    if closed:
        covers.append(PUT_DOWN.format(names=", ".join(closed)))
    return " ".join([*covers, *dict.fromkeys(reader.covers for reader in readers if reader.covers)])


def _passes(recording: Recording, name: str) -> bool:
    """Whether a module returned what it was given."""
    call = recording.call(name)
    given, returned = call.input.tensor, call.output.tensor
    return returned.data_ptr() == given.data_ptr() and returned.shape == given.shape


def _grid_from_unit(item: _Item, recording: Recording) -> Grid | None:
    """Rows and columns of what a module returned: a map as wide as its last convolution, or that one's."""
    found = convolutions(item.module)
    if not found or item.name not in recording.calls:
        return None
    seen, width = recording.call(item.name).output.tensor, list(found.values())[-1].out_channels
    dotted = [f"{item.name}.{name}".rstrip(".") for name in found]
    maps = [recording.call(name).output.tensor for name in dotted if name in recording.calls]
    last = (int(maps[-1].shape[-2]), int(maps[-1].shape[-1])) if maps else None
    if seen.dim() != 4:
        return last
    sides = [(int(rows), int(columns)) for rows, columns in (seen.shape[-2:], seen.shape[1:3])]
    fitting = [grid for grid, channels in zip(sides, (seen.shape[1], seen.shape[-1]), strict=True) if channels == width]
    # Where a map has as many rows as channels, its sides are in the proportion that the convolution left.
    same = [grid for grid in fitting if last is not None and grid[0] * last[1] == grid[1] * last[0]]
    return next(iter(same or fitting), last)


def _patch(image_size: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """Pixels of a patch: a stride that makes so many rows and columns, a power of two if one does."""
    sizes = [_strides(pixels, cells) for pixels, cells in zip(image_size, grid, strict=True)]
    both = [size for size in sizes[0] if size in sizes[1]]
    powers = [size for size in both if not size & (size - 1)]
    if not both:
        raise UnsupportedModelError(
            f"{image_size[0]} x {image_size[1]} px became a grid of {grid[0]} x {grid[1]} tokens; expected one stride "
            "for rows and columns that makes the one of the other"
        )
    return ((powers or both)[0],) * 2


def _strides(pixels: int, cells: int) -> list[int]:
    return [size for size in range(1, pixels + 1) if cells in (pixels // size, -(-pixels // size))]


def _items_of(module: nn.Module, prefix: str = "") -> Iterator[_Item]:
    for name, child in module.named_children():
        dotted = recorded_name(f"{prefix}{name}")
        kind = reader_of(child)
        if kind is not None:
            yield _Item(dotted, child, kind(child))
        elif isinstance(child, nn.ModuleList) or _holds_block(child):
            yield from _items_of(child, f"{dotted}.")
        else:
            yield _Item(dotted, child, None)


def _holds_block(module: nn.Module) -> bool:
    return any(reader_of(child) is not None or _holds_block(child) for child in module.children())


def _is_hierarchy(model: nn.Module) -> bool:
    if isinstance(model, nn.ModuleList):
        return False
    convolved = convolutions(model)
    if not reads_images(convolved) or len(convolved) < 2:
        return False
    items = list(_items_of(model))
    readers = [item.reader for item in items if item.reader is not None]
    if len({reader.width for reader in readers}) < 2 or any(_shifts(reader.block) for reader in readers):
        return False
    place = next(place for place, item in enumerate(items) if item.reader is not None)
    return place > 0 and any(convolutions(item.module) for item in items[:place])


def _shifts(block: nn.Module) -> bool:
    """Whether a block, or its attention, cuts shifted windows: another family."""
    return any(hasattr(part, "shift_size") for part in (block, *block.children()))
