"""COCO-style JSON: boxes, polygons and run-length masks."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.path import Path as Outline
from torch import Tensor

from captum_lnstat.evaluation.datasets.base import BrokenFileError, Dataset, DatasetError, Sample, read_image

_EXPECTED = (
    "a JSON file with images, annotations and categories; images beside it, or in images/, train2017/ or val2017/"
)


class Coco(Dataset):
    """One sample for every image and category in it, named ``000000000139#dog``.

    ``PATH`` is the annotations' file. An image is looked for by its ``file_name`` from the file's folder, from the one
    above, and in ``images``, ``train2017`` and ``val2017`` of both. A segmentation may be polygons, an uncompressed or
    a compressed run-length code, or missing: then the sample has boxes and no mask. A polygon takes the pixels whose
    centre is in it. The pixels of ``iscrowd``
    annotations of the category are ``void``. Targets count the categories in the order of their ids.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None or not path.is_file():
            raise DatasetError(f"there is no file {str(path)!r}; expected coco:PATH, {_EXPECTED}")
        try:
            data = json.loads(path.read_bytes())
            categories = sorted(data["categories"], key=lambda one: int(one["id"]))
            self._images = {one["id"]: one for one in data["images"]}
            annotations = data["annotations"]
            self.class_names = tuple(str(one["name"]) for one in categories)
            self._targets = {one["id"]: place for place, one in enumerate(categories)}
            self._of: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
            for one in annotations:
                self._of[one["image_id"], one["category_id"]].append(one)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{str(path)!r} cannot be read: {type(error).__name__}: {error}; expected {_EXPECTED}"
            ) from error
        unknown = [key for key in self._of if key[0] not in self._images or key[1] not in self._targets]
        if unknown:
            raise DatasetError(f"an annotation in {str(path)!r} is of image and category {unknown[0]}, which it lacks")
        self._questions = sorted(
            (key for key, found in self._of.items() if not all(one.get("iscrowd") for one in found)),
            key=lambda key: (str(self._images[key[0]]["file_name"]), self._targets[key[1]]),
        )
        self._roots = [base / part for base in (path.parent, path.parent.parent) for part in _FOLDERS]

    def __len__(self) -> int:
        return len(self._questions)

    def name(self, index: int) -> str:
        image, category = self._questions[index]
        return f"{Path(self._images[image]['file_name']).stem}#{self.class_names[self._targets[category]]}"

    def __getitem__(self, index: int) -> Sample:
        key = self._questions[index]
        name, image = self.name(index), read_image(self._file(self._images[key[0]]["file_name"]))
        try:
            whole = [one for one in self._of[key] if not one.get("iscrowd")]
            crowd = [one for one in self._of[key] if one.get("iscrowd")]
            boxes = torch.tensor(
                [_corners(one["bbox"]) for one in whole if one.get("bbox")], dtype=torch.float32, device="cpu"
            )
            mask = _union(whole, image.size)
            others = [o for k, found in self._of.items() if k[0] == key[0] and k != key for o in found]
            other = _union(others, image.size)
            void = _union(crowd, image.size)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BrokenFileError(f"an annotation of {name} is damaged: {type(error).__name__}: {error}") from error
        if mask is not None and other is not None:
            other = other & ~mask if bool((other & ~mask).any()) else None
        target = self._targets[key[1]]
        return Sample(name, image, target, mask, other, boxes if len(boxes) else None, void=void)

    def _file(self, name: str) -> Path:
        found = next((root / name for root in self._roots if (root / name).is_file()), None)
        if found is None:
            raise BrokenFileError(
                f"there is no file {name!r} in {' or '.join(repr(str(root)) for root in self._roots)}"
            )
        return found


_FOLDERS = ("", "images", "train2017", "val2017")


def _corners(box: list[float]) -> tuple[float, float, float, float]:
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _union(annotations: list[dict[str, Any]], size: tuple[int, int]) -> Tensor | None:
    """Pixels of any of the annotations; None if one of them has no segmentation, or there are none."""
    found = [decode(one.get("segmentation"), size) for one in annotations]
    if not found or any(mask is None for mask in found):
        return None
    return torch.from_numpy(np.any(np.stack([mask for mask in found if mask is not None]), axis=0))


def decode(segmentation: Any, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """A segmentation as a mask of an image of ``size``, width and height; None for an empty one.

    Run lengths go down the columns and begin with zeros. In the compressed form each is a number of 5 bits a character,
    lowest first, from the character 48 on, of which bit 6 says that more follow and bit 5 of the last is the sign; from
    the fourth on, the number is the difference to the one two before.

    Example:
        >>> decode({"size": [2, 3], "counts": [1, 2, 3]}, (3, 2)).astype(int)
        array([[0, 1, 0],
               [1, 0, 0]])
    """
    width, height = size
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        inside: np.ndarray[Any, np.dtype[np.bool_]] = np.any([_inside(one, width, height) for one in segmentation], 0)
        return inside
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"a run-length code is of size {segmentation['size']}; expected {[height, width]}")
    counts = segmentation["counts"]
    runs = np.array(_runs(counts) if isinstance(counts, str | bytes) else counts, np.int64)
    if runs.sum() != width * height or (runs < 0).any():
        raise ValueError(f"run lengths add up to {runs.sum()}; expected {width * height}")
    values = np.arange(len(runs)) % 2 == 1
    mask: np.ndarray[Any, np.dtype[np.bool_]] = np.repeat(values, runs).reshape(width, height).T
    return mask


def _inside(polygon: list[float], width: int, height: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Pixels whose centre is inside a polygon, x and y in turn."""
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"a polygon has {len(polygon)} numbers; expected pairs, at least three")
    points = np.array(polygon, np.float64).reshape(-1, 2)
    (left, top), (right, bottom) = np.floor(points.min(0)).clip(0), np.ceil(points.max(0)).clip(0)
    columns = np.arange(int(left), min(int(right), width))
    rows = np.arange(int(top), min(int(bottom), height))
    mask = np.zeros((height, width), np.bool_)
    x, y = np.meshgrid(columns + 0.5, rows + 0.5)
    inside = Outline(points).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    mask[np.ix_(rows, columns)] = inside.reshape(x.shape)
    return mask


def _runs(text: str | bytes) -> list[int]:
    """The run lengths of a compressed code."""
    found: list[int] = []
    value = shift = 0
    for character in text.encode("ascii") if isinstance(text, str) else text:
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        found.append(value + found[-2] if len(found) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("a compressed run-length code ends in the middle of a number")
    return found
