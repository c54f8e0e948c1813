"""Progress on stderr, for what takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from tqdm import tqdm

FIRST_WORD, NEXT_WORD = 2.0, 10.0  # seconds until progress is shown, and between its lines


class ProgressBar(tqdm):  # type: ignore[misc]
    """tqdm's bar with a lock of this process alone.

    tqdm's own lock is shared by all processes that were forked from one another. Whichever of them is killed while it
    holds the lock leaves the others waiting for ever. Bars of two processes may now be written at the same time, which
    is a matter of looks.
    """


ProgressBar.set_lock(threading.RLock())


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
