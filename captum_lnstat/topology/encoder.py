"""Plain encoders of any library: an embedding with convolutions, one list of residual blocks, a head of any kind.

Nothing is looked up by name. The grid is the shape of what the last convolution of the embedding returned, prefix
tokens are those that the first block sees beyond it, and how the head reads the tokens is seen from its gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from torch import Tensor, nn

from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import WholeImage
from captum_lnstat.recording import Recording
from captum_lnstat.topology.base import Topology, register_topology
from captum_lnstat.topology.parts import find_parts
from captum_lnstat.topology.reading import pooling_as_read
from captum_lnstat.topology.residual import BLOCK_PARTS, block_taps, residual_block
from captum_lnstat.trace import Trace


@register_topology
class EncoderTopology(Topology):
    """Prefix tokens, then patch tokens row by row, through one list of blocks; attention among all of them."""

    family = "plain"
    expects = f"a convolution that makes the patches, one list of blocks with {BLOCK_PARTS}"

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        # The smallest module that holds both, not a wrapper of it.
        return _holds_encoder(model) and not any(_holds_encoder(child) for child in model.children())

    @cached_property
    def _blocks(self) -> dict[str, nn.Module]:
        (name, blocks), *_ = _block_lists(self.model).items()
        return {f"{name}.{child}".lstrip("."): block for child, block in blocks.named_children()}

    @cached_property
    def _convolutions(self) -> dict[str, nn.Conv2d]:
        return _convolutions(self.model, _block_lists(self.model))

    @cached_property
    def _norms(self) -> dict[str, nn.Module]:
        inside = {id(part) for block in self._blocks.values() for part in block.modules()}
        return {
            name: module
            for name, module in _named(self.model).items()
            if isinstance(module, nn.LayerNorm) and id(module) not in inside
        }

    @property
    def taps(self) -> Iterable[nn.Module]:
        yield from self._convolutions.values()
        yield from self._norms.values()
        for block in self._blocks.values():
            yield from block_taps(block)

    @property
    def entrance(self) -> str:
        return next(iter(self._convolutions))

    @property
    def head_follows(self) -> nn.Module:
        return list(self._blocks.values())[-1]

    def trace(self, recording: Recording, image_size: tuple[int, int]) -> Trace:
        for name in self._blocks:
            shape = tuple(recording.call(name).input.tensor.shape)
            if len(shape) != 3 or shape[0] != len(recording.call(self.entrance).input.tensor):
                raise UnsupportedModelError(f"{name!r} was given {shape}; expected (batch, tokens, channels)")
        layout = WholeImage()
        blocks = tuple(residual_block(name, block, recording, layout) for name, block in self._blocks.items())
        tokens = blocks[0].before
        grid, patch = self._grid(recording, image_size)
        prefix = tokens.shape[1] - grid[0] * grid[1]
        if prefix < 0:
            raise RecordingError(
                f"the first block saw {tokens.shape[1]} tokens; expected a grid of {grid[0]} x {grid[1]} and "
                "prefix tokens. Tokens that were dropped or merged cannot be placed on the image"
            )
        sites = [site for site in recording.sites if not any(_inside(site.module, name) for name in self._blocks)]
        pooling = pooling_as_read(recording, prefix, self._normed(recording), sites)
        return Trace(self.family, blocks, tokens, prefix, grid, patch, pooling)

    def _normed(self, recording: Recording) -> list[Tensor]:
        """Outputs of the norms that read the stream where it ends."""
        end = recording.stream_end
        calls = [call for name in self._norms for call in recording.calls.get(name, ())]
        return [
            call.output.tensor
            for call in calls
            if end is not None
            and call.input.tensor.data_ptr() == end.data_ptr()
            and call.input.tensor.shape == end.shape
        ]

    def _grid(self, recording: Recording, image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The grid, and height and width of a patch: the strides of the convolutions one after another."""
        ran = {name: conv for name, conv in self._convolutions.items() if name in recording.calls}
        rows, columns = recording.call(list(ran)[-1]).output.tensor.shape[-2:]
        height, width = 1, 1
        for conv in ran.values():
            height, width = height * conv.stride[0], width * conv.stride[1]
        rest = image_size[0] - rows * height, image_size[1] - columns * width
        if not (-height < rest[0] < height and -width < rest[1] < width):
            raise UnsupportedModelError(
                f"convolutions before the blocks make {rows} x {columns} tokens of {image_size[0]} x {image_size[1]} "
                f"px with strides of {height} x {width} in all; expected them to follow each other"
            )
        return (rows, columns), (height, width)


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that the recording has for them."""
    return {name.replace("._orig_mod", ""): module for name, module in model.named_modules()}


def _block_lists(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in _named(model).items()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 0
        and all(find_parts(block) is not None for block in module)
    }


def _convolutions(model: nn.Module, lists: dict[str, nn.Module]) -> dict[str, nn.Conv2d]:
    inside = {id(part) for blocks in lists.values() for part in blocks.modules()}
    return {
        name: module
        for name, module in _named(model).items()
        if isinstance(module, nn.Conv2d) and id(module) not in inside
    }


def _holds_encoder(model: nn.Module) -> bool:
    lists = _block_lists(model)
    return len(lists) == 1 and len(_convolutions(model, lists)) > 0
