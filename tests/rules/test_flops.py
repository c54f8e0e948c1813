"""Bounds on the work of every method, counted and not timed, so that a slow path cannot come back unseen."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.contract import CountCalls
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from captum_lnstat import (
    AGCAM,
    AttCAT,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    LeGrad,
    LNStatAttribution,
    RawAttention,
)

VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"

# In floating-point operations of a plain forward pass. 2 is a forward pass and a backward pass to the activations.
BOUNDS: dict[str, tuple[Callable[[nn.Module], object], float, float]] = {
    "lnstat": (LNStatAttribution, 1.15, 1.12),
    "evidence": (lambda model: LNStatAttribution(model, rule="evidence"), 1.15, 1.12),
    "rollout": (lambda model: LNStatAttribution(model, rule="rollout"), 1.15, 1.1),
    "gradient": (lambda model: LNStatAttribution(model, rule="gradient"), 1.97, 2.03),
    "RawAttention": (RawAttention, 1.05, 1.02),
    "AttentionRollout": (AttentionRollout, 1.05, 1.02),
    "GenericAttention": (GenericAttention, 1.97, 2.03),
    "FrozenLayerNorm": (FrozenLayerNorm, 2.05, 2.05),
    "LeGrad": (LeGrad, 1.8, 1.75),
    "AGCAM": (AGCAM, 1.97, 2.05),
    "AttCAT": (AttCAT, 1.95, 1.98),
    "BeyondIntuition": (partial(BeyondIntuition, steps=1), 1.22, 1.25),
    "BeyondIntuition-head": (partial(BeyondIntuition, approximation="head", steps=1), 2.08, 2.06),
}


# The fused kernel of the CPU. Left to itself, the counter takes it apart in some versions of torch, and counts nothing
# for it from 2.14 on: the forward pass that all is measured in would be shorter by its attention.
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


@cache
def _model(name: str) -> nn.Module:
    return timm.create_model(name).eval()


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={KERNEL: _attention}) as counter:
        run()
    return counter.get_total_flops()


def _image() -> torch.Tensor:
    return torch.zeros(1, 3, 224, 224).normal_(generator=torch.Generator().manual_seed(0))


@cache
def _forward(name: str) -> int:
    with torch.no_grad():
        return _flops(lambda: _model(name)(_image()))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted_whatever_the_kernel_is_called(masked: bool) -> None:
    heads, tokens, channels = 2, 7, 8
    q = torch.ones(1, heads, tokens, channels)
    mask = torch.zeros(tokens, tokens) if masked else None
    counted = _flops(lambda: F.scaled_dot_product_attention(q, q, q, mask))
    assert counted == 2 * (2 * heads * tokens * tokens * channels)  # q k^T and A v


@pytest.mark.parametrize("name", [VIT, SWIN])
@pytest.mark.parametrize("method", BOUNDS)
def test_work_of_a_map(method: str, name: str) -> None:
    make, *bounds = BOUNDS[method]
    model, image = _model(name), _image()
    counted = CountCalls(model)
    work = _flops(lambda: make(counted).attribute(image, target=1)) / _forward(name)
    assert 1 <= work < bounds[name == SWIN]
    assert counted.count == 1


@pytest.mark.parametrize(("name", "bound"), [(VIT, 1.23), (SWIN, 2.33)])
def test_work_of_a_hundred_maps(name: str, bound: float) -> None:
    model, image = _model(name), _image()
    work = _flops(lambda: LNStatAttribution(model).relevance_per_target(image, range(100)))
    assert work / _forward(name) < bound
