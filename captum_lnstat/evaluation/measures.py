"""Metrics by name: what they apply to, what they put into a record, and what becomes of it in the summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_lnstat import metrics
from captum_lnstat.errors import near
from captum_lnstat.evaluation import applies
from captum_lnstat.evaluation.enlarging import enlarged
from captum_lnstat.evaluation.frame import Example
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.mosaics import Mosaic, cell_masks, mosaic
from captum_lnstat.evaluation.other_model import OtherModel
from captum_lnstat.evaluation.question import Batch, Measure, Quantity, Values
from captum_lnstat.evaluation.specs import Spec, parse
from captum_lnstat.evaluation.subject import Scores, Subject
from captum_lnstat.metrics.wsol import IOUS

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


def _on_region(function: Callable[..., Tensor], spec: Spec, **defaults: Any) -> Measure:
    """A metric of maps and the object's region."""
    options = _options(spec, **defaults)
    return _single(spec, lambda batch, maps, method: function(maps, batch.region(), **options), True, applies.objects)


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

    return _single(spec, value, higher, applies.image)


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
    return Measure(spec.text, quantities, applies.image, compute)


def _two(spec: Spec) -> Measure:
    _options(spec)

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        mine, other = (batch.stack([getattr(one, of) for one in batch.examples]) for of in ("mask", "other_mask"))
        return metrics.two_object(maps, mine, other)

    return _single(spec, value, True, applies.two_objects)


def _grid(spec: Spec) -> Measure:
    """Relevance in the right cell of a mosaic of images of different classes."""
    options = _options(spec, rows=2, cols=2, size="shrunk", ask="own")
    rows, cols = int(options["rows"]), int(options["cols"])
    _check_choice(spec, "size", options["size"], ("shrunk", "full"))
    _check_choice(spec, "ask", options["ask"], ("own", "all"))
    full = options["size"] == "full"
    share, peak = spec.text, f"{spec.text}.pointing"
    larger = OtherModel(
        lambda subject, seed: enlarged(subject, rows * subject.frame.size[0], cols * subject.frame.size[1])
    )

    def asked(batch: Batch, method: Method, mosaics: list[Mosaic], cells: list[int]) -> tuple[Tensor, Tensor]:
        """Share and peak of one cell of each mosaic."""
        images = torch.stack([one.image for one in mosaics]).to(batch.images)
        classes = [one.classes[cell] for one, cell in zip(mosaics, cells, strict=True)]
        maps = method.maps(images, torch.tensor(classes, device=images.device), batch.names, batch.seed)
        chosen = torch.tensor(cells, device=maps.device)
        pointing = metrics.pointing(maps, cell_masks(maps, rows, cols, chosen))
        return metrics.grid_share(maps, rows, cols, chosen).float().cpu(), pointing.float().cpu()

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        values = torch.full((2, len(batch.examples)), float("nan"), device="cpu")
        made = [mosaic(batch, one, rows, cols, full=full) for one in batch.examples]
        able = [row for row, found in enumerate(made) if found is not None]
        if able and full:
            method = larger.method(batch, method)
        size = max(1, len(batch.examples) // (rows * cols)) if full else len(batch.examples)  # as many pixels at a time
        for start in range(0, len(able), size):
            part = able[start : start + size]
            mosaics = [found for found in (made[row] for row in part) if found is not None]
            turns = range(rows * cols) if options["ask"] == "all" else [0]
            answers = []
            for turn in turns:
                cells = [turn if options["ask"] == "all" else one.own for one in mosaics]
                answers.append(torch.stack(asked(batch.of(part), method, mosaics, cells)))
            values[:, part] = torch.stack(answers).mean(0)
        return {share: values[0], peak: values[1]}

    quantities = (Quantity(share, True, ((share, None),)), Quantity(f"{share} pointing", True, ((peak, None),)))
    return Measure(share, quantities, applies.in_grid, compute)


def _check_choice(spec: Spec, key: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key} of metric {spec.name!r} is {value!r}; expected {' or '.join(known)}")


def _randomisation(spec: Spec) -> Measure:
    """How much of a map is left when the upper layers of the model have forgotten what they learned."""
    options = _options(spec, layers=0.5, manner="reset", absolute=False)

    def forgetful(subject: Subject, seed: int) -> Subject:
        model = metrics.randomised(subject.model, options["layers"], manner=options["manner"], seed=seed)
        return replace(subject, model=model, forward=Scores(model) if isinstance(subject.forward, Scores) else model)

    other = OtherModel(forgetful)

    def value(batch: Batch, maps: Tensor, method: Method) -> Tensor:
        after = other.method(batch, method).maps(batch.images, batch.targets, batch.names, batch.seed)
        return metrics.map_correlation(maps, after, absolute=options["absolute"])

    return _single(spec, value, False, applies.image)


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
    return Measure(spec.text, quantities, applies.masked, compute)


def _box(spec: Spec) -> Measure:
    options = _options(spec, threshold=0.5)

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        boxes = [one.boxes.to(maps.device) for one in batch.examples if one.boxes is not None]
        found = {f"{spec.text}.iou": metrics.box_iou(maps, boxes, **options)}
        labels = [one.sample.target for one in batch.examples]
        right = [row for row, label in enumerate(labels) if label is not None]
        values = torch.full((len(labels),), float("nan"), device="cpu")
        if right:
            known = torch.tensor([label for label in labels if label is not None], device="cpu")
            predicted = batch.predicted.cpu()[right]
            chosen = [boxes[row] for row in right]
            values[right] = metrics.top1_localisation(maps[right], chosen, predicted, known, **options).float().cpu()
        return {**found, f"{spec.text}.top1": values}

    quantities = (
        Quantity(f"{spec.text} IoU", True, ((f"{spec.text}.iou", None),)),
        Quantity(f"{spec.text} top-1", True, ((f"{spec.text}.top1", None),)),
    )
    return Measure(spec.text, quantities, applies.boxed, compute)


def _max_box(spec: Spec) -> Measure:
    """MaxBoxAcc: whether each image is found at every threshold, and the best threshold in the summary."""
    options = _options(spec, steps=20)
    names = [[f"{spec.text}.{iou:g}.{step}" for step in range(options["steps"])] for iou in IOUS]

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        boxes = [one.boxes.to(maps.device) for one in batch.examples if one.boxes is not None]
        hits = metrics.box_hits(maps, boxes, **options).float()
        return {name: hits[:, i, j] for i, row in enumerate(names) for j, name in enumerate(row)}

    parts = tuple((name, None) for row in names for name in row)
    return Measure(spec.text, (Quantity(spec.text, True, parts, options["steps"]),), applies.boxed, compute)


def _spearman(spec: Spec) -> Measure:
    _options(spec)

    def compute(batch: Batch, maps: Tensor, method: Method) -> Values:
        human = batch.stack([one.human for one in batch.examples])
        return {spec.text: metrics.spearman(maps, human), f"{spec.text}.ceiling": metrics.spearman_ceiling(human)}

    quantities = (
        Quantity(spec.text, True, ((spec.text, None),)),
        Quantity(f"{spec.text} ceiling", None, ((f"{spec.text}.ceiling", None),)),
    )
    return Measure(spec.text, quantities, applies.annotated, compute)


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

    return _single(spec, value, False, applies.image)


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
    "randomisation": _randomisation,
    "segmentation": _segmentation,
    "box": _box,
    "maxbox": _max_box,
    "saco": partial(_removing, metrics.saco, usual="mean", higher=True, groups=10),
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
