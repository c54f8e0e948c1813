"""The model that is evaluated: how to call it, how its images are made, and which weights it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from captum_lnstat.errors import SourceError, one_line
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.explanation.provenance import digest
from captum_lnstat.explanation.subject.subject import read_subject


class Scores(nn.Module):
    """A model whose output has its scores in ``logits``, as one that returns the scores themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images).logits
        return scores


__all__ = ["Scores", "Subject", "digest", "read"]


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


def read(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    fit: Literal["squash"] | None = None,
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

    Raises:
        SourceError: There is no such model, or it cannot be evaluated; the message says why.
    """
    if checkpoint is not None and (pretrained or ":" in name):
        raise SourceError("--checkpoint is for models of the zoo and of timm, without --pretrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = read_subject(name, pretrained, checkpoint)
    for parameter in found.model.parameters():
        parameter.requires_grad_(False)  # no gradient of a weight is needed
    try:
        preprocessing = found.preprocessing.whole() if fit == "squash" else found.preprocessing
        return Subject.of(found.model, Frame(preprocessing.transform, preprocessing.source), device)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SourceError(f"{name} cannot be evaluated: {one_line(error)}") from error
