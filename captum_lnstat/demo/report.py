"""The results as HTML with the pictures inside it, so that nothing is written for them, and as one sheet to keep."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captum_lnstat.demo.studio import Look, Question, Shown, notes
from captum_lnstat.visualize import colored, overlay

_SIDE = 384  # pixels of the shorter side of a picture on the page and on the sheet
_LEGENDS = {False: ("least relevant", "most relevant"), True: ("against the class", "for the class")}


def results(look: Look, question: Question, shown: Sequence[Shown], pending: Sequence[str] = ()) -> str:
    """The pictures with what has to be known to read them.

    Args:
        look: The image and the model.
        question: What was asked.
        shown: The maps that are there, that of the rule first.
        pending: The methods that are still running.

    Returns:
        HTML in which every text that is not this module's is escaped.
    """
    parts = [_headline(look, question)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes(look, question, shown)]
    cells = [_figure("image", "what the model saw", look.picture)]
    if shown:
        own = shown[0]
        cells.append(_figure(f"{own.title}: map", own.caption, colored(own.relevance, signed=own.signed)))
        cells.append(_figure(f"{own.title}: overlay", _explained(look, question, own), _overlay(look, own), main=True))
    else:
        cells += [_waiting("map"), _waiting("overlay")]
    parts.append(f'<div class="figures">{"".join(cells)}</div>')
    beside = [_figure(one.title, one.caption, _overlay(look, one)) for one in shown[1:]]
    beside += [_waiting(title) for title in pending]
    if beside:
        parts.append(f'<h3>Beside it</h3><div class="figures">{"".join(beside)}</div>')
    if shown:
        foot = [_legend(signed) for signed in sorted({one.signed for one in shown})]
        if not pending:
            foot.append(_download(look, question, shown))
        parts.append(f'<div class="foot">{"".join(foot)}</div>')
    return f'<div class="results" data-state="{"done" if shown and not pending else "busy"}">{"".join(parts)}</div>'


def failure(reason: str) -> str:
    """Why there is no picture.

    Example:
        >>> failure("no <b>")
        '<div class="results" data-state="failed"><p class="failure"><b>No picture.</b> no &lt;b&gt;</p></div>'
    """
    return f'<div class="results" data-state="failed"><p class="failure"><b>No picture.</b> {escape(reason)}</p></div>'


def idle() -> str:
    """What stands there before an image is chosen."""
    return '<div class="results" data-state="idle"><p class="note">Upload an image, or choose a sample.</p></div>'


def percent(confidence: float) -> str:
    """A probability for people.

    Example:
        >>> percent(0.4321), percent(0.00001)
        ('43.2 %', '< 0.1 %')
    """
    return f"{100 * confidence:.1f} %" if confidence >= 0.001 else "< 0.1 %"


def sheet(look: Look, question: Question, shown: Sequence[Shown]) -> bytes:
    """All pictures on one PNG, three to a row, with their titles."""
    cells = [("image", look.picture)]
    cells += [(f"{shown[0].title}: map", colored(shown[0].relevance, signed=shown[0].signed))]
    cells += [(one.title, _overlay(look, one)) for one in shown]
    pictures = [(title, _enlarged(pixels)) for title, pixels in cells]
    width, height = pictures[0][1].size
    gap, line = 12, 26
    columns, rows = 3, -(-len(pictures) // 3)
    size = columns * (width + gap) + gap, line + gap + rows * (height + line + gap) + line
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(17), ImageFont.load_default(14)
    draw.text((gap, gap), f"{look.name}: {_said(look, question)}", "#222222", font)
    for place, (title, picture) in enumerate(pictures):
        row, column = divmod(place, columns)
        left, top = gap + column * (width + gap), line + gap + row * (height + line + gap)
        draw.text((left, top + 6), title, "#222222", small)
        canvas.paste(picture, (left, top + line))
    kinds = sorted({one.signed for one in shown})
    for place, signed in enumerate(kinds):
        left, top = gap + place * size[0] // len(kinds), size[1] - line
        first, last = _LEGENDS[signed]
        draw.text((left, top), first, "#666666", small)
        begin = left + int(small.getlength(first)) + 8
        canvas.paste(_scale(signed).resize((110, 12)), (begin, top + 3))
        draw.text((begin + 118, top), last, "#666666", small)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _said(look: Look, question: Question) -> str:
    best, target = look.best, question.target
    return (
        f"predicts {look.label(best)} ({percent(look.confidence[best])}); explained: {look.label(target)} "
        f"({percent(look.confidence[target])})"
    )


def _headline(look: Look, question: Question) -> str:
    def chip(heading: str, index: int) -> str:
        return (
            f'<span class="chip"><span>{heading}</span> <b>{escape(look.label(index))}</b> '
            f"{percent(look.confidence[index])}</span>"
        )

    return (
        f'<p class="headline"><span class="chip"><span>model</span> <b>{escape(look.name)}</b> '
        f"{'random weights' if look.random else 'trained weights'}</span>"
        f"{chip('predicted', look.best)}{chip('explained', question.target)}</p>"
    )


def _explained(look: Look, question: Question, own: Shown) -> str:
    return "whatever the class" if own.title == "rollout" else f"for: {look.label(question.target)}"


def _figure(title: str, caption: str, pixels: Any, main: bool = False) -> str:
    return (
        f'<figure class="{"main" if main else ""}"><img alt="{escape(title)}" src="{_uri(_enlarged(pixels), "WEBP")}">'
        f"<figcaption><b>{escape(title)}</b><br>{escape(caption)}</figcaption></figure>"
    )


def _waiting(title: str) -> str:
    return (
        f'<figure class="waiting"><div></div><figcaption><b>{escape(title)}</b><br>computing ...</figcaption></figure>'
    )


def _legend(signed: bool) -> str:
    first, last = _LEGENDS[signed]
    return f'<span class="legend">{first} <img alt="" src="{_uri(_scale(signed), "PNG")}"> {last}</span>'


def _download(look: Look, question: Question, shown: Sequence[Shown]) -> str:
    words = f"{look.name}-{look.label(question.target)}-{question.rule}"
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    data = base64.b64encode(sheet(look, question, shown)).decode()
    return f'<a class="download" download="{name}.png" href="data:image/png;base64,{data}">Download the sheet (PNG)</a>'


def _overlay(look: Look, one: Shown) -> Any:
    return overlay(look.picture, one.relevance, signed=one.signed)


def _enlarged(pixels: Any) -> Image.Image:
    """The picture at the size of the page, smooth where it was small."""
    picture = Image.fromarray((pixels * 255).round().astype(np.uint8))
    factor = _SIDE / min(picture.size)
    size = tuple(max(round(side * factor), 1) for side in picture.size)
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


@cache
def _scale(signed: bool) -> Image.Image:
    values = np.linspace(-1.0 if signed else 0.0, 1.0, 128)[None]
    return Image.fromarray((colored(values, signed=signed) * 255).astype(np.uint8))


def _uri(picture: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    picture.save(file, kind, quality=92)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
