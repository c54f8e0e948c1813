"""What stands between the attention blocks of a hierarchical model, as steps of a trace.

A convolution block with a shortcut is a transition through the shortcut and an update; a module that is affine with
frozen norms is a transition that evidence can be pulled through; something added in place is an update; all else is a
transition at which evidence is put down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import PADDING, Grid, Groups
from captum_lnstat.recording.recording import ModuleCall, NormCall, Recording
from captum_lnstat.topology.anatomy.affine import Layout, is_affine, pull_back_by_autograd
from captum_lnstat.topology.anatomy.geometry import cells, channels_first, channels_last, strides_of
from captum_lnstat.topology.anatomy.parts import layers
from captum_lnstat.trace.maps import FrozenNorm, pulled_through
from captum_lnstat.trace.steps import Transition, Update


@dataclass(frozen=True)
class Stream:
    """The residual stream at some depth.

    Attributes:
        tokens: ``(batch, token, channel)``; prefix tokens first.
        grid: Rows and columns of patch tokens.
        order: Which token of the grid, counted row by row, is at each place of the stream, if they are not in that
            order.
    """

    tokens: Tensor
    grid: Grid
    order: Tensor | None = None

    def lay(self, layout: Layout) -> Layout:
        """The same layout with its tokens put in the order of this stream."""
        order = self.order
        return layout if order is None else lambda tensor: layout(tensor)[:, order]

    @property
    def prefix(self) -> int:
        """How many prefix tokens there are."""
        return self.tokens.shape[1] - self.grid[0] * self.grid[1]


def unit_taps(unit: nn.Module) -> Iterator[nn.Module]:
    """The modules whose calls ``unit_steps`` reads."""
    yield unit
    for _, child in shortcuts(unit):
        yield child
    if is_affine(unit):
        yield from (part for part in layers(unit, nn.Conv2d) if part is not unit)


def shortcuts(unit: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that can lead around the rest: affine, and from the channels of the whole to those of the whole."""
    found = layers(unit, nn.Conv2d)
    if is_affine(unit) or not found:
        return []
    reads, gives = found[0].in_channels, found[-1].out_channels
    return [(name, child) for name, child in unit.named_children() if _leads(child, reads, gives)]


def _leads(child: nn.Module, reads: int, gives: int) -> bool:
    if not is_affine(child):
        return False
    found = layers(child, nn.Conv2d)
    if not found:
        return not list(child.parameters())
    return found[0].in_channels == reads and found[-1].out_channels == gives


def reads_channels_first(unit: nn.Module, recording: Recording, name: str) -> bool:
    """Whether the map that a unit was given has its channels before its rows."""
    given = recording.call(name).input.tensor
    if given.dim() == 4 and isinstance(unit, nn.LayerNorm):
        # A norm that takes its channels first turns the map round for itself.
        normed = recording.norm(name).input.tensor
        return given.shape != normed.shape or given.stride() != normed.stride()
    found = layers(unit, nn.Conv2d)
    # A module may turn its map round for its convolutions.
    turned = found and given.dim() == 4 and given.shape[1] != found[0].in_channels == given.shape[-1]
    return given.dim() == 4 and bool(found) and not turned


def unit_steps(
    name: str,
    unit: nn.Module,
    recording: Recording,
    before: Stream,
    after: Stream,
    positions: Sequence[Tensor] = (),
) -> list[Transition | Update]:
    """The steps of one module.

    Args:
        name: Dotted name of the module.
        unit: The module.
        recording: The pass.
        before: The stream that it was given.
        after: The stream that the step after it was given.
        positions: Parameters that may have been added to what it returned.

    Raises:
        RecordingError: It did not return ``after``.
        UnsupportedModelError: Its tokens cannot be placed.
    """
    call = recording.call(name)
    position = _position(call.output.read(), after, positions)
    if position is not None:
        reached = Stream(position[0], after.grid, after.order)
        added = Update(f"position embedding after {name}", reached.tokens, after.tokens)
        return [*unit_steps(name, unit, recording, before, reached), added]
    layout = layout_of(name, call.output.read(), after)
    if isinstance(unit, nn.LayerNorm):
        return [norm_step(name, recording.norm(name), before.tokens, after.tokens, after.grid)]
    if after.grid == before.grid and after.tokens.shape == before.tokens.shape:
        return [Update(name, before.tokens, after.tokens)]
    for child_name, child in shortcuts(unit):
        dotted = f"{name}.{child_name}"
        if dotted not in recording.calls:
            continue
        around = recording.call(dotted)
        same_input = around.input.tensor.data_ptr() == call.input.tensor.data_ptr()
        if same_input and around.output.tensor.shape == call.output.tensor.shape:
            past = Stream(layout(around.output.read()), after.grid, after.order)
            return [_transition(dotted, child, around, before, past, layout), Update(name, past.tokens, after.tokens)]
    return [_transition(name, unit, call, before, after, layout)]


def norm_step(name: str, norm: NormCall, before: Tensor, after: Tensor, grid: Grid) -> Transition:
    """A norm that the stream goes through: a map of each token, its deviation frozen."""
    itself = Groups(torch.arange(before.shape[1], device=before.device)[:, None])
    return Transition(name, itself, before, after, grid, pulled_through(FrozenNorm.of(norm)))


def layout_of(name: str, seen: Tensor, stream: Stream) -> Layout:
    """How a tensor that a module was given or returned is the stream there, with its channels last or first.

    Raises:
        RecordingError: It is not.
    """
    for layout in map(stream.lay, (channels_last, channels_first)):
        if seen.dim() >= 3 and seen.numel() == stream.tokens.numel():
            read = layout(seen)
            if read.shape == stream.tokens.shape and torch.equal(read, stream.tokens):
                return layout
    raise RecordingError(
        f"{tuple(seen.shape)} at {name!r} is not what was read after or returned before it: the model does something "
        "between its blocks that its topology does not know, so relevance cannot be placed"
    )


def _position(returned: Tensor, after: Stream, positions: Sequence[Tensor]) -> tuple[Tensor] | None:
    """What a unit returned, if it and one of the parameters added to it make the stream after it."""
    tokens = after.tokens
    for layout in map(after.lay, (channels_last, channels_first)):
        if returned.dim() < 3 or returned.numel() != tokens.numel():
            continue
        read = layout(returned)
        if read.shape != tokens.shape or torch.equal(read, tokens):
            continue
        for position in positions:
            if position.numel() == tokens[0].numel():
                added = position.detach().reshape(tokens.shape[1:])
                # Added in the dtype of the model, which rounds the sum.
                if torch.equal((read.to(returned.dtype) + added).to(tokens.dtype), tokens):
                    return (read,)
    return None


def _transition(
    name: str, module: nn.Module, call: ModuleCall, before: Stream, after: Stream, layout: Layout
) -> Transition:
    strides = (1, 1) if before.grid == after.grid else strides_of(module)
    groups = cells(before.grid, after.grid, strides, after.tokens.device)
    groups = _in_order(groups, before.order, after.order)
    pull_back = None
    if is_affine(module):
        given = call.input.read()
        into = layout_of(name, given, before)
        pull_back = pull_back_by_autograd(
            name, module, given, (into, layout), before.tokens, after.tokens, module.training
        )
    if before.prefix or after.prefix:
        if before.prefix:
            raise UnsupportedModelError(
                f"{name!r} coarsens a stream with {before.prefix} prefix tokens; expected them to join after it"
            )
        nothing = groups.index.new_full((after.prefix, groups.index.shape[1]), PADDING)
        groups = Groups(torch.cat([nothing, groups.index]), groups.count)
    return Transition(name, groups, before.tokens, after.tokens, after.grid, pull_back)


def _in_order(groups: Groups, before: Tensor | None, after: Tensor | None) -> Groups:
    """Groups of tokens counted row by row, as groups of tokens in the order of a stream."""
    index = groups.index if after is None else groups.index[after]
    if before is not None:
        index = torch.where(index == PADDING, PADDING, before.argsort()[index])
    return Groups(index, groups.count)
