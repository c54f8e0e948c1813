"""The image reaches the model as its library would have it, and the truth goes along."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.models import Swin_T_Weights

from captum_lnstat.evaluation.datasets import BrokenFileError, Sample
from captum_lnstat.evaluation.frame import Frame, timm_frame

HALF = (0.5, 0.5, 0.5)


def photo(width, height):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)).resize((width, height))


@pytest.mark.parametrize("size", [(160, 104), (97, 161), (64, 64)])
@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 48, 48), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
        {"input_size": (3, 48, 48), "crop_pct": 1.0, "interpolation": "bilinear"},
        {"input_size": (3, 48, 48), "crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "squash"},
        {"input_size": (3, 48, 32), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
    ],
)
def test_images_are_timms(config, size):
    config = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), **config}
    image = photo(*size)
    torch.testing.assert_close(timm_frame(config).image(image), create_transform(**config, is_training=False)(image))


def test_images_are_torchvisions():
    from captum_lnstat.evaluation.subject import _torchvision_frame

    image = photo(300, 260)
    expected = Swin_T_Weights.DEFAULT.transforms()(image)
    torch.testing.assert_close(_torchvision_frame("swin_t").image(image), expected)


def test_a_border_is_refused():
    with pytest.raises(ValueError, match="--fit squash"):
        timm_frame({"input_size": (3, 8, 8), "crop_mode": "border"})


@pytest.mark.parametrize("fit", ["center", "squash"])
def test_truth_goes_along_with_the_image(fit):
    """What is white in the image is what the mask, the box and the map have, wherever resizing and cutting put it."""
    mask = torch.zeros(120, 200, dtype=torch.bool)
    mask[30:90, 60:130] = True
    mask[61] = False  # as thin as a pixel: the nearest pixel has it or not, a mean would close it
    image = Image.fromarray(np.repeat(mask.numpy()[..., None], 3, 2).astype(np.uint8) * 255)
    frame = Frame((48, 48), (60, 60), "center", HALF, HALF, Image.Resampling.NEAREST)
    frame = frame.squashed() if fit == "squash" else frame
    sample = Sample("a", image, 1, mask, ~mask, torch.tensor([[60.0, 30, 130, 90]]), mask.float(), ~mask)
    framed = frame.framed(sample)
    white = framed.image[0] > 0
    assert framed.image.shape == (3, 48, 48)
    assert 0 < white.float().mean() < 1
    assert torch.equal(framed.mask, white)
    assert torch.equal(framed.other_mask, ~white)
    assert torch.equal(framed.void, ~white)
    assert torch.corrcoef(torch.stack([framed.human.flatten(), white.float().flatten()]))[0, 1] > 0.95
    rows, columns = white.any(1).nonzero()[:, 0], white.any(0).nonzero()[:, 0]
    edges = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert float((framed.boxes[0] - edges).abs().max()) <= 0.75


def test_what_is_cut_off_is_gone():
    mask = torch.zeros(50, 200, dtype=torch.bool)
    mask[10:20, :20] = True
    boxes = torch.tensor([[0.0, 10, 20, 20], [90.0, 0, 300, 60]])
    sample = Sample("a", photo(200, 50), 0, mask, mask, boxes)
    framed = Frame((50, 50), (50, 50)).framed(sample)
    assert framed.mask is None
    assert framed.other_mask is None
    assert framed.boxes.tolist() == [[15, 0, 50, 50]]  # the second box, cut at the frame
    alone = Frame((50, 50), (50, 50)).framed(Sample("a", photo(200, 50), 0, boxes=boxes[:1]))
    assert alone.boxes is None


def test_truth_of_another_size_is_refused():
    with pytest.raises(BrokenFileError, match="mask is 5 x 4 and the image 8 x 8"):
        Sample("a", photo(8, 8), mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(BrokenFileError, match="no area"):
        Sample("a", photo(8, 8), boxes=torch.tensor([[3.0, 3, 3, 5]]))
