"""``explain``: one call from a model and an image, in whatever form they are, to an explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor, nn

from captum_lnstat.errors import SourceError, warn_caller
from captum_lnstat.explanation.explainer import Explainer, Target
from captum_lnstat.explanation.explanation import Explanation, Explanations
from captum_lnstat.explanation.subject.images import ImageLike, Item, read_items
from captum_lnstat.explanation.subject.preprocessing import Preprocessing
from captum_lnstat.explanation.subject.subject import Subject, read_subject, subject_of
from captum_lnstat.recording.forward import Output
from captum_lnstat.zoo import ReferenceModel


@overload
def explain(
    model: nn.Module | ReferenceModel | str,
    images: str | Path | Image.Image,
    target: Target = ...,
    *,
    top_k: None = ...,
    rule: str = ...,
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
    top_k: None = ...,
    rule: str = ...,
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
    top_k: None = ...,
    rule: str = ...,
    transform: Any = ...,
    class_names: Sequence[str] | None = ...,
    whole: bool = ...,
    pretrained: bool = ...,
    checkpoint: str | Path | None = ...,
    batch_size: int = ...,
    output: Output = ...,
    **options: Any,
) -> Any: ...


@overload
def explain(
    model: nn.Module | ReferenceModel | str,
    images: ImageLike | Sequence[ImageLike],
    target: None = ...,
    *,
    top_k: int,
    rule: str = ...,
    transform: Any = ...,
    class_names: Sequence[str] | None = ...,
    whole: bool = ...,
    pretrained: bool = ...,
    checkpoint: str | Path | None = ...,
    batch_size: int = ...,
    output: Output = ...,
    **options: Any,
) -> Explanations: ...


def explain(
    model: nn.Module | ReferenceModel | str,
    images: ImageLike | Sequence[ImageLike],
    target: Target | Sequence[Target] = None,
    *,
    top_k: int | None = None,
    rule: str = "lnstat",
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
        top_k: Explain so many classes of each image, the likeliest first, rather than one ``target``; they follow each
            other, and a notebook shows them as one picture with a menu.
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
        An ``Explanation``, or for several images or ``top_k`` an ``Explanations``, a tuple of them.

    Raises:
        SourceError: Model, image or class cannot be had; a subclass of ValueError.
        UnsupportedModelError, RecordingError, ValueError: As for ``LNStatAttribution.attribute``.

    Example:
        >>> from captum_lnstat import explain, zoo
        >>> explanation = explain("swin-mini", zoo.scenes()[300].image, target="dress")
        >>> explanation.label(explanation.target), explanation.grid.shape, explanation.overlay.size
        ('dress (3)', (16, 16), (64, 64))
    """
    if top_k is not None and (target is not None or not isinstance(top_k, int) or top_k < 1):
        raise SourceError(f"top_k is {top_k!r}, target {target!r}; expected one of the two, top_k a number from 1")
    if isinstance(model, str):
        subject = read_subject(model, pretrained, None if checkpoint is None else Path(checkpoint))
    elif pretrained or checkpoint is not None:
        raise SourceError("pretrained and checkpoint are for a model that is given by its name; this one has weights")
    else:
        subject = subject_of(model)
    subject = _adjusted(subject, transform, class_names, whole)
    items, single = read_items(images)
    for caution in subject.cautions(pictures=any(item.picture is not None for item in items)):
        warn_caller(caution)
    if subject.model.training:
        warn_caller("the model is in train mode, in which dropout changes its scores; call model.eval() first")
    explainer = Explainer(subject, rule=rule, output=output, **options)
    if top_k is None:
        found = list(explainer.stream(items, _targets(target, items, single), batch_size))
    else:
        found = [each for item in items for each in _likeliest(explainer, item, top_k, batch_size)]
    if isinstance(model, str):  # nobody else has it
        explainer.provenance.read_weights()
    if class_names is not None and not found[0].class_names:
        raise SourceError(f"class_names holds {len(class_names)} names, which are not as many as the model has scores")
    return found[0] if single and top_k is None else Explanations(found)


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


def _likeliest(explainer: Explainer, item: Item, count: int, batch_size: int) -> Iterator[Explanation]:
    """The likeliest classes of one image, so many of them in one pass."""
    prepared = explainer.prepare(item)
    (prediction,) = explainer.predict(prepared.inputs[None])
    classes = prediction.ranked(count)
    for begin in range(0, len(classes), batch_size):
        part = classes[begin : begin + batch_size]
        yield from explainer.explain([prepared] * len(part), part, [prediction] * len(part))


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
