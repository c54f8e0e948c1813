"""The images in a folder, and files that are none, nor weights. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from captum_lnstat.errors import SourceError


def image_files(folder: Path) -> tuple[Path, ...]:
    """The images that lie in a folder, by name: files with a suffix that Pillow reads, none of its subfolders.

    Raises:
        SourceError: There are none.
    """
    from PIL import Image

    Image.init()
    suffixes = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN} - {".pdf", ".mpg", ".mpeg"}
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        inside = sum(path.is_dir() for path in folder.iterdir())
        also = f"; its {inside} folders are not looked into" if inside else ""
        raise SourceError(f"there is no image in the folder {str(folder)!r}; expected files such as .jpg or .png{also}")
    return tuple(files)


def check_image(path: Path) -> None:
    """A file that Pillow does not take for an image; whether all of it can be read is not looked at.

    Raises:
        SourceError: It is none.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            pass
    except UnidentifiedImageError:
        raise SourceError(f"{str(path)!r} cannot be read as an image: it is in no format that Pillow knows") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass  # said when it is read whole


def check_weights(path: Path) -> None:
    """A file that begins neither as safetensors nor as what torch.save writes.

    Raises:
        SourceError: It is none of them.
    """
    with path.open("rb") as file:
        head = file.read(262)
    safe = head[8:9] == b"{" and path.suffix == ".safetensors"
    # A zip file, a pickle, or the tar file of old versions of torch.
    saved = path.suffix != ".safetensors" and (head[:2] == b"PK" or head[:1] == b"\x80" or head[257:] == b"ustar")
    if not safe and not saved:
        raise SourceError(
            f"{str(path)!r} cannot be read as a checkpoint, it begins with {head[:16]!r}; expected safetensors in a "
            "file that ends in .safetensors, or what torch.save wrote"
        )
