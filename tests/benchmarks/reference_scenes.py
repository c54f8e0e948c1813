"""Scenes with exact localisation truth: real product photographs pasted into real photographs.

A scene is a 64 x 64 crop of a photograph, dimmed, with one or two tinted Fashion-MNIST items on it. Box and mask
of every item are known exactly because the recipe placed them. Photographs and items of the test split never
appear in the training split.

Sources (none of them is copied here; see ``train_reference_models.py`` for how to install them):

* items: Fashion-MNIST, Debian package ``dataset-fashion-mnist`` (MIT)
* photographs: the image folders of ``mvtb-data`` 1.6.1 (MIT) and ``scikit-image`` 0.26.0 (BSD-3-Clause)
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 64
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
# Fashion-MNIST ids of the seven classes that people and small models can tell apart at this size.
FASHION_IDS = (0, 1, 2, 3, 5, 8, 9)
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "bag", "ankle boot")

TRAIN_PHOTOS = (
    *(f"mvtbdata/images/flowers{i}.png" for i in (1, 2, 3, 4, 5, 7, 8)),
    *(f"mvtbdata/images/campus/P10704{i}.png" for i in (91, 93, 94, 95, 97, 98, 99)),
    *(f"mvtbdata/images/campus/P10705{i:02d}.png" for i in (0, 1, 3, 4, 5, 6, 7, 9, 10, 14, 15)),
    *(f"mvtbdata/images/campus/holdout/P10705{i:02d}.png" for i in (2, 8, 11, 13)),
    *(f"mvtbdata/images/mosaic/aerial2-{i:03d}.png" for i in (1, 4, 7, 10)),
    *(f"mvtbdata/images/{name}" for name in ("58060.png", "butterfly.jpg", "castle.png", "greenscreen.png")),
    *(f"mvtbdata/images/{name}" for name in ("image3.jpg", "lab-scene.png", "notre-dame.png", "street.png")),
    *(f"skimage/data/{name}.png" for name in ("astronaut", "brick", "camera", "chelsea", "coins", "gravel")),
    *(f"skimage/data/{name}.png" for name in ("ihc", "moon", "motorcycle_left")),
    "skimage/data/hubble_deep_field.jpg",
)
TEST_PHOTOS = (
    *(f"mvtbdata/images/{name}.png" for name in ("building2-3", "church", "eiffel-2", "flowers6", "flowers9")),
    *(f"mvtbdata/images/{name}.png" for name in ("parks", "road", "rocks2-l", "roof", "tomato_14", "tomato_35")),
    *(f"mvtbdata/images/{name}.png" for name in ("walls-l", "campus/P1070512", "mosaic/aerial-08")),
    *(f"skimage/data/{name}" for name in ("coffee.png", "grass.png", "rocket.jpg")),
)


@dataclass(frozen=True)
class SceneBatch:
    """Scenes and their truth; object axis 0 is the first item, axis 1 the second (all False where there is none)."""

    images: Tensor  # (batch, 3, 64, 64) float32 in [0, 1]
    labels: Tensor  # (batch, objects) int64
    masks: Tensor  # (batch, objects, 64, 64) bool


def _package_file(relative: str) -> Path:
    package, _, rest = relative.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {package!r} is not installed; it holds the photograph {relative}")
    return Path(spec.submodule_search_locations[0]) / rest


def photo_crops(photos: tuple[str, ...], per_photo: int, generator: torch.Generator) -> Tensor:
    """Random square crops of every photograph, as ``(crops, 3, 64, 64)`` uint8."""
    crops = []
    for relative in photos:
        image = Image.open(_package_file(relative)).convert("RGB")
        # The largest photographs have 4000 px: a crop then is a flat piece of wall. Half of 512 px shows a scene.
        image.thumbnail((512, 512))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        _, height, width = pixels.shape
        for _ in range(per_photo):
            side = int(torch.randint(SIZE, min(height, width) + 1, (), generator=generator))
            top = int(torch.randint(0, height - side + 1, (), generator=generator))
            left = int(torch.randint(0, width - side + 1, (), generator=generator))
            crop = pixels[:, top : top + side, left : left + side].float()[None]
            small = F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)
            crops.append(small.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(crops)


def fashion_items(split: str, folder: Path = FASHION_DIR) -> tuple[Tensor, Tensor, Tensor]:
    """Items of the seven classes: grey values and masks ``(n, 1, 28, 28)`` in [0, 1], labels 0 to 6."""
    prefix = {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        grey = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        ids = torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).copy()).long()
    label_of = torch.full((10,), -1)
    label_of[list(FASHION_IDS)] = torch.arange(len(FASHION_IDS))
    keep = label_of[ids] >= 0
    grey = grey[keep].float() / 255
    # Dark prints inside a shirt belong to the shirt: close the mask (dilate, then erode).
    mask = F.max_pool2d((grey > 0.02).float(), 3, stride=1, padding=1)
    mask = 1 - F.max_pool2d(1 - mask, 3, stride=1, padding=1)
    return grey, mask, label_of[ids[keep]]


class SceneSource:
    """Draws scenes of one split; the same seed gives the same scenes."""

    def __init__(self, split: str, seed: int, crops_per_photo: int = 200) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        photos = TRAIN_PHOTOS if split == "train" else TEST_PHOTOS
        self.grounds = photo_crops(photos, crops_per_photo, self.generator)
        self.grey, self.mask, self.labels = fashion_items(split)

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def _place(self, index: Tensor, size: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Items ``index`` at ``size`` pixels with their left top corner at ``(x, y)``: (grey, alpha), 64 x 64."""
        # affine_grid maps output coordinates in [-1, 1] to input coordinates: scale by SIZE/size, shift to the centre.
        scale = SIZE / size
        centre_x = (2 * x + size) / SIZE - 1
        centre_y = (2 * y + size) / SIZE - 1
        flip = torch.where(torch.rand(len(index), generator=self.generator) < 0.5, -1.0, 1.0)
        theta = torch.zeros(len(index), 2, 3)
        theta[:, 0, 0], theta[:, 0, 2] = flip * scale, -flip * scale * centre_x
        theta[:, 1, 1], theta[:, 1, 2] = scale, -scale * centre_y
        grid = F.affine_grid(theta, [len(index), 2, SIZE, SIZE], align_corners=False)
        item = torch.cat([self.grey[index], self.mask[index]], dim=1)
        placed = F.grid_sample(item, grid, align_corners=False)
        return placed[:, :1], placed[:, 1:]

    def _paste(self, image: Tensor, grey: Tensor, alpha: Tensor) -> Tensor:
        tint = self._uniform(0.5, 1.0, len(image), 3, 1, 1)
        return image * (1 - alpha) + alpha * tint * (0.15 + 0.85 * grey)

    def single(self, batch: int, *, ease: float = 0.0) -> SceneBatch:
        """One item of 28 to 40 px a scene. ``ease`` in [0, 1] makes the item larger and the ground darker."""
        index = torch.randint(len(self.labels), (batch,), generator=self.generator)
        size = self._uniform(28 + 12 * ease, 40 + 12 * ease, batch).round()
        x, y = ((self._uniform(0, 1, batch) * (SIZE - size)).round() for _ in range(2))
        image = self._ground(batch, 0.5 * (1 - 0.7 * ease))
        grey, alpha = self._place(index, size, x, y)
        return SceneBatch(self._paste(image, grey, alpha), self.labels[index][:, None], alpha > 0.5)

    def double(self, batch: int) -> SceneBatch:
        """Two items of different classes, 28 to 32 px, one in each half of the scene."""
        first = torch.randint(len(self.labels), (batch,), generator=self.generator)
        second = torch.randint(len(self.labels), (batch,), generator=self.generator)
        while (same := self.labels[first] == self.labels[second]).any():
            second[same] = torch.randint(len(self.labels), (int(same.sum()),), generator=self.generator)
        # Which class stands left is already random: both draws come from the same distribution.
        image = self._ground(batch, 0.5)
        masks = []
        for index, left in ((first, 0), (second, SIZE // 2)):
            size = self._uniform(28, 32, batch).round()
            x = left + (self._uniform(0, 1, batch) * (SIZE // 2 - size)).round()
            y = (self._uniform(0, 1, batch) * (SIZE - size)).round()
            grey, alpha = self._place(index, size, x, y)
            image = self._paste(image, grey, alpha)
            masks.append(alpha > 0.5)
        labels = torch.stack([self.labels[first], self.labels[second]], dim=1)
        return SceneBatch(image, labels, torch.cat(masks, dim=1))

    def _ground(self, batch: int, brightness: float) -> Tensor:
        chosen = torch.randint(len(self.grounds), (batch,), generator=self.generator)
        return self.grounds[chosen].float() / 255 * brightness
