"""The results as HTML with the pictures inside it, so that nothing is written for them, and as one sheet to keep."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from captum_lnstat.attribution.methods import METHODS, method_of_rule
from captum_lnstat.demo.studio import Case, Question, Shown, notes
from captum_lnstat.visualize import Panel, Scale, colored, draw_sheet, framed, overlay
from captum_lnstat.visualize.sheet import BARS

_SIDE = 384  # pixels of the shorter side of a picture on the page
_DPI = 160  # of the sheet


def results(case: Case, question: Question, shown: Sequence[Shown], pending: Sequence[str] = ()) -> str:
    """The pictures with what has to be known to read them.

    Args:
        case: The image and the model.
        question: What is to be shown.
        shown: The maps that are there, that of the rule first.
        pending: The names of the methods that are still running.

    Returns:
        HTML in which every text that is not this module's is escaped.
    """
    parts = [_headline(case, question)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes(case, question, shown)]
    count = 1 + question.two  # of maps of the rule
    photo = _framed(case)
    if photo is None:
        cells = [_figure("image", "what the model saw", case.prepared.pixels)]
    else:
        cells = [_figure("image", "frame: what the model saw", photo)]
    if shown:
        own = shown[0]
        scale = Scale.of([own.relevance], signed=own.signed)
        cells.append(_figure(f"{own.title}: map", own.caption, colored(own.relevance, scale=scale)))
        caption = f"{_explained(case, question)}, {_ends(scale)}"
        cells.append(_figure(f"{own.title}: overlay", caption, _overlay(case, own, scale), main=True))
        if own.whole is not None:
            cells.append(_figure("on the whole photograph", "dark: not seen by the model", np.asarray(own.whole) / 255))
    else:
        cells += [_waiting("map"), _waiting("overlay")]
    parts.append(f'<div class="figures {"four" if len(cells) == 4 else ""}">{"".join(cells)}</div>')
    if question.two:
        parts.append(_two_classes(case, question, shown))
    beside = []
    for one in shown[count:]:
        scale = Scale.of([one.relevance], signed=one.signed)
        beside.append(_figure(one.title, f"{one.caption}, {_ends(scale)}", _overlay(case, one, scale)))
    beside += [_waiting(METHODS[name].title) for name in pending]
    if beside:
        parts.append(f'<h3>Beside it, each on its own scale</h3><div class="figures">{"".join(beside)}</div>')
    if shown:
        foot = [
            _legend(signed) for signed in sorted({one.signed for one in shown} | ({True} if question.two else set()))
        ]
        if not pending and len(shown) >= count:
            foot.append(_download(case, question, shown))
        parts.append(f'<div class="foot">{"".join(foot)}</div>')
    done = shown and not pending and len(shown) >= count
    seen, state = case.prepared.image, "done" if done else "busy"
    style = f"--shape: {seen.width} / {seen.height}"
    return f'<div class="results" data-state="{state}" style="{style}">{"".join(parts)}</div>'


def _framed(case: Case) -> Any:
    """The photograph with a frame around what the model saw; nothing if that is all."""
    item, box, seen = case.prepared.item, case.prepared.view.box, case.prepared.image
    return None if item.picture is None or box is None else framed(item.picture, box, (seen.height, seen.width))


def _two_classes(case: Case, question: Question, shown: Sequence[Shown]) -> str:
    """Both classes on one scale, and the first less the second."""
    assert question.other is not None
    names = case.likely(question.target), case.likely(question.other)
    if len(shown) < 2:
        cells = [_waiting(names[0]), _waiting(names[1])]
    else:
        one, other = shown[0], shown[1]
        scale = Scale.of([one.relevance, other.relevance], signed=one.signed)
        apart = Scale(0.0, scale.high - scale.low, signed=True)
        less = overlay(case.prepared.pixels, one.relevance - other.relevance, scale=apart)
        cells = [
            _figure(names[0], f"{one.title}, {_ends(scale)}", _overlay(case, one, scale)),
            _figure(names[1], f"{other.title}, {_ends(scale)}", _overlay(case, other, scale)),
            _figure("the first less the second", f"red: the first, blue: the second, {_ends(apart)}", less),
        ]
    return f'<h3>Two classes, one scale</h3><div class="figures">{"".join(cells)}</div>'


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


def sheet(case: Case, question: Question, shown: Sequence[Shown]) -> bytes:
    """All pictures on one PNG, three to a row, with their titles."""
    words = f"{case.subject.title}\npredicted {case.likely(case.prediction)}; explained {case.likely(question.target)}"
    panels: list[Panel] = list(shown)
    if question.two:
        assert question.other is not None
        for place, index in enumerate((question.target, question.other)):
            panels[place] = replace(shown[place], title=f"{shown[place].title}, {case.likely(index)}")
    figure = draw_sheet(case.prepared.pixels, panels, words, photo=_framed(case), beside=case.likeliest())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def _headline(case: Case, question: Question) -> str:
    def chip(heading: str, index: int) -> str:
        return (
            f'<span class="chip"><span>{heading}</span> <b>{escape(case.label(index))}</b> {case.percent(index)}</span>'
        )

    return (
        f'<p class="headline"><span class="chip"><span>model</span> <b>{escape(case.subject.title)}</b> '
        f"{'' if case.subject.random else 'trained weights'}</span>"
        f"{chip('predicted', case.prediction)}{chip('explained', question.target)}</p>"
    )


def _explained(case: Case, question: Question) -> str:
    per_class = method_of_rule(question.rule).per_class
    return f"for: {case.label(question.target)}" if per_class else "whatever the class"


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
    bar = BARS[signed]
    return f'<span class="legend">{bar.low} <img alt="" src="{_uri(_scale(signed), "PNG")}"> {bar.high}</span>'


def _download(case: Case, question: Question, shown: Sequence[Shown]) -> str:
    words = f"{case.subject.name}-{case.label(question.target)}-{question.rule}"
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    data = base64.b64encode(sheet(case, question, shown)).decode()
    return f'<a class="download" download="{name}.png" href="data:image/png;base64,{data}">Download the sheet (PNG)</a>'


def _overlay(case: Case, one: Shown, scale: Scale) -> Any:
    return overlay(case.prepared.pixels, one.relevance, scale=scale)


def _ends(scale: Scale) -> str:
    """The numbers at both ends of a scale."""
    return f"{-scale.high if scale.signed else scale.low:.2g} to {scale.high:.2g}"


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
