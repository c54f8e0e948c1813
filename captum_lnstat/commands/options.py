"""What the commands have in common: which model and images, and mistakes that need no torch to be found."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from captum_lnstat.cli import INCOMPLETE, fail
from captum_lnstat.commands.known import CLASSES, FIGURES, SCENES, STREAM, ZOO, Kind
from captum_lnstat.commands.names import ModelName, check_name
from captum_lnstat.errors import near, one_line
from captum_lnstat.explanation.subject.files import check_image, check_weights, image_files
from captum_lnstat.explanation.subject.names import find_class

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES = "Exit codes: 0 done; 1 done, but some images were skipped; 2 nothing could be done; 130 interrupted."
# Pictures that are images alone, not sheets.
FILES: tuple[Kind, ...] = ("overlay", "original")


def model_options(command: Command) -> Command:
    """Which model: ``subject_options``, and ``--batch-size``."""
    batch = click.option(
        "--batch-size",
        type=click.IntRange(1),
        metavar="N",
        help="Images in the model at a time.  [default: 1; on a GPU 8]",
    )
    return subject_options(batch(command))


def subject_options(command: Command) -> Command:
    """``--model``, ``--pretrained``, ``--checkpoint``, ``--class-names``, and how it is run."""
    for option in (
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto: a GPU if there is one."
        ),
        click.option(
            "--whole", is_flag=True, help="Squeeze the whole image to the model's size, instead of cutting off borders."
        ),
        click.option(
            "--class-names",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Names of the classes: one a line, or JSON.",
        ),
        click.option(
            "--checkpoint",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Weights for the model: .safetensors, or what torch.save wrote, of which only tensors are loaded; "
            "wherever in it, and with whatever prefix, they are.",
        ),
        click.option("--pretrained", is_flag=True, help="Take the library's weights; they are downloaded."),
        click.option(
            "--model",
            "name",
            type=ModelName(),
            default="swin-mini",
            show_default=True,
            metavar="NAME",
            help='"swin-mini" or "vit-mini", which come with the package and know seven kinds of clothes; a ViT or '
            "Swin that timm knows; torchvision:NAME; hf:NAME, a model of Hugging Face; module:function, also of the "
            "current folder.",
        ),
    ):
        command = option(command)
    return command


def look_options(command: Command) -> Command:
    """``--colormap``, ``--alpha``, ``--grey`` or ``--colour``, ``--contour``."""
    for option in (
        click.option("--contour", is_flag=True, help="A line around the fifth of the pixels that is most relevant."),
        click.option(
            "--grey/--colour",
            default=None,
            help="The photograph below the map in grey, so that colour is the map's, or in its colours.  [default: in "
            "colour; below signs grey]",
        ),
        click.option(
            "--alpha",
            type=click.FloatRange(0, 1),
            metavar="A",
            help="How much the map covers where it is strongest, 0 to 1.  [default: 0.75; on grey 0.9]",
        ),
        click.option(
            "--colormap", metavar="NAME", help="A colormap of matplotlib.  [default: inferno; RdBu_r for signs]"
        ),
    ):
        command = option(command)
    return command


def check_model(
    name: str, pretrained: bool, checkpoint: Path | None, class_names: Path | None, targets: Sequence[str] = ()
) -> None:
    """Mistakes in the options of a model that can be told without a library of models."""
    if pretrained and checkpoint is not None:
        fail("--pretrained and --checkpoint exclude each other; give one of them")
    if pretrained and name in ZOO:
        fail(
            f"{name} comes with its weights, so --pretrained says nothing; leave it out, or give the --model it is for"
        )
    library, colon, _ = name.partition(":")
    if library == "hf" and colon and importlib.util.find_spec("transformers") is None:
        fail(f"{name} needs transformers, which is not installed; pip install 'captum-lnstat[hf]' brings it")
    if checkpoint is not None and not checkpoint.is_file():
        fail(f"there is no checkpoint file {str(checkpoint)!r}")
    if checkpoint is not None:
        check_weights(checkpoint)
    if class_names is not None and not class_names.is_file():
        fail(f"there is no file of class names {str(class_names)!r}")
    check_name(name)
    if name in ZOO and checkpoint is None and class_names is None:
        for target in targets:
            find_class(target, CLASSES, len(CLASSES))


def check_look(colormap: str | None) -> None:
    """A colormap that matplotlib does not have."""
    if colormap is None:
        return
    import matplotlib as mpl

    if colormap not in mpl.colormaps:
        known = list(mpl.colormaps)
        fail(f"unknown colormap {colormap!r}; {near(colormap, known, 'expected one of matplotlib, as viridis')}")


def warn(cautions: Sequence[str]) -> None:
    """What the user should know before believing a picture."""
    for caution in cautions:
        click.echo(f"Warning: {caution}", err=True)


def find_images(given: Sequence[str]) -> tuple[tuple[Path, ...], bool]:
    """Every file given, the images in a folder, the files that a pattern matches; and whether that may be several."""
    found: list[Path] = []
    several = len(given) > 1
    for text in given:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
            fail(f"{text!r} is an address; expected a file. Download it first, and give its name here")
        path = Path(text)
        if path == STREAM and several:
            fail("- is one image, from standard input; give it alone")
        if path.is_dir():
            found += image_files(path)
            several = True
            _say_what_is_left_out(path)
        elif not path.exists() and glob.has_magic(text):
            matched = sorted(Path(each) for each in glob.glob(text, recursive=True) if Path(each).is_file())  # noqa: PTH207
            if not matched:
                fail(f"no file matches {text!r}")
            found += matched
            several = True
        else:
            found.append(path)
    return tuple(found), several


def check_scenes(numbers: Sequence[int]) -> None:
    """A scene that the package does not have."""
    for number in numbers:
        if number >= SCENES:
            fail(f"there is no scene {number}; expected 0 to {SCENES - 1}")


def check_there(images: Sequence[Path]) -> None:
    """Some image has to be there, and a single one to be an image."""
    if images and not any(path.is_file() or path == STREAM for path in images):
        fail(
            f"there is no file {str(images[0])!r}"
            if len(images) == 1
            else f"none of the {len(images)} files is there, {str(images[0])!r} for one"
        )
    if len(images) == 1 and images[0] != STREAM:
        check_image(images[0])


def _say_what_is_left_out(folder: Path) -> None:
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if inside:
        named = ", ".join(inside[:3]) + ", ..." * (len(inside) > 3)
        click.echo(
            f"Not looked into: {len(inside)} folder{'s' * (len(inside) > 1)} in {folder} ({named}); "
            f"'{folder}/**/*.jpg' in quotes is every .jpg in it, however deep",
            err=True,
        )


def suffixes_of(kind: Kind) -> frozenset[str]:
    """The endings that such a picture can be written with."""
    if kind not in FILES:
        return FIGURES
    from PIL import Image

    return frozenset(suffix[1:] for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)


def check_output(path: Path, suffixes: frozenset[str], what: str = "the picture") -> None:
    """Refuse a file that cannot be written before anything is computed."""
    if path == STREAM:
        return
    if path.exists() and not path.is_file():
        fail(f"{str(path)!r} exists and is no file; expected a file to write {what} to")
    if path.suffix[1:].lower() not in suffixes:
        endings = ".png or .jpg, say" if "jpg" in suffixes else " or ".join(f".{suffix}" for suffix in sorted(suffixes))
        fail(f"{what} cannot be written as {path.name!r}; expected a name that ends in {endings}")
    if not path.parent.is_dir():
        fail(f"there is no folder {str(path.parent)!r} to write {what} to")
    if not os.access(path.parent, os.W_OK):
        fail(f"the folder {str(path.parent)!r} cannot be written to")


@contextmanager
def to_stream(output: Path) -> Iterator[Path]:
    """The file to write a picture to: for ``-`` one that goes to standard output once it is whole."""
    if output != STREAM:
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.png")
        yield file
        sys.stdout.buffer.write(file.read_bytes())


def check_stream(as_json: bool) -> None:
    """Refuse to write a picture where nobody can see it."""
    if as_json:
        fail("--json and --output - both go to standard output; give --output a file")
    if sys.stdout.isatty():
        fail("--output - writes a picture to standard output, which is a terminal; add > FILE or | another command")


def check_folder(path: Path, images: tuple[Path, ...]) -> None:
    """Refuse a folder of pictures that cannot be one; it is made if it is not there."""
    if path.exists() and not path.is_dir():
        fail(f"{str(path)!r} exists and is no folder; several images need a folder for their pictures")
    if any(image.parent.resolve() == path.resolve() for image in images):
        fail(f"the folder {str(path)!r} is that of the images; expected another one for their pictures")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"the folder {str(path)!r} cannot be made: {error.strerror}")
    if not os.access(path, os.W_OK):
        fail(f"the folder {str(path)!r} cannot be written to")


class Skipped:
    """The images of many that could not be explained: named one by one, counted at the end.

    Args:
        count: How many images there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.records: list[dict[str, str]] = []

    def add(self, image: object, error: Exception, *, as_json: bool = False) -> None:
        """Name an image, with what is wrong with it."""
        from captum_lnstat.explanation.subject.progress import ProgressBar

        self.records.append({"image": str(image), "error": one_line(error)})
        with ProgressBar.external_write_mode():
            click.echo(f"Skipped {image}: {one_line(error)}", err=True)
            if as_json:
                click.echo(json.dumps(self.records[-1]))

    def check(self) -> None:
        """End the command if nothing is left."""
        if len(self.records) == self.count:
            fail(f"none of {self.count} images could be explained")

    def finish(self) -> None:
        """Count, and say by the exit code that something was left out."""
        if self.records:
            click.echo(f"{len(self.records)} of {self.count} images skipped", err=True)
            click.get_current_context().exit(INCOMPLETE)
