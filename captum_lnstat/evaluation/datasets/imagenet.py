"""ImageNet-1K validation with its box annotations."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from torch import Tensor

from captum_lnstat.evaluation.datasets.base import (
    BrokenFileError,
    Dataset,
    DatasetError,
    Sample,
    folder,
    images_in,
    read_image,
    reading,
)

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_EXPECTED = (
    "the validation images in folders by wnid (val/n01440764/...), or flat beside the development kit with "
    f"data/{_TRUTH} and data/meta.mat or a classes.txt of wnids"
)


class ImageNet(Dataset):
    """The ILSVRC 2012 validation set. Targets are the places of the 1,000 wnids in sorted order, as models have them.

    Two layouts are known. Sorted: ``PATH`` or ``PATH/val`` holds a folder for every wnid. Flat: ``PATH`` or
    ``PATH/val`` holds ``ILSVRC2012_val_00000001.JPEG`` and so on, and the development kit lies under ``PATH``:
    ``ILSVRC2012_validation_ground_truth.txt``, one ILSVRC id a line, and ``meta.mat``, or, where scipy is not at hand,
    ``classes.txt``, the wnids in the order of the ILSVRC ids, one a line.

    Boxes are read from ``ILSVRC2012_val_00000001.xml`` wherever they lie under ``PATH``. If there are any,
    every image has to have its own.
    """

    def __init__(self, path: Path | None = None) -> None:
        root = folder(path, "imagenet", _EXPECTED)
        images = root / "val" if (root / "val").is_dir() else root
        wnids = sorted(child.name for child in images.iterdir() if child.is_dir() and _is_wnid(child.name))
        if wnids:
            found = [(file, place) for place, wnid in enumerate(wnids) for file in images_in(images / wnid)]
            self._files = sorted(found, key=lambda pair: pair[0].name)
        else:
            wnids, self._files = _flat(root, images)
        self.class_names = tuple(wnids)
        self._boxes = {file.stem: file for file in root.rglob("*.xml")}

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index][0].stem

    def __getitem__(self, index: int) -> Sample:
        file, target = self._files[index]
        if not self._boxes:
            return Sample(file.stem, read_image(file), target)
        if file.stem not in self._boxes:
            raise BrokenFileError(f"there is no {file.stem}.xml with the boxes of {str(file)!r}")
        return Sample(file.stem, read_image(file), target, boxes=_read_boxes(self._boxes[file.stem]))


def _is_wnid(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _flat(root: Path, images: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    files = sorted(file for file in images_in(images) if file.parent == images)
    truth = next(iter(sorted(root.rglob(_TRUTH))), None)
    if truth is None or not files:
        raise DatasetError(
            f"{str(root)!r} holds no folders by wnid, nor flat images with a {_TRUTH}; expected {_EXPECTED}"
        )
    ids = reading(truth, lambda path: [int(line) for line in path.read_text().split()], "ILSVRC ids")
    order = _ilsvrc_order(root)
    if not all(1 <= one <= len(order) for one in ids):
        raise DatasetError(f"{str(truth)!r} holds the id {max(ids)}; expected 1 to {len(order)}")
    wnids = sorted(order)
    targets = {wnid: place for place, wnid in enumerate(wnids)}
    labelled = []
    for file in files:
        number = file.stem.rpartition("_")[2]
        if not number.isdigit() or not 1 <= int(number) <= len(ids):
            raise DatasetError(
                f"{file.name} has no line in {str(truth)!r}; expected names like ILSVRC2012_val_00000001"
            )
        labelled.append((file, targets[order[ids[int(number) - 1] - 1]]))
    return wnids, labelled


def _ilsvrc_order(root: Path) -> list[str]:
    """The wnids in the order of the ILSVRC ids 1 to 1000."""
    listed = next(iter(sorted(root.rglob("classes.txt"))), None)
    if listed is not None:
        return listed.read_text().split()
    meta = next(iter(sorted(root.rglob("meta.mat"))), None)
    if meta is None:
        raise DatasetError(f"there is neither a meta.mat nor a classes.txt under {str(root)!r}; expected {_EXPECTED}")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DatasetError(
            "meta.mat needs scipy: pip install scipy, or write the wnids in the order of the ILSVRC ids "
            "to a classes.txt, one a line"
        ) from None
    rows = reading(meta, lambda path: loadmat(str(path), squeeze_me=True)["synsets"], "the development kit's synsets")
    # Rows without children are the 1,000 classes; those above them come after.
    leaves = sorted((int(row[0]), str(row[1])) for row in rows if int(row[4]) == 0)
    return [wnid for _, wnid in leaves]


def _read_boxes(path: Path) -> Tensor:
    """Boxes of a PASCAL VOC annotation; its pixels count from 1 and include the last one."""
    boxes = reading(path, voc_boxes, "an annotation with boxes")
    if not boxes:
        raise BrokenFileError(f"{str(path)!r} holds no object; expected at least one")
    return torch.tensor([box for _, box in boxes], dtype=torch.float32, device="cpu")


def voc_boxes(path: Path) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Name and box of every object in an annotation of PASCAL VOC's form: left, top, right, bottom, ends exclusive."""
    found = []
    for entry in ElementTree.parse(path).getroot().iter("object"):
        box = entry.find("bndbox")
        if box is None:
            raise ValueError("an object has no bndbox")
        left, top, right, bottom = (float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax"))
        found.append((entry.findtext("name") or "", (left - 1, top - 1, right, bottom)))
    return found
