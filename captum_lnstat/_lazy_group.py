"""A click group whose commands are imported when they are run: its help and its completion need none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from captum_lnstat._console import OneLineGroup, fail

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
