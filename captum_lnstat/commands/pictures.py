"""The pictures that ``captum-lnstat explain`` can draw of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from captum_lnstat.attribution.descent import descend, descend_heads
from captum_lnstat.commands.known import Kind
from captum_lnstat.commands.options import FILES
from captum_lnstat.errors import SourceError, UnsupportedModelError
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.explanation import Explanation, pixels_of
from captum_lnstat.explanation.subject.names import find_class
from captum_lnstat.explanation.subject.progress import progress
from captum_lnstat.explanation.writing import about
from captum_lnstat.rules import layer_rule_names
from captum_lnstat.visualize import (
    Panel,
    class_sheet,
    comparison,
    draw_sheet,
    draw_targets,
    head_sheet,
    layer_sheet,
    write_figure,
)


def write_picture(
    path: Path,
    kind: Kind,
    explainer: Explainer,
    prepared: Prepared,
    found: Sequence[Explanation],
    against: str | None,
) -> None:
    """Draw a picture of one explained image, of one target or, on a sheet, of several, and write it whole."""
    if kind in FILES:
        found[0].save(path, original=kind == "original")
        return
    figure = _figure(kind, explainer, prepared, found[0], against) if len(found) == 1 else _panels(explainer, found)
    write_figure(path, figure, about(found[0]) if len(found) == 1 else "")


def _panels(explainer: Explainer, found: Sequence[Explanation]) -> Figure:
    """A panel for each of several targets."""
    first = found[0]
    panels = [Panel(each.likely(each.target), each.relevance, each.signed) for each in found]
    title = f"predicted {first.likely(first.prediction)}  |  rule {first.rule}"
    title = f"{explainer.subject.title}\n{title}"
    return draw_targets(pixels_of(first.image), panels, title, look=first.look, **_whole(first))


def _whole(explained: Explanation) -> dict[str, Any]:
    """The photograph that was given, and the likeliest classes, for the sides of a sheet."""
    return {"photo": explained.framed, "beside": explained.likeliest()}


def _figure(
    kind: Kind, explainer: Explainer, prepared: Prepared, explained: Explanation, against: str | None
) -> Figure:
    model, output, rule = explainer.subject.model, explainer.output, explainer.lnstat.rule
    inputs = explainer.placed(prepared.inputs[None])
    image = prepared.pixels
    likely = explained.likely(explained.target)
    above = f"{explainer.subject.title}\n"
    title = f"{above}predicted {explained.likely(explained.prediction)}  |  target {likely}  |  rule {rule}"
    if kind == "sheet":
        panels = comparison(model, inputs, explained.target, rule=rule, output=output, during=progress)
        return draw_sheet(image, panels, title, look=explained.look, **_whole(explained))
    if kind == "layers":
        if rule not in layer_rule_names():
            raise UnsupportedModelError(
                f"rule {rule!r} is not read at the blocks; expected one of {', '.join(map(repr, layer_rule_names()))}"
            )
        with progress("descending"):
            blocks = descend(model, inputs, explained.target, rule=rule, output=output)
        return layer_sheet(blocks, image, title, signed=explained.signed, look=explained.look)
    if kind == "heads":
        with progress("descending"):
            heads = descend_heads(model, inputs, output=output)
        return head_sheet(
            heads, image, f"{above}predicted {explained.likely(explained.prediction)}  |  attention heads"
        )
    other = _other(explained, against)
    with progress("contrasting"):
        return class_sheet(
            model,
            inputs,
            image,
            (explained.target, other),
            (explained.likely(explained.target), explained.likely(other)),
            f"{above}{explained.likely(explained.target)}  against  {explained.likely(other)}",
            output=output,
            look=explained.look,
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
