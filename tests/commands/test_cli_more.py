"""Several targets, maps as numbers, looks, devices and batches, and what a newcomer gives as images."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import load_file

from captum_lnstat import LNStatAttribution, cli, zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.commands import comparing, explaining, pictures
from captum_lnstat.explanation.provenance import digest
from captum_lnstat.explanation.subject import progress
from captum_lnstat.visualize import PLAIN, Look, overlay

KNOWS = "Warning: swin-mini knows t-shirt, trouser, pullover, dress, sandal, bag and ankle boot, and nothing else"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)
    method = METHODS["ig"]
    monkeypatch.setitem(METHODS, "ig", replace(method, make=partial(method.make, n_steps=2)))
    for name, number in (("a", 264), ("b", 3), ("c", 120)):
        zoo.scenes()[number].image.save(f"{name}.png")


@pytest.fixture(scope="module")
def vit():
    reference = zoo.load("vit-mini")
    inputs = torch.stack([reference.transform(zoo.scenes()[number].image) for number in (264, 3, 120)])
    return reference, inputs


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="captum-lnstat")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def files(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_several_targets_are_a_panel_each(vit, monkeypatch):
    reference, inputs = vit
    drawn = []
    monkeypatch.setattr(pictures, "draw_targets", lambda *arguments, **looks: drawn.append((*arguments, looks)))
    monkeypatch.setattr(pictures, "write_figure", lambda path, figure, about: None)
    asked = ("--model", "vit-mini", "--target", "bag", "--target", "trouser", "--target", "5")
    result = run("explain", "a.png", *asked)
    assert result.exit_code == 0, result.stderr
    ((_, panels, title, looks),) = drawn
    assert [panel.title.split(" ")[0] for panel in panels] == ["bag", "trouser"]
    for panel, index in zip(panels, (5, 1), strict=True):
        expected = LNStatAttribution(reference.model).attribute(inputs[:1], index)[0].sum(0).detach()
        np.testing.assert_allclose(panel.relevance, expected, atol=1e-6)
    assert title.startswith("vit-mini\npredicted ")
    assert looks["look"] == PLAIN
    name, words, share = looks["beside"][0]
    assert title.startswith(f"vit-mini\npredicted {name} {words}")
    assert words == f"{share:.1%}"
    assert len(looks["beside"]) == 5
    assert looks["photo"] is None  # the model sees all of it
    lines = result.stdout.splitlines()
    assert lines[3].startswith("target      bag (5), confidence ")
    assert lines[4].startswith("            trouser (1), confidence ")


def test_the_likeliest_classes_are_a_panel_each(vit):
    reference, inputs = vit
    best = reference.model(inputs[:1])[0].topk(3).indices.tolist()
    result = run("explain", "a.png", "--model", "vit-mini", "--top-k", 3, "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["target"] for record in records] == best
    grids = [LNStatAttribution(reference.model).relevance(inputs[:1], index)[0] for index in best]
    for record, grid in zip(records, grids, strict=True):
        np.testing.assert_allclose(record["grid"], grid.detach(), rtol=1e-4, atol=1e-6)
    with Image.open("lnstat.png") as sheet:
        assert sheet.width > 2 * sheet.height > 800  # the image and three maps beside each other
    # Of several images too, and beside a target of one's own.
    result = run("explain", "a.png", "b.png", "--model", "vit-mini", "--target", "bag", "--top-k", 2, "--json")
    targets = [json.loads(line)["target"] for line in result.stdout.splitlines()]
    assert targets[0] == targets[len(targets) // 2] == 5
    assert files("lnstat") == ["a.png", "b.png"]


def test_one_target_at_a_time_where_a_picture_shows_one():
    for kind in ("overlay", "original", "layers", "heads", "classes"):
        result = run("explain", "--target", "bag", "--target", "dress", "--picture", kind)
        assert result.exit_code == 2
        assert f"--picture {kind} shows one target" in result.stderr


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors"])
def test_maps_as_numbers_with_what_they_were_made_with(vit, form):
    reference, inputs = vit
    result = run(
        "explain", "a.png", "--model", "vit-mini", "--target", "bag", "--picture", "overlay", "--save-map", form
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(f"picture     lnstat.png\nmap         lnstat.{form}\n")
    expected = LNStatAttribution(reference.model).attribute(inputs[:1], 5)[0].sum(0).detach().numpy()
    path = f"lnstat.{form}"
    if form == "npz":
        with np.load(path) as file:
            found = dict(file)
    else:
        found = load_file(path) if form == "safetensors" else {"relevance": np.load(path)}
    np.testing.assert_allclose(found["relevance"], expected, atol=1e-6)
    assert found["relevance"].dtype == np.float32
    if form != "npy":
        assert found["grid"].sum() == pytest.approx(expected.sum(), rel=1e-4)
    about = json.loads(Path(f"{path}.json").read_text())
    assert about["weights_sha256"] == digest(reference.model)
    assert (about["model"], about["target"], about["target_name"], about["rule"]) == ("vit-mini", 5, "bag", "lnstat")
    assert about["options"]["head_fusion"] == "deviation"
    assert about["versions"]["torch"].startswith(str(torch.__version__).partition("+")[0])
    assert about["holds"]["relevance"] == [64, 64]
    # The picture holds the same as text.
    with Image.open("lnstat.png") as picture:
        text = json.loads(picture.text["captum-lnstat"])
    assert text == {name: value for name, value in about.items() if name != "holds"}


def test_a_map_as_an_image_of_the_size_of_the_one_given():
    zoo.scenes()[264].image.resize((192, 128)).save("wide.png")
    result = run("explain", "wide.png", "--model", "vit-mini", "--save-map", "there.png", "--output", "sheet.png")
    assert result.exit_code == 0, result.stderr
    with Image.open("there.png") as file:
        assert (file.mode, file.size) == ("I;16", (192, 128))
        levels, about = np.asarray(file).astype(float), json.loads(file.text["captum-lnstat"])
    # What the centre crop cut off is 0, and the whitest pixel lies in the strongest patch.
    assert not levels[:, :30].any()
    assert not levels[:, -30:].any()
    record = json.loads(run("explain", "wide.png", "--model", "vit-mini", "--picture", "overlay", "--json").stdout)
    grid = np.array(record["grid"])
    row, column = np.unravel_index(levels.argmax(), levels.shape)
    left, top, right, bottom = record["box"]
    cell = int((row + 0.5 - top) / (bottom - top) * 8), int((column + 0.5 - left) / (right - left) * 8)
    assert cell == np.unravel_index(grid.argmax(), grid.shape)
    assert about["black"] == 0
    assert about["white"] == pytest.approx(grid.max(), rel=0.05)
    with Image.open("sheet.png") as sheet:
        assert json.loads(sheet.text["captum-lnstat"])["target"] == record["target"]


def test_maps_of_several_images_and_of_several_targets():
    result = run("explain", "a.png", "b.png", "--save-map", "npy", "--json")
    assert [json.loads(line)["map"] for line in result.stdout.splitlines()] == ["lnstat/a.npy", "lnstat/b.npy"]
    assert files("lnstat") == ["a.npy", "a.npy.json", "a.png", "b.npy", "b.npy.json", "b.png"]
    run("explain", "a.png", "--target", "bag", "--target", "dress", "--save-map", "m.npz", "--output", "o.png")
    assert {"m-3.npz", "m-5.npz", "m-3.npz.json"} <= set(files())
    result = run("explain", "a.png", "b.png", "--save-map", "m.npy")
    assert "of several images expected a form, one of npy, npz" in result.stderr
    result = run("explain", "a.png", "--save-map", "a.png")
    assert "the image or the picture itself" in result.stderr


def test_looks(vit, monkeypatch):
    reference, inputs = vit
    record = json.loads(run("explain", "a.png", "--picture", "overlay", "--model", "vit-mini", "--json").stdout)
    relevance = LNStatAttribution(reference.model).attribute(inputs[:1], record["target"])[0].sum(0).detach().numpy()
    with Image.open("a.png") as file:
        photo = np.asarray(file.convert("RGB")) / 255
    for given, look in (
        ([], PLAIN),
        (["--grey"], Look(grey=True)),
        (["--colour"], Look(grey=False)),
        (["--colormap", "viridis", "--alpha", "0.4"], Look("viridis", 0.4)),
        (["--contour"], Look(contour=True)),
    ):
        result = run("explain", "a.png", "--model", "vit-mini", "--picture", "overlay", *given)
        assert result.exit_code == 0, result.stderr
        with Image.open("lnstat.png") as file:
            drawn = np.asarray(file).astype(float) / 255
        np.testing.assert_allclose(drawn, overlay(photo, relevance, look=look), atol=0.02)
    asked = []
    monkeypatch.setattr(comparing, "compare_sheet", lambda *arguments, **options: asked.append(options["look"]))
    monkeypatch.setattr(comparing, "write_figure", lambda path, figure: None)
    run("compare", "a.png", "--methods", "lnstat", "--colormap", "magma", "--grey")
    assert asked == [Look("magma", None, True)]
    assert "unknown colormap 'infern'; did you mean 'inferno'" in run("explain", "--colormap", "infern").stderr


def test_batches_are_made_and_what_breaks_is_named_all_the_same(monkeypatch):
    Path("broken.png").write_text("no image")
    zoo.scenes()[0].image.resize((96, 64)).save("wide.png")
    sizes = []
    explain = explaining.Explainer.explain

    def counted(self, prepared, *rest):
        sizes.append(len(prepared))
        return explain(self, prepared, *rest)

    monkeypatch.setattr(explaining.Explainer, "explain", counted)
    images = ("a.png", "broken.png", "b.png", "c.png", "wide.png")
    result = run("explain", *images, "--batch-size", 2, "--json", "--device", "cpu")
    assert result.exit_code == 1
    assert sizes == [2, 2]
    records = [json.loads(line) for line in result.stdout.splitlines()]
    alone = [json.loads(line) for line in run("explain", *images, "--output", "alone", "--json").stdout.splitlines()]
    assert sizes[2:] == [1] * 4
    for one in alone:
        (other,) = (record for record in records if record["image"] == one["image"])
        assert one.get("prediction") == other.get("prediction")
        np.testing.assert_allclose(one.get("grid", 0), other.get("grid", 0), rtol=1e-3, atol=1e-6)

    def fails(self, prepared, *rest):
        if any(each.item.name == "b" for each in prepared):
            raise ValueError("it is b")
        return explain(self, prepared, *rest)

    monkeypatch.setattr(explaining.Explainer, "explain", fails)
    result = run("explain", "a.png", "b.png", "c.png", "--batch-size", 3, "--output", "again")
    assert "Skipped b.png: it is b\n" in result.stderr
    assert files("again") == ["a.png", "c.png"]


def test_compare_in_batches_is_compare():
    drawn = []
    sheet = comparing.compare_sheet
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "compare_sheet", lambda *a, **o: drawn.append(a[0]) or sheet(*a, **o))
        for size in (1, 2):
            methods = ("--methods", "lnstat,chefer,ig,saliency")
            assert run("compare", "a.png", "b.png", "c.png", "--batch-size", size, *methods).exit_code == 0
    for one, other in zip(*drawn, strict=True):
        assert one.title == other.title
        for a, b in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_devices():
    assert run("explain", "a.png", "--device", "cpu").exit_code == 0
    for device, says in (("gpu", "unknown device 'gpu'; expected auto, cpu or cuda"), ("xla", "cannot be used")):
        result = run("explain", "a.png", "--device", device)
        assert result.exit_code == 2
        assert says in result.stderr
    if not torch.cuda.is_available():
        assert "there is no GPU for device 'cuda'" in run("compare", "a.png", "--device", "cuda").stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_map_is_that_of_the_cpu():
    one, other = (
        json.loads(run("explain", "a.png", "--device", device, "--picture", "overlay", "--json").stdout)
        for device in ("auto", "cpu")
    )
    np.testing.assert_allclose(one["grid"], other["grid"], rtol=1e-3, atol=1e-5)


def test_the_small_models_say_what_they_know_of_a_user_s_image():
    assert KNOWS in run("explain", "a.png").stderr
    assert run("explain", "a.png", "b.png").stderr.count(KNOWS) == 1
    assert KNOWS in run("compare", "a.png", "--methods", "lnstat").stderr
    assert run("explain").stderr == ""  # a scene of the package
    state = zoo.load("vit-mini").model.state_dict()
    torch.save(state, "own.pth")
    assert run("explain", "a.png", "--model", "vit-mini", "--checkpoint", "own.pth").stderr == ""


def test_pretrained_says_nothing_of_models_that_come_with_their_weights():
    for command in (["explain", "a.png"], ["compare", "a.png"], ["doctor", "vit-mini"]):
        result = run(*command, "--pretrained")
        assert result.exit_code == 2
        assert "comes with its weights, so --pretrained says nothing" in result.stderr
    result = run("evaluate", "--pretrained", "--output", "e", "--limit", "1")
    assert "swin-mini comes with its weights, so --pretrained says nothing" in result.stderr


def test_a_predicted_class_is_not_said_to_be_ruled_out():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    torch.nn.init.normal_(model.head.weight, std=1e-3)
    torch.save(model.state_dict(), "flat.pth")
    asked = ("--model", "vit_tiny_patch16_224", "--checkpoint", "flat.pth", "--picture", "overlay")
    result = run("explain", "a.png", *asked)
    assert result.exit_code == 0, result.stderr
    assert "all but rules" not in result.stderr
    assert "has hardly made up its mind: no class is likelier than " in result.stderr
    assert "all but rules goldfish (1) out" in run("explain", "a.png", *asked, "--target", "goldfish").stderr


def test_patterns_and_what_is_not_looked_into(tmp_path):
    for folder in ("photos/one", "photos/two/three"):
        Path(folder).mkdir(parents=True)
        Image.open("b.png").save(f"{folder}/deep.png")
    Image.open("a.png").save("photos/top.png")
    result = run("explain", "photos")
    assert "Not looked into: 2 folders in photos (one, two); 'photos/**/*.jpg' in quotes is every .jpg" in result.stderr
    assert files("lnstat") == ["top.png"]
    result = run("explain", "photos/**/*.png", "--output", "all")
    assert result.exit_code == 0, result.stderr
    assert files("all") == ["deep-2.png", "deep.png", "top.png"]
    (tmp_path / "here" / "photos" / "top.png").unlink()
    assert "its 2 folders are not looked into" in run("explain", "photos").stderr
    assert "no file matches 'photos/*.gif'" in run("explain", "photos/*.gif").stderr
    # A name with such signs that is there is a file.
    Image.open("a.png").save("a[1].png")
    assert run("explain", "a[1].png", "--picture", "overlay").exit_code == 0
