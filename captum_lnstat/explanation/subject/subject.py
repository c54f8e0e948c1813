"""A model by its name, or as it is: with its preprocessing and the names of its classes."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from torch import Tensor, nn

from captum_lnstat import zoo
from captum_lnstat.errors import SourceError, near, one_line
from captum_lnstat.explanation.subject.checkpoints import load_checkpoint, read_checkpoint
from captum_lnstat.explanation.subject.classes import class_count, class_names_of, find_class, read_class_names
from captum_lnstat.explanation.subject.preprocessing import (
    Preprocessing,
    preprocessing_of,
    preprocessing_of_weights,
)
from captum_lnstat.explanation.subject.progress import progress
from captum_lnstat.topology.anatomy.images import image_size
from captum_lnstat.zoo import ReferenceModel


@dataclass(frozen=True)
class Subject:
    """A model ready to be explained.

    Attributes:
        model: In eval mode.
        preprocessing: From images to its input.
        class_names: Of every class, several names of one joined by commas; without names there are none.
        name: What it is called in messages.
        random: Its weights are random, and so is every explanation.
        weights: Which file they are from, and what of it, in words; nothing for those that the library or the
            package brings.
        names_from: The file that the names were read from, if the user gave one.
    """

    model: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    name: str = ""
    random: bool = False
    weights: str = ""
    names_from: str = ""

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a Pillow image to ``(channel, height, width)``."""
        return self.preprocessing.transform

    @property
    def title(self) -> str:
        """What it is called on a picture: its name, and the file of its weights, or that they are random."""
        weights = "random weights" if self.random else self.weights.partition(":")[0]
        return f"{self.name} ({weights})" if weights else self.name

    def find(self, target: str | None) -> int | None:
        """The class that an index or a name means; none if there is no target."""
        count = len(self.class_names) or class_count(self.model)
        return None if target is None else find_class(target, self.class_names, count)

    def named(self, path: Path) -> Subject:
        """The same with the class names in a file.

        Raises:
            SourceError: They cannot be read, or are not as many as the model has classes.
        """
        names, count = read_class_names(path), class_count(self.model)
        if count is not None and count != len(names):
            raise SourceError(f"{str(path)!r} holds {len(names)} names; {self.name} has {count} classes")
        return replace(self, class_names=names, names_from=str(path))

    def cautions(self, *, pictures: bool = True) -> tuple[str, ...]:
        """What has to be known before an explanation is believed; of ``pictures``, not of inputs made elsewhere."""
        found = []
        if self.random:
            found.append(f"the weights of {self.name} are random, and so is the explanation; take trained ones")
        if pictures and self.preprocessing.assumed:
            found.append(
                f"{self.name} does not say how its images were prepared; {self.preprocessing.source} is taken. In "
                "Python, transform= says another"
            )
        return tuple(found)


def subject_of(model: nn.Module | ReferenceModel, *, download: bool = False) -> Subject:
    """A model with what it knows about itself.

    Args:
        model: A module, or a model of the zoo.
        download: As for ``preprocessing_of``.
    """
    if isinstance(model, ReferenceModel):
        return Subject(model.model, Preprocessing(model.transform, "the zoo"), model.class_names, model.name)
    if not isinstance(model, nn.Module):
        raise SourceError(f"model is a {type(model).__name__}; expected a torch.nn.Module or the name of a model")
    return Subject(model, preprocessing_of(model, download=download), class_names_of(model), type(model).__name__)


def read_subject(name: str, pretrained: bool = False, checkpoint: Path | None = None) -> Subject:
    """Any model that can be named, with its preprocessing and class names.

    Args:
        name: As for ``read_model``.
        pretrained: Take the library's weights rather than random ones; they are downloaded.
        checkpoint: Weights to load.

    Raises:
        SourceError: There is no such model, it has no classifier, or the weights do not fit.
    """
    model, weights, taken = _loaded(name, pretrained, checkpoint)
    if class_count(model) == 0:
        raise SourceError(
            f"{name} has no classifier, so there is no class to explain; give a --checkpoint that has one"
        )
    subject = replace(subject_of(model, download=pretrained), name=name, weights=taken)
    if weights is not None:
        names = tuple(weights.meta.get("categories", ())) if pretrained else ()
        subject = replace(subject, preprocessing=preprocessing_of_weights(weights), class_names=names)
    return replace(subject, random=not pretrained and checkpoint is None and _is_bare(name))


def read_model(name: str, pretrained: bool = False, checkpoint: Path | None = None) -> tuple[Any, tuple[int, int], str]:
    """Any model that can be named, the size of its images, and which weights of a checkpoint were taken.

    Args:
        name: A model of the zoo or of timm, ``torchvision:NAME``, ``hf:NAME`` (a configuration class of transformers,
            whose defaults are taken, or a model on the hub or in a folder), or ``package.module:callable``, which is
            called without arguments. torchvision and transformers are imported only for models of theirs.
        pretrained: Take the library's weights rather than random ones.
        checkpoint: Weights to load.

    Raises:
        SourceError: There is no such model, or it cannot be made; or the weights do not fit.
    """
    model, _, taken = _loaded(name, pretrained, checkpoint)
    return model, image_size(model), taken


def _loaded(name: str, pretrained: bool, checkpoint: Path | None) -> tuple[Any, Any, str]:
    """The model, torchvision's weights if it is one of theirs, and what of a checkpoint was taken."""
    found = None if checkpoint is None else read_checkpoint(checkpoint)
    model, weights = _build(name, pretrained)
    if found is None or checkpoint is None:
        return model, weights, ""
    return model, weights, load_checkpoint(model, name, found, checkpoint)


def _is_bare(name: str) -> bool:
    """Whether a model of this name is made with random weights unless others are asked for.

    A function of the user's own is taken to load its weights itself.
    """
    library, colon, rest = name.partition(":")
    return name not in zoo.names() and (not colon or library == "torchvision" or (library == "hf" and bool(rest)))


def _build(name: str, pretrained: bool) -> tuple[Any, Any]:
    """The model in eval mode, and torchvision's weights if it is one of theirs."""
    library, _, rest = name.partition(":")
    weights = None
    # The hub would report each of its retries; how it ends is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if name in zoo.names():
            if pretrained:
                raise SourceError(f"{name} comes with its weights, so pretrained says nothing; leave it out")
            model: Any = zoo.load(name).model
        elif not rest:
            model = _from_timm(name, pretrained)
        else:
            with progress(f"building {name}"):
                if library == "torchvision":
                    model, weights = _from_torchvision(rest, pretrained)
                elif library == "hf":
                    model = _from_transformers(rest, pretrained)
                else:
                    model = resolve(library, rest)()
    except SourceError:
        raise
    except Exception as error:  # whatever a library, or the user's own callable, may raise
        raise SourceError(f"{name!r} cannot be made, {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model.eval(), weights


def _from_timm(name: str, pretrained: bool) -> Any:
    if ":" not in name and not timm.is_model(name):
        known: Sequence[str] = [*zoo.names(), *timm.list_models()]
        raise SourceError(
            f"unknown model {name!r}; {near(name, known, 'expected swin-mini, vit-mini or a name that timm knows')}"
        )
    try:
        with progress(f"downloading {name}" if pretrained else f"building {name}"):
            return timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # which ones depends on where timm finds the weights and on the HTTP library
        raise SourceError(
            f"timm cannot make {name!r}{' with pretrained weights' * pretrained}: {one_line(error)}"
            f"{' Weights in a file go by checkpoint (--checkpoint FILE)' * pretrained}"
        ) from error


def _from_torchvision(name: str, pretrained: bool) -> tuple[Any, Any]:
    models = importlib.import_module("torchvision.models")
    weights = models.get_model_weights(name).DEFAULT
    return models.get_model(name, weights=weights if pretrained else None), weights


def _from_transformers(name: str, pretrained: bool) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise SourceError(
            f"hf:{name} needs transformers, which is not installed; pip install 'captum-lnstat[hf]' brings it"
        )
    transformers = importlib.import_module("transformers")
    auto = transformers.AutoModelForImageClassification
    if pretrained:
        return auto.from_pretrained(name)
    own = name.endswith("Config")
    return auto.from_config(getattr(transformers, name)() if own else transformers.AutoConfig.from_pretrained(name))


def resolve(module: str, path: str) -> Any:
    """What an import path, ``module:path``, leads to."""
    importlib.invalidate_caches()  # the module may have been written a moment ago
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # of a module that this one needs
        where = "neither installed nor in the current folder"
        raise ModuleNotFoundError(f"No module named {error.name!r}, {where}", name=error.name) from None
    for part in path.split("."):
        found = getattr(found, part)
    return found
