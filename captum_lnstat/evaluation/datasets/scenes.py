"""The package's own scenes: one object on a photograph, or two of different classes."""

from __future__ import annotations

from pathlib import Path

import torch

from captum_lnstat import zoo
from captum_lnstat.evaluation.datasets.base import Dataset, DatasetError, Sample
from captum_lnstat.zoo.models import CLASS_NAMES
from captum_lnstat.zoo.sample_scenes import read_scenes


class Scenes(Dataset):
    """The scenes of ``captum_lnstat.zoo``, or of a file that ``read_scenes`` reads, as one question an object.

    A scene of two objects gives two samples, ``NAME#0`` and ``NAME#1``, each with the other object as ``other_mask``.
    Neither object is the class of the image, so only the two-object game is asked of them.
    """

    class_names = CLASS_NAMES

    def __init__(self, path: Path | None = None) -> None:
        try:
            self._scenes = zoo.scenes() if path is None else read_scenes(path)
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(
                f"{str(path)!r} cannot be read as scenes: {error}; expected an .npz with images, labels and masks"
            ) from error
        self._questions = [(number, which) for number, s in enumerate(self._scenes) for which in range(len(s.labels))]

    def __len__(self) -> int:
        return len(self._questions)

    def name(self, index: int) -> str:
        number, which = self._questions[index]
        return f"scene-{number:05d}#{which}"

    def __getitem__(self, index: int) -> Sample:
        number, which = self._questions[index]
        scene = self._scenes[number]
        two = len(scene.labels) == 2
        return Sample(
            self.name(index),
            scene.image,
            scene.labels[which],
            scene.masks[which],
            other_mask=scene.masks[1 - which] if two else None,
            boxes=None if two else torch.tensor([scene.boxes[which]], dtype=torch.float32, device="cpu"),
            only_two=two,
        )
