"""The reference models: their architectures, and their weights from the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from PIL import Image
from safetensors.torch import load as load_tensors
from timm.data import create_transform, resolve_data_config
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

IMAGE_SIZE = 64
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "bag", "ankle boot")

_DATA = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
_ARCHITECTURES: dict[str, Callable[..., Any]] = {
    # 16 x 16, 8 x 8 and 4 x 4 tokens: the first two stages shift their windows with a mask, the third is one window.
    "swin-mini": partial(
        SwinTransformer,
        img_size=IMAGE_SIZE,
        patch_size=4,
        window_size=4,
        embed_dim=48,
        depths=(2, 2, 2),
        num_heads=(2, 4, 8),
        mlp_ratio=2.0,
        drop_path_rate=0.0,
    ),
    "vit-mini": partial(
        VisionTransformer,
        img_size=IMAGE_SIZE,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_heads=3,
        mlp_ratio=2.0,
    ),
}


@dataclass(frozen=True)
class ReferenceModel:
    """A trained timm model with what is needed to use it.

    Attributes:
        name: Its name in the zoo.
        model: The model in eval mode, float32.
        transform: From a PIL image to a ``(3, 64, 64)`` input of the model.
        class_names: The name of every output.
    """

    name: str
    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    class_names: tuple[str, ...]


def names() -> tuple[str, ...]:
    """The names that ``load`` knows."""
    return tuple(_ARCHITECTURES)


def architecture(name: str) -> nn.Module:
    """The untrained model of a name.

    Raises:
        ValueError: The name is not in the zoo.
    """
    if name not in _ARCHITECTURES:
        raise ValueError(f"the zoo has no model {name!r}; expected one of {', '.join(map(repr, names()))}")
    model: nn.Module = _ARCHITECTURES[name](num_classes=len(CLASS_NAMES))
    return model


def load(name: str) -> ReferenceModel:
    """Load a trained reference model from the package; nothing is downloaded.

    Args:
        name: ``"swin-mini"`` or ``"vit-mini"``.

    Example:
        >>> reference = load("vit-mini")
        >>> reference.class_names[5], reference.model.training
        ('bag', False)
    """
    model = architecture(name)
    # Stored in fp16 to be half the size; load_state_dict casts back to float32.
    model.load_state_dict(load_tensors(files(__package__).joinpath("weights", f"{name}.safetensors").read_bytes()))
    # What timm keeps for models of its own, so that the model alone says how images become its input.
    model.pretrained_cfg = {**_DATA, "num_classes": len(CLASS_NAMES), "label_names": CLASS_NAMES}  # type: ignore[assignment]
    transform = create_transform(**resolve_data_config(_DATA))
    return ReferenceModel(name, model.eval(), transform, CLASS_NAMES)
