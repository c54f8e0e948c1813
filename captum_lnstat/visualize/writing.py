"""Files that are there whole or not at all: written beside their place, then put into it in one step."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from captum_lnstat.visualize.sheet import Panel, draw_sheet

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Picture

# The key of what a PNG says about itself.
TEXT = "captum-lnstat"


def write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file, or, if anything fails or is interrupted, leave the folder as it was.

    Args:
        path: Where to; a file that was there before is replaced in one step.
        write: Given the open file.

    Raises:
        OSError: The folder cannot be written to; the error names ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "a.txt"), lambda file: file.write(b"whole")).read_text()
        'whole'
    """
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        if error.filename is not None:  # of the file beside it, which nobody asked for
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)
    return path


def write_figure(path: str | Path, figure: Figure, about: str = "") -> Path:
    """Write a figure whole; the suffix says the format: png, jpg, pdf, svg and whatever else matplotlib writes.

    Args:
        path: Where to.
        figure: The figure.
        about: What a PNG holds as text under ``captum-lnstat``.

    Raises:
        ValueError: matplotlib does not write such files.
        OSError: The folder cannot be written to.
    """
    path = Path(path)
    kind = path.suffix[1:] or "png"
    text: dict[str, Any] = {"metadata": {TEXT: about}} if about and kind.lower() == "png" else {}
    return write_whole(path, lambda file: figure.savefig(file, format=kind, **text))


def write_image(path: str | Path, image: Image.Image, about: str = "") -> Path:
    """Write a Pillow image whole; the suffix says the format.

    Args:
        path: Where to.
        image: The image.
        about: As for ``write_figure``.

    Raises:
        ValueError: Pillow does not write such files.
        OSError: The folder cannot be written to.
    """
    path = Path(path)
    suffix = path.suffix.lower() or ".png"
    kind = Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise ValueError(f"{path.name!r} is no kind of image that can be written; expected .png, .jpg or .webp, say")
    options: dict[str, Any] = {}
    if about and kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt(TEXT, about)
    return write_whole(path, lambda file: image.save(file, format=kind, **options))


def write_sheet(path: str | Path, image: Picture, panels: Sequence[Panel], title: str) -> Path:
    """Draw a sheet and write it as one file, or, if anything fails, leave nothing behind.

    Args:
        path: As for ``write_figure``.
        image: As for ``draw_sheet``.
        panels: As for ``draw_sheet``.
        title: As for ``draw_sheet``.

    Returns:
        ``path``. A file that was there before is replaced in one step.

    Raises:
        ValueError: As for ``draw_sheet``, or matplotlib does not write such files.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image, panel = np.ones((8, 8, 3)), Panel("a map", np.eye(8))
        ...     write_sheet(Path(folder, "sheet.png"), image, [panel], "a title").name
        'sheet.png'
    """
    return write_figure(path, draw_sheet(image, panels, title))
