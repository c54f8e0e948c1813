"""What every data set gives: samples by index, each an image with whatever truth is known about it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from captum_lnstat.explanation.subject.images import to_rgb

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

T = TypeVar("T")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class DatasetError(ValueError):
    """The data are not laid out as expected; the message names the folder or file and what was expected."""


class BrokenFileError(DatasetError):
    """One sample's file is missing or damaged; the others may be fine."""


@dataclass(frozen=True)
class Sample:
    """One image, the class asked for, and what is known about where it is. Truth has the size of the image.

    Attributes:
        name: Unique in the data set. What follows a ``#`` tells several questions about one image apart.
        image: RGB.
        target: Index of the class asked for, if the data have classes.
        mask: ``(height, width)`` bool, the pixels of that class or object.
        other_mask: The pixels of another object, for the two-object game.
        boxes: ``(box, 4)`` float, left, top, right, bottom in pixels; right and bottom exclusive.
        human: ``(height, width)`` float, how relevant people found each pixel: graded or 0 and 1.
        void: ``(height, width)`` bool, pixels without a label.
        only_two: Nothing but the two-object game is to be asked: two objects, none of them the image's class.
    """

    name: str
    image: Image.Image
    target: int | None = None
    mask: Bool[Tensor, "height width"] | None = None
    other_mask: Bool[Tensor, "height width"] | None = None
    boxes: Float[Tensor, "box 4"] | None = None
    human: Float[Tensor, "height width"] | None = None
    void: Bool[Tensor, "height width"] | None = None
    only_two: bool = False

    def __post_init__(self) -> None:
        width, height = self.image.size
        for what in ("mask", "other_mask", "human", "void"):
            truth = getattr(self, what)
            if truth is not None and truth.shape != (height, width):
                raise BrokenFileError(
                    f"{self.name}: {what} is {truth.shape[-1]} x {truth.shape[0]} and the image {width} x {height}; "
                    "expected the same size"
                )
        if self.boxes is not None:
            sides = self.boxes[:, 2:] - self.boxes[:, :2]
            if not bool((sides > 0).all()):
                raise BrokenFileError(f"{self.name}: a box has no area, {self.boxes[(sides <= 0).any(1)][0].tolist()}")

    @property
    def group(self) -> str:
        """Name of the image, the same for all questions about it."""
        return self.name.partition("#")[0]


class Dataset(ABC):
    """Samples by index. Names are known without reading a file; ``dataset[index]`` reads.

    Attributes:
        class_names: The names of the classes, in the order of the targets; empty if the data have none.
    """

    class_names: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The name that the sample of an index has."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Raises:
            BrokenFileError: A file of it is missing or damaged.
        """


def folder(path: Path | None, kind: str, expected: str) -> Path:
    """The folder that was given, if there is one."""
    if path is None:
        raise DatasetError(f"{kind!r} needs a path, {kind}:PATH; expected {expected}")
    if not path.is_dir():
        raise DatasetError(f"there is no folder {str(path)!r}; expected {expected}")
    return path


def reading(path: Path, read: Callable[[Path], T], what: str) -> T:
    """What a function reads from a file, or an error that names the file."""
    try:
        return read(path)
    except FileNotFoundError:
        raise BrokenFileError(f"there is no file {str(path)!r}; expected {what}") from None
    except BrokenFileError:
        raise
    # Pillow, json, xml and h5py each raise their own on a damaged file.
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, EOFError, UnidentifiedImageError) as error:
        cause = " ".join(str(error).split())
        raise BrokenFileError(f"{str(path)!r} cannot be read as {what}: {type(error).__name__}: {cause}") from error


def read_image(path: Path) -> Image.Image:
    """An RGB image as it is stored: truth is given in the pixels of the file, so EXIF orientation is not applied."""

    def decode(path: Path) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on oddities of files that it can read
            with Image.open(path) as file:
                file.load()
                return to_rgb(_without_orientation(file))

    return reading(path, decode, "an image")


def _without_orientation(image: Image.Image) -> Image.Image:
    image.getexif().pop(0x0112, None)
    return image


def read_labels(path: Path) -> Shaped[np.ndarray, "height width"]:
    """The values of a label or grey image as they are stored: palette indices, grey values or classes."""

    def decode(path: Path) -> Shaped[np.ndarray, "height width"]:
        with Image.open(path) as file:
            file.load()
            as_stored = file.mode in ("1", "L", "P", "I", "I;16", "F")
            return np.array(file if as_stored else file.convert("L"))

    return reading(path, decode, "a mask")


def graded(values: Shaped[np.ndarray, "height width"]) -> Float[Tensor, "height width"]:
    """A grey image as floats from 0 to its largest possible value, 1."""
    top = float(np.iinfo(values.dtype).max) if np.issubdtype(values.dtype, np.unsignedinteger) else 1.0
    return torch.from_numpy(values.astype(np.float32) / top)


def images_in(path: Path) -> list[Path]:
    """Image files of a folder and the folders below it, sorted, without hidden ones."""
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
