"""LeGrad, AGCAM, AttCAT, Beyond Intuition and HiResCAM against dense references, and what they cost."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.contract import CountCalls, untouched
from helpers.gradient_oracles import Reference
from helpers.hierarchical_models import hiera, tiny_vit
from helpers.models import CASES, FEW, SWINS, VITS, build, explain, float32_model, images, targets
from torch.nn import functional as F

from captum_lnstat import AGCAM, AttCAT, BeyondIntuition, HiResCAM, LeGrad, UnsupportedModelError

STEPS = 3
METHODS = {
    "legrad": LeGrad,
    "agcam": AGCAM,
    "attcat": AttCAT,
    "token": partial(BeyondIntuition, steps=STEPS),
    "head": partial(BeyondIntuition, approximation="head", steps=STEPS),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*VITS, *SWINS])
def test_each_is_the_dense_reference(name, method):
    reference = Reference(name)
    expected = (
        reference.beyond_intuition(method, STEPS) if method in ("token", "head") else getattr(reference, method)()
    )
    model, x = build(name), images(CASES[name])
    with untouched(model, x):
        found = explain(METHODS[method](model), x, targets(2))
    grid, prefix = expected.split(CASES[name])
    size = float(expected.tokens.abs().max())
    assert size > 0
    assert float((found.grid - grid).abs().max()) <= 1e-9 * size
    assert found.prefix.shape == prefix.shape
    assert float((found.prefix - prefix).abs().sum()) <= 1e-9 * size
    # The map says something, and not the same for every class.
    assert float(grid.std()) > 0.01 * float(grid.abs().mean())
    if name in FEW:
        other = explain(METHODS[method](model), x, targets(2) * 0)
        assert float((other.grid - grid).abs().max()) > 1e-3 * float(grid.abs().max())


@pytest.mark.parametrize("name", ["vit-class", "vit-avg", "vit-registers", "swin1-padded-7", "swin2-odd-grids"])
@pytest.mark.parametrize("method", METHODS)
def test_in_float32_to_1e_5(name, method):
    found = explain(METHODS[method](float32_model(name)), images(CASES[name], dtype=torch.float32), targets(2)).grid
    exact = explain(METHODS[method](build(name)), images(CASES[name]), targets(2)).grid
    assert float((found - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("name", ["vit-class", "vit-avg", "vit-registers", "swin1-padded-7", "swin2-odd-grids"])
@pytest.mark.parametrize("layer", ["last", "middle"])
def test_hirescam_is_gradient_times_activation(name, layer):
    model, x, target = build(name), images(CASES[name]), targets(2)
    norms = [one for one, module in model.named_modules() if one.endswith("norm1")]
    chosen = norms[-1] if layer == "last" else norms[1]
    seen = []
    handle = model.get_submodule(chosen).register_forward_hook(lambda _, inputs, output: seen.append(output))
    score = model(x)[torch.arange(2), target].sum()
    handle.remove()
    (slope,) = torch.autograd.grad(score, seen)
    product = (seen[0] * slope).sum(-1).detach()
    if product.dim() == 2:
        product = product[:, CASES[name].prefix :].unflatten(1, CASES[name].grid)
    expected = F.interpolate(product.clamp(min=0)[:, None], x.shape[2:], mode="bilinear")
    assert expected.std() > 0
    method = HiResCAM(model, model, None if layer == "last" else chosen)
    with untouched(model, x):
        found = method.attribute(x, target)
    torch.testing.assert_close(found, expected)
    alone = torch.cat([method.attribute(x[i : i + 1], target[i]) for i in range(2)])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("name", ["vit-class", "swin1-shift"])
@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("legrad", 1, 0),
        ("agcam", 1, 1),
        ("attcat", 1, 1),
        ("token", STEPS, 0),
        ("head", STEPS, 1),
    ],
)
def test_no_more_passes_than_the_formula_asks_for(name, method, forward, backward):
    model, seen = build(name), []
    first = model.blocks[1].norm1 if hasattr(model, "blocks") else model.layers[0].blocks[1].norm1

    def below(module, inputs, output):
        output.register_hook(seen.append)

    first.register_forward_hook(below)
    counted = CountCalls(model)
    METHODS[method](counted).attribute(images(CASES[name]), 1)
    assert counted.count == forward
    # Below an attention: a block's own score in LeGrad, and the feedback of the last, end at it.
    assert len(seen) == backward


@pytest.mark.parametrize("options", [{"approximation": "row"}, {"steps": 0}])
def test_options_that_are_none(options):
    with pytest.raises(ValueError, match=r"is (0|'row'); expected"):
        BeyondIntuition(build("vit-class"), **options)


@pytest.mark.parametrize("steps", [True, 2.0, "20"])
def test_steps_that_are_no_number(steps):
    with pytest.raises(TypeError, match="expected a positive int"):
        BeyondIntuition(build("vit-class"), steps=steps)


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (hiera, "attcat", "returns fewer tokens than it attends to"),
        (hiera, "token", "approximation='head'"),
        (tiny_vit, "attcat", "no module returns the tokens after"),
        (tiny_vit, "legrad", "rule='gradient', take this model"),
    ],
)
def test_what_a_formula_does_not_cover_is_refused(make, method, message):
    model, x = make(), torch.randn(1, 3, 64, 64)
    with untouched(model, x), pytest.raises(UnsupportedModelError, match=message):
        METHODS[method](model).attribute(x, 1)
