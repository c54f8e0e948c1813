"""What a model sees of an image, measured; and that a map lands on the pixels that its patches were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from captum_lnstat.explanation.subject.crop import measure, on_image

NORMALISED = [transforms.ToTensor(), transforms.Normalize((0.2, 0.4, 0.6), (0.5, 0.25, 0.125))]


def center_crop_box(size: tuple[int, int], resized: int, crop: int) -> tuple[float, ...]:
    """By torchvision's own arithmetic: the shorter side to ``resized``, whole pixels, the middle of it."""
    width, height = size
    short = min(size)
    new = [resized if side == short else int(resized * side / short) for side in size]
    corner = [round((side - crop) / 2) for side in new]
    scale = [width / new[0], height / new[1]]
    return tuple(x * s for x, s in zip((*corner, corner[0] + crop, corner[1] + crop), scale * 2, strict=True))


@pytest.mark.parametrize("size", [(400, 240), (240, 400), (300, 300), (90, 70), (1100, 500)])
def test_the_box_of_a_resize_and_crop_is_found_to_the_pixel(size):
    transform = create_transform((3, 224, 224), is_training=False, crop_pct=0.9, interpolation="bicubic")
    box = measure(transform, size).box
    assert box is not None
    np.testing.assert_allclose(box, center_crop_box(size, 248, 224), atol=0.5)


def test_a_resize_alone_sees_the_whole_image():
    view = measure(transforms.Compose([transforms.Resize((56, 112)), *NORMALISED]), (480, 300))
    assert view.box == (0.0, 0.0, 480.0, 300.0)


def test_a_crop_alone_is_found_where_it_is():
    crop = transforms.Lambda(lambda image: image.crop((17, 5, 81, 53)))
    view = measure(transforms.Compose([crop, *NORMALISED]), (200, 160))
    assert view.box is not None
    np.testing.assert_allclose(view.box, (17, 5, 81, 53), atol=0.1)


def test_the_normalisation_is_measured():
    view = measure(transforms.Compose([transforms.Resize((32, 32)), *NORMALISED]), (64, 48))
    np.testing.assert_allclose(view.mean, (0.2, 0.4, 0.6), atol=1e-6)
    np.testing.assert_allclose(view.std, (0.5, 0.25, 0.125), atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        transforms.Pad(40),
        transforms.Lambda(lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        transforms.Lambda(lambda image: image.rotate(20)),
        transforms.Lambda(lambda image: image.transpose(Image.Transpose.TRANSPOSE)),
        transforms.Grayscale(3),
    ],
    ids=["padded", "flipped", "rotated", "transposed", "grey"],
)
def test_a_transform_that_does_more_has_no_box(step):
    view = measure(transforms.Compose([step, transforms.Resize((64, 64)), *NORMALISED]), (128, 128))
    assert view.box is None


def test_a_transform_that_ignores_the_image_has_no_view():
    view = measure(lambda image: torch.zeros(3, 8, 8), (16, 16))
    assert view.box is None
    assert view.std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("size", "grid"), [((60, 40), (4, 6)), ((31, 77), (5, 3)), ((8, 8), (2, 2)), ((500, 20), (2, 9))]
)
def test_the_peak_of_one_patch_is_on_the_pixels_of_that_patch(size, grid):
    """Of a box inside an image that is not square: every patch in turn, against the box that it covers."""
    width, height = size
    box = (0.1 * width, 0.05 * height, 0.9 * width, 0.95 * height)
    cell = (box[2] - box[0]) / grid[1], (box[3] - box[1]) / grid[0]
    for row in range(grid[0]):
        for column in range(grid[1]):
            hot = np.zeros(grid)
            hot[row, column] = 1
            values = on_image(hot, box, size)
            y, x = np.unravel_index(np.nanargmax(values), values.shape)
            assert box[0] + column * cell[0] - 0.5 <= x + 0.5 <= box[0] + (column + 1) * cell[0] + 0.5
            assert box[1] + row * cell[1] - 0.5 <= y + 0.5 <= box[1] + (row + 1) * cell[1] + 0.5
            # Every other pixel of which this patch is the nearest has more of it than of none.
            centre = box[0] + (column + 0.5) * cell[0], box[1] + (row + 0.5) * cell[1]
            inside = np.abs(np.arange(width) + 0.5 - centre[0]) < cell[0] / 2
            down = np.abs(np.arange(height) + 0.5 - centre[1]) < cell[1] / 2
            assert (values[np.ix_(down, inside)] > 0.2).all()


def test_pixels_that_the_model_did_not_see_have_no_value():
    values = on_image(np.ones((2, 2)), (2.0, 1.0, 6.0, 4.0), (8, 6))
    expected = np.full((6, 8), np.nan)
    expected[1:4, 2:6] = 1
    np.testing.assert_array_equal(values, expected)


def test_the_map_on_the_image_is_torch_s_bilinear_interpolation():
    grid = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = on_image(grid.numpy(), (0, 0, 31, 44), (31, 44))
    theirs = torch.nn.functional.interpolate(grid[None, None], (44, 31), mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)
