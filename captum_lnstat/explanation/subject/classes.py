"""How many classes a model tells apart, and their names where it knows them."""

from __future__ import annotations

import re
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from captum_lnstat.explanation.subject.names import find_class, label, read_class_names
from captum_lnstat.recording.eager import eager

__all__ = ["class_count", "class_names_of", "find_class", "label", "read_class_names"]


def class_count(model: nn.Module) -> int | None:
    """How many classes a model tells apart, if it says so; 0 for a model without a classifier."""
    model = eager(model)
    for owner, name in ((model, "num_classes"), (getattr(model, "config", None), "num_labels")):
        count = getattr(owner, name, None)
        if isinstance(count, int):
            return count
    if type(model).__module__.startswith("torchvision."):
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        return linear[-1].out_features if linear else None
    return None


def class_names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the classes, in order; several names of one class are joined by commas. Nothing if not known.

    Example:
        >>> import timm
        >>> class_names_of(timm.create_model("vit_tiny_patch16_224", depth=1))[967]
        'espresso'
        >>> class_names_of(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5))
        ()
    """
    model = eager(model)
    count = class_count(model)
    names = _of_timm(getattr(model, "timm_model", model)) or _of_transformers(model)
    return names if count is not None and len(names) == count else ()


def _of_timm(model: Any) -> tuple[str, ...]:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return ()
    own = config.get("label_names")
    subset = infer_imagenet_subset(model)
    return tuple(own or (ImageNetInfo(subset).label_descriptions() if subset else ()))


def _of_transformers(model: Any) -> tuple[str, ...]:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(labels, dict) or sorted(labels) != list(range(len(labels))):
        return ()
    names = tuple(str(labels[index]) for index in range(len(labels)))
    # LABEL_0, LABEL_1, ... stand where nobody has given a name.
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
