"""Plain encoders of any library: an embedding with convolutions, one list of residual blocks, a head of any kind.

Nothing is looked up by name. The grid is the shape of what the last convolution of the embedding returned, prefix
tokens are those that the first block sees beyond it, and how the head reads the tokens is seen from its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, Layout, WholeImage, windows
from captum_lnstat.recording.eager import named
from captum_lnstat.recording.joined_heads import JoinedHeads
from captum_lnstat.recording.recording import ModuleCall, Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.cutting import check_others, grid_of_patches, patch_linear, patch_taps
from captum_lnstat.topology.anatomy.embedding import (
    around_patches,
    block_lists,
    convolutions,
    grid_of,
    lists_of,
    outside,
    patch_of,
    pooled_after,
    reads_images,
)
from captum_lnstat.topology.anatomy.joining import with_new_tokens
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS, channels_of, has_heads, is_residual_block
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.reading import check_images_apart
from captum_lnstat.topology.anatomy.units import norm_step
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.topology.branches import branch_block, branch_lists, branch_taps, calls_of, find_branches, is_called
from captum_lnstat.topology.hierarchical import HierarchicalTopology
from captum_lnstat.topology.post_norm import block_steps
from captum_lnstat.topology.residual import block_taps, far_apart, output_of
from captum_lnstat.topology.seen import seen_block, seen_lists
from captum_lnstat.trace.steps import Block, Step
from captum_lnstat.trace.trace import Trace


@register_topology
class EncoderTopology(BlockTopology):
    """Prefix tokens, then patch tokens row by row, through one list of blocks; attention among all of them."""

    family = "plain"
    expects = (
        f"a convolution, or a Linear on patches cut from the image, and one list of blocks with {BLOCK_PARTS}, or "
        "of an attention and an MLP that each begin with a norm"
    )

    @staticmethod
    def _lists(model: nn.Module) -> dict[str, nn.Module]:
        return block_lists(model) or branch_lists(model)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(innermost(model, partial(_holds_encoder, lists=cls._lists, cut=cut)) for cut in (False, True))

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        name, blocks = self._list
        return {f"{name}.{child}".lstrip("."): block for child, block in blocks.named_children()}

    @cached_property
    def _list(self) -> tuple[str, nn.Module]:
        (one,) = self._lists(self.model).items()
        return one

    @cached_property
    def _linear(self) -> str | None:
        """The Linear that reads the patches, where no convolution makes them."""
        return patch_linear(self.model, [self._list[1]])

    @cached_property
    def _linears(self) -> dict[str, nn.Linear]:
        return outside(self.model, [self._list[1]], nn.Linear)

    @property
    def places(self) -> Iterable[nn.Module]:
        modules = named(self.model)
        return [modules[name] for pair in self.blocks.items() for name in calls_of(*pair)]

    @property
    def entrance(self) -> str:
        return super().entrance if self._linear is None else ""

    @property
    def head_begins(self) -> nn.Module | None:
        return _around(self.model, *self._list)[0]

    @property
    def head_follows(self) -> nn.Module | None:
        return _around(self.model, *self._list)[1]

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from self.convolutions.values()
        yield from self.norms.values()
        if self._linear is not None:
            yield from patch_taps(self.model, self._linear)
            yield from self._linears.values()
        for block in self.blocks.values():
            yield from block_taps(block) if is_residual_block(block) else branch_taps(block)

    def tokens_first(self, stream: Tensor, batch: int) -> bool:
        if stream.dim() != 3 or stream.shape[1] != batch:
            return False
        # With as many tokens as images, by what its attention takes.
        return len(stream) != batch or all(_takes_tokens_first(block) for block in self.blocks.values())

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        batch = len(recording.call(self.entrance).input.tensor)
        names = recording.up_to_the_last([calls_of(*pair)[0] for pair in self.blocks.items()])
        ran = dict(list(self.blocks.items())[: len(names)])
        tokens_first = self.tokens_first(recording.call(names[0]).input.tensor, batch)
        if tokens_first:
            check_images_apart(recording)
            recording = recording.batch_first(name for pair in ran.items() for name in calls_of(*pair))
        grid, patch, neck = self._patches(recording, image_size, names[0])
        given = dict(zip(ran, names, strict=True))
        layouts = {name: _layout(given[name], block, recording, batch, grid) for name, block in ran.items()}
        steps: list[Step] = []
        reads = [*(recording.call(name).input.read() for name in names[1:]), recording.stream_end]
        for (name, block), after in zip(ran.items(), reads, strict=True):
            if is_residual_block(block):
                steps += block_steps(name, block, recording, layouts[name], grid)
            elif find_branches(block) is None:
                steps += seen_block(name, block, recording, layouts[name], grid)
            else:
                read = None if is_called(block) or after is None else stream(after.detach())
                steps.append(branch_block(name, block, recording, layouts[name], read))
            if name in recording.calls and after is not reads[-1]:
                steps += self._norm_after(recording.call(name), steps[-1].after, after, recording, grid)
        tokens = steps[0].before
        others = tokens.shape[1] - grid[0] * grid[1]
        if others < 0:
            raise RecordingError(
                f"the first block saw {tokens.shape[1]} tokens; expected a grid of {grid[0]} x {grid[1]} and prefix "
                "tokens before it. Tokens that were dropped or merged cannot be placed on the image"
            )
        prefix, suffix = around_patches(recording, tokens.shape[1], grid[0] * grid[1])
        if self._linear is not None:
            check_others(recording, self._linear, self._linears, (prefix, suffix), tokens.shape[-1])
        blocks, covers = [step for step in steps if isinstance(step, Block)], ""
        if len(blocks) == len(steps) and not suffix:
            all_steps, covers = with_new_tokens(blocks, recording, grid)
            steps = list(all_steps)
        at_head = steps[-1].after.shape[1] - grid[0] * grid[1] - suffix
        pooling = pooling_as_read(recording, at_head, self.norms, self.blocks, neck=neck, suffix=suffix)
        return Trace(
            self.family,
            tuple(steps),
            tokens,
            prefix,
            grid,
            patch,
            pooling,
            gradients=not any(isinstance(block.site, JoinedHeads) for block in blocks),
            suffix=suffix,
            tokens_first=tokens_first,
            covers=covers,
        )

    def _norm_after(
        self, call: ModuleCall, before: Tensor, after: Tensor | None, recording: Recording, grid: Grid
    ) -> Iterator[Step]:
        """The norm between a block and the next, as behind an ``nn.TransformerEncoder`` that another one follows."""
        returned = call.output.tensor
        outside = (norm for name in self.norms for norm in recording.norms_inside(name))
        for norm in (one for one in outside if one.input.tensor.shape == returned.shape):
            if after is not None and norm.input.tensor.data_ptr() == returned.data_ptr():
                left, read = output_of(norm), stream(after.detach())
                if left.shape == read.shape and not bool(far_apart(left, read)):
                    yield norm_step(norm.module, norm, before, read, grid)
                    return

    def _patches(self, recording: Recording, image_size: tuple[int, int], first: str) -> tuple[Grid, Grid, bool]:
        """Rows and columns of patches, height and width of one, and whether convolutions follow the blocks."""
        if self._linear is not None:
            return *grid_of_patches(recording, self._linear, self.norms), False
        embedding, neck = self._around_blocks(recording)
        grid = grid_of(recording, list(embedding)[-1])
        pooled = pooled_after(recording, first, grid)
        return *(pooled or (grid, patch_of(embedding, recording, grid, image_size))), bool(neck)

    def _around_blocks(self, recording: Recording) -> tuple[dict[str, nn.Conv2d], dict[str, nn.Conv2d]]:
        """The convolutions that ran before the first block, and those that ran after the last."""
        order = list(recording.calls)
        calls = [calls_of(name, block) for name, block in self.blocks.items()]
        calls = calls[: len(recording.up_to_the_last([names[0] for names in calls]))]
        first, last = order.index(calls[0][0]), order.index(calls[-1][-1])
        ran = [(order.index(name), name) for name in self.convolutions if name in recording.calls]
        before, after = ([name for place, name in ran if place < first], [name for place, name in ran if place > last])
        if not before or len(before) + len(after) < len(ran):
            raise UnsupportedModelError(
                f"of the convolutions {', '.join(name for _, name in ran)} some ran between the blocks, or none before "
                "them; expected an embedding of convolutions, the blocks, and a head"
            )
        return {name: self.convolutions[name] for name in before}, {name: self.convolutions[name] for name in after}


@register_topology
class SeenTopology(EncoderTopology):
    """The same with blocks of no known build, each read by what ran in it."""

    expects = "the same with blocks of any build that hold two norms, an attention and Linears, and no convolution"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return super().matches(model) and not HierarchicalTopology.matches(model)

    @staticmethod
    def _lists(model: nn.Module) -> dict[str, nn.Module]:
        return seen_lists(model)


def _takes_tokens_first(block: nn.Module) -> bool:
    return any(isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in block.modules())


def _around(model: nn.Module, name: str, blocks: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The module that the head begins with, or else the one whose output is the stream after the last block.

    Of a list of branches that is the norm beside the list, or the module that runs the list.
    """
    last = list(blocks.children())[-1]
    if is_residual_block(last) or is_called(last):
        return None, last
    around = named(model)[name.rpartition(".")[0]]
    norms = [child for child in around.children() if channels_of(child) is not None]
    return (norms[-1], None) if norms else (None, None if around is model else around)


def _layout(name: str, block: nn.Module, recording: Recording, batch: int, grid: Grid) -> Layout:
    """All tokens, or, where a block takes the map of tokens and has a window size, windows padded right and below."""
    tokens = recording.call(name).input.tensor
    window, shift = getattr(block, "window_size", 0), getattr(block, "shift_size", 0)
    if tokens.dim() == 3 and len(tokens) == batch:
        return WholeImage()
    if tokens.shape[:-1] == (batch, *grid) and isinstance(window, int) and shift == 0:
        return windows(grid, (window, window), (0, 0), tokens.device) if window else WholeImage()
    raise UnsupportedModelError(
        f"{name!r} was given {tuple(tokens.shape)} with window_size {window!r} and shift_size {shift!r}; expected "
        f"({batch}, tokens, channels), or {(batch, *grid)} and channels with windows that are not shifted"
    )


def _holds_encoder(model: nn.Module, lists: Callable[[nn.Module], dict[str, nn.Module]], cut: bool) -> bool:
    """Whether a model makes patches with convolutions, or, if they are ``cut``, with a Linear, and holds the blocks."""
    found = lists(model)
    if len(found) != 1 or not any(_around(model, *next(iter(found.items())))):
        return False
    blocks = found.values()
    if patch_linear(model, blocks) is None if cut else not reads_images(convolutions(model, blocks)):
        return False
    # Attention in layers of another build, as XCiT's among the channels: more than this family knows of.
    inside = {id(part) for block in blocks for part in block.modules()}
    others = [part for part in lists_of(model, has_heads).values() if id(part) not in inside]
    return not any(inside.isdisjoint(map(id, part.modules())) for part in others)
