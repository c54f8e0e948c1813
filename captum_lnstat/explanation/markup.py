"""An explanation as HTML: the photograph, maps that lie on it and can be faded, and a menu of the classes explained.

What is written needs no server, no network and no identifiers: the pictures are inside it, and its few handlers find
what they change from where they are, so any number of them may be on one page or in one notebook.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from captum_lnstat.attribution.methods import method_of_rule
from captum_lnstat.visualize.colors import faded, rgba

# An ``Explanation``, which is made further up.
Explained = Any

# A picture is made smaller until it takes so many bytes.
_SIDES, _SMALLEST = (384, 320, 256, 192, 144, 112, 80, 56), 40
NOTEBOOK_BYTES = 64_000

_STYLE = """<style>
.lnstat{margin:0 0 12px;width:min(100%,384px);font-size:13px;line-height:1.5}
.lnstat [hidden]{display:none!important}
.lnstat .stack{position:relative}
.lnstat .stack img{display:block;width:100%;height:auto;max-width:none;margin:0;background:none}
.lnstat .stack img[data-of]{position:absolute;inset:0;height:100%;opacity:var(--cover)}
.lnstat figcaption{margin-top:6px;overflow-wrap:anywhere}
.lnstat select{width:100%}
.lnstat label{display:flex;gap:8px;align-items:center}
.lnstat input{flex:1;min-width:0}
.lnstat p{margin:4px 0 0}
.lnstat .note{padding-left:8px;border-left:3px solid #d97706}
</style>"""
_CHOOSE = (
    "onchange=\"this.closest('.lnstat').querySelectorAll('[data-of]').forEach("
    'each =&gt; {each.hidden = each.dataset.of != this.value})"'
)
_FADE = "oninput=\"this.closest('.lnstat').style.setProperty('--cover', this.value)\""


def data_uri(image: Image.Image, limit: int) -> str:
    """An image inside an address, as WebP of so many bytes at most, made smaller until it is.

    Example:
        >>> data_uri(Image.new("RGB", (4, 3)), 500)[:23]
        'data:image/webp;base64,'
    """
    for side in (*_SIDES, _SMALLEST):
        fitting, file = image.copy(), io.BytesIO()
        fitting.thumbnail((side, side))
        fitting.save(file, "WEBP", quality=80)
        if file.tell() <= limit:
            break
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def stack(found: Sequence[Explained], limit: int) -> str:
    """The image as the model saw it, and above it the map of every explanation, of which the first is shown.

    Args:
        found: Explanations of one image.
        limit: Bytes of a picture.
    """
    first = found[0]
    pixels = np.asarray(first.image.convert("RGB")) / 255
    seen = faded(pixels, signed=first.signed) if first.look.fades(signed=first.signed) else pixels
    maps = [
        f'<img data-of="{place}"{" hidden" * (place > 0)} alt="Map: {escape(explained(each))}" src="'
        f'{data_uri(_image(rgba(each.relevance, signed=each.signed, look=each.look)), limit)}">'
        for place, each in enumerate(found)
    ]
    return f'<img alt="{escape(first.name)}" src="{data_uri(_image(seen), limit)}">{"".join(maps)}'


def menu(found: Sequence[Explained], handler: str = "") -> str:
    """A menu of the classes that are explained, or, of one, its name."""
    if len(found) == 1:
        return f"<span>explained: {escape(explained(found[0]))}</span>"
    options = "".join(f'<option value="{place}">{escape(explained(each))}' for place, each in enumerate(found))
    return f'<select aria-label="Class explained" {handler}>{options}</select>'


def notes(found: Sequence[Explained], known: Sequence[str] = ()) -> str:
    """What has to be known to read each map, beside what is known already; shown and hidden with its map."""
    return "".join(
        f'<p class="note" data-of="{place}"{" hidden" * (place > 0)}>{escape(note)}</p>'
        for place, each in enumerate(found)
        for note in each.cautions
        if note not in known
    )


def explained(found: Explained) -> str:
    """Which class a map explains, in words."""
    if not method_of_rule(found.rule).per_class:
        return "whatever the class"
    return f"{found.label(found.target)} {found.percent(found.target)}".rstrip()


def viewer(found: Sequence[Explained]) -> str:
    """One image with the maps of its classes, a menu of them and a slider for how much the map covers.

    Args:
        found: Explanations of one image.

    Returns:
        HTML in which all texts are escaped.
    """
    first = found[0]
    cover = first.look.cover(signed=first.signed)
    likeliest = ", ".join(f"{first.label(index)} {first.percent(index)}".rstrip() for index in first.ranked(5))
    return (
        f'<figure class="lnstat" style="--cover:{cover}">{_STYLE}<div class="stack">'
        f"{stack(found, NOTEBOOK_BYTES)}</div><figcaption>"
        f"{menu(found, _CHOOSE)}"
        f'<label>map <input type="range" min="0" max="1" step="0.05" value="{cover}" {_FADE}>'
        f"</label><p><b>{escape(first.name)}</b>, rule {escape(first.rule)}; predicted {escape(likeliest)}</p>"
        f"{notes(found)}</figcaption></figure>"
    )


def _image(pixels: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))
