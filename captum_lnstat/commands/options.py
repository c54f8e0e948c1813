"""What the commands have in common: which model, which images, which class, and how a picture is announced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from captum_lnstat import zoo
from captum_lnstat.cli import INCOMPLETE, fail
from captum_lnstat.errors import SourceError, one_line
from captum_lnstat.explanation.subject.images import Item, image_files
from captum_lnstat.explanation.subject.progress import ProgressBar
from captum_lnstat.explanation.subject.subject import Subject, read_subject
from captum_lnstat.rules import find_rule, rule_names

Command = TypeVar("Command", bound=Callable[..., Any])

EXIT_CODES = "Exit codes: 0 done; 1 done, but some images were skipped; 2 nothing could be done; 130 interrupted."


class RuleName(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A registered rule, or ``package.module:NAME``, whose module registers it."""

    name = "rule"

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        return f"[{'|'.join(rule_names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return find_rule(value).name
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in rule_names() if name.startswith(incomplete)]


def model_options(command: Command) -> Command:
    """``--model``, ``--pretrained``, ``--checkpoint``, ``--class-names``, ``--whole``."""
    for option in (
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
            default="swin-mini",
            show_default=True,
            metavar="NAME",
            help='"swin-mini" or "vit-mini", trained models that come with the package; a ViT or Swin that timm knows; '
            "torchvision:NAME; hf:NAME, a model of Hugging Face; module:function, also of the current folder.",
        ),
    ):
        command = option(command)
    return command


def read_model(name: str, pretrained: bool, checkpoint: Path | None, class_names: Path | None, whole: bool) -> Subject:
    """The model of the options."""
    if pretrained and checkpoint is not None:
        fail("--pretrained and --checkpoint exclude each other; give one of them")
    subject = read_subject(name, pretrained, checkpoint)
    if class_names is not None:
        subject = subject.named(class_names)
    if whole:
        subject = replace(subject, preprocessing=subject.preprocessing.whole())
    return subject


def warn(cautions: Sequence[str]) -> None:
    """What the user should know before believing a picture."""
    for caution in cautions:
        click.echo(f"Warning: {caution}", err=True)


def image_paths(images: tuple[Path, ...]) -> tuple[Path, ...]:
    """Every file given, and for a folder the images in it."""
    found: list[Path] = []
    for path in images:
        found += image_files(path) if path.is_dir() else [path]
    return tuple(found)


def bundled_scene(number: int) -> tuple[str, Item]:
    """A scene of the package, and what it shows in words."""
    scenes = zoo.scenes()
    if number >= len(scenes):
        raise SourceError(f"there is no scene {number}; expected 0 to {len(scenes) - 1}")
    return f"bundled scene {number}: {scenes[number].title}", Item(f"scene-{number}", scenes[number].image)


def check_output(path: Path, suffixes: set[str]) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    if path.exists() and not path.is_file():
        fail(f"{str(path)!r} exists and is no file; expected a file to write the picture to")
    if path.suffix[1:].lower() not in suffixes:
        fail(f"the picture cannot be written as {path.name!r}; expected a name that ends in .png or .jpg, say")
    if not path.parent.is_dir():
        fail(f"there is no folder {str(path.parent)!r} to write the picture to")
    if not os.access(path.parent, os.W_OK):
        fail(f"the folder {str(path.parent)!r} cannot be written to")


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
