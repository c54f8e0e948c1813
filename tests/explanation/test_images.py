"""Images in every form that people have them in, and what is no image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_lnstat import SourceError, explain
from captum_lnstat.explanation.subject.images import image_files, read_item, read_items, to_rgb

RED = np.tile(np.array([255, 0, 0], np.uint8), (4, 6, 1))


def only(images: object) -> Image.Image:
    """The picture of the one item that was read."""
    (item,), single = read_items(images)
    assert single
    assert item.inputs is None
    assert item.picture.mode == "RGB"
    return item.picture


def test_one_image_in_every_form(tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    forms = [
        tmp_path / "red.png", str(tmp_path / "red.png"), Image.fromarray(RED), RED, RED / 255,
        (RED / 255).astype("float32"),
        torch.from_numpy(RED.transpose(2, 0, 1).copy()), np.dstack([RED, np.full((4, 6), 255, np.uint8)]),
    ]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(np.asarray(only(form)), RED)
    grey = only(np.full((4, 6), 7, np.uint8))
    assert grey.getpixel((5, 3)) == (7, 7, 7)
    assert np.array_equal(np.asarray(only(np.full((4, 6, 1), 7, np.uint8))), np.asarray(grey))


def test_a_floating_tensor_is_the_model_s_input_as_it_is():
    inputs = torch.randn(3, 4, 6)
    (item,), single = read_items(inputs)
    assert single
    assert item.picture is None
    assert item.inputs is not None
    assert torch.equal(item.inputs, inputs)


def test_batches_and_lists_are_several_even_if_they_hold_one(tmp_path):
    Image.fromarray(RED).save(tmp_path / "red.png")
    for several in (RED[None], torch.zeros(2, 3, 4, 6), [RED], (tmp_path / "red.png", RED)):
        items, single = read_items(several)
        assert not single
        assert len(items) == len(several)
    assert [item.name for item in read_items([tmp_path / "red.png", RED])[0]] == ["red", "image-1"]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ([], "images is empty"),
        (3, "an image is a int; expected a path"),
        ([None], "an image is a NoneType"),
        (np.zeros((3, 4, 6), np.uint8), r"an array of shape \(3, 4, 6\); expected"),
        (np.zeros((4, 6, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 6), np.uint8), "expected"),
        (np.zeros((4,), np.uint8), "expected"),
        (np.full((4, 6), 1.5), "values from 1.5 to 1.5; expected 0 to 1"),
        (np.full((4, 6), np.nan), "expected 0 to 1"),
        (np.zeros((4, 6), np.int64), "dtype int64; expected uint8"),
        (np.zeros((4, 6), bool), "dtype bool"),
        (torch.zeros(4, 6), r"a tensor of shape \(4, 6\)"),
        (torch.zeros(1, 1, 3, 4, 6), "expected"),
        ("nowhere.png", "there is no file 'nowhere.png'"),
        (Path(__file__).parents[1], "tests' is a folder; expected an image, or a list of the images in it"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(image, says):
    with pytest.raises(SourceError, match=says):
        read_items(image)


def test_a_folder_gives_its_images_by_name_and_nothing_else(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png"):
        Image.fromarray(RED).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").write_text("no image, but called one")
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG", "broken.png"]
    with pytest.raises(SourceError, match="there is no image in the folder"):
        image_files(tmp_path / "folder.png")


def test_a_file_cut_short_is_named(tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(SourceError, match=r"half\.png' cannot be read as an image: "):
        read_item(tmp_path / "half.png")


def test_of_several_pictures_in_a_file_the_first_is_taken_and_said_to_be(tmp_path: Path):
    first, second = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    for name in ("a.gif", "a.tif", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        item = read_item(tmp_path / name)
        assert item.picture is not None
        assert item.picture.getpixel((0, 0))[0] > 250
        assert item.caution == "the file holds 2 pictures; the first is explained"
    first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "one.png")
    assert [read_item(tmp_path / name).caution for name in ("camera.jpg", "one.png")] == ["", ""]
    assert explain("swin-mini", tmp_path / "a.gif").cautions == ("the file holds 2 pictures; the first is explained",)


def test_greyscale_palette_and_deep_images_become_rgb():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(to_rgb(deep)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert np.asarray(to_rgb(unit)).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    elevation = Image.fromarray(np.array([[-100.0, 900.0]], np.float32))
    assert np.asarray(to_rgb(elevation)).tolist() == [[[0] * 3, [255] * 3]]
    assert to_rgb(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    palette = Image.new("RGB", (1, 1), (255, 0, 0)).convert("P")
    assert to_rgb(palette).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_is_put_on_white(mode):
    black = Image.new("RGBA", (1, 1), (0, 0, 0, 51)).convert(mode)
    assert to_rgb(black).getpixel((0, 0)) == (204, 204, 204)
