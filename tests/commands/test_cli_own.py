"""A user's own model, weights and class names on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result

from captum_lnstat import cli, explain, zoo
from captum_lnstat.explanation.subject import progress

CODE = """
import torch
from timm.models import VisionTransformer

def model():
    torch.manual_seed(3)
    made = VisionTransformer(img_size=64, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    torch.nn.init.normal_(made.head.weight)
    return made
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)
    Path("own_models.py").write_text(CODE)
    monkeypatch.delitem(sys.modules, "own_models", raising=False)
    zoo.scenes()[264].image.save("a.png")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="captum-lnstat")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_model_of_a_module_in_the_current_folder(tmp_path):
    before = list(sys.path)
    result = run("doctor", "own_models:model")
    assert result.exit_code == 0, result.stderr
    assert "8 x 8 patches of 8 x 8 px" in result.stdout
    found = json.loads(run("explain", "a.png", "--model", "own_models:model", "--picture", "overlay", "--json").stdout)
    model = sys.modules["own_models"].model().eval()
    with pytest.warns(UserWarning, match="does not say"):
        expected = explain(model, "a.png")
    assert found["grid"] == expected.grid.tolist()
    assert sys.path == before


def test_a_module_that_is_not_there_and_one_that_needs_another():
    result = run("doctor", "no_such_module_here:model")
    assert result.exit_code == 2
    assert "No module named 'no_such_module_here', neither installed nor in the current folder" in result.stderr
    Path("needs_another.py").write_text("import no_such_module_at_all")
    assert "No module named 'no_such_module_at_all'\n" in run("doctor", "needs_another:model").stderr


def test_an_installed_module_goes_before_one_of_the_current_folder(tmp_path):
    group = cli.OneLineGroup("group")
    group.command("show")(lambda: print(*sys.path, sep="\n"))
    assert CliRunner().invoke(group, ["show"]).stdout.splitlines() == [*sys.path, str(tmp_path)]


def test_the_weights_of_a_checkpoint_are_named(tmp_path):
    state = timm.models.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3
    ).state_dict()
    torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, "last.ckpt")
    taken = "last.ckpt: state_dict, names without 'model.'"
    model = ("--model", "own_models:model", "--checkpoint", "last.ckpt")
    result = run("explain", "a.png", *model, "--picture", "overlay")
    assert f"\nweights     {taken}\n" in result.stdout
    assert json.loads(run("explain", "a.png", *model, "--picture", "overlay", "--json").stdout)["weights"] == taken
    assert f"weights: {taken}\n" in run("explain", "a.png", "a.png", *model).stderr
    assert f"weights: {taken}\n" in run("compare", "a.png", *model, "--methods", "lnstat").stderr
    assert run("doctor", "own_models:model", "--checkpoint", "last.ckpt").stdout.endswith(f"\nweights: {taken}\n")
    assert json.loads(run("doctor", *model[1::2][:1], "--checkpoint", "last.ckpt", "--json").stdout)["weights"] == taken
    missing = run("doctor", "own_models:model", "--checkpoint", "no.ckpt")
    assert (missing.exit_code, missing.stderr) == (2, "Error: there is no checkpoint file 'no.ckpt'\n")


@pytest.mark.parametrize(
    "text", ["cat\ndog\nred fox\n", '["cat", "dog", "red fox"]', '{"0":"cat","1":"dog","2":"red fox"}']
)
def test_class_names_from_a_file(text):
    Path("names").write_text(text)
    options = ("--model", "own_models:model", "--class-names", "names", "--target", "Red Fox", "--picture", "overlay")
    result = run("explain", "a.png", *options)
    assert result.exit_code == 0, result.stderr
    assert "\ntarget      red fox (2), confidence " in result.stdout
    assert "red fox" in run("compare", "a.png", *options[:-2], "--methods", "lnstat").stdout


def test_class_names_that_do_not_fit():
    Path("names").write_text("cat\ndog\n")
    result = run("explain", "a.png", "--model", "own_models:model", "--class-names", "names")
    assert result.exit_code == 2
    assert result.stderr == "Error: 'names' holds 2 names; own_models:model has 3 classes\n"
