"""The package's own scenes: one object on a photograph, or two of different classes."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captum_lnstat.evaluation.datasets.base import Dataset, DatasetError, Sample
from captum_lnstat.zoo.models import CLASS_NAMES


class Scenes(Dataset):
    """The scenes of ``captum_lnstat.zoo``, or of a file of the same layout, as one question an object.

    The file is an ``.npz`` with ``images`` (scene, height, width, 3) uint8, ``labels`` (scene, object) with -1 for no
    object, and ``masks``, (scene, object, height * width) bool packed along the last axis by ``numpy.packbits``.

    A scene of two objects gives two samples, ``NAME#0`` and ``NAME#1``, each with the other object as ``other_mask``.
    Neither object is the class of the image, so only the two-object game is asked of them.
    """

    class_names = CLASS_NAMES

    def __init__(self, path: Path | None = None) -> None:
        try:
            with as_file(files("captum_lnstat.zoo").joinpath("scenes.npz")) as own, np.load(path or own) as data:
                self._images, self._labels, packed = data["images"], data["labels"], data["masks"]
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(
                f"{str(path)!r} cannot be read as scenes: {error}; expected an .npz with images, labels and masks"
            ) from error
        count, height, width = self._images.shape[:3]
        bits = np.unpackbits(packed, axis=-1).astype(bool).reshape(count, -1)
        self._masks = bits.reshape(count, -1, height, width)[:, : self._labels.shape[1]]
        self._questions = [(s, o) for s in range(count) for o in range(int((self._labels[s] >= 0).sum()))]

    def __len__(self) -> int:
        return len(self._questions)

    def name(self, index: int) -> str:
        scene, which = self._questions[index]
        return f"scene-{scene:05d}#{which}"

    def __getitem__(self, index: int) -> Sample:
        scene, which = self._questions[index]
        masks = torch.from_numpy(self._masks[scene])
        two = int((self._labels[scene] >= 0).sum()) == 2
        return Sample(
            self.name(index),
            Image.fromarray(self._images[scene]),
            int(self._labels[scene][which]),
            masks[which],
            other_mask=masks[1 - which] if two else None,
            boxes=None if two else _box(masks[which]),
            only_two=two,
        )


def _box(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)
