"""The rules against dense matrices of all tokens against all tokens, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.models import CASES, FEW, SWINS, VITS, build, explain, float32_model, images, rule, targets
from helpers.oracles import assert_same, dense, middle_heavy, out_of_focus
from torch import Tensor

from captum_lnstat import AttentionRollout, GenericAttention, LNStatAttribution

ALL = [*VITS, *SWINS]


@pytest.mark.parametrize("name", ALL)
def test_rollout_is_the_dense_product(name):
    found = rule(build(name), "rollout", images(CASES[name]))
    assert found.grid.dtype == torch.float64
    assert_same(found, dense(name).rollout(), name)
    assert torch.allclose(found.total, torch.ones(2).double(), atol=1e-9)


SETTINGS = [
    ("update", "max", "variance"),
    ("half", "min", "variance"),
    ("deviation", middle_heavy, "uniform"),
    ("update", "variance", "variance"),
    ("half", "deviation", "variance"),
    ("half", "mean", "uniform"),
]


@pytest.mark.parametrize("name", [*FEW, "vit-map-registers", "vit-scale-attn-norm", "swin1-shift-fused"])
@pytest.mark.parametrize(("residual", "fusion", "merging"), SETTINGS)
def test_rollout_settings_are_the_dense_product(name, residual, fusion, merging):
    options = {"residual": residual, "head_fusion": fusion, "merging": merging}
    found = rule(build(name), "rollout", images(CASES[name]), **options)
    assert_same(found, dense(name).rollout(residual, fusion, merging), name)


@pytest.mark.parametrize("name", ["vit-class", "swin1-padded-7", "swin2-odd-grids"])
def test_settings_change_the_answer(name):
    base = dense(name).rollout().tokens
    others = [dense(name).rollout(*options).tokens for options in SETTINGS]
    for other in others:
        assert float((other - base).abs().max() / base.max()) > 0.01


PADDED = ["padded-4", "padded-7", "windows-per-stage", "odd-grids", "always-partition", "dynamic", "resized"]


@pytest.mark.parametrize("name", SWINS)
def test_padding_takes_mass_where_there_is_padding(name):
    lost = rule(build(name), "rollout", images(CASES[name])).padding
    if any(part in name for part in PADDED):
        assert bool((lost > 1e-4).all())
    else:
        assert torch.equal(lost, torch.zeros(2).double())


@pytest.mark.parametrize("name", ALL)
def test_mass_is_conserved_in_float32(name):
    model, x = float32_model(name), images(CASES[name], 3, dtype=torch.float32)
    for residual, fusion in (("deviation", "variance"), ("update", "max")):
        found = rule(model, "rollout", x, residual=residual, head_fusion=fusion, merging="variance")
        assert found.grid.dtype == torch.float32
        assert float((found.total - 1).abs().max()) <= 1e-5
        assert bool((found.grid >= 0).all())


@pytest.mark.parametrize("name", FEW)
def test_attention_rollout_is_the_dense_product(name):
    found = explain(AttentionRollout(build(name)), images(CASES[name]))
    assert_same(found, dense(name).rollout("half", "mean"), name)


@pytest.mark.parametrize("name", ["vit-class", "vit-map", "swin1-padded-7", "swin2-padded-4"])
def test_float32_is_near_the_float64_oracle(name):
    x = images(CASES[name])
    found = rule(float32_model(name), "rollout", x.float())
    # The model itself differs by its float error here; the rules alone are held to 1e-9 above.
    assert_same(found, dense(name).rollout(), name, rtol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_evidence_is_the_dense_sum(name):
    target = targets(2)
    found = rule(build(name), "evidence", images(CASES[name]), target)
    assert_same(found, dense(name).evidence(target), name)


@pytest.mark.parametrize("name", FEW)
def test_contrastive_evidence_is_the_dense_sum(name):
    target = targets(2, 2)
    found = rule(build(name), "evidence", images(CASES[name]), target, contrastive=True)
    assert_same(found, dense(name).evidence(target, contrastive=True), name)


@pytest.mark.parametrize(
    "name", ["vit-registers", "vit-gated-scale-norm-layer-scale", "swin1-padded-7", "swin2-odd-grids"]
)
@pytest.mark.parametrize(("residual", "fusion", "merging"), SETTINGS)
def test_evidence_settings_are_the_dense_sum(name, residual, fusion, merging):
    if name not in CASES:
        pytest.skip("this timm has no gated attention")
    target = targets(2)
    options = {"residual": residual, "head_fusion": fusion, "merging": merging}
    found = rule(build(name), "evidence", images(CASES[name]), target, **options)
    expected = dense(name).evidence(target, residual=residual, fusion=fusion, merging=merging)
    assert_same(found, expected, name)


@pytest.mark.parametrize("name", [*FEW, "vit-map", "swin2-shift"])
@pytest.mark.parametrize("contrastive", [True, False])
def test_lnstat_is_the_positive_part_of_the_smoothed_evidence(name, contrastive):
    target = targets(2, 3)
    found = rule(build(name), "lnstat", images(CASES[name]), target, contrastive=contrastive)
    since = 0 if name in SWINS else 2 * len(dense(name).blocks) // 3
    said, _ = (
        dense(name).evidence(target, contrastive=contrastive, since=since, prefix=CASES[name].prefix).split(CASES[name])
    )
    for got, e in zip(found.grid, said, strict=True):
        expected = torch.relu(out_of_focus(e))
        assert float((got - expected).abs().max()) <= 1e-9 * float(expected.max())
        assert float(expected.max()) > 0
    # Everything is on the grid: there is no constant, and nothing on prefix tokens or padding.
    assert torch.equal(found.total, found.grid.flatten(1).sum(1))


@pytest.mark.parametrize("name", ["vit-registers", "swin1-odd-grids", "swin2-padded-4"])
def test_settings_that_are_not_given(name):
    x, target = images(CASES[name]), targets(2)
    for kind in ("lnstat", "evidence", "rollout", "gradient"):
        said = rule(build(name), kind, x, target, merging="variance")
        assert torch.equal(LNStatAttribution(build(name), rule=kind).relevance(x, target), said.grid)
    lnstat = rule(build(name), "lnstat", x, target, merging="variance")
    assert torch.equal(LNStatAttribution(build(name)).relevance(x, target), lnstat.grid)


GRADIENT = [*FEW, "vit-map-registers", "vit-class-explicit", "vit-qk-norm", "vit-scale-attn-norm", "swin1-shift-fused"]


@pytest.mark.parametrize("name", GRADIENT)
def test_generic_attention_is_chefers_rule(name):
    target = targets(2)
    found = explain(GenericAttention(build(name)), images(CASES[name]), target)
    assert_same(found, dense(name, graph=True).gradient(target, keep=True), name)


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_chefers_rule_with_token_statistics(name, normalize):
    target = targets(2)
    found = rule(build(name), "gradient", images(CASES[name]), target, normalized=normalize)
    assert_same(found, dense(name, graph=True).gradient(target, normalize=normalize), name)


@pytest.mark.parametrize("name", ["vit-class", "swin1-odd-grids"])
@pytest.mark.parametrize(
    ("residual", "contrastive", "merging"), [("update", False, "variance"), ("half", True, "uniform")]
)
def test_gradient_settings(name, residual, contrastive, merging):
    target = targets(2)
    options = {"residual": residual, "contrastive": contrastive, "merging": merging}
    found = rule(build(name), "gradient", images(CASES[name]), target, **options)
    assert_same(found, dense(name, graph=True).gradient(target, normalize=True, **options), name)


METHODS = {
    "lnstat": lambda model: LNStatAttribution(model),
    "evidence": lambda model: LNStatAttribution(model, rule="evidence"),
    "rollout": lambda model: LNStatAttribution(model, rule="rollout", merging="variance"),
    "gradient": lambda model: LNStatAttribution(model, rule="gradient"),
    "as Chefer et al.": lambda model: LNStatAttribution(model, rule="gradient", normalized=False),
    "AttentionRollout": AttentionRollout,
    "GenericAttention": GenericAttention,
}
BATCHED = ["vit-registers", "vit-map", "swin1-padded-4", "swin1-shift-fused", "swin2-odd-grids"]


def _close(one: Tensor, other: Tensor) -> bool:
    size = other.abs().flatten(1).amax(1).reshape(-1, *[1] * (other.dim() - 1))
    return bool(((one - other).abs() <= 1e-5 * size).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_of_four_is_four_of_one(name, method):
    explainer = METHODS[method](build(name))
    x, target = images(CASES[name], 4), targets(4, 1)
    together = explainer.relevance(x, target)
    alone = torch.cat([explainer.relevance(x[i : i + 1], target[i : i + 1]) for i in range(4)])
    assert _close(together, alone)
    assert not _close(together, alone.roll(1, 0))
    order = torch.tensor([3, 0, 1, 2])
    assert _close(explainer.relevance(x[order], target[order]), together[order])


@pytest.mark.parametrize("name", ["vit-class", "swin1-shift"])
def test_a_batch_is_its_images_one_by_one_in_float32(name):
    explainer = LNStatAttribution(float32_model(name), rule="evidence")
    x, target = images(CASES[name], 8, dtype=torch.float32), targets(8)
    together = explainer.relevance(x, target)
    alone = torch.cat([explainer.relevance(x[i : i + 1], target[i : i + 1]) for i in range(8)])
    assert _close(together, alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit-map", "swin1-shift-fused", "swin2-odd-grids"])
def test_heads_taken_in_turns_give_the_same(name, method, monkeypatch):
    explainer = METHODS[method](build(name))
    x, target = images(CASES[name]), targets(2)
    at_once = explain(explainer, x, target)
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", 1)
    monkeypatch.setattr("captum_lnstat.recording.sites.QUERIES", 1)
    in_turns = explain(explainer, x, target)
    assert torch.allclose(at_once.grid, in_turns.grid, rtol=1e-10, atol=1e-12)
    assert torch.allclose(at_once.total, in_turns.total, rtol=1e-10, atol=1e-12)


def test_rollout_does_not_depend_on_the_class():
    model, x = build("swin1-shift"), images(CASES["swin1-shift"])
    method = LNStatAttribution(model, rule="rollout")
    assert torch.equal(method.relevance(x, 0), method.relevance(x, 3))
    assert torch.equal(method.relevance(x), method.relevance(x, 3))


@pytest.mark.parametrize("method", ["lnstat", "evidence", "gradient", "GenericAttention"])
def test_other_rules_depend_on_the_class(method):
    explainer = METHODS[method](build("swin1-shift"))
    x = images(CASES["swin1-shift"])
    assert not torch.allclose(explainer.relevance(x, 0), explainer.relevance(x, 3), rtol=1e-2)
