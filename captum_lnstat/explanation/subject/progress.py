"""Progress on stderr, for what takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

FIRST_WORD, NEXT_WORD = 2.0, 10.0  # seconds until progress is shown, and between its lines


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
        watcher.join()
