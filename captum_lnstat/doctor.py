"""What ``captum-lnstat doctor`` says of a model: what is recognised in it, or why it is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.description import Description
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.rules import find_rule, rule_names
from captum_lnstat.topology import takes_videos
from captum_lnstat.topology.anatomy.images import channels

# So many frames a video has if the model does not say.
FRAMES = 16


@dataclass(frozen=True)
class Examination:
    """Of one model at one image size.

    Attributes:
        image_size: Height and width of the images.
        description: What was recognised, if the model can be explained.
        refusal: The error that says why not and what would be needed, if it cannot.
        rules: For every rule nothing if it is defined for the model, or why it is not.
    """

    image_size: tuple[int, int]
    description: Description | None
    refusal: Exception | None
    rules: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. ``supported`` tells the two cases apart."""
        record: dict[str, Any] = {"supported": self.refusal is None, "image_size": list(self.image_size)}
        if self.refusal is not None:
            record |= {"error": type(self.refusal).__name__, "reason": str(self.refusal)}
        if self.description is not None:
            record |= self.description.to_dict() | {"rules": dict(self.rules)}
        return record

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"refused at {self.image_size[0]} x {self.image_size[1]} px\n{self.refusal}"
        undefined = [f"rule {rule!r} is not defined: {why}" for rule, why in self.rules.items() if why is not None]
        return "\n".join(["supported", str(self.description), *undefined])


def examine(model: nn.Module, image_size: tuple[int, int]) -> Examination:
    """Run one image of noise, or one video, through every rule.

    Args:
        model: Any model; it is not changed.
        image_size: Height and width of its images.

    Example:
        >>> import timm
        >>> examine(timm.create_model("vit_tiny_patch16_224", depth=2).eval(), (224, 224)).description.grid
        (14, 14)
        >>> examine(timm.create_model("resnet18").eval(), (64, 64)).to_dict()["supported"]
        False
    """
    parameter = next(model.parameters(), torch.zeros((), device="cpu"))
    random = torch.Generator().manual_seed(0)
    images = torch.randn(_shape(model, image_size), generator=random, device="cpu").to(parameter)
    rules: dict[str, str | None] = {}
    try:
        description = LNStatAttribution(model).describe(images)
        for rule in rule_names():
            rules[rule] = _undefined(model, images, rule)
    except Exception as error:  # a model that fails on the images by itself is refused, too
        return Examination(image_size, None, error, {})
    known = [why for why in rules.values() if why is not None]
    refusal = UnsupportedModelError(known[0]) if len(known) == len(rules) else None
    return Examination(image_size, description, refusal, rules)


def _shape(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Of one image, or, for a model of videos, of one video; those of Hugging Face take the frames first."""
    if not takes_videos(model):
        return 1, channels(model), *image_size
    config = getattr(model, "config", None)
    frames = getattr(config, "num_frames", FRAMES)
    return (1, 3, frames, *image_size) if config is None else (1, frames, 3, *image_size)


def _undefined(model: nn.Module, images: torch.Tensor, rule: Any) -> str | None:
    try:
        LNStatAttribution(model, rule=rule).relevance(images, 0 if find_rule(rule).class_specific else None)
    except (UnsupportedModelError, RecordingError) as error:
        return str(error)
    return None
