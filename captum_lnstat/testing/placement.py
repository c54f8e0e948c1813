"""Where a map lies: a stimulus followed through every attention, and the peak of a map held against the stimulus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.layout import Groups, Layout
from captum_lnstat.recording.forward import Output
from captum_lnstat.rules.engine import run
from captum_lnstat.testing.planting import SCORE, Readout, Region, Scenes, lattice, plant, wake
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

if TYPE_CHECKING:
    from jaxtyping import Float

# Rules whose peak has to lie on the stimulus. Rollout and the gradient rule see where the model looks and what
# attention carries; a model may count the stimulus without looking at it more than elsewhere.
PEAKS: tuple[str, ...] = ("lnstat", "evidence")


@dataclass(frozen=True)
class RulePlacement:
    """How one rule's map lies on the stimulus.

    Attributes:
        hits: Regions in which the map's peak lay, or beside which it lay by no more than the margin.
        regions: Regions tried.
        exact: Regions in which the map's peak lay, whatever the margin.
        margin: Smallest ratio of the map's maximum inside the stimulus to that outside; of evidence, above its median.
    """

    hits: int
    regions: int
    exact: int
    margin: float


@contextmanager
def accepted(what: str) -> Iterator[None]:
    """A refusal by the package is a failure of the check; that nothing argued for a score of random weights is none."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the map of image .* nothing reached the patches")
            yield
    except (RecordingError, UnsupportedModelError) as error:
        raise AssertionError(f"{what}: the model was refused, {type(error).__name__}: {error}") from error


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def noise(model: nn.Module, image_size: tuple[int, int], batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    """Images of noise in the dtype of ``model``."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *image_size, generator=random, device="cpu").to(_dtype(model))


@dataclass(frozen=True)
class Ground:
    """Where stimuli are planted in the images of a model: regions as large as the coarsest token, aligned with it.

    Attributes:
        margin: A peak may lie so many pixels beside the stimulus: tokens that convolutions make of more than their
            patch see it from there.
    """

    scenes: Scenes
    regions: list[Region]
    patch: tuple[int, ...]
    margin: int = 0


def ground(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    output: Output = None,
    stimulus: tuple[int, int] | None = None,
    step: tuple[int, int] | None = None,
    margin: int = 0,
    channels: int = 3,
    seed: int = 0,
) -> Ground:
    """The ground for ``check_layout`` and ``check_placement``.

    Args:
        model: The model.
        image_size: Height and width of its images.
        output: Which of several outputs is explained.
        stimulus: Height and width of the stimulus in pixels; as large as a token of the last block by default.
        step: Regions lie at multiples of so many pixels; of the stimulus by default.
        margin: A peak may lie so many pixels beside the stimulus.
        channels: Of the images.
        seed: Of textures and noise.
    """
    woken = wake(model)
    with accepted("recognised"):
        trace = run(woken, woken, noise(woken, image_size, 1, channels), output=output).trace
    # So many patches lie under a token of the last block, fewer only at an odd grid's edge.
    times = round(math.prod(groups.index.shape[1] for groups in trace.below()) ** 0.5)
    size = stimulus or (trace.patch[0] * times, trace.patch[1] * times)
    scenes = Scenes(image_size, size, trace.patch, channels, seed, _dtype(model))
    return Ground(scenes, lattice(image_size, size, step or size), trace.patch, margin)


def planted_images(place: Ground) -> tuple[Tensor, Tensor]:
    """One image for each region with the stimulus there, and the same images without it."""
    without = place.scenes.blank(len(place.regions))
    images = without.clone()
    for region, image in zip(place.regions, images, strict=True):
        region.cut(image).copy_(place.scenes.stimulus)
    return images, without


def check_layout(readout: nn.Module, with_stimulus: Tensor, without: Tensor, regions: Sequence[Region]) -> int:
    """Follow the stimulus through every attention: the values that it changes most lie under it.

    The values of an attention are put back on the tokens by the block's layout, and brought down to the patch grid
    through the mergings below. A transposed grid, a window shifted the wrong way or a child of another parent moves
    them, whatever the weights are.

    Args:
        readout: The model.
        with_stimulus: Images with the stimulus at ``regions``.
        without: The same images without it.
        regions: Where the stimulus is.

    Returns:
        The number of attention sites that were checked.
    """
    with accepted("layout"):
        traces = [run(readout, readout, images).trace for images in (with_stimulus, without)]
    for index, (block, plain) in enumerate(zip(traces[0].blocks, traces[1].blocks, strict=True)):
        heads = slice(0, block.site.shape[1])
        change = (block.site.values(heads) - plain.site.values(heads)).square().sum((1, 3))
        grids = _down(traces[0], block, _mean_over(block.layout if block.keys is None else block.keys, change))
        for region, grid in zip(regions, grids, strict=True):
            y, x = _peak(grid, traces[0].patch)
            assert region.holds(y, x), (
                f"layout: a stimulus at {region} changes the values of {block.name!r} (attention {index}) most at row "
                f"{y:.0f}, column {x:.0f}; expected it there. Its windows, shift, merging or grid order are not those "
                "of the model"
            )
    return len(traces[0].blocks)


def _down(trace: Trace, block: Block, tokens: Tensor) -> Float[Tensor, "batch row column"]:
    """Values at the tokens that a block reads, at the patches that lie under each of them."""
    for groups in trace.below(block):
        tokens = _mean_over(groups, tokens[..., None].expand(-1, -1, groups.index.shape[1]).flatten(0, 1))
    return trace.on_grid(tokens)


def _mean_over(layout: Layout, groups: Float[Tensor, "batch_groups member"]) -> Float[Tensor, "batch token"]:
    """Groups to tokens; a token that is in several places gets their mean, one that is in none nothing."""
    batch = len(groups) // (len(layout.index) if isinstance(layout, Groups) else 1)
    values, weights = (layout.scatter(x[..., None], batch)[0] for x in (groups, torch.ones_like(groups)))
    return (values / weights.clamp(min=torch.finfo(values.dtype).tiny))[..., 0]


def _peak(grid: Tensor, patch: tuple[int, ...]) -> tuple[float, float]:
    """The centre of the patch with the largest value, in pixels."""
    row, column = divmod(int(grid.argmax()), grid.shape[1])
    return (row + 0.5) * patch[0], (column + 0.5) * patch[1]


def check_placement(
    model: nn.Module,
    place: Ground,
    *,
    output: Output = None,
    rules: Sequence[str] = PEAKS,
    required: Sequence[str] = PEAKS,
    steps: int = 200,
) -> tuple[dict[str, RulePlacement], tuple[int, float]]:
    """The peak of the map lies on the stimulus that the score depends on, wherever that is.

    A copy of the model is trained to score an image by whether the stimulus is in it. That it does is verified without
    any map: covering the stimulus takes the score away, covering another region does not.

    Args:
        model: The model; it is not changed.
        place: From ``ground``.
        output: Which of several outputs is explained.
        rules: Names of rules to measure.
        required: Those of them whose peak has to lie on the stimulus.
        steps: Steps of training at most.

    Returns:
        For every rule how its maps lie, and the steps and loss of the training.
    """
    planted = plant(model, place.scenes, place.regions, output=output, steps=steps)
    images, without = planted_images(place)
    _check_readout(planted.readout, place, images, without, f"after {planted.steps} steps, loss {planted.loss:.2g}")
    placement = {}
    for rule in rules:
        method = LNStatAttribution(planted.readout, rule=rule)
        with accepted(f"placement, rule {rule!r}"):
            grids = torch.cat([method.relevance(part) for part in torch.split(images, 5)])
        missed = []
        hits, exact, margins = 0, 0, []
        for region, grid in zip(place.regions, grids, strict=True):
            y, x = _peak(grid, place.patch)
            inside = _inside(region, grid, place.patch)
            base = grid.median() if rule == "evidence" else grid.new_zeros(())
            under, rest = grid[inside].flatten(), float(grid[~inside].max() - base)
            best = float(under.max() - base) if len(under) else 0.0
            margins.append(best / rest if rest > 0 else float("inf"))
            exact += region.holds(y, x)
            if region.grown(place.margin).holds(y, x):
                hits += 1
            else:
                missed.append(f"the stimulus at {region} has its peak at row {y:.0f}, column {x:.0f}")
        placement[rule] = RulePlacement(hits, len(place.regions), exact, min(margins))
        assert rule not in required or not missed, (
            f"placement, rule {rule!r}: the map's peak lies on the stimulus in {hits} of {len(place.regions)} regions; "
            f"expected all: {missed[0]}"
        )
    return placement, (planted.steps, planted.loss)


def _inside(region: Region, grid: Tensor, patch: tuple[int, ...]) -> Tensor:
    centres = torch.cartesian_prod(
        *((torch.arange(n, device="cpu") + 0.5) * side for n, side in zip(grid.shape, patch, strict=True))
    )
    return torch.tensor([region.holds(y, x) for y, x in centres.tolist()], device="cpu").reshape(grid.shape)


def _check_readout(readout: Readout, place: Ground, images: Tensor, without: Tensor, when: str) -> None:
    """The score depends on the region of the stimulus, and on no other: by covering them, without any map."""
    with torch.no_grad():
        scores, empty = readout(images), readout(without)
        drop = scores - empty
        assert float(drop.min()) > SCORE / 4, (
            f"placement: {when}, the score does not tell whether the stimulus is there (it falls by "
            f"{float(drop.min()):.2g} when it is covered); expected a model that learns to let it fall by {SCORE:g}. "
            "Give more steps"
        )
        for turn in (1, len(images) // 2, len(images) - 1):
            covered = images.clone()
            for index, image in enumerate(covered):
                other = place.regions[(index + turn) % len(place.regions)]
                other.cut(image).copy_(other.cut(place.scenes.blank(1)[0]))
            change = (scores - readout(covered)).abs()
            assert bool((change < drop).all()), (
                f"placement: {when}, covering a region without the stimulus changes the score by "
                f"{float(change.max()):.2g}, covering the stimulus by {float(drop.min()):.2g}; expected it to "
                "depend on the stimulus most. Give more steps"
            )
