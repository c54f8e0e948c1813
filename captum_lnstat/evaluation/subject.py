"""The model that is evaluated: how to call it, how its images are made, and which weights it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from captum_lnstat import zoo
from captum_lnstat.cli import fail
from captum_lnstat.errors import one_line
from captum_lnstat.evaluation.frame import Fit, Frame, timm_frame
from captum_lnstat.explanation.subject.subject import read_model, read_subject
from captum_lnstat.zoo.models import IMAGE_SIZE


class Scores(nn.Module):
    """A model whose output has its scores in ``logits``, as one that returns the scores themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images).logits
        return scores


@dataclass(frozen=True)
class Subject:
    """A model ready to be evaluated.

    Attributes:
        model: The transformer, whose modules can be named.
        forward: From images to one row of class scores an image: the model, or ``Scores`` around it.
        frame: From an image to the model's input.
        classes: How many scores it gives.
        digest: SHA-256 of its weights.
        device: Where it is.
    """

    model: nn.Module
    forward: nn.Module
    frame: Frame
    classes: int
    digest: str
    device: torch.device

    @staticmethod
    def of(model: nn.Module, frame: Frame, device: torch.device | str = "cpu") -> Subject:
        """The subject of a model, which is put into eval mode and on the device.

        Raises:
            TypeError: The output is neither ``(batch, class)`` scores nor something with such ``logits``.
        """
        device = torch.device(device)
        model = model.eval().to(device)
        with torch.no_grad():
            output = model(torch.zeros(1, 3, *frame.size, device=device))
        forward = model if isinstance(output, Tensor) else Scores(model)
        scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise TypeError(
                f"{type(model).__name__} returns a {type(output).__name__}; expected (batch, class) scores, or an "
                "object with such logits"
            )
        return Subject(model, forward, frame, scores.shape[1], digest(model), device)


def digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of all parameters and buffers.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> digest(a) == digest(a), digest(a) == digest(b)
        (True, False)
    """
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    fit: Fit | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Subject:
    """A model by its name on the command line, as for ``captum-lnstat doctor``, with the images its library gives it.

    Args:
        name: Of the zoo or of timm, ``torchvision:NAME``, ``hf:NAME`` or ``package.module:callable``.
        pretrained: Take the library's weights.
        checkpoint: Weights for a model of the zoo or of timm.
        fit: ``"squash"`` for whole images whatever their proportions. Default: the library's own way.
        seed: Random weights, where there are no others, come from it.
        device: Where to put it.
    """
    if checkpoint is not None and (pretrained or ":" in name):
        fail("--checkpoint is for models of the zoo and of timm, without --pretrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        library, _, rest = name.partition(":")
        model: Any
        if not rest:
            model = read_subject(name, pretrained, checkpoint).model
            make: Callable[[], Frame] = lambda: _zoo_frame() if name in zoo.names() else _timm_frame(model)  # noqa: E731
        else:
            model, size = read_model(name, pretrained)
            make = lambda: _frame_of(library, rest, pretrained, size, model)  # noqa: E731
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # no gradient of a weight is asked for
    try:
        frame = make()
        return Subject.of(model, frame.squashed() if fit == "squash" else frame, device)
    except (ValueError, TypeError, RuntimeError) as error:
        fail(f"{name} cannot be evaluated: {one_line(error)}")


def _zoo_frame() -> Frame:
    half = (0.5, 0.5, 0.5)
    return Frame((IMAGE_SIZE, IMAGE_SIZE), (IMAGE_SIZE, IMAGE_SIZE), "center", half, half)


def _timm_frame(model: Any) -> Frame:
    return timm_frame(resolve_model_data_config(model))


def _frame_of(library: str, name: str, pretrained: bool, size: tuple[int, int], model: Any) -> Frame:
    if library == "torchvision":
        return _torchvision_frame(name)
    if library == "hf":
        return _transformers_frame(name, pretrained, size)
    config = resolve_model_data_config(model) if hasattr(model, "pretrained_cfg") else None
    return timm_frame(config) if config else Frame(size, (round(size[0] / 0.875), round(size[1] / 0.875)))


def _torchvision_frame(name: str) -> Frame:
    preset = import_module("torchvision.models").get_model_weights(name).DEFAULT.transforms()
    crop, scale = preset.crop_size[0], preset.resize_size[0]
    interpolation = Image.Resampling[preset.interpolation.name]
    return Frame((crop, crop), (scale, scale), "center", tuple(preset.mean), tuple(preset.std), interpolation)


def _transformers_frame(name: str, pretrained: bool, size: tuple[int, int]) -> Frame:
    """As the image processor says; a model without one gets whole images and ImageNet's mean and deviation."""
    frame = Frame(size, size, "squash")
    if not pretrained:
        return frame
    processor = import_module("transformers").AutoImageProcessor.from_pretrained(name)
    given = dict(processor.size or {})
    filters = Image.Resampling(int(processor.resample or Image.Resampling.BILINEAR))
    frame = replace(frame, mean=tuple(processor.image_mean), std=tuple(processor.image_std), interpolation=filters)
    if "shortest_edge" in given and getattr(processor, "do_center_crop", False):
        cut = dict(processor.crop_size)
        edge = int(given["shortest_edge"])
        return replace(frame, size=(int(cut["height"]), int(cut["width"])), scale=(edge, edge), fit="center")
    if set(given) == {"height", "width"} and not getattr(processor, "do_center_crop", False):
        whole = (int(given["height"]), int(given["width"]))
        return replace(frame, size=whole, scale=whole)
    raise ValueError(f"the image processor resizes to {given}; take --fit squash")
