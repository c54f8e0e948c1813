"""``captum-lnstat explain``: what of an image counted for a class, or what the model looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from captum_lnstat.cli import fail
from captum_lnstat.commands.known import KINDS, MAPS, STREAM, Kind
from captum_lnstat.commands.names import ClassName, RuleName
from captum_lnstat.commands.options import (
    EXIT_CODES,
    check_folder,
    check_look,
    check_model,
    check_output,
    check_scenes,
    check_stream,
    check_there,
    find_images,
    look_options,
    model_options,
    suffixes_of,
)
from captum_lnstat.explanation.subject.progress import progress

# Two objects well apart, both known to the model: another --target moves the map from one to the other.
DEFAULT_SCENE = 264

# The bytes \b keep click from running the lines together.
_EXAMPLES = f"""\b
Examples:
  captum-lnstat explain
  captum-lnstat explain --target trouser --picture classes --against "t-shirt"
  captum-lnstat explain cat.jpg --model vit_small_patch16_224 --pretrained --output cat.png
  captum-lnstat explain cat.jpg --model mine:model --checkpoint last.ckpt --class-names names.txt --top-k 3
  curl -s https://example.org/cat.jpg | captum-lnstat explain - --picture overlay --output - > cat.png
  captum-lnstat explain photos/ --model torchvision:swin_t --pretrained --json > maps.jsonl

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
    help="Class to explain, by index or name; several make a panel each.  [default: the predicted one]",
)
@click.option("--top-k", type=click.IntRange(1), metavar="K", help="Explain the K likeliest classes, a panel each.")
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
    "every attention head passes on. classes: two classes.  [default: sheet, of several images overlay]",
)
@click.option(
    "--against",
    type=ClassName(),
    metavar="CLASS",
    help="The other class of --picture classes.  [default: the likeliest]",
)
@look_options
@click.option(
    "--save-map",
    metavar="FORM|FILE",
    help=f"Write the map itself, too: {', '.join(MAPS)} beside the picture, or a file that ends so; and what it was "
    "made with, as JSON.",
)
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
    images: tuple[str, ...],
    scene: int | None,
    output: Path | None,
    kind: Kind | None,
    against: str | None,
    targets: tuple[str, ...],
    top_k: int | None,
    rule: str,
    as_json: bool,
    save_map: str | None,
    colormap: str | None,
    alpha: float | None,
    grey: bool | None,
    contour: bool,
    **model: Any,
) -> None:
    """Explain images: draw what counted for a class, or what the model looked at.

    Without IMAGE, a scene that comes with the package is explained; - is standard input, and --output - standard
    output. Of a FOLDER every image in it is, and every file
    that a PATTERN such as 'photos/**/*.jpg' matches; one that cannot be read is named, skipped and counted.
    """
    if images and scene is not None:
        fail("IMAGE and --scene exclude each other; give one of them")
    check_scenes(() if scene is None else (scene,))
    paths, several = find_images(images)
    many = len(targets) > 1 or top_k is not None
    if many and kind not in (None, "sheet"):
        fail(f"--picture {kind} shows one target; give one --target, or leave out --picture for a panel each")
    drawn: Kind = kind or ("overlay" if several and not many else "sheet")
    if against is not None and drawn != "classes":
        fail("--against is for --picture classes; give both, or leave it out")
    name, checkpoint, names = model["name"], model["checkpoint"], model["class_names"]
    check_model(name, model["pretrained"], checkpoint, names, targets)
    check_look(colormap)
    if several:
        output = output or Path("lnstat")
        if save_map is not None and save_map not in MAPS:
            fail(f"--save-map is {save_map!r}; of several images expected a form, one of {', '.join(MAPS)}")
        check_there(paths)
        check_folder(output, paths)
    else:
        output = output or Path("lnstat.png")
        check_output(output, suffixes_of(drawn))
        if output == STREAM:
            check_stream(as_json)
            if save_map in MAPS:
                fail(f"with --output - --save-map needs a file; give a name that ends in .{save_map}")
        elif paths and output.resolve() == paths[0].resolve():
            fail("--output is IMAGE itself; expected another file")
        if save_map is not None and save_map not in MAPS:
            check_output(Path(save_map), frozenset(MAPS), "the map")
            if Path(save_map).resolve() in {path.resolve() for path in (output, *paths)}:
                fail(f"--save-map is {save_map!r}, the image or the picture itself; expected another file")
        check_there(paths)
    # Only now: torch and the libraries of models take seconds to load.
    with progress("loading torch and the libraries of models"):
        from captum_lnstat.commands import explaining
        from captum_lnstat.commands.models import ModelOptions
        from captum_lnstat.visualize import Look

    request = explaining.Request(
        ModelOptions(**model),
        targets,
        top_k,
        rule,
        as_json,
        save_map,
        Look(colormap, alpha, grey, contour),
        drawn,
        against,
    )
    if several:
        explaining.explain_all(paths, output, request)
    else:
        explaining.explain_one(paths[0] if paths else DEFAULT_SCENE if scene is None else scene, output, request)
