"""``captum-lnstat evaluate`` as it is called."""

import csv
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from captum_lnstat.cli import main
from captum_lnstat.commands.evaluate import evaluate
from captum_lnstat.evaluation import methods
from captum_lnstat.evaluation.datasets import KINDS
from captum_lnstat.evaluation.measures import MEASURES


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    result = CliRunner().invoke(main, command(folder))
    assert result.exit_code == 0, result.output
    return folder, result


def command(folder, *more):
    options = {"--model": "vit-mini", "--methods": "rollout,random", "--metrics": "pointing,two", "--limit": "8"}
    return ["evaluate", *(part for pair in options.items() for part in pair), "--output", str(folder), *more]


def test_a_run_writes_all_its_files(finished):
    folder, result = finished
    names = {file.name for file in folder.iterdir()}
    assert names >= {"results.csv", "summary.json", "table.md", "figure.png", "timing.json", "manifest.json"}
    assert not [name for name in names if name.endswith(".part")]
    assert result.stdout == (folder / "table.md").read_text()
    assert "| rollout |" in result.stdout
    assert "| random |" in result.stdout
    with Image.open(folder / "figure.png") as figure:
        assert figure.size[0] > 300
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert all(float(row["seconds"]) >= 0 for row in rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"]["model"] == "vit-mini"
    low, high = summary["methods"]["rollout"]["metrics"]["two"]["interval"]
    assert 0 <= low <= summary["methods"]["rollout"]["metrics"]["two"]["value"] <= high <= 1


def test_the_same_command_again_computes_nothing(finished):
    folder, _ = finished
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    result = CliRunner().invoke(main, command(folder, "--json"))
    assert result.exit_code == 0
    assert "going on: 8 of 8 samples are there" in result.stderr
    assert json.loads(result.stdout) == json.loads(before["summary.json"])
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seed", "4"], "seed was 0 and is 4"),
        (["--methods", "rolout"], "unknown method 'rolout'; did you mean 'rollout'"),
        (["--metrics", "points"], "unknown metric 'points'"),
        (["--data", "voc:nowhere"], "there is no file or folder 'nowhere'"),
        (["--model", "vit-min"], "did you mean 'vit-mini'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--class", "none"], "'none' is not one of"),
    ],
)
def test_what_makes_no_sense_is_one_line(finished, more, message):
    result = CliRunner().invoke(main, command(finished[0], *more))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_only_the_samples_of_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("scene-00004\nscene-00002\n")
    result = CliRunner().invoke(main, command(tmp_path / "run", "--only", str(tmp_path / "names.txt")))
    assert result.exit_code == 0, result.output
    with (tmp_path / "run" / "results.csv").open() as file:
        assert {row["group"] for row in csv.DictReader(file)} == {"scene-00002", "scene-00004"}


PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_page_names_all_there_is():
    text = PAGE.read_text()
    for name in (*KINDS, *methods.names(), *MEASURES, *(parameter.opts[0] for parameter in evaluate.params)):
        assert re.search(rf"`(?:[^`]*[ ,|])?{re.escape(name)}\b", text) or f" {name} " in text, name


def test_the_pages_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(block, str(PAGE), "exec"), {})
    assert "'interval'" in capsys.readouterr().out
    assert (tmp_path / "run" / "figure.png").stat().st_size > 1000


def test_a_run_that_measured_nothing_is_no_success(tmp_path):
    arguments = [
        "evaluate",
        "--methods",
        "rollout",
        "--metrics",
        "pointing",
        "--limit",
        "2",
        "--output",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "No metric has a value" in result.stdout
    assert result.stderr.endswith(
        "Error: nothing was measured: no metric has a value on these 2 samples; take a larger --limit\n"
    )
    few = CliRunner().invoke(main, [*arguments[:-3], "6", "--output", str(tmp_path / "s")])
    assert few.exit_code == 0
    assert "(pointing 1)" in few.stdout
    assert "[" not in few.stdout
