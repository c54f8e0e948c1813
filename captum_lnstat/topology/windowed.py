"""Swin v1 and v2: attention in shifted windows, stages joined by patch mergings (timm ``SwinTransformer``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.frozen import FrozenLinear, FrozenMap, FrozenNorm
from captum_lnstat.layout import quads, windows
from captum_lnstat.recording import Recording
from captum_lnstat.topology.base import Topology, register_topology
from captum_lnstat.topology.residual import BLOCK_PARTS, block_taps, is_residual_block, residual_block, stream
from captum_lnstat.trace import Block, FixedPooling, Merging, Trace


@register_topology
class WindowedTopology(Topology):
    """Stages of window-attention blocks; each further stage begins with a 2 x 2 patch merging."""

    family = "windowed"
    expects = (
        f"patch_embed, layers of blocks with {BLOCK_PARTS}, window_size and shift_size, patch mergings with norm and "
        "reduction, norm and a mean over the tokens"
    )

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        layers = getattr(model, "layers", None)
        if not isinstance(layers, nn.Sequential | nn.ModuleList) or len(layers) == 0:
            return False
        blocks = [block for stage in layers for block in getattr(stage, "blocks", [None])]
        return (
            all(isinstance(getattr(model, name, None), nn.Module) for name in ("patch_embed", "norm", "head"))
            and all(isinstance(block, nn.Module) and is_residual_block(block) for block in blocks)
            and all(hasattr(block, "window_size") and hasattr(block, "shift_size") for block in blocks)
            and all(_is_merging(stage.downsample) or _is_nothing(stage.downsample) for stage in layers)
        )

    def _stages(self) -> Iterator[tuple[str, Any]]:
        for name, stage in self.model.layers.named_children():
            yield f"layers.{name}", stage

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield self.model.patch_embed
        for _, stage in self._stages():
            if not _is_nothing(stage.downsample):
                yield stage.downsample
            for block in stage.blocks:
                yield from block_taps(block)

    @property
    def head_begins(self) -> nn.Module:
        head: nn.Module = self.model.norm
        return head

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        steps: list[Block | Merging] = []
        grids: list[tuple[int, int]] = []
        for name, stage in self._stages():
            if not _is_nothing(stage.downsample):
                steps.append(_merging(f"{name}.downsample", stage.downsample, recording))
            for child, block in stage.blocks.named_children():
                block_name = f"{name}.blocks.{child}"
                tokens = recording.call(block_name).input.read()
                grid = _grid(tokens)
                grids.append(grid)
                layout = windows(grid, block.window_size, block.shift_size, tokens.device)
                steps.append(residual_block(block_name, block, recording, layout))
        first = steps[0].before if isinstance(steps[0], Block) else steps[0].children
        height, width = self.model.patch_embed.patch_size
        pooling = self._pooling(steps[-1])
        return Trace(self.family, tuple(steps), first, 0, grids[0], (height, width), pooling)

    def _pooling(self, last: Block | Merging) -> FixedPooling:
        pool = getattr(self.model, "global_pool", None)
        if pool != "avg" or not isinstance(last, Block):
            raise UnsupportedModelError(
                f"global_pool={pool!r} of {type(self.model).__name__}: where class-agnostic relevance starts is "
                "defined for 'avg' after a last block only"
            )
        count = last.before.shape[1]
        return FixedPooling("mean of the tokens", last.before.new_full((count,), 1 / count))


def _is_nothing(module: object) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _is_merging(module: object) -> bool:
    return isinstance(getattr(module, "reduction", None), nn.Linear) and isinstance(
        getattr(module, "norm", None), nn.Module
    )


def _grid(tokens: Tensor) -> tuple[int, int]:
    if tokens.dim() != 4:
        raise RecordingError(
            f"a window block was given tokens of shape {tuple(tokens.shape)}; expected (batch, rows, columns, channels)"
        )
    return tokens.shape[1], tokens.shape[2]


def _merging(name: str, module: Any, recording: Recording) -> Merging:
    """Swin v1 normalises the joined children, then reduces them; Swin v2 reduces them, then normalises the parent."""
    call, norm = recording.call(name), recording.norm(f"{name}.norm").frozen
    children = call.input.read()
    reduction: nn.Linear = module.reduction
    linear = FrozenLinear(reduction.weight, reduction.bias)
    flat = FrozenNorm(norm.deviation.flatten(1), norm.gamma, norm.beta)
    norm_first = recording.norm(f"{name}.norm").input.tensor.shape[-1] == reduction.in_features
    path: tuple[FrozenMap, ...] = (flat, linear) if norm_first else (linear, flat)
    if reduction.in_features == reduction.out_features:
        raise UnsupportedModelError(
            f"{name} keeps its width of {reduction.in_features} channels, so it cannot be told whether its norm comes "
            "before or after the reduction"
        )
    groups = quads(_grid(children), children.device)
    return Merging(name, groups, stream(children), path, norm_first, reduction.weight.detach())
