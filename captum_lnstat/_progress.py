"""Progress bars."""

from __future__ import annotations

import threading

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[misc]
    """tqdm's bar with a lock of this process alone.

    tqdm's own lock is shared by all processes that were forked from one another. Whichever of them is killed while it
    holds the lock leaves the others waiting for ever. Bars of two processes may now be written at the same time, which
    is a matter of looks.
    """


ProgressBar.set_lock(threading.RLock())
