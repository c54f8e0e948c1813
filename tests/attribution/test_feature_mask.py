"""One feature a patch, numbered as the relevance grid is, for Captum's perturbation methods."""

from __future__ import annotations

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValueSampling
from helpers.contract import MODELS, images, swin, vit
from helpers.models import CASES, build
from helpers.models import images as case_images
from helpers.own_models import Encoder
from timm.layers import PatchEmbed
from torch import nn

from captum_lnstat import LNStatAttribution, UnsupportedModelError, patch_feature_mask


@pytest.mark.parametrize("name", CASES)
def test_grid_is_that_of_the_explanation(name: str) -> None:
    case, model = CASES[name], build(name)
    mask = patch_feature_mask(model, case.image)
    assert mask.shape == (1, 1, *case.image)
    assert mask.dtype == torch.int64
    assert mask.is_contiguous()
    rows, columns = LNStatAttribution(model, rule="rollout").relevance(case_images(case, 1)).shape[1:]
    assert mask.unique().tolist() == list(range(rows * columns))
    for y in range(case.image[0]):
        for x in range(0, case.image[1], 3):
            assert int(mask[0, 0, y, x]) == y // case.patch[0] * columns + x // case.patch[1]


def test_border_patches_of_a_padded_image_are_cropped() -> None:
    mask = patch_feature_mask(build("vit-dynamic-pad"), (37, 26))[0, 0]
    assert [int((mask == patch).sum()) for patch in (0, 3, 16, 19)] == [64, 16, 40, 10]


def test_unread_pixels_go_with_the_patch_next_to_them() -> None:
    model = vit(img_size=(35, 30))
    mask = patch_feature_mask(model, (35, 30))[0, 0]
    assert mask.unique().tolist() == list(range(12))
    assert mask[34].tolist() == mask[31].tolist()
    assert mask[:, 29].tolist() == mask[:, 23].tolist()
    # They are not read: whatever is there, the scores are the same.
    image = images(2, (35, 30))
    changed = image.clone()
    changed[:, :, 32:], changed[..., 24:] = 7, -7
    assert torch.equal(model(image), model(changed))


@pytest.mark.parametrize("name", MODELS)
def test_feature_ablation_by_hand(name: str) -> None:
    model, image, target = MODELS[name](), images(2), torch.tensor([1, 3])
    mask = patch_feature_mask(model, 32)
    count = int(mask.max()) + 1
    with torch.no_grad():
        values = FeatureAblation(model).attribute(image, target=target, feature_mask=mask, perturbations_per_eval=8)
        for patch in (0, 5, count - 1):
            ablated = image.clone()
            ablated[(mask == patch).expand_as(image)] = 0
            rows, columns = (mask[0, 0] == patch).nonzero().unbind(1)
            side = 32 // int(count**0.5)
            assert rows.min() == patch // (32 // side) * side
            assert columns.min() == patch % (32 // side) * side
            assert len(rows) == side**2
            drop = (model(image) - model(ablated)).gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(values[:, 2, rows[0], columns[0]], drop, rtol=1e-4, atol=1e-5)
    for value in values:
        per_patch = [value[:, mask[0, 0] == patch].unique() for patch in range(count)]
        assert {len(one) for one in per_patch} == {1}
        assert len(torch.cat(per_patch).unique()) > count // 2
    assert not torch.equal(values[0], values[1])


def test_shapley_values_of_patches_add_up() -> None:
    model, image = vit(), images(2)
    mask = patch_feature_mask(model, 32)
    values = ShapleyValueSampling(model).attribute(image, target=1, feature_mask=mask, n_samples=2)
    per_patch = torch.stack([values[:, 0, 8 * (i // 4), 8 * (i % 4)] for i in range(16)], 1)
    difference = (model(image) - model(torch.zeros_like(image)))[:, 1]
    torch.testing.assert_close(per_patch.sum(1), difference.detach(), rtol=1e-4, atol=1e-4)


def test_the_transformer_inside_a_module() -> None:
    model = swin()
    assert torch.equal(patch_feature_mask(nn.DataParallel(nn.Sequential(model)), 32), patch_feature_mask(model, 32))


def test_sizes_that_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"\(32, 40\); the model takes \(32, 32\) only"):
        patch_feature_mask(vit(), (32, 40))
    dynamic = vit(dynamic_img_size=True)
    assert int(patch_feature_mask(dynamic, (40, 16)).max()) == 9
    with pytest.raises(ValueError, match=r"multiples of its patch size \(8, 8\)"):
        patch_feature_mask(dynamic, 36)
    with pytest.raises(ValueError, match="at least one patch"):
        patch_feature_mask(dynamic, 0)


def test_patches_that_overlap() -> None:
    model = vit()
    model.patch_embed.proj = nn.Conv2d(3, 32, 16, 8, padding=4)
    assert isinstance(model.patch_embed, PatchEmbed)
    with pytest.raises(UnsupportedModelError, match="side by side"):
        patch_feature_mask(model, 32)


def test_a_model_without_patches() -> None:
    with pytest.raises(UnsupportedModelError, match="no attention module"):
        patch_feature_mask(nn.Sequential(nn.Conv2d(3, 3, 1)), 32)


@pytest.mark.parametrize("outside", [True, False])
def test_tokens_before_the_batch(outside: bool) -> None:
    mask = patch_feature_mask(Encoder(outside=outside).eval(), (32, 48))
    assert int(mask.max()) + 1 == 24
    assert mask[0, 0, ::8, ::8].flatten().tolist() == list(range(24))


def test_patches_that_are_shuffled_on_their_way_lie_where_they_are_cut() -> None:
    class Shuffled(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = (self.cut(x).flatten(2).mT + self.place)[:, torch.randperm(24)]
            return self.say(self.mix(t).mean(1))

    mask = patch_feature_mask(Shuffled(batch_first=True).eval(), (32, 48))
    assert mask[0, 0, ::8, ::8].flatten().tolist() == list(range(24))
