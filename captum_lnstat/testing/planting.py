"""A model that is made to look at one known thing: a stimulus planted in an image, and a readout trained to count it.

What a map of such a model has to show is known beforehand: the place where the stimulus is. Nothing here reads an
attribution, so that what the map is held against does not depend on it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from captum_lnstat.recording.forward import Output, pick_output
from captum_lnstat.recording.rms import rms_channels

if TYPE_CHECKING:
    from jaxtyping import Float

GREY, NOISE, CONTRAST = 0.3, 0.03, 1.5
# The score of an image with the stimulus; without it the score is trained to be 0.
SCORE = 2.0


def wake(model: nn.Module, seed: int = 0, gain: float = 0.5) -> Any:
    """A copy of ``model`` in eval mode, with random parameters that all matter.

    As initialised, a model can be one that no test can tell from a wrong one: layer scales of 1e-6 and norm weights of
    0 switch its blocks off, and a head of zeros gives every image the same score.

    Args:
        model: Any model; it is not changed.
        seed: Of the random parameters.
        gain: Weights of linear and convolutional layers are drawn with a deviation of ``gain / sqrt(fan_in)``.
    """
    model = copy.deepcopy(model).eval().requires_grad_(True)
    random = torch.Generator().manual_seed(seed)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)}
    weights |= {id(m.in_proj_weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    norms = {id(m.weight) for m in model.modules() if hasattr(m, "normalized_shape") or isinstance(m, _NormBase)}
    norms |= {id(p) for m in model.modules() if rms_channels(m) is not None for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=random, device="cpu").to(parameter)
            first = parameter.flatten()[0]
            constant = bool((parameter == first).all()) and parameter.numel() > 1
            if id(parameter) in weights:
                parameter.copy_(noise * gain / max(1, parameter[0].numel()) ** 0.5)
            elif id(parameter) in norms:
                parameter.fill_(1.0 if bool(parameter.any()) else gain)
            elif constant and 0 < abs(float(first)) < 0.1:  # a layer scale
                parameter.fill_(1.0)
            elif constant and float(first) == 0:
                parameter.copy_(0.02 * noise)
    return model


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def holds(self, y: float, x: float) -> bool:
        """Whether a point in pixels lies inside."""
        return self.top <= y < self.top + self.height and self.left <= x < self.left + self.width

    def grown(self, margin: int) -> Region:
        """The rectangle with so many pixels more on every side."""
        return Region(self.top - margin, self.left - margin, self.height + 2 * margin, self.width + 2 * margin)

    def cut(self, images: Tensor) -> Tensor:
        """The pixels of the rectangle, as a view."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def __str__(self) -> str:
        return f"rows {self.top} to {self.top + self.height - 1}, columns {self.left} to {self.left + self.width - 1}"


def lattice(image: tuple[int, int], size: tuple[int, int], step: tuple[int, int]) -> list[Region]:
    """Regions of ``size`` all over an image, at multiples of ``step`` pixels: at most five rows of five.

    Corners, edges and centre are among them, and, since they lie at quarters of the image, so are regions at the
    borders of windows.

    Raises:
        ValueError: Fewer than nine regions fit.

    Example:
        >>> [(r.top, r.left) for r in lattice((24, 24), (8, 8), (8, 8))][:4]
        [(0, 0), (0, 8), (0, 16), (8, 0)]
    """
    lines = []
    for length, part, stride in zip(image, size, step, strict=True):
        last = (length - part) // stride
        lines.append([stride * n for n in sorted({0, last // 4, last // 2, last - last // 4, last})])
    regions = [Region(top, left, *size) for top in lines[0] for left in lines[1]]
    if len(regions) < 9:
        raise ValueError(
            f"only {len(regions)} regions of {size[0]} x {size[1]} px fit into {image[0]} x {image[1]} px at steps of "
            f"{step[0]} x {step[1]}; expected at least nine. Use larger images or a smaller stimulus"
        )
    return regions


class Scenes:
    """Grey images with faint noise, in which a stimulus and a distractor can be put.

    Args:
        image: Height and width of the images.
        region: Height and width of the stimulus.
        patch: Height and width of the texture, which is repeated over the stimulus.
        channels: Of the images.
        seed: Of textures and noise.
        dtype: Of the images.
    """

    def __init__(
        self,
        image: tuple[int, int],
        region: tuple[int, int],
        patch: tuple[int, ...],
        channels: int,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.image, self.channels, self.dtype = image, channels, dtype
        self.stimulus, self.distractor = (self._texture(region, patch) for _ in range(2))

    def _texture(self, region: tuple[int, int], patch: tuple[int, ...]) -> Tensor:
        tile = torch.randn(self.channels, *patch, generator=self.random, device="cpu")
        repeats = [-(-side // part) for side, part in zip(region, patch, strict=True)]
        tiled = tile.repeat(1, *repeats)[:, : region[0], : region[1]]
        return (GREY + CONTRAST * tiled).to(self.dtype)

    def blank(self, count: int) -> Float[Tensor, "count channel height width"]:
        """Images without anything in them."""
        noise = torch.randn(count, self.channels, *self.image, generator=self.random, device="cpu")
        return (GREY + NOISE * noise).to(self.dtype)

    def batch(self, regions: list[Region], count: int) -> tuple[Tensor, Tensor]:
        """Images of which every second has the stimulus at a random region, and half of all the distractor."""
        images, scores = self.blank(count), torch.zeros(count, dtype=self.dtype, device="cpu")
        for i, image in enumerate(images):
            one, other = (
                regions[int(n)] for n in torch.randperm(len(regions), generator=self.random, device="cpu")[:2]
            )
            if i % 4 > 1:
                other.cut(image).copy_(self.distractor)
            if i % 2:
                one.cut(image).copy_(self.stimulus)
                scores[i] = SCORE
        return images, scores


class Readout(nn.Module):
    """A model with one score an image: a fixed direction in what it returns."""

    def __init__(self, model: nn.Module, output: Output, direction: Tensor) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.direction: Tensor
        self.register_buffer("direction", direction)

    def forward(self, images: Tensor) -> Tensor:
        returned = pick_output(self.model(images), self.output)
        return returned.flatten(1) @ self.direction


@dataclass(frozen=True)
class Planted:
    """A model whose score says whether the stimulus is in the image, wherever it is.

    Attributes:
        readout: The model with its one score.
        scenes: Images for it.
        steps: Steps of training that it took.
        loss: Mean squared error of the score at the end; the score is trained to 0 and ``SCORE``.
    """

    readout: Readout
    scenes: Scenes
    steps: int
    loss: float


def plant(
    model: nn.Module,
    scenes: Scenes,
    regions: list[Region],
    *,
    output: Output = None,
    steps: int = 200,
    rate: float = 1e-3,
    enough: float = 0.03,
) -> Planted:
    """Train a woken copy of ``model`` until its score says whether the stimulus is there; mostly some 50 to 150 steps.

    Args:
        model: The model whose family is checked; it is not changed.
        scenes: Images to train on.
        regions: Where the stimulus may be.
        output: Which of several outputs is the score's.
        steps: Steps of eight images at most.
        rate: Learning rate of Adam.
        enough: Training ends when the running mean of the loss is below this.
    """
    woken = wake(model)
    with torch.no_grad():
        width = pick_output(woken(scenes.blank(1)), output).flatten(1).shape[1]
    direction = torch.randn(width, generator=scenes.random, device="cpu").to(scenes.dtype)
    readout = Readout(woken, output, direction / direction.norm())
    optimizer = torch.optim.Adam(readout.parameters(), lr=rate)
    running, step = SCORE**2, 0
    with torch.enable_grad():
        while running > enough and step < steps:
            images, scores = scenes.batch(regions, 8)
            loss = (readout(images) - scores).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            running, step = 0.8 * running + 0.2 * float(loss.detach()), step + 1
    readout.requires_grad_(True).zero_grad()
    return Planted(readout, scenes, step, running)
