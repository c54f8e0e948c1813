"""Backbones whose features a head of the user's reads: the last of them, several, one pixel, one character."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.contract import lively
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
Pipeline = Callable[[Tensor], Tensor]
Subject = tuple[nn.Module, Pipeline]

SWIN: dict[str, Any] = {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
PLAIN: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
}  # fmt: skip


def _head(width: int = 48) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, 3)


def _features_only(stages: tuple[int, ...]) -> Subject:
    options: Any = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    model = lively(timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **options))
    heads = [_head(width) for width in (24, 48)]

    def scores(x: Tensor) -> Tensor:
        maps = model(x)
        return torch.stack([heads[stage](maps[stage].mean((1, 2))) for stage in stages]).sum(0)

    return model, scores


def _donut() -> Subject:
    model, head = lively(transformers.DonutSwinModel(transformers.DonutSwinConfig(**SWIN))), _head()
    return model, lambda x: head(model(x).pooler_output)


def _hidden_states() -> Subject:
    config = transformers.ViTConfig(image_size=64, **PLAIN)
    model, head = lively(transformers.ViTModel(config, add_pooling_layer=False)), _head()

    def scores(x: Tensor) -> Tensor:
        seen = model(x, output_hidden_states=True).hidden_states
        return head(seen[-1].mean(1) + seen[1].mean(1))  # type: ignore[no-any-return]

    return model, scores


def _feature_maps() -> Subject:
    config = transformers.Dinov2Config(image_size=64, patch_size=16, out_features=["stage1", "stage2"], **PLAIN)
    model, head = lively(transformers.Dinov2Backbone(config)), _head()
    return model, lambda x: head(sum(one.mean((2, 3)) for one in model(x).feature_maps))


def _pixel() -> Subject:
    """One pixel of a decoder that joins two stages."""
    config = transformers.SwinConfig(out_features=["stage1", "stage2"], **SWIN)
    model, mix = lively(transformers.AutoBackbone.from_config(config)), nn.Conv2d(72, 3, 1)

    def scores(x: Tensor) -> Tensor:
        large, small = model(x).feature_maps
        small = nn.functional.interpolate(small, size=large.shape[-2:], mode="bilinear")
        return mix(torch.cat([large, small], 1))[:, :, 5, 7]  # type: ignore[no-any-return]

    return model, scores


def _character() -> Subject:
    """The last character of an image-to-text model."""
    decoder = transformers.TrOCRConfig(
        vocab_size=20, d_model=48, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=16, cross_attention_hidden_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    encoder = transformers.ViTConfig(image_size=64, **PLAIN)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model, before = lively(transformers.VisionEncoderDecoderModel(both)), torch.tensor([[1, 5, 6]])
    return model, lambda x: model(pixel_values=x, decoder_input_ids=before.expand(len(x), -1)).logits[:, -1]


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "features_only": lambda: _features_only((1,)),
    "features_only, both stages": lambda: _features_only((0, 1)),
    "Donut": _donut,
    "hidden_states": _hidden_states,
    "feature_maps of DINOv2": _feature_maps,
    "a pixel of a decoder": _pixel,
    "a character": _character,
}
WITHOUT_A_START = ["a pixel of a decoder", "a character"]


def _images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SUBJECTS)
def test_evidence_adds_up_to_the_score_in_every_call(name: str) -> None:
    torch.manual_seed(0)
    model, pipeline = SUBJECTS[name]()
    lnstat, x = LNStatAttribution(pipeline, model, rule="evidence"), _images()
    first, delta = lnstat.attribute(x, target=1, return_convergence_delta=True)
    scores = pipeline(x)[:, 1].detach()
    assert float(delta.abs().max()) < 1e-4 * max(1.0, float(scores.abs().max()))
    assert bool(first.flatten(1).any(1).all())
    assert torch.equal(lnstat.attribute(x, target=1), first)
    assert bool(LNStatAttribution(pipeline, model).attribute(x, target=1).flatten(1).any(1).all())


@pytest.mark.parametrize("name", WITHOUT_A_START)
def test_a_rollout_of_one_pixel_or_character_is_refused(name: str) -> None:
    model, pipeline = SUBJECTS[name]()
    with pytest.raises(UnsupportedModelError, match="where class-agnostic relevance starts is not defined"):
        LNStatAttribution(pipeline, model, rule="rollout").attribute(_images())


def test_features_of_a_swin_without_a_last_norm_are_those_of_one_whose_norm_is_none() -> None:
    model, pipeline = _features_only((1,))
    whole = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4),
        num_classes=3,
    ).eval()  # fmt: skip
    whole.norm = nn.Identity()
    state = {name.replace("layers_", "layers."): value for name, value in model.state_dict().items()}
    missing, unexpected = whole.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("head") for name in missing)
    head = _head()
    whole.head.fc.load_state_dict(head.state_dict())
    for rule in ("lnstat", "evidence", "rollout", "gradient"):
        found = LNStatAttribution(pipeline, model, rule=rule).relevance(_images(), target=1)
        expected = LNStatAttribution(whole, rule=rule).relevance(_images(), target=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=rule)
