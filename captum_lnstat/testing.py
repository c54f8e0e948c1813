"""The test kit that a family has to pass: ``check_family(model, image_size)``, or its parts one by one.

Every check works on copies with random parameters that matter (``planting.wake``), in the dtype of the model, and
raises ``AssertionError`` with what was seen and what was expected. Shapes alone prove nothing about a map: two of the
checks are about its place. ``check_layout`` follows a stimulus through every attention's values, ``check_placement``
trains the model for a few seconds to count the stimulus and holds the peak of the map against where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_lnstat.attribution import RULES, LNStatAttribution, Rule
from captum_lnstat.description import Description
from captum_lnstat.engine import Needs, run
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.outputs import Output
from captum_lnstat.planting import Readout, Region, Scenes, lattice, plant, wake
from captum_lnstat.trace import Block, Merging, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float

MASS = 1e-5
COMPLETENESS = {torch.float64: 1e-9, torch.float32: 1e-4}
BATCH = {torch.float64: 1e-9, torch.float32: 1e-3}
# Rules whose peak has to lie on the stimulus. Perception and the gradient rule see where the model looks and what
# attention carries; a model may count the stimulus without looking at it more than elsewhere.
PEAKS: tuple[Rule, ...] = ("lnstat", "evidence")


@dataclass(frozen=True)
class RulePlacement:
    """How one rule's map lies on the stimulus.

    Attributes:
        hits: Regions in which the map's peak lay.
        regions: Regions tried.
        margin: Smallest ratio of the map's maximum inside the stimulus to that outside; of evidence, above its median.
    """

    hits: int
    regions: int
    margin: float


@dataclass(frozen=True)
class FamilyReport:
    """What ``check_family`` measured.

    Attributes:
        description: What was recognised.
        mass: Largest error of the sum of ``"rollout"``, which is 1.
        completeness: Largest error of ``"evidence"`` against the score, relative to ``max(1, |score|)``.
        batch: Largest relative difference between a batch and its images one by one.
        layout: Attention sites whose layout was checked.
        placement: For each rule, how its map lies on the stimulus.
        training: Steps that the planted readout took, and the loss it came to.
    """

    description: Description
    mass: float | None = None
    completeness: float | None = None
    batch: float | None = None
    layout: int = 0
    placement: dict[str, RulePlacement] = field(default_factory=dict)
    training: tuple[int, float] = (0, 0.0)


@contextmanager
def _accepted(what: str) -> Iterator[None]:
    """A refusal by the package is a failure of the check."""
    try:
        yield
    except (RecordingError, UnsupportedModelError) as error:
        raise AssertionError(f"{what}: the model was refused, {type(error).__name__}: {error}") from error


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def noise(model: nn.Module, image_size: tuple[int, int], batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    """Images of noise in the dtype of ``model``."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *image_size, generator=random).to(_dtype(model))


def check_recognised(model: nn.Module, images: Tensor, output: Output = None) -> Description:
    """The model is of a known family, and its grid covers the image.

    Returns:
        The description, for a look at what was recognised.
    """
    with _accepted("recognised"):
        description = LNStatAttribution(model, output=output).describe(images)
    for side, count, part in zip(images.shape[-2:], description.grid, description.patch, strict=True):
        assert (count - 1) * part < side, (
            f"recognised: {count} patches of {part} px on a side of {side} px; expected each to begin in the image"
        )
    return description


def check_rule(model: nn.Module, images: Tensor, rule: Rule, output: Output = None, target: Any = 0) -> Tensor:
    """A rule's attribution has the shape of the images, its relevance that of the grid; finite, and not constant.

    Returns:
        The relevance, ``(batch, rows, columns)``.
    """
    method = LNStatAttribution(model, rule=rule, output=output)
    with _accepted(f"rule {rule!r}"):
        grid, attribution = method.relevance(images, target), method.attribute(images, target)
        expected = (len(images), *method.describe(images).grid)
    assert tuple(grid.shape) == expected, f"rule {rule!r}: relevance of shape {tuple(grid.shape)}; expected {expected}"
    assert attribution.shape == images.shape, (
        f"rule {rule!r}: attribution of shape {tuple(attribution.shape)}; expected {tuple(images.shape)}"
    )
    assert bool(torch.isfinite(grid).all()), f"rule {rule!r}: the relevance is not finite"
    size = grid.abs().amax((1, 2))
    assert bool((grid.amax((1, 2)) - grid.amin((1, 2)) > 1e-6 * size).all()), (
        f"rule {rule!r}: the map is constant (values up to {float(size.max()):.3g}) on noise; expected one that is not"
    )
    error = (attribution.sum((1, 2, 3)) - grid.sum((1, 2))).abs() / grid.abs().sum((1, 2)).clamp(min=1e-12)
    assert float(error.max()) < 1e-3, (
        f"rule {rule!r}: the attribution's sum is off the grid's by {float(error.max()):.2g}"
    )
    return grid


def check_mass(model: nn.Module, images: Tensor, output: Output = None) -> float:
    """The relevance of ``"rollout"`` on patches, prefix tokens and padding sums to 1, and none of it is negative.

    Returns:
        The largest error.
    """
    method = LNStatAttribution(model, rule="rollout", output=output)
    with _accepted("mass"):
        relevance = method._explain(images, None, None)[1]
    error = float((relevance.total - 1).abs().max())
    assert error <= MASS, f"mass: the rollout sums to 1 with an error of {error:.3g}; expected at most {MASS:g}"
    least = float(relevance.grid.min())
    assert least >= -MASS, f"mass: the rollout has a relevance of {least:.3g}; expected none below 0"
    return error


def check_completeness(model: nn.Module, images: Tensor, output: Output = None, target: Any = 0) -> float:
    """The evidence of patches, prefix tokens and constant is the score.

    Returns:
        The largest error, relative to ``max(1, |score|)``.
    """
    method = LNStatAttribution(model, rule="evidence", output=output)
    with _accepted("completeness"):
        outcome, relevance = method._explain(images, target, None)
    assert outcome.score is not None
    error = float(((relevance.total - outcome.score).abs() / outcome.score.abs().clamp(min=1.0)).max())
    bar = COMPLETENESS.get(images.dtype, 0.1)
    assert error <= bar, f"completeness: evidence misses the score by {error:.3g} of max(1, |score|); expected {bar:g}"
    return error


def check_batch(
    model: nn.Module, images: Tensor, rules: Sequence[Rule] = RULES, output: Output = None, target: Any = 0
) -> float:
    """An image has the same relevance alone as in a batch.

    Returns:
        The largest difference, relative to the map's largest value.
    """
    worst, bar = 0.0, BATCH.get(images.dtype, 0.1)
    for rule in rules:
        method = LNStatAttribution(model, rule=rule, output=output)
        with _accepted(f"batch, rule {rule!r}"):
            together = method.relevance(images, target)
            alone = torch.cat([method.relevance(image[None], target) for image in images])
        error = float(((together - alone).abs().amax((1, 2)) / alone.abs().amax((1, 2)).clamp(min=1e-12)).max())
        assert error <= bar, f"batch, rule {rule!r}: alone an image's map differs by {error:.3g}; expected {bar:g}"
        worst = max(worst, error)
    return worst


def check_untouched(
    model: nn.Module, images: Tensor, rules: Sequence[Rule] = RULES, output: Output = None, target: Any = 0
) -> None:
    """No rule changes a parameter, a buffer, a gradient, a hook, train mode, the images or the random state."""
    before = _state(model, images)
    for rule in rules:
        with _accepted(f"untouched, rule {rule!r}"):
            LNStatAttribution(model, rule=rule, output=output).attribute(images, target)
        changed = [name for name, value in _state(model, images).items() if before.get(name) != value]
        assert not changed, f"untouched, rule {rule!r}: changed {', '.join(changed[:5])}"


def _state(model: nn.Module, images: Tensor) -> dict[str, Any]:
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    state: dict[str, Any] = {"random state": bytes(torch.get_rng_state().numpy()), "grad": torch.is_grad_enabled()}
    tensors = [("images", images), *model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        state[name] = (id(tensor), tensor._version, float(tensor.detach().double().sum()), tensor.requires_grad)
        state[f"{name}.grad"] = tensor.grad if tensor.is_leaf else None
    for name, module in model.named_modules():
        counts = tuple(len(getattr(module, hook)) for hook in hooks)
        state[f"module {name}"] = (module.training, counts, sorted(map(str, vars(module))))
    return state


def check_layout(readout: nn.Module, with_stimulus: Tensor, without: Tensor, regions: Sequence[Region]) -> int:
    """Follow the stimulus through every attention: the values that it changes most lie under it.

    The values of an attention are put back on the tokens by the block's layout, and handed down to the patch grid
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
    with _accepted("layout"):
        traces = [run(readout, readout, images, None, None, Needs()).trace for images in (with_stimulus, without)]
    for index, (block, plain) in enumerate(zip(traces[0].blocks, traces[1].blocks, strict=True)):
        heads = slice(0, block.site.shape[1])
        change = (block.site.values(heads) - plain.site.values(heads)).square().sum((1, 3))
        keys = getattr(block, "keys", None) or block.layout
        tokens = keys.scatter(change[..., None], len(with_stimulus))[0][..., 0]
        grids = _down(traces[0], block, tokens)
        for region, grid in zip(regions, grids, strict=True):
            y, x = _peak(grid, traces[0].patch)
            assert region.holds(y, x), (
                f"layout: a stimulus at {region} changes the values of {block.name!r} (attention {index}) most at row "
                f"{y:.0f}, column {x:.0f}; expected it there. Its windows, shift, merging or grid order are not those "
                "of the model"
            )
    return len(traces[0].blocks)


def _down(trace: Trace, block: Block, tokens: Tensor) -> Float[Tensor, "batch row column"]:
    """Values at the tokens that a block reads, at the patches that each token lies over."""
    index = next(i for i, step in enumerate(trace.steps) if step is block)
    for step in reversed(trace.steps[:index]):
        if isinstance(step, Merging):
            members = step.groups.index.shape[1]
            spread = tokens[..., None].expand(-1, -1, members).flatten(0, 1)[..., None]
            tokens = step.groups.scatter(spread, len(tokens))[0][..., 0]
    return tokens[:, trace.prefix :].reshape(len(tokens), *trace.grid)


def _peak(grid: Tensor, patch: tuple[int, int]) -> tuple[float, float]:
    """The centre of the patch with the largest value, in pixels."""
    row, column = divmod(int(grid.argmax()), grid.shape[1])
    return (row + 0.5) * patch[0], (column + 0.5) * patch[1]


@dataclass(frozen=True)
class Ground:
    """Where stimuli are planted in the images of a model: regions as large as the coarsest token, aligned with it."""

    scenes: Scenes
    regions: list[Region]
    patch: tuple[int, int]


def ground(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    output: Output = None,
    stimulus: tuple[int, int] | None = None,
    step: tuple[int, int] | None = None,
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
        channels: Of the images.
        seed: Of textures and noise.
    """
    images = noise(model, image_size, 1, channels)
    with _accepted("recognised"):
        trace = run(model, model, images, None, None, Needs(), output).trace
    finest, coarsest = (trace.blocks[i].before.shape[1] - trace.prefix for i in (0, -1))
    first = trace.tokens.shape[1] - trace.prefix
    times = max(1, round((max(first, finest) / coarsest) ** 0.5))
    size = stimulus or (trace.patch[0] * times, trace.patch[1] * times)
    scenes = Scenes(image_size, size, trace.patch, channels, seed, _dtype(model))
    return Ground(scenes, lattice(image_size, size, step or size), trace.patch)


def planted_images(place: Ground) -> tuple[Tensor, Tensor]:
    """One image for each region with the stimulus there, and the same images without it."""
    without = place.scenes.blank(len(place.regions))
    images = without.clone()
    for region, image in zip(place.regions, images, strict=True):
        region.cut(image).copy_(place.scenes.stimulus)
    return images, without


def check_placement(
    model: nn.Module,
    place: Ground,
    *,
    output: Output = None,
    rules: Sequence[Rule] = PEAKS,
    required: Sequence[Rule] = PEAKS,
    steps: int = 200,
) -> tuple[dict[str, RulePlacement], tuple[int, float]]:
    """The peak of the map lies on the stimulus that the score depends on, wherever that is.

    A copy of the model is trained to score an image by whether the stimulus is in it. That it does is verified without
    any map: covering the stimulus takes the score away, covering another region does not.

    Args:
        model: The model; it is not changed.
        place: From ``ground``.
        output: Which of several outputs is explained.
        rules: Rules to measure.
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
        with _accepted(f"placement, rule {rule!r}"):
            grids = torch.cat([method.relevance(part) for part in torch.split(images, 5)])
        missed = []
        hits, margins = 0, []
        for region, grid in zip(place.regions, grids, strict=True):
            y, x = _peak(grid, place.patch)
            inside = _inside(region, grid, place.patch)
            base = grid.median() if rule == "evidence" else grid.new_zeros(())
            under, rest = grid[inside].flatten(), float(grid[~inside].max() - base)
            best = float(under.max() - base) if len(under) else 0.0
            margins.append(best / rest if rest > 0 else float("inf"))
            if region.holds(y, x):
                hits += 1
            else:
                missed.append(f"the stimulus at {region} has its peak at row {y:.0f}, column {x:.0f}")
        placement[str(rule)] = RulePlacement(hits, len(place.regions), min(margins))
        assert rule not in required or not missed, (
            f"placement, rule {rule!r}: the map's peak lies on the stimulus in {hits} of {len(place.regions)} regions; "
            f"expected all: {missed[0]}"
        )
    return placement, (planted.steps, planted.loss)


def _inside(region: Region, grid: Tensor, patch: tuple[int, int]) -> Tensor:
    mask = torch.zeros(grid.shape, dtype=torch.bool)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            mask[row, column] = region.holds((row + 0.5) * patch[0], (column + 0.5) * patch[1])
    return mask


def _check_readout(readout: Readout, place: Ground, images: Tensor, without: Tensor, when: str) -> None:
    """The score depends on the region of the stimulus, and on no other: by covering them, without any map."""
    with torch.no_grad():
        scores, empty = readout(images), readout(without)
        drop = scores - empty
        assert float(drop.min()) > 0, (
            f"placement: {when}, the score of the planted readout does not tell where the stimulus is (it falls by "
            f"{float(drop.min()):.2g} when it is covered); expected a model that learns to. Give more steps"
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


def check_family(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    output: Output = None,
    rules: Sequence[Rule] = RULES,
    required: Sequence[Rule] = PEAKS,
    stimulus: tuple[int, int] | None = None,
    step: tuple[int, int] | None = None,
    channels: int = 3,
    steps: int = 200,
) -> FamilyReport:
    """Everything that a new family has to pass, on a small model of it. Takes seconds to a minute.

    Args:
        model: A small model of the family, any weights; it is not changed. Give it several blocks, stages and, where
            there are windows, shifted ones: what the model does not have is not checked.
        image_size: Height and width of its images. Run it with a non-square size, too, if the family takes one: only
            such an image tells rows from columns.
        output: Which of several outputs is explained, as for ``LNStatAttribution``.
        rules: Rules that are defined for the family.
        required: Rules whose peak has to lie on the stimulus.
        stimulus: Height and width of the stimulus; as large as a token of the last block by default.
        step: Regions lie at multiples of so many pixels.
        channels: Of the images.
        steps: Steps of training at most.

    Returns:
        What was measured.

    Raises:
        AssertionError: A check failed; the message says which, what was seen and what was expected.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> model = VisionTransformer(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=2)
        >>> report = check_family(model, (32, 48))
        >>> report.description.family, report.layout, report.placement["lnstat"].hits
        ('plain', 2, 15)
    """
    woken = wake(model)
    images = noise(woken, image_size, channels=channels)
    description = check_recognised(woken, images, output)
    for rule in rules:
        check_rule(woken, images, rule, output)
    mass = check_mass(woken, images, output) if "rollout" in rules else None
    completeness = check_completeness(woken, images, output) if "evidence" in rules else None
    batch = check_batch(woken, images, rules, output)
    check_untouched(woken, images, rules, output)
    place = ground(woken, image_size, output=output, stimulus=stimulus, step=step, channels=channels)
    sites = check_layout(woken, *planted_images(place), place.regions)
    chosen = [rule for rule in required if rule in rules]
    placement, training = check_placement(woken, place, output=output, rules=rules, required=chosen, steps=steps)
    return FamilyReport(description, mass, completeness, batch, sites, placement, training)
