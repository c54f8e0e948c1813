"""CaiT: patches among themselves under talking heads, then a class token that alone attends to all of them.

Talking heads mix the maps of the heads before and after the softmax, ``A = W softmax(V q k^T)``: what multiplies the
values is ``A``, whose rows need not sum to one and whose entries may be negative. Evidence, the gradient rule and the
share of an update's variance take ``A`` as it is. A fusion of the maps alone takes the positive part of the head mean,
each row divided by its sum; what was subtracted does not count. (A row without a positive entry takes its size.)

The class token joins late. In the stream of the trace it is there from the start, and takes no part until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Groups, WholeImage
from captum_lnstat.recording.eager import named
from captum_lnstat.recording.kept import Kept, edge
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.sites import SoftmaxSite
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import (
    block_lists,
    convolutions,
    grid_of,
    patch_of,
    reads_images,
)
from captum_lnstat.topology.anatomy.parts import parts_of
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.projections import projections
from captum_lnstat.topology.base import BlockTopology, register_topology
from captum_lnstat.topology.residual import block_taps, norms_in_order, path_to_update, residual_block
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace


@register_topology
class ClassAttentionTopology(BlockTopology):
    """A list of talking-head blocks on the patches, then one of class-attention blocks."""

    family = "class-attention"
    expects = (
        "a convolution that makes the patches, a list of residual blocks whose attention mixes its heads by two "
        "Linears of heads x heads, and a list of residual blocks that are given the patches and the class token"
    )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        lists = list(block_lists(model).values())
        if len(lists) != 2 or not reads_images(convolutions(model, lists)):
            return False
        talking, attending = ([_mixers(block) for block in blocks.children()] for blocks in lists)
        return all(len(mixers) == 2 for mixers in talking) and not any(attending)

    @cached_property
    def _lists(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        talking, attending = (
            {f"{name}.{child}": block for child, block in blocks.named_children()}
            for name, blocks in block_lists(self.model).items()
        )
        return talking, attending

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        talking, attending = self._lists
        return {**talking, **attending}

    @property
    def taps(self) -> Iterable[nn.Module]:
        talking, attending = self._lists
        yield from self.convolutions.values()
        yield self.head_begins
        for block in attending.values():
            yield from block_taps(block)
        for block in talking.values():
            parts = parts_of(block)
            yield from (block, parts.out.module, _joined_projection(block), *_mixers(block).values())

    @property
    def head_begins(self) -> nn.Module:
        if len(self.norms) != 1:
            raise UnsupportedModelError(
                f"{len(self.norms)} LayerNorms outside the blocks of {type(self.model).__name__}; expected one, at the "
                "head"
            )
        return next(iter(self.norms.values()))

    @property
    def head_follows(self) -> None:
        return None

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        grid = grid_of(recording, [name for name in self.convolutions if name in recording.calls][-1])
        patch = patch_of(self.convolutions, recording, grid, image_size)
        talking, attending = self._lists
        starts = [norms_in_order(name, parts_of(block), recording)[0] for name, block in attending.items()]
        class_token = stream(starts[0].input.read())[:, :1]
        blocks = [self._talking(name, block, recording, class_token) for name, block in talking.items()]
        patches = blocks[-1].after[:, 1:]
        if patches.shape[1] != grid[0] * grid[1] or starts[0].input.tensor.shape[1] != patches.shape[1] + 1:
            raise RecordingError(
                f"the blocks saw {patches.shape[1]} patches and the class attention {starts[0].input.tensor.shape[1]} "
                f"tokens; expected a grid of {grid[0]} x {grid[1]} and one class token"
            )
        blocks += [self._class_attention(name, block, recording, patches) for name, block in attending.items()]
        pooling = pooling_as_read(recording, 1, self.norms)
        return Trace(self.family, tuple(blocks), blocks[0].before, 1, grid, patch, pooling)

    def _talking(self, name: str, block: nn.Module, recording: Recording, class_token: Tensor) -> Block:
        """A block of the patches; the class token stands beside it."""
        site = _talking_site(name, block, recording)
        traced = residual_block(name, block, recording, WholeImage(), site)
        count = traced.before.shape[1] + 1
        layout = Groups(torch.arange(1, count, device=class_token.device)[None], tokens=count)
        before, between, after = (
            torch.cat([class_token, tokens], 1) for tokens in (traced.before, traced.between, traced.after)
        )
        return replace(traced, layout=layout, before=before, between=between, after=after)

    def _class_attention(self, name: str, block: nn.Module, recording: Recording, patches: Tensor) -> Block:
        """A block in which the class token attends to all tokens, and only it is updated."""
        parts, site = parts_of(block), recording.site(name)
        first, second = norms_in_order(name, parts, recording)
        before = stream(first.input.read())
        between, after = (
            torch.cat([stream(token.read()), patches], 1) for token in (second.input, recording.call(name).output)
        )
        query = Groups(torch.zeros(1, 1, dtype=torch.long, device=patches.device), tokens=before.shape[1])
        path = path_to_update(name, parts, site, recording)
        return Block(name, site, query, before, between, after, path, keys=WholeImage(), centred=second.centred)


@dataclass(frozen=True)
class TalkingSite(SoftmaxSite):
    """Maps of heads mixed after the softmax; ``output`` is the joined heads, ``(batch, query, channel)``."""

    signed: ClassVar[bool] = True

    def output_gradient(self, gradient: Tensor) -> Tensor:
        return _by_head(gradient, self.shape[1])


def _by_head(joined: Tensor, heads: int) -> Tensor:
    return joined.reshape(*joined.shape[:-1], heads, -1).transpose(1, 2)


def _mixers(block: nn.Module) -> dict[str, nn.Module]:
    """The Linears of an attention that map heads to heads, by their names in the block."""
    parts = parts_of(block)
    attention = block.get_submodule(parts.attention)
    heads = getattr(attention, "num_heads", None)
    return {
        f"{parts.attention}.{part.name}": part.module
        for part in projections(attention)
        if part.in_features == part.out_features == heads and part.module is not parts.out.module
    }


def _joined_projection(block: nn.Module) -> nn.Module:
    """The Linear that makes queries, keys and values in one."""
    parts = parts_of(block)
    linears = projections(block.get_submodule(parts.attention))
    found = [linear for linear in linears if linear.out_features == 3 * parts.out.in_features]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{len(found)} Linears of an attention with talking heads make {3 * parts.out.in_features} channels; "
            "expected one, for queries, keys and values"
        )
    return found[0].module


def _talking_site(name: str, block: nn.Module, recording: Recording) -> TalkingSite:
    parts = parts_of(block)
    within = {id(module): f"{name}.{inner}" for inner, module in named(block).items()}
    softmax = recording.site(f"{name}.{parts.attention}")
    if not isinstance(softmax, SoftmaxSite):
        raise RecordingError(f"talking heads at {name!r} without a softmax of their own; expected one")
    at = softmax.attention.tensor.data_ptr()
    mixing = [recording.call(f"{name}.{mixer}") for mixer in _mixers(block)]
    after = [call for call in mixing if call.input.tensor.data_ptr() == at]
    if len(after) != 1:
        raise RecordingError(f"of the heads' mixings at {name!r} {len(after)} read the softmax; expected one")
    mixed = after[0].output.read().permute(0, 3, 1, 2)
    joined = recording.call(within[id(_joined_projection(block))]).output.read()
    value = _by_head(joined.chunk(3, -1)[2], mixed.shape[1])
    output = edge(recording.call(within[id(parts.out.module)]).input.tensor)
    return TalkingSite(softmax.module, Kept.of(mixed), Kept.of(value), output)
