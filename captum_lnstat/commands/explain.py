"""``captum-lnstat explain``: what of an image counted for a class, or what the model looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from captum_lnstat.cli import fail
from captum_lnstat.commands.options import (
    EXIT_CODES,
    RuleName,
    Skipped,
    bundled_scene,
    check_folder,
    check_output,
    image_paths,
    model_options,
    read_model,
    warn,
)
from captum_lnstat.commands.pictures import KINDS, Kind, suffixes_of, write_picture
from captum_lnstat.errors import RecordingError, SourceError, UnsupportedModelError, one_line
from captum_lnstat.explanation.explainer import Explainer
from captum_lnstat.explanation.explanation import Explanation, unique_names
from captum_lnstat.explanation.subject.images import Item, read_item
from captum_lnstat.explanation.subject.progress import ProgressBar, progress
from captum_lnstat.explanation.subject.subject import Subject

# Two objects well apart, both known to the model: another --target moves the map from one to the other.
DEFAULT_SCENE = 264

# The bytes \b keep click from running the lines together.
_EXAMPLES = f"""\b
Examples:
  captum-lnstat explain
  captum-lnstat explain --target trouser --picture classes --against "t-shirt"
  captum-lnstat explain cat.jpg --model vit_small_patch16_224 --pretrained --output cat.png
  captum-lnstat explain photos/ --model torchvision:swin_t --pretrained --json > maps.jsonl

{EXIT_CODES}
"""


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, metavar="[IMAGE | FOLDER]...", type=click.Path(path_type=Path))
@model_options
@click.option("--target", metavar="CLASS", help="Class to explain, by index or name.  [default: the predicted one]")
@click.option(
    "--rule",
    type=RuleName(),
    default="lnstat",
    show_default=True,
    help="lnstat: counted for the class. evidence: for and against it. rollout: looked at, whatever the class. "
    "gradient: Chefer's rule with token statistics.",
)
@click.option(
    "--picture",
    "kind",
    type=click.Choice(KINDS),
    help="sheet: beside attention rollout, Chefer's rule and IntegratedGradients. overlay: the map on what the model "
    "saw. original: on the image itself, at its size. layers: how relevance descends block by block. heads: what "
    "every attention head hands down. classes: two classes.  [default: sheet, of several images overlay]",
)
@click.option("--against", metavar="CLASS", help="The other class of --picture classes.  [default: the likeliest]")
@click.option(
    "--scene",
    type=click.IntRange(0),
    metavar="N",
    help=f"Without IMAGE: number of the bundled scene.  [default: {DEFAULT_SCENE}]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Where the picture goes; of several images, a folder.  [default: lnstat.png, of several images lnstat]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every image, with its map.")
def explain(
    images: tuple[Path, ...],
    scene: int | None,
    output: Path | None,
    kind: Kind | None,
    against: str | None,
    **request: Any,
) -> None:
    """Explain images: draw what counted for a class, or what the model looked at.

    Without IMAGE, a scene that comes with the package is explained. Of a FOLDER every image in it is; one that cannot
    be read is named, skipped and counted.
    """
    if images and scene is not None:
        fail("IMAGE and --scene exclude each other; give one of them")
    paths = image_paths(images)
    several = len(paths) > 1 or any(path.is_dir() for path in images)
    drawn: Kind = kind or ("overlay" if several else "sheet")
    if against is not None and drawn != "classes":
        fail("--against is for --picture classes; give both, or leave it out")
    if several:
        output = output or Path("lnstat")
        check_folder(output, paths)
        _explain_all(paths, output, drawn, against, _Request(**request))
        return
    output = output or Path("lnstat.png")
    check_output(output, suffixes_of(drawn))
    if paths and output.resolve() == paths[0].resolve():
        fail("--output is IMAGE itself; expected another file")
    source, item = (
        (str(paths[0]), read_item(paths[0])) if paths else bundled_scene(DEFAULT_SCENE if scene is None else scene)
    )
    _explain_one(source, item, output, drawn, against, _Request(**request))


@dataclass(frozen=True)
class _Request:
    """The options that do not depend on the image."""

    name: str
    pretrained: bool
    checkpoint: Path | None
    class_names: Path | None
    whole: bool
    target: str | None
    rule: str
    as_json: bool

    def explainer(self) -> tuple[Explainer, int | None]:
        subject = read_model(self.name, self.pretrained, self.checkpoint, self.class_names, self.whole)
        return Explainer(subject, rule=self.rule), subject.find(self.target)


def _explain_one(source: str, item: Item, output: Path, kind: Kind, against: str | None, request: _Request) -> None:
    explainer, wanted = request.explainer()
    try:
        with progress("recording"):
            prepared = explainer.prepare(item)
            (explained,) = explainer.explain([prepared], [wanted])
            description = explainer.lnstat.describe(explainer.placed(prepared.inputs[None]))
        warn(explained.cautions)
        if not request.as_json:
            _line("image", source)
            _line("model", request.name)
            if explainer.subject.weights:
                _line("weights", explainer.subject.weights)
            _line("prediction", explained.outcome(explained.prediction))
            _line("target", explained.outcome(explained.target))
            for heading, line in zip(("recognised", ""), str(description).splitlines(), strict=False):
                _line(heading, line)
        write_picture(output, kind, explainer, prepared, explained, against)
    except (UnsupportedModelError, RecordingError) as error:
        _refuse(request.name, error)
    except SourceError:
        raise
    except ValueError as error:
        _refuse(request.name, error)
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
    if request.as_json:
        click.echo(json.dumps(_record(source, explainer.subject, explained, output)))
    else:
        _line("picture", str(output))


def _explain_all(paths: tuple[Path, ...], folder: Path, kind: Kind, against: str | None, request: _Request) -> None:
    """One picture after another, each written whole; an image that cannot be explained is named and counted."""
    explainer, wanted = request.explainer()
    warn(explainer.subject.cautions())
    if explainer.subject.weights:
        click.echo(f"weights: {explainer.subject.weights}", err=True)
    skipped = Skipped(len(paths))
    names = unique_names([path.stem for path in paths])
    for path, picture in zip(ProgressBar(paths, unit="image", disable=None), names, strict=True):
        output = folder / f"{picture}.png"
        try:
            prepared = explainer.prepare(read_item(path))
            (explained,) = explainer.explain([prepared], [wanted])
            write_picture(output, kind, explainer, prepared, explained, against)
        except UnsupportedModelError as error:  # of the model, so of every other image too
            _refuse(request.name, error)
        except OSError as error:
            fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
        except (RecordingError, ValueError) as error:
            skipped.add(path, error, as_json=request.as_json)
        else:
            record = json.dumps(_record(str(path), explainer.subject, explained, output))
            with ProgressBar.external_write_mode():
                click.echo(record if request.as_json else f"{explained}, {output}")
    skipped.check()
    skipped.finish()


def _refuse(name: str, error: Exception) -> NoReturn:
    fail(f"{name} cannot be explained: {one_line(error)}")


def _record(source: str, subject: Subject, explained: Explanation, output: Path) -> dict[str, Any]:
    weights = {"weights": subject.weights} if subject.weights else {}
    return {"image": source, "model": subject.name, **weights, "picture": str(output), **explained.to_dict()}


def _line(heading: str, text: str) -> None:
    click.echo(f"{heading:<12}{text}")
