"""Blocks of one shape in one go: what a block needs of its own numbers alone is worked out for a whole stack of them.

Only the rolling of relevance has an order. Maps, what the sources bring to them, residual shares, contributions and the
check of the wiring have none: of all blocks of a ViT, or of a stage of a Swin, they are one kernel each. That is what a
device wants, where a launch costs as much as a small kernel; and on the CPU a small model. It takes the maps of a whole
stack at once: large ones are propagated block by block on the CPU, some of a map at a time (``rules.relation``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_lnstat.layout import Groups, padded
from captum_lnstat.recording.devices import BYTES_PER_ENTRY, at_most, has_a_queue
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.statistics import ResidualShare
from captum_lnstat.rules.relation import Propagated
from captum_lnstat.rules.stack import Stack
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.stacked_maps import stacked_path
from captum_lnstat.trace.steps import Block, Step
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


# Entries of the maps that a stack may have on the CPU, where they stay in the cache; and on a device that does not say
# how much memory it has left.
ON_CPU = 1 << 15
ON_DEVICE = 1 << 27
# Of the memory that a device has left.
PART_OF_FREE = 0.5


@dataclass(frozen=True)
class StackedBlock(Block):
    """A block of a stack: what is worked out for the stack is its own at ``place``."""

    stack: Stack = None  # type: ignore[assignment]
    place: int = 0

    def shares_of(
        self, form: ResidualShare, by_sigma: slice | None = None
    ) -> tuple[Float[Tensor, "batch query_token"], Float[Tensor, "batch query_token"]]:
        if form != "deviation":
            return super().shares_of(form, by_sigma)
        own, update = self.stack.shares(by_sigma)
        return own[self.place], update[self.place]

    def mlp_read(self, u: Cotangent) -> Float[Tensor, "batch token score"]:
        return self.stack.mlp_reads(u)[self.place][..., None] if u.scores == 1 else super().mlp_read(u)

    def forget(self) -> None:
        super().forget()
        if self.place == 0:
            self.stack.forget()

    def takes(self, u: Cotangent | None, fusion: HeadFusion) -> bool:
        """Whether ``propagate`` is defined: for one score, and for maps that are not fused head by head."""
        return fusion in ("deviation", "variance", "mean") and (u is None or u.scores == 1)

    def propagate(
        self,
        rows: Float[Tensor, "batch token row"],
        u: Cotangent | None,
        fusion: HeadFusion,
        wiring: Wiring | None,
        alone: bool,
    ) -> Propagated:
        """As ``rules.relation.propagate``, of which it is one form; ``alone``: all rows are those of the cotangent."""
        stack, place, layout, batch = self.stack, self.place, self.layout, len(rows)
        if wiring is not None:
            stack.note(wiring)
        relation, grouped = stack.relation(fusion)[place].mT, layout.gather(rows)
        if u is None:
            return self._below(relation @ grouped, batch)
        total, constant = stack.contributions(u)
        own, belongs_to_none = total[place][..., None], constant[place][:, None]
        if alone and not padded([layout]):  # what padded places contribute is told from what they take
            mixed = torch.baddbmm(own, relation, grouped)
            return Propagated(layout.join(mixed, batch), None, constant=belongs_to_none)
        below, lost = layout.scatter(torch.cat([relation @ grouped, own], -1), batch)
        return Propagated(below[..., :-1], lost[:, :-1], below[..., -1:], lost[:, -1:], belongs_to_none)

    def propagate_gradient(
        self,
        rows: Float[Tensor, "batch token row"],
        slopes: Mapping[str, Float[Tensor, "group head query channel"]],
        normalized: bool,
        wiring: Wiring | None,
    ) -> Propagated:
        """``r A'``, with the gradients at the outputs of the attentions by the names of their blocks."""
        if wiring is not None:
            self.stack.note(wiring)
        relation = self.stack.positive_gradients(slopes, normalized)[self.place]
        return self._below(relation.mT @ self.layout.gather(rows), len(rows))

    def _below(self, mixed: Float[Tensor, "group key row"], batch: int) -> Propagated:
        if padded([self.layout]):
            return Propagated(*self.layout.scatter(mixed, batch))
        return Propagated(self.layout.join(mixed, batch), None)


def room_for_maps(device: torch.device) -> int:
    """How many entries the maps of a stack may have: a part of what a device has left, or what a CPU's cache takes."""
    if device.type != "cuda":
        return at_most(ON_DEVICE if has_a_queue(device) else ON_CPU)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return at_most(int(free * PART_OF_FREE) // BYTES_PER_ENTRY)


def stacked(trace: Trace, entries: int) -> Trace:
    """The trace with blocks of one shape in stacks whose maps have at most so many entries, all heads together."""
    kinds: dict[Any, list[Block]] = {}
    for block in trace.blocks:
        if _plain(block):
            kinds.setdefault(_kind(block), []).append(block)
    found: dict[int, Block] = {}
    for blocks in kinds.values():
        groups, heads, queries, keys = blocks[0].site.shape
        at_once = entries // (groups * heads * queries * keys)
        for some in _runs(blocks, at_once) if at_once else ():
            path = stacked_path([block.path for block in some], some[0].between.dtype)
            if path is not None:
                stack = Stack(some, path)
                found |= {id(b): _in_stack(b, stack, place) for place, b in enumerate(some)}
    if not found:
        return trace
    steps: tuple[Step, ...] = tuple(
        found.get(id(step), step) if isinstance(step, Block) else step for step in trace.steps
    )
    return replace(trace, steps=steps)


def _runs(blocks: Sequence[Block], at_once: int) -> Iterable[Sequence[Block]]:
    count = -(-len(blocks) // at_once)
    size = -(-len(blocks) // count)
    return (blocks[start : start + size] for start in range(0, len(blocks), size))


def _in_stack(block: Block, stack: Stack, place: int) -> StackedBlock:
    own = {field.name: getattr(block, field.name) for field in fields(Block)}
    return StackedBlock(**own, stack=stack, place=place)


def _plain(block: Block) -> bool:
    """Whether a block attends from token to token among all of its tokens, in place."""
    whole = block.keys is None and block.carried is None and block.below is None
    layout = block.layout
    members = layout.index.shape[1] if isinstance(layout, Groups) else block.between.shape[1]
    # What attends otherwise is refused where it is propagated.
    from_token_to_token = block.site.shape[2:] == (members, members)
    return whole and from_token_to_token and not block.site.uneven and layout.covered is None


def _kind(block: Block) -> tuple[Any, ...]:
    """What the blocks of a stack have in common."""
    layout = block.layout.index.shape if isinstance(block.layout, Groups) else type(block.layout)
    shapes = block.before.shape, block.between.shape, block.after.shape
    maps = tuple(type(one) for one in block.path)
    return layout, shapes, block.site.shape, type(block.site), block.site.dtype, maps, block.centred
