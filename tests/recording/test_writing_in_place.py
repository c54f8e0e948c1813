"""Models that go on to change in place what their Linears, norms, attentions and activations returned."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.contract import METHODS, images, swin, vit
from torch import Tensor, nn

import captum_lnstat
from captum_lnstat.recording.attention_backward import ObservedAttention, ObservedProduct
from captum_lnstat.recording.constant_weights import ConstantLinear
from captum_lnstat.recording.ending import Passed
from captum_lnstat.recording.freezing import FrozenAttention, FrozenGate, FrozenLayerNorm, FrozenRMSNorm
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.places import Marked
from captum_lnstat.recording.rms import FrozenScaling
from captum_lnstat.recording.sites import FusedSite, SoftmaxSite

KERNELS = (
    (F, "linear"),
    (F, "rms_norm"),
    (F, "layer_norm"),
    (F, "scaled_dot_product_attention"),
    (torch, "native_layer_norm"),
)


def _attention(q: Tensor) -> Tensor:
    kept = Kept.of(q)
    return ObservedAttention.apply(q, q, q, None, FusedSite("attn", kept, kept, kept, None, None, False, None))


def _product(q: Tensor) -> Tensor:
    attention = torch.ones(1, 2, 3, 3).softmax(-1).requires_grad_()
    return ObservedProduct.apply(attention, q, SoftmaxSite("attn", Kept.of(attention), Kept.of(q), None))


OWN: dict[type[torch.autograd.Function], Callable[[Tensor], Tensor]] = {
    ConstantLinear: lambda x: ConstantLinear.apply(x, torch.ones(4, 4), torch.ones(4)),
    ObservedAttention: _attention,
    ObservedProduct: _product,
    FrozenGate: lambda x: FrozenGate.apply(x, lambda y: y.relu().view_as(y)),
    FrozenRMSNorm: lambda x: FrozenRMSNorm.apply(x, (4,), None, None),
    FrozenLayerNorm: lambda x: FrozenLayerNorm.apply(x, (4,), None, None, 1e-5),
    Passed: lambda x: Passed.apply(x, x),
    Marked: lambda x: Marked.apply(torch.zeros(0, requires_grad=True), x),
    FrozenScaling: lambda x: FrozenScaling.apply(x, x.view_as(x), x.detach()),
    FrozenAttention: lambda x: FrozenAttention.apply(x, x, x, None, {}),
}


def test_every_forward_pass_of_our_own_is_among_them() -> None:
    for module in pkgutil.walk_packages(captum_lnstat.__path__, "captum_lnstat."):
        if not module.name.endswith("__main__") and ".demo" not in module.name:
            importlib.import_module(module.name)
    ours = {kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith("captum_lnstat.")}
    assert ours == set(OWN)


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind is not Marked])  # no gradient goes through that one
def test_it_may_be_changed_in_place_whatever_the_kernel_returns(
    kind: type[torch.autograd.Function], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that return views, as some do in some versions and on some devices."""

    def viewing(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = kernel(*args, **kwargs)
            return found.view_as(found) if isinstance(found, Tensor) else tuple(one.view_as(one) for one in found)

        return call

    for place, name in KERNELS:
        monkeypatch.setattr(place, name, viewing(getattr(place, name)))
    x = torch.rand(1, 2, 3, 4).requires_grad_()
    (expected,) = torch.autograd.grad((OWN[kind](x) * 2).sum(), x)
    (found,) = torch.autograd.grad(OWN[kind](x).mul_(2).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("build", [vit, swin])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_writes_into_what_its_layers_return(method: str, build: Callable[[], nn.Module]) -> None:
    model, x = build(), images(1)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.LayerNorm | nn.GELU)]

    def explained(hook: Callable[[nn.Module, Any, Tensor], Tensor]) -> Tensor:
        handles = [layer.register_forward_hook(hook) for layer in layers]
        attribution: Tensor = METHODS[method](model).attribute(x, target=1)
        for handle in handles:
            handle.remove()
        return attribution

    # By nothing: the wiring of a model that scales them is another one, and refused.
    found, expected = explained(lambda _, __, y: y.mul_(1)), explained(lambda _, __, y: y * 1)
    assert torch.equal(found, expected)
