"""What the command explains: an image from any file, a model from the zoo or from timm, a class by name or index."""

from __future__ import annotations

import importlib
import logging
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from captum_lnstat import zoo
from captum_lnstat._console import fail, near, one_line, progress


def read_image(path: Path) -> Image.Image:
    """An RGB image the right way up from any file that Pillow reads."""
    try:
        with warnings.catch_warnings():
            # A large photograph is no attack; at twice that size Pillow refuses all the same.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return to_rgb(file)
    except FileNotFoundError:
        fail(f"there is no file {str(path)!r}")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        fail(f"{str(path)!r} cannot be read as an image: {one_line(error)}")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode: EXIF orientation applied, deep greyscale scaled, transparency put on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = 0.0, 1.0 if mode == "F" else 65535.0
    if values.min() < low or values.max() > high:  # no known range: its own
        low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Subject:
    """A model ready to be explained. A class may have several names, joined by commas; without names there are none."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    class_names: tuple[str, ...]

    def label(self, index: int) -> str:
        return f"{self.class_names[index].split(', ')[0]} ({index})" if self.class_names else f"class {index}"


def read_subject(name: str, pretrained: bool, checkpoint: Path | None) -> Subject:
    """A model of the zoo or of timm, with the checkpoint's weights if one is given."""
    state = None if checkpoint is None else _read_checkpoint(checkpoint)
    if name in zoo.names():
        reference = zoo.load(name)
        model: Any = reference.model
        transform = reference.transform
    else:
        model = _create(name, pretrained)
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
    if state is not None:
        _load(model, name, state, checkpoint)
    if not model.num_classes:
        fail(f"{name} has no classifier, so there is no class to explain; give a --checkpoint that has one")
    own = reference.class_names if name in zoo.names() else _class_names(model)
    return Subject(model.eval(), transform, own if len(own) == model.num_classes else ())


def _create(name: str, pretrained: bool) -> Any:
    if ":" not in name and not timm.is_model(name):
        known = [*zoo.names(), *timm.list_models()]
        fail(f"unknown model {name!r}; {near(name, known, 'expected swin-mini, vit-mini or a name that timm knows')}")
    # The hub would report each of its retries; how it ends is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with progress(f"downloading {name}" if pretrained else f"building {name}"):
            return timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # which ones depends on where timm finds the weights and on the HTTP library
        fail(f"timm cannot make {name!r}{' with pretrained weights' * pretrained}: {one_line(error)}")


def read_model(name: str, pretrained: bool = False) -> tuple[Any, tuple[int, int]]:
    """Any model that can be named, and the size of its images.

    Args:
        name: A model of the zoo or of timm, ``torchvision:NAME``, ``hf:NAME`` (a configuration class of transformers,
            whose defaults are taken, or a model on the hub or in a folder), or ``package.module:callable``, which is
            called without arguments. torchvision and transformers are imported only for models of theirs.
        pretrained: Take the library's weights rather than random ones.
    """
    library, _, rest = name.partition(":")
    try:
        if name in zoo.names():
            return zoo.load(name).model, (64, 64)
        if not rest:
            model = _create(name, pretrained)
            size = resolve_model_data_config(model)["input_size"]
            return model.eval(), (size[1], size[2])
        with progress(f"building {name}"):
            if library == "torchvision":
                model = importlib.import_module("torchvision.models").get_model(
                    rest, weights="DEFAULT" if pretrained else None
                )
            elif library == "hf":
                model = _from_transformers(rest, pretrained)
            else:
                model = _resolve(library, rest)()
    except click.ClickException:
        raise
    except Exception as error:  # whatever a library, or the user's own callable, may raise
        fail(f"{name!r} cannot be made, {type(error).__name__}: {one_line(error)}")
    if not isinstance(model, nn.Module):
        fail(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module")
    size = getattr(getattr(model, "config", None), "image_size", None) or getattr(model, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval(), (int(height), int(width))


def _from_transformers(name: str, pretrained: bool) -> Any:
    transformers = importlib.import_module("transformers")
    auto = transformers.AutoModelForImageClassification
    if pretrained:
        return auto.from_pretrained(name)
    own = name.endswith("Config")
    return auto.from_config(getattr(transformers, name)() if own else transformers.AutoConfig.from_pretrained(name))


def _resolve(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        fail(f"there is no checkpoint file {str(path)!r}")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        fail(
            f"{str(path)!r} cannot be read as a checkpoint, {type(error).__name__}: "
            f"{textwrap.shorten(str(error), 200)}; expected safetensors, or tensors that torch.save wrote"
        )
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        fail(f"{str(path)!r} holds no state dict; expected tensors by name")
    return state


def _load(model: Any, name: str, state: dict[str, Tensor], path: Path | None) -> None:
    """Load strictly, with the head made as large as the checkpoint's."""
    weight = state.get(f"{_classifier(model)}.weight")
    if weight is not None and len(weight) != model.num_classes:
        model.reset_classifier(len(weight))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # One line for each kind of misfit, each as long as the model has parameters.
        lines = [one_line(line) for line in str(error).splitlines()[1:]] or [one_line(error)]
        fail(f"the checkpoint {str(path)!r} does not fit {name}: {textwrap.shorten(lines[0], 200)}")


def _classifier(model: Any) -> str:
    """Dotted name of the classifier, of the first one if there are several, or nothing."""
    head = model.get_classifier()
    head = head[0] if isinstance(head, tuple | list) else head
    return next((name for name, module in model.named_modules() if module is head), "")


def _class_names(model: Any) -> tuple[str, ...]:
    own = model.pretrained_cfg.get("label_names")
    subset = infer_imagenet_subset(model)
    return tuple(own or (ImageNetInfo(subset).label_descriptions() if subset else ()))


def class_index(text: str, subject: Subject) -> int:
    """The class that an index or a name means."""
    count, names = subject.model.num_classes, subject.class_names
    if re.fullmatch(r"-?\d+", text):
        if not 0 <= int(text) < count:
            fail(f"there is no class {text}; expected 0 to {count - 1}")
        return int(text)
    if not names:
        fail(
            f"unknown class {text!r}: the names of this model's classes are not known; give an index, 0 to {count - 1}"
        )
    wanted = text.casefold()
    found = [i for i, name in enumerate(names) if wanted in (name.casefold(), *name.casefold().split(", "))]
    if not found:
        known = [part for name in names for part in name.split(", ")]
        otherwise = f"expected one of {', '.join(names)}" if count <= 20 else f"expected a name or 0 to {count - 1}"
        fail(f"unknown class {text!r}; {near(text, known, otherwise)}")
    if len(found) > 1:
        fail(f"{text!r} is the name of several classes; give one of the indices {', '.join(map(str, found))}")
    return found[0]
