"""What ``captum-lnstat explain`` does once its options are known to make sense."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from captum_lnstat.cli import fail
from captum_lnstat.commands.known import MAPS, STREAM, Kind
from captum_lnstat.commands.models import ModelOptions, read_source
from captum_lnstat.commands.options import Skipped, to_stream, warn
from captum_lnstat.commands.pictures import write_picture
from captum_lnstat.errors import RecordingError, SourceError, UnsupportedModelError, one_line
from captum_lnstat.explanation.explainer import Explainer, Prepared
from captum_lnstat.explanation.explanation import Explanation, unique_names
from captum_lnstat.explanation.subject.images import read_item
from captum_lnstat.explanation.subject.progress import ProgressBar, progress
from captum_lnstat.explanation.subject.subject import Subject
from captum_lnstat.visualize import Look


@dataclass(frozen=True)
class Request:
    """The options that do not depend on the image."""

    model: ModelOptions
    targets: tuple[str, ...]
    top_k: int | None
    rule: str
    as_json: bool
    save_map: str | None
    look: Look
    kind: Kind
    against: str | None

    def explainer(self) -> tuple[Explainer, list[int]]:
        """The model, and the classes that are asked for."""
        subject = self.model.read()
        found = [subject.find(target) for target in self.targets]
        wanted = [index for index in dict.fromkeys(found) if index is not None]
        return Explainer(subject, rule=self.rule), wanted

    def explain(self, explainer: Explainer, prepared: Sequence[Prepared], wanted: list[int]) -> list[list[Explanation]]:
        """For every image the explanations of its targets."""
        if self.top_k is None and len(wanted) < 2:
            found = [[each] for each in explainer.explain(prepared, [*wanted, None][:1] * len(prepared))]
        else:
            predictions = explainer.predict(torch.stack([each.inputs for each in prepared]))
            found = []
            for each, prediction in zip(prepared, predictions, strict=True):
                classes = list(dict.fromkeys([*wanted, *prediction.ranked(self.top_k or 0)]))
                found.append(explainer.explain([each] * len(classes), classes, [prediction] * len(classes)))
        return [[replace(one, look=self.look) for one in of_image] for of_image in found]


def explain_one(source: Path | int, output: Path, request: Request) -> None:
    """One image or, by its number, one scene of the package."""
    words, item = read_source(source)
    say = partial(_line, err=output == STREAM)
    explainer, wanted = request.explainer()
    subject = explainer.subject
    own = request.model.cautions if isinstance(source, Path) else ()
    try:
        with progress("recording"):
            prepared = explainer.prepare(item)
            (found,) = request.explain(explainer, [prepared], wanted)
            description = explainer.lnstat.describe(explainer.placed(prepared.inputs[None]))
        warn([*own, *dict.fromkeys(caution for each in found for caution in each.cautions)])
        if not request.as_json:
            say("image", words)
            say("model", subject.name)
            if subject.weights:
                say("weights", subject.weights)
            say("prediction", found[0].outcome(found[0].prediction))
            for heading, each in zip(["target"] + [""] * len(found), found, strict=False):
                say(heading, each.outcome(each.target))
            say("recognised", f"{description.patches}; the head reads: {description.pooling}")
            if description.covers:
                say("covers", description.covers)
        with to_stream(output) as file:
            write_picture(file, request.kind, explainer, prepared, found, request.against)
        maps = _write_maps(output, found, request.save_map)
    except (UnsupportedModelError, RecordingError) as error:
        _refuse(subject.name, error)
    except SourceError:
        raise
    except ValueError as error:
        _refuse(subject.name, error)
    except OSError as error:
        place = "standard output" if output == STREAM else repr(error.filename or str(output))
        fail(f"{place} cannot be written: {one_line(error.strerror or error)}")
    if request.as_json:
        for each, path in zip(found, _each(maps, found), strict=True):
            click.echo(json.dumps(_record(words, subject, each, output, path)))
    else:
        say("picture", str(output))
        for heading, path in zip(["map"] + [""] * len(maps), maps, strict=False):
            say(heading, str(path))


def explain_all(paths: tuple[Path, ...], folder: Path, request: Request) -> None:
    """One picture after another, each written whole; an image that cannot be explained is named and counted."""
    explainer, wanted = request.explainer()
    warn(explainer.subject.cautions())
    if explainer.subject.weights:
        click.echo(f"weights: {explainer.subject.weights}", err=True)
    cautions = request.model.cautions
    skipped = Skipped(len(paths))
    outputs = [folder / f"{name}.png" for name in unique_names([path.stem for path in paths])]
    with ProgressBar(total=len(paths), unit="image", disable=None) as bar:
        for place, prepared, found in each_image(explainer, paths, wanted, request, skipped, bar):
            output = outputs[place]
            try:
                write_picture(output, request.kind, explainer, prepared, found, request.against)
                maps = _write_maps(output, found, request.save_map)
            except OSError as error:
                fail(f"{error.filename or str(output)!r} cannot be written: {one_line(error.strerror or error)}")
            except (RecordingError, ValueError) as error:
                skipped.add(paths[place], error, as_json=request.as_json)
            else:
                with ProgressBar.external_write_mode():
                    warn([*cautions, *prepared.item.cautions_of(paths[place])])
                    cautions = ()
                    for each, path in zip(found, _each(maps, found), strict=True):
                        record = _record(str(paths[place]), explainer.subject, each, output, path)
                        click.echo(json.dumps(record) if request.as_json else f"{each}, {output}")
            bar.update()
    skipped.check()
    skipped.finish()


_Batch = list[tuple[int, Prepared]]


def each_image(
    explainer: Explainer, paths: Sequence[Path], wanted: list[int], request: Request, skipped: Skipped, bar: Any
) -> Iterator[tuple[int, Prepared, list[Explanation]]]:
    """The place of every image that can be explained, and the explanations of its targets; others are skipped."""
    for batch in _batches(explainer, paths, request, skipped, bar):
        yield from _explained(explainer, batch, wanted, request, paths, skipped)


def _batches(
    explainer: Explainer, paths: Sequence[Path], request: Request, skipped: Skipped, bar: Any
) -> Iterator[_Batch]:
    """Images that follow each other and are of one size for the model; what cannot be read is left out."""
    waiting: _Batch = []
    for place, path in enumerate(paths):
        try:
            prepared = explainer.prepare(read_item(path))
        except (RecordingError, ValueError, OSError) as error:
            skipped.add(path, error, as_json=request.as_json)
            bar.update()
            continue
        if waiting and waiting[0][1].inputs.shape != prepared.inputs.shape:
            yield waiting
            waiting = []
        waiting.append((place, prepared))
        if len(waiting) == request.model.batch:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _explained(
    explainer: Explainer, batch: _Batch, wanted: list[int], request: Request, paths: Sequence[Path], skipped: Skipped
) -> Iterator[tuple[int, Prepared, list[Explanation]]]:
    """A batch at once; if that fails, one after the other, to know which of them it is."""
    try:
        found = request.explain(explainer, [prepared for _, prepared in batch], wanted)
    except UnsupportedModelError as error:  # of the model, so of every other image too
        _refuse(explainer.subject.name, error)
    except (RecordingError, ValueError) as error:
        if len(batch) == 1:
            skipped.add(paths[batch[0][0]], error, as_json=request.as_json)
            return
        for one in batch:
            yield from _explained(explainer, [one], wanted, request, paths, skipped)
        return
    for (place, prepared), of_image in zip(batch, found, strict=True):
        yield place, prepared, of_image


def _write_maps(output: Path, found: Sequence[Explanation], wanted: str | None) -> list[Path]:
    """The maps themselves; of several targets, each with the index of its class in its name."""
    if wanted is None:
        return []
    beside = output.with_name(f"{output.stem}{'.map' * (wanted == 'png')}.{wanted}")
    path = beside if wanted in MAPS else Path(wanted)
    paths = [path] if len(found) == 1 else [path.with_name(f"{path.stem}-{each.target}{path.suffix}") for each in found]
    return [each.save(name, raw=True) for each, name in zip(found, paths, strict=True)]


def _each(maps: Sequence[Path], found: Sequence[Explanation]) -> Sequence[Path | None]:
    """The map of every explanation, or nothing for each."""
    return maps or [None for _ in found]


def _refuse(name: str, error: Exception) -> NoReturn:
    fail(f"{name} cannot be explained: {one_line(error)}")


def _record(source: str, subject: Subject, explained: Explanation, output: Path, path: Path | None) -> dict[str, Any]:
    weights = {"weights": subject.weights} if subject.weights else {}
    maps = {} if path is None else {"map": str(path)}
    return {"image": source, "model": subject.name, **weights, "picture": str(output), **maps, **explained.to_dict()}


def _line(heading: str, text: str, *, err: bool = False) -> None:
    click.echo(f"{heading:<12}{text}", err=err)
