"""The scenes of the package as samples: some that show what a class-wise map is good for."""

from __future__ import annotations

import io
from functools import cache

from captum_lnstat import zoo
from captum_lnstat.demo.photo import Photo, from_bytes

# Two objects first: another class moves the map from one to the other.
CHOSEN = (270, 273, 354, 251, 264, 293, 56, 196, 112, 172, 84, 184)


@cache
def samples() -> tuple[Photo, ...]:
    """The samples, as PNG files in memory.

    Example:
        >>> samples()[0].title, samples()[0].image().size
        ('bag and dress', (64, 64))
    """
    scenes, photos = zoo.scenes(), []
    for number in CHOSEN:
        file = io.BytesIO()
        scenes[number].image.save(file, "PNG")
        photos.append(from_bytes(file.getvalue(), scenes[number].title))
    return tuple(photos)
