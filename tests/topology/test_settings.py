"""Settings that were changed after the model was built: what ran counts, and what does not fit it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.models import enliven
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.rules.engine import run

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = ("lnstat", "evidence", "rollout", "gradient")


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def vit(**options: Any) -> nn.Module:
    settings = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "patch_size": 8}
    return enliven(timm.create_model("vit_tiny_patch16_224", **{**settings, **options}), 0).double().eval()


def swin(**options: Any) -> nn.Module:
    settings = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **{**settings, **options})
    return enliven(model, 0).double().eval()


@pytest.mark.parametrize("rule", RULES)
def test_a_shift_that_was_switched_off(rule: str) -> None:
    """The mask of the shift goes with it; then it is a Swin whose windows do not shift, block by block."""
    model = swin()
    block = model.layers[0].blocks[1]
    block.shift_size, block.attn_mask = (0, 0), None
    other = swin()
    other.load_state_dict(model.state_dict(), strict=False)
    other.layers[0].blocks[1] = (
        other.layers[0].blocks[1].__class__(16, (8, 8), num_heads=2, window_size=4, shift_size=0).double()
    )
    other.layers[0].blocks[1].load_state_dict(block.state_dict())
    torch.testing.assert_close(model(images()), other.eval()(images()))
    found, expected = (LNStatAttribution(one, rule=rule).relevance(images(), target=1) for one in (model, other))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["shift_size", "window_size"])
@pytest.mark.parametrize("rule", RULES)
def test_windows_that_are_not_those_that_ran_are_refused(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = swin()
    block = model.layers[0].blocks[1]
    ran, said = {"shift_size": ((2, 2), (0, 0)), "window_size": ((4, 4), (2, 8))}[name]
    block.register_forward_pre_hook(lambda module, _: setattr(module, name, ran))
    block.register_forward_hook(lambda module, *_: setattr(module, name, said))
    model(images())
    with pytest.raises(UnsupportedModelError, match=r"'layers.0.blocks.1' is given .* tokens are moved"):
        LNStatAttribution(model, rule=rule).relevance(images(), target=1)
    # And if the values had not been followed:
    monkeypatch.setattr("captum_lnstat.rules.engine.check_own_values", lambda *_: None)
    with pytest.raises(RecordingError, match=r"what block 'layers.0.blocks.1' adds to the stream is not"):
        LNStatAttribution(model, rule=rule).relevance(images(), target=1)


def test_a_patch_size_that_is_not_what_ran() -> None:
    model = vit(dynamic_img_size=True)
    expected = LNStatAttribution(model).attribute(images(), target=1)
    model.patch_embed.patch_size = (4, 4)
    assert LNStatAttribution(model).describe(images()).patch == (8, 8)
    assert torch.equal(LNStatAttribution(model).attribute(images(), target=1), expected)


@pytest.mark.parametrize("rule", RULES)
def test_prefix_tokens_are_those_that_were_joined(rule: str) -> None:
    model = vit()
    expected = LNStatAttribution(model, rule=rule).relevance(images(), target=1)
    model.num_prefix_tokens = 0
    torch.testing.assert_close(LNStatAttribution(model, rule=rule).relevance(images(), target=1), expected)
    model.num_prefix_tokens = 2
    with pytest.raises(RecordingError, match="the first block saw 17 tokens; expected 2 prefix tokens"):
        LNStatAttribution(model, rule=rule).relevance(images(), target=1)


@pytest.mark.parametrize(("built", "said"), [("avg", "token"), ("token", "avg")])
@pytest.mark.parametrize("rule", RULES)
def test_a_pooling_is_the_one_that_ran(built: str, said: str, rule: str) -> None:
    model = vit(global_pool=built)
    expected = LNStatAttribution(model, rule=rule).relevance(images(), target=1)
    model.head.register_forward_pre_hook(lambda *_: setattr(model, "global_pool", said))

    def forward(x: Tensor) -> Tensor:
        model.global_pool = built
        scores: Tensor = model(x)
        return scores

    found = LNStatAttribution(forward, model, rule=rule).relevance(images(), target=1)
    torch.testing.assert_close(found, expected)


def test_overlapping_patches_of_hugging_face() -> None:
    """A stride that was halved, and positions for what it makes."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    hugging = transformers.ViTForImageClassification(config)
    model = enliven(hugging, 0).double().eval()
    embeddings = next(m for m in model.modules() if isinstance(m, transformers.models.vit.modeling_vit.ViTEmbeddings))
    embeddings.patch_embeddings.projection.stride = (4, 4)
    embeddings.position_embeddings = nn.Parameter(torch.randn(1, 50, 24, dtype=torch.float64))
    trace = run(model, model, images(), [1]).trace
    assert (trace.grid, trace.patch, trace.origin) == ((7, 7), (4, 4), (2.0, 2.0))
