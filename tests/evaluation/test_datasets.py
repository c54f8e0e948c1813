"""Every data set on files of its layout, made here; damaged and missing files say which they are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from captum_lnstat import zoo
from captum_lnstat.evaluation.datasets import BrokenFileError, DatasetError, Only, open_dataset, read_names
from captum_lnstat.evaluation.datasets.coco import decode

RNG = np.random.default_rng(0)


def picture(path, size=(12, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    image = Image.fromarray(RNG.integers(0, 255, shape, np.uint8))
    image.save(path, quality=95) if path.suffix.lower() in (".jpg", ".jpeg") else image.save(path)
    return image


def annotation(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for name, (a, b, c, d) in objects
    )
    path.write_text(f"<annotation>{entries}</annotation>")


def test_scenes_are_the_packages_own():
    data, scenes = open_dataset("scenes"), zoo.scenes()
    first, last = data[0], data[len(data) - 1]
    assert torch.equal(first.mask, scenes[0].masks[0])
    assert (first.target, first.only_two, first.other_mask) == (scenes[0].labels[0], False, None)
    assert tuple(first.boxes[0].long().tolist()) == scenes[0].boxes[0]
    assert (last.name, last.target, last.only_two) == (f"scene-{len(scenes) - 1:05d}#1", scenes[-1].labels[1], True)
    assert torch.equal(last.mask, scenes[-1].masks[1])
    assert torch.equal(last.other_mask, scenes[-1].masks[0])
    assert len({data.name(index) for index in range(len(data))}) == len(data)


def test_scenes_of_a_file(tmp_path):
    masks = np.zeros((1, 2, 4, 6), bool)
    masks[0, 0, 1, 2:4] = True
    labels = np.array([[3, -1]])
    images = RNG.integers(0, 255, (1, 4, 6, 3), np.uint8)
    packed = np.packbits(masks.reshape(1, 2, 24), axis=-1)
    np.savez(tmp_path / "own.npz", images=images, labels=labels, masks=packed)
    sample = open_dataset(f"scenes:{tmp_path / 'own.npz'}")[0]
    assert sample.target == 3
    assert sample.mask.nonzero().tolist() == [[1, 2], [1, 3]]
    assert sample.boxes.tolist() == [[2, 1, 4, 2]]


WNIDS = ("n00000009", "n00000002", "n00000005")  # in the order of the ILSVRC ids


@pytest.fixture
def imagenet(tmp_path):
    for number, wnid in enumerate(WNIDS, 1):
        picture(tmp_path / "val" / wnid / f"ILSVRC2012_val_0000000{number}.JPEG")
        annotation(tmp_path / "boxes" / f"ILSVRC2012_val_0000000{number}.xml", [(wnid, (2, 3, 5, 8))])
    return tmp_path


def test_imagenet_by_folders(imagenet):
    data = open_dataset(f"imagenet:{imagenet}")
    samples = [data[index] for index in range(len(data))]
    assert data.class_names == tuple(sorted(WNIDS))
    assert [(sample.name[-1], sample.target) for sample in samples] == [("1", 2), ("2", 0), ("3", 1)]
    assert samples[0].boxes.tolist() == [[1, 2, 5, 8]]  # VOC's pixels count from 1 and include the last
    assert samples[0].mask is None


def test_imagenet_flat(imagenet):
    flat = imagenet / "flat"
    flat.mkdir()
    for file in (imagenet / "val").rglob("*.JPEG"):
        file.rename(flat / file.name)
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n")
    (flat / "classes.txt").write_text("\n".join(WNIDS))
    data = open_dataset(f"imagenet:{flat}")
    assert [data[index].target for index in range(3)] == [2, 0, 1]
    assert data[0].boxes is None
    (flat / "classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"neither a meta\.mat nor a classes\.txt"):
        open_dataset(f"imagenet:{flat}")
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    (flat / "classes.txt").write_text("\n".join(WNIDS))
    with pytest.raises(DatasetError, match=r"val_00000002\.JPEG has no line"):
        open_dataset(f"imagenet:{flat}")


def test_imagenet_flat_by_the_kits_own_table(imagenet):
    savemat = pytest.importorskip("scipy.io", reason="scipy, which writes the table, is not installed").savemat
    flat = imagenet / "flat"
    flat.mkdir()
    for file in (imagenet / "val").rglob("*.JPEG"):
        file.rename(flat / file.name)
    (flat / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n3\n")
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    rows = [(number, wnid, "a", "b", 0) for number, wnid in enumerate(WNIDS, 1)]
    savemat(flat / "meta.mat", {"synsets": np.array([*rows, (4, "n00000001", "above", "c", 3)], kinds)})
    data = open_dataset(f"imagenet:{flat}")
    assert [data[index].target for index in range(3)] == [2, 0, 1]


@pytest.fixture
def tiny_imagenet(tmp_path):
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    picture(tmp_path / "val" / "images" / "val_0.JPEG", (64, 64))
    picture(tmp_path / "val" / "n1" / "images" / "val_10.JPEG", (64, 64))
    lines = "val_0.JPEG\tn2\t0\t32\t44\t63\nval_10.JPEG\tn1\t0\t0\t63\t63\n"
    (tmp_path / "val" / "val_annotations.txt").write_text(lines)
    return tmp_path


def test_tiny_imagenet(tiny_imagenet):
    data = open_dataset(f"tiny-imagenet:{tiny_imagenet}")
    assert data.class_names == ("n1", "n2")
    assert [(data[index].name, data[index].target) for index in range(2)] == [("val_0", 1), ("val_10", 0)]
    assert data[0].boxes.tolist() == [[0, 32, 45, 64]]  # its pixels count from 0 and include the last
    (tiny_imagenet / "val" / "images" / "val_0.JPEG").unlink()
    with pytest.raises(BrokenFileError, match=r"val_0\.JPEG"):
        data[0]
    (tiny_imagenet / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn3\t0\t32\t44\t63\n")
    with pytest.raises(DatasetError, match=r"line 1 of .* a known wnid"):
        open_dataset(f"tiny-imagenet:{tiny_imagenet}")
    (tiny_imagenet / "wnids.txt").unlink()
    with pytest.raises(DatasetError, match=r"no file .*wnids\.txt"):
        open_dataset(f"tiny-imagenet:{tiny_imagenet}")


def test_only_some_of_the_samples(tmp_path):
    scenes = open_dataset("scenes")
    two = scenes.name(len(scenes) - 1).partition("#")[0]
    (tmp_path / "names.txt").write_text(f"# chosen\n\n{two}\n  scene-00003#0\n")
    names = read_names(tmp_path / "names.txt")
    assert names == [two, "scene-00003#0"]
    few = Only(scenes, names)
    assert [few.name(index) for index in range(len(few))] == ["scene-00003#0", f"{two}#0", f"{two}#1"]
    assert few[2].name == f"{two}#1"
    assert few.class_names == scenes.class_names
    with pytest.raises(DatasetError, match="1 of 2 names are not in the data, the first is 'scene-3'; expected names"):
        Only(scenes, ["scene-3", two])
    with pytest.raises(DatasetError, match="no sample is named"):
        Only(scenes, [])


def test_imagenet_segmentation(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py, which writes the file, is not installed")
    path = tmp_path / "gtsegs_ijcv.mat"
    images = [RNG.integers(0, 255, (5, 7, 3), np.uint8), RNG.integers(0, 255, (6, 4, 3), np.uint8)]
    masks = [(image[..., 0] > 128).astype(np.uint8) for image in images]
    with h5py.File(path, "w") as file:
        kind = h5py.special_dtype(ref=h5py.Reference)
        lists = {name: file.create_dataset(f"value/{name}", (2, 1), dtype=kind) for name in ("img", "gt")}
        for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
            # MATLAB's arrays, written by columns: turned.
            lists["img"][place, 0] = file.create_dataset(f"#refs#/img{place}", data=image.T).ref
            label = file.create_dataset(f"#refs#/gt{place}", data=mask.T)
            cell = file.create_dataset(f"#refs#/cell{place}", (1, 1), dtype=kind)
            cell[0, 0] = label.ref
            lists["gt"][place, 0] = cell.ref if place else label.ref
    data = open_dataset(f"imagenet-segmentation:{path}")
    assert (len(data), data.class_names) == (2, ())
    for place in range(2):
        sample = data[place]
        assert np.array_equal(np.array(sample.image), images[place])
        assert np.array_equal(sample.mask.numpy(), masks[place] == 1)
        assert sample.target is None
    path.with_suffix(".bad").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"cannot be read.*gtsegs_ijcv"):
        open_dataset(f"imagenet-segmentation:{path.with_suffix('.bad')}")


@pytest.fixture
def voc(tmp_path):
    for name in ("2007_000001", "2007_000002"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
    annotation(tmp_path / "Annotations" / "2007_000001.xml", [("dog", (1, 1, 4, 4)), ("person", (5, 1, 12, 8))])
    annotation(tmp_path / "Annotations" / "2007_000002.xml", [("dog", (2, 2, 4, 4)), ("dog", (5, 5, 8, 8))])
    return tmp_path


def test_voc_boxes(voc):
    data = open_dataset(f"voc:{voc}")
    assert [data.name(index) for index in range(len(data))] == [
        "2007_000001#dog", "2007_000001#person", "2007_000002#dog",
    ]  # fmt: skip
    assert data[1].target == data.class_names.index("person") == 14
    assert data[1].boxes.tolist() == [[4, 0, 12, 8]]
    assert data[2].boxes.tolist() == [[1, 1, 4, 4], [4, 4, 8, 8]]
    assert data[0].group == data[1].group != data[2].group


def test_voc_masks(voc):
    labels = np.zeros((8, 12), np.uint8)
    labels[:4, :4], labels[:, 6:] = 12, 15
    labels[4, :] = 255
    (voc / "SegmentationClass").mkdir()
    palette = Image.new("P", (12, 8))
    palette.putdata(labels.flatten().tolist())
    palette.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    palette.save(voc / "SegmentationClass" / "2007_000001.png")
    data = open_dataset(f"voc:{voc}")
    assert len(data) == 2
    dog = data[0]
    assert np.array_equal(dog.mask.numpy(), labels == 12)
    assert np.array_equal(dog.other_mask.numpy(), labels == 15)
    assert np.array_equal(dog.void.numpy(), labels == 255)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000002\n")
    missing = open_dataset(f"voc:{voc}")
    with pytest.raises(BrokenFileError, match=r"there is no file .*2007_000002\.png"):
        missing[0]


def coco(tmp_path, annotations, size=(12, 8)):
    picture(tmp_path / "val2017" / "one.jpg", size)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    path = tmp_path / "annotations" / "instances.json"
    images = [{"id": 9, "file_name": "one.jpg", "height": size[1], "width": size[0]}]
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return open_dataset(f"coco:{path}")


def entry(category, **more):
    return {"image_id": 9, "category_id": category, "iscrowd": 0, "bbox": [1, 2, 3, 4], **more}


def test_coco(tmp_path):
    polygon = [[2, 1, 6, 1, 6, 5, 2, 5]]
    runs = {"size": [8, 12], "counts": [64, 8, 24]}
    crowd = entry(18, segmentation={"size": [8, 12], "counts": [88, 8]}, iscrowd=1)
    data = coco(tmp_path, [entry(18, segmentation=polygon), entry(1, segmentation=runs), crowd])
    assert data.class_names == ("person", "dog")
    person, dog = data[0], data[1]
    assert (person.name, person.target, dog.name, dog.target) == ("one#person", 0, "one#dog", 1)
    expected = np.zeros((8, 12), bool)
    expected[1:5, 2:6] = True
    assert np.array_equal(dog.mask.numpy(), expected)
    column = np.zeros((8, 12), bool)
    column[:, 8] = True
    assert np.array_equal(person.mask.numpy(), column)
    assert np.array_equal(dog.other_mask.numpy(), column)
    assert dog.boxes.tolist() == [[1, 2, 4, 6]]
    assert dog.void[:, 11].all()
    assert not dog.void[:, :11].any()


def test_coco_without_masks_has_boxes(tmp_path):
    sample = coco(tmp_path, [entry(18), entry(18, bbox=[0, 0, 2, 2])])[0]
    assert sample.mask is None
    assert sample.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 2, 2]]


def test_coco_says_what_is_damaged(tmp_path):
    with pytest.raises(DatasetError, match="image and category"):
        coco(tmp_path, [entry(77)])
    with pytest.raises(BrokenFileError, match=r"one#dog is damaged.*add up to 5; expected 96"):
        coco(tmp_path, [entry(18, segmentation={"size": [8, 12], "counts": [5]})])[0]
    with pytest.raises(BrokenFileError, match="a polygon has 4 numbers"):
        coco(tmp_path, [entry(18, segmentation=[[1, 2, 3, 4]])])[0]
    data = coco(tmp_path, [entry(18)])
    (tmp_path / "val2017" / "one.jpg").unlink()
    with pytest.raises(BrokenFileError, match=r"there is no file 'one\.jpg' in"):
        data[0]


def test_compressed_run_lengths():
    """A code that pycocotools wrote of this mask."""
    mask = np.zeros((40, 60), bool)
    mask[3:30, 5:50] = True
    mask[10:20, 20:30] = False
    mask[:, 55:57] = True
    code = "[6k0=" + "0" * 28 + r"\OM33" + "MM33" * 9 + "a" + "0" * 39 + "U6e1VM"
    assert np.array_equal(decode({"size": [40, 60], "counts": code}, (60, 40)), mask)
    with pytest.raises(ValueError, match="in the middle"):
        decode({"size": [40, 60], "counts": code[:-1]}, (60, 40))


def test_a_folder_of_images_and_masks(tmp_path):
    for name in ("cats/b", "cats/a", "ants/c"):
        picture(tmp_path / "images" / f"{name}.jpg")
        picture(tmp_path / "masks" / f"{name}.png", mode="L")
    data = open_dataset(f"folder:{tmp_path}")
    assert [data.name(index) for index in range(3)] == ["ants/c", "cats/a", "cats/b"]
    assert data.class_names == ("ants", "cats")
    assert [data[index].target for index in range(3)] == [0, 1, 1]
    expected = np.array(Image.open(tmp_path / "masks" / "cats" / "a.png")) > 0
    assert np.array_equal(data[1].mask.numpy(), expected)
    (tmp_path / "masks" / "cats" / "a.png").unlink()
    with pytest.raises(BrokenFileError, match=r"a\.jpg' has nothing in"):
        open_dataset(f"folder:{tmp_path}")[1]
    picture(tmp_path / "masks" / "cats" / "z.png", mode="L")
    with pytest.raises(DatasetError, match=r"z\.png' has no image"):
        open_dataset(f"folder:{tmp_path}")


def test_human_maps_are_graded(tmp_path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "maps" / "a.png", mode="L")
    sample = open_dataset(f"human:{tmp_path}")[0]
    expected = np.array(Image.open(tmp_path / "maps" / "a.png")) / 255
    assert np.allclose(sample.human.numpy(), expected)
    assert (sample.target, sample.mask) == (None, None)
    deep = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "maps" / "a.png")
    assert np.allclose(open_dataset(f"human:{tmp_path}")[0].human.numpy(), deep / 65535, atol=1e-4)


def test_a_damaged_image_is_named(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "masks" / "a.png", mode="L")
    file = tmp_path / "images" / "a.jpg"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BrokenFileError, match=r"images/a\.jpg' cannot be read as an image"):
        open_dataset(f"folder:{tmp_path}")[0]


def test_orientation_does_not_turn_an_image_away_from_its_mask(tmp_path):
    image = picture(tmp_path / "images" / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "images" / "a.png", exif=exif)
    picture(tmp_path / "masks" / "a.png", mode="L")
    assert np.array_equal(np.array(open_dataset(f"folder:{tmp_path}")[0].image), np.array(image))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scene", "unknown data 'scene'; did you mean 'scenes'"),
        ("voc", "'voc' needs a path"),
        ("voc:nowhere", "there is no folder 'nowhere'"),
        ("coco:nowhere.json", r"there is no file 'nowhere\.json'"),
        ("scenes:nowhere.npz", r"nowhere\.npz' cannot be read as scenes"),
        ("tiny-imagenet:nowhere", "there is no folder 'nowhere'"),
        ("imagenet-segmentation:nowhere.mat", r"gtsegs_ijcv\.mat"),
    ],
)
def test_what_is_not_there_is_named(text, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(text)
