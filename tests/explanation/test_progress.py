"""Progress bars keep to their own process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tqdm import tqdm

import captum_lnstat
from captum_lnstat.explanation.subject.progress import ProgressBar

# A child that was forked from this process, and is killed while it writes its bar.
CODE = """
    import os, signal
    from {module} import {bar} as bar
    list(bar([1]))
    child = os.fork()
    if not child:
        bar.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    print(list(bar([1, 2])))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be forked here")
def test_a_killed_process_leaves_no_bar_waiting() -> None:
    code = textwrap.dedent(CODE).format(module=ProgressBar.__module__, bar=ProgressBar.__name__)
    environment = {**os.environ, "PYTHONPATH": str(Path(captum_lnstat.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240, env=environment)
    assert done.stdout == "[1, 2]\n"


def test_the_bars_of_others_keep_their_lock() -> None:
    assert ProgressBar.get_lock() is not tqdm.get_lock()


def test_no_other_bar_is_drawn() -> None:
    folder = Path(captum_lnstat.__file__).parent
    drawing = [
        file.relative_to(folder).as_posix() for file in folder.rglob("*.py") if "tqdm" in file.read_text("utf-8")
    ]
    assert drawing == [Path(sys.modules[ProgressBar.__module__].__file__ or "").relative_to(folder).as_posix()]
