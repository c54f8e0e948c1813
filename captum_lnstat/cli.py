"""The command ``captum-lnstat``: a group whose commands are imported when they are run."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from captum_lnstat._version import __version__
from captum_lnstat.errors import SourceError, near, one_line

_PACKAGE = __package__.partition(".")[0]


@dataclass(frozen=True)
class Entry:
    """One command of a group.

    Attributes:
        path: ``"module:attribute"`` of the click command.
        help: What it does, in a few words; shown by the group without importing the command.
        extra: The pip extra that brings the packages which the command needs beyond the package's own.
    """

    path: str
    help: str
    extra: str | None = None


# Exit codes: something was left out, or a model is refused; nothing could be done; Ctrl-C, as shells count it.
INCOMPLETE, FAILED, INTERRUPTED = 1, 2, 130


class Failure(click.ClickException):
    """What ends the command, in one line."""

    exit_code = FAILED


class OneLineGroup(click.Group):
    """A group whose errors, and those of its commands, are one line without a usage text around it."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _one_line_errors(), _one_line_warnings(), _current_folder():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules in the current folder can be imported, after all that are installed: nothing there gets in their way."""
    here = str(Path.cwd())
    added = not {here, ""} & set(sys.path)
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        raise Failure(one_line(error.format_message())) from None
    except SourceError as error:
        raise Failure(one_line(error)) from None


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Which line of whose code warned is nothing to those who run a command: what is shown is the text."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def fail(text: str) -> NoReturn:
    """End the command with one line of error."""
    raise Failure(text)


class LazyGroup(OneLineGroup):
    """A group of commands that are imported on use.

    Args:
        entries: The commands by name, in the order in which the help lists them.
        *args: As for ``click.Group``.
        **kwargs: As for ``click.Group``.
    """

    def __init__(self, *args: Any, entries: Mapping[str, Entry] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entries = dict(entries or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.entries and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = near(args[0], list(self.entries), f"expected one of {', '.join(self.entries)}")
            fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.path.partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            self._refuse(cmd_name, error)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:  # a command may import what it needs only once it runs
            self._refuse(ctx.invoked_subcommand or "", error)

    def _refuse(self, name: str, error: ModuleNotFoundError) -> NoReturn:
        """A package that is not there is one line, naming what brings it."""
        extra = self.entries[name].extra if name in self.entries else None
        missing = (error.name or "").partition(".")[0]
        if extra is None or missing in ("", _PACKAGE):
            raise error
        fail(f"{name} needs {missing}, which is not installed; pip install 'captum-lnstat[{extra}]' brings it")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        # Options of the group, as click gives them, without its list of commands: that one imports them all.
        options: Sequence[CompletionItem] = click.Command.shell_complete(self, ctx, incomplete)
        names = [name for name in self.entries if name.startswith(incomplete)]
        return [*(CompletionItem(name, help=self.entries[name].help) for name in names), *options]


_COMMANDS = {
    "explain": Entry("captum_lnstat.commands.explain:explain", "Explain an image, or a folder of them."),
    "compare": Entry("captum_lnstat.commands.compare:compare", "Several methods on several images, on one sheet."),
    "report": Entry("captum_lnstat.commands.report:report", "Many explained images on one page, as one file."),
    "evaluate": Entry(
        "captum_lnstat.commands.evaluate:evaluate", "Measure methods on a data set of images.", "evaluate"
    ),
    "doctor": Entry("captum_lnstat.commands.doctor:doctor", "Say what is recognised in a model, or why it is refused."),
    "demo": Entry("captum_lnstat.commands.demo:demo", "Serve a web page to try it on.", "demo"),
}

# The bytes \b keep click from running the lines together.
_EPILOG = """\b
Examples:
  captum-lnstat explain
  captum-lnstat explain cat.jpg --model vit_small_patch16_224 --pretrained --target "tabby cat"
  captum-lnstat doctor torchvision:swin_t

\b
Completion in the shell, here bash (or zsh_source, fish_source):
  eval "$(_CAPTUM_LNSTAT_COMPLETE=bash_source captum-lnstat)"

Exit codes: 0 done; 1 done in part, or the model is refused; 2 nothing could be done; 130 interrupted.
"""


@click.group(
    cls=LazyGroup,
    entries=_COMMANDS,
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="captum-lnstat")
@click.pass_context
def main(context: click.Context) -> None:
    """Explain what of an image counted for a class in a ViT or Swin model, or what the model looked at."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
