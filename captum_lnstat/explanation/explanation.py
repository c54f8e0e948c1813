"""What ``explain`` returns: a map with the image that it belongs to, ready to be looked at, saved or worked on."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from captum_lnstat.attribution.methods import method_of_rule
from captum_lnstat.errors import SourceError
from captum_lnstat.explanation.markup import viewer
from captum_lnstat.explanation.prediction import Prediction, percent
from captum_lnstat.explanation.provenance import Provenance
from captum_lnstat.explanation.subject.crop import Box, on_image
from captum_lnstat.explanation.writing import SUFFIXES, about, write_map
from captum_lnstat.visualize.colors import PLAIN, Look, Scale, faded, outlined, overlay
from captum_lnstat.visualize.photograph import framed
from captum_lnstat.visualize.writing import write_image

if TYPE_CHECKING:
    from jaxtyping import Float

# A strip of overlays in a notebook is so high, and holds so many.
_STRIP, _SHOWN = 224, 12
# So many pixels of an original are drawn at once.
_PIXELS = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Explanation(Prediction):
    """The explanation of one image, and with it the model's ``Prediction``.

    Attributes:
        name: Of the image: its file's name without the suffix, or ``"image"``.
        rule: The rule of ``LNStatAttribution``.
        target: The class that is explained.
        grid: Relevance on the model's patch grid.
        relevance: The same on the pixels of ``image``, the sum kept.
        image: The image as the model saw it: cut, resized, 8-bit RGB.
        original: The image that was given; nothing if a model's input was given.
        box: Left, top, right and bottom of what the model saw, in pixels of ``original``; nothing if the transform is
            no resizing and cropping.
        patch: Height and width of a patch, in pixels of ``image``.
        origin: Where the first patch begins, in pixels of ``image``, if not at its corner.
        covers: What the map leaves out, in words.
        look: How the map is laid over the image.
        provenance: What it was made with.
        cautions: What has to be known to read the map right, in words.
    """

    name: str
    rule: str
    target: int
    grid: Float[np.ndarray, "row column"] = field(repr=False)
    relevance: Float[np.ndarray, "height width"] = field(repr=False)
    image: Image.Image = field(repr=False)
    original: Image.Image | None = field(repr=False)
    box: Box | None = field(repr=False)
    patch: tuple[int, ...] = field(repr=False)
    origin: tuple[float, ...] = field(default=(), repr=False)
    covers: str = field(default="", repr=False)
    cautions: tuple[str, ...] = field(default=(), repr=False)
    look: Look = field(default=PLAIN, repr=False)
    provenance: Provenance | None = field(default=None, repr=False)

    @property
    def signed(self) -> bool:
        """Whether negative relevance argues against the target."""
        return method_of_rule(self.rule).signed

    @property
    def confidence(self) -> float | None:
        """The probability of the target."""
        return None if self.probabilities is None else float(self.probabilities[self.target])

    @cached_property
    def overlay(self) -> Image.Image:
        """The map laid over ``image``, of its size."""
        drawn = overlay(pixels_of(self.image), self.relevance, signed=self.signed, look=self.look)
        return Image.fromarray(_eight_bits(drawn))

    def with_look(
        self,
        colormap: str | None = None,
        alpha: float | None = None,
        *,
        grey: bool | None = None,
        contour: bool = False,
    ) -> Explanation:
        """The same explanation, drawn in another way.

        Args:
            colormap: A colormap of matplotlib, in the place of inferno or, for signed maps, of red and blue.
            alpha: How much the strongest relevance covers of the image, 0 to 1.
            grey: The image in grey, so that colour means relevance alone, or in its colours. Default: in grey below
                signs.
            contour: A line around the fifth of the pixels that is most relevant.
        """
        return replace(self, look=Look(colormap, alpha, grey, contour))

    def smaller(self, longer: int) -> Explanation:
        """The same with an original whose longer side is at most so many pixels."""
        if self.original is None or self.box is None or max(self.original.size) <= longer:
            return self
        wide, high = self.original.size
        factor = longer / max(wide, high)
        small = self.original.resize((max(round(wide * factor), 1), max(round(high * factor), 1)))
        across, down = small.width / wide, small.height / high
        left, top, right, bottom = self.box
        return replace(self, original=small, box=(left * across, top * down, right * across, bottom * down))

    @cached_property
    def values_on_original(self) -> Float[np.ndarray, "height width"]:
        """The map on the image that was given, of its size: relevance of the patches, between them interpolated.

        NaN where the model did not see the image.

        Raises:
            SourceError: As for ``on_original``.
        """
        if self.original is None:
            raise SourceError("a model's input was explained, so there is no original image; take overlay")
        if self.box is None:
            raise SourceError(
                "the transform does more than resize and cut out an upright rectangle, so the map cannot be placed on "
                "the original image; take overlay, which shows the image as the model saw it"
            )
        left, top, right, bottom = self.box
        # Patches need not begin and end where the model's image does.
        wide, high = (right - left) / self.image.width, (bottom - top) / self.image.height
        if self.origin:
            left, top = left + self.origin[1] * wide, top + self.origin[0] * high
        across, down = self.grid.shape[1] * self.patch[1] * wide, self.grid.shape[0] * self.patch[0] * high
        values = on_image(self.grid, (left, top, left + across, top + down), self.original.size)
        values[~np.isfinite(on_image(np.zeros((1, 1)), self.box, self.original.size))] = np.nan
        return values

    @cached_property
    def on_original(self) -> Image.Image:
        """The map laid over the image that was given, of its size. What the model did not see is a darker grey.

        Raises:
            SourceError: The model's input was given, not an image; or the transform is no resizing and cropping, so
                that the pixels of the two cannot be told to belong together.
        """
        values = self.values_on_original
        assert self.original is not None
        seen = np.isfinite(values)
        scale = Scale.of([values[seen]], signed=self.signed)
        photo = np.asarray(self.original.convert("RGB"))
        drawn = np.empty_like(photo)
        look = replace(self.look, contour=False)
        # A photograph in floating colours takes gigabytes: some rows at a time.
        rows = max(_PIXELS // photo.shape[1], 1)
        for top_row in range(0, len(photo), rows):
            part = slice(top_row, top_row + rows)
            pixels, inside = photo[part] / 255, seen[part]
            laid = overlay(pixels, np.where(inside, values[part], scale.low), scale=scale, look=look)
            drawn[part] = _eight_bits(np.where(inside[..., None], laid, 0.6 * faded(pixels)))
        if self.look.contour:
            black, white = outlined(values)
            drawn[black], drawn[white] = 0, 255
        return Image.fromarray(drawn)

    @property
    def framed(self) -> Float[np.ndarray, "y x 3"] | None:
        """The photograph that was given, with a frame around what the model saw; nothing if that is all, or unknown."""
        if self.original is None or self.box is None:
            return None
        return framed(self.original.convert("RGB"), self.box, (self.image.height, self.image.width))

    def save(self, path: str | Path, *, original: bool = False, raw: bool = False) -> Path:
        """Write the overlay, or the map itself; what was there is replaced in one step, no half is ever left.

        A PNG holds as text, under ``captum-lnstat``, what it was made with: model, hash of the weights, target, rule,
        options, versions. Beside the map itself the same is written as ``NAME.json``.

        Args:
            path: The suffix says the format: ``.npy``, ``.npz`` and ``.safetensors`` are the map itself, in numbers.
            original: Write ``on_original`` rather than ``overlay``.
            raw: Write the map itself as a PNG of 16 bits, too, of the size of the image that was given.

        Raises:
            ValueError: Such files are not written.
            OSError: The folder cannot be written to.
            SourceError: As for ``on_original``.

        Example:
            >>> import json, tempfile
            >>> from captum_lnstat import explain, zoo
            >>> explained = explain("vit-mini", zoo.scenes()[300].image)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = explained.save(Path(folder, "map.npz"))
            ...     np.load(path)["grid"].shape, json.loads(Path(f"{path}.json").read_text())["model"]
            ((8, 8), 'vit-mini')
        """
        path = Path(path)
        if raw or path.suffix in SUFFIXES:
            if path.suffix not in (*SUFFIXES, ".png"):
                raise ValueError(f"{path.name!r} is no kind of map; expected {', '.join(SUFFIXES)} or .png")
            return write_map(path, self)
        return write_image(path, self.on_original if original else self.overlay, about(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "rule": self.rule,
            "target": self.target,
            "target_name": self.class_names[self.target] if self.class_names else None,
            "confidence": self.confidence,
            "prediction": self.prediction,
            "prediction_name": self.class_names[self.prediction] if self.class_names else None,
            "top": [{"class": name, "probability": share} for name, share in self.top()],
            "grid": self.grid.tolist(),
            "box": None if self.box is None else [round(edge, 2) for edge in self.box],
            "covers": self.covers,
        }

    def __str__(self) -> str:
        likely = [percent(self.probabilities[index]) for index in (self.prediction, self.target)] if (
            self.probabilities is not None
        ) else ["score only"] * 2  # fmt: skip
        return (
            f"{self.name}: predicted {self.label(self.prediction)}, {likely[0]}; explained "
            f"{self.label(self.target)}, {likely[1]}, rule {self.rule}"
        )

    def _repr_html_(self) -> str:
        return viewer([self])

    def _repr_png_(self) -> bytes:
        return _png(self.overlay)


class Explanations(tuple[Explanation, ...]):
    """The explanations of several images, in their order."""

    __slots__ = ()

    def save(
        self, folder: str | Path, *, original: bool = False, raw: bool = False, suffix: str = ".png"
    ) -> tuple[Path, ...]:
        """Write every overlay into a folder, which is made if it is not there: ``NAME.png``, numbered if names repeat.

        Args:
            folder: Where to.
            original: As for ``Explanation.save``, and so are the others.
            raw: The maps themselves.
            suffix: The format.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = unique_names([each.name for each in self])
        return tuple(
            each.save(folder / f"{name}{suffix}", original=original, raw=raw)
            for each, name in zip(self, names, strict=True)
        )

    def _repr_html_(self) -> str:
        """The first images, each with a menu of its classes."""
        images: dict[int, list[Explanation]] = {}
        for each in self:
            images.setdefault(id(each.image), []).append(each)
        shown = [viewer(of_image) for of_image in [*images.values()][:_SHOWN]]
        more = f"<p>and {len(images) - _SHOWN} more</p>" if len(images) > _SHOWN else ""
        columns = "display:grid;gap:0 16px;align-items:start;grid-template-columns:repeat(auto-fit,minmax(224px,1fr))"
        return f'<div style="{columns}">{"".join(shown)}</div>{more}'

    def _repr_png_(self) -> bytes:
        """The first overlays beside each other."""
        shown = [each.overlay for each in self[:_SHOWN]]
        shown = [image.resize((max(round(image.width * _STRIP / image.height), 1), _STRIP)) for image in shown]
        strip = Image.new("RGB", (sum(image.width + 4 for image in shown) - 4, _STRIP), "white")
        left = 0
        for image in shown:
            strip.paste(image, (left, 0))
            left += image.width + 4
        return _png(strip)


def unique_names(names: list[str]) -> list[str]:
    """The same names, with a number behind those that were there before.

    Example:
        >>> unique_names(["cat", "dog", "cat"])
        ['cat', 'dog', 'cat-2']
    """
    taken: set[str] = set()
    found = []
    for name in names:
        unique, number = name, 1
        while unique in taken or (number > 1 and unique in names):
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique)
        found.append(unique)
    return found


def pixels_of(image: Image.Image) -> Float[np.ndarray, "height width 3"]:
    """An image as values from 0 to 1."""
    return np.asarray(image.convert("RGB"), np.float64) / 255


def _eight_bits(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
