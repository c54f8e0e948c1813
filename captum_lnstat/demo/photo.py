"""An image that somebody uploaded: read within limits, and kept as the bytes of its file."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from captum_lnstat.errors import one_line
from captum_lnstat.explanation.subject.images import to_rgb

MAX_BYTES = 10 * 2**20
# Far above what a model sees, and still decoded in a second; Pillow alone would take four times as many.
MAX_PIXELS = 40_000_000


class DemoError(ValueError):
    """What a visitor of the page did cannot be done; the message is for them."""


@dataclass(frozen=True)
class Photo:
    """The file of an image, checked once.

    Attributes:
        data: The file as it was uploaded.
        title: Shown above the pictures.
        key: Digest of the file, by which results are kept.
    """

    data: bytes = field(repr=False)
    title: str
    key: str

    def image(self) -> Image.Image:
        """The image, 8-bit RGB and the right way up."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit was checked
            with Image.open(io.BytesIO(self.data)) as file:
                return to_rgb(file)


def from_bytes(data: bytes, title: str) -> Photo:
    """A photo, if the bytes are an image within the limits.

    Args:
        data: The content of an image file, any format that Pillow reads.
        title: A few words for it.

    Raises:
        DemoError: No image, too large a file, or too many pixels; the size is read before anything is decoded.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("L", (3, 2)).save(file, "PNG")
        >>> image = from_bytes(file.getvalue(), "a grey one").image()
        >>> image.mode, image.size
        ('RGB', (3, 2))
        >>> from_bytes(b"text", "no image")
        Traceback (most recent call last):
            ...
        captum_lnstat.demo.photo.DemoError: The file cannot be read as an image: cannot identify image file.
    """
    if len(data) > MAX_BYTES:
        raise DemoError(f"The file has {len(data) / 2**20:.1f} MiB; expected at most {MAX_BYTES // 2**20}.")
    photo = Photo(data, title, hashlib.sha256(data).hexdigest())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as file:
                width, height = file.size
        if width * height > MAX_PIXELS:
            raise DemoError(
                f"The image has {width} x {height} pixels; expected at most {MAX_PIXELS // 10**6} million. Make it "
                "smaller first: a model sees a few hundred on each side."
            )
        photo.image()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        if isinstance(error, DemoError):
            raise
        reason = one_line(error).split(" <")[0] or type(error).__name__
        raise DemoError(f"The file cannot be read as an image: {reason}.") from None
    return photo


def from_upload(path: str, folder: Path) -> Photo:
    """A photo from a file that the page's own upload put under ``folder``, and from nowhere else.

    Args:
        path: As the request gives it.
        folder: Where uploads lie.

    Raises:
        DemoError: The path leads elsewhere, or as for ``from_bytes``.
    """
    file = Path(path)
    inside = file.is_absolute() and file.resolve().is_relative_to(folder.resolve())
    if not inside or not file.is_file():
        raise DemoError("That is no file that was uploaded here.")
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    return from_bytes(data, "uploaded image")
