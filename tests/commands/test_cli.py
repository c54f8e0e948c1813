import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

import captum_lnstat
from captum_lnstat import LNStatAttribution, RecordingError, cli, zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.commands import explain, models, options, pictures
from captum_lnstat.explanation.subject import progress

VIT = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Run in an empty folder, with few steps, and without the progress that a slow machine would show."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    method = METHODS["ig"]
    monkeypatch.setitem(METHODS, "ig", replace(method, make=partial(method.make, n_steps=2)))
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)


@pytest.fixture
def drawn(monkeypatch):
    """Path, image, panels and title of every sheet that the command writes."""
    calls = []
    monkeypatch.setattr(pictures, "draw_sheet", lambda *arguments, **looks: arguments)
    monkeypatch.setattr(pictures, "write_figure", lambda path, sheet, about: calls.append((path, *sheet)))
    return calls


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """Weights of a small ViT with a head of five classes, and the model itself."""
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=5).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path, model


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A wide photograph whose left and right ends are lost in a centre crop."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8)
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(pixels).resize((400, 240), Image.Resampling.BICUBIC).save(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="captum-lnstat")


def said(result: Result) -> dict[str, str]:
    """The printed lines by their headings."""
    lines = [(line[:12].strip(), line[12:]) for line in result.stdout.splitlines()]
    return {heading: text for heading, text in lines if heading}


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that has to fail and to leave nothing."""
    before = sorted(Path.cwd().iterdir())
    result = run("explain", *arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    assert sorted(Path.cwd().iterdir()) == before
    return result.stderr


def test_without_arguments_a_bundled_scene_is_explained():
    result = run("explain")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    reference, scene = zoo.load("swin-mini"), zoo.scenes()[explain.DEFAULT_SCENE]
    confidence = reference.model(reference.transform(scene.image)[None]).softmax(1)[0].detach()
    best = int(confidence.argmax())
    names = " and ".join(reference.class_names[label] for label in scene.labels)
    outcome = f"{reference.class_names[best]} ({best}), confidence {float(confidence[best]):.1%}"
    assert said(result) == {
        "image": f"bundled scene {explain.DEFAULT_SCENE}: {names}",
        "model": "swin-mini",
        "prediction": outcome,
        "target": outcome,
        "recognised": "SwinTransformer: windowed transformer, 16 x 16 patches of 4 x 4 px; "
        "the head reads: mean of the tokens",
        "picture": "lnstat.png",
    }
    assert len(result.stdout.splitlines()) == 6
    assert [path.name for path in Path.cwd().iterdir()] == ["lnstat.png"]
    with Image.open("lnstat.png") as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 600


def test_the_default_scene_is_one_that_teaches_something():
    scene = zoo.scenes()[explain.DEFAULT_SCENE]
    reference = zoo.load("swin-mini")
    inputs = reference.transform(scene.image)[None]
    assert len(scene.labels) == 2
    assert int(reference.model(inputs).argmax()) in scene.labels
    maps = LNStatAttribution(reference.model).attribute(inputs.repeat(2, 1, 1, 1), list(scene.labels)).sum(1)
    own = (maps * scene.masks).sum((1, 2))
    other = (maps * scene.masks.flip(0)).sum((1, 2))
    assert (own > 3 * other).all()


def test_the_module_runs_as_a_program(tmp_path):
    folder = str(Path(captum_lnstat.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-m", "captum_lnstat", "explain", "--scene", "3", "--rule", "evidence", "--output", "out.png"],
        cwd=tmp_path / "here", env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "bundled scene 3: " in result.stdout
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out.png"]


def test_a_target_that_the_model_rules_out_is_said_to_be_one(drawn):
    reference = zoo.load("swin-mini")
    inputs = reference.transform(zoo.scenes()[explain.DEFAULT_SCENE].image)[None]
    confidence = reference.model(inputs).softmax(-1)[0]
    assert confidence.min() < 0.01 < confidence.max()
    least = int(confidence.argmin())
    assert f"all but rules {reference.class_names[least]} ({least}) out" in run("explain", "--target", least).stderr
    assert run("explain", "--target", int(confidence.argmax())).stderr == ""


@pytest.mark.parametrize("target", ["trouser", "TROUSER", "1"])
def test_a_target_is_a_name_or_an_index(drawn, target):
    result = run("explain", "--target", target, "--rule", "rollout", "--output", "there.pdf")
    assert said(result)["target"].startswith("trouser (1), confidence ")
    ((path, _, panels, title),) = drawn
    assert str(path) == "there.pdf"
    reference = zoo.load("swin-mini")
    inputs = reference.transform(zoo.scenes()[explain.DEFAULT_SCENE].image)[None]
    expected = LNStatAttribution(reference.model, rule="rollout").attribute(inputs, 1)[0].sum(0)
    np.testing.assert_allclose(panels[0].relevance, expected, atol=1e-6)
    confidence = reference.model(inputs).softmax(1)[0].detach()
    best = int(confidence.argmax())
    assert title == (
        f"swin-mini\npredicted {reference.class_names[best]} {float(confidence[best]):.1%}  |  "
        f"target trouser {float(confidence[1]):.1%}  |  rule rollout"
    )


def test_a_timm_model_with_a_checkpoint_of_another_number_of_classes(drawn, vit_file, photo):
    path, model = vit_file
    result = run("explain", photo, "--model", VIT, "--checkpoint", path, "--target", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    ((_, image, panels, _),) = drawn
    # 224 / 0.9 = 248 pixels, of which the model sees the middle: so does the picture.
    with Image.open(photo) as file:
        seen = center_crop(resize(file, [248], Image.Resampling.BICUBIC), [224, 224])
    np.testing.assert_allclose(image, pil_to_tensor(seen).permute(1, 2, 0).numpy() / 255, atol=1e-6)
    inputs = (pil_to_tensor(seen)[None] / 255 - 0.5) / 0.5
    confidence = model(inputs).softmax(1)[0].detach()
    best = int(confidence.argmax())
    assert said(result)["prediction"] == f"class {best}, confidence {float(confidence[best]):.1%}"
    assert said(result)["target"] == f"class 3, confidence {float(confidence[3]):.1%}"
    assert said(result)["recognised"].startswith("VisionTransformer: plain transformer, 14 x 14 patches")
    expected = LNStatAttribution(model).attribute(inputs, 3)[0].sum(0)
    np.testing.assert_allclose(panels[0].relevance, expected.detach(), atol=1e-5)


def test_random_weights_are_said_to_be_random(drawn, photo):
    result = run("explain", photo, "--model", VIT, "--target", "espresso")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"Warning: the weights of {VIT} are random")
    assert said(result)["target"].startswith("espresso (967), confidence ")
    ((_, _, _, title),) = drawn
    assert title.startswith(f"{VIT} (random weights)\n")


def test_a_zoo_model_takes_a_checkpoint_too(drawn, tmp_path):
    torch.manual_seed(0)
    other = timm.models.SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=48, depths=(2, 2, 2), num_heads=(2, 4, 8), mlp_ratio=2.0,
        num_classes=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(other.head.fc.weight)
    save_file(other.state_dict(), tmp_path / "three.safetensors")
    result = run("explain", "--checkpoint", tmp_path / "three.safetensors")
    assert result.exit_code == 0, result.stderr
    best = int(other(zoo.load("swin-mini").transform(zoo.scenes()[explain.DEFAULT_SCENE].image)[None]).argmax())
    assert said(result)["prediction"].startswith(f"class {best}, confidence ")
    assert len(drawn) == 1


def test_no_image_that_cannot_be_read(tmp_path, photo):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:2000])
    assert refused("nowhere.png") == "Error: there is no file 'nowhere.png'\n"
    assert "text.png' cannot be read as an image: it is in no format" in refused(tmp_path / "text.png")
    assert "half.png' cannot be read as an image: " in refused(tmp_path / "half.png")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    assert "nan.tiff' cannot be read as an image: it holds NaN" in refused(tmp_path / "nan.tiff")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "swin-mny"], "unknown model 'swin-mny'; did you mean 'swin-mini'"),
        (["--model", "vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224' or "),
        (["--model", "qqqq"], "unknown model 'qqqq'; expected swin-mini, vit-mini or a name that timm knows"),
        (["--model", f"{VIT}.nope", "--pretrained"], "with pretrained weights: Invalid pretrained tag (nope)"),
        (["--model", "resnet18"], "resnet18 cannot be explained: ResNet is not a vision transformer of a known family"),
        (["--model", "vit_small_patch14_dinov2"], "has no classifier, so there is no class to explain"),
        (["--target", "troser"], "unknown class 'troser'; did you mean 'trouser'?"),
        (["--target", "qqqq"], "unknown class 'qqqq'; expected one of t-shirt, trouser, "),
        (["--target", "7"], "there is no class 7; expected an index, 0 to 6"),
        (["--target", "-1"], "there is no class -1; expected an index, 0 to 6"),
        (["--model", VIT, "--target", "crane"], "give one of the indices 134, 517"),
        (["--model", VIT, "--target", "espreso"], "did you mean 'espresso'"),
        (
            ["--rule", "lnsat"],
            "rule is 'lnsat'; expected one of 'lnstat', 'evidence', 'rollout', 'gradient', or the module",
        ),
        (["--scene", "400"], "there is no scene 400; expected 0 to 399"),
        (["--scene", "first"], "'first' is not a valid integer"),
        (["--scene", "1", "photo.png"], "IMAGE and --scene exclude each other"),
        (["--pretrained", "--checkpoint", "a.pth"], "--pretrained and --checkpoint exclude each other"),
        (["--checkpoint", "nowhere.pth"], "there is no checkpoint file 'nowhere.pth'"),
        (["--output", "nowhere/out.png"], "there is no folder 'nowhere' to write the picture to"),
        (["--output", "."], "'.' exists and is no file"),
        (["--output", "out.nope"], "the picture cannot be written as 'out.nope'"),
        (["out.png", "--output", "../here/out.png"], "--output is IMAGE itself"),
        (["--nope"], "--nope"),
    ],
)
def test_a_mistake_is_one_line(arguments, line):
    assert line in refused(*arguments)


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def offline(name, pretrained):
        assert pretrained
        raise OSError("the hub cannot be reached\nCheck your connection")

    monkeypatch.setattr(timm, "create_model", offline)
    line = refused("--model", VIT, "--pretrained")
    assert f"timm cannot make '{VIT}' with pretrained weights: the hub cannot be reached Check your connection" in line
    assert line.endswith(" Weights in a file go by checkpoint (--checkpoint FILE)\n")


def test_no_checkpoint_that_is_none_or_does_not_fit(tmp_path, vit_file):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    torch.save({"state_dict": {}, "code": Path("x")}, tmp_path / "code.pt")
    wide = timm.create_model(VIT, num_classes=5, mlp_ratio=2)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    for name in ("text.pth", "text.safetensors", "code.pt"):
        assert f"{name}' cannot be read as a checkpoint, " in refused("--checkpoint", tmp_path / name)
    assert "epoch.pt' holds no state dict" in refused("--checkpoint", tmp_path / "epoch.pt")
    assert "does not fit swin-mini: Missing key(s) in state_dict: " in refused("--checkpoint", vit_file[0])
    line = refused("--model", VIT, "--checkpoint", tmp_path / "wide.pth")
    assert f"does not fit {VIT}: size mismatch for blocks.0.mlp.fc1.weight" in line
    assert len(line) < 500


def test_names_of_classes_are_not_made_up(vit_file):
    line = refused("--model", VIT, "--checkpoint", vit_file[0], "--target", "cat")
    assert "the names of this model's classes are not known; give an index, 0 to 4" in line


def test_a_folder_that_cannot_be_written_to_is_found_out_first(monkeypatch):
    monkeypatch.setattr(options.os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(models, "read_subject", lambda *_: pytest.fail("the model was loaded first"))
    assert refused() == "Error: the folder '.' cannot be written to\n"


def test_a_full_disk_leaves_nothing(monkeypatch):
    def fill_the_disk(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    result = run("explain")
    assert result.exit_code == 2
    assert result.stderr == "Error: 'lnstat.png' cannot be written: No space left on device\n"
    assert "picture" not in said(result)
    assert list(Path.cwd().iterdir()) == []


def test_an_explanation_that_is_refused_is_one_line(monkeypatch):
    def refuse(*arguments, **options):
        raise RecordingError("the pass\ndid not add up")

    monkeypatch.setattr(LNStatAttribution, "describe", refuse)
    assert refused() == "Error: swin-mini cannot be explained: the pass did not add up\n"


def test_photographs_are_turned_the_right_way_up(drawn, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    sideways = Image.new("RGB", (64, 64), "black")
    sideways.paste("white", (0, 0, 64, 32))  # once turned, on the right
    sideways.save(tmp_path / "sideways.png", exif=exif)
    assert run("explain", tmp_path / "sideways.png").exit_code == 0
    ((_, image, _, _),) = drawn
    assert image[:, :28].max() < 0.1
    assert image[:, 36:].min() > 0.9


def test_progress_is_shown_only_for_what_takes_long(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_WORD", 0.05)
    monkeypatch.setattr(progress, "NEXT_WORD", 0.05)

    @click.command()
    def command():
        with progress.progress("short"):
            pass
        with progress.progress("long"):
            time.sleep(0.3)

    result = CliRunner().invoke(command)
    lines = result.stderr.splitlines()
    assert result.stdout == ""
    assert len(lines) >= 2
    assert set(lines) == {"long: 0 s so far"}


def test_version_and_help():
    assert run("--version").stdout == f"captum-lnstat, version {captum_lnstat.__version__}\n"
    for arguments in ([], ["--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: captum-lnstat ")
        assert "explain" in result.stdout
    text = run("explain", "-h").stdout
    options = ("--model", "--pretrained", "--checkpoint", "--whole", "--target", "--rule", "--picture", "--against")
    for option in (*options, "--scene", "--output", "--json", "IMAGE", "FOLDER", "130 interrupted"):
        assert option in text
    assert "\n  captum-lnstat explain\n" in text.replace("    ", "  ")
