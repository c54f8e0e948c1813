"""PASCAL VOC: boxes of twenty classes, and masks where there are some."""

from __future__ import annotations

from pathlib import Path

import torch

from captum_lnstat.evaluation.datasets.base import (
    BrokenFileError,
    Dataset,
    DatasetError,
    Sample,
    folder,
    read_image,
    read_labels,
    reading,
)
from captum_lnstat.evaluation.datasets.imagenet import voc_boxes

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOID = 255
_EXPECTED = "a folder of the VOC development kit, VOCdevkit/VOC2012, with JPEGImages and Annotations"


class PascalVoc(Dataset):
    """One sample for every image and class in it, named ``2007_000032#dog``, with the boxes of that class.

    Images come from ``ImageSets/Segmentation/val.txt`` if there is a folder ``SegmentationClass``, whose masks are then
    used, else from ``ImageSets/Main/val.txt``, else from ``JPEGImages``. Pixels of other classes make ``other_mask``;
    pixels of the border, 255, are ``void``. Targets are the twenty classes in VOC's order.
    """

    class_names = CLASSES

    def __init__(self, path: Path | None = None) -> None:
        self._root = folder(path, "voc", _EXPECTED)
        for part in ("JPEGImages", "Annotations"):
            if not (self._root / part).is_dir():
                raise DatasetError(f"there is no folder {str(self._root / part)!r}; expected {_EXPECTED}")
        masks = self._root / "SegmentationClass"
        self._masks = masks if masks.is_dir() else None
        self._broken: dict[str, str] = {}
        self._questions = [(name, one) for name in self._names() for one in self._classes(name)]

    def _names(self) -> list[str]:
        kind = "Main" if self._masks is None else "Segmentation"
        listed = self._root / "ImageSets" / kind / "val.txt"
        if listed.is_file():
            return [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
        names = sorted(file.stem for file in (self._root / "JPEGImages").glob("*.jpg"))
        return names if self._masks is None else [name for name in names if (self._masks / f"{name}.png").is_file()]

    def _annotation(self, name: str) -> Path:
        return self._root / "Annotations" / f"{name}.xml"

    def _classes(self, name: str) -> list[str]:
        """The classes in an image; a damaged annotation is one question, which names it when it is read."""
        try:
            objects = reading(self._annotation(name), voc_boxes, "an annotation with boxes")
        except BrokenFileError as error:
            self._broken[name] = str(error)
            return [""]
        return sorted({one for one, _ in objects if one in CLASSES})

    def __len__(self) -> int:
        return len(self._questions)

    def name(self, index: int) -> str:
        image, one = self._questions[index]
        return f"{image}#{one}" if one else image

    def __getitem__(self, index: int) -> Sample:
        name, one = self._questions[index]
        if name in self._broken:
            raise BrokenFileError(self._broken[name])
        target = CLASSES.index(one)
        image = read_image(self._root / "JPEGImages" / f"{name}.jpg")
        objects = reading(self._annotation(name), voc_boxes, "an annotation with boxes")
        boxes = torch.tensor([box for label, box in objects if label == one], dtype=torch.float32, device="cpu")
        if self._masks is None:
            return Sample(self.name(index), image, target, boxes=boxes)
        labels = torch.from_numpy(read_labels(self._masks / f"{name}.png").astype("int64"))
        mask = labels == target + 1
        other = (labels > 0) & (labels != _VOID) & ~mask
        return Sample(
            self.name(index),
            image,
            target,
            mask=mask,
            other_mask=other if bool(other.any()) else None,
            boxes=boxes,
            void=labels == _VOID,
        )
