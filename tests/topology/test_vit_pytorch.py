"""The models of vit-pytorch, where it is installed."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from helpers.contract import lively
from helpers.models import rule

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError

pytest.importorskip("vit_pytorch", reason="needs vit-pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 64}


def made(where: str, **options: object) -> torch.nn.Module:
    module, kind = where.split(".")
    torch.manual_seed(0)
    return lively(getattr(import_module(f"vit_pytorch.{module}"), kind)(**{**SIZES, **options})).double()


@pytest.mark.parametrize(
    ("where", "options", "prefix"),
    [
        ("vit.ViT", {}, 1),
        ("vit.ViT", {"pool": "mean"}, 0),
        ("vit.ViT", {"heads": 1, "dim_head": 48}, 1),
        ("simple_vit.SimpleViT", {}, 0),
        ("simple_vit_with_register_tokens.SimpleViT", {}, 4),
        ("simple_vit_with_patch_dropout.SimpleViT", {}, 0),
        ("simple_vit_with_qk_norm.SimpleViT", {}, 0),
        ("vit_with_patch_dropout.ViT", {"patch_dropout": 0.25}, 1),
        ("vit_for_small_dataset.ViT", {}, 1),
        ("distill.DistillableViT", {}, 1),
    ],
)
def test_evidence_is_complete(where, options, prefix):
    model, x = made(where, **options), torch.randn(2, 3, 32, 32).double()
    found = rule(model, "evidence", x, torch.tensor([1, 1]))
    assert found.grid.shape == (2, 4, 4)
    assert found.prefix.shape == (2, prefix)
    torch.testing.assert_close(found.total, model(x)[:, 1].detach())


@pytest.mark.parametrize(
    "where", ["deepvit.DeepViT", "parallel_vit.ViT", "simple_vit_orthog_residual_update.SimpleViT"]
)
def test_another_attention_is_refused(where):
    model, x = made(where), torch.randn(2, 3, 32, 32).double()
    for kind in ("lnstat", "rollout", "gradient"):
        with pytest.raises((RecordingError, UnsupportedModelError)):
            LNStatAttribution(model, rule=kind).relevance(x, 1)
