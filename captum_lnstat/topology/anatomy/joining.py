"""Tokens that come and go between the blocks: prompts that every layer has of its own, registers joined later.

The patches have to pass as they are. A prefix token after the step is one of those before it, or is new; a new one has
to be a parameter, so that nothing of the image comes in with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_lnstat.layout import PADDING, Grid, Groups
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.steps import Block, Step, Transition

COVERS = "Prefix tokens that are new before {names} come from no patch: what was read from them counts as padding."


def with_new_tokens(blocks: Sequence[Block], recording: Recording, grid: Grid) -> tuple[tuple[Step, ...], str]:
    """The blocks with a transition wherever prefix tokens were joined, replaced or dropped, and what that leaves out.

    Where anything else happened between two blocks nothing is put between them: the check of the stream sees it.
    """
    readers = [(block.name, block.before) for block in blocks[1:]]
    end = blocks[-1].after if recording.stream_end is None else stream(recording.stream_end.detach())
    steps: list[Step] = []
    for block, (name, reader) in zip(blocks, [*readers, ("the head", end)], strict=True):
        steps.append(block)
        if block.after.data_ptr() != reader.data_ptr() and not torch.equal(block.after, reader):
            below = _below(block.after, reader, math.prod(grid), recording.constants)
            if below is not None:
                pull_back = _PullBack(below, reader)
                steps.append(Transition(f"before {name}", below, block.after, reader, grid, pull_back))
    new = [s.name.partition(" ")[2] for s in steps if isinstance(s, Transition) and bool((s.below.index < 0).any())]
    return tuple(steps), COVERS.format(names=", ".join(new)) if new else ""


def _below(before: Tensor, after: Tensor, patches: int, constants: Sequence[Tensor]) -> Groups | None:
    """The token before under each token after, ``None`` if it cannot be told or a new one is not constant."""
    prefixes = before.shape[1] - patches, after.shape[1] - patches
    if min(prefixes) < 0 or not torch.equal(before[:, prefixes[0] :], after[:, prefixes[1] :]):
        return None
    rows = [part[0].to(after.dtype) for part in constants if part.shape[-1] == after.shape[-1]]
    under, next_token = list[int](), 0
    for token in range(prefixes[1]):
        seen = after[:, token]
        old = (i for i in range(next_token, prefixes[0]) if torch.equal(before[:, i], seen))
        found = next(old, PADDING)
        if found == PADDING and not any(bool((part == seen[:, None]).all(-1).any(-1).all()) for part in rows):
            return None
        next_token = next_token if found == PADDING else found + 1
        under.append(found)
    under += range(prefixes[0], before.shape[1])
    return Groups(torch.tensor(under, device=after.device)[:, None], before.shape[1])


@dataclass(frozen=True)
class _PullBack:
    """A token's cotangent is that of the token under it; what a new token brings belongs to the constant."""

    below: Groups
    after: Tensor

    def __call__(self, u: Cotangent) -> tuple[Cotangent, Tensor]:
        under = self.below.index[:, 0][u.at]
        old = (under != PADDING).nonzero()[:, 0]
        constant = u.read(self.after) * (under == PADDING)[:, None]
        assert self.below.tokens is not None
        # Tokens that stay are in the order they were in.
        pulled = Cotangent(under[old], u.scale[:, old], u.directions, u.kind[old], self.below.tokens)
        return pulled, constant.sum(1)
