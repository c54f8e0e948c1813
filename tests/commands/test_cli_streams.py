"""``-``: an image from standard input, a picture to standard output."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captum_lnstat import cli, zoo
from captum_lnstat.commands import options
from captum_lnstat.explanation.subject import progress


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)
    zoo.scenes()[264].image.save("a.png")


def run(*arguments: object, given: bytes = b"") -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], input=given)


def test_standard_input_and_output_are_a_dash():
    photo = Path("a.png").read_bytes()
    result = run("explain", "a.png", "--picture", "overlay")
    assert result.exit_code == 0, result.stderr
    expected = Path("lnstat.png").read_bytes()
    result = run("explain", "-", "--picture", "overlay", "--output", "-", given=photo)
    assert result.exit_code == 0, result.stderr
    with Image.open(io.BytesIO(result.stdout_bytes)) as drawn, Image.open(io.BytesIO(expected)) as file:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(file))
        assert json.loads(drawn.text["captum-lnstat"])["image"] == "stdin"
    assert "image       standard input\n" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "lnstat.png"]
    result = run("compare", "-", "--methods", "lnstat", "--output", "-", given=photo)
    assert result.stdout_bytes.startswith(b"\x89PNG")
    assert "-: predicted" in result.stderr
    result = run("explain", "-", "--json", given=photo)
    assert json.loads(result.stdout)["image"] == "standard input"
    result = run("explain", "-", given=b"no image")
    says = "Error: 'standard input' cannot be read as an image: cannot identify image file\n"
    assert (result.exit_code, result.stderr) == (2, says)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("explain - a.png", "- is one image, from standard input; give it alone"),
        ("explain a.png -", "- is one image, from standard input; give it alone"),
        ("explain a.png --output - --json", "--json and --output - both go to standard output"),
        ("explain a.png --output - --save-map npy", "give a name that ends in .npy"),
        ("compare --output - --json", "--json and --output - both go to standard output"),
    ],
)
def test_a_dash_that_makes_no_sense_is_refused(command, says):
    result = run(*command.split())
    assert result.exit_code == 2
    assert says in result.stderr


def test_a_picture_is_not_written_to_a_terminal(monkeypatch):
    monkeypatch.setattr(options.sys, "stdout", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(cli.Failure, match="which is a terminal"):
        options.check_stream(as_json=False)
