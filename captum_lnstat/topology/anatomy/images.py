"""What images a model takes, as it says itself or a model inside it does: one that somebody has wrapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from captum_lnstat.recording.eager import eager

# A convolution with more input channels may as well read features.
_MOST_CHANNELS = 16
_CHANNELS = ("num_channels", "in_channels", "in_chans")


def speaker(model: Any) -> Any:
    """The model, or the first module inside it that says something of its images; the model if none does.

    Example:
        >>> import timm
        >>> wrapped = nn.Sequential(timm.create_model("vit_tiny_patch16_224", depth=1))
        >>> type(speaker(wrapped)).__name__, image_size(wrapped), channels(wrapped)
        ('VisionTransformer', (224, 224), 3)
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        inner = getattr(module, "timm_model", module)  # transformers' wrapper around timm's models
        if timm_configuration(inner) is not None or _size(inner) is not None:
            return eager(module)
    return model


def timm_configuration(model: Any) -> dict[str, Any] | None:
    """What timm's models say of their images, or nothing."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else None


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model expects, 224 if neither it nor a model inside it says."""
    owner = speaker(eager(model))
    owner = getattr(owner, "timm_model", owner)
    config = timm_configuration(owner)
    # The configuration says the size of the pretrained weights; the model may have been made for another.
    given = (config or {}).get("input_size") or (3, 224, 224)
    return _size(owner) or (int(given[1]), int(given[2]))


def channels(model: Any) -> int:
    """How many channels the images have that a model expects, 3 if it cannot be told."""
    owner = speaker(eager(model))
    owner = getattr(owner, "timm_model", owner)
    for config in _configurations(owner):
        for name in _CHANNELS:
            if isinstance(count := getattr(config, name, None), int) and count > 0:
                return count
    embedding = getattr(owner, "patch_embed", None)
    sure = isinstance(embedding, nn.Module) or timm_configuration(owner) is not None
    stem = embedding if isinstance(embedding, nn.Module) else owner
    layers = stem.modules() if isinstance(stem, nn.Module) else ()
    first = next((layer for layer in layers if isinstance(layer, nn.Conv2d)), None)
    return first.in_channels if first is not None and (sure or first.in_channels < _MOST_CHANNELS) else 3


def _configurations(model: Any) -> tuple[Any, ...]:
    """Hugging Face's configuration of a model, and that of its images if it reads texts too."""
    config = getattr(model, "config", None)
    return config, getattr(config, "vision_config", None)


def _size(model: Any) -> tuple[int, int] | None:
    for owner in (*_configurations(model), model, getattr(model, "patch_embed", None)):
        for name in ("image_size", "img_size"):
            size = getattr(owner, name, None)
            if isinstance(size, int) and size > 0:
                return size, size
            if isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int) for side in size):
                return int(size[0]), int(size[1])
    return None
