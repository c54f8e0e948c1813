"""The truth goes where the model's own preprocessing puts the image, for every library's."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.models import Swin_T_Weights, ViT_B_16_Weights
from torchvision.transforms import InterpolationMode
from transformers import CLIPImageProcessor, ViTImageProcessor

from captum_lnstat.evaluation.datasets import BrokenFileError, Sample
from captum_lnstat.evaluation.frame import Frame

SIZES = [(160, 104), (97, 161), (64, 64), (500, 375), (375, 500), (32, 31), (1200, 799), (28, 224)]


def transform(size, crop=1.0, **options):
    options = {"interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3, **options}
    return create_transform((3, *size), is_training=False, crop_pct=crop, **options)


def photo(width, height):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)).resize((width, height))


def blobs(width, height):
    """A mask with parts of every size, single pixels among them."""
    rng = np.random.default_rng(width + height)
    fine = rng.random((height, width)) > 0.9
    coarse = Image.fromarray(rng.random((7, 9)) > 0.6).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(fine ^ np.asarray(coarse))


def grey(mask):
    return Image.fromarray(np.repeat(mask.numpy()[..., None], 3, 2).astype(np.uint8) * 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"size": (48, 48), "crop": 0.9, "interpolation": "bicubic"},
        {"size": (224, 224), "crop": 0.875, "interpolation": "bicubic"},
        {"size": (224, 224), "crop": 1.0, "interpolation": "bilinear"},
        {"size": (48, 48), "crop": 0.95, "interpolation": "bicubic", "crop_mode": "squash"},
        {"size": (48, 32), "crop": 0.9, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)},
    ],
)
def test_masks_are_resized_and_cut_as_timm_does_it(options, size):
    """Timm's own transform, told to take the nearest pixel, makes the same of a mask, pixel for pixel."""
    mask = blobs(*size)
    frame = Frame(transform(**options))
    expected = transform(**{**options, "interpolation": "nearest"})(grey(mask))[0]
    assert torch.equal(frame.truth(mask), expected > expected.mean())
    assert frame.size == options["size"]
    assert (frame.mean, frame.std) == (options.get("mean", (0.5,) * 3), options.get("std", (0.5,) * 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weights", [Swin_T_Weights.DEFAULT, ViT_B_16_Weights.DEFAULT], ids=["swin", "vit"])
def test_masks_are_resized_and_cut_as_torchvision_does_it(weights, size):
    mask = blobs(*size)
    expected = weights.transforms(interpolation=InterpolationMode.NEAREST)(grey(mask))[0]
    frame = Frame(weights.transforms())
    assert torch.equal(frame.truth(mask), expected > expected.mean())
    assert (frame.mean, frame.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("processor", "cut"),
    [
        (ViTImageProcessor(size={"height": 40, "width": 32}), ((40, 32), 0, 0)),
        (CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}), ((48, 69), 4, 14)),
    ],
    ids=["whole", "cut"],
)
def test_the_cut_is_that_of_hugging_face(processor, cut):
    frame = Frame(lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0])
    assert frame.cut(130, 90) == cut


def test_a_border_is_refused():
    with pytest.raises(ValueError, match="--fit squash"):
        Frame(transform((48, 48), crop_mode="border"))
    padded = Frame(lambda image: transform((48, 48))(image if image.width > 50 else image.resize((8, 8)).rotate(30)))
    with pytest.raises(ValueError, match="with an image of 40 x 40 than resize"):
        padded.truth(torch.ones(40, 40, dtype=torch.bool))


def test_what_two_frames_do_not_share_is_in_their_records():
    records = [
        Frame(transform(size, crop), source).record()
        for size, crop, source in (
            ((48, 48), 0.9, "a"),
            ((48, 48), 0.9, "b"),
            ((48, 48), 0.8, "a"),
            ((48, 40), 0.9, "a"),
        )
    ]
    assert all(records.count(record) == 1 for record in records)


@pytest.mark.parametrize("fit", ["center", "squash"])
def test_truth_goes_along_with_the_image(fit):
    """What is white in the image is what the mask, the box and the map have, wherever resizing and cutting put it."""
    mask = torch.zeros(120, 200, dtype=torch.bool)
    mask[30:90, 60:130] = True
    mask[61] = False  # as thin as a pixel: the nearest pixel has it or not, a mean would close it
    image = Image.fromarray(np.repeat(mask.numpy()[..., None], 3, 2).astype(np.uint8) * 255)
    frame = Frame(transform((48, 48), 0.8, interpolation="nearest", crop_mode=fit))
    sample = Sample("a", image, 1, mask, ~mask, torch.tensor([[60.0, 30, 130, 90]]), mask.float(), ~mask)
    example = frame.example(sample)
    white = example.image[0] > 0
    assert example.image.shape == (3, 48, 48)
    assert 0 < white.float().mean() < 1
    assert torch.equal(example.mask, white)
    assert torch.equal(example.other_mask, ~white)
    assert torch.equal(example.void, ~white)
    assert torch.corrcoef(torch.stack([example.human.flatten(), white.float().flatten()]))[0, 1] > 0.95
    rows, columns = white.any(1).nonzero()[:, 0], white.any(0).nonzero()[:, 0]
    edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert float((example.boxes[0] - edges).abs().max()) <= 0.75


def test_what_is_cut_off_is_gone():
    mask = torch.zeros(50, 200, dtype=torch.bool)
    mask[10:20, :20] = True
    boxes = torch.tensor([[0.0, 10, 20, 20], [90.0, 0, 300, 60]])
    sample = Sample("a", photo(200, 50), 0, mask, mask, boxes)
    frame = Frame(transform((50, 50)))
    example = frame.example(sample)
    assert example.mask is None
    assert example.other_mask is None
    assert example.boxes.tolist() == [[15, 0, 50, 50]]  # the second box, cut at the frame
    alone = frame.example(Sample("a", photo(200, 50), 0, boxes=boxes[:1]))
    assert alone.boxes is None


def test_truth_of_another_size_is_refused():
    with pytest.raises(BrokenFileError, match="mask is 5 x 4 and the image 8 x 8"):
        Sample("a", photo(8, 8), mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(BrokenFileError, match="no area"):
        Sample("a", photo(8, 8), boxes=torch.tensor([[3.0, 3, 3, 5]]))
