"""How the command speaks: errors of one line, and progress on stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from captum_lnstat._near import near as near
from captum_lnstat.errors import SourceError

FIRST_WORD, NEXT_WORD = 2.0, 10.0  # seconds until progress is shown, and between its lines


# Exit codes: something was left out, or a model is refused; nothing could be done; Ctrl-C, as shells count it.
INCOMPLETE, FAILED, INTERRUPTED = 1, 2, 130


class Failure(click.ClickException):
    exit_code = FAILED


class OneLineGroup(click.Group):
    """A group whose errors, and those of its commands, are one line without a usage text around it."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _one_line_errors():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            ctx.exit(INTERRUPTED)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        raise Failure(one_line(error.format_message())) from None
    except SourceError as error:
        raise Failure(one_line(error)) from None


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def fail(text: str) -> NoReturn:
    raise Failure(text)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is running once it has taken two seconds, and then every ten."""
    done, begin = threading.Event(), time.monotonic()

    def watch() -> None:
        wait = FIRST_WORD
        while not done.wait(wait):
            click.echo(f"{what}: {time.monotonic() - begin:.0f} s so far", err=True)
            wait = NEXT_WORD

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(FIRST_WORD)
