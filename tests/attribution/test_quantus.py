"""The contract of Quantus' explain_func, without Quantus."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from helpers.contract import images, swin, untouched, vit
from torch import nn

from captum_lnstat import AttentionRollout, LNStatAttribution, quantus_explain_func

TARGETS = np.array([1, 3])


@pytest.mark.parametrize("make", [vit, swin])
@pytest.mark.parametrize(
    ("method", "options"), [(LNStatAttribution, {}), (LNStatAttribution, {"rule": "evidence"}), (AttentionRollout, {})]
)
def test_gives_what_the_attribution_gives(make: Any, method: Any, options: dict[str, Any]) -> None:
    model, image = make(), images(2)
    expected = method(model, **options).attribute(image, target=torch.from_numpy(TARGETS)).numpy()
    array = image.numpy()
    before = array.copy()
    with untouched(model):
        found = quantus_explain_func(method, **options)(model=model, inputs=array, targets=TARGETS)
    assert type(found) is np.ndarray
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(array, before)
    summed = quantus_explain_func(method, sum_channels=True, **options)(model=model, inputs=array, targets=TARGETS)
    assert summed.shape == (2, 1, 32, 32)
    np.testing.assert_allclose(summed, expected.sum(1, keepdims=True), rtol=1e-5, atol=1e-7)


def test_targets_are_taken_one_an_image() -> None:
    model, array = vit(), images(2).numpy()
    explain = quantus_explain_func(LNStatAttribution)
    both = explain(model, array, TARGETS)
    for i in range(2):
        np.testing.assert_allclose(both[i : i + 1], explain(model, array[i : i + 1], TARGETS[i : i + 1]), 1e-3, 1e-6)
    assert not np.array_equal(both, explain(model, array, TARGETS[::-1]))
    np.testing.assert_array_equal(both, explain(model, array, TARGETS.astype(np.uint8)))
    np.testing.assert_array_equal(both, explain(model, array, TARGETS.astype(np.float64)))
    np.testing.assert_array_equal(both, explain(model, array, [1, 3]))
    flipped = explain(model, array[:, :, :, ::-1], TARGETS)
    np.testing.assert_array_equal(flipped, explain(model, array[:, :, :, ::-1].copy(), TARGETS))


def test_captums_own_method_with_its_own_options() -> None:
    model, image = vit(), images(2)
    explain = quantus_explain_func(IntegratedGradients, multiply_by_inputs=False)
    found = explain(model=model, inputs=image.numpy(), targets=TARGETS, n_steps=3, device="cpu")
    target = torch.from_numpy(TARGETS)
    method = IntegratedGradients(model, multiply_by_inputs=False)
    expected = method.attribute(image, target=target, n_steps=3)
    np.testing.assert_array_equal(found, expected.numpy())
    assert not np.allclose(found, method.attribute(image, target=target, n_steps=9).numpy())


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_a_function_that_makes_the_attribution() -> None:
    model, array = vit(), images(2).numpy()
    tunnel = quantus_explain_func(lambda m, kind: NoiseTunnel(kind(m)), kind=LNStatAttribution)
    found = tunnel(model, array, TARGETS, nt_samples=2, stdevs=0.0)
    np.testing.assert_allclose(found, quantus_explain_func(LNStatAttribution)(model, array, TARGETS), 1e-3, 1e-6)
    saliency = quantus_explain_func(Saliency, sum_channels=True)(model, array, TARGETS, abs=False)
    image = images(2).requires_grad_()
    model(image).gather(1, torch.from_numpy(TARGETS)[:, None]).sum().backward()
    np.testing.assert_allclose(saliency, image.grad.sum(1, keepdim=True).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_goes_to_the_models_dtype_and_back(dtype: torch.dtype) -> None:
    model, image = vit().to(dtype), images(2)
    expected = LNStatAttribution(model).attribute(image.to(dtype), target=torch.from_numpy(TARGETS)).double().numpy()
    for given in (np.float32, np.float64):
        found = quantus_explain_func(LNStatAttribution)(model, image.numpy().astype(given), TARGETS)
        assert found.dtype == given
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_moves_to_the_models_device() -> None:
    class Probe:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def attribute(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert inputs.device == target.device == torch.device("meta")
            assert inputs.dtype == torch.float16
            assert target.dtype == torch.int64
            return torch.ones(2, 3, 4, 4, requires_grad=True)

    model = nn.Linear(2, 2, device="meta", dtype=torch.float16)
    found = quantus_explain_func(Probe)(model, np.zeros((2, 3, 4, 4)), TARGETS)
    assert found.sum() == 2 * 3 * 16


def test_integer_and_read_only_inputs() -> None:
    model, array = vit(), np.arange(2 * 3 * 32 * 32, dtype=np.uint8).reshape(2, 3, 32, 32)
    array.setflags(write=False)
    found = quantus_explain_func(LNStatAttribution, rule="evidence")(model, array, TARGETS)
    assert found.dtype == np.float32
    assert np.abs(found).sum() > 0


def test_class_agnostic_without_targets() -> None:
    found = quantus_explain_func(LNStatAttribution, rule="rollout")(vit(), images(2).numpy(), None)
    np.testing.assert_allclose(found.sum((1, 2, 3)) <= 1.0001, True)


def test_more_than_attributions_is_refused() -> None:
    explain = quantus_explain_func(LNStatAttribution, rule="evidence")
    with pytest.raises(TypeError, match="expected one tensor"):
        explain(vit(), images(2).numpy(), TARGETS, return_convergence_delta=True)


def test_quantus_is_never_imported() -> None:
    code = "import sys; sys.modules['quantus'] = None; import captum_lnstat; captum_lnstat.quantus_explain_func(print)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=240).returncode == 0
