"""Weights trained on ImageNet and photographs of its validation set, for the scripts that look at them.

They are not part of the repository, for their terms do not allow it. A script is given their folder, and is skipped
where there is none. The folder holds ``NAME.safetensors`` for each model, with the names that timm has for them, and
``ilsvrc-val``, photographs with boxes in the flat layout that ``--data imagenet:PATH`` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from real_subjects import COVER, REAL, TIMM, in_split, inside
from torch import Tensor

from captum_lnstat.evaluation.datasets.imagenet import ImageNet
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.explanation.subject.subject import Subject, read_subject

FOLDER = REAL
MODELS = {"DeiT-Tiny": TIMM["deit"], "ViT-Tiny": TIMM["vit"]}


@dataclass(frozen=True)
class Photographs:
    """Photographs as a model sees them, squeezed to its size, and where their objects are.

    Attributes:
        images: ``(image, 3, height, width)``, normalised.
        boxes: ``(image, height, width)`` bool, the pixels inside a box.
        targets: The class of each.
        numbers: The number of each in the validation set.
    """

    images: Tensor
    boxes: Tensor
    targets: Tensor
    numbers: tuple[int, ...]


def check_folder(folder: Path) -> None:
    """End the script, with the reason, where the folder or a model of it is absent."""
    for path in (folder, folder / "ilsvrc-val", *(folder / f"{name}.safetensors" for name in MODELS.values())):
        if not path.exists():
            raise SystemExit(f"skipped: there is no {path}; --real is the folder of weights and photographs")


def real_model(folder: Path, title: str) -> Subject:
    """A model of ``MODELS`` with its trained weights, its preprocessing and its class names."""
    name = MODELS[title]
    subject = read_subject(name, checkpoint=folder / f"{name}.safetensors")
    subject.model.requires_grad_(False)
    return subject


def photographs(folder: Path, subject: Subject, count: int, *, odd: bool) -> Photographs:
    """The first so many photographs of odd or of even number whose boxes cover as much as ``COVER`` says."""
    whole = subject.preprocessing.whole()
    frame, data = Frame(whole.transform, whole.source), ImageNet(folder / "ilsvrc-val")
    images, masks, targets, numbers = [], [], [], []
    for index in range(len(data)):
        if not in_split(data.name(index), "report" if odd else "tune"):
            continue
        example = frame.example(data[index])
        mask = inside(example.boxes, frame.size)
        if COVER[0] <= float(mask.float().mean()) <= COVER[1]:
            images.append(example.image)
            masks.append(mask)
            targets.append(example.sample.target)
            numbers.append(int(data.name(index).rpartition("_")[2]))
        if len(images) == count:
            break
    return Photographs(torch.stack(images), torch.stack(masks), torch.tensor(targets), tuple(numbers))
