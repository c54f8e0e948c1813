"""Plain encoders of videos, VideoMAE and ViViT among them: tubelets, one list of residual blocks, a head of any kind.

Nothing is looked up by name. The grid is what the one convolution over frames, rows and columns returned; prefix tokens
are those that the first block sees beyond it; the order of the tokens is the one in which they are the convolution's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import block_lists, check_prefix_first, grid_of
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.volumes import channel_axis, patch_of, place_of_tubelets, tubelet_convolutions
from captum_lnstat.topology.base import BlockTopology, innermost, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block
from captum_lnstat.trace.trace import Trace


@register_topology
class VideoTopology(BlockTopology):
    """Prefix tokens, then tubelet tokens through one list of blocks; attention among all of them."""

    family = "video"
    expects = f"a convolution over frames, rows and columns and one list of blocks with {BLOCK_PARTS}"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return innermost(model, _holds_encoder)

    @property
    def axes(self) -> int:
        return 3

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        ((name, blocks),) = block_lists(self.model).items()
        return {f"{name}.{child}".lstrip("."): block for child, block in blocks.named_children()}

    @property
    def entrance(self) -> str:
        return next(iter(tubelet_convolutions(self.model, self.blocks.values())))

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield self.model.get_submodule(self.entrance)
        yield from self.norms.values()
        for block in self.blocks.values():
            yield from block_taps(block)

    def channel_axis(self, recording: Recording, images: Tensor) -> int:
        return channel_axis(images, recording.call(self.entrance).input.tensor)

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        self._check_attention(recording)
        grid, cut = grid_of(recording, self.entrance), self.model.get_submodule(self.entrance)
        patch = patch_of(cut, recording.call(self.entrance).input.tensor.shape[2:], grid)
        blocks = tuple(residual_block(name, block, recording, WholeImage()) for name, block in self.blocks.items())
        tokens = blocks[0].before
        prefix = tokens.shape[1] - math.prod(grid)
        if prefix < 0 or len(tokens) != len(recording.call(self.entrance).input.tensor):
            raise RecordingError(
                f"the first block saw tokens of shape {tuple(tokens.shape)}; expected those of a grid of "
                f"{' x '.join(map(str, grid))} and prefix tokens before them, for every video. Tokens that were "
                "dropped, merged or divided among several passes cannot be placed on it"
            )
        check_prefix_first(recording, tokens.shape[1], prefix, seen=True)
        place = place_of_tubelets(self.model, recording.call(self.entrance).output.tensor, tokens, grid)
        pooling = pooling_as_read(recording, prefix, self.norms, self.blocks)
        return Trace(self.family, blocks, tokens, prefix, grid, patch, pooling, place=place)

    def _check_attention(self, recording: Recording) -> None:
        """Attention has to be among all tokens of the stream."""
        for name in self.blocks:
            tokens, (_, _, *seen) = recording.call(name).input.tensor, recording.site(name).shape
            if tokens.dim() != 3 or seen != [tokens.shape[1]] * 2:
                raise UnsupportedModelError(
                    f"the attention of {name!r} is {seen[0]} x {seen[1]}, the block was given {tuple(tokens.shape)}; "
                    "expected attention among all tokens of a video. Where queries or keys are pooled (MViT), or "
                    "frames are attended to by themselves, relevance in a video is not defined yet"
                )


def _holds_encoder(model: nn.Module) -> bool:
    lists = block_lists(model)
    return len(lists) == 1 and len(tubelet_convolutions(model, lists.values())) == 1
