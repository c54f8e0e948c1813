"""Tiny-ImageNet's validation images with their boxes."""

from __future__ import annotations

from pathlib import Path

import torch

from captum_lnstat.evaluation.datasets.base import Dataset, DatasetError, Sample, folder, read_image

_EXPECTED = "Tiny-ImageNet's folder, with wnids.txt, val/val_annotations.txt and val/images"


class TinyImageNet(Dataset):
    """The validation set of Tiny-ImageNet. Targets are the places of the wnids of ``wnids.txt`` in sorted order.

    ``val/val_annotations.txt`` has a line for every image: its file, its wnid, and the box's left, top, right and
    bottom pixel, counted from 0, the last one included. An image that is in a folder of its wnid, where some tools
    have moved it, is found there.
    """

    def __init__(self, path: Path | None = None) -> None:
        root = folder(path, "tiny-imagenet", _EXPECTED)
        table, listed = root / "val" / "val_annotations.txt", root / "wnids.txt"
        for file in (table, listed):
            if not file.is_file():
                raise DatasetError(f"there is no file {str(file)!r}; expected {_EXPECTED}")
        self.class_names = tuple(sorted(listed.read_text().split()))
        targets = {wnid: place for place, wnid in enumerate(self.class_names)}
        self._images = root / "val"
        self._rows: list[tuple[str, str, int, tuple[int, int, int, int]]] = []
        for number, line in enumerate(table.read_text().splitlines(), 1):
            try:
                file_name, wnid, *box = line.split()
                left, top, right, bottom = map(int, box)
                self._rows.append((file_name, wnid, targets[wnid], (left, top, right + 1, bottom + 1)))
            except (ValueError, KeyError):
                raise DatasetError(
                    f"line {number} of {str(table)!r} is {line!r}; expected a file, a known wnid and four numbers"
                ) from None

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return Path(self._rows[index][0]).stem

    def __getitem__(self, index: int) -> Sample:
        file_name, wnid, target, box = self._rows[index]
        places = [self._images / "images" / file_name, self._images / wnid / file_name]
        places.append(self._images / wnid / "images" / file_name)
        image = read_image(next((one for one in places if one.is_file()), places[0]))
        return Sample(self.name(index), image, target, boxes=torch.tensor([box], dtype=torch.float32, device="cpu"))
