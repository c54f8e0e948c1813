"""What the page computes: models that stay loaded, predictions, and the maps of several methods beside each other."""

from __future__ import annotations

import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from captum_lnstat import zoo
from captum_lnstat.attribution.baselines import AttentionRollout, GenericAttention
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.demo.depth import geometry, map_after
from captum_lnstat.demo.photo import DemoError, Photo
from captum_lnstat.errors import SourceError, one_line
from captum_lnstat.explanation.subject.subject import Subject, read_subject
from captum_lnstat.rules import layer_rule_names, rule_names
from captum_lnstat.visualize import INTEGRATED_BATCH, INTEGRATED_STEPS, to_map, to_picture

# Shown in the menu; any other name that timm knows can be typed.
SUGGESTED = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "maxvit_tiny_tf_224",
    "pvt_v2_b0",
    "hiera_tiny_224",
)
# Below this confidence a map of the target was seen to lie on background or on another object.
FAINT_TARGET = 0.01
_MODELS, _LOOKS, _MAPS = 3, 8, 128  # kept at a time
# Seconds until a turn comes: a model may be on its way from a hub, for somebody else.
_PATIENCE = 600.0

Value = TypeVar("Value")


class _Kept(Generic[Value]):
    """The values that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return self._values[key]


@dataclass(frozen=True)
class Look:
    """An image as a model saw it, and what the model made of it.

    Attributes:
        key: What it is kept by.
        name: The model.
        random: Its weights are random.
        subject: The model itself.
        inputs: ``(1, 3, height, width)``, normalised.
        picture: ``(height, width, 3)``, values from 0 to 1.
        confidence: Of every class.
        depths: How many depths there are to read a map at, the patches among them; 1 if the model is not understood.
    """

    key: Hashable
    name: str
    random: bool
    subject: Subject = field(repr=False)
    inputs: Tensor = field(repr=False)
    picture: Any = field(repr=False)
    confidence: tuple[float, ...] = field(repr=False)
    depths: int

    @property
    def best(self) -> int:
        """The predicted class."""
        return int(np.argmax(self.confidence))

    def label(self, index: int) -> str:
        """A class by name, as far as its name is known."""
        names = self.subject.class_names
        return names[index].split(", ")[0] if names else f"class {index}"

    def ranked(self, count: int) -> list[int]:
        """The classes the model finds most probable, best first."""
        return [int(index) for index in np.argsort(self.confidence)[::-1][:count]]


@dataclass(frozen=True)
class Question:
    """What is to be shown of a look.

    Attributes:
        target: The class.
        rule: The rule of ``LNStatAttribution``.
        depth: 0 for the full map, else the number of blocks after which the tokens are read.
        contrastive: As for ``LNStatAttribution``.
        beside: The titles of the methods to set beside it.
    """

    target: int
    rule: str = "lnstat"
    depth: int = 0
    contrastive: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """One method's map.

    Attributes:
        title: The method.
        caption: What its map means.
        relevance: ``(height, width)``.
        signed: Negative values argue against the class.
        notes: What the method warned about.
    """

    title: str
    caption: str
    relevance: Any = field(repr=False)
    signed: bool
    notes: tuple[str, ...] = ()


def _integrated(model: Any, inputs: Tensor, target: int) -> Tensor:
    attribution: Tensor = IntegratedGradients(model).attribute(
        inputs, target=target, n_steps=INTEGRATED_STEPS, internal_batch_size=INTEGRATED_BATCH
    )
    return attribution


@dataclass(frozen=True)
class _Method:
    caption: str
    attribute: Callable[[Any, Tensor, int], Tensor]
    signed: bool = False
    per_class: bool = True
    ours: bool = True  # what it warns about is for those who look at the map


BESIDE: dict[str, _Method] = {
    "attention rollout": _Method(
        "what attention alone carries, whatever the class",
        lambda model, inputs, target: AttentionRollout(model).attribute(inputs, target),
        per_class=False,
    ),
    "Chefer et al. 2021": _Method(
        "attention weighted by the class's gradient",
        lambda model, inputs, target: GenericAttention(model).attribute(inputs, target),
    ),
    "IntegratedGradients": _Method(f"Captum's, {INTEGRATED_STEPS} steps, signed", _integrated, signed=True, ours=False),
}

CAPTIONS: dict[str, str] = {
    "lnstat": "looked at, and counted for the class",
    "evidence": "counted for the class, and against it",
    "rollout": "looked at, whatever the class",
    "gradient": "Chefer's rule with token statistics",
}


class Studio:
    """Computes one thing at a time, and keeps what it computed last.

    Example:
        >>> from captum_lnstat.demo.samples import samples
        >>> studio = Studio()
        >>> look = studio.look(samples()[0], "swin-mini", pretrained=False)
        >>> look.label(look.best), look.depths
        ('bag', 6)
        >>> shown = next(studio.maps(look, Question(look.best)))
        >>> shown.title, shown.relevance.shape
        ('lnstat', (64, 64))
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subjects: _Kept[Subject] = _Kept(_MODELS)
        self._looks: _Kept[Look] = _Kept(_LOOKS)
        self._maps: _Kept[Shown] = _Kept(_MAPS)

    def look(self, photo: Photo, name: str, *, pretrained: bool) -> Look:
        """Show an image to a model.

        Args:
            photo: The image.
            name: ``"swin-mini"``, ``"vit-mini"`` or a name that timm knows; nothing that leads to a file or a hub.
            pretrained: Let timm download its weights. The bundled models have theirs.

        Raises:
            DemoError: There is no such model, or it cannot be made, or it fails on the image.
        """
        name = name.strip()
        if not re.fullmatch(r"[\w.-]{1,120}", name):
            raise DemoError("That is no model's name; expected swin-mini, vit-mini or a name that timm knows.")
        pretrained = pretrained and name not in zoo.names()
        key = (photo.key, name, pretrained)
        with self._turn():
            subject = self._subjects.get((name, pretrained), lambda: _subject(name, pretrained))
            return self._looks.get(key, lambda: _look(key, photo, name, pretrained, subject))

    def maps(self, look: Look, question: Question) -> Iterator[Shown]:
        """The map that is asked for, then those beside it, each as soon as it is there.

        Raises:
            DemoError: What is asked for is not there, or the model cannot be explained.
        """
        rule, depth = question.rule, question.depth
        if rule not in rule_names():
            raise DemoError(f"There is no rule {rule!r}; expected one of {', '.join(rule_names())}.")
        if not 0 <= question.target < len(look.confidence):
            raise DemoError(f"{look.name} has no class {question.target}; expected 0 to {len(look.confidence) - 1}.")
        if depth and rule not in layer_rule_names():
            raise DemoError(f"The rule {rule} has the full map only; put the slider at 0.")
        if not 0 <= depth < max(look.depths, 1):
            raise DemoError(f"{look.name} has no depth {depth}; expected 0 to {look.depths - 1}.")
        # Without a class to explain there is none to contrast it with.
        contrastive = question.contrastive and rule != "rollout"

        def own() -> Tensor:
            model: Any = look.subject.model
            if not depth:
                lnstat = LNStatAttribution(model, rule=rule, contrastive=contrastive)
                return lnstat.attribute(look.inputs, question.target)[0]
            layered: Any = rule
            found = map_after(model, look.inputs, question.target, depth=depth, rule=layered, contrastive=contrastive)
            return found[None]

        # Another class changes nothing where no class is explained.
        target = None if rule == "rollout" else question.target
        caption = CAPTIONS[rule] + (f", read after block {depth}" if depth else "")
        yield self._shown((look.key, rule, depth, contrastive, target), rule, caption, rule == "evidence", own)
        for title in question.beside:
            if title not in BESIDE:
                raise DemoError(f"There is no method {title!r}; expected one of {', '.join(BESIDE)}.")
            method = BESIDE[title]

            def other(method: _Method = method) -> Tensor:
                return method.attribute(look.subject.model, look.inputs, question.target)[0]

            key = (look.key, title, question.target if method.per_class else None)
            yield self._shown(key, title, method.caption, method.signed, other, heed=method.ours)

    def _shown(
        self,
        key: Hashable,
        title: str,
        caption: str,
        signed: bool,
        attribute: Callable[[], Tensor],
        heed: bool = True,
    ) -> Shown:
        def make() -> Shown:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    relevance = to_map(attribute())
                except Exception as error:  # whatever a model of timm may raise by itself
                    raise DemoError(f"{title} cannot be computed.\n{str(error).strip()}") from error
            notes = tuple(one_line(entry.message) for entry in said if heed and entry.category is UserWarning)
            return Shown(title, caption, relevance, signed, notes)

        with self._turn():
            return self._maps.get(key, make)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_PATIENCE):
            raise DemoError("Something else has been computed here for ten minutes and is not done; try again later.")
        try:
            yield
        finally:
            self._lock.release()


def notes(look: Look, question: Question, shown: Sequence[Shown]) -> list[str]:
    """What has to be known to read the maps right."""
    said = []
    if look.random:
        said.append(
            f"The weights of {look.name} are random. So is everything below: it shows how the method runs, not what a "
            "trained model looks at."
        )
    elif look.confidence[question.target] < FAINT_TARGET:
        said.append(
            f"The model all but rules {look.label(question.target)} out. The map shows what little argued for it, "
            "and may lie on background or on another object."
        )
    return said + list(dict.fromkeys(note for one in shown for note in one.notes))


def _subject(name: str, pretrained: bool) -> Subject:
    try:
        return read_subject(name, pretrained, None)
    except SourceError as error:
        raise DemoError(f"{one_line(error)}.") from None
    except Exception as error:  # whatever building a model of timm may raise
        raise DemoError(f"{name} cannot be made, {type(error).__name__}: {one_line(error)}") from error


def _look(key: Hashable, photo: Photo, name: str, pretrained: bool, subject: Subject) -> Look:
    try:
        inputs = subject.transform(photo.image())[None]
        with torch.no_grad():
            confidence = subject.model(inputs).softmax(-1)[0].tolist()
        picture = to_picture(inputs[0], *_normalisation(subject.transform))
    except Exception as error:
        raise DemoError(f"{name} fails on this image, {type(error).__name__}: {one_line(error)}") from error
    try:
        depths = len(geometry(subject.model, inputs).blocks)
    except Exception:  # said when a map is asked for
        depths = 1
    random = not pretrained and name not in zoo.names()
    return Look(key, name, random, subject, inputs, picture, tuple(confidence), depths)


def _normalisation(transform: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels that the transform's last step takes away."""
    step = next((step for step in getattr(transform, "transforms", ()) if hasattr(step, "std")), None)
    return ([0.0] * 3, [1.0] * 3) if step is None else ([float(m) for m in step.mean], [float(d) for d in step.std])
