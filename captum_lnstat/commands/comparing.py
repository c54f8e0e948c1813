"""What ``captum-lnstat compare`` does once its options are known to make sense."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from captum_lnstat.cli import fail
from captum_lnstat.commands.known import STREAM, ScaleOf
from captum_lnstat.commands.models import ModelOptions, read_source
from captum_lnstat.commands.options import Skipped, to_stream, warn
from captum_lnstat.errors import RecordingError, UnsupportedModelError, one_line
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.explanation import Explanation
from captum_lnstat.explanation.subject.progress import ProgressBar
from captum_lnstat.visualize import METHODS, ComparedImage, Look, Method, compare_sheet, to_map, write_figure

_Columns = list[tuple[ComparedImage, Explanation]]


def compare_all(
    sources: Sequence[Path | int],
    options: ModelOptions,
    target: str | None,
    names: Sequence[str],
    scale: ScaleOf,
    look: Look,
    output: Path,
    as_json: bool,
) -> None:
    """Every method on every image, which is a file or the number of a scene."""
    methods = {name: METHODS[name] for name in names}
    subject = options.read()
    wanted = subject.find(target)
    warn(subject.cautions())
    if subject.weights:
        click.echo(f"weights: {subject.weights}", err=True)
    explainer = Explainer(subject)
    columns: _Columns = []
    kept: list[Path | int] = []
    skipped = Skipped(len(sources))
    with ProgressBar(total=len(sources) * len(methods), unit="map", disable=None) as bar:
        waiting: list[tuple[Path | int, Prepared]] = []
        for place, source in enumerate(sources):
            try:
                _, item = read_source(source)
                waiting.append((source, explainer.prepare(item)))
                warn(item.cautions_of(source))
            except (RecordingError, ValueError) as error:
                skipped.add(source, error)
            sizes = {prepared.inputs.shape for _, prepared in waiting}
            last = place + 1 == len(sources)
            while waiting and (last or len(waiting) > options.batch or len(sizes) > 1):
                size = waiting[0][1].inputs.shape
                ready = [each for each in waiting[: options.batch] if each[1].inputs.shape == size]
                waiting = waiting[len(ready) :]
                sizes = {prepared.inputs.shape for _, prepared in waiting}
                done = _columns(explainer, ready, wanted, methods, skipped, bar)
                kept += [source for source, _ in done]
                columns += [column for _, column in done]
    skipped.check()
    if any(isinstance(source, Path) for source in kept):
        warn(options.cautions)
    try:
        sheet = compare_sheet([c for c, _ in columns], list(methods.values()), subject.title, scale=scale, look=look)
        with to_stream(output) as file:
            write_figure(file, sheet)
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
    records = [{"image": str(source), **_record(found)} for source, (_, found) in zip(kept, columns, strict=True)]
    if as_json:
        weights = {"weights": subject.weights} if subject.weights else {}
        about = {"model": subject.name, **weights, "methods": list(methods)}
        click.echo(json.dumps({**about, "images": records, "skipped": skipped.records, "picture": str(output)}))
    else:
        for each in records:
            words = f"{each['image']}: predicted {each['prediction']}, explained {each['target']}"
            click.echo(words, err=output == STREAM)
        click.echo(f"picture: {output}", err=output == STREAM)
    skipped.finish()


def _columns(
    explainer: Explainer,
    ready: Sequence[tuple[Path | int, Prepared]],
    wanted: int | None,
    methods: dict[str, Method],
    skipped: Skipped,
    bar: Any,
) -> list[tuple[Path | int, tuple[ComparedImage, Explanation]]]:
    """Images of one size at once; if that fails, one after the other, to know which of them it is."""
    try:
        made = _made(explainer, [prepared for _, prepared in ready], wanted, methods, bar)
    except UnsupportedModelError as error:
        fail(f"{explainer.subject.name} cannot be explained: {one_line(error)}")
    except (RecordingError, ValueError) as error:
        if len(ready) == 1:
            skipped.add(ready[0][0], error)
            return []
        return [one for each in ready for one in _columns(explainer, [each], wanted, methods, skipped, bar)]
    return [(source, column) for (source, _), column in zip(ready, made, strict=True)]


def _made(
    explainer: Explainer, prepared: Sequence[Prepared], wanted: int | None, methods: dict[str, Method], bar: Any
) -> _Columns:
    explained = explainer.explain(prepared, [wanted] * len(prepared))
    inputs = explainer.placed(torch.stack([each.inputs for each in prepared]))
    targets = [each.target for each in explained]
    maps: list[list[Any]] = [[] for _ in prepared]
    for name, method in methods.items():
        if name == "lnstat":
            found = [each.relevance for each in explained]
        else:
            attribute = method.make(explainer.subject.model, explainer.output)
            made = attribute(inputs, targets[0] if len(targets) == 1 else targets)
            found = [to_map(each) for each in made]
        for own, each in zip(maps, found, strict=True):
            own.append(each)
        bar.update(len(prepared))
    return [
        (ComparedImage(_title(one), each.pixels, tuple(own), one.framed), one)
        for one, each, own in zip(explained, prepared, maps, strict=True)
    ]


def _title(explained: Explanation) -> str:
    title = f"{explained.name}\npredicted {explained.likely(explained.prediction)}"
    return (
        title if explained.target == explained.prediction else f"{title}\ntarget {explained.likely(explained.target)}"
    )


def _record(explained: Explanation) -> dict[str, Any]:
    names = {"prediction": explained.label(explained.prediction), "target": explained.label(explained.target)}
    return {**names, "confidence": explained.confidence}
