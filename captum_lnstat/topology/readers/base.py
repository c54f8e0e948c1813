"""What reads one attention block of a hierarchical model from a recording."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_lnstat.layout import Grid, Groups
from captum_lnstat.recording.recording import Recording
from captum_lnstat.topology.anatomy.geometry import cells, strides_of
from captum_lnstat.topology.anatomy.parts import parts_of
from captum_lnstat.topology.anatomy.units import Stream
from captum_lnstat.topology.residual import block_taps
from captum_lnstat.trace.steps import Block, Update

# What makes tokens of several tokens.
SPATIAL = (nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)


class Reader(ABC):
    """One attention block.

    Attributes:
        block: The module.
        channels_first: Whether a map that it is given has its channels before its rows.
        gradients: Its attention has an output that a gradient can be taken at.
        covers: What maps that are made with it leave out, in words.
    """

    channels_first: ClassVar[bool] = False
    gradients: ClassVar[bool] = True
    covers: ClassVar[str] = ""

    def __init__(self, block: nn.Module) -> None:
        self.block: Any = block

    @classmethod
    @abstractmethod
    def reads(cls, module: nn.Module) -> bool:
        """Whether a module is a block of this build."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the stream after it."""

    @abstractmethod
    def taps(self) -> Iterator[nn.Module]:
        """The modules whose calls ``steps`` reads."""

    def reads_channels_first(self, name: str, recording: Recording) -> bool:
        """Whether the map that it was given had its channels before its rows."""
        return self.channels_first

    def order(self, name: str, recording: Recording, grid: Grid | None) -> Tensor | None:
        """The order of the tokens, if they are not row by row."""
        return None

    def grid_after(self, name: str, recording: Recording, grid: Grid) -> Grid:
        """Rows and columns of tokens after it."""
        return grid

    @abstractmethod
    def steps(self, name: str, recording: Recording, before: Stream) -> list[Block | Update]:
        """The block, and what is added after it, from the stream that it was given."""


class PartsReader(Reader):
    """A block whose parts are found by ``find_parts``: two norms, an attention and an MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.parts = parts_of(block)
        self.attention: Any = getattr(block, self.parts.attention)

    @property
    def width(self) -> int:
        return self.parts.out.out_features

    def taps(self) -> Iterator[nn.Module]:
        yield from block_taps(self.block)

    def reads_channels_first(self, name: str, recording: Recording) -> bool:
        """A block may take a map apart for its norms, which read the channels last."""
        given = recording.call(name).input.tensor
        normed = recording.norm(f"{name}.{self.parts.norms[0]}").input.tensor
        return given.dim() == 4 and normed.dim() == 3 and given.shape[1] == normed.shape[2] != given.shape[3]


def under(module: nn.Module, grid: Grid, after: Grid, device: torch.device) -> Groups:
    """The tokens under each token that a convolution or pooling makes, or several one after another."""
    return cells(grid, after, strides_of(module), device)
