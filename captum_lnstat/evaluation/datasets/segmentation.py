"""ImageNet-Segmentation: 4,276 images of ImageNet with a mask of the object."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captum_lnstat.evaluation.datasets.base import BrokenFileError, Dataset, DatasetError, Sample

_EXPECTED = "gtsegs_ijcv.mat of Guillaumin et al. (IJCV 2014)"


class ImageNetSegmentation(Dataset):
    """``gtsegs_ijcv.mat``, a MATLAB 7.3 (HDF5) file whose ``value/img`` and ``value/gt`` refer to images and masks.

    MATLAB stores arrays by columns, so both come out of HDF5 turned and are turned back. A ``gt`` that refers to a cell
    of several annotations gives its first. The file has no class indices of a classifier: the predicted class is
    explained, as in the published protocol.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None or not path.is_file():
            raise DatasetError(f"there is no file {str(path)!r}; expected imagenet-segmentation:PATH with {_EXPECTED}")
        try:
            import h5py
        except ImportError:
            raise DatasetError(
                'imagenet-segmentation needs h5py; install it with pip install "captum-lnstat[evaluate]"'
            ) from None
        self._path, self._lock = path, threading.Lock()
        try:
            self._file: Any = h5py.File(path, "r")
            self._images, self._masks = self._file["value/img"], self._file["value/gt"]
        except (OSError, KeyError) as error:
            raise DatasetError(f"{str(path)!r} cannot be read: {error}; expected {_EXPECTED}") from error
        if self._images.shape != self._masks.shape:
            raise DatasetError(f"{str(path)!r} has {self._images.shape} images and {self._masks.shape} masks")

    def __len__(self) -> int:
        return int(self._images.size)

    def name(self, index: int) -> str:
        return f"image-{index:05d}"

    def __getitem__(self, index: int) -> Sample:
        try:
            with self._lock:  # HDF5 is read by one thread at a time
                pixels, labels = (self._read(references, index) for references in (self._images, self._masks))
            if pixels.ndim == 2:
                pixels = np.stack([pixels] * 3)
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0).astype(np.uint8)))
            labels = torch.from_numpy(np.ascontiguousarray(labels.T.astype(np.int64)))
        except (OSError, KeyError, ValueError, RuntimeError, IndexError) as error:
            raise BrokenFileError(f"image {index} of {str(self._path)!r} cannot be read: {error}") from error
        return Sample(self.name(index), image, mask=labels == 1, void=labels < 0)

    def _read(self, references: Any, index: int) -> Any:
        place = np.unravel_index(index, references.shape)
        found = self._file[references[place]]
        while found.dtype == object:  # a cell array: references to what is in it
            found = self._file[found[(0,) * found.ndim]]
        return np.array(found)
