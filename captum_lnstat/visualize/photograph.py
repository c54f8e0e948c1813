"""The photograph that was given, with what the model saw of it in a frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageOps

if TYPE_CHECKING:
    from captum_lnstat.visualize.maps import Picture

# Pixels of the longer side: more are not seen on a sheet.
_LONGER = 720


def framed(photo: Image.Image, box: tuple[float, float, float, float], shape: tuple[int, int]) -> Picture | None:
    """The whole photograph, with a frame around ``box`` and the rest in pale colours; nothing if the box is all of it.

    Args:
        photo: RGB.
        box: Left, top, right and bottom of what the model saw, in its pixels.
        shape: Height and width of the pictures that it stands beside: a taller one gets white borders.

    Returns:
        ``(height, width, 3)`` with values from 0 to 1, smaller than the photograph if that is large.

    Example:
        >>> framed(Image.new("RGB", (80, 40)), (20, 0, 60, 40), (8, 8)).shape
        (40, 80, 3)
    """
    left, top, right, bottom = box
    if left < 1 and top < 1 and right > photo.width - 1 and bottom > photo.height - 1:
        return None
    factor = min(_LONGER / max(photo.size), 1.0)
    small = photo.resize((max(round(photo.width * factor), 1), max(round(photo.height * factor), 1)))
    across, down = small.width / photo.width, small.height / photo.height
    inner = [round(left * across), round(top * down)]
    inner += [max(round(right * across) - 1, inner[0]), max(round(bottom * down) - 1, inner[1])]
    pale = Image.blend(small, Image.new("RGB", small.size, "white"), 0.6)
    seen = Image.new("L", small.size)
    ImageDraw.Draw(seen).rectangle(inner, fill=255)
    pale.paste(small, mask=seen)
    wide = max(round(max(small.size) / 320), 1)
    if min(inner[2] - inner[0], inner[3] - inner[1]) < 9 * wide:  # of a long strip; the frame goes around it
        pale = ImageOps.expand(pale, 3 * wide, "white")
        inner = [*inner[:2], inner[2] + 6 * wide, inner[3] + 6 * wide]
    ImageDraw.Draw(pale).rectangle(inner, outline="black", width=3 * wide)
    ImageDraw.Draw(pale).rectangle([edge + step for edge, step in zip(inner, (wide, wide, -wide, -wide), strict=True)],
                                   outline="white", width=wide)  # fmt: skip
    width = max(pale.width, round(pale.height * shape[1] / shape[0]))
    whole = Image.new("RGB", (width, pale.height), "white")
    whole.paste(pale, ((width - pale.width) // 2, 0))
    return np.asarray(whole, dtype=float) / 255
