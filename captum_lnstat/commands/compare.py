"""``captum-lnstat compare``: several methods on several images, on one sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from matplotlib.backends.backend_agg import FigureCanvasAgg

from captum_lnstat.cli import fail
from captum_lnstat.commands.options import (
    EXIT_CODES,
    Skipped,
    bundled_scene,
    check_output,
    image_paths,
    model_options,
    read_model,
    warn,
)
from captum_lnstat.errors import RecordingError, UnsupportedModelError, near, one_line
from captum_lnstat.explanation.explainer import Explainer
from captum_lnstat.explanation.explanation import Explanation
from captum_lnstat.explanation.subject.images import Item, read_item
from captum_lnstat.explanation.subject.progress import ProgressBar
from captum_lnstat.visualize import METHODS, ComparedImage, Method, compare_sheet, to_map, write_figure
from captum_lnstat.visualize.compare import SCALES, ScaleOf

DEFAULT_SCENES = (3, 120, 264, 300)
DEFAULT_METHODS = "lnstat,evidence,attention-rollout,chefer,ig"
# More columns are too many for a sheet.
MOST = 16

_EXAMPLES = f"""\b
Examples:
  captum-lnstat compare
  captum-lnstat compare --scene 264 --scene 300 --target trouser --methods lnstat,chefer,ig
  captum-lnstat compare cat.jpg dog.jpg --model swin_tiny_patch4_window7_224 --pretrained

{EXIT_CODES}
"""


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, metavar="[IMAGE | FOLDER]...", type=click.Path(path_type=Path))
@model_options
@click.option("--target", metavar="CLASS", help="Class to explain, by index or name.  [default: the predicted one]")
@click.option(
    "--methods",
    default=DEFAULT_METHODS,
    show_default=True,
    metavar="A,B,...",
    help=f"The rows: {', '.join(METHODS)}.",
)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="method",
    show_default=True,
    help="method: one scale a row. map: one for every map. shared: one for all, in multiples of each map's mean.",
)
@click.option(
    "--scene", "scenes", multiple=True, type=click.IntRange(0), metavar="N", help="Without IMAGE: bundled scenes."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="compare.png",
    show_default=True,
    metavar="FILE",
    help="Where the sheet goes.",
)
@click.option("--json", "as_json", is_flag=True, help="Say what was drawn as one JSON object.")
def compare(
    images: tuple[Path, ...],
    name: str,
    target: str | None,
    methods: str,
    scale: ScaleOf,
    scenes: tuple[int, ...],
    output: Path,
    as_json: bool,
    **model: Any,
) -> None:
    """Compare methods on images: methods by rows, images by columns, with the scale of every row beside it.

    Without IMAGE, scenes that come with the package are taken. Of a FOLDER every image in it is; one that cannot be
    read is named, skipped and counted.
    """
    if images and scenes:
        fail("IMAGE and --scene exclude each other; give one of them")
    chosen = _methods(methods)
    check_output(output, set(FigureCanvasAgg.get_supported_filetypes()))
    paths = image_paths(images)
    if max(len(paths), len(scenes)) > MOST:
        fail(f"{max(len(paths), len(scenes))} images are too many for one sheet; expected at most {MOST}")
    sources: list[Any] = list(paths) or list(scenes or DEFAULT_SCENES)
    subject = read_model(name, **model)
    wanted = subject.find(target)
    warn(subject.cautions())
    if subject.weights:
        click.echo(f"weights: {subject.weights}", err=True)
    explainer = Explainer(subject)
    columns: list[ComparedImage] = []
    records: list[dict[str, Any]] = []
    skipped = Skipped(len(sources))
    with ProgressBar(total=len(sources) * len(chosen), unit="map", disable=None) as bar:
        for source in sources:
            try:
                item = read_item(source) if isinstance(source, Path) else bundled_scene(source)[1]
                column, explained = _column(explainer, item, wanted, chosen, bar)
            except UnsupportedModelError as error:
                fail(f"{name} cannot be explained: {one_line(error)}")
            except (RecordingError, ValueError) as error:
                skipped.add(source, error)
            else:
                columns.append(column)
                records.append({"image": str(source), **_record(explained)})
    skipped.check()
    try:
        write_figure(output, compare_sheet(columns, list(chosen.values()), name, scale=scale))
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
    if as_json:
        record = {"model": name, "methods": list(chosen), "images": records, "skipped": skipped.records}
        click.echo(json.dumps({**record, "picture": str(output)}))
    else:
        for each in records:
            click.echo(f"{each['image']}: predicted {each['prediction']}, explained {each['target']}")
        click.echo(f"picture: {output}")
    skipped.finish()


def _methods(text: str) -> dict[str, Method]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        fail(f"--methods is empty; expected some of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            fail(f"unknown method {name!r}; {near(name, list(METHODS), 'expected some of ' + ', '.join(METHODS))}")
    return {name: METHODS[name] for name in names}


def _column(
    explainer: Explainer, item: Item, wanted: int | None, methods: dict[str, Method], bar: Any
) -> tuple[ComparedImage, Explanation]:
    prepared = explainer.prepare(item)
    (explained,) = explainer.explain([prepared], [wanted])
    inputs = explainer.placed(prepared.inputs[None])
    maps = []
    for name, method in methods.items():
        if name == "lnstat":
            maps.append(explained.relevance)
        else:
            attribute = method.make(explainer.subject.model, explainer.output)
            maps.append(to_map(attribute(inputs, explained.target)[0]))
        bar.update()
    title = f"{item.name}\npredicted {explained.likely(explained.prediction)}"
    if explained.target != explained.prediction:
        title += f"\ntarget {explained.likely(explained.target)}"
    return ComparedImage(title, prepared.pixels, tuple(maps)), explained


def _record(explained: Explanation) -> dict[str, Any]:
    names = {"prediction": explained.label(explained.prediction), "target": explained.label(explained.target)}
    return {**names, "confidence": explained.confidence}
