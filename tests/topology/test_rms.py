"""Encoders whose norms are RMSNorms: mean squares in the place of variances."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import lively
from helpers.plain_checks import as_the_oracle, every_rule_in_float32, placed_where_the_stimulus_is
from helpers.plain_oracle import Oracle
from helpers.rms_models import RMS, OwnRMSNorm
from torch import nn

from captum_lnstat import FrozenLayerNorm, LNStatAttribution, RecordingError
from captum_lnstat.rules.engine import run

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {case.name: case for case in RMS}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_that_of_the_oracle(name):
    # Norms of Hugging Face are taken in float32 in a float64 model, too.
    oracle = as_the_oracle(CASES[name], Oracle, size=1e-5 if "-hf-" in name else 1e-9)
    assert not any(step.centred for step in oracle.steps)


@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name):
    every_rule_in_float32(CASES[name])


@pytest.mark.parametrize("residual", ["deviation", "update", "ratio"])
@pytest.mark.parametrize("name", ["rms-timm-aimv2", "rms-own"])
def test_shares_are_those_of_mean_squares(name, residual):
    case = CASES[name]
    model = case.build()
    block = run(model, model, case.images()).trace.blocks[1]
    x, d = block.before, block.attention_update

    def square(t):
        return (t * t).mean(-1)

    if residual == "deviation":
        values = block.site.values(slice(0, 3)).mean(2).flatten(1)[:, None]
        (out,) = block.path
        e, own = d - out.apply(values), square(x - x.mean(1, keepdim=True))
        expected = own / (own + square(e))
    else:
        expected = square(x) / (square(x) + square(d))
        expected = expected if residual == "update" else (square(x) / square(x + d)).clamp(max=1)
    torch.testing.assert_close(block.residual_share(residual), expected)


@pytest.mark.parametrize("name", ["rms-timm-aimv2", "rms-own"])
def test_the_map_lies_where_the_stimulus_is(name):
    placed_where_the_stimulus_is(CASES[name])


def test_the_norm_of_the_head_is_frozen():
    """``u`` is the weight of the class through ``w * x / rms`` with the root mean square a constant."""
    for name in ("rms-timm-torch", "rms-own"):
        case = CASES[name]
        model, x = case.build(), case.images()
        outcome = run(model, model, x, (2,), class_specific=True)
        u, _ = outcome.head.cotangent
        tokens = outcome.head.stream_end.detach()[:, 0]
        norm, head = (model.norm, model.head) if "timm" in name else (model.mix.norm, model.say)
        weight = 1 + norm.g if isinstance(norm, OwnRMSNorm) else norm.weight
        root = ((tokens * tokens).mean(-1, keepdim=True) + (norm.eps or torch.finfo(torch.float64).eps)).sqrt()
        torch.testing.assert_close(u.dense()[:, 0, 0], (head.weight[2] * weight / root).detach())


def test_what_only_has_the_name_of_one_is_refused():
    class RMSNorm(OwnRMSNorm):
        def forward(self, x):
            return super().forward(x).tanh()

    model = lively(CASES["rms-own"].make())
    for part in model.modules():
        if isinstance(part, OwnRMSNorm):
            part.__class__ = RMSNorm
    for kind in ("lnstat", "rollout", "gradient"):
        with pytest.raises(RecordingError, match="expected one call of a LayerNorm or RMSNorm"):
            LNStatAttribution(model, rule=kind).relevance(torch.randn(1, 3, 32, 48), 1)


def test_a_module_of_its_own_is_frozen_for_the_frozen_baseline_too():
    case = CASES["rms-timm-aimv2"]
    model, x = case.build(), case.images()
    assert bool(torch.isfinite(FrozenLayerNorm(model).attribute(x, 1)).all())


def test_nothing_else_is_taken_for_one():
    from captum_lnstat.recording.rms import rms_channels

    assert rms_channels(nn.RMSNorm(4)) == 4
    assert rms_channels(nn.RMSNorm((2, 4))) is None
    assert rms_channels(nn.BatchNorm1d(4)) is None
