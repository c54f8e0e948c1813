"""``explain``: one call from a model and an image, in whatever form they are, to an explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captum_lnstat.attribution import LNStatAttribution, Rule
from captum_lnstat.class_names import find_class
from captum_lnstat.errors import SourceError
from captum_lnstat.explanation import Explanation, Explanations
from captum_lnstat.images import ImageLike, Item, read_items
from captum_lnstat.interpolation import to_pixels
from captum_lnstat.outputs import Output, pick_output
from captum_lnstat.preprocessing import Preprocessing
from captum_lnstat.sources import Subject, read_subject, subject_of
from captum_lnstat.view import View, measure
from captum_lnstat.warning import warn_caller
from captum_lnstat.zoo import ReferenceModel

Target = int | str | None
_UNCHANGED = View((0.0,) * 3, (1.0,) * 3, None)


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


class Explainer:
    """Explains images with one model; what it finds out about the transform is found out once.

    Args:
        subject: The model, its preprocessing and its classes.
        rule: The rule of ``LNStatAttribution``.
        output: Which of the model's outputs is explained.
        **options: As for ``LNStatAttribution``.
    """

    def __init__(self, subject: Subject, *, rule: Rule = "lnstat", output: Output = None, **options: Any) -> None:
        self.subject = subject
        self.output = output
        self.lnstat = LNStatAttribution(subject.model, rule=rule, output=output, **options)
        self._views: dict[tuple[int, int], View] = {}

    def prepare(self, item: Item) -> Prepared:
        """One image as the model's input, and as a picture of what the model sees."""
        if item.picture is None:
            assert item.inputs is not None
            # The probe says what the transform subtracts; the input is taken to have gone through it.
            view = replace(self._view((64, 64)), box=None)
            return Prepared(item, item.inputs, _picture(item.inputs, view), view)
        inputs = self.subject.transform(item.picture)
        view = self._view(item.picture.size)
        return Prepared(item, inputs, _picture(inputs, view), view)

    def _view(self, size: tuple[int, int]) -> View:
        if size not in self._views:
            self._views[size] = measure(self.subject.transform, size)
        return self._views[size]

    def scores(self, inputs: Tensor) -> Tensor:
        """The model's scores, ``(image, class)``, without a graph."""
        with torch.no_grad():
            scores = pick_output(self.subject.model(self.placed(inputs)), self.output)
        if scores.dim() != 2:
            raise SourceError(
                f"the model returned scores of shape {tuple(scores.shape)}; expected (image, class). A model with "
                "another output is explained by LNStatAttribution"
            )
        return scores.detach().float().cpu()

    def placed(self, inputs: Tensor) -> Tensor:
        """Inputs on the model's device and in its dtype."""
        parameter = next(self.subject.model.parameters(), inputs)
        return inputs.to(device=parameter.device, dtype=parameter.dtype if parameter.is_floating_point() else None)

    def explain(self, prepared: Sequence[Prepared], targets: Sequence[Target]) -> list[Explanation]:
        """Explain images of one size in one pass, each for a class of its own, or, for None, the predicted one."""
        inputs = self.placed(torch.stack([each.inputs for each in prepared]))
        scores = self.scores(inputs)
        best = [int(row.argmax()) for row in scores]
        # A head that was replaced tells apart other classes than those that the model was made for.
        names = self.subject.class_names if len(self.subject.class_names) == scores.shape[1] else ()
        wanted = [
            top if target is None else find_class(target, names, scores.shape[1])
            for target, top in zip(targets, best, strict=True)
        ]
        outcome, relevance = self.lnstat._explain(inputs, wanted, None)
        height, width = inputs.shape[-2:]
        maps = to_pixels(relevance.grid, (height, width), outcome.trace.patch, self.lnstat.interpolation)
        likely = self._probabilities(scores)
        return [
            Explanation(
                name=each.item.name,
                rule=self.lnstat.rule,
                target=wanted[i],
                prediction=best[i],
                probabilities=None if likely is None else likely[i],
                class_names=names,
                grid=relevance.grid[i].cpu().double().numpy(),
                relevance=maps[i].cpu().double().numpy(),
                image=each.image,
                original=each.item.picture,
                box=each.view.box,
                patch=outcome.trace.patch,
                covers=outcome.trace.covers,
            )
            for i, each in enumerate(prepared)
        ]

    def _probabilities(self, scores: Tensor) -> np.ndarray[Any, Any] | None:
        if scores.shape[1] == 1:  # the one score may be anything: softmax would say 100 %
            return None
        config = getattr(self.subject.model, "config", None)
        several = getattr(config, "problem_type", None) == "multi_label_classification"
        return np.asarray((scores.sigmoid() if several else scores.softmax(1)).double().numpy())

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


def _picture(inputs: Tensor, view: View) -> Image.Image:
    """The input with its normalisation undone; a single channel is shown as grey."""
    pixels = inputs.detach().cpu().double().numpy()
    if len(pixels) not in (1, 3) or len(view.mean) != len(pixels):
        raise SourceError(
            f"the model's input has shape {tuple(inputs.shape)}, its transform {len(view.mean)} channels; expected an "
            "image of 3 channels or 1"
        )
    pixels = pixels * np.reshape(view.std, (-1, 1, 1)) + np.reshape(view.mean, (-1, 1, 1))
    pixels = (np.broadcast_to(pixels, (3, *pixels.shape[1:])).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@overload
def explain(
    model: nn.Module | ReferenceModel | str,
    images: str | Path | Image.Image,
    target: Target = ...,
    *,
    rule: Rule = ...,
    transform: Any = ...,
    class_names: Sequence[str] | None = ...,
    whole: bool = ...,
    pretrained: bool = ...,
    checkpoint: str | Path | None = ...,
    batch_size: int = ...,
    output: Output = ...,
    **options: Any,
) -> Explanation: ...


@overload
def explain(
    model: nn.Module | ReferenceModel | str,
    images: Sequence[ImageLike],
    target: Target | Sequence[Target] = ...,
    *,
    rule: Rule = ...,
    transform: Any = ...,
    class_names: Sequence[str] | None = ...,
    whole: bool = ...,
    pretrained: bool = ...,
    checkpoint: str | Path | None = ...,
    batch_size: int = ...,
    output: Output = ...,
    **options: Any,
) -> Explanations: ...


@overload
def explain(
    model: nn.Module | ReferenceModel | str,
    images: np.ndarray[Any, Any] | Tensor,
    target: Target | Sequence[Target] = ...,
    *,
    rule: Rule = ...,
    transform: Any = ...,
    class_names: Sequence[str] | None = ...,
    whole: bool = ...,
    pretrained: bool = ...,
    checkpoint: str | Path | None = ...,
    batch_size: int = ...,
    output: Output = ...,
    **options: Any,
) -> Any: ...


def explain(
    model: nn.Module | ReferenceModel | str,
    images: ImageLike | Sequence[ImageLike],
    target: Target | Sequence[Target] = None,
    *,
    rule: Rule = "lnstat",
    transform: Any = None,
    class_names: Sequence[str] | None = None,
    whole: bool = False,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    batch_size: int = 8,
    output: Output = None,
    **options: Any,
) -> Explanation | Explanations:
    """Explain one image or several, with the model's own preprocessing.

    Args:
        model: A module in eval mode, a model of the zoo, or a name: ``"swin-mini"``, ``"vit-mini"``, one that timm
            knows, ``"torchvision:NAME"``, ``"hf:NAME"`` or ``"package.module:function"``.
        images: A path, a Pillow image, a ``uint8`` array ``(height, width, 3)`` or tensor ``(3, height, width)``, or a
            floating array with values from 0 to 1; a list or batch of these. A floating tensor is taken for an input
            of the model and goes to it as it is.
        target: The class, by index or by name; one for all images or a list of one for each. Default: the class that
            the model predicts.
        rule: The rule of ``LNStatAttribution``.
        transform: From a Pillow image to ``(3, height, width)``, in the place of the model's own preprocessing.
        class_names: In the place of the names that the model knows.
        whole: Squeeze the whole image to the model's size; nothing is cut off, and shapes are distorted. Default: as
            the model's preprocessing does it, which for most models cuts off the borders.
        pretrained: For a model given by its name: take its library's weights, which are downloaded. Else they are
            random, and a warning says so.
        checkpoint: For a model given by its name: a file with its weights.
        batch_size: Explain at most so many images at a time.
        output: Which scores to explain if the model returns several, as for ``LNStatAttribution``.
        **options: Further options of ``LNStatAttribution``: ``contrastive``, ``residual``, ...

    Returns:
        An ``Explanation``, or for several images an ``Explanations``, a tuple of them.

    Raises:
        SourceError: Model, image or class cannot be had; a subclass of ValueError.
        UnsupportedModelError, RecordingError, ValueError: As for ``LNStatAttribution.attribute``.

    Example:
        >>> from captum_lnstat import explain, zoo
        >>> explanation = explain("swin-mini", zoo.scenes()[300].image, target="dress")
        >>> explanation.label(explanation.prediction), explanation.grid.shape, explanation.overlay.size
        ('pullover (2)', (16, 16), (64, 64))
    """
    if isinstance(model, str):
        subject = read_subject(model, pretrained, None if checkpoint is None else Path(checkpoint))
    elif pretrained or checkpoint is not None:
        raise SourceError("pretrained and checkpoint are for a model that is given by its name; this one has weights")
    else:
        subject = subject_of(model)
    subject = _adjusted(subject, transform, class_names, whole)
    items, single = read_items(images)
    if subject.random:
        warn_caller(f"the weights of {subject.name} are random, and so is the explanation; give pretrained=True")
    if subject.preprocessing.assumed and any(item.picture is not None for item in items):
        warn_caller(
            f"{type(subject.model).__name__} does not say how its images were prepared; {subject.preprocessing.source} "
            "is taken. Give transform= to be right"
        )
    if subject.model.training:
        warn_caller("the model is in train mode, in which dropout changes its scores; call model.eval() first")
    found = list(
        Explainer(subject, rule=rule, output=output, **options).stream(
            items, _targets(target, items, single), batch_size
        )
    )
    if class_names is not None and not found[0].class_names:
        raise SourceError(f"class_names holds {len(class_names)} names, which are not as many as the model has scores")
    return found[0] if single else Explanations(found)


def _adjusted(subject: Subject, transform: Any, class_names: Sequence[str] | None, whole: bool) -> Subject:
    if transform is not None:
        if whole:
            raise SourceError("transform and whole exclude each other; let the transform take in the whole image")
        if not callable(transform):
            raise SourceError(f"transform is a {type(transform).__name__}; expected a function of a Pillow image")
        subject = replace(subject, preprocessing=Preprocessing(transform, "the transform given"))
    if whole:
        subject = replace(subject, preprocessing=subject.preprocessing.whole())
    if class_names is not None:
        subject = replace(subject, class_names=tuple(class_names))
    return subject


def _targets(target: Target | Sequence[Target], items: Sequence[Item], single: bool) -> list[Target]:
    if target is None or isinstance(target, int | str):
        return [target] * len(items)
    targets = list(target) if isinstance(target, list | tuple) else None
    if single or targets is None or len(targets) != len(items):
        raise SourceError(
            f"target is {target!r} for {len(items)} image{'s' * (len(items) != 1)}; expected an index or a name, or, "
            "for several images, a list of one for each"
        )
    return targets
