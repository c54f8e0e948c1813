"""``captum-lnstat explain``: what a model looked at in an image, and what of it argued for a class."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import Tensor

from captum_lnstat import zoo
from captum_lnstat._console import fail, one_line, progress
from captum_lnstat.attribution import RULES, LNStatAttribution, Rule
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.sources import Subject, class_index, read_image, read_subject
from captum_lnstat.visualize import comparison, to_picture, write_sheet
from captum_lnstat.zoo.models import CLASS_NAMES

# Two objects well apart, both known to the model: another --target moves the map from one to the other.
DEFAULT_SCENE = 264
# Below this confidence a map of the target was seen to lie on background or on another object.
FAINT_TARGET = 0.01


# The bytes \b keep click from running the lines together.
_EXAMPLES = """\b
Examples:
  captum-lnstat explain
  captum-lnstat explain --target trouser
  captum-lnstat explain cat.jpg --model vit_small_patch16_224 --pretrained --output cat.png
"""


@click.command(epilog=_EXAMPLES)
@click.argument("image", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model",
    "name",
    default="swin-mini",
    show_default=True,
    metavar="NAME",
    help='"swin-mini" or "vit-mini", trained models that come with the package, or any ViT or Swin that timm knows.',
)
@click.option("--pretrained", is_flag=True, help="Let timm download its weights for the model.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Weights for the model: .safetensors, or .pth and .pt, of which only tensors are loaded.",
)
@click.option("--target", metavar="CLASS", help="Class to explain, by index or name.  [default: the predicted one]")
@click.option(
    "--rule",
    type=click.Choice(RULES),
    default="lnstat",
    show_default=True,
    help="lnstat: looked at, and counted for the class. evidence: for and against it. rollout: looked at, "
    "whatever the class. gradient: Chefer's rule with token statistics.",
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
    default="lnstat.png",
    show_default=True,
    metavar="FILE",
    help="Where the picture goes.",
)
def explain(
    image: Path | None,
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    target: str | None,
    rule: Rule,
    scene: int | None,
    output: Path,
) -> None:
    """Explain one image: its map beside attention rollout, Chefer's rule and IntegratedGradients.

    Without IMAGE, a scene that comes with the package is explained.
    """
    if pretrained and checkpoint is not None:
        fail("--pretrained and --checkpoint exclude each other; give one of them")
    if image is not None and scene is not None:
        fail("IMAGE and --scene exclude each other; give one of them")
    _check_output(output)
    if image is not None and output.resolve() == image.resolve():
        fail("--output is IMAGE itself; expected another file")
    source, picture = (
        _scene(DEFAULT_SCENE if scene is None else scene) if image is None else (str(image), read_image(image))
    )
    subject = read_subject(name, pretrained, checkpoint)
    wanted = None if target is None else class_index(target, subject)
    inputs = subject.transform(picture)[None]
    try:
        with progress("recording"):
            description = LNStatAttribution(subject.model, rule=rule).describe(inputs)
            with torch.no_grad():
                confidence = subject.model(inputs).softmax(-1)[0]
        best = int(confidence.argmax())
        wanted = best if wanted is None else wanted
        if not pretrained and checkpoint is None and name not in zoo.names():
            click.echo(
                f"Warning: the weights of {name} are random, and so is the explanation; give --pretrained or "
                "--checkpoint",
                err=True,
            )
        elif confidence[wanted] < FAINT_TARGET:
            click.echo(
                "Note: the model all but rules this target out; the map shows what little argued for it", err=True
            )
        _say("image", source)
        _say("model", name)
        _say("prediction", f"{subject.label(best)}, confidence {_percent(confidence[best])}")
        _say("target", f"{subject.label(wanted)}, confidence {_percent(confidence[wanted])}")
        for heading, line in zip(("recognised", ""), str(description).splitlines(), strict=False):
            _say(heading, line)
        panels = comparison(subject.model, inputs, wanted, rule=rule, during=progress)
    except (UnsupportedModelError, RecordingError, ValueError) as error:
        fail(f"{name} cannot be explained: {one_line(error)}")
    title = (
        f"predicted {_short(subject, best)} {_percent(confidence[best])}  |  "
        f"target {_short(subject, wanted)} {_percent(confidence[wanted])}  |  rule {rule}"
    )
    try:
        write_sheet(output, to_picture(inputs[0], *_normalisation(subject.transform)), panels, title)
    except OSError as error:
        fail(f"{str(output)!r} cannot be written: {one_line(error.strerror or error)}")
    _say("picture", str(output))


def _say(heading: str, text: str) -> None:
    click.echo(f"{heading:<12}{text}")


def _percent(confidence: Tensor) -> str:
    return f"{float(confidence):.1%}" if confidence >= 0.001 else "below 0.1%"


def _short(subject: Subject, index: int) -> str:
    return textwrap.shorten(subject.label(index).split(" (")[0], 28, placeholder="...")


def _check_output(path: Path) -> None:
    """Refuse what cannot be written before anything is computed."""
    if path.exists() and not path.is_file():
        fail(f"{str(path)!r} exists and is no file; expected a file to write the picture to")
    if path.suffix[1:].lower() not in FigureCanvasAgg.get_supported_filetypes():
        fail(f"the picture cannot be written as {path.name!r}; expected a name that ends in .png or .pdf, say")
    if not path.parent.is_dir():
        fail(f"there is no folder {str(path.parent)!r} to write the picture to")
    if not os.access(path.parent, os.W_OK):
        fail(f"the folder {str(path.parent)!r} cannot be written to")


def _scene(number: int) -> tuple[str, Image.Image]:
    scenes = zoo.scenes()
    if number >= len(scenes):
        fail(f"there is no scene {number}; expected 0 to {len(scenes) - 1}")
    names = " and ".join(CLASS_NAMES[label] for label in scenes[number].labels)
    return f"bundled scene {number}: {names}", scenes[number].image


def _normalisation(transform: Any) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels that the transform's last step takes away."""
    step = next((step for step in getattr(transform, "transforms", ()) if hasattr(step, "std")), None)
    return ([0.0] * 3, [1.0] * 3) if step is None else ([float(m) for m in step.mean], [float(d) for d in step.std])
