"""The pictures that ``captum-lnstat explain`` can draw of an image."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from captum_lnstat.attribution.descent import descend, descend_heads
from captum_lnstat.errors import SourceError, UnsupportedModelError
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.explanation import Explanation, percent
from captum_lnstat.explanation.subject.classes import find_class
from captum_lnstat.explanation.subject.progress import progress
from captum_lnstat.rules import layer_rule_names
from captum_lnstat.visualize import class_sheet, comparison, draw_sheet, head_sheet, layer_sheet, write_figure

Kind = Literal["sheet", "overlay", "original", "layers", "heads", "classes"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FILES: tuple[Kind, ...] = ("overlay", "original")


def suffixes_of(kind: Kind) -> set[str]:
    """The endings that such a picture can be written with."""
    if kind in _FILES:
        return {suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    return set(FigureCanvasAgg.get_supported_filetypes())


def write_picture(
    path: Path, kind: Kind, explainer: Explainer, prepared: Prepared, explained: Explanation, against: str | None
) -> None:
    """Draw a picture of one explained image and write it whole."""
    if kind in _FILES:
        explained.save(path, original=kind == "original")
    else:
        write_figure(path, _figure(kind, explainer, prepared, explained, against))


def _figure(
    kind: Kind, explainer: Explainer, prepared: Prepared, explained: Explanation, against: str | None
) -> Figure:
    model, output, rule = explainer.subject.model, explainer.output, explainer.lnstat.rule
    inputs = explainer.placed(prepared.inputs[None])
    image = np.asarray(prepared.image, np.float64) / 255
    likely = _likely(explained, explained.target)
    title = f"predicted {_likely(explained, explained.prediction)}  |  target {likely}  |  rule {rule}"
    if kind == "sheet":
        panels = comparison(model, inputs, explained.target, rule=rule, output=output, during=progress)
        return draw_sheet(image, panels, title)
    if kind == "layers":
        if rule not in layer_rule_names():
            raise UnsupportedModelError(
                f"rule {rule!r} is not read at the blocks; expected one of {', '.join(map(repr, layer_rule_names()))}"
            )
        with progress("descending"):
            blocks = descend(model, inputs, explained.target, rule=rule, output=output)
        return layer_sheet(blocks, image, title, signed=explained.signed)
    if kind == "heads":
        with progress("descending"):
            heads = descend_heads(model, inputs, output=output)
        return head_sheet(heads, image, f"predicted {_likely(explained, explained.prediction)}  |  attention heads")
    other = _other(explained, against)
    with progress("contrasting"):
        return class_sheet(
            model,
            inputs,
            image,
            (explained.target, other),
            (_likely(explained, explained.target), _likely(explained, other)),
            f"{_likely(explained, explained.target)}  against  {_likely(explained, other)}",
            output=output,
        )


def _other(explained: Explanation, against: str | None) -> int:
    """The class to contrast with: the one asked for, or the likeliest other one."""
    if explained.probabilities is None:
        raise SourceError("the model has one score alone, so there are no two classes to contrast")
    if against is None:
        return int(np.argsort(-explained.probabilities)[int(explained.prediction == explained.target)])
    other = find_class(against, explained.class_names, len(explained.probabilities))
    if other == explained.target:
        raise SourceError(f"--against is the target itself, {explained.label(other)}; expected another class")
    return other


def _likely(explained: Explanation, index: int) -> str:
    name = textwrap.shorten(explained.label(index).split(" (")[0], 28, placeholder="...")
    return name if explained.probabilities is None else f"{name} {percent(explained.probabilities[index])}"
