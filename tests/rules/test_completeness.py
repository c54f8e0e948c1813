"""Evidence adds up to the score, and its constant is the one that biases and betas make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from helpers.models import CASES, FEW, OPTIONS, build, enliven, images, rule, targets
from helpers.oracles import Capture, dense
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError
from captum_lnstat.rules.engine import run
from captum_lnstat.rules.evidence import check_complete

FAMILIES = [
    *FEW,
    "vit-map",
    "vit-avg-norm-first",
    "vit-dynamic-pad",
    "swin1-shift-fused",
    "swin1-windows-per-stage",
    "swin2-shift",
    "swin2-one-axis-shift",
]


def _score(logits: Tensor, target: Tensor, contrastive: bool) -> Tensor:
    chosen = logits.gather(1, target[:, None])[:, 0]
    if not contrastive:
        return chosen
    p = logits.double().softmax(1).scatter(1, target[:, None], 0)
    return chosen - (p / p.sum(1, keepdim=True) * logits).sum(1)


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_evidence_adds_up_in_float32(name, seed, contrastive):
    model, x, target = build(name, seed, torch.float32), images(CASES[name], 2, seed, torch.float32), targets(2, seed)
    with torch.no_grad():
        score = _score(model(x), target, contrastive)
    found = rule(model, "evidence", x, target, contrastive=contrastive)
    total = found.grid.sum((1, 2)) + found.prefix.sum(1) + found.padding + found.constant
    assert bool(((total - score).abs() <= 1e-4 * score.abs().clamp(min=1)).all())
    assert float(found.grid.abs().sum()) > 0.5  # there is something to add up


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_evidence_adds_up_in_float64(name, seed, contrastive):
    model, x, target = build(name, seed), images(CASES[name], 2, seed), targets(2, seed)
    with torch.no_grad():
        score = _score(model(x), target, contrastive)
    found = rule(model, "evidence", x, target, contrastive=contrastive, residual="update", head_fusion="max")
    assert bool(((found.total - score).abs() <= 1e-9 * score.abs().clamp(min=1)).all())


@pytest.mark.parametrize("name", ["vit-class", "swin1-padded-7", "swin2-padded-4"])
def test_delta_is_what_is_missing(name):
    model, x, target = build(name, 4, torch.float32), images(CASES[name], 2, 4, torch.float32), targets(2)
    method = LNStatAttribution(model, rule="evidence", **OPTIONS)
    attributions, delta = method.attribute(x, target, return_convergence_delta=True)
    found = rule(model, "evidence", x, target)
    with torch.no_grad():
        score = _score(model(x), target, False)
    assert delta.shape == (2,)
    assert torch.allclose(delta, found.total - score, atol=1e-6)
    assert bool((delta.abs() <= 1e-4 * score.abs().clamp(min=1)).all())
    assert torch.allclose(attributions.sum((1, 2, 3)), found.grid.sum((1, 2)), rtol=1e-4, atol=1e-4)


def _mixture(logits: Tensor, target: Tensor, contrastive: bool) -> Tensor:
    """The score as a weighted sum of the logits."""
    chosen = nn.functional.one_hot(target, logits.shape[1]).to(logits)
    if not contrastive:
        return chosen
    p = logits.softmax(1) * (1 - chosen)
    return chosen - p / (1 - (logits.softmax(1) * chosen).sum(1, keepdim=True))


def _biases_betas_and_mean_values(model: Any, capture: Capture, mixture: Tensor) -> Tensor:
    """The constant of a ViT with an affine head, written down from its parameters and the mean values.

    ``b_c + beta . w_c + sum_blocks (sum_i u_i) . (gamma_ls * (W_proj mean v + b_proj))``, where ``u_i`` is the weight
    of token i in the pooling times ``gamma * w_c``, centred, over the sigma of what the final norm read.
    """
    norm = next((m for m in (model.norm, model.fc_norm) if isinstance(m, nn.LayerNorm)), None)
    if hasattr(model, "head_dist"):
        heads, read = [(model.head, 0.5), (model.head_dist, 0.5)], [0, 1]
    else:
        heads, read = [(model.head, 1.0)], [0]
    constant = mixture.new_zeros(len(mixture))
    total = torch.zeros(len(mixture), model.embed_dim, dtype=mixture.dtype)
    for (head, part), token in zip(heads, read, strict=True):
        w = part * mixture @ head.weight
        constant += part * (mixture @ head.bias)
        if norm is None:
            total += w
            continue
        constant += w @ norm.bias
        seen = capture.inputs[norm]
        sigma = (seen.var(-1, correction=0) + norm.eps).sqrt()
        centred = w * norm.weight - (w * norm.weight).mean(-1, keepdim=True)
        if seen.dim() == 2:  # the norm comes after the pooling
            total += centred / sigma[:, None]
        elif model.global_pool == "avg":  # a mean over the patches of tokens that were normalised one by one
            total += centred * (1 / sigma[:, model.num_prefix_tokens :]).mean(1, keepdim=True)
        else:
            total += centred / sigma[:, token, None]
    for block in model.blocks:
        mean = capture.outputs[block.attn.qkv].chunk(3, -1)[2].mean(1)
        constant += (total * block.attn.proj(mean) * getattr(block.ls1, "gamma", 1)).sum(1)
    return constant


AFFINE = [
    "vit-class",
    "vit-avg",
    "vit-avg-norm-first",
    "vit-avg-no-class",
    "vit-class-fc-norm",
    "vit-class-no-final-norm",
    "vit-registers",
    "vit-registers-avg",
    "vit-distilled",
    "vit-layer-scale",
]


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("name", AFFINE)
def test_constant_is_biases_betas_and_mean_values(name, contrastive):
    model, x, target = build(name), images(CASES[name], 3), targets(3)
    with torch.no_grad():
        capture = Capture(model, x)
        expected = _biases_betas_and_mean_values(model, capture, _mixture(capture.logits, target, contrastive))
    found = rule(model, "evidence", x, target, contrastive=contrastive).constant
    assert float(expected.abs().min()) > 1e-3
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["swin1-shift", "swin2-shift", "swin1-padded-7", "swin2-odd-grids", "swin1-no-biases"])
def test_constant_of_a_swin_is_biases_betas_and_mean_values(name):
    """What the oracle collects below the head is explicit; here the head's part is, too."""
    oracle, target = dense(name), targets(2)
    model: Any = oracle.model
    w = model.head.fc.weight[target]
    affine = model.head.fc.bias[target] + w @ model.norm.bias
    _, head = oracle.cotangent(target)
    assert torch.allclose(head, affine.detach(), rtol=1e-9, atol=1e-9)
    found = rule(build(name), "evidence", images(CASES[name]), target).constant
    assert torch.allclose(found, oracle.evidence(target).constant, rtol=1e-9, atol=1e-9)


def test_a_step_between_the_blocks_that_is_not_known_is_refused():
    model, x = build("vit-class"), images(CASES["vit-class"])
    handle = model.blocks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    for name in ("evidence", "lnstat", "rollout"):
        with pytest.raises(RecordingError, match=r"blocks\.1 does not read what the step before it returned"):
            rule(model, name, x, targets(2))
    handle.remove()
    # Behind the last block it is part of the head, and of the score: evidence adds up.
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    with torch.no_grad():
        scores = model(x).gather(1, targets(2)[:, None])[:, 0]
    assert torch.allclose(rule(model, "evidence", x, targets(2)).total, scores, rtol=1e-6)


def test_evidence_that_does_not_add_up_is_refused():
    model, x, target = build("vit-class"), images(CASES["vit-class"]), targets(2)
    outcome = run(model, model, x, [target], class_specific=True)
    found = rule(model, "evidence", x, target)
    check_complete([found], outcome.trace, [outcome.score])
    off = replace(found, constant=found.constant + torch.tensor([0.0, 0.1]))  # one image of the batch is enough
    with pytest.raises(RecordingError, match=r"misses the score by up to 0\.1"):
        check_complete([off], outcome.trace, [outcome.score])


def test_a_head_that_reads_other_tokens_is_explained_as_it_reads():
    model, x = build("vit-class"), images(CASES["vit-class"])
    model.pool = lambda tokens: tokens.mean(1)
    twin = build("vit-class")
    twin.global_pool, twin.pool_include_prefix = "avg", True
    for name in ("evidence", "lnstat", "rollout", "gradient"):
        found, expected = (rule(one, name, x, targets(2)) for one in (model, twin))
        assert torch.allclose(found.grid, expected.grid, rtol=1e-9)
        assert torch.allclose(found.prefix, expected.prefix, rtol=1e-9)


@pytest.mark.parametrize("hidden", ["from all", "of one image", "from one head"])
@pytest.mark.parametrize("depth", [2, 3])
def test_a_query_that_may_see_nothing(hidden: str, depth: int) -> None:
    """The fused kernel gives it nothing: no mean value either, and its token is what it was."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=5).double()
    enliven(model, 0).eval()
    mask = torch.ones(2 if hidden == "of one image" else 1, 3 if hidden == "from one head" else 1, 17, 17).bool()
    mask[0, 0, [3, 5]] = False
    x, target = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    method = LNStatAttribution(lambda x: model(x, attn_mask=mask), model, rule="evidence")
    _, delta = method.attribute(x, target, return_convergence_delta=True)
    assert delta.abs().max() < 1e-9
    trace = run(lambda x: model(x, attn_mask=mask), model, x, [target], class_specific=True).trace
    for block in trace.blocks:
        sums = block.site.probabilities(slice(0, 3)).sum(-1).transpose(1, 2)
        torch.testing.assert_close(block.site.row_sums(), sums)
        assert sums[0, 3, 0] == 0
