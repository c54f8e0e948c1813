"""The images in a folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from captum_lnstat.errors import SourceError


def image_files(folder: Path) -> tuple[Path, ...]:
    """The images that lie in a folder, by name: files with a suffix that Pillow reads, none of its subfolders.

    Raises:
        SourceError: There are none.
    """
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
