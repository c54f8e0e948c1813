"""Models of one channel, of other sizes, and such that somebody has wrapped: what they take is looked for inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from captum_lnstat import LNStatAttribution, SourceError, explain
from captum_lnstat.doctor import examine

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize((160, 120))
VIT = {"patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
HF = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What is wrapped does not say how its images were prepared.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not say how its images were prepared")


class Wrapped(nn.Module):
    """A user's own module around a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = self.net(images)
        return scores if isinstance(scores, torch.Tensor) else scores.logits


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model.eval()


def swin(channels: int) -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(image_size=32, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_channels=channels)
    )


MODELS = {
    "timm, 64 px, wrapped twice": (lambda: Wrapped(nn.Sequential(VisionTransformer(64, **VIT))), (3, 64, 64)),
    "timm, one channel": (lambda: VisionTransformer(64, in_chans=1, **VIT), (1, 64, 64)),
    "timm, one channel, not square, wrapped": (
        lambda: Wrapped(VisionTransformer((48, 80), in_chans=1, **VIT)),
        (1, 48, 80),
    ),
    "torchvision, 48 px, wrapped": (lambda: Wrapped(TorchvisionViT(48, 16, 1, 2, 24, 48)), (3, 48, 48)),
    "Hugging Face, one channel": (
        lambda: Wrapped(ViTForImageClassification(ViTConfig(image_size=64, num_channels=1, **HF))),
        (1, 64, 64),
    ),
    "Hugging Face, not square": (
        lambda: Wrapped(ViTForImageClassification(ViTConfig(image_size=[32, 64], **HF))),
        (3, 32, 64),
    ),
    "Hugging Face Swin, one channel": (lambda: Wrapped(swin(1)), (1, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_map_is_that_of_the_input_made_by_hand(name: str) -> None:
    make, shape = MODELS[name]
    model = trained(make())
    grey = shape[0] == 1
    mean, std = ((sum(MEAN) / 3,), (sum(STD) / 3,)) if grey else (MEAN, STD)
    prepare = create_transform(shape, False, mean=mean, std=std, crop_pct=0.875, interpolation="bicubic")
    inputs = prepare(PHOTO.convert("L" if grey else "RGB"))
    assert inputs.shape == shape
    found = explain(model, PHOTO)
    assert found.prediction == int(Wrapped(model)(inputs[None]).argmax())
    expected = LNStatAttribution(model).relevance(inputs[None], found.prediction)[0]
    np.testing.assert_allclose(found.grid, expected.detach(), rtol=1e-4, atol=1e-6)
    assert found.relevance.shape == shape[1:]
    np.testing.assert_allclose(np.asarray(found.image)[..., 0] / 255, inputs[0] * std[0] + mean[0], atol=3e-3)
    # The centre crop of 7/8 is found again, for one channel too.
    left, top, right, bottom = found.box
    assert (left + right, top + bottom) == pytest.approx((160, 120), abs=4)  # a pixel of the model
    assert max((right - left) / 160, (bottom - top) / 120) == pytest.approx(0.875, abs=0.03)
    assert (right - left) / (bottom - top) == pytest.approx(shape[2] / shape[1], abs=0.02)
    assert found.on_original.size == PHOTO.size


def test_the_whole_image_for_one_channel() -> None:
    found = explain(trained(VisionTransformer(64, in_chans=1, **VIT)), PHOTO, whole=True)
    assert found.box == (0, 0, 160, 120)
    assert found.image.getbands() == ("R", "G", "B")


def test_the_preprocessing_of_the_wrapped_model_is_taken_and_said() -> None:
    inner = VisionTransformer(64, **VIT)
    inner.pretrained_cfg = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    model = trained(Wrapped(inner))
    with pytest.warns(UserWarning, match="Wrapped does not say .*; that of the VisionTransformer inside it is taken"):
        found = explain(model, PHOTO)
    assert found.box == pytest.approx((20, 0, 140, 120), abs=2)
    inputs = create_transform((3, 64, 64), False, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)(PHOTO)
    np.testing.assert_allclose(np.asarray(found.image) / 255, (inputs * 0.25 + 0.5).permute(1, 2, 0), atol=5e-2)


@pytest.mark.parametrize(("of_timm", "of_transformers"), [(2, 2), (4, 4), (16, 12)])
def test_channels_that_a_picture_does_not_have(of_timm: int, of_transformers: int) -> None:
    for channels, model in (
        (of_timm, VisionTransformer(32, in_chans=of_timm, **VIT)),
        (
            of_transformers,
            Wrapped(ViTForImageClassification(ViTConfig(image_size=32, num_channels=of_transformers, **HF))),
        ),
    ):
        trained(model)
        with pytest.raises(SourceError, match=rf"have {channels} channels, .* transform=, .* \({channels}, height"):
            explain(model, PHOTO)
        # Both ways that the message names work, and give the same.
        inputs = torch.rand(channels, 32, 32)
        given = explain(model, inputs)
        made = explain(model, PHOTO, transform=lambda image: inputs)  # noqa: B023
        expected = LNStatAttribution(model).relevance(inputs[None], given.prediction)[0].detach()
        for found in (given, made):
            np.testing.assert_allclose(found.grid, expected, rtol=1e-4, atol=1e-6)
            assert found.cautions == (f"the input has {channels} channels; the picture shows their mean",)
            grey = np.asarray(found.image)[..., 0].astype(float)
            assert np.corrcoef(grey.ravel(), inputs.mean(0).ravel())[0, 1] > 0.999


def test_an_input_that_the_model_does_not_take() -> None:
    model = trained(Wrapped(VisionTransformer(32, in_chans=1, **VIT)))
    for shape in ((3, 32, 32), (1, 48, 48)):
        with pytest.raises(SourceError, match=rf"cannot be run on an input of shape \(1, {shape[0]}.*pass transform="):
            explain(model, torch.rand(shape))
    with pytest.raises(SourceError, match=r"made \(32, 32\) of an image; expected"):
        explain(model, PHOTO, transform=lambda image: torch.zeros(32, 32))


def test_doctor_gives_the_model_its_channels() -> None:
    for model in (VisionTransformer(32, in_chans=4, **VIT), swin(1)):
        found = examine(trained(model), (32, 32))
        assert found.refusal is None, found.refusal
        assert found.description is not None
