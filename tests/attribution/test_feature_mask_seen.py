"""Feature masks of models that are not timm's: from a recorded pass, checked against what each token reads."""

from __future__ import annotations

import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from captum_lnstat import LNStatAttribution, UnsupportedModelError, patch_feature_mask

SMALL = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class Own(nn.Module):
    """A model of nobody's: patches by a convolution, two encoder layers, the mean."""

    def __init__(self, stride: int = 8, *, kernel: int = 8, padding: int = 0) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 16, kernel, stride, padding)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens).mean(1))


def swinv2() -> nn.Module:
    return Swinv2ForImageClassification(
        Swinv2Config(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )


MODELS = {
    "torchvision ViT": (lambda: VisionTransformer(32, 8, 1, 2, 16, 16), (32, 32), (8, 8)),
    "torchvision Swin": (lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]), (32, 48), (4, 4)),
    "Hugging Face ViT": (
        lambda: ViTForImageClassification(
            ViTConfig(**{**SMALL, "image_size": [32, 64]}, patch_size=16, num_channels=1)
        ),
        (32, 64),
        (16, 16),
    ),
    "Hugging Face Swin V2": (swinv2, (32, 32), (4, 4)),
    "DINOv2 with registers": (
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**SMALL, patch_size=8)),
        (32, 32),
        (8, 8),
    ),
    "CLIP": (lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL, patch_size=8)), (32, 32), (8, 8)),
    "own": (Own, (32, 40), (8, 8)),
    "own, wrapped": (lambda: nn.DataParallel(nn.Sequential(Own())), (24, 32), (8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_pixel_is_in_its_patch(name: str) -> None:
    make, (height, width), (tall, wide) = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    model.get_submodule(next(name for name, _ in model.named_modules() if name)).eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    mask = patch_feature_mask(model, (height, width))
    rows, columns = torch.arange(height) // tall, torch.arange(width) // wide
    assert torch.equal(mask, (rows[:, None] * (width // wide) + columns)[None, None])
    assert mask.dtype == torch.int64
    assert mask.is_contiguous()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["torchvision ViT", "own"])
def test_ablation_by_the_mask_is_that_of_the_patches(name: str) -> None:
    make, size, patch = MODELS[name]
    torch.manual_seed(0)
    model, image = make().eval(), torch.randn(1, 3, *size)
    for head in (module for module in model.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(head.weight, std=0.3)
    mask = patch_feature_mask(model, size)
    with torch.no_grad():
        values = FeatureAblation(model).attribute(image, target=1, feature_mask=mask)
        row, column = 1, 2
        without = image.clone()
        without[..., patch[0] * row : patch[0] * (row + 1), patch[1] * column : patch[1] * (column + 1)] = 0
        drop = (model(image) - model(without))[0, 1]
    torch.testing.assert_close(values[0, 0, patch[0] * row, patch[1] * column], drop)
    grid = LNStatAttribution(model).relevance(image, 1).shape[1:]
    assert int(mask.max()) + 1 == grid[0] * grid[1]


def test_what_the_model_pads_and_what_it_leaves_unread() -> None:
    # Hugging Face pads on the right and below; a plain convolution leaves the rest unread.
    padded = patch_feature_mask(swinv2(), (30, 33))[0, 0]
    assert padded.shape == (30, 33)
    assert (int(padded[29, 32]), int((padded == 71).sum())) == (71, 2)
    unread = patch_feature_mask(Own(), (35, 37))[0, 0]
    assert (int(unread.max()), int((unread == 15).sum())) == (15, 11 * 13)


def test_patches_that_overlap_or_lie_elsewhere_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"row 0, column 1 changes when only pixels outside the 4 x 4 px"):
        patch_feature_mask(SegformerForImageClassification(SegformerConfig()), 64)
    with pytest.raises(UnsupportedModelError, match="changes when only pixels outside the 8 x 8 px"):
        patch_feature_mask(Own(kernel=10, padding=1), 32)
    shifted = Own()
    shifted.cut = nn.Sequential(nn.ZeroPad2d((4, -4, 4, -4)), shifted.cut)
    with pytest.raises(UnsupportedModelError, match="expected patches that lie side by side"):
        patch_feature_mask(shifted, 32)


def test_sizes_that_the_model_does_not_take() -> None:
    for model in (MODELS["torchvision ViT"][0](), MODELS["CLIP"][0]()):
        with pytest.raises(ValueError, match=r"image_size is \(40, 40\); \w+ does not run on images of that size: "):
            patch_feature_mask(model, 40)
    with pytest.raises(ValueError, match=r"image_size is \(4, 32\); Own does not run"):
        patch_feature_mask(Own(), (4, 32))
