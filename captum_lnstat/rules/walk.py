"""The rules: ways from a traced forward pass to relevance on the patch grid. Formulas are those of the design.

Every relation of a block is ``R = diag(alpha) + diag(1 - alpha) A``, row = token after the block, column = token
before. Only the row vector ``r`` travels, from the head to the image: ``r R = alpha * r + ((1 - alpha) * r) A``,
window by window. No matrix of all tokens against all tokens is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from captum_lnstat.layout import Groups
from captum_lnstat.rules.relation import Handed, hand_down
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.wiring import Wiring
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, Merging, Transition, Update
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float


class _Row:
    """Row vectors on their way from the head to the image, and the mass that padded places took from them."""

    def __init__(self, tokens: Float[Tensor, "batch token row"], at: Tensor | None) -> None:
        self.tokens = tokens
        self.at = at  # the only tokens at which they are not zero, if that is known
        self.padding = tokens.new_zeros(len(tokens), tokens.shape[-1])

    def split(self, groups: Groups, shares: Float[Tensor, "batch parent child"]) -> None:
        """A parent's relevance to its children."""
        children = (self.tokens[:, :, None] * shares[..., None]).flatten(0, 1)
        self.tokens, lost = groups.scatter(children, len(self.tokens))
        self.padding, self.at = self.padding + lost, None

    def through_block(self, block: Block, keep: Tensor, handed: Tensor, lost: Tensor) -> None:
        """What each token keeps, and what the attention hands down."""
        self.tokens, self.padding = keep, self.padding + lost
        if block.skip is not None:
            self.split(block.skip, block.shares("uniform"))
        self.tokens, self.at = self.tokens + handed, None

    def relevance(self, trace: Trace, constant: Tensor | None = None) -> tuple[Relevance, ...]:
        """One for every row vector."""
        prefix, grid = self.tokens[:, : trace.prefix], trace.on_grid(self.tokens).movedim(-1, 0).contiguous()
        constant = torch.zeros_like(self.padding) if constant is None else constant
        return tuple(
            Relevance(grid[i], prefix[..., i], self.padding[..., i], constant[..., i]) for i in range(len(grid))
        )


class _Walker(Protocol):
    """Row vectors, and perhaps a cotangent, on their way from the head to the image."""

    row: _Row
    u: Cotangent | None

    def give(self, block: Block) -> Tensor:
        """What goes through the block's attention."""

    def take(self, block: Block, handed: Tensor, lost: Tensor, said: Handed) -> None:
        """What came out of it."""

    def beside(self, step: Merging | Update | Transition) -> None:
        """A step that is no attention: what it says, before the row is handed down."""


def _at(walkers: Sequence[_Walker]) -> Tensor | None:
    known = [walker.row.at for walker in walkers]
    return None if any(at is None for at in known) else torch.unique(torch.cat([at for at in known if at is not None]))


def _walk(trace: Trace, walkers: Sequence[_Walker], settings: Settings) -> None:
    wiring = None if trace.training else Wiring()
    for step in reversed(trace.steps):
        if not isinstance(step, Block):
            for walker in walkers:
                walker.beside(step)
            _hand_to_children([walker.row for walker in walkers], step, settings)
            continue
        given = [walker.give(step) for walker in walkers]
        u = next((walker.u for walker in walkers if walker.u is not None), None)
        came = hand_down(step, torch.cat(given, -1), _at(walkers), u, settings.head_fusion, wiring)
        first = 0
        for walker, part in zip(walkers, given, strict=True):
            its = slice(first, first + part.shape[-1])
            walker.take(step, came.rows[..., its], came.rows_lost[..., its], came)
            first = its.stop
    if wiring is not None:
        wiring.verify()


def _hand_to_children(rows: Sequence[_Row], step: Merging | Update | Transition, settings: Settings) -> None:
    if step.below is not None:
        shares = step.shares(settings.merging)
        for row in rows:
            row.split(step.below, shares)
