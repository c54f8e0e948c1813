"""A method compiled for one shape of images: the method's own maps, or what the method itself has to say."""

from __future__ import annotations

import shutil
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from captum.attr import NoiseTunnel
from helpers.launches import Launches
from helpers.models import CASES, build, images
from torch import Tensor, nn

from captum_lnstat import AttentionRollout, GenericAttention, LNStatAttribution, UnsupportedModelError, zoo
from captum_lnstat.attribution.capture import capture
from captum_lnstat.attribution.compiled import CompiledAttribution

RULES = ["lnstat", "evidence", "rollout", "gradient"]


def _vit() -> nn.Module:
    return zoo.load("vit-mini").model


def _compiled(model: nn.Module, target: Any = 1, count: int = 2, **options: Any) -> CompiledAttribution:
    return LNStatAttribution(model, **options).compile(torch.rand(count, 3, 64, 64), target, backend=None)


# A class token; padded, shifted and merged windows; windows of Swin v2. Every rule, and every model twice.
OTHERS = [
    *(("vit-class", which) for which in RULES),
    ("swin1-shift-fused", "lnstat"),
    ("swin1-shift-fused", "rollout"),
    ("swin1-padded-7", "evidence"),
    ("swin1-padded-7", "gradient"),
    ("swin2-shift", "lnstat"),
    ("swin2-shift", "gradient"),
]


@pytest.mark.filterwarnings("ignore:the map of image")
@pytest.mark.parametrize(("name", "which"), OTHERS)
def test_other_images_have_the_method_s_own_maps(name: str, which: str) -> None:
    model, one = build(name, 1), images(CASES[name], 2, 1)
    other, classes = images(CASES[name], 2, 5), torch.tensor([1, 0])
    method = LNStatAttribution(model, rule=which)
    compiled = method.compile(one, torch.tensor([0, 1]), backend=None)
    found, wanted = compiled.attribute(other, target=classes), method.attribute(other, target=classes)
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    grid, own = compiled.relevance(other, target=classes), method.relevance(other, target=classes)
    assert (grid - own).abs().max() <= 1e-9 * own.abs().max()


@pytest.mark.parametrize("kind", [AttentionRollout, GenericAttention])
def test_a_baseline(kind: Any) -> None:
    method, other = kind(_vit()), torch.rand(2, 3, 64, 64)
    found = method.compile(torch.rand(2, 3, 64, 64), 3, backend=None).attribute(other)
    assert torch.allclose(found, method.attribute(other, target=3), rtol=1e-4, atol=1e-9)


SMALL = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 32, "depths": (1, 2), "window_size": 4}),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler, and there is no g++")
@pytest.mark.parametrize("name", SMALL)
def test_without_a_break_in_the_graph(name: str) -> None:
    kind, options = SMALL[name]
    torch.manual_seed(0)
    method = LNStatAttribution(timm.create_model(kind, num_classes=5, **options).eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        compiled = method.compile(torch.randn(1, 3, 32, 32), torch.tensor([1]))
        other, classes = torch.randn(1, 3, 32, 32), torch.tensor([4])
        found = compiled.attribute(other, target=classes)
    wanted = method.attribute(other, target=classes)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_host_reads_one_number() -> None:
    compiled, x = _compiled(_vit()), torch.rand(2, 3, 64, 64)
    with Launches() as launches:
        compiled.attribute(x)
    assert launches.reads == 1


def test_what_it_was_not_compiled_for() -> None:
    compiled = _compiled(_vit())
    with pytest.raises(ValueError, match=r"compiled for \(2, 3, 64, 64\)"):
        compiled.attribute(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"compiled for .* torch\.float32"):
        compiled.attribute(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"target is 3; this was compiled for 1"):
        compiled.attribute(torch.rand(2, 3, 64, 64), target=3)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        compiled.attribute(torch.rand(2, 3, 64, 64))
    chosen = _compiled(_vit(), torch.tensor([1, 2]))
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(chosen.attribute(x, torch.tensor([1, 2])), chosen.attribute(x, [1, 2]))
    for target in (None, 1, torch.tensor([1.0, 2.0]), torch.tensor([1]), [1]):
        with pytest.raises(ValueError, match="compiled for a tensor of 2 classes"):
            chosen.attribute(torch.rand(2, 3, 64, 64), target=target)


def test_what_the_method_refuses_is_refused_in_its_words() -> None:
    compiled = _compiled(_vit(), torch.tensor([1, 2]))
    broken = torch.rand(2, 3, 64, 64)
    broken[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="inputs holds NaN or infinite"):
        compiled.attribute(broken, target=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="target 7 is none of the 7 classes"):
        compiled.attribute(torch.rand(2, 3, 64, 64), target=torch.tensor([7, 2]))


class _Clamped(nn.Module):
    """A score that is constant for dark images."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = _vit()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.vit(x)
        return scores * (x.mean((1, 2, 3)) > 0)[:, None]


def test_images_that_go_another_way_are_explained_without_it() -> None:
    model = _Clamped().eval()
    method, dark = LNStatAttribution(model), -torch.rand(2, 3, 64, 64)
    compiled = method.compile(torch.rand(2, 3, 64, 64), 1, backend=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = compiled.attribute(dark)
    first, second = (str(one.message) for one in said)
    assert "zero everywhere" in first
    assert "take another way" in second
    assert not bool(found.any())


@pytest.mark.parametrize("change", ["weights", "storage", "parameter", "module", "mode", "hook"])
def test_a_model_that_has_changed_is_noticed(change: str) -> None:
    model: Any = _vit()
    compiled, x = _compiled(model), torch.rand(2, 3, 64, 64)
    compiled.attribute(x)
    if change == "weights":
        with torch.no_grad():
            model.head.weight.mul_(2)
    elif change == "storage":
        model.head.weight.data = 2 * model.head.weight.data
    elif change == "parameter":
        model.head.weight = nn.Parameter(2 * model.head.weight.detach())
    elif change == "module":
        model.blocks[0].mlp.act = nn.ReLU()
    elif change == "mode":
        model.train()
    else:
        model.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="has changed since this was compiled"):
        compiled.attribute(x)


def test_options_are_those_it_was_compiled_with() -> None:
    method, x = LNStatAttribution(_vit()), torch.rand(2, 3, 64, 64)
    compiled, before = method.compile(torch.rand(2, 3, 64, 64), 1, backend=None), method.attribute(x, target=1)
    method.contrastive = True
    assert torch.allclose(compiled.attribute(x), before, atol=1e-8)


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(UnsupportedModelError, match="train mode"):
        _compiled(_vit().train())
    vit = _vit()

    def through_numpy(x: Tensor) -> Tensor:
        bright = float(np.asarray(vit.head.weight.detach().numpy()).max())  # nothing of the images
        scores: Tensor = vit(x)
        return scores + scores.detach().numpy().max() * bright

    with pytest.raises(UnsupportedModelError, match="NumPy"):
        LNStatAttribution(through_numpy, vit).compile(torch.rand(2, 3, 64, 64), 1, backend=None)

    def by_a_number(x: Tensor) -> Tensor:
        scores: Tensor = vit(x)
        return scores * float(scores.detach().max())

    with pytest.raises(UnsupportedModelError, match="taken out of torch"):
        LNStatAttribution(by_a_number, vit).compile(torch.rand(2, 3, 64, 64), 1, backend=None)
    vit(torch.rand(2, 3, 64, 64)).sum().backward()  # and it is as it was
    assert not any(module._forward_hooks for module in vit.modules())


def test_callers_without_gradients_and_in_threads() -> None:
    method, x = LNStatAttribution(_vit()), torch.rand(2, 3, 64, 64)
    wanted = method.attribute(x, target=1)
    with torch.inference_mode():
        compiled = method.compile(torch.rand(2, 3, 64, 64), 1, backend=None)
        inside = compiled.attribute(x.clone())
    with torch.no_grad():
        beside = compiled.attribute(x)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(compiled.attribute(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    for one in (inside, beside, *found):
        assert torch.allclose(one, wanted, atol=1e-8)
        assert not one.requires_grad
        assert not one.is_inference()


def test_an_image_with_a_gradient_and_in_a_tuple() -> None:
    compiled, x = _compiled(_vit()), torch.rand(2, 3, 64, 64, requires_grad=True)
    (found,) = compiled.attribute((x,))
    assert torch.equal(found, compiled.attribute(x))
    assert x.grad is None
    assert x.requires_grad


def test_what_was_decided_is_a_condition() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        brighter = x.mean(1).tolist()[0] > 0 if x.dtype == torch.int64 else bool(torch.equal(x[0], x[1]))
        places = (x > 1).nonzero()[:, 0]
        return (x[places] + 1 if brighter else x,)

    graph = capture(function, (torch.tensor([[2.0], [2.0]]),))
    assert bool(graph(torch.tensor([[3.0], [3.0]]))[1])
    assert not bool(graph(torch.tensor([[3.0], [4.0]]))[1])  # not alike any more
    assert not bool(graph(torch.tensor([[0.0], [0.0]]))[1])  # other places
    listed = capture(lambda x: (x + x.tolist()[0],), (torch.tensor([1, 2]),))
    assert bool(listed(torch.tensor([1, 2]))[1])
    assert not bool(listed(torch.tensor([2, 2]))[1])


def test_one_class_for_all_in_a_tensor() -> None:
    method, x = LNStatAttribution(_vit()), torch.rand(2, 3, 64, 64)
    compiled = method.compile(torch.rand(2, 3, 64, 64), torch.tensor(3), backend=None)
    assert torch.allclose(compiled.attribute(x), method.attribute(x, target=3), atol=1e-8)


def test_in_a_noise_tunnel() -> None:
    method, x = LNStatAttribution(_vit()), torch.rand(2, 3, 64, 64)
    compiled = method.compile(torch.rand(6, 3, 64, 64), 3, backend=None)
    found = []
    for one in (compiled, method):
        torch.manual_seed(0)
        found.append(NoiseTunnel(one).attribute(x, nt_type="smoothgrad", nt_samples=3, stdevs=0.1, target=3))
    assert torch.allclose(*found, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    x = torch.rand(2, 3, 64, 64)
    half = LNStatAttribution(_vit().to(dtype))
    compiled = half.compile(torch.rand(2, 3, 64, 64), 1, backend=None)
    assert torch.allclose(compiled.attribute(x), half.attribute(x, target=1), rtol=1e-2, atol=1e-6)
    method = LNStatAttribution(_vit())
    with torch.autocast("cpu", dtype):
        compiled = method.compile(torch.rand(2, 3, 64, 64), 1, backend=None)
        assert torch.allclose(compiled.attribute(x), method.attribute(x, target=1), rtol=1e-2, atol=1e-6)
    with pytest.raises(ValueError, match="same autocast"):
        compiled.attribute(x)


def test_shapes_that_hang_on_numbers() -> None:
    masked = capture(lambda x: (x[x > 0] + 1,), (torch.tensor([1.0, -1.0, 2.0]),))
    found, holds = masked(torch.tensor([5.0, -7.0, 6.0]))
    assert bool(holds)
    assert found.tolist() == [6.0, 7.0]
    assert not bool(masked(torch.tensor([5.0, 7.0, 6.0]))[1])
    distinct = capture(lambda x: (torch.unique(x) * x.sum(),), (torch.tensor([2, 1, 2]),))
    assert bool(distinct(torch.tensor([2, 1, 2]))[1])
    assert not bool(distinct(torch.tensor([2, 1, 3]))[1])
    with pytest.raises(UnsupportedModelError, match="_unique2 finds"):
        capture(lambda x: (torch.unique(x),), (torch.rand(3),))
