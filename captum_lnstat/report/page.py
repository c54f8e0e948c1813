"""The page: a card an image, in a template with a style and a script, all in one file of bounded size."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from captum_lnstat.explanation.explanation import Explanation
from captum_lnstat.explanation.markup import data_uri, explained, menu, notes, stack
from captum_lnstat.visualize.colors import Look, rgba

# All pictures of a page take so many bytes at most, in base64 a third more; one alone takes no more than it needs.
PAGE_BYTES, _PICTURE_BYTES = 24_000_000, 32_000


def room(pictures: int) -> int:
    """Bytes for each of so many pictures on one page.

    Example:
        >>> room(10), room(20_000)
        (32000, 1200)
    """
    return min(_PICTURE_BYTES, PAGE_BYTES // pictures)


def card(found: Sequence[Explanation], limit: int, common: Sequence[str] = ()) -> str:
    """One image: what the model saw, the maps of its classes, what was predicted and how sure the model is.

    Args:
        found: Explanations of the image; the first is shown, and sorted by.
        limit: Bytes of a picture, as ``room`` says.
        common: Cautions that stand at the top of the page.

    Returns:
        HTML in which all texts are escaped.
    """
    first = found[0]
    sure, name = first.confidence, escape(first.name)
    predicted, likely = escape(first.label(first.prediction)), first.percent(first.prediction)
    meter = "" if sure is None else f'<meter min="0" max="1" value="{sure:.4f}" aria-label="confidence"></meter>'
    if len(found) > 1 or explained(first) != f"{first.label(first.prediction)} {likely}".rstrip():
        meter = f"</p><p>{menu(found)}{meter}"
    return (
        f'<li class="card" data-class="{predicted}" data-confidence="{-1 if sure is None else sure:.6f}">'
        f'<button class="stack" type="button" tabindex="-1" aria-pressed="false" aria-label="{name}: predicted '
        f'{predicted} {likely}. Show its map">{stack(found, limit)}</button>'
        f"<p><b>{predicted} <span>{likely}</span></b>{meter}</p>"
        f'<p class="name">{name}</p>{notes(found, common)}</li>'
    )


def page(
    cards: Sequence[str],
    *,
    title: str,
    summary: str,
    look: Look,
    signed: bool,
    made: Mapping[str, object],
    cautions: Sequence[str] = (),
    skipped: Sequence[Mapping[str, str]] = (),
) -> str:
    """The whole page.

    Args:
        cards: What ``card`` made of every image.
        title: The model.
        summary: What is on the page, in a line.
        look: The colours of the maps, and how much they cover at first.
        signed: Whether the maps are.
        made: What the maps were made with, for JSON.
        cautions: What has to be known to read the maps right.
        skipped: ``image`` and ``error`` of what could not be explained.
    """
    style, script, template = (_part(name) for name in ("page.css", "page.js", "page.html"))
    ramp = rgba(np.linspace(-1.0 if signed else 0.0, 1.0, 128)[None].repeat(8, 0), signed=signed, look=look)
    listed = "".join(f"<li><b>{escape(Path(each['image']).name)}</b>: {escape(each['error'])}" for each in skipped)
    heading = f"<h2>Not explained: {len(skipped)} image{'s' * (len(skipped) != 1)}</h2>"
    return Template(template).substitute(
        title=escape(title),
        heading=escape(title).replace("_", "_<wbr>"),
        summary=escape(summary),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in cautions),
        cards="\n".join(cards),
        skipped=f'<section id="skipped">{heading}<ul>{listed}</ul></section>' if skipped else "",
        made=escape(json.dumps(made, indent=2)),
        cover=look.cover(signed=signed),
        low="against" if signed else "least",
        high="for" if signed else "most",
        ramp=data_uri(Image.fromarray((ramp * 255).round().astype(np.uint8)), _PICTURE_BYTES),
        style=style,
        script=script,
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
