"""A model's own preprocessing: from a Pillow image to what the model was trained on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.subject.crop import measure
from captum_lnstat.recording.eager import eager

# What most models of ImageNet's classes were trained with: resized to 256 for a crop of 224, these statistics.
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
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
        model: The model. A torchvision model does not know which weights it was given, so its transform is not known;
            the usual one is taken, in the size that the model expects.
        download: Hugging Face's image processor may be downloaded, if it is not on this machine.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> preprocessing_of(model).transform(Image.new("RGB", (300, 500))).shape
        torch.Size([3, 224, 224])
    """
    model = eager(model)
    inner = getattr(model, "timm_model", model)  # transformers' wrapper around timm's models
    if isinstance(getattr(inner, "pretrained_cfg", None), dict):
        return _of_timm(inner)
    if _library(model) == "transformers":
        found = _of_transformers(model, download)
        if found is not None:
            return found
    options = {"interpolation": "bicubic", "crop_pct": IMAGENET_CROP}
    transform = _standard(image_size(model), IMAGENET_MEAN, IMAGENET_STD, **options)
    return Preprocessing(transform, "the usual one for ImageNet", assumed=True)


def preprocessing_of_weights(weights: Any) -> Preprocessing:
    """The transform that comes with weights of torchvision."""
    transform = weights.transforms()
    return Preprocessing(transform, "torchvision weights", interpolation=transform.interpolation.value)


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model expects, 224 if it does not say."""
    config, embedding = getattr(model, "config", None), getattr(model, "patch_embed", None)
    if isinstance(given := getattr(model, "pretrained_cfg", None), dict):
        return int(given["input_size"][1]), int(given["input_size"][2])
    for owner in (config, model, embedding):
        for name in ("image_size", "img_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size, size
            if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
                return int(size[0]), int(size[1])
    return 224, 224


def _library(model: nn.Module) -> str:
    """Which package the model's class, or a class that it was made from, is of."""
    known = ("timm", "torchvision", "transformers")
    packages = (base.__module__.partition(".")[0] for base in type(model).__mro__)
    return next((package for package in packages if package in known), "")


def _of_timm(model: Any) -> Preprocessing:
    config = resolve_model_data_config(model)
    # What the configuration says is the size of the pretrained weights; the model may have been made for another.
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(own, tuple) and len(own) == 2:
        config["input_size"] = (config["input_size"][0], *own)
    return Preprocessing(create_transform(**config, is_training=False), "timm", interpolation=config["interpolation"])


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
    return transform
