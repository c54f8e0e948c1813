"""Swin and its relatives: attention in shifted windows, stages joined by 2 x 2 patch mergings; Video Swin among them.

Found by structure: a convolution that cuts the image into patches, blocks that know a window and a shift, mergings
with a norm and a reduction, a last LayerNorm. Tokens may be a map ``(batch, rows, columns, channels)`` or a sequence
``(batch, tokens, channels)``; of a video, ``(batch, frames, rows, columns, channels)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Grid, Groups, quads, windows
from captum_lnstat.recording.eager import eager
from captum_lnstat.recording.recording import Recording
from captum_lnstat.recording.statistics import stream
from captum_lnstat.topology.anatomy.embedding import convolutions, grid_of, names_of, outside
from captum_lnstat.topology.anatomy.once import once
from captum_lnstat.topology.anatomy.parts import BLOCK_PARTS, channels_of, is_residual_block
from captum_lnstat.topology.anatomy.pooling import pooling_as_read
from captum_lnstat.topology.anatomy.projections import Projection, projections
from captum_lnstat.topology.anatomy.volumes import channel_axis, sizes, tubelet_convolutions
from captum_lnstat.topology.base import Topology, register_topology
from captum_lnstat.topology.residual import block_taps, residual_block, trailing_norm
from captum_lnstat.trace.maps import FrozenMap, FrozenNorm
from captum_lnstat.trace.pooling import FixedPooling, Pooling, UndefinedPooling
from captum_lnstat.trace.steps import Merging, Step
from captum_lnstat.trace.trace import Trace


@register_topology
class WindowedTopology(Topology):
    """Stages of window-attention blocks, a 2 x 2 patch merging between one stage and the next."""

    family = "windowed"
    expects = (
        f"a patch convolution, blocks with {BLOCK_PARTS}, window_size and shift_size, patch mergings with norm and "
        "reduction"
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._steps = _steps_of(model)
        self._names = names_of(model)
        self._patches: Any = _patch_convolution(model)
        self._last_norm = _last_norm(model)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        steps = _steps_of(model)
        if not _is_swin(model, steps):
            return False
        inner = _outside(model, steps)
        return not any(_is_swin(module, _steps_in(module, steps)) for module in inner if module._modules)

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from (self._patches, _entrance(self.model))
        if self._last_norm is not None:
            yield self._last_norm
        for step in self._steps:
            yield from [step] if _is_merging(step) else block_taps(step)

    @property
    def places(self) -> Iterable[nn.Module]:
        return self._steps

    @property
    def entrance(self) -> str:
        return self._names[id(_entrance(self.model))]

    @property
    def head_follows(self) -> nn.Module:
        last: nn.Module = self._steps[-1]
        return last

    @property
    def axes(self) -> int:
        return len(self._patches.kernel_size)

    def channel_axis(self, recording: Recording, images: Tensor) -> int:
        if self.axes == 2:
            return 1
        return channel_axis(images, recording.call(self._names[id(self._patches)]).input.tensor)

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        grid = first_grid = grid_of(recording, self._names[id(self._patches)])
        steps: list[Step] = []
        ran = recording.up_to_the_last([self._names[id(module)] for module in self._steps])
        for name, module in zip(ran, self._steps, strict=False):
            tokens = recording.call(name).input.read()
            _check_grid(name, tokens, grid)
            if _is_merging(module):
                steps.append(_merging(name, module, recording, grid))
                grid = steps[-1].grid_after(grid)
            else:
                steps.append(residual_block(name, module, recording, _layout(module, tokens, grid)))
                last = trailing_norm(name, module, recording, grid)
                steps += [] if last is None else [last]
        pooling = self._pooling(recording, ran[-1])
        return Trace(self.family, tuple(steps), steps[0].before, 0, first_grid, self._patches.kernel_size, pooling)

    def _pooling(self, recording: Recording, last: str) -> Pooling:
        norms = [] if self._last_norm is None else [self._names[id(self._last_norm)]]
        set_to: Pooling | None = None
        if _pools_by_mean(self.model):
            tokens = stream(recording.call(last).output.read())
            weights = tokens.new_full((tokens.shape[1],), 1 / tokens.shape[1])
            set_to = FixedPooling("mean of the tokens", weights)
        elif recording.scores is None or not recording.scores.requires_grad:
            set_to = UndefinedPooling(
                "not seen",
                f"how {type(self.model).__name__} reads its tokens cannot be seen: it has no average pooling, and "
                "forward_func leaves the graph after it; expected one or the other",
            )
        return pooling_as_read(recording, 0, norms, set_to=set_to)


@once
def _steps_of(model: nn.Module) -> list[Any]:
    """The blocks and mergings inside ``model``, in order, without looking for more inside them."""
    found: list[Any] = []
    for child in model.children():
        found += [child] if _is_step(child) else _steps_of(child)
    return found


def _steps_in(module: nn.Module, steps: list[Any]) -> list[Any]:
    """Those of ``steps`` that are inside ``module``."""
    inside = set(module.modules())
    return [step for step in steps if step in inside]


def _outside(model: nn.Module, steps: list[Any]) -> list[nn.Module]:
    """The modules inside ``model`` that are no part of a step, in order."""
    return [module for module in outside(model, steps, nn.Module).values() if module is not model]


def _is_step(module: nn.Module) -> bool:
    return _is_merging(module) or (_window_owner(module) is not None and is_residual_block(module))


def _window_owner(block: Any) -> Any:
    """Who cuts the windows: the block, or its attention."""
    return next(
        (part for part in (block, *block.children()) if hasattr(part, "window_size") and hasattr(part, "shift_size")),
        None,
    )


def _is_merging(module: object) -> bool:
    reduction = _reduction(module)
    norm = getattr(module, "norm", None)
    return reduction is not None and isinstance(norm, nn.Module) and not reduction.in_features % 4


def _reduction(module: object) -> Projection | None:
    found = projections(module) if isinstance(module, nn.Module) and hasattr(module, "reduction") else []
    return next((one for one in found if one.name == "reduction"), None)


@once
def _patch_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The first convolution outside the steps, if it cuts the image into patches that do not overlap."""
    steps = _steps_of(model)
    first: nn.Conv2d | nn.Conv3d | None = next(iter(convolutions(model, steps).values()), None)
    first = first or next(iter(tubelet_convolutions(model, steps).values()), None)
    return first if first is not None and first.kernel_size == first.stride else None


@once
def _entrance(model: nn.Module) -> nn.Module:
    """What holds the patch convolution and nothing else of the model: it may pad the images before."""
    patches: Any = _patch_convolution(model)
    found: nn.Module = patches
    for module in model.modules():
        if module is not model and patches in module._modules.values():
            found = found if _steps_in(module, _steps_of(model)) else module
    return found


def _last_norm(model: nn.Module) -> nn.Module | None:
    return next((child for child in model.children() if channels_of(eager(child)) is not None), None)


def _is_swin(model: nn.Module, steps: list[Any]) -> bool:
    """Whether all the parts are in ``model``, its own last norm among them (or missing, in a model of features)."""
    if all(map(_is_merging, steps)):
        return False
    if _patch_convolution(model) is None:
        return False
    return _last_norm(model) is not None or not isinstance(model, nn.Sequential)


@once
def _pools_by_mean(model: nn.Module) -> bool:
    """Whether an average pooling is all that the head is set to: torch's own, or one of several kinds of pooling."""
    pools = _outside(model, _steps_of(model))
    average = any(
        isinstance(pool, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d) for pool in pools
    )
    average = average or any(getattr(pool, "pool_type", None) == "avg" for pool in pools)
    return average and getattr(model, "global_pool", "avg") == "avg"


def _check_grid(name: str, tokens: Tensor, grid: Grid) -> None:
    shape = tuple(tokens.shape[1:-1])
    if shape not in (grid, (math.prod(grid),)):
        raise RecordingError(
            f"{name!r} was given tokens of shape {tuple(tokens.shape)}; expected (batch, "
            f"{', '.join(map(str, grid))}, channels) or (batch, {math.prod(grid)}, channels)"
        )


def _layout(block: Any, tokens: Tensor, grid: Grid) -> Groups:
    """The windows of a block. Who cuts them decides what is done where a grid is not whole windows.

    A block that is given a map rolls it, then pads. A block that is given a sequence pads, then rolls; so does an
    attention that cuts its own windows, and it drops the shift of an axis that one window covers. On videos both do
    what the latter does, and a window is no longer than the grid along any axis.
    """
    owner, video = _window_owner(block), len(grid) == 3
    window, shift = sizes(owner.window_size, len(grid)), sizes(owner.shift_size, len(grid))
    if owner is not block or video:
        shift = tuple(0 if size <= side else step for size, side, step in zip(grid, window, shift, strict=True))
    if video:
        window = tuple(map(min, grid, window))
    pad_first = owner is not block or video or tokens.dim() == 3
    return windows(grid, window, shift, tokens.device, pad_first=pad_first)


def _merging(name: str, module: Any, recording: Recording, grid: Grid) -> Merging:
    """Swin v1 normalises the joined children, then reduces them; Swin v2 reduces them, then normalises the parent."""
    norm = FrozenNorm.of(recording.norm(f"{name}.norm"))
    children = recording.call(name).input.read()
    reduction: Any = _reduction(module)
    linear = reduction.map(name, children)
    norm_first = recording.norm(f"{name}.norm").input.tensor.shape[-1] == reduction.in_features
    path: tuple[FrozenMap, ...] = (norm, linear) if norm_first else (linear, norm)
    if reduction.in_features == reduction.out_features:
        raise UnsupportedModelError(
            f"{name} keeps its width of {reduction.in_features} channels, so it cannot be told whether its norm comes "
            "before or after the reduction"
        )
    if reduction.in_features != 4 * children.shape[-1]:
        raise UnsupportedModelError(
            f"{name} joins {reduction.in_features / children.shape[-1]:g} tokens of {children.shape[-1]} channels; "
            "expected 2 x 2, in videos those of one frame"
        )
    groups, after = quads(grid, children.device), stream(recording.call(name).output.read())
    merged, weight = (*grid[:-2], (grid[-2] + 1) // 2, (grid[-1] + 1) // 2), linear.weight.detach()
    return Merging(name, groups, stream(children), path, norm_first, weight, after, merged, norm.centred)
