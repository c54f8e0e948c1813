"""Help and mistakes in arguments are answered before torch is loaded; what is written down for it is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from captum_lnstat import zoo
from captum_lnstat.commands import known
from captum_lnstat.commands.options import RuleName
from captum_lnstat.rules import rule_names
from captum_lnstat.visualize import METHODS
from captum_lnstat.visualize.compare import SCALES

_CODE = """
import sys
from captum_lnstat.cli import main
code = 0
for line in sys.stdin.read().splitlines():
    try:
        main(line.split(), prog_name="captum-lnstat")
    except SystemExit as end:
        print(end.code, "|", line)
heavy = {"torch", "timm", "captum", "matplotlib", "torchvision", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
# With the exit code of each, and what is said.
_LINES = {
    "explain --help": (0, "Usage: captum-lnstat explain"),
    "compare --help": (0, "Usage: captum-lnstat compare"),
    "doctor --help": (0, "Usage: captum-lnstat doctor"),
    "evaluate --help": (0, "Usage: captum-lnstat evaluate"),
    "explain --targt 3": (2, "--targt"),
    "explain nowhere.png": (2, "there is no file 'nowhere.png'"),
    "explain nowhere.png nothing.png": (2, "none of the 2 files is there, 'nowhere.png' for one"),
    "explain https://example.org/cat.jpg": (2, "'https://example.org/cat.jpg' is an address; expected a file"),
    "explain nowhere/*.jpg": (2, "no file matches 'nowhere/*.jpg'"),
    "explain --rule lnsat": (2, "rule is 'lnsat'; expected one of 'lnstat', 'evidence'"),
    "explain --model swin-mny": (2, "unknown model 'swin-mny'; did you mean 'swin-mini'"),
    "explain --target troser": (2, "unknown class 'troser'; did you mean 'trouser'?"),
    "explain --checkpoint nowhere.pth": (2, "there is no checkpoint file 'nowhere.pth'"),
    "explain --class-names nowhere.txt": (2, "there is no file of class names 'nowhere.txt'"),
    "explain --output nowhere/a.png": (2, "there is no folder 'nowhere'"),
    "explain --output a.nope": (2, "cannot be written as 'a.nope'"),
    "explain --pretrained": (2, "swin-mini comes with its weights, so --pretrained says nothing"),
    "explain --top-k 3 --picture layers": (2, "--picture layers shows one target"),
    "explain --save-map a.csv": (2, "the map cannot be written as 'a.csv'; expected a name that ends in .npy or .npz"),
    "explain --alpha 2": (2, "2.0 is not in the range"),
    "compare --methods lnstat,chefr": (2, "unknown method 'chefr'; did you mean 'chefer'?"),
    "compare --target 1 --target 2": (2, "compare shows one target, 2 are given"),
    "report --help": (0, "Usage: captum-lnstat report"),
    "report": (2, "Missing argument"),
    "report nowhere": (2, "there is no file 'nowhere'"),
    "report nowhere --output report.pdf": (2, "the page cannot be written as 'report.pdf'; expected a name that ends"),
    "report nowhere --target troser": (2, "unknown class 'troser'; did you mean 'trouser'?"),
    "doctor vit_tiny --checkpoint nowhere.pth": (2, "there is no checkpoint file 'nowhere.pth'"),
}


def test_help_and_mistakes_need_no_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        input="\n".join(_LINES),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, (exit_code, says) in _LINES.items():
        assert f"{exit_code} | {line}\n" in done.stdout, line
        assert says in " ".join((done.stdout + done.stderr).split()), line
    assert list(Path(tmp_path).iterdir()) == []


def test_what_is_written_down_is_what_there_is():
    assert tuple(METHODS) == known.METHODS
    assert known.SCALES == SCALES
    assert zoo.names() == known.ZOO
    assert known.CLASSES == zoo.models.CLASS_NAMES
    assert set(FigureCanvasAgg.get_supported_filetypes()) >= known.FIGURES
    # Other tests register rules of their own.
    assert set(known.RULES) <= set(rule_names())
    assert known.RULES[0] == rule_names()[0]


def test_the_package_s_own_rules_are_all_written_down():
    code = "from captum_lnstat.rules import rule_names; print(*rule_names())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == list(known.RULES)


def test_a_missing_transformers_is_one_line(monkeypatch):
    from click.testing import CliRunner

    from captum_lnstat import SourceError, cli, explain
    from captum_lnstat.commands import options
    from captum_lnstat.explanation.subject import subject

    says = "hf:ViTConfig needs transformers, which is not installed; pip install 'captum-lnstat[hf]' brings it"
    for module in (options, subject):
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for command in (["explain", "--model", "hf:ViTConfig"], ["doctor", "hf:ViTConfig"]):
        result = CliRunner().invoke(cli.main, command)
        assert (result.exit_code, result.stderr) == (2, f"Error: {says}\n")
    with pytest.raises(SourceError, match="needs transformers, which is not installed"):
        explain("hf:ViTConfig", zoo.scenes()[0].image)


def test_a_rule_of_one_s_own_is_imported_when_it_is_named(monkeypatch, tmp_path):
    (tmp_path / "my_own_rule.py").write_text(
        "from captum_lnstat.rules import register\n\n\n@register('mine', formula='0')\n"
        "def mine(outcome, settings):\n    ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert RuleName().convert("my_own_rule:mine", None, None) == "mine"
    from captum_lnstat.rules import rule

    monkeypatch.delitem(rule._RULES, "mine")
