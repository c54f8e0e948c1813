"""``captum-lnstat report``: many explained images on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from captum_lnstat.cli import fail
from captum_lnstat.commands.names import ClassName, RuleName
from captum_lnstat.commands.options import (
    EXIT_CODES,
    check_look,
    check_model,
    check_output,
    check_there,
    find_images,
    look_options,
    model_options,
)
from captum_lnstat.explanation.subject.progress import progress

# So many still have a kilobyte each on a page that a browser opens at once.
_PICTURES = 20_000

# The bytes \b keep click from running the lines together.
_EXAMPLES = f"""\b
Examples:
  captum-lnstat report photos/ --model vit_small_patch16_224 --pretrained
  captum-lnstat report 'photos/**/*.jpg' --model mine:model --checkpoint last.ckpt --top-k 3 --output mine.html

{EXIT_CODES}
"""


@click.command(epilog=_EXAMPLES)
@click.argument("images", nargs=-1, required=True, metavar="FOLDER | IMAGE | PATTERN...")
@model_options
@click.option(
    "--target",
    "targets",
    type=ClassName(),
    multiple=True,
    metavar="CLASS",
    help="Class to explain, by index or name; of several, each image has a menu.  [default: the predicted one]",
)
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Explain the K likeliest classes of each image.")
@click.option("--rule", type=RuleName(), default="lnstat", show_default=True, help="As for explain.")
@look_options
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    help="The page.",
)
def report(
    images: tuple[str, ...],
    targets: tuple[str, ...],
    top_k: int | None,
    rule: str,
    colormap: str | None,
    alpha: float | None,
    grey: bool | None,
    contour: bool,
    output: Path,
    **model: Any,
) -> None:
    """Explain images, and put them on one page: a gallery to sort by confidence or class, with the map on hover.

    The page is one file, with all pictures inside it, 32 MB at most; it opens in any browser and asks nothing of a
    network. Images that cannot be read are named on it, and counted.
    """
    paths, _ = find_images(images)
    check_model(model["name"], model["pretrained"], model["checkpoint"], model["class_names"], targets)
    check_look(colormap)
    check_output(output, frozenset(("html",)), "the page")
    check_there(paths)
    pictures = len(paths) * (1 + (len(targets) + (top_k or 0) or 1))
    if pictures > _PICTURES:
        fail(f"{len(paths)} images and their maps are {pictures} pictures; expected {_PICTURES} at most on a page")
    # Only now: torch and the libraries of models take seconds to load.
    with progress("loading torch and the libraries of models"):
        from captum_lnstat.commands import explaining, reporting
        from captum_lnstat.commands.models import ModelOptions
        from captum_lnstat.visualize import Look

    request = explaining.Request(
        ModelOptions(**model),
        targets,
        top_k,
        rule,
        as_json=False,
        save_map=None,
        look=Look(colormap, alpha, grey, contour),
        kind="overlay",
        against=None,
    )
    reporting.write_report(paths, output, request, pictures)
