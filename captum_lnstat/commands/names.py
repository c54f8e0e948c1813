"""Names of models and classes as libraries write them down, read from their files: to import them takes seconds."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from captum_lnstat.commands.known import CLASSES, FAMILIES, RULES, ZOO
from captum_lnstat.errors import SourceError, near
from captum_lnstat.explanation.subject.names import read_class_names

_REGISTERED = re.compile(r"^@register_model(?:\(\))?\s.*?^def (\w+)", re.DOTALL | re.MULTILINE)
_NAMED = re.compile(r"@register_model\(name=['\"](\w+)")
_RENAMED = re.compile(r"register_model_deprecations\(__name__, \{(.*?)\}\)", re.DOTALL)
_KEY = re.compile(r"['\"]([\w.]+)['\"]\s*:")


@cache
def models_of(library: str) -> frozenset[str]:
    """The models that ``timm`` or ``torchvision`` registers, old names among them; nothing if it is not installed.

    Example:
        >>> "vit_tiny_patch16_224" in models_of("timm"), "swin_t" in models_of("torchvision")
        (True, True)
    """
    found: set[str] = set()
    for file in _files(library, "models/**/*.py"):
        text = file.read_text("utf-8")
        found.update(_REGISTERED.findall(text), _NAMED.findall(text))
        for renamed in _RENAMED.findall(text):
            found.update(_KEY.findall(renamed))
    return frozenset(found)


def imagenet_names() -> tuple[str, ...]:
    """The first name of each of ImageNet's thousand classes, in order; nothing if timm is not installed.

    Example:
        >>> imagenet_names()[281], len(imagenet_names())
        ('tabby', 1000)
    """
    (lemmas, *_), (synsets, *_) = (
        [file.read_text("utf-8").splitlines() for file in _files("timm", f"data/_info/imagenet_{name}.txt")] or [[]]
        for name in ("synset_to_lemma", "synsets")
    )
    named = dict(line.split("\t", 1) for line in lemmas if "\t" in line)
    return tuple(named.get(synset, synset).split(", ")[0] for synset in synsets)


def _files(library: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(library)
    folders = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    return [file for folder in folders for file in sorted(Path(folder).glob(pattern))]


def check_name(name: str) -> None:
    """A name that timm or torchvision, if it is there, does not have, or whose module is not there.

    Raises:
        SourceError: As for ``read_model``.
    """
    library, colon, _ = name.partition(":")
    if name in ZOO or library == "hf":
        return
    if colon and library != "torchvision":
        module = library.partition(".")[0]
        if module not in sys.modules and (not module or importlib.util.find_spec(module) is None):
            raise SourceError(f"{name!r}: No module named {module!r}, neither installed nor in the current folder")
        return
    known = [f"torchvision:{each}" for each in models_of(library)] if colon else list(models_of("timm"))
    if known and (name if colon else name.partition(".")[0]) not in known:
        own = [] if colon else ZOO
        otherwise = (
            "expected a name that torchvision knows"
            if colon
            else "expected swin-mini, vit-mini or a name that timm knows"
        )
        raise SourceError(f"unknown model {name!r}; {near(name, [*own, *sorted(known)], otherwise)}")


class ModelName(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """The name of a model; the shell is offered the families of this package."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = [name for name in sorted(models_of("timm")) if name.partition("_")[0] in FAMILIES]
        known += [f"torchvision:{name}" for name in sorted(models_of("torchvision")) if name.startswith(FAMILIES)]
        return _offered([*ZOO, *known], incomplete)


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names separated by commas."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, _ = incomplete.rpartition(",")
        given = before.split(",")
        return _offered([f"{before}{comma}{name}" for name in self.known if name not in given], incomplete)


class ClassName(click.ParamType):  # type: ignore[type-arg]
    """A class: of the file of names that is given, of the package's models, or of ImageNet."""

    name = "class"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        file, model = ctx.params.get("class_names"), ctx.params.get("name") or ZOO[0]
        try:
            own = read_class_names(Path(file)) if file is not None else CLASSES if model in ZOO else imagenet_names()
        except SourceError:
            return []
        # Shells part words at spaces and quotes: an underline stands for a space, and a name with a quote is left out.
        words = [each.split(", ")[0].replace(" ", "_") for each in own]
        return _offered([word for word in words if re.fullmatch(r"[\w.-]+", word)], incomplete)


def _offered(known: list[str], incomplete: str) -> list[CompletionItem]:
    folded = incomplete.casefold()
    return [CompletionItem(name) for name in known if name.casefold().startswith(folded)]


class RuleName(click.ParamType):  # type: ignore[type-arg]
    """A registered rule, or ``package.module:NAME``, whose module registers it."""

    name = "rule"

    def get_metavar(self, *args: Any, **kwargs: Any) -> str:
        return f"[{'|'.join(RULES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in RULES:
            return str(value)
        if ":" not in value:
            hint = near(value, RULES, "")
            self.fail(
                f"rule is {value!r}; expected one of {', '.join(map(repr, RULES))}, or the module that registers "
                f"another, package.module:NAME{f'; {hint}' if hint else ''}",
                param,
                ctx,
            )
        from captum_lnstat.rules import find_rule

        try:
            return find_rule(value).name
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _offered(list(RULES), incomplete)
