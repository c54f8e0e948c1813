"""The test kit that a family has to pass: ``check_family(model, image_size)``, or its parts one by one.

Every check works on copies with random parameters that matter (``planting.wake``), in the dtype of the model, and
raises ``AssertionError`` with what was seen and what was expected. Shapes alone prove nothing about a map: two of the
checks are about its place. ``check_layout`` follows a stimulus through every attention's values, ``check_placement``
trains the model for a few seconds to count the stimulus and holds the peak of the map against where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_lnstat.attribution.base import explain_batch
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.description import Description
from captum_lnstat.recording.forward import Output
from captum_lnstat.rules.rule import find_rule
from captum_lnstat.testing.placement import (
    PEAKS,
    RulePlacement,
    accepted,
    check_layout,
    check_placement,
    ground,
    noise,
    planted_images,
)
from captum_lnstat.testing.planting import wake

RULES = ("lnstat", "evidence", "rollout", "gradient")
MASS = 1e-5
COMPLETENESS = {torch.float64: 1e-9, torch.float32: 1e-4}
BATCH = {torch.float64: 1e-9, torch.float32: 1e-3}


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


def check_recognised(model: nn.Module, images: Tensor, output: Output = None) -> Description:
    """The model is of a known family, and its grid covers the image.

    Returns:
        The description, for a look at what was recognised.
    """
    with accepted("recognised"):
        description = LNStatAttribution(model, output=output).describe(images)
    for side, count, part in zip(images.shape[-2:], description.grid, description.patch, strict=True):
        assert (count - 1) * part < side, (
            f"recognised: {count} patches of {part} px on a side of {side} px; expected each to begin in the image"
        )
    return description


def check_rule(model: nn.Module, images: Tensor, rule: str, output: Output = None, target: Any = 0) -> Tensor:
    """A rule's attribution has the shape of the images, its relevance that of the grid; finite, and not constant.

    A map of what argued for a score is empty where nothing did, which may be so on noise.

    Returns:
        The relevance, ``(batch, rows, columns)``.
    """
    method = LNStatAttribution(model, rule=rule, output=output)
    with accepted(f"rule {rule!r}"):
        grid, attribution = method.relevance(images, target), method.attribute(images, target)
        expected = (len(images), *method.describe(images).grid)
    assert tuple(grid.shape) == expected, f"rule {rule!r}: relevance of shape {tuple(grid.shape)}; expected {expected}"
    assert attribution.shape == images.shape, (
        f"rule {rule!r}: attribution of shape {tuple(attribution.shape)}; expected {tuple(images.shape)}"
    )
    assert bool(torch.isfinite(grid).all()), f"rule {rule!r}: the relevance is not finite"
    size, kind = grid.abs().amax((1, 2)), find_rule(rule)
    empty = (size == 0) & (kind.class_specific and not kind.complete)
    assert bool((empty | (grid.amax((1, 2)) - grid.amin((1, 2)) > 1e-6 * size)).all()), (
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
    with accepted("mass"):
        relevance = explain_batch(method, images)[1]
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
    with accepted("completeness"):
        outcome, relevance = explain_batch(method, images, [target])
    assert outcome.score is not None
    error = float(((relevance.total - outcome.score).abs() / outcome.score.abs().clamp(min=1.0)).max())
    bar = COMPLETENESS.get(images.dtype, 0.1)
    assert error <= bar, f"completeness: evidence misses the score by {error:.3g} of max(1, |score|); expected {bar:g}"
    return error


def check_batch(
    model: nn.Module, images: Tensor, rules: Sequence[str] = RULES, output: Output = None, target: Any = 0
) -> float:
    """An image has the same relevance alone as in a batch.

    Returns:
        The largest difference, relative to the map's largest value.
    """
    worst, bar = 0.0, BATCH.get(images.dtype, 0.1)
    for rule in rules:
        method = LNStatAttribution(model, rule=rule, output=output)
        with accepted(f"batch, rule {rule!r}"):
            together = method.relevance(images, target)
            alone = torch.cat([method.relevance(image[None], target) for image in images])
        error = float(((together - alone).abs().amax((1, 2)) / alone.abs().amax((1, 2)).clamp(min=1e-12)).max())
        assert error <= bar, f"batch, rule {rule!r}: alone an image's map differs by {error:.3g}; expected {bar:g}"
        worst = max(worst, error)
    return worst


def check_untouched(
    model: nn.Module, images: Tensor, rules: Sequence[str] = RULES, output: Output = None, target: Any = 0
) -> None:
    """No rule changes a parameter, a buffer, a gradient, a hook, train mode, the images or the random state."""
    before = _state(model, images)
    for rule in rules:
        with accepted(f"untouched, rule {rule!r}"):
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


def check_family(
    model: nn.Module,
    image_size: tuple[int, int],
    *,
    output: Output = None,
    rules: Sequence[str] = RULES,
    required: Sequence[str] = PEAKS,
    stimulus: tuple[int, int] | None = None,
    step: tuple[int, int] | None = None,
    margin: int = 0,
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
        rules: Names of rules that are defined for the family.
        required: Names of rules whose peak has to lie on the stimulus.
        stimulus: Height and width of the stimulus; as large as a token of the last block by default.
        step: Regions lie at multiples of so many pixels.
        margin: A peak may lie so many pixels beside the stimulus, where convolutions make tokens of more than a patch.
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
    place = ground(woken, image_size, output=output, stimulus=stimulus, step=step, margin=margin, channels=channels)
    sites = check_layout(woken, *planted_images(place), [region.grown(margin) for region in place.regions])
    chosen = [rule for rule in required if rule in rules]
    placement, training = check_placement(woken, place, output=output, rules=rules, required=chosen, steps=steps)
    return FamilyReport(description, mass, completeness, batch, sites, placement, training)
