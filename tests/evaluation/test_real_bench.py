"""The benchmark on photographs: which are taken, what is kept, what the page says. The last tests need the data."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.datasets import open_dataset
from captum_lnstat.evaluation.subject import read

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import real
import real_subjects


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    monkeypatch.setattr(figure, "png", lambda summary, title: b"")


@pytest.fixture
def scenes(monkeypatch):
    """The benchmark with the package's scenes and model for photographs."""

    class Scenes(real_subjects.Photographs):
        @property
        def dataset(self):
            return real_subjects.Only(open_dataset(self.data), [f"scene-{number:05}" for number in range(24)])

    model = Scenes("mini", lambda: read("vit-mini"), "scenes", "report", None)
    monkeypatch.setattr(real, "open_model", lambda name, split, data, folder, device="cpu": model)
    monkeypatch.setattr(real, "known", lambda: ["mini"])
    # Scenes have masks and no boxes.
    monkeypatch.setattr(real_subjects, "covered", lambda boxes, size: 0.3)
    monkeypatch.setattr(real_subjects, "COVER", (0.0, 0.5))


def call(monkeypatch, folder, *arguments):
    common = ["--folder", str(folder), "--page", str(folder / "page.md"), "--models", "mini"]
    monkeypatch.setattr(sys, "argv", ["real.py", *common, *arguments])
    folder.mkdir(exist_ok=True)
    real.main()
    return (folder / "page.md").read_text()


def test_the_splits_have_nothing_in_common():
    names = [f"ILSVRC2012_val_{number:08}" for number in (1, 2, 10, 11, 50000)]
    tune, report = ([real_subjects.in_split(name, split) for name in names] for split in ("tune", "report"))
    assert tune == [False, True, True, False, True]
    assert [not one for one in tune] == report


def test_boxes_that_overlap_are_covered_once():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 2]])
    assert real_subjects.covered(boxes, (4, 4)) == 5 / 16


def test_every_method_has_a_folder_of_its_own():
    places = {real.place(Path(), "a", "b", "c", method) for method in (*real.METHODS, "lnstat(residual=update)")}
    assert len(places) == len(real.METHODS) + 1


def test_a_run_is_gone_on_with_and_a_method_done_again_alone(tmp_path, monkeypatch, scenes):
    folder = tmp_path / "real"
    (folder).mkdir()
    (folder / "page.md").write_text("# Mine\n\n<!-- tables -->\n\nold\n")
    some = ("--parts", "localisation,mosaics,randomisation", "--methods", "rollout,centre")
    page = call(monkeypatch, folder, *some, "--limit", "3")
    assert page.startswith("# Mine\n\n<!-- tables -->\n\nSplit: **report**.")
    assert "old" not in page
    assert "24 photographs with boxes in the split, " in page
    assert page.count("\n| rollout | ") == page.count("\n| centre | ") == 3
    assert "3 photographs, true class; compared with rollout." in page
    assert page.count("\n| *n* | 3 |") == 3
    kept = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
    assert len(kept) == 6
    page = call(monkeypatch, folder, "--parts", "localisation", "--methods", "centre,random", "--limit", "4")
    assert "\n| *n* | 3/4 |" in page
    assert {path: path.read_bytes() for path in kept} == kept
    assert call(monkeypatch, folder, "--tables") == page
    call(monkeypatch, folder, "--parts", "localisation", "--methods", "centre", "--limit", "2", "--again")
    gone = [path for path in kept if not path.exists()]
    assert [path.parent.parent.name for path in gone] == ["centre"]


def test_photographs_that_the_model_gets_wrong_are_left_out(tmp_path, scenes):
    model = real.open_model("mini", "report", tmp_path, tmp_path)
    seen = model.seen(tmp_path / "seen.json")
    assert json.loads((tmp_path / "seen.json").read_text())["weights"] == model.subject.digest
    assert model.seen(tmp_path / "seen.json") == seen
    few = model.small_objects(seen)
    assert {few.name(index) for index in range(len(few))} == {name for name, one in seen.items() if one.right}
    sure = model.confident_ones(seen)
    assert all(seen[sure.name(index)].confidence >= 0.5 for index in range(len(sure)))
    assert real.dataset_of(model, real.PARTS["pets"], tmp_path) is None


def test_tiny_imagenet_is_unpacked_once_for_each_split(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    files = {"wnids.txt": b"n2\nn1\n", "val/val_annotations.txt": b"val_0.JPEG\tn2\t1\t2\t3\t4\n"}
    files |= {"val/images/val_0.JPEG": buffer.getvalue()}
    for wnid in ("n1", "n2"):
        rows = "".join(f"{wnid}_{number}.JPEG\t5\t6\t7\t8\n" for number in range(7))
        files[f"train/{wnid}/{wnid}_boxes.txt"] = rows.encode()
        files |= {f"train/{wnid}/images/{wnid}_{number}.JPEG": buffer.getvalue() for number in range(7)}
    with tarfile.open(tmp_path / "tiny.tar", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for split, count, box in (("report", 1, [1, 2, 4, 5]), ("tune", 10, [5, 6, 8, 9])):
        folder = real_subjects.unpacked(tmp_path / "tiny.tar", tmp_path / split, split)
        data = open_dataset(f"tiny-imagenet:{folder}")
        assert len(data) == count
        assert data[0].boxes.tolist() == [box]
        assert data.class_names == ("n1", "n2")
    (tmp_path / "tiny.tar").unlink()
    assert real_subjects.unpacked(tmp_path / "tiny.tar", tmp_path / "tune", "tune") == tmp_path / "tune"


needs_data = pytest.mark.skipif(
    not real_subjects.REAL.is_dir(),
    reason=f"no photographs and weights in {real_subjects.REAL} (CAPTUM_LNSTAT_REAL names another folder)",
)


@needs_data
@pytest.mark.parametrize(("name", "mean"), [("deit", 0.485), ("vit", 0.5)])
def test_the_models_know_the_photographs(tmp_path, name, mean):
    model = real_subjects.open_model(name, "report", real_subjects.REAL, tmp_path)
    assert model.subject.frame.size == (224, 224)
    assert model.subject.frame.mean[0] == pytest.approx(mean, abs=1e-3)
    few = real_subjects.Only(model.dataset, [model.dataset.name(index) for index in range(8)])
    seen = dict(real_subjects.look(model.subject, few))
    assert sum(one.right for one in seen.values()) >= 4
    assert all(0 < one.cover <= 1 for one in seen.values())
    assert len(open_dataset(model.pets)) == 250


@needs_data
def test_tiny_imagenets_boxes_are_there(tmp_path):
    folder = real_subjects.unpacked(real_subjects.REAL / "tiny-imagenet-100.tar", tmp_path / "tiny", "report")
    data = open_dataset(f"tiny-imagenet:{folder}")
    assert (len(data), len(data.class_names)) == (2500, 100)
    assert data[0].image.size == (64, 64)
    assert 0 <= data[0].boxes.min() < data[0].boxes.max() <= 64
