"""What the page computes: models that stay loaded, predictions, and the maps of several methods beside each other."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor

from captum_lnstat import zoo
from captum_lnstat.attribution.methods import METHODS, Method, method_of_rule
from captum_lnstat.demo.depth import DepthExplainer
from captum_lnstat.demo.photo import DemoError, Photo
from captum_lnstat.errors import SourceError, one_line
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.prediction import Prediction
from captum_lnstat.explanation.subject.images import Item
from captum_lnstat.explanation.subject.subject import Subject, read_subject
from captum_lnstat.rules import layer_rule_names, rule_names
from captum_lnstat.visualize import Panel, to_map

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
_MODELS, _CASES, _MAPS = 3, 8, 128  # kept at a time
# Parameters of a model that is asked for by name, in millions: a ViT-L has 300, which are 1.2 GB.
_LARGEST = 350
# Pixels of the longer side of a whole photograph with its map.
_WHOLE = 640
# Seconds until a turn comes: a model may be on its way from a hub, for somebody else.
_PATIENCE = 600.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Case(Prediction):
    """An image, a model, and what the model makes of it.

    Attributes, beside those of ``Prediction``:
        explainer: The model.
        prepared: The image as the model sees it.
        depths: How many depths there are to read a map at, the patches among them; 1 if the model is not understood.
    """

    explainer: Explainer = field(repr=False)
    prepared: Prepared = field(repr=False)
    depths: int

    @property
    def subject(self) -> Subject:
        """The model with its preprocessing and classes."""
        return self.explainer.subject

    @property
    def inputs(self) -> Tensor:
        """``(1, 3, height, width)``, normalised."""
        return self.explainer.placed(self.prepared.inputs[None])


@dataclass(frozen=True)
class Question:
    """What is to be shown of a case.

    Attributes:
        target: The class.
        rule: The rule of ``LNStatAttribution``.
        depth: 0 for the full map, else the number of blocks after which the tokens are read.
        contrastive: As for ``LNStatAttribution``.
        beside: The names of the methods to set beside it.
        other: A second class, to be shown beside the first.
    """

    target: int
    rule: str = "lnstat"
    depth: int = 0
    contrastive: bool = False
    beside: tuple[str, ...] = ()
    other: int | None = None

    @property
    def two(self) -> bool:
        """Whether there are two classes, and the rule tells classes apart."""
        return self.other not in (None, self.target) and method_of_rule(self.rule).per_class


@dataclass(frozen=True)
class Shown(Panel):
    """One method's map.

    Attributes:
        title: The method.
        relevance: ``(height, width)``.
        signed: Negative values argue against the class.
        caption: What its map means.
        notes: What the method warned about.
        whole: The map on the whole photograph, if the model saw only a part of it.
    """

    caption: str = ""
    notes: tuple[str, ...] = ()
    whole: Image.Image | None = None


# The methods that can be set beside a map.
BESIDE = (
    *("attention-rollout", "chefer", "ig", "legrad", "beyond-intuition", "agcam", "attcat", "hirescam", "libragrad"),
    "vitcx",
)


class Studio:
    """Computes one thing at a time, and keeps what it computed last.

    Args:
        own: A model that was chosen when the page was started. It goes by its title.

    Example:
        >>> from captum_lnstat.demo.samples import samples
        >>> studio = Studio()
        >>> case = studio.case(samples()[0], "swin-mini", pretrained=False)
        >>> case.label(case.prediction), case.depths
        ('bag (5)', 6)
        >>> shown = next(studio.maps(case, Question(case.prediction)))
        >>> shown.title, shown.relevance.shape
        ('lnstat', (64, 64))
    """

    def __init__(self, own: Subject | None = None) -> None:
        self.own = None if own is None else Explainer(own)
        self._lock = threading.Lock()
        self._explainer = lru_cache(_MODELS)(_explainer)
        self._case = lru_cache(_CASES)(_case)
        self._own, self._beside = lru_cache(_MAPS)(_own), lru_cache(_MAPS)(_beside)

    @property
    def trained(self) -> tuple[str, ...]:
        """The models that have their weights: the one chosen at the start, and those of the package."""
        return (*(() if self.own is None else (self.own.subject.title,)), *zoo.names())

    def case(self, photo: Photo, name: str, *, pretrained: bool) -> Case:
        """Show an image to a model.

        Args:
            photo: The image.
            name: One of ``trained``, or a name that timm knows; nothing that leads to a file or a hub.
            pretrained: Let timm download its weights. The bundled models have theirs.

        Raises:
            DemoError: There is no such model, or it cannot be made, or it fails on the image.
        """
        name = name.strip()
        if self.own is not None and name == self.own.subject.title:
            with self._turn():
                return self._case(photo, self.own)
        if not re.fullmatch(r"[\w.-]{1,120}", name):
            raise DemoError("That is no model's name; expected swin-mini, vit-mini or a name that timm knows.")
        with self._turn():
            return self._case(photo, self._explainer(name, pretrained and name not in zoo.names()))

    def maps(self, case: Case, question: Question) -> Iterator[Shown]:
        """The map of the rule, then that of a second class, then those beside it, each as soon as it is there.

        Raises:
            DemoError: There is no such map, or the model cannot be explained.
        """
        rule, depth, name = question.rule, question.depth, case.subject.name
        if rule not in rule_names():
            raise DemoError(f"There is no rule {rule!r}; expected one of {', '.join(rule_names())}.")
        for target in (question.target, question.other or 0):
            if not 0 <= target < case.count:
                raise DemoError(f"{name} has no class {target}; expected 0 to {case.count - 1}.")
        if depth and rule not in layer_rule_names():
            raise DemoError(f"The rule {rule} has the full map only; put the slider at 0.")
        if not 0 <= depth < max(case.depths, 1):
            raise DemoError(f"{name} has no depth {depth}; expected 0 to {case.depths - 1}.")
        for beside in question.beside:
            if beside not in BESIDE:
                raise DemoError(f"There is no method {beside!r}; expected one of {', '.join(BESIDE)}.")

        def asked(method: Method) -> int:  # another class changes nothing where no class is explained
            return question.target if method.per_class else case.prediction

        method = method_of_rule(rule)
        for index in (asked(method), *([question.other] if question.two else [])):
            with self._turn():
                # Without a class to explain there is none to contrast it with.
                own = self._own(case, rule, index, depth, question.contrastive and method.per_class)
            yield own
        for beside in question.beside:
            with self._turn():
                other = self._beside(case, beside, asked(METHODS[beside]))
            yield other

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_PATIENCE):
            raise DemoError("Something else has been computed here for ten minutes and is not done; try again later.")
        try:
            yield
        finally:
            self._lock.release()


def _own(case: Case, rule: str, target: int, depth: int, contrastive: bool) -> Shown:
    method = method_of_rule(rule)
    kind: Any = partial(DepthExplainer, depth=depth) if depth else Explainer

    def found() -> tuple[Any, Image.Image | None]:
        explainer = kind(case.subject, rule=rule, contrastive=contrastive)
        explained = explainer.explain([case.prepared], [target], [case])[0]
        small = explained.smaller(_WHOLE)
        return explained.relevance, None if small.framed is None else small.on_original

    caption = method.caption + (f", read after block {depth}" if depth else "")
    return _shown(replace(method, title=rule, caption=caption), found)


def _beside(case: Case, name: str, target: int) -> Shown:
    method = METHODS[name]
    return _shown(method, lambda: (to_map(method.make(case.subject.model, None)(case.inputs, target)[0]), None))


def _shown(method: Method, compute: Callable[[], tuple[Any, Image.Image | None]]) -> Shown:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            relevance, whole = compute()
        except Exception as error:  # whatever a model of timm may raise by itself
            raise DemoError(f"{method.title} cannot be computed.\n{str(error).strip()}") from error
    notes = tuple(one_line(entry.message) for entry in caught if entry.category is UserWarning)
    return Shown(method.title, relevance, method.signed, method.caption, notes, whole)


def notes(case: Case, question: Question, shown: Sequence[Shown]) -> list[str]:
    """What has to be known to read the maps right."""
    cautions = case.explainer.cautions(case, question.target)
    return list(dict.fromkeys([*cautions, *(note for one in shown for note in one.notes)]))


def _explainer(name: str, pretrained: bool) -> Explainer:
    try:
        _check_size(name)
        return Explainer(read_subject(name, pretrained, None))
    except SourceError as error:
        raise DemoError(f"{one_line(error)}.") from None
    except Exception as error:  # whatever building a model of timm may raise
        raise DemoError(f"{name} cannot be made, {type(error).__name__}: {one_line(error)}") from error


def _check_size(name: str) -> None:
    """Refuse a model that would fill the memory: on the meta device it takes none."""
    if name in zoo.names() or not timm.is_model(name):
        return
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in timm.create_model(name).parameters()) / 1e6
    except Exception:  # what is wrong with it is said when it is made
        return
    if size > _LARGEST:
        raise SourceError(
            f"{name} has {size:.0f} million parameters; the page takes models of at most {_LARGEST} million by name. "
            f"Whoever starts it may choose a larger one: captum-lnstat demo --model {name}"
        )


def _case(photo: Photo, explainer: Explainer) -> Case:
    try:
        prepared = explainer.prepare(Item(photo.title, photo.image()))
        inputs = explainer.placed(prepared.inputs[None])
        (found,) = explainer.predict(inputs)
    except Exception as error:
        name = explainer.subject.name
        raise DemoError(f"{name} fails on this image, {type(error).__name__}: {one_line(error)}") from error
    try:
        depths = sum(step.kind == "attention" for step in explainer.lnstat.describe(inputs).steps)
    except Exception:  # its message comes with the map
        depths = 1
    return Case(**vars(found), explainer=explainer, prepared=prepared, depths=depths)
