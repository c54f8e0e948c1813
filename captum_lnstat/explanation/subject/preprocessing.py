"""A model's own preprocessing: from a Pillow image to what the model was trained on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.subject.crop import measure
from captum_lnstat.recording.eager import eager
from captum_lnstat.topology.anatomy.images import channels, image_size, speaker, timm_configuration

# What most models of ImageNet's classes were trained with: resized to 256 for a crop of 224, these statistics.
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
_USUAL: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": IMAGENET_CROP}
_PROBE = (320, 240)


@dataclass(frozen=True)
class Preprocessing:
    """How images become the input of a model.

    Attributes:
        transform: From a Pillow image to ``(channel, height, width)``.
        source: Whose preprocessing it is, in words.
        assumed: It is the usual one, because the model does not say its own.
        interpolation: By which images are resized.
    """

    transform: Callable[[Image.Image], Tensor]
    source: str
    assumed: bool = False
    interpolation: str = "bicubic"

    def whole(self) -> Preprocessing:
        """The same size and normalisation, with the whole image squeezed to that size and nothing cut off."""
        view = measure(self.transform, _PROBE)
        options = {"interpolation": self.interpolation, "crop_pct": 1.0, "crop_mode": "squash"}
        squeezed = _standard(view.size, view.mean, view.std, **options)
        return Preprocessing(squeezed, f"{self.source}, the whole image", self.assumed, self.interpolation)


def preprocessing_of(model: nn.Module, *, download: bool = False) -> Preprocessing:
    """The preprocessing that a model of timm or Hugging Face brings along, or the usual one for ImageNet.

    Args:
        model: The model, or a module that holds it: then the preprocessing of the model inside, which is assumed. A
            torchvision model does not know which weights it was given, so its transform is not known; the usual one
            is taken, in the size that the model expects. Of a model of one channel images become grey; one of any
            other number gets a transform that raises a SourceError.
        download: Hugging Face's image processor may be downloaded, if it is not on this machine.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> preprocessing_of(model).transform(Image.new("RGB", (300, 500))).shape
        torch.Size([3, 224, 224])
    """
    model = eager(model)
    inner = speaker(model)
    found = _own(getattr(inner, "timm_model", inner), inner, download)
    if inner is not model and not found.assumed:
        # What the wrapper does to images before it gives them on is not known.
        return replace(found, source=f"that of the {type(inner).__name__} inside it", assumed=True)
    return found


def _own(timm_model: Any, model: Any, download: bool) -> Preprocessing:
    """What a model says of its images, and the usual one where it says nothing."""
    count = channels(model)
    if count not in (1, 3):
        return Preprocessing(_none_for(model, count), "its own")
    if timm_configuration(timm_model) is not None:
        return _of_timm(timm_model, count)
    found = _of_transformers(model, download) if _library(model) == "transformers" else None
    if found is not None:
        return found
    transform = _standard(image_size(model), *_as_many(count, IMAGENET_MEAN, IMAGENET_STD), **_USUAL)
    return Preprocessing(transform, "the usual one for ImageNet", assumed=True)


def _as_many(count: int, *statistics: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Statistics of red, green and blue for a model of one channel: their mean; else as they are."""
    return tuple((sum(each) / len(each),) if count == 1 else each for each in statistics)


def _none_for(model: nn.Module, count: int) -> Callable[[Image.Image], Tensor]:
    def transform(image: Image.Image) -> Tensor:
        raise SourceError(
            f"the images of {type(model).__name__} have {count} channels, which a picture does not have. In Python, "
            f"pass transform=, from a Pillow image to ({count}, height, width), or give the input itself, a floating "
            "tensor"
        )

    return transform


def preprocessing_of_weights(weights: Any) -> Preprocessing:
    """The transform that comes with weights of torchvision."""
    transform = weights.transforms()
    return Preprocessing(transform, "torchvision weights", interpolation=transform.interpolation.value)


def _library(model: nn.Module) -> str:
    """Which package the model's class, or a class that it was made from, is of."""
    known = ("timm", "torchvision", "transformers")
    packages = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    return next((package for package in packages if package in known), "")


def _of_timm(model: Any, count: int) -> Preprocessing:
    config = resolve_model_data_config(model)
    size, mean, std = image_size(model), config["mean"], config["std"]
    if count != len(mean):
        mean, std = _as_many(count, mean, std)
    options = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    # The statistics are those of three channels: for another number of them they are a guess.
    assumed = count != len(config["mean"])
    source = "timm's, averaged over the channels," if assumed else "timm"
    return Preprocessing(_standard(size, mean, std, **options), source, assumed, config["interpolation"])


def _of_transformers(model: Any, download: bool) -> Preprocessing | None:
    """The image processor that lies next to the weights: in a folder, in the cache or on the hub."""
    name = getattr(model.config, "_name_or_path", "") or ""
    if not name:
        return None
    auto = importlib.import_module("transformers").AutoImageProcessor
    try:
        processor = auto.from_pretrained(name, local_files_only=not download)
    except (OSError, ValueError, ImportError, TypeError, KeyError):  # there is none, in transformers' several ways
        return None

    def transform(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4 or len(pixels) != 1:
            raise SourceError(
                f"the image processor of {name} made {tuple(pixels.shape)} of one image; expected one input of the "
                "model. Pass transform="
            )
        return pixels[0]

    resample = Image.Resampling(int(getattr(processor, "resample", None) or Image.Resampling.BILINEAR))
    source = f"{type(processor).__name__} of Hugging Face"
    return Preprocessing(transform, source, interpolation=resample.name.lower())


def _standard(
    size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], **options: Any
) -> Callable[[Image.Image], Tensor]:
    shape = (len(mean), *size)
    transform: Callable[[Image.Image], Tensor] = create_transform(shape, False, mean=mean, std=std, **options)
    return transform if len(mean) == 3 else lambda image: transform(image.convert("L"))
