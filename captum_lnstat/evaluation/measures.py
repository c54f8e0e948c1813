"""Metrics by name: what they apply to, what they put into a record, and what becomes of it in the summary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from captum_lnstat import metrics
from captum_lnstat.errors import near
from captum_lnstat.evaluation.frame import Example
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.question import Batch, Measure, Quantity, Values
from captum_lnstat.evaluation.seeds import seed_of
from captum_lnstat.evaluation.specs import Spec, parse

FILLS = ("black", "blur", "mean")


def _options(spec: Spec, **known: Any) -> dict[str, Any]:
    """The options of a metric over their defaults."""
    for key in spec.options:
        if key not in known:
            expected = f"expected {' or '.join(known)}" if known else "it has none"
            raise ValueError(f"metric {spec.name!r} has no option {key!r}; {expected}")
    return {**known, **spec.options}


def _single(
    spec: Spec, value: Callable[[Batch, Tensor, Method], Tensor], higher: bool, applies: Callable[[Example, bool], bool]
) -> Measure:
    """A metric of one number an image."""

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        return {spec.text: value(batch, maps, method)}

    return Measure(spec.text, (Quantity(spec.text, higher, ((spec.text, None),)),), applies, compute)


# What a metric applies to.
def _image(one: Example, true_class: bool) -> bool:
    return not one.sample.only_two


def _object(one: Example, true_class: bool) -> bool:
    return not one.sample.only_two and (one.mask is not None or one.boxes is not None)


def _masked(one: Example, true_class: bool) -> bool:
    return not one.sample.only_two and one.mask is not None


def _boxed(one: Example, true_class: bool) -> bool:
    return not one.sample.only_two and one.boxes is not None


def _two_objects(one: Example, true_class: bool) -> bool:
    return true_class and one.mask is not None and one.other_mask is not None


def _in_grid(one: Example, true_class: bool) -> bool:
    return true_class and not one.sample.only_two and one.sample.target is not None


def _annotated(one: Example, true_class: bool) -> bool:
    return one.human is not None and bool(one.human.max() > one.human.min())


def _on_region(function: Callable[..., Tensor], spec: Spec, **defaults: Any) -> Measure:
    """A metric of maps and the object's region."""
    options = _options(spec, **defaults)
    return _single(spec, lambda batch, maps, method: function(maps, batch.region(), **options), True, _object)


def _filled(batch: Batch, name: str | None, usual: str) -> Tensor:
    """What replaces pixels: the metric's own option, the run's, or what is usual for the metric."""
    name = name or batch.fill or usual
    if name == "black":
        frame = batch.subject.frame
        return metrics.black(frame.mean, frame.std).to(batch.images)
    if name == "mean":
        return metrics.mean_colour(batch.images)
    if name == "blur":
        return metrics.blurred(batch.images)
    raise ValueError(f"fill is {name!r}; expected one of {', '.join(FILLS)}")


def _removing(function: Callable[..., Any], spec: Spec, usual: str, higher: bool, **defaults: Any) -> Measure:
    """A metric of what the model makes of images some of whose pixels are replaced."""
    options = _options(spec, fill=None, **defaults)
    rest = {key: value for key, value in options.items() if key != "fill"}

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        fill = _filled(batch, options["fill"], usual)
        found = function(batch.forward, batch.images, maps, batch.targets, fill=fill, **rest)
        return found.auc if isinstance(found, metrics.Curve) else found

    return _single(spec, value, higher, _image)


def _infidelity(forward: Any, images: Tensor, maps: Tensor, target: Tensor, **options: Any) -> Tensor:
    return metrics.infidelity(forward, images, maps, target, max_examples_per_batch=len(maps), **options)


def _corners(spec: Spec) -> Measure:
    """How much of a map is in the corners of the image, and whether its peak is."""
    options = _options(spec, part=1 / 14)
    energy, peak = f"{spec.text}.energy", f"{spec.text}.peak"

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        masks = metrics.corners(maps, **options)
        return {energy: metrics.energy(maps, masks), peak: metrics.pointing(maps, masks)}

    quantities = (
        Quantity(f"{spec.text} energy", False, ((energy, None),)),
        Quantity(f"{spec.text} peak", False, ((peak, None),)),
    )
    return Measure(spec.text, quantities, _image, compute)


def _two(spec: Spec) -> Measure:
    _options(spec)

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        mine, other = (batch.stack([getattr(one, of) for one in batch.examples]) for of in ("mask", "other_mask"))
        return metrics.two_object(maps, mine, other)

    return _single(spec, value, True, _two_objects)


def _grid(spec: Spec) -> Measure:
    """Relevance in the right cell of a mosaic of images of different classes, shrunk to fit the model's input."""
    options = _options(spec, rows=2, cols=2)
    rows, cols = int(options["rows"]), int(options["cols"])

    def mosaic(batch: Batch, one: Example) -> tuple[Tensor, int] | None:
        partners = batch.partners(one, rows * cols - 1)
        if partners is None:
            return None
        height, width = one.image.shape[1:]
        if height % rows or width % cols:
            raise ValueError(f"an input of {height} x {width} px cannot be cut into {rows} x {cols} equal cells")
        place = seed_of(f"{one.sample.name}/cell", batch.seed) % (rows * cols)
        cells = [partner.image for partner in partners]
        cells.insert(place, one.image)
        small = interpolate(
            torch.stack(cells), (height // rows, width // cols), mode="bilinear", align_corners=False, antialias=True
        )
        return metrics.grid_mosaic(small[None], rows, cols)[0], place

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        made = [mosaic(batch, one) for one in batch.examples]
        able = [row for row, found in enumerate(made) if found is not None]
        values = torch.full((len(made),), float("nan"))
        if able:
            images = torch.stack([found[0] for found in made if found is not None]).to(batch.images)
            cells = torch.tensor([found[1] for found in made if found is not None])
            part = batch.of(able)
            found = method.maps(images, part.targets, part.names, batch.seed)
            values[able] = metrics.grid_share(found, rows, cols, cells.to(found.device)).float().cpu()
        return values

    return _single(spec, value, True, _in_grid)


def _segmentation(spec: Spec) -> Measure:
    _options(spec)

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        truth = []
        for one in batch.examples:
            assert one.mask is not None
            labels = one.mask.long()
            truth.append(labels if one.void is None else labels.masked_fill(one.void, -1))
        stacked = torch.stack(truth).to(maps.device)
        counts = metrics.segmentation_counts(maps, stacked)
        return {
            f"{spec.text}.correct": counts.correct,
            f"{spec.text}.labelled": counts.labelled,
            f"{spec.text}.background_intersection": counts.intersection[:, 0],
            f"{spec.text}.background_union": counts.union[:, 0],
            f"{spec.text}.object_intersection": counts.intersection[:, 1],
            f"{spec.text}.object_union": counts.union[:, 1],
            f"{spec.text}.ap": metrics.segmentation_average_precision(maps, stacked),
        }

    def ratio(above: str, below: str) -> tuple[str, str]:
        return f"{spec.text}.{above}", f"{spec.text}.{below}"

    overlaps = tuple(ratio(f"{part}_intersection", f"{part}_union") for part in ("background", "object"))
    quantities = (
        Quantity(f"{spec.text} accuracy", True, (ratio("correct", "labelled"),)),
        Quantity(f"{spec.text} mAP", True, ((f"{spec.text}.ap", None),)),
        Quantity(f"{spec.text} mIoU", True, overlaps),
    )
    return Measure(spec.text, quantities, _masked, compute)


def _box(spec: Spec) -> Measure:
    options = _options(spec, threshold=0.5)

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        boxes = [one.boxes.to(maps.device) for one in batch.examples if one.boxes is not None]
        found = {f"{spec.text}.iou": metrics.box_iou(maps, boxes, **options)}
        labels = [one.sample.target for one in batch.examples]
        right = [row for row, label in enumerate(labels) if label is not None]
        values = torch.full((len(labels),), float("nan"))
        if right:
            known = torch.tensor([label for label in labels if label is not None])
            predicted = batch.predicted.cpu()[right]
            chosen = [boxes[row] for row in right]
            values[right] = metrics.top1_localisation(maps[right], chosen, predicted, known, **options).float().cpu()
        return {**found, f"{spec.text}.top1": values}

    quantities = (
        Quantity(f"{spec.text} IoU", True, ((f"{spec.text}.iou", None),)),
        Quantity(f"{spec.text} top-1", True, ((f"{spec.text}.top1", None),)),
    )
    return Measure(spec.text, quantities, _boxed, compute)


def _spearman(spec: Spec) -> Measure:
    _options(spec)

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        human = batch.stack([one.human for one in batch.examples])
        return {spec.text: metrics.spearman(maps, human), f"{spec.text}.ceiling": metrics.spearman_ceiling(human)}

    quantities = (
        Quantity(spec.text, True, ((spec.text, None),)),
        Quantity(f"{spec.text} ceiling", None, ((f"{spec.text}.ceiling", None),)),
    )
    return Measure(spec.text, quantities, _annotated, compute)


def _sensitivity(spec: Spec) -> Measure:
    options = _options(spec, radius=0.02, draws=10)

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        values = []
        for row, name in enumerate(batch.names):  # one at a time: a method's randomness hangs on the image's name

            def explain(images: Tensor, target: Tensor, name: str = name) -> Tensor:
                return method.maps(images, target.expand(len(images)), [name] * len(images), batch.seed)

            one = slice(row, row + 1)
            values.append(metrics.sensitivity(explain, batch.images[one], batch.targets[one], **options))
        return torch.cat(values)

    return _single(spec, value, False, _image)


MEASURES: dict[str, Callable[[Spec], Measure]] = {
    "pointing": partial(_on_region, metrics.pointing),
    "energy": partial(_on_region, metrics.energy),
    "iou": partial(_on_region, metrics.iou, threshold="mean"),
    "ap": partial(_on_region, metrics.average_precision),
    "f1": partial(_on_region, metrics.f1, threshold="mean"),
    "accuracy": partial(_on_region, metrics.pixel_accuracy, threshold="mean"),
    "positive": partial(_removing, partial(metrics.perturbation_curve, order="positive"), usual="black", higher=False),
    "negative": partial(_removing, partial(metrics.perturbation_curve, order="negative"), usual="black", higher=True),
    "insertion": partial(_removing, metrics.insertion, usual="blur", higher=True, steps=50),
    "deletion": partial(_removing, metrics.deletion, usual="black", higher=False, steps=50),
    "corners": _corners,
    "two": _two,
    "grid": _grid,
    "segmentation": _segmentation,
    "box": _box,
    "spearman": _spearman,
    "infidelity": partial(
        _removing, _infidelity, usual="black", higher=False, patch=None, share=0.2, draws=32, normalize=True
    ),
    "sensitivity": _sensitivity,
}


def build(text: str) -> tuple[Measure, ...]:
    """The metrics of a command line, ``pointing,iou(threshold=best)``.

    Raises:
        ValueError: A name is unknown, or a metric does not take an option.

    Example:
        >>> [measure.name for measure in build("pointing,two")]
        ['pointing', 'two']
    """
    return tuple(_measure(spec) for spec in parse(text, "metric"))


def _measure(spec: Spec) -> Measure:
    if spec.name not in MEASURES:
        known = ", ".join(MEASURES)
        raise ValueError(f"unknown metric {spec.name!r}; {near(spec.name, list(MEASURES), f'expected one of {known}')}")
    return MEASURES[spec.name](spec)
