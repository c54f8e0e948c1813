"""The page that compares all methods: rounds, cost, quality, and a run that goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from evaluation.test_real_bench import scenes  # noqa: F401

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import real
import real_subjects
import rivals
import rivals_own_code
import rivals_running


def entry(value, higher=True, n=30):
    return {"value": value, "higher_is_better": higher, "n": n, "interval": [value - 0.1, value + 0.1]}


def test_quality_is_the_way_from_the_random_map_to_the_best():
    found = {
        "one": {"IoU": entry(0.6), "AP": entry(0.5), "SaCo": entry(0.4), "deletion": entry(0.1, False)},
        "two": {"IoU": entry(0.4), "AP": entry(0.9), "SaCo": entry(0.2), "deletion": entry(0.3, False)},
        "few": {"IoU": entry(0.6)},
        "random": {"IoU": entry(0.2), "AP": entry(0.1), "SaCo": entry(0.0), "deletion": entry(0.5, False)},
    }
    # What is best on other photographs is no measure for those.
    found["slow"] = {"IoU": entry(0.9, n=6), "AP": entry(0.1), "SaCo": entry(0.0), "deletion": entry(0.5, False)}
    found["slowest"] = {**found["one"], "deletion": entry(0.1, False, n=4), "SaCo": entry(0.4, n=4)}
    assert rivals.fewer(found) == {"slow", "slowest"}
    total = rivals.quality(found)
    assert "slowest" not in total  # with too few photographs in a whole group
    assert total.pop("slow") == pytest.approx((0.7 / 0.4 + 0) / 2 / 2)
    # Boxes: (1 + .5) / 2 and (.5 + 1) / 2; faithfulness: (1 + 1) / 2 and (.5 + .5) / 2.
    assert total == {"one": pytest.approx(0.875), "two": pytest.approx(0.625), "random": 0.0}


def test_images_are_added_in_rounds(monkeypatch, tmp_path):
    asked = []
    costs = {name: {"passes": passes} for name, passes in (("a", 2), ("refused", None), ("b", 20), ("c", 900))}
    monkeypatch.setattr(rivals_running, "cost", lambda model, methods, folder: costs)
    monkeypatch.setattr(rivals_running, "model_of", lambda name, options: rivals_running.argparse.Namespace(name=name))
    monkeypatch.setattr(real, "dataset_of", lambda model, part, folder: None)
    monkeypatch.setattr(
        real,
        "measure",
        lambda model, part, methods, folder, options, parts: asked.append((part, methods[0], options.limit)),
    )
    options = rivals.argparse.Namespace(parts="boxes,masks", quick=True, minutes=9, folder=tmp_path, batch_size=8)
    options.processes = 1
    monkeypatch.setattr(rivals_running.figure, "png", rivals_running.figure.png)
    rivals.run(["mini"], list(costs), options)
    # A few for all, the slow ones last; then all of the cheap one's, then the others'.
    assert asked[:5] == [("boxes", "a", 20), ("masks", "a", 8), ("boxes", "b", 4), ("boxes", "c", 1), ("masks", "b", 2)]
    assert asked[5:9] == [("boxes", "a", 50), ("masks", "a", 20), ("boxes", "a", 100), ("masks", "a", 40)]
    assert asked[-3:] == [("boxes", "b", 20), ("boxes", "c", 5), ("masks", "b", 8)]
    asked.clear()
    options.minutes = None  # nothing is done twice where it need not be stopped
    rivals.run(["mini"], ["b", "a"], options)
    assert asked == [("boxes", "a", 100), ("masks", "a", 40), ("boxes", "b", 20), ("masks", "b", 8)]
    asked.clear()
    options.minutes = 1e-9
    rivals.run(["mini"], ["a"], options)
    assert asked == []


def test_photographs_that_the_last_row_lacks_are_left_out():
    done, begun = ({"methods": {"a": {"iou": 1}, "slow": {}, "z": last}} for last in ({"iou": 1}, {}))
    assert rivals.shared([done, begun]) == [done]


def test_the_page_and_its_picture(tmp_path, monkeypatch, scenes):  # noqa: F811
    monkeypatch.setattr(rivals_running, "opened", lambda name, split, *places: real.open_model(name, split, *places))
    monkeypatch.setattr(rivals_running.figure, "png", rivals_running.figure.png)
    page, picture, folder = tmp_path / "page.md", tmp_path / "rivals.png", tmp_path / "real"
    page.write_text("# Mine\n\n<!-- tables -->\n\nold\n")
    common = ["--folder", str(folder), "--page", str(page), "--picture", str(picture), "--models", "mini"]
    common += ["--methods", "rollout,chefer,random,centre", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["rivals.py", *common, "--parts", "boxes,mosaics", "--quick"])
    monkeypatch.setattr(rivals_running, "QUICK", {"boxes": 12, "mosaics": 2})
    rivals.main()
    text = page.read_text()
    assert text.startswith("# Mine\n\n<!-- tables -->\n\nSplit: **report**.")
    assert "old" not in text
    assert picture.stat().st_size > 5000
    costs = json.loads((folder / "mini" / "cost.json").read_text())
    assert 1 < costs["rollout"]["passes"] < 1.5
    assert 1.5 < costs["chefer"]["passes"] < 2.6
    lines = [line for line in text.splitlines() if line.startswith("| chefer |")]
    assert len(lines) == 2  # boxes, and mosaics
    total = lines[0].split("|")[2].strip()
    assert lines[0].split("|")[3].strip() == f"{costs['chefer']['passes']:.2f}"
    assert -1 <= float(total) <= 1
    kept = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    rivals.main()
    assert {path: path.read_bytes() for path in kept} == kept
    assert page.read_text() == text


def test_processes_share_the_rows(tmp_path):
    """The same records as one process makes."""
    found = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        options = ["--folder", folder, "--page", tmp_path / "page.md", "--picture", tmp_path / "picture.png"]
        options += ["--models", "vit-mini", "--parts", "pairs", "--methods", "centre,random", "--quick"]
        command = [sys.executable, rivals.__file__, *map(str, options), "--processes", processes]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        rows = sorted(folder.rglob("*.jsonl"))
        assert len(rows) == 2
        records = [[json.loads(line) for line in path.read_text().splitlines()] for path in rows]
        found.append([[(one["index"], one["methods"].popitem()[1]["two"]) for one in row] for row in records])
    assert found[0] == found[1]


def test_the_models_of_clothes_are_asked_about_scenes():
    asked = {name: [part for part in rivals.PARTS if rivals_running.asked_of(name, part)] for name in rivals.MODELS}
    assert asked["vit-mini"] == ["predicted", "scenes", "pairs"]
    assert set(rivals.PARTS) - set(asked["deit"]) == {"scenes", "pairs"}
    assert asked["dinov2"] == ["masks"]
    model = real_subjects.open_model("vit-mini", "report", Path("nowhere"), Path("nowhere"))
    pairs = model.pairs()
    assert {pairs[index].only_two for index in (0, len(pairs) - 1)} == {True}
    assert (len(pairs), len(model.dataset)) == (320, 560)


def test_other_packages_get_the_same_model():
    """The weights in torchvision's form: the same scores."""
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_patch16_224", num_classes=1000).eval()
    for parameter in deit.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, found = deit(image), rivals_own_code.as_torchvision(deit)(image)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_differs_by_a_factor_agrees_at_the_best_scale():
    """Row by row: the worst image's difference, the same at the best scale, the least correlation."""
    other = torch.rand(14, 14)
    factor = rivals_own_code.Row("a", "b", lambda deit: lambda image, target: other,
                                 lambda deit: lambda image, target: 4 * other + image.mean(), "")  # fmt: skip
    taken = rivals_own_code.Photographs(torch.tensor([0.0, 1.0]), torch.empty(0), torch.tensor([1, 2]), (1, 2))
    first = rivals_own_code.Photographs(taken.images[:1], taken.boxes, taken.targets[:1], (1,))
    difference, scaled, correlation = rivals_own_code.compared(factor, None, first)
    assert (difference, scaled, correlation) == (pytest.approx(0.75), pytest.approx(0, abs=1e-6), pytest.approx(1))
    assert rivals_own_code.compared(factor, None, taken)[1] > 0.01
