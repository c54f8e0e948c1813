"""A whole run: its numbers against those computed by hand, and what it makes of trouble."""

import csv
import json

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient
from PIL import Image

from captum_lnstat import zoo
from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.datasets import BrokenFileError, open_dataset
from captum_lnstat.evaluation.records import ResumeError
from captum_lnstat.evaluation.run import RunError, Settings, _chosen, evaluate
from captum_lnstat.evaluation.subject import Subject, read
from captum_lnstat.evaluation.team import Team

ALONE = Team(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def subject():
    return read("vit-mini")


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    """Drawing takes longer than all else here; the command's test draws."""
    monkeypatch.setattr(figure, "png", lambda summary, title: b"")


def run(folder, subject, data="scenes", methods="inputxgradient,random", metrics="pointing", asked="true", **more):
    settings = Settings(data, "vit-mini", methods, metrics, asked, **more)
    return evaluate(settings, open_dataset(data), subject, folder, ALONE)


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def by_hand(subject):
    """The first 6 questions on one object and the last 4 on two, explained without the package's evaluation."""
    scenes = [*zoo.scenes()[:6], *zoo.scenes()[-2:]]
    questions = [(scene, which) for scene in scenes for which in range(len(scene.labels))]
    images = torch.stack([zoo.load("vit-mini").transform(scene.image) for scene, _ in questions])
    targets = torch.tensor([scene.labels[which] for scene, which in questions])
    maps = InputXGradient(subject.model).attribute(images.requires_grad_(), target=targets).detach().sum(1)
    return questions, targets, maps.numpy()


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
    """The same questions as a file of scenes."""
    scenes = [*zoo.scenes()[:6], *zoo.scenes()[-2:]]
    masks = np.zeros((8, 2, 64, 64), bool)
    labels = np.full((8, 2), -1)
    for row, scene in enumerate(scenes):
        labels[row, : len(scene.labels)] = scene.labels
        masks[row, : len(scene.labels)] = scene.masks.numpy()
    path = tmp_path_factory.mktemp("scenes") / "few.npz"
    images = np.stack([np.array(scene.image) for scene in scenes])
    np.savez(path, images=images, labels=labels, masks=np.packbits(masks.reshape(8, 2, -1), axis=-1))
    return f"scenes:{path}"


def test_the_numbers_are_those_computed_by_hand(tmp_path, subject, small_scenes, by_hand):
    metrics = "pointing,energy,iou,two,segmentation"
    summary = run(tmp_path / "run", subject, small_scenes, metrics=metrics, batch_size=3)
    questions, targets, maps = by_hand
    single = [row for row, (scene, _) in enumerate(questions) if len(scene.labels) == 1]
    double = [row for row in range(10) if row not in single]
    masks = [scene.masks[which].numpy() for scene, which in questions]
    pointing = [float(masks[row].flat[maps[row].argmax()]) for row in single]
    energy = [maps[row].clip(0)[masks[row]].sum() / maps[row].clip(0).sum() for row in single]
    above = [maps[row] > maps[row].mean(dtype=np.float64) for row in range(10)]
    iou = [(above[row] & masks[row]).sum() / (above[row] | masks[row]).sum() for row in single]
    other = [scene.masks[1 - which].numpy() if row in double else None for row, (scene, which) in enumerate(questions)]
    two = [float(maps[row].clip(0)[masks[row]].sum() > maps[row].clip(0)[other[row]].sum()) for row in double]
    found = summary["methods"]["inputxgradient"]["metrics"]
    for name, values in {"pointing": pointing, "energy": energy, "iou": iou, "two": two}.items():
        assert found[name]["n"] == len(values)
        assert found[name]["value"] == pytest.approx(np.mean(values), rel=1e-5), name
    # Accumulated over the set before dividing, as in the published protocol.
    inside = sum((above[row] & masks[row]).sum() for row in single) / sum(
        (above[row] | masks[row]).sum() for row in single
    )
    outside = sum((~above[row] & ~masks[row]).sum() for row in single)
    outside /= sum((~above[row] | ~masks[row]).sum() for row in single)
    assert found["segmentation mIoU"]["value"] == pytest.approx((inside + outside) / 2)
    correct = sum((above[row] == masks[row]).sum() for row in single)
    assert found["segmentation accuracy"]["value"] == pytest.approx(correct / (len(single) * 64 * 64))
    assert abs(found["segmentation mIoU"]["value"] - np.mean(iou)) > 1e-3
    with torch.no_grad():
        images = torch.stack([zoo.load("vit-mini").transform(questions[row][0].image) for row in single])
        right = subject.model(images).argmax(1) == targets[single]
    assert summary["accuracy"] == pytest.approx(float(right.float().mean()))
    assert (summary["questions"], summary["images"]) == (10, 8)


def test_what_does_not_apply_is_left_out(tmp_path, subject, small_scenes):
    run(tmp_path / "run", subject, small_scenes, metrics="pointing,two,box,spearman,grid")
    rows = rows_of(tmp_path / "run")
    assert "spearman" not in rows[0]
    for row in rows:
        single = row["name"] < "scene-00006"
        assert (row["pointing"] != "", row["two"] != "", row["box.iou"] != "") == (single, not single, single)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "spearman" not in summary["methods"]["random"]["metrics"]


def test_games_about_the_asked_class_need_the_true_one(tmp_path, subject, small_scenes):
    summary = run(tmp_path / "run", subject, small_scenes, "random", "pointing,two,grid", asked="predicted")
    assert set(summary["methods"]["random"]["metrics"]) == {"pointing"}


def test_the_same_numbers_for_any_batch_size(tmp_path, subject, small_scenes):
    methods = "lnstat,ig(steps=2),random"
    metrics = "pointing,energy,iou,positive,insertion(steps=2),infidelity(draws=2),sensitivity(draws=2),box"
    found = {
        size: run(tmp_path / str(size), subject, small_scenes, methods, metrics, batch_size=size, limit=4)
        for size in (1, 4)
    }
    reference = rows_of(tmp_path / "1")
    assert len(reference) == 12
    for size in (4,):
        for one, other in zip(reference, rows_of(tmp_path / str(size)), strict=True):
            assert one.keys() == other.keys()
            for column in one.keys() - {"seconds"}:
                if column in ("name", "group", "method") or not one[column]:
                    assert one[column] == other[column]
                else:
                    assert float(one[column]) == pytest.approx(float(other[column]), rel=2e-4, abs=2e-6), column
        for method in found[1]["methods"]:
            for name, entry in found[1]["methods"][method]["metrics"].items():
                other = found[size]["methods"][method]["metrics"][name]
                assert entry["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-6)


def test_a_run_is_gone_on_with_and_not_repeated(tmp_path, subject, small_scenes):
    folder = tmp_path / "run"
    first = run(folder, subject, small_scenes, limit=4)
    assert first["questions"] == 4
    written = {file: file.stat().st_mtime_ns for file in (folder / "records").iterdir()}
    whole = run(folder, subject, small_scenes)
    assert whole["questions"] == 10
    assert {file: file.stat().st_mtime_ns for file in written} == written
    lines = [json.loads(line) for file in (folder / "records").iterdir() for line in file.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(10))
    assert whole == run(tmp_path / "other", subject, small_scenes)
    again = run(folder, subject, small_scenes, limit=4)
    assert again == first


def test_a_limit_is_a_draw_that_a_larger_one_goes_on_with():
    def drawn(limit, seed):
        return _chosen(1000, Settings("scenes", "vit-mini", "random", "two", "true", seed=seed, limit=limit))

    assert drawn(50, 0) == sorted(drawn(50, 0))
    assert max(drawn(50, 0)) > 800
    assert set(drawn(20, 0)) < set(drawn(50, 0))
    assert drawn(50, 0) != drawn(50, 1)
    assert drawn(1000, 0) == drawn(None, 0) == list(range(1000))


def test_images_with_replaced_pixels_can_be_asked_for_in_another_dtype(tmp_path, subject, small_scenes):
    """Maps, and what is measured on them alone, are the same; probabilities are rounded."""
    asked = {"methods": "lnstat", "metrics": "iou,deletion(steps=4),saco"}
    run(tmp_path / "own", subject, small_scenes, **asked)
    run(tmp_path / "rounded", subject, small_scenes, autocast="bfloat16", **asked)
    own, rounded = rows_of(tmp_path / "own"), rows_of(tmp_path / "rounded")
    assert [row["iou"] for row in own] == [row["iou"] for row in rounded]
    name = "deletion(steps=4)"  # asked of scenes with one object
    pairs = [[float(row[name]) for row in rows if row[name]] for rows in (own, rounded)]
    assert len(pairs[0]) == 6
    assert pairs[0] != pairs[1]
    np.testing.assert_allclose(*pairs, atol=0.02)


def test_other_settings_or_weights_do_not_go_on(tmp_path, subject, small_scenes):
    run(tmp_path / "run", subject, small_scenes, limit=2)
    for more, named in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"fill": "mean"}, "fill"),
        ({"autocast": "bfloat16"}, "autocast"),
        ({"metrics": "iou"}, "metrics"),
    ):
        with pytest.raises(ResumeError, match=named):
            run(tmp_path / "run", subject, small_scenes, **more)
    other = read("vit-mini")
    with torch.no_grad():
        other.model.head.bias[0] += 1e-4
    with pytest.raises(ResumeError, match="weights was"):
        run(tmp_path / "run", Subject.of(other.model, other.frame), small_scenes)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for place in range(4):
        for part in ("images", "masks"):
            (tmp_path / "data" / part).mkdir(parents=True, exist_ok=True)
            shape = (64, 64, 3) if part == "images" else (64, 64)
            pixels = rng.integers(0, 30 if place == 1 and part == "images" else 255, shape, np.uint8)
            pixels //= 1 if part == "images" else 128
            Image.fromarray(pixels).save(tmp_path / "data" / part / f"{place}.png")
    return tmp_path / "data"


def test_a_broken_file_stops_the_run_or_is_counted(tmp_path, subject, pictures):
    (pictures / "images" / "2.png").write_bytes(b"no image")
    with pytest.raises(BrokenFileError, match=r"images/2\.png.*--skip-broken"):
        run(tmp_path / "run", subject, f"folder:{pictures}", asked="predicted")
    summary = run(tmp_path / "run", subject, f"folder:{pictures}", asked="predicted", skip_broken=True, batch_size=2)
    assert summary["questions"] == 3
    assert [one["name"] for one in summary["broken"]] == ["2"]
    assert summary["methods"]["random"]["metrics"]["pointing"]["n"] == 3
    assert "2.png" in next(row for row in rows_of(tmp_path / "run") if row["name"] == "2")["broken"]


@pytest.mark.filterwarnings("ignore:Setting")
def test_a_failing_method_stops_the_run_or_is_counted(tmp_path, subject, pictures):
    methods = "inputxgradient,helpers.slow_method:Picky"
    with pytest.raises(RunError, match=r"method 'helpers\.slow_method:Picky' failed on 1: ValueError: too dark to say"):
        run(tmp_path / "run", subject, f"folder:{pictures}", methods, asked="predicted")
    summary = run(tmp_path / "run", subject, f"folder:{pictures}", methods, asked="predicted", skip_broken=True)
    entry = summary["methods"]["helpers.slow_method:Picky"]
    assert entry["failed"] == [{"name": "1", "reason": "ValueError: too dark to say"}]
    assert entry["metrics"]["pointing"]["n"] == 3
    assert summary["methods"]["inputxgradient"]["metrics"]["pointing"]["n"] == 4


def test_classes_of_the_data_have_to_be_the_models(tmp_path, subject, pictures):
    with pytest.raises(ValueError, match="no classes to ask for; take --class predicted"):
        run(tmp_path / "run", subject, f"folder:{pictures}")
    for place in range(4):
        for part in ("images", "masks"):
            (pictures / part / f"c{place % 2}").mkdir(exist_ok=True)
            (pictures / part / f"{place}.png").rename(pictures / part / f"c{place % 2}" / f"{place}.png")
    with pytest.raises(ValueError, match="has 2 classes of its own and vit-mini gives 7"):
        run(tmp_path / "run", subject, f"folder:{pictures}")
    assert not (tmp_path / "run").exists()


def test_human_maps(tmp_path, subject, pictures):
    (pictures / "masks").rename(pictures / "maps")
    for place in range(4):
        ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
        Image.fromarray(np.roll(ramp, place * 9, 0)).save(pictures / "maps" / f"{place}.png")
    summary = run(tmp_path / "run", subject, f"human:{pictures}", metrics="spearman,pointing", asked="predicted")
    found = summary["methods"]["random"]["metrics"]
    assert set(found) == {"spearman", "spearman ceiling"}
    assert 0.99 < found["spearman ceiling"]["value"] <= 1
    assert abs(found["spearman"]["value"]) < 0.5


def test_an_unknown_metric_or_option_is_named(tmp_path, subject):
    for metrics, message in (
        ("pointin", "did you mean 'pointing'"),
        ("iou(level=2)", "no option 'level'; expected threshold"),
        ("two(a=1)", "no option 'a'; it has none"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", subject, metrics=metrics)


def test_results_as_parquet(tmp_path, subject, small_scenes):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which writes Parquet, is not installed")
    run(tmp_path / "run", subject, small_scenes, metrics="pointing,two", limit=4)
    run(tmp_path / "run", subject, small_scenes, metrics="pointing,two", limit=4, results="parquet")
    table = parquet.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 8
    for row, other in zip(rows, table, strict=True):
        assert {key: "" if value is None else str(value) for key, value in other.items()} == row
