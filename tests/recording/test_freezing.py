"""Frozen maps against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_lnstat.recording.freezing import FrozenLayerNorm
from captum_lnstat.rules.relevance import per_image
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import FrozenLinear, FrozenMap, FrozenNorm, FrozenScale, pull_back


def _detached_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: int = 1) -> Tensor:
    axes = tuple(range(-dims, 0))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / ((centred**2).mean(axes, keepdim=True) + eps).sqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


NORMS = [
    ((2, 5, 6), (6,), True, True),
    ((2, 5, 6), (6,), False, False),
    ((2, 5, 6), (6,), True, False),
    ((3, 4, 5, 6), (6,), True, True),
    ((2, 3, 4, 6), (4, 6), True, True),
    ((7, 6), (6,), True, True),
]


def _arguments(shape, normalized, has_weight, has_bias, dtype):
    x = torch.randn(shape, dtype=torch.float64) * 3 + torch.randn(*shape[:-1], 1, dtype=torch.float64)
    weight = torch.rand(normalized, dtype=torch.float64) + 0.5 if has_weight else None
    bias = torch.randn(normalized, dtype=torch.float64) if has_bias else None
    return [None if t is None else t.to(dtype) for t in (x, weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "normalized", "has_weight", "has_bias"), NORMS)
def test_frozen_layer_norm_has_the_value_of_layer_norm(shape, normalized, has_weight, has_bias, dtype):
    x, weight, bias = _arguments(shape, normalized, has_weight, has_bias, dtype)
    found = FrozenLayerNorm.apply(x.requires_grad_(), normalized, weight, bias, 1e-3)
    expected = F.layer_norm(x, normalized, weight, bias, 1e-3)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("shape", "normalized", "has_weight", "has_bias"), NORMS)
def test_frozen_layer_norm_has_the_gradient_of_a_constant_deviation(shape, normalized, has_weight, has_bias):
    x, weight, bias = _arguments(shape, normalized, has_weight, has_bias, torch.float64)
    x.requires_grad_()
    eps = 0.1  # large enough to be missed
    v = torch.randn(shape, dtype=torch.float64)
    (found,) = torch.autograd.grad((FrozenLayerNorm.apply(x, normalized, weight, bias, eps) * v).sum(), [x])
    detached = _detached_norm(x, weight, bias, eps, len(normalized))
    assert torch.allclose(detached, F.layer_norm(x, normalized, weight, bias, eps))
    (expected,) = torch.autograd.grad((detached * v).sum(), [x])
    (plain,) = torch.autograd.grad((F.layer_norm(x, normalized, weight, bias, eps) * v).sum(), [x])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, plain, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_layer_norm_gradient_keeps_the_dtype(dtype):
    x, weight, bias = _arguments((2, 5, 6), (6,), True, True, dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(FrozenLayerNorm.apply(x, (6,), weight, bias, 1e-5)[..., 0].sum(), [x])
    assert found.dtype == dtype


def _maps() -> list[tuple[str, FrozenMap, object, int, int]]:
    rng = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    weight, bias, gamma, gate = randn(7, 6), randn(7), randn(6), randn(2, 5, 6).sigmoid()
    x = randn(2, 5, 6) * 2 + 1
    beta = randn(6)
    deviation = (x.var(-1, correction=0) + 1e-2).sqrt()
    return [
        ("linear", FrozenLinear(weight, bias), lambda x: x @ weight.T + bias, 6, 7),
        ("linear without bias", FrozenLinear(weight), lambda x: x @ weight.T, 6, 7),
        ("layer scale", FrozenScale(gamma), lambda x: x * gamma, 6, 6),
        ("gate", FrozenScale(gate), lambda x: x * gate, 6, 6),
        (
            "norm",
            FrozenNorm(deviation, gamma, beta),
            lambda x: (x - x.mean(-1, keepdim=True)) / deviation[..., None] * gamma + beta,
            6,
            6,
        ),
        (
            "plain norm",
            FrozenNorm(deviation, None, None),
            lambda x: (x - x.mean(-1, keepdim=True)) / deviation[..., None],
            6,
            6,
        ),
    ]


def _cotangents(channels: int) -> list[Tensor]:
    """One of its own for every token; one direction for all; one token alone."""
    u = torch.randn(2, 5, channels, dtype=torch.float64)
    alone = torch.zeros_like(u)
    alone[:, 3] = u[:, 3]
    return [u, u[:, :1] * torch.randn(2, 5, 1, dtype=torch.float64), alone]


def _factored(u: Tensor) -> Cotangent:
    return Cotangent.of(u[:, :, None])


@pytest.mark.parametrize(
    ("frozen", "function", "inner", "outer"), [m[1:] for m in _maps()], ids=[m[0] for m in _maps()]
)
def test_pull_is_the_transpose(frozen, function, inner, outer):
    x = torch.randn(2, 5, inner, dtype=torch.float64)
    for u in _cotangents(outer):
        cotangent, constant = frozen.pull_back(_factored(u))
        pulled = cotangent.spread(cotangent.dense())[:, :, 0]
        _, vjp = torch.func.vjp(function, x)
        assert torch.allclose(pulled, vjp(u)[0], rtol=1e-12, atol=1e-12)
        zero = function(torch.zeros_like(x))
        assert (constant is None) == (not bool(zero.any()))
        constant = torch.zeros(2, 5) if constant is None else cotangent.spread(constant)[..., 0]
        assert torch.allclose(constant.double(), (u * zero).sum(-1), rtol=1e-12, atol=1e-12)
        assert torch.allclose((u * function(x)).sum(-1), (pulled * x).sum(-1) + constant, rtol=1e-12, atol=1e-12)


def test_pull_through_a_path_is_the_transpose_of_all_of_it():
    maps = _maps()
    path = [maps[4][1], maps[3][1], maps[0][1]]
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        for number in (4, 3, 0):
            x = maps[number][2](x)
        return x

    for u in _cotangents(7):
        cotangent, constant = pull_back(path, _factored(u))
        pulled, constant = cotangent.spread(cotangent.dense())[:, :, 0], cotangent.spread(constant)[..., 0]
        assert torch.allclose(pulled, torch.func.vjp(function, x)[1](u)[0], rtol=1e-12, atol=1e-12)
        assert torch.allclose((u * function(x)).sum(-1), (pulled * x).sum(-1) + constant, rtol=1e-12, atol=1e-12)


def test_pull_through_nothing_is_the_identity():
    u = _factored(torch.randn(2, 5, 6))
    pulled, constant = pull_back([], u)
    assert pulled is u
    assert torch.equal(constant, torch.zeros(2, 5, 1))


def test_frozen_maps_read_half_precision_parameters_in_the_dtype_of_u():
    linear = nn.Linear(6, 7).half()
    pulled, constant = FrozenLinear(linear.weight, linear.bias).pull_back(_factored(torch.randn(2, 5, 7)))
    assert pulled.directions.dtype == constant.dtype == torch.float32
    assert not pulled.directions.requires_grad
    assert not constant.requires_grad


def test_per_image_sums_all_but_the_batch():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert per_image(x).tolist() == [66.0, 210.0]
    assert per_image(x[:, 0, 0]).tolist() == [0.0, 12.0]
