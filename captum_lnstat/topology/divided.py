"""TimeSformer: every block attends over time, place by place, and then over space, frame by frame.

The class token takes no part in the first. In the second it stands in every frame, and what becomes of it there is
averaged. In the trace it is as many tokens while that lasts: a ``Transition`` makes them of it, the attention is among
the tokens of a frame, and another one is their mean; then nothing is left to approximate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import PADDING, Grid, Groups
from captum_lnstat.recording.eager import named
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import block_lists, check_prefix_first, lists_of, reads_images
from captum_lnstat.topology.anatomy.parts import has_heads, layers
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.volumes import channel_axis, patch_of, place_of_tubelets
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap
from captum_lnstat.trace.steps import Block, Step, Transition, Update
from captum_lnstat.trace.trace import Trace


@register_topology
class DividedTopology(BlockTopology):
    """A class token, then the patches of all frames; blocks with an attention over time and one over space."""

    family = "divided space and time"
    expects = "a convolution that cuts frames into patches, blocks with three LayerNorms, two attentions and an MLP"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return innermost(model, lambda module: bool(_blocks(module)))

    @property
    def axes(self) -> int:
        return 3

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        return _blocks(self.model)

    @cached_property
    def _convolution(self) -> str:
        return next(iter(self.convolutions))

    @property
    def entrance(self) -> str:
        """What the convolution is in: it makes images of the frames."""
        return self._convolution.rpartition(".")[0]

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from (self.model.get_submodule(name) for name in (self.entrance, self._convolution))
        yield from self.norms.values()
        for block in self.blocks.values():
            yield from (block, *_attentions(block).values())

    def _frames(self, recording: Recording) -> tuple[Tensor, Tensor]:
        """What the convolution was given and what it returned, with the frames after the channels."""
        call, batch = recording.call(self._convolution), len(recording.call(self.entrance).input.tensor)
        seen, made = (
            side.tensor.reshape(batch, -1, *side.tensor.shape[1:]).transpose(1, 2) for side in (call.input, call.output)
        )
        return seen, made

    def channel_axis(self, recording: Recording, images: Tensor) -> int:
        return channel_axis(images, self._frames(recording)[0])

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        seen, made = self._frames(recording)
        grid, count = tuple(made.shape[2:]), math.prod(made.shape[2:])
        tokens = stream(recording.call(next(iter(self.blocks))).input.read())
        if tokens.shape[:2] != (len(made), 1 + count):
            raise RecordingError(
                f"the first block saw tokens of shape {tuple(tokens.shape)}; expected a class token and those of a "
                f"grid of {' x '.join(map(str, grid))}, for every video"
            )
        check_prefix_first(recording, 1 + count, 1, seen=True)
        place = place_of_tubelets(self.model, made, tokens, grid, likely=(1, 2, 0))
        ids = torch.arange(count, device=tokens.device) if place is None else place
        steps = [
            step
            for name, block in self.blocks.items()
            for step in _steps(name, block, recording, ids.reshape(grid[0], -1), grid)
        ]
        pooling = pooling_as_read(recording, 1, self.norms, self.blocks)
        patch = (1, *patch_of(self.convolutions[self._convolution], seen.shape[3:], grid[1:]))
        return Trace(self.family, tuple(steps), tokens, 1, grid, patch, pooling, place=place)


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The one list of blocks with two attentions, by name; none if there is no such list or no convolution."""
    lists = lists_of(model, _is_divided)
    images = {name: part for name, part in named(model).items() if isinstance(part, nn.Conv2d)}
    # Behind blocks of one attention, those with two are a decoder's: among its own tokens, and to those of the image.
    if len(lists) != 1 or not reads_images(images) or block_lists(model):
        return {}
    ((name, found),) = lists.items()
    return {f"{name}.{child}".lstrip("."): block for child, block in found.named_children()}


def _is_divided(block: nn.Module) -> bool:
    norms = [child for child in block.children() if isinstance(child, nn.LayerNorm)]
    return len(norms) == 3 and len(_attentions(block)) == 2


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in block.named_children() if has_heads(child)}


def _steps(name: str, block: Any, recording: Recording, ids: Tensor, grid: Grid) -> list[Step]:
    """One block.

    Args:
        name: Its dotted name.
        block: The module.
        recording: The pass.
        ids: Which patch token is at each place of each frame, ``(frame, place)``.
        grid: Frames, rows and columns.
    """
    norms, sites = recording.norms_inside(name), [s for s in recording.sites if s.module.startswith(f"{name}.")]
    if len(norms) != 3 or len(sites) != 2:
        raise RecordingError(f"{len(norms)} norms and {len(sites)} attentions ran in {name!r}; expected 3 and 2")
    over_time, over_space = (
        next(child for child in _attentions(block) if f"{site.module}.".startswith(f"{name}.{child}."))
        for site in sites
    )
    frames, x = len(ids), stream(recording.call(name).input.read())
    batch, count, channels = x.shape
    # What the second norm reads, frame by frame: the class token, then the patches as they are after the first update.
    framed = norms[1].input.read()
    after_both, returned = stream(norms[2].input.read()), stream(recording.call(name).output.read())
    if framed.shape[:2] != (batch * frames, 1 + ids.shape[1]) or after_both.shape != x.shape:
        raise UnsupportedModelError(
            f"{name!r} attends to {tuple(framed.shape)} tokens after its first attention; expected those of one frame "
            f"and the class token, {frames} times a video"
        )
    order = ids.flatten().argsort()
    patches = framed[:, 1:].reshape(batch, count - 1, channels)[:, order].to(x.dtype)
    in_time = torch.cat([x[:, :1], patches], 1)
    in_frames = torch.cat([x[:, :1].expand(-1, frames, -1), patches], 1)
    updates = recording.call(f"{name}.{over_space}").output.read()[:, 0].reshape(batch, frames, channels)
    in_space = torch.cat([in_frames[:, :frames] + updates, after_both[:, 1:]], 1)
    copies = torch.arange(frames, device=ids.device)
    own = torch.arange(frames, frames + count - 1, device=ids.device)
    spread = Groups(torch.cat([copies * 0, own - frames + 1])[:, None])
    alone = F.pad(own[:, None], (0, frames - 1), value=PADDING)
    mean = Groups(torch.cat([copies[None], alone]))
    first, second = (_out(block.get_submodule(child), channels) for child in (over_time, over_space))
    between = tuple(
        FrozenLinear(child.weight, child.bias) for child in block.children() if isinstance(child, nn.Linear)
    )
    time, space = Groups(ids.T + 1, count), Groups(torch.cat([copies[:, None], ids + frames], 1))
    return [
        Block(f"{name}.{over_time}", sites[0], time, x, in_time, in_time, (*first, *between)),
        Transition(f"{name}: class token", spread, in_time, in_frames, grid, lambda u: _to_one(u, frames)),
        Block(f"{name}.{over_space}", sites[1], space, in_frames, in_space, in_space, second),
        Transition(f"{name}: mean of it", mean, in_space, after_both, grid, lambda u: _to_each(u, frames)),
        Update(f"{name}: MLP", after_both, returned),
    ]


def _out(attention: nn.Module, channels: int) -> tuple[FrozenMap, ...]:
    """The Linear from the joined heads to the update."""
    linear = [part for part in layers(attention, nn.Linear) if part.out_features == channels][-1]
    return (FrozenLinear(linear.weight, linear.bias),)


def _to_one(u: Cotangent, frames: int) -> tuple[Cotangent, Tensor]:
    """Of the class token, from those of its copies in every frame: their sum."""
    dense = u.spread(u.dense())
    one = torch.cat([dense[:, :frames].sum(1, keepdim=True), dense[:, frames:]], 1)
    return Cotangent.of(one), u.scale.new_zeros(len(one), u.scores)


def _to_each(u: Cotangent, frames: int) -> tuple[Cotangent, Tensor]:
    """Of its copies, from that of their mean."""
    dense = u.spread(u.dense())
    each = torch.cat([(dense[:, :1] / frames).expand(-1, frames, -1, -1), dense[:, 1:]], 1)
    return Cotangent.of(each), u.scale.new_zeros(len(each), u.scores)
