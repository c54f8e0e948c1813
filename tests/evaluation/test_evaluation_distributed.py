"""Several processes, and processes that are killed, give what one undisturbed process gives, byte for byte.

They are started as ``torchrun`` starts them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.datasets import open_dataset
from captum_lnstat.evaluation.run import Settings, evaluate
from captum_lnstat.evaluation.subject import read
from captum_lnstat.evaluation.team import Team

pytest.importorskip("torchmetrics", reason="torchmetrics, which adds up over processes, is not installed")

HERE = Path(__file__).parents[1]
METRICS, BATCH = "pointing,energy,segmentation,two", 2
ALONE = Team(0, 1, torch.device("cpu"))
# Seconds for anything here to happen; other programs may be running.
PATIENCE = 240


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    monkeypatch.setattr(figure, "png", lambda summary, title: b"")


@pytest.fixture(scope="module")
def alone():
    """Evaluates in this process."""
    subject, dataset = read("vit-mini"), open_dataset("scenes")

    def run(folder, methods, limit):
        settings = Settings("scenes", "vit-mini", methods, METRICS, "true", limit=limit, batch_size=BATCH)
        return evaluate(settings, dataset, subject, folder, ALONE)

    return run


@contextlib.contextmanager
def processes(size, *arguments, **variables):
    """Python with these arguments, so many times; whatever happens, none of them is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([*map(str, (HERE.parent, HERE)), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path, **variables}
    started = []
    try:
        for rank in range(size):
            own = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **common}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            command = [sys.executable, *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=PATIENCE)


def command(folder, methods, limit):
    options = {"model": "vit-mini", "methods": methods, "metrics": METRICS, "limit": limit, "batch-size": BATCH}
    options |= {"device": "cpu", "output": folder}
    return ["-m", "captum_lnstat", "evaluate", *(part for name in options for part in (f"--{name}", options[name]))]


def ends(process):
    """Exit code, and what was said on stdout and stderr."""
    said = process.communicate(timeout=PATIENCE)
    return process.returncode, *said


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("summary.json", "table.md")}


def records(folder):
    """Complete records by the file they are in."""
    return {file: file.read_bytes().split(b"\n")[:-1] for file in folder.glob("records/*.jsonl")}


def indices(folder):
    return sorted(json.loads(line)["index"] for lines in records(folder).values() for line in lines)


def test_processes_share_the_work_and_give_the_same(tmp_path, alone):
    """Five batches for two processes."""
    methods, limit = "inputxgradient,random", 10
    alone(tmp_path / "alone", methods, limit)
    with processes(2, *command(tmp_path / "two", methods, limit)) as started:
        for process in started:
            code, _, said = ends(process)
            assert code == 0, said
    assert files(tmp_path / "two") == files(tmp_path / "alone")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["questions"] == limit
    assert indices(tmp_path / "two") == indices(tmp_path / "alone")
    assert sorted(map(len, records(tmp_path / "two").values())) == [4, 6]


def test_a_killed_process_is_missed_and_the_run_goes_on_with_others(tmp_path, alone):
    """One of two, the one that leads, is killed halfway: the other says so and ends. Then one alone goes on.

    No image is lost, none counts twice, the summary is the same.
    """
    methods, limit = "helpers.slow_method:Plain(call=4),random", 8
    alone(tmp_path / "alone", methods, limit)
    folder = tmp_path / "killed"
    with processes(2, *command(folder, methods, limit), HELD=0) as (leads, other):
        deadline = time.monotonic() + PATIENCE
        # Two batches of the one, one of the other, which is in its second: methods of others get one image at a time.
        while sorted(map(len, records(folder).values())) != [BATCH, 2 * BATCH]:
            assert time.monotonic() < deadline
            assert (leads.poll(), other.poll()) == (None, None), ends(leads if other.poll() is None else other)
            time.sleep(0.05)
        leads.kill()
        code, _, said = ends(other)
        assert ends(leads)[0] == -signal.SIGKILL
        assert code == 2, said
        assert "Error: " in said
        assert "Traceback" not in said
    assert not (folder / "summary.json").exists()
    # As if the last write had not come to its end.
    torn = next(iter(records(folder)))
    torn.write_bytes(torn.read_bytes()[:-9])
    alone(folder, methods, limit)
    assert files(folder) == files(tmp_path / "alone")
    assert indices(folder) == indices(tmp_path / "alone")


FAILS = """
from captum_lnstat.evaluation.run import _together
from captum_lnstat.evaluation.team import team

class Odd(LookupError):
    def __init__(self, one, other):  # cannot be copied
        super().__init__(one)

def work(error):
    raise error

with team("cpu") as members:
    for error in (OSError(2, "no disk"), ZeroDivisionError("by nothing"), Odd("at all", 2)):
        try:
            _together(members, lambda: work(error))
        except Exception as found:
            print(type(found).__name__, found)
    assert _together(members, lambda: members.rank) == 0
"""


def test_an_error_of_any_type_in_the_first_process_reaches_the_others():
    with processes(2, "-c", FAILS) as (leads, other):
        found = [ends(process) for process in (leads, other)]
    assert [code for code, *_ in found] == [0, 0], found
    at_first = ["FileNotFoundError [Errno 2] no disk", "ZeroDivisionError by nothing"]
    assert found[0][1].splitlines() == [*at_first, "Odd at all"]
    assert found[1][1].splitlines() == [*at_first, "RunError Odd: at all"]
