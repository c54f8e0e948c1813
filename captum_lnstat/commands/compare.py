"""``captum-lnstat compare``: several methods on several images, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from captum_lnstat.cli import fail
from captum_lnstat.commands.known import FIGURES, METHODS, SCALES, STREAM, ScaleOf
from captum_lnstat.commands.names import ClassName, Names
from captum_lnstat.commands.options import (
    EXIT_CODES,
    check_look,
    check_model,
    check_output,
    check_scenes,
    check_stream,
    check_there,
    find_images,
    look_options,
    model_options,
)
from captum_lnstat.errors import near
from captum_lnstat.explanation.subject.progress import progress

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
@click.argument("images", nargs=-1, metavar="[IMAGE | FOLDER | PATTERN]...")
@model_options
@click.option(
    "--target",
    "targets",
    type=ClassName(),
    multiple=True,
    metavar="CLASS",
    help="Class to explain, by index or name.  [default: the predicted one]",
)
@click.option(
    "--methods",
    type=Names(METHODS),
    default=DEFAULT_METHODS,
    show_default=True,
    metavar="A,B,...",
    help=f"The rows: {', '.join(METHODS)}.",
)
@click.option(
    "--scale",
    type=click.Choice(SCALES),
    default="map",
    show_default=True,
    help="map: one for every map. method: one a row, so that images can be compared, and weak maps look empty. shared: "
    "one for all, in multiples of each map's mean.",
)
@look_options
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
    images: tuple[str, ...],
    targets: tuple[str, ...],
    methods: str,
    scale: ScaleOf,
    scenes: tuple[int, ...],
    output: Path,
    as_json: bool,
    colormap: str | None,
    alpha: float | None,
    grey: bool | None,
    contour: bool,
    **model: Any,
) -> None:
    """Compare methods on images: methods by rows, images by columns.

    Without IMAGE, scenes that come with the package are taken. Of a FOLDER every image in it is, and every file that
    a PATTERN matches; one that cannot be read is named, skipped and counted.
    """
    if images and scenes:
        fail("IMAGE and --scene exclude each other; give one of them")
    check_scenes(scenes)
    if len(targets) > 1:
        fail(f"compare shows one target, {len(targets)} are given; explain shows several, a panel each")
    names = _methods(methods)
    check_output(output, FIGURES)
    if output == STREAM:
        check_stream(as_json)
    if len(images) > MOST:
        fail(f"{len(images)} images are too many for one sheet; expected at most {MOST}")
    paths, _ = find_images(images)
    if max(len(paths), len(scenes)) > MOST:
        fail(f"{max(len(paths), len(scenes))} images are too many for one sheet; expected at most {MOST}")
    check_model(model["name"], model["pretrained"], model["checkpoint"], model["class_names"], targets)
    check_look(colormap)
    check_there(paths)
    # Only now: torch and the libraries of models take seconds to load.
    with progress("loading torch and the libraries of models"):
        from captum_lnstat.commands.comparing import compare_all
        from captum_lnstat.commands.models import ModelOptions
        from captum_lnstat.visualize import Look

    sources: Sequence[Path | int] = paths or scenes or DEFAULT_SCENES
    target = targets[0] if targets else None
    compare_all(
        sources, ModelOptions(**model), target, names, scale, Look(colormap, alpha, grey, contour), output, as_json
    )


def _methods(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        fail(f"--methods is empty; expected some of {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            fail(f"unknown method {name!r}; {near(name, list(METHODS), 'expected some of ' + ', '.join(METHODS))}")
    return list(dict.fromkeys(names))
