"""The pictures that ``captum-lnstat explain`` can draw of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from captum_lnstat.attribution.descent import descend, descend_heads
from captum_lnstat.errors import SourceError, UnsupportedModelError
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.explanation import Explanation
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
    image = prepared.pixels
    likely = explained.likely(explained.target)
    title = f"predicted {explained.likely(explained.prediction)}  |  target {likely}  |  rule {rule}"
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
        return head_sheet(heads, image, f"predicted {explained.likely(explained.prediction)}  |  attention heads")
    other = _other(explained, against)
    with progress("contrasting"):
        return class_sheet(
            model,
            inputs,
            image,
            (explained.target, other),
            (explained.likely(explained.target), explained.likely(other)),
            f"{explained.likely(explained.target)}  against  {explained.likely(other)}",
            output=output,
        )


def _other(explained: Explanation, against: str | None) -> int:
    """The class to contrast with: the one asked for, or the likeliest other one."""
    if explained.probabilities is None:
        raise SourceError("the model has one score alone, so there are no two classes to contrast")
    if against is None:
        return next(index for index in explained.ranked(2) if index != explained.target)
    other = find_class(against, explained.class_names, explained.count)
    if other == explained.target:
        raise SourceError(f"--against is the target itself, {explained.label(other)}; expected another class")
    return other
