"""Token statistics and the shares that follow from them, against numbers worked out another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.models import CASES, build, images
from helpers.oracles import DenseMerging, dense

from captum_lnstat.recording.statistics import residual_shares, shares_of_inverses, token_statistics, token_variance
from captum_lnstat.rules.engine import run
from captum_lnstat.trace.steps import Merging


def alpha(before, update, form):
    """The share; the rest makes it whole."""
    share, rest = residual_shares(before, update, form)
    torch.testing.assert_close(share + rest, torch.ones_like(share))
    return share


def test_the_rest_of_almost_one_is_not_rounding():
    before, update = torch.randn(1, 3, 16), 1e-6 * torch.randn(1, 3, 16)
    _, exact = residual_shares(before.double(), update.double(), "update")
    _, rest = residual_shares(before, update, "update")
    assert torch.allclose(rest.double(), exact, rtol=1e-5, atol=0)
    sigma = [1 / x.double().std(-1, correction=0) for x in (before, update)]
    share, rest = shares_of_inverses(*(s.float() for s in sigma))
    assert torch.allclose(rest.double(), exact, rtol=1e-5, atol=0)
    assert bool((share == 1).all())
    # What has no variance at all leaves no NaN behind.
    share, rest = shares_of_inverses(torch.tensor([4e18, 1.0]), torch.tensor([1e-4, 4e18]))
    assert torch.equal(share, torch.tensor([0.0, 1.0]))
    assert torch.equal(rest, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_mean_and_biased_variance(dtype):
    x = (torch.randn(2, 3, 4, 10) * 3 + 5).to(dtype)
    found = token_statistics(x)
    exact = x.double().numpy()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.mean.dtype == found.variance.dtype == expected
    np.testing.assert_allclose(found.mean, exact.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(found.variance, exact.var(-1, ddof=0), rtol=1e-5)


def test_half_precision_neither_overflows_nor_cancels():
    x = torch.tensor([[-60000.0, 60000.0, -60000.0, 60000.0], [2048.0, 2050.0, 2052.0, 2054.0]], dtype=torch.float16)
    found = token_statistics(x)
    np.testing.assert_allclose(found.variance, [60000.0**2 * np.float32(1), 5.0], rtol=1e-4)
    np.testing.assert_allclose(found.mean, [0.0, 2051.0], rtol=1e-6)


def test_statistics_over_several_dimensions():
    x = torch.randn(2, 3, 4, 5)
    found = token_statistics(x, channel_dims=2)
    np.testing.assert_allclose(found.mean, x.numpy().mean((-2, -1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.variance, x.numpy().var((-2, -1)), rtol=1e-5)


def test_statistics_are_out_of_the_graph():
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert not token_statistics(x).variance.requires_grad


def test_shares_of_a_worked_example():
    # var(x) = 1, var(d) = 4, var(x + d) = 9 for the first token; d undoes half of x for the second.
    before = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    update = torch.tensor([[[2.0, -2.0], [-1.0, 1.0]]])
    assert torch.allclose(alpha(before, update, "ratio"), torch.tensor([[1 / 9, 1.0]]))
    assert torch.allclose(alpha(before, update, "update"), torch.tensor([[1 / 5, 4 / 5]]))
    assert torch.equal(alpha(before, update, "half"), torch.full((1, 2), 0.5))


@pytest.mark.parametrize("form", ["ratio", "update"])
def test_shares_ignore_the_means(form):
    before, update = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    shifted = alpha(before + 100, update - 30, form)
    assert torch.allclose(shifted, alpha(before, update, form), atol=1e-9)


@pytest.mark.parametrize("form", ["ratio", "update", "half"])
def test_shares_are_shares_for_any_tokens(form):
    before = torch.randn(4, 50, 8) * torch.logspace(-20, 18, 50)[:, None]
    update = torch.randn(4, 50, 8) * torch.logspace(18, -20, 50)[:, None]
    share = alpha(before, update, form)
    assert share.dtype == torch.float32
    assert bool(torch.isfinite(share).all())
    assert bool(((share >= 0) & (share <= 1)).all())


@pytest.mark.parametrize("form", ["ratio", "update"])
def test_shares_of_constant_tokens(form):
    constant, lively = torch.full((1, 1, 4), 3.0), torch.tensor([[[1.0, -1.0, 2.0, 0.0]]])
    assert alpha(constant, constant, form).item() == 0.5
    assert alpha(constant, lively, form).item() == 0.0
    assert alpha(lively, constant, form).item() == 1.0
    # Nothing is left of the token, and nothing else is there: it is kept rather than made NaN.
    assert alpha(lively, -lively, "ratio").item() == 1.0


def test_half_precision_tokens_have_float32_shares():
    tokens = torch.randn(1, 3, 8, dtype=torch.float16)
    for form in ("ratio", "update", "half"):
        assert alpha(tokens, tokens, form).dtype == torch.float32


def test_unknown_shares_are_refused():
    x = torch.randn(1, 2, 4)
    with pytest.raises(ValueError, match="third"):
        alpha(x, x, "third")


def _mergings(name: str) -> list[tuple[Merging, DenseMerging]]:
    case, oracle = CASES[name], dense(name)
    trace = run(*[build(name)] * 2, images(case)).trace
    found = [step for step in trace.steps if isinstance(step, Merging)]
    expected = [step for step in oracle.steps if isinstance(step, DenseMerging)]
    assert len(found) == len(expected) > 0
    return list(zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["swin1-odd-grids", "swin1-padded-4", "swin2-odd-grids", "swin2-padded-4"])
@pytest.mark.parametrize("form", ["uniform", "variance"])
def test_merging_shares_are_those_of_the_dense_matrix(name, form):
    for merging, expected in _mergings(name):
        share = merging.shares(form)
        matrix = torch.zeros_like(expected.matrix(form))
        for parent, children in enumerate(expected.children.tolist()):
            for k, child in enumerate(children):
                if child >= 0:
                    matrix[:, parent, child] = share[:, parent, k]
                else:
                    assert bool((share[:, parent, k] == 0).all())
        assert torch.allclose(matrix, expected.matrix(form), rtol=1e-9, atol=1e-12)
        assert torch.allclose(share.sum(-1), torch.ones(()).double(), atol=1e-12)


@pytest.mark.parametrize("name", ["swin1-shift", "swin2-shift"])
def test_variance_shares_are_not_uniform(name):
    for merging, _ in _mergings(name):
        assert float(merging.shares("variance").std(-1).mean()) > 0.05


@pytest.mark.parametrize("name", ["swin1-shift", "swin2-shift"])
def test_children_of_no_variance_share_evenly(name):
    (merging, _), *_ = _mergings(name)
    flat = type(merging)(**{**vars(merging), "before": torch.zeros_like(merging.before)})
    assert torch.equal(flat.shares("variance"), torch.full_like(merging.shares("uniform"), 0.25))


def test_unknown_merging_is_refused():
    (merging, _), *_ = _mergings("swin1-shift")
    with pytest.raises(ValueError, match="largest"):
        merging.shares("largest")


def test_variance_alone_is_that_of_the_statistics():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(token_variance(x), token_statistics(x).variance)
