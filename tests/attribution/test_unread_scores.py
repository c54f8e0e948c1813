"""A score without a gradient: saturated, constant, or of a class that reads no token. Its map is zero, and says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.contract import swin, vit
from torch import Tensor, nn

from captum_lnstat import FrozenLayerNorm, GenericAttention, LayerLNStat, LNStatAttribution, RecordingError

WHY = "the score has no gradient at the tokens"
ZERO = "of the batch is zero everywhere"


def _sure(model: nn.Module) -> nn.Module:
    """Logits of 30, 0, -30, and one of a class that reads nothing."""
    head: Any = model.head if isinstance(model.head, nn.Linear) else model.head.fc
    with torch.no_grad():
        head.bias[:] = torch.tensor([30.0, 0.0, -30.0, 0.5, 0.0])
        head.weight[3] = 0
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "class token": lambda: _sure(vit()),
    "mean": lambda: _sure(vit(global_pool="avg")),
    "largest": lambda: _sure(vit(global_pool="max")),
    "Swin": lambda: _sure(swin()),
}
FLAT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "sigmoid": (torch.sigmoid, 0),
    "ReLU that is off": (torch.relu, 2),
    "softmax that is clamped": (lambda logits: logits.softmax(1).clamp(1e-3, 1 - 1e-3), 0),
    "class that reads no token": (lambda logits: logits, 3),
}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flat", FLAT)
def test_the_map_is_zero_and_says_why(name: str, flat: str) -> None:
    model, (after, target) = MODELS[name](), FLAT[flat]

    def scores(x: Tensor) -> Tensor:
        return after(model(x))

    for count in (1, 2):
        x = images(count)
        said = f"image {', '.join(map(str, range(count)))} {ZERO}: {WHY}"
        for rule in ("lnstat", "evidence"):
            method = LNStatAttribution(scores, model, rule=rule)
            with pytest.warns(UserWarning, match=said) as caught:
                assert not method.relevance(x, target).any()
            assert len(caught) == 1
            with pytest.warns(UserWarning, match=said):
                assert not method.attribute(x, target=target).any()
            with pytest.warns(UserWarning, match="targets 0, 1 of those given is zero"):
                assert not method.relevance_per_target(x, [target, target]).any()
        for method in (LNStatAttribution(scores, model, rule="gradient"), GenericAttention(scores, model),
                       FrozenLayerNorm(scores, model)):  # fmt: skip
            with pytest.warns(UserWarning, match="rule='evidence' .* says where a score has no gradient"):
                assert not method.relevance(x, target).any()


def test_evidence_is_complete_all_the_same() -> None:
    model: Any = MODELS["mean"]()
    evidence = LNStatAttribution(lambda x: model(x).sigmoid(), model, rule="evidence")
    with pytest.warns(UserWarning, match=WHY):
        attribution, delta = evidence.attribute(images(2), target=0, return_convergence_delta=True)
    assert not attribution.any()
    assert float(delta.abs().max()) < 1e-6


@pytest.mark.parametrize("rule", ["lnstat", "evidence", "gradient"])
@pytest.mark.parametrize("name", MODELS)
def test_one_image_of_a_batch(name: str, rule: str) -> None:
    """It is zero; those beside it are as alone."""
    model, x = MODELS[name](), images(3)
    method = LNStatAttribution(
        lambda x, gain: (model(x)[:, 1:2] * gain).sigmoid(), model, rule=rule
    )  # of the middle one the gain makes a certainty
    gain = torch.tensor([[1.0], [1e5], [1.0]])
    with pytest.warns(UserWarning, match=f"image 1 {ZERO}") as caught:
        found = method.relevance(x, 0, additional_forward_args=gain)
    assert len(caught) == 1
    assert not found[1].any()
    for index in (0, 2):
        alone = method.relevance(x[index][None], 0, additional_forward_args=gain[index][None])[0]
        assert bool(alone.any())
        torch.testing.assert_close(found[index], alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))
    with pytest.warns(UserWarning, match=f"image 0 {ZERO}"):
        assert not method.relevance(x[1:2], 0, additional_forward_args=gain[1:2]).any()


@pytest.mark.parametrize("kind", [vit, swin])
def test_a_head_of_zeros_reads_no_token(kind: Callable[[], Any]) -> None:
    model = kind()
    nn.init.zeros_(model.head.weight if isinstance(model.head, nn.Linear) else model.head.fc.weight)
    for rule in ("lnstat", "evidence"):
        with pytest.warns(UserWarning, match=f"{WHY}.* or reads no token"):
            assert not LNStatAttribution(model, rule=rule).relevance(images(2), 1).any()


def test_some_targets_of_many() -> None:
    model = MODELS["mean"]()
    method = LNStatAttribution(model, rule="evidence")
    with pytest.warns(UserWarning, match=f"image 0, 1 of the batch for targets 1 of those given is zero.*{WHY}"):
        found = method.relevance_per_target(images(2), [1, 3, 4])
    assert [bool(one.any()) for one in found] == [True, False, True]
    torch.testing.assert_close(found[2], method.relevance(images(2), 4))


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
@pytest.mark.parametrize("name", MODELS)
def test_at_a_layer(name: str, rule: str) -> None:
    model: Any = MODELS[name]()
    block = model.blocks[1] if hasattr(model, "blocks") else model.layers[0].blocks[0]
    layer = LayerLNStat(lambda x: model(x).sigmoid(), block, model, rule=rule)
    with pytest.warns(UserWarning, match=WHY):
        assert not layer.attribute(images(2), target=0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer.attribute(images(2), target=1).any()


def test_what_needs_no_score_is_as_ever() -> None:
    model = MODELS["class token"]()
    found = LNStatAttribution(lambda x: model(x).sigmoid() * 0 + 1, model, rule="rollout").relevance(images(2))
    torch.testing.assert_close(found, LNStatAttribution(model, rule="rollout").relevance(images(2)))
    swinlike = MODELS["largest"]()
    with pytest.raises(RecordingError, match=r"no score has a gradient .* Let forward_func return the logits"):
        LNStatAttribution(lambda x: model_off(swinlike, x), swinlike, rule="rollout").relevance(images(2))


def model_off(model: nn.Module, x: Tensor) -> Tensor:
    off: Tensor = (model(x) - 1e6).relu()
    return off


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
def test_a_gradient_that_is_not_finite_is_refused_for_that(rule: str) -> None:
    """The root of 1 - p at p = 1 has a value and no slope."""
    model = MODELS["mean"]()
    method = LNStatAttribution(lambda x: (1 - model(x).sigmoid()).sqrt(), model, rule=rule)
    with pytest.raises(RecordingError, match="gradient at the tokens that is infinite or NaN"):
        method.attribute(images(1), target=0)


def test_in_half_precision_a_sigmoid_is_sure_sooner() -> None:
    model = MODELS["mean"]().bfloat16()
    method = LNStatAttribution(lambda x: model(x).sigmoid(), model)
    with pytest.warns(UserWarning, match=WHY):
        assert not method.relevance(images(1), 0).any()


def test_nothing_of_the_users_is_changed() -> None:
    model = MODELS["mean"]()
    x = images(1).requires_grad_()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LNStatAttribution(lambda x: model(x).sigmoid(), model).attribute(x, target=0)
        assert not torch.is_grad_enabled()
    assert x.grad is None
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
