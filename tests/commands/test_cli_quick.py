"""Help and mistakes in arguments are answered before torch is loaded; what is written down for it is true."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
from click.shell_completion import ShellComplete
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torchvision.models._api import BUILTIN_MODELS

from captum_lnstat import cli, zoo
from captum_lnstat.commands import evaluate, known
from captum_lnstat.commands.names import RuleName, imagenet_names, models_of
from captum_lnstat.evaluation import datasets, measures, methods
from captum_lnstat.explanation.subject.names import find_class
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
    "explain --model vit_tiny_patch16_22": (
        2,
        "unknown model 'vit_tiny_patch16_22'; did you mean 'vit_tiny_patch16_224'",
    ),
    "doctor swin_tny": (2, "unknown model 'swin_tny'"),
    "doctor torchvision:swn_t": (2, "unknown model 'torchvision:swn_t'; did you mean 'torchvision:swin_t'"),
    "doctor no_such_module:model": (2, "No module named 'no_such_module', neither installed nor in the current folder"),
    "doctor :model": (2, "No module named ''"),
    "explian": (2, "there is no command 'explian'; did you mean 'explain'?"),
    "cat.jpg": (2, "there is no command 'cat.jpg'; expected one of explain, compare, report"),
    "explain notes.jpg": (2, "'notes.jpg' cannot be read as an image: it is in no format that Pillow knows"),
    "report notes.jpg": (2, "'notes.jpg' cannot be read as an image: it is in no format that Pillow knows"),
    "explain --checkpoint notes.jpg": (2, "'notes.jpg' cannot be read as a checkpoint, it begins with b'not an image'"),
    "explain --scene 400": (2, "there is no scene 400; expected 0 to 399"),
    "compare --scene 1 --scene 400": (2, "there is no scene 400; expected 0 to 399"),
    "evaluate --output out --data scene": (2, "unknown data 'scene'; did you mean 'scenes'?"),
    "evaluate --output out --data voc:nowhere": (2, "there is no file or folder 'nowhere'"),
    "evaluate --output out --methods lnstat,centr": (2, "unknown method 'centr'; did you mean 'centre'?"),
    "evaluate --output out --metrics iou,pointin": (2, "unknown metric 'pointin'; did you mean 'pointing'?"),
    "evaluate --output out --model swin-mny": (2, "unknown model 'swin-mny'; did you mean 'swin-mini'"),
    "doctor vit_tiny --checkpoint nowhere.pth": (2, "there is no checkpoint file 'nowhere.pth'"),
}


def test_help_and_mistakes_need_no_torch(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
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
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jpg"]


def test_what_is_written_down_is_what_there_is():
    assert tuple(METHODS) == known.METHODS
    assert known.SCALES == SCALES
    assert zoo.names() == known.ZOO
    assert methods.names() == evaluate.EVALUATED
    assert tuple(measures.MEASURES) == known.METRICS
    assert tuple(datasets.KINDS) == known.DATA
    assert known.CLASSES == zoo.models.CLASS_NAMES
    assert len(zoo.scenes()) == known.SCENES
    assert set(FigureCanvasAgg.get_supported_filetypes()) >= known.FIGURES
    # Other tests register rules of their own.
    assert set(known.RULES) <= set(rule_names())
    assert known.RULES[0] == rule_names()[0]


def test_names_are_read_from_the_libraries_as_they_know_them():
    assert models_of("timm") == set(timm.models._registry._model_entrypoints)
    assert models_of("torchvision") == set(BUILTIN_MODELS)
    assert models_of("no_such_library") == frozenset()
    info = timm.data.ImageNetInfo("imagenet-1k")
    assert imagenet_names() == tuple(name.split(", ")[0] for name in info.label_descriptions())


def offered(*words: str) -> list[str]:
    """What the shell is offered for the last of the words, by click's own way to find it."""
    found = ShellComplete(cli.main, {}, "captum-lnstat", "_C").get_completions(list(words[:-1]), words[-1])
    return [item.value for item in found]


def test_the_shell_completes_models_methods_and_classes(tmp_path):
    assert offered("explain", "--model", "swin-") == ["swin-mini"]
    assert {"deit_tiny_patch16_224", "deit_small_patch16_224"} <= set(offered("explain", "--model", "deit_"))
    assert "resnet50" not in offered("doctor", "")
    assert "torchvision:swin_t" in offered("doctor", "torchvision:sw")
    assert offered("compare", "--methods", "lnstat,chef") == ["lnstat,chefer"]
    assert "lnstat,lnstat" not in offered("compare", "--methods", "lnstat,")
    assert offered("evaluate", "--methods", "cent") == ["centre"]
    assert offered("evaluate", "--metrics", "iou,poi") == ["iou,pointing"]
    assert offered("explain", "--target", "a") == ["ankle_boot"]
    assert offered("explain", "--model", "deit_tiny_patch16_224", "--target", "PERSIAN") == ["Persian_cat"]
    (tmp_path / "names.txt").write_text("red wolf\ncat, tomcat\nd'oh\n")
    own = ("explain", "--model", "mine:model", "--class-names", str(tmp_path / "names.txt"), "--target", "")
    assert offered(*own) == ["red_wolf", "cat"]
    assert offered(*own[:4], str(tmp_path / "nothing.txt"), "--target", "") == []
    # What is offered is understood.
    assert find_class("ankle_boot", known.CLASSES, 7) == 6
    assert find_class("Persian_cat", imagenet_names(), 1000) == find_class("persian cat", imagenet_names(), 1000)


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
