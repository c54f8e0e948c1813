"""ViT-like models of timm: one sequence of prefix and patch tokens through all blocks.

What timm's own attributes say no structure shows: patches cut by a Linear (NaFlex), images padded to whole patches,
attention that pools prefix tokens too, and how the head reads where the scores leave no graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError
from captum_lnstat.layout import Grid, WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import check_one_row_an_image, check_prefix_first, convolutions, grid_of
from captum_lnstat.topology.anatomy.joining import with_new_tokens
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS, is_residual_block
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.base import Topology, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block
from captum_lnstat.trace.pooling import AttentionPooling, FixedPooling, Pooling
from captum_lnstat.trace.trace import Trace


@register_topology
class PlainTopology(Topology):
    """Prefix tokens (class, distillation, registers), then patch tokens row by row; attention among all of them."""

    family = "plain"
    expects = f"patch_embed or embeds, blocks with {BLOCK_PARTS}, num_prefix_tokens, norm and global_pool"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        blocks = getattr(model, "blocks", None)
        embedding = getattr(model, _embedding(model), None)
        return (
            isinstance(getattr(model, "norm", None), nn.Module)
            and isinstance(embedding, nn.Module)
            and hasattr(model, "num_prefix_tokens")
            and hasattr(model, "global_pool")
            and (hasattr(embedding, "grid_size") or hasattr(embedding, "dynamic_feat_size"))
            and isinstance(blocks, nn.Sequential | nn.ModuleList)
            and len(blocks) > 0
            and all(map(is_residual_block, blocks))
        )

    @property
    def entrance(self) -> str:
        return _embedding(self.model)

    @property
    def _embed(self) -> Any:
        return getattr(self.model, self.entrance)

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield self._embed
        yield from list(convolutions(self._embed).values())[-1:]
        yield self.model.norm
        for block in self.model.blocks:
            yield from block_taps(block)

    @property
    def places(self) -> Iterable[nn.Module]:
        blocks: Iterable[nn.Module] = self.model.blocks
        return blocks

    @property
    def head_follows(self) -> nn.Module:
        last: nn.Module = self.model.blocks[-1]
        return last

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        model, own = self.model, int(self.model.num_prefix_tokens)
        layout = WholeImage()
        named = {f"blocks.{name}": block for name, block in model.blocks.named_children()}
        ran = recording.up_to_the_last(list(named))
        blocks = tuple(residual_block(name, named[name], recording, layout) for name in ran)
        tokens = blocks[0].before
        grid = self._grid(recording, image_size)
        prefix = tokens.shape[1] - grid[0] * grid[1]
        if prefix < own:
            check_one_row_an_image(recording, self.entrance, tokens)
            raise RecordingError(
                f"the first block saw {tokens.shape[1]} tokens; expected {own} prefix tokens and a grid of "
                f"{grid[0]} x {grid[1]}. Tokens that were dropped (patch dropout, in train mode) cannot be placed on "
                "the image"
            )
        # More than the model's own are prompts, that someone joined before the patches.
        check_prefix_first(recording, tokens.shape[1], prefix, seen=prefix > own)
        steps, covers = with_new_tokens(blocks, recording, grid)
        end, names = steps[-1].after, [block.name for block in blocks]
        set_to, at_head = self._set_to(recording, own, end), end.shape[1] - grid[0] * grid[1]
        pooling = pooling_as_read(recording, at_head, ["norm"], names, set_to=set_to)
        return Trace(self.family, steps, tokens, prefix, grid, self._patch(), pooling, covers=covers)

    def _grid(self, recording: Recording, image_size: tuple[int, int]) -> Grid:
        """What the last convolution returned; without one, what the embedding makes of an image of this size."""
        last = list(convolutions(self._embed))[-1:]
        if last:
            return grid_of(recording, f"{self.entrance}.{last[0]}")
        size = getattr(self._embed, "dynamic_feat_size", None)
        height, width = size(image_size) if callable(size) else self._embed.grid_size
        return int(height), int(width)

    def _patch(self) -> tuple[int, int]:
        """A patch in pixels; behind a stem of convolutions, ``patch_size`` is one in the stem's cells."""
        ratio = getattr(self._embed, "feat_ratio", None)
        height, width = ratio(as_scalar=False) if callable(ratio) else self._embed.patch_size
        return int(height), int(width)

    def _set_to(self, recording: Recording, prefix: int, tokens: Tensor) -> Pooling | None:
        """The pooling that the model is set to; ``None`` for one that no weights of the tokens stand for."""
        model, count = self.model, tokens.shape[1]
        weights = tokens.new_zeros(count)
        if isinstance(getattr(model, "head_dist", None), nn.Module):
            weights[:2] = 0.5
            return FixedPooling("class and distillation token", weights)
        if model.global_pool == "token":
            weights[0] = 1.0
            return FixedPooling("class token", weights)
        if model.global_pool == "avg":
            skipped = 0 if getattr(model, "pool_include_prefix", False) else prefix
            weights[skipped:] = 1 / (count - skipped)
            return FixedPooling("mean of the tokens" if skipped < prefix else "mean of the patches", weights)
        if model.global_pool == "map":
            found = [site for site in recording.sites if f"{site.module}.".startswith("attn_pool.")]
            # Some of timm's models pool their prefix tokens too, whatever their options are: the keys show it.
            skipped = count - found[0].shape[3] if len(found) == 1 else -1
            return AttentionPooling("attention pooling", found[0], skipped) if skipped in (0, prefix) else None
        return None


def _embedding(model: nn.Module) -> str:
    """Name of the module that turns images into tokens."""
    return "patch_embed" if isinstance(getattr(model, "patch_embed", None), nn.Module) else "embeds"
