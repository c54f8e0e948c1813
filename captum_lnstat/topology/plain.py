"""ViT-like models of timm: one sequence of prefix and patch tokens through all blocks.

What timm's own attributes say no structure shows: patches cut by a Linear (NaFlex), images padded to whole patches,
attention that pools prefix tokens too, and how the head reads where the scores leave no graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, WholeImage
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.embedding import check_prefix_first, convolutions, grid_of
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS, is_residual_block
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
        for block in self.model.blocks:
            yield from block_taps(block)

    @property
    def places(self) -> Iterable[nn.Module]:
        blocks: Iterable[nn.Module] = self.model.blocks
        return blocks

    @property
    def head_begins(self) -> nn.Module:
        head: nn.Module = self.model.norm
        return head

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        model, prefix = self.model, int(self.model.num_prefix_tokens)
        layout = WholeImage()
        blocks = tuple(
            residual_block(f"blocks.{name}", block, recording, layout) for name, block in model.blocks.named_children()
        )
        tokens = blocks[0].before
        grid = self._grid(recording, image_size)
        if tokens.shape[1] != prefix + grid[0] * grid[1]:
            raise RecordingError(
                f"the first block saw {tokens.shape[1]} tokens; expected {prefix} prefix tokens and a grid of "
                f"{grid[0]} x {grid[1]}. Tokens that were dropped or added (patch dropout, in train mode) cannot be "
                "placed on the image"
            )
        check_prefix_first(recording, tokens.shape[1], prefix, seen=False)
        pooling = self._pooling(recording, prefix, tokens)
        return Trace(self.family, blocks, tokens, prefix, grid, self._patch(), pooling)

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

    def _pooling(self, recording: Recording, prefix: int, tokens: Tensor) -> Pooling:
        model, count = self.model, tokens.shape[1]
        weights = tokens.new_zeros(count)
        if isinstance(getattr(model, "head_dist", None), nn.Module):
            weights[:2] = 0.5
            return FixedPooling("class and distillation token", weights)
        if model.global_pool == "token":
            weights[0] = 1.0
            return FixedPooling("class token", weights)
        skipped = 0 if getattr(model, "pool_include_prefix", False) else prefix
        if model.global_pool == "avg":
            weights[skipped:] = 1 / (count - skipped)
            return FixedPooling("mean of the tokens" if skipped < prefix else "mean of the patches", weights)
        if model.global_pool == "map":
            site = recording.site("attn_pool")
            # Some of timm's models pool their prefix tokens too, whatever their options are: the keys show it.
            skipped = count - site.shape[3]
            if skipped not in (0, prefix):
                raise RecordingError(
                    f"attention pooling reads {site.shape[3]} of {count} tokens; expected all, or those after "
                    f"{prefix} prefix tokens"
                )
            return AttentionPooling("attention pooling", site, skipped)
        raise UnsupportedModelError(
            f"global_pool={model.global_pool!r} of {type(model).__name__}: where class-agnostic relevance starts is "
            "defined for 'token', 'avg' and 'map' only"
        )


def _embedding(model: nn.Module) -> str:
    """Name of the module that turns images into tokens."""
    return "patch_embed" if isinstance(getattr(model, "patch_embed", None), nn.Module) else "embeds"
