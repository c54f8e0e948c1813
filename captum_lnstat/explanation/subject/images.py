"""Images from whatever people have them in: files, Pillow images, arrays, tensors, and several of these at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Union

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.subject.files import image_files

__all__ = ["ImageLike", "Item", "from_array", "image_files", "read_item", "read_items", "to_rgb"]

ImageLike = Union[str, Path, Image.Image, "np.ndarray[Any, Any]", Tensor]


@dataclass(frozen=True)
class Item:
    """One image to explain.

    Attributes:
        name: The file's name without its suffix, or ``"image"`` with a number.
        picture: 8-bit RGB; nothing if a model's input was given instead of an image.
        inputs: ``(channel, height, width)``, an input that goes to the model as it is.
        caution: What is in its file besides, in words.
    """

    name: str
    picture: Image.Image | None
    inputs: Tensor | None = None
    caution: str = ""

    def cautions_of(self, source: object) -> tuple[str, ...]:
        """``caution``, if there is one, after what the file is called."""
        return (f"{source}: {self.caution}",) if self.caution else ()


def read_items(images: ImageLike | Sequence[ImageLike]) -> tuple[list[Item], bool]:
    """Every image given, and whether it was one rather than a sequence or batch of them.

    Args:
        images: A path; a Pillow image; a ``uint8`` array ``(height, width)``, ``(height, width, 3)`` or with
            transparency, or a floating one with values from 0 to 1; a ``uint8`` tensor ``(channel, height, width)``; a
            floating tensor of that shape, which is taken for an input of the model. Arrays and tensors of one
            dimension more are batches. A list or tuple of any of these.

    Raises:
        SourceError: Something in it is none of these, or a file cannot be read.

    Example:
        >>> items, single = read_items(np.zeros((2, 4, 6, 3), np.uint8))
        >>> [item.name for item in items], items[0].picture.size, single
        (['image-0', 'image-1'], (6, 4), False)
    """
    batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    if not batch:
        return [_item(images, "image")], True  # type: ignore[arg-type]
    if not len(images):  # type: ignore[arg-type]
        raise SourceError("images is empty; expected at least one image")
    return [_item(image, f"image-{number}") for number, image in enumerate(images)], False  # type: ignore[arg-type]


def _item(image: ImageLike, name: str) -> Item:
    if isinstance(image, str | Path):
        if "://" in str(image):
            raise SourceError(f"{image!r} is an address; expected a file. Download it first, and give its name here")
        path = Path(image)
        if path.is_dir():
            raise SourceError(f"{str(path)!r} is a folder; expected an image, or a list of the images in it")
        return read_item(path)
    if isinstance(image, Image.Image):
        return Item(name, to_rgb(image))
    if isinstance(image, np.ndarray):
        return Item(name, to_rgb(from_array(image)))
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise SourceError(f"a tensor of shape {tuple(image.shape)}; expected (channel, height, width) for an image")
        if image.is_floating_point():
            return Item(name, None, image.detach())
        return Item(name, to_rgb(from_array(image.detach().cpu().numpy().transpose(1, 2, 0))))
    raise SourceError(
        f"an image is a {type(image).__name__}; expected a path, a Pillow image, an array, a tensor, or a list of them"
    )


def from_array(values: np.ndarray[Any, Any]) -> Image.Image:
    """A Pillow image from ``(height, width)`` or ``(height, width, channel)``, uint8 or floating from 0 to 1."""
    shape = tuple(values.shape)
    if values.ndim == 3 and shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or not values.size:
        raise SourceError(
            f"an array of shape {shape}; expected (height, width), or (height, width, channel) with 1, 3 or 4 channels"
        )
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise SourceError(
                f"a floating image with values from {values.min():.3g} to {values.max():.3g}; expected 0 to 1. A "
                "model's normalised input is given as a tensor"
            )
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise SourceError(f"an image of dtype {values.dtype}; expected uint8, or floating with values from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(values))


def read_item(path: str | Path, file: IO[bytes] | None = None) -> Item:
    """An RGB image the right way up from any file that Pillow reads, by the file's name; of several in it the first.

    Args:
        path: Where it is, and what it is called in messages.
        file: It is open already.

    Raises:
        SourceError: There is no such file, or it is no image.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            # A large photograph is no attack; at twice that size Pillow refuses all the same.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file or path) as image:
                count = getattr(image, "n_frames", 1)
                # Beside a photograph, cameras put smaller ones of it, as MPO.
                several = count > 1 and image.format != "MPO"
                caution = f"the file holds {count} pictures; the first is explained" if several else ""
                return Item(path.stem, to_rgb(image), caution=caution)
    except FileNotFoundError:
        raise SourceError(f"there is no file {str(path)!r}") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).partition(" <")[0]  # Pillow says what object it was given, too
        raise SourceError(f"{str(path)!r} cannot be read as an image: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode: EXIF orientation applied, deep greyscale scaled, transparency put on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise SourceError("it holds NaN or infinite values")
    low, high = 0.0, 1.0 if mode == "F" else 65535.0
    if values.min() < low or values.max() > high:  # no known range: its own
        low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
