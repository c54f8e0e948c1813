"""Several processes, and processes that are killed, give what one undisturbed process gives, byte for byte."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch

from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.datasets import open_dataset
from captum_lnstat.evaluation.run import Settings, evaluate
from captum_lnstat.evaluation.subject import read
from captum_lnstat.evaluation.team import Team, team

pytest.importorskip("torchmetrics", reason="torchmetrics, which adds up over processes, is not installed")
# Python 3.12 and later warn of forks in a process that has threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")

LIMIT, METRICS = 12, "pointing,energy,segmentation,two"


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    monkeypatch.setattr(figure, "png", lambda summary, title: b"")


@pytest.fixture(scope="module")
def subject():
    return read("vit-mini")


@pytest.fixture(scope="module")
def dataset():
    return open_dataset("scenes")


def work(subject, dataset, folder, members, methods):
    settings = Settings("scenes", "vit-mini", methods, METRICS, "true", limit=LIMIT, batch_size=2)
    return evaluate(settings, dataset, subject, folder, members)


def _member(rank, size, port, *rest):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    with team("cpu") as members:
        subject, dataset, folder, methods = rest
        work(subject, dataset, folder, members, methods)


def start(size, *rest):
    """As torchrun starts them, but forked, which does not import everything again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_member, args=(rank, size, port, *rest), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("summary.json", "table.md")}


def lines(folder):
    return [line for file in folder.glob("records/*.jsonl") for line in file.read_bytes().split(b"\n")[:-1]]


def test_processes_share_the_work_and_give_the_same(tmp_path, subject, dataset):
    methods = "inputxgradient,random"
    work(subject, dataset, tmp_path / "1", Team(0, 1, torch.device("cpu")), methods)
    expected = files(tmp_path / "1")
    assert json.loads(expected["summary.json"])["questions"] == LIMIT
    for size in (2, 4):
        folder = tmp_path / str(size)
        for process in start(size, subject, dataset, folder, methods):
            process.join(240)
            assert process.exitcode == 0
        assert files(folder) == expected
        assert sorted(json.loads(line)["index"] for line in lines(folder)) == [
            json.loads(line)["index"] for line in sorted(lines(tmp_path / "1"), key=lambda x: json.loads(x)["index"])
        ]
        assert len(list(folder.glob("records/*.jsonl"))) == size


def test_a_killed_run_goes_on_with_other_processes(tmp_path, subject, dataset):
    """Two processes killed halfway, then one alone: no image is lost, none counts twice, the summary is the same."""
    methods = "slow_method:Slow(seconds=0.05),random"
    alone = Team(0, 1, torch.device("cpu"))
    work(subject, dataset, tmp_path / "whole", alone, methods)
    folder = tmp_path / "killed"
    processes = start(2, subject, dataset, folder, methods)
    deadline = time.monotonic() + 240
    while not lines(folder) and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    before = lines(folder)
    assert 0 < len(before) < LIMIT
    assert not (folder / "summary.json").exists()
    # As if the last write had not come to its end.
    torn = next(file for file in folder.glob("records/*.jsonl") if file.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-9])
    work(subject, dataset, folder, alone, methods)
    assert files(folder) == files(tmp_path / "whole")
    found = [json.loads(line)["index"] for line in lines(folder)]
    assert len(found) == len(set(found)) == LIMIT
