"""Tests generated as Captum generates its own, from configurations in the form of ``captum.testing``.

Captum writes down, for every method, models and arguments that suit it, and generates tests from them. Its own
configurations hold vectors and multi-layer perceptrons; those below hold images and transformers. Of its generators

- *targets* (a batch with its targets against one image at a time) and *hook removal* (after success, a wrong target, a
  module that raises) apply as they are;
- *data parallel* compares CPU and GPU copies, and here a ``DataParallel`` that wraps a model on this device, which is
  what Captum runs where there is no GPU;
- *JIT* expects a scripted or traced model to give what the plain one gives. Attention inside one cannot be seen, so it
  is refused: ``test_errors.py`` has those tests;
- configurations with baselines, feature masks, several inputs or neurons have nothing to apply to: the methods take
  one image batch, and no such argument.
"""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.testing.attr.helpers.gen_test_utils import gen_test_name, get_target_layer, parse_test_config
from captum.testing.helpers.basic import BaseTest, assertTensorTuplesAlmostEqual
from helpers.contract import MODELS, distilled, images, registers, swin, swin_v2, untouched, vit
from torch import Tensor, nn

from captum_lnstat import (
    AGCAM,
    AttCAT,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LeGrad,
    LNStatAttribution,
    RawAttention,
)


class Evidence(LNStatAttribution):
    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func, rule="evidence")


class Contrastive(LNStatAttribution):
    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func, contrastive=True)


class Rollout(LNStatAttribution):
    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func, rule="rollout")


class Gradient(LNStatAttribution):
    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func, rule="gradient")


class Beyond(BeyondIntuition):
    def __init__(self, forward_func: Any) -> None:
        super().__init__(forward_func, steps=2)


class LayerEvidence(LayerLNStat):
    def __init__(self, forward_func: Any, layer: Any) -> None:
        super().__init__(forward_func, layer, rule="evidence")


class Scaled(nn.Module):
    """A model that takes more than the images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, scale: Tensor, power: int) -> Tensor:
        return self.model(x) * scale**power


ALGORITHMS = [
    LNStatAttribution,
    Evidence,
    Contrastive,
    Rollout,
    Gradient,
    RawAttention,
    AttentionRollout,
    GenericAttention,
    FrozenLayerNorm,
    LeGrad,
    AGCAM,
    AttCAT,
    Beyond,
]
LAYERS = [LayerLNStat, LayerEvidence]

# Every method on one model without windows and on one with them; every model by a rule without and one with a backward
# pass.
FAMILIES = {name: ALGORITHMS if name in ("vit", "swin") else [LNStatAttribution, Gradient] for name in MODELS}

CONFIG: list[dict[str, Any]] = [
    *(
        {
            "name": f"{name}_single_target",
            "algorithms": FAMILIES[name],
            "model": MODELS[name](),
            "attribute_args": {"inputs": images(3), "target": 1},
        }
        for name in MODELS
    ),
    *(
        {
            "name": f"{name}_multi_target",
            "algorithms": FAMILIES[name],
            "model": MODELS[name](),
            "attribute_args": {"inputs": (images(3),), "target": targets},
        }
        for name, targets in zip(
            MODELS,
            ([0, 4, 2], torch.tensor([0, 4, 2]), [(0,), (4,), (2,)], torch.tensor([0, 4, 2]).int(), [0, 4, 2]),
            strict=True,
        )
    ),
    *(
        {
            "name": f"{build.__name__}_additional_args",
            "algorithms": ALGORITHMS,
            "model": Scaled(build()).eval(),
            "attribute_args": {
                "inputs": images(3),
                "additional_forward_args": (torch.tensor([[1.0], [2.0], [3.0]]), 2),
                "target": torch.tensor([0, 4, 2]),
            },
        }
        for build in (vit, swin)
    ),
    *(
        {
            "name": f"{build.__name__}_layer_multi_target",
            "algorithms": LAYERS,
            "model": build(),
            "layer": layer,
            "attribute_args": {"inputs": images(3), "target": [0, 4, 2], "attribute_to_layer_input": into},
        }
        for build, layer, into in (
            (vit, "blocks.1", False),
            (distilled, "blocks.0", True),
            (registers, "blocks.2", True),
            (swin, "layers.0.blocks.1", False),
            (swin_v2, "layers.1.blocks.1", True),
        )
    ),
    *(
        {
            "name": f"{build.__name__}_noise",
            "algorithms": ALGORITHMS,
            "model": build(),
            "noise_tunnel": True,
            "attribute_args": {"inputs": images(2), "target": [0, 4], "nt_samples": 4, "stdevs": 0.0},
        }
        for build in (vit, swin_v2)
    ),
    *(
        {
            "name": f"{build.__name__}_layer_noise",
            "algorithms": LAYERS,
            "model": build(),
            "layer": layer,
            "noise_tunnel": True,
            "attribute_args": {"inputs": images(2), "target": [0, 4], "nt_samples": 4, "stdevs": 0.0},
        }
        for build, layer in ((vit, "blocks.1"), (swin_v2, "layers.1.blocks.0"))
    ),
]
# Absolute, as Captum's; the largest scores above are about 10.
DELTA = 1e-4


def as_tuple(attributions: Any) -> tuple[Tensor, ...]:
    return attributions if isinstance(attributions, tuple) else (attributions,)


def method_of(config: dict[str, Any], algorithm: type, forward_func: nn.Module | None = None) -> Any:
    _, model, _, layer, noise_tunnel, _ = parse_test_config(config)
    forward_func = model if forward_func is None else forward_func
    method = algorithm(forward_func, get_target_layer(model, layer)) if layer else algorithm(forward_func)
    return NoiseTunnel(method) if noise_tunnel else method


def part(value: Any, number: int) -> Any:
    """What belongs to one image."""
    if isinstance(value, tuple):
        return tuple(part(one, number) for one in value)
    return value[number : number + 1] if isinstance(value, Tensor) else value


def check_targets(test: unittest.TestCase, config: dict[str, Any], algorithm: type) -> None:
    args = parse_test_config(config)[2]
    method = method_of(config, algorithm)
    together = as_tuple(method.attribute(**args))
    for number in range(len(together[0])):
        alone = {**args, "inputs": part(args["inputs"], number)}
        if "additional_forward_args" in args:
            alone["additional_forward_args"] = part(args["additional_forward_args"], number)
        several = not isinstance(args["target"], int)
        forms = [args["target"][number], args["target"][number : number + 1]] if several else [args["target"]]
        for target in forms:
            single = as_tuple(method.attribute(**{**alone, "target": target}))
            assertTensorTuplesAlmostEqual(test, part(together, number), single, delta=DELTA, mode="max")


def check_data_parallel(test: unittest.TestCase, config: dict[str, Any], algorithm: type) -> None:
    _, model, args, *_ = parse_test_config(config)
    plain = as_tuple(method_of(config, algorithm).attribute(**args))
    wrapped = as_tuple(method_of(config, algorithm, nn.DataParallel(model)).attribute(**args))
    assertTensorTuplesAlmostEqual(test, plain, wrapped, delta=0.0, mode="max")


class Raises(nn.Module):
    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise ZeroDivisionError


def check_hook_removal(test: unittest.TestCase, config: dict[str, Any], algorithm: type) -> None:
    _, model, args, *_ = parse_test_config(config)
    method = method_of(config, algorithm)
    with untouched(model), torch.random.fork_rng():
        method.attribute(**args)
    with untouched(model), torch.random.fork_rng(), pytest.raises(AssertionError):
        method.attribute(**{**args, "target": (9999,) * 20})
    # Captum replaces the layer; a block that raises is no block any more, so here it is a part of one that does.
    broken = copy.deepcopy(model)
    inside = next(module for module in broken.modules() if hasattr(module, "mlp") and hasattr(module, "attn"))
    inside.mlp = Raises()
    config = {**config, "model": broken}
    with untouched(broken), torch.random.fork_rng(), pytest.raises(ZeroDivisionError):
        method_of(config, algorithm).attribute(**args)


CHECKS: dict[str, Callable[[unittest.TestCase, dict[str, Any], type], None]] = {
    "targets": check_targets,
    "data_parallel": check_data_parallel,
    "hook_removal": check_hook_removal,
}


class TestFromConfigurations(BaseTest):
    """One test for each check, configuration and method; filled below."""


def _make(name: str, config: dict[str, Any], algorithm: type) -> Callable[[unittest.TestCase], None]:
    @pytest.mark.filterwarnings("ignore:every patch token is zero")
    def test(self: unittest.TestCase) -> None:
        CHECKS[name](self, config, algorithm)

    return test


for _check in CHECKS:
    for _config in CONFIG:
        if _check != "targets" and "multi_target" in _config["name"] and "layer" not in _config:
            continue  # nothing that the single target does not have
        _algorithms, *_, _noise_tunnel, _ = parse_test_config(_config)
        for _algorithm in _algorithms:
            _name = gen_test_name(f"test_{_check}", _config["name"], _algorithm, _noise_tunnel)
            assert not hasattr(TestFromConfigurations, _name)
            setattr(TestFromConfigurations, _name, _make(_check, _config, _algorithm))


def test_there_are_as_many_as_there_should_be() -> None:
    names = [name for name in dir(TestFromConfigurations) if name.startswith("test_")]
    # Single and multiple targets, of which the latter have one check; further arguments and noise.
    of_families = sum(map(len, FAMILIES.values())) * (3 + 1)
    assert len(names) == of_families + len(ALGORITHMS) * 4 * 3 + len(LAYERS) * 7 * 3
