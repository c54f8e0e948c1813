"""Folders of pictures: images with masks, and images with graded human maps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from captum_lnstat.evaluation.datasets.base import (
    BrokenFileError,
    Dataset,
    DatasetError,
    Sample,
    folder,
    graded,
    images_in,
    read_image,
    read_labels,
)


class _Pairs(Dataset):
    """Images and what belongs to them, by the same relative name up to the suffix."""

    kind = ""
    truth: tuple[str, ...] = ()

    def __init__(self, path: Path | None = None) -> None:
        names = " or ".join(self.truth)
        root = folder(path, self.kind, f"a folder with images and {names}")
        self._images_root = root / "images"
        self._truth_root = next((root / name for name in self.truth if (root / name).is_dir()), root / self.truth[0])
        for one in (self._images_root, self._truth_root):
            if not one.is_dir():
                raise DatasetError(
                    f"there is no folder {str(one)!r}; expected {str(root)!r} to hold images and {names}"
                )
        self._images = images_in(self._images_root)
        self._truth = {self._key(file, self._truth_root): file for file in images_in(self._truth_root)}
        keys = [self._key(file, self._images_root) for file in self._images]
        twice = min((key for key, count in Counter(keys).items() if count > 1), default=None)
        if twice is not None:
            raise DatasetError(
                f"two images in {str(self._images_root)!r} are called {twice!r}; expected different names"
            )
        left = sorted(set(self._truth) - set(keys))
        if left:
            raise DatasetError(f"{str(self._truth[left[0]])!r} has no image in {str(self._images_root)!r}")

    @staticmethod
    def _key(file: Path, root: Path) -> str:
        return file.relative_to(root).with_suffix("").as_posix()

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return self._key(self._images[index], self._images_root)

    def _truth_of(self, index: int) -> Path:
        name = self.name(index)
        if name not in self._truth:
            raise BrokenFileError(f"{str(self._images[index])!r} has nothing in {str(self._truth_root)!r}")
        return self._truth[name]


class Folder(_Pairs):
    """``images/`` and ``masks/`` with the same names. A mask is where its image is not 0; 255 on 0 is as good as 1.

    If the images lie in folders of their own below ``images/``, these folders are the classes, in sorted order, and
    the masks lie in the same ones; else there are no classes and the predicted one is explained.
    """

    kind, truth = "folder", ("masks",)

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path)
        parents = {Path(self.name(index)).parent.as_posix() for index in range(len(self))}
        if "." in parents and len(parents) > 1:
            raise DatasetError(
                f"{str(self._images_root)!r} holds images in folders and beside them; expected one folder a class, "
                "or no folders"
            )
        self.class_names = () if parents == {"."} else tuple(sorted(parents))

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        mask = torch.from_numpy(read_labels(self._truth_of(index)) > 0)
        target = self.class_names.index(Path(name).parent.as_posix()) if self.class_names else None
        return Sample(name, read_image(self._images[index]), target, mask=mask)


class HumanMaps(_Pairs):
    """``images/`` and ``maps/`` with the same names: grey images, brighter where people found it more relevant.

    There are no classes: the predicted one is explained.
    """

    kind, truth = "human", ("maps",)

    def __getitem__(self, index: int) -> Sample:
        human = graded(read_labels(self._truth_of(index)))
        return Sample(self.name(index), read_image(self._images[index]), human=human)
