"""An ``Explainer``: one model with its preprocessing, ready to explain images of any kind one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat.attribution.base import explain_batch
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.errors import SourceError, one_line
from captum_lnstat.explanation.explanation import Explanation, pixels_of
from captum_lnstat.explanation.prediction import Prediction
from captum_lnstat.explanation.provenance import Provenance
from captum_lnstat.explanation.subject.crop import View, measure
from captum_lnstat.explanation.subject.images import Item
from captum_lnstat.explanation.subject.names import find_class
from captum_lnstat.explanation.subject.subject import Subject
from captum_lnstat.recording.forward import Output, pick_output
from captum_lnstat.topology import takes_videos
from captum_lnstat.trace.trace import Trace
from captum_lnstat.visualize.maps import to_picture

Target = int | str | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image on its way into the model.

    Attributes:
        item: What was given.
        inputs: ``(channel, height, width)``.
        image: What the model sees, as a picture.
        view: How the two belong together.
    """

    item: Item
    inputs: Tensor
    image: Image.Image
    view: View

    @cached_property
    def pixels(self) -> np.ndarray[Any, Any]:
        """``image`` as values from 0 to 1."""
        return pixels_of(self.image)


class Explainer:
    """Explains images with one model; what it finds out about the transform is found out once.

    Args:
        subject: The model, its preprocessing and its classes.
        rule: The rule of ``LNStatAttribution``.
        output: Which of the model's outputs is explained.
        **options: As for ``LNStatAttribution``.

    Example:
        >>> from captum_lnstat import zoo
        >>> from captum_lnstat.explanation.subject.images import read_items
        >>> from captum_lnstat.explanation.subject.subject import read_subject
        >>> explainer = Explainer(read_subject("vit-mini"), rule="rollout")
        >>> items, _ = read_items([scene.image for scene in zoo.scenes()[:3]])
        >>> [each.grid.shape for each in explainer.stream(items, [None] * 3, batch_size=2)]
        [(8, 8), (8, 8), (8, 8)]
    """

    def __init__(self, subject: Subject, *, rule: str = "lnstat", output: Output = None, **options: Any) -> None:
        if takes_videos(subject.model):
            raise SourceError(
                f"{type(subject.model).__name__} takes videos; expected a model of images. LNStatAttribution explains "
                "videos, and captum_lnstat.visualize.frame_sheet draws them"
            )
        self.subject = subject
        self.output = output
        self.lnstat = LNStatAttribution(subject.model, rule=rule, output=output, **options)
        self.provenance = Provenance(subject, self.lnstat)
        self._views: dict[tuple[int, int], View] = {}

    def prepare(self, item: Item) -> Prepared:
        """One image as the model's input, and as a picture of what the model sees."""
        if item.picture is None:
            assert item.inputs is not None
            # The probe says what the transform subtracts; the input is taken to have gone through it.
            size = (item.inputs.shape[2], item.inputs.shape[1])
            shown = len(item.inputs) in (1, 3)
            view = replace(self._view(size), measured=None) if shown else View((), (), size[::-1], size)
            return Prepared(item, item.inputs, _picture(item.inputs, view), view)
        inputs = self.subject.transform(item.picture)
        if not isinstance(inputs, Tensor) or inputs.ndim != 3:
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise SourceError(f"the transform made {shape} of an image; expected a tensor (channel, height, width)")
        view = self._view(item.picture.size)
        return Prepared(item, inputs, _picture(inputs, view), view)

    def _view(self, size: tuple[int, int]) -> View:
        if size not in self._views:
            self._views[size] = measure(self.subject.transform, size)
        return self._views[size]

    def placed(self, inputs: Tensor) -> Tensor:
        """Inputs on the model's device and in its dtype."""
        parameter = next(self.subject.model.parameters(), inputs)
        return inputs.to(device=parameter.device, dtype=parameter.dtype if parameter.is_floating_point() else None)

    def predict(self, inputs: Tensor) -> list[Prediction]:
        """What the model makes of every image."""
        with torch.no_grad():
            returned = self._run(self.placed(inputs))
            scores = pick_output(returned, self.output).detach().float().cpu()
        if scores.dim() != 2:
            raise SourceError(
                f"the model returned scores of shape {tuple(scores.shape)}; expected (image, class). A model with "
                "another output is explained by LNStatAttribution"
            )
        count = scores.shape[1]
        # A head that was replaced tells apart other classes than those that the model was made for.
        names = self.subject.class_names if len(self.subject.class_names) == count else ()
        if self.subject.names_from and not names:
            given = len(self.subject.class_names)
            raise SourceError(f"{self.subject.names_from!r} holds {given} names; the model has {count} scores")
        config = getattr(self.subject.model, "config", None)
        several = getattr(config, "problem_type", None) == "multi_label_classification"
        likely = (scores.sigmoid() if several else scores.softmax(1)).double().numpy()
        # One score may be anything: softmax would make it 100 %.
        return [
            Prediction(int(row.argmax()), None if count == 1 else likely[place], names)
            for place, row in enumerate(scores)
        ]

    def _run(self, inputs: Tensor) -> Any:
        try:
            return self.subject.model(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            raise SourceError(
                f"the model cannot be run on an input of shape {tuple(inputs.shape)}, {type(error).__name__}: "
                f"{one_line(error)}. In Python, pass transform=, from a Pillow image to what the model takes, or such "
                "an input, a floating tensor"
            ) from error

    def relevance(self, inputs: Tensor, targets: list[int] | None) -> tuple[Trace, Tensor]:
        """The trace of the images' pass, and their relevance on the patch grid."""
        outcome, relevance = explain_batch(self.lnstat, inputs, [targets])
        return outcome.trace, relevance.grid

    def explain(
        self, prepared: Sequence[Prepared], targets: Sequence[Target], predictions: Sequence[Prediction] | None = None
    ) -> list[Explanation]:
        """Explain images of one size in one pass, each for a class of its own, or, for None, the predicted one.

        Args:
            prepared: The images.
            targets: The class of each.
            predictions: Those of ``predict``, if they are there already.
        """
        inputs = self.placed(torch.stack([each.inputs for each in prepared]))
        predictions = self.predict(inputs) if predictions is None else predictions
        classes = [
            each.prediction if target is None else find_class(target, each.class_names, each.count)
            for target, each in zip(targets, predictions, strict=True)
        ]
        trace, grid = self.relevance(inputs, classes)
        size = inputs.shape[-2], inputs.shape[-1]
        maps = to_pixels(grid, size, trace.patch, self.lnstat.interpolation, trace.origin)
        return [
            Explanation(
                prediction=prediction.prediction,
                probabilities=prediction.probabilities,
                class_names=prediction.class_names,
                name=each.item.name,
                rule=self.lnstat.rule,
                target=target,
                grid=grid[place].cpu().double().numpy(),
                relevance=maps[place].cpu().double().numpy(),
                image=each.image,
                original=each.item.picture,
                box=each.view.box,
                patch=trace.patch,
                origin=trace.origin,
                covers=trace.covers,
                provenance=self.provenance,
                cautions=self.cautions(prediction, target, picture=each.item.picture is not None)
                + _shown(len(each.inputs))
                + ((each.item.caution,) if each.item.caution else ()),
            )
            for place, (each, prediction, target) in enumerate(zip(prepared, predictions, classes, strict=True))
        ]

    def cautions(self, prediction: Prediction, target: int, *, picture: bool = True) -> tuple[str, ...]:
        """What has to be known to read the map of a class right."""
        own = self.subject.cautions(pictures=picture)
        return own if self.subject.random else own + prediction.faint(target)

    def stream(self, items: Sequence[Item], targets: Sequence[Target], batch_size: int) -> Iterator[Explanation]:
        """Explain images in batches of those that follow each other and are of one size."""
        waiting: list[tuple[Prepared, Target]] = []
        for item, target in zip(items, targets, strict=True):
            prepared = self.prepare(item)
            if waiting and (len(waiting) == batch_size or waiting[0][0].inputs.shape != prepared.inputs.shape):
                yield from self._flush(waiting)
                waiting = []
            waiting.append((prepared, target))
        yield from self._flush(waiting)

    def _flush(self, waiting: list[tuple[Prepared, Target]]) -> list[Explanation]:
        return self.explain([each for each, _ in waiting], [target for _, target in waiting]) if waiting else []


def _shown(channels: int) -> tuple[str, ...]:
    return () if channels in (1, 3) else (f"the input has {channels} channels; the picture shows their mean",)


def _picture(inputs: Tensor, view: View) -> Image.Image:
    """The input with its normalisation undone; a single channel is shown as grey, and so is the mean of others."""
    if len(inputs) not in (1, 3) or len(view.mean) != len(inputs):
        mean = inputs.detach().double().mean(0, keepdim=True)
        low, high = float(mean.min()), float(mean.max())
        inputs, view = mean, replace(view, mean=(-low / max(high - low, 1e-12),), std=(1 / max(high - low, 1e-12),))
    pixels = to_picture(inputs.expand(3, -1, -1), view.mean, view.std)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))
