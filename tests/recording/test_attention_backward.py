"""Attention and Linears with backward passes of their own, against what autograd makes of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_lnstat import GenericAttention, LNStatAttribution, RecordingError, zoo
from captum_lnstat.recording.attention_backward import (
    ObservedAttention,
    ObservedProduct,
    can_be_observed,
    product_can_be_observed,
)
from captum_lnstat.recording.constant_weights import FEW, ConstantLinear, either, few_rows, linear
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.sites import FusedSite, SoftmaxSite

D = torch.float64
MASKS = {
    "none": None,
    "bias": torch.randn(1, 3, 11, 13, dtype=D, generator=torch.Generator().manual_seed(1)),
    "hidden": torch.rand(11, 13, generator=torch.Generator().manual_seed(2)) < 0.6,
}
MASKS["hidden"][:, 0] = True


def _parts(seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 11, 4), (2, 3, 13, 4), (2, 3, 13, 5)]
    return [torch.randn(shape, dtype=D, generator=rng).requires_grad_() for shape in shapes]


def _site(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> FusedSite:
    kept = None if mask is None else Kept.of(mask)
    return FusedSite("attn", Kept.of(q), Kept.of(k), Kept.of(v), kept, scale, False, None)


def _slow(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return attention, torch.einsum("bhij,bhjd->bhid", attention, v)


class _Reader:
    """Writes down what it is fed."""

    wanted = None

    def __init__(self) -> None:
        self.attention, self.weighted = (torch.zeros(2, 3, 11, 13, dtype=D) for _ in range(2))
        self.chunks, self.finished = 0, 0

    def add(self, queries, heads, attention, weighted):
        self.attention[:, heads][:, :, queries] = attention
        self.weighted[:, heads][:, :, queries] = weighted
        weighted.fill_(7)  # it is given away

    def end_chunk(self, queries):
        self.chunks += 1

    def finish(self, queries):
        self.finished += 1


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("queries", [slice(None), slice(4, 5)])
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_the_backward_pass_of_attention_is_that_of_its_formula(mask, scale, queries, chunk, monkeypatch):
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", chunk)
    monkeypatch.setattr("captum_lnstat.recording.sites.QUERIES", 3)
    q, k, v = _parts()
    site = _site(q, k, v, MASKS[mask], scale)
    assert can_be_observed(site, 0.0, MASKS[mask])
    output = ObservedAttention.apply(q, k, v, MASKS[mask], site)
    attention, expected = _slow(q, k, v, MASKS[mask], 0.5 if scale is None else scale)
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    d_output = torch.zeros_like(expected)
    d_output[:, :, queries] = torch.randn(expected[:, :, queries].shape, dtype=D)
    *wanted, d_attention = torch.autograd.grad(expected, [q, k, v, attention], d_output)
    reader = _Reader()
    output.grad_fn.observer = lambda feed: feed(reader)
    found = torch.autograd.grad(output, [q, k, v], d_output)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert reader.finished == 1
    assert reader.chunks >= 1
    assert torch.allclose(reader.weighted, d_attention * attention, rtol=1e-10, atol=1e-12)
    if queries == slice(None):
        assert torch.allclose(reader.attention, attention, rtol=1e-12)


@pytest.mark.parametrize("queries", [slice(None), slice(4, 5)])
def test_the_backward_pass_of_a_product_is_that_of_its_formula(queries):
    attention, value = torch.rand(2, 3, 11, 13, dtype=D).requires_grad_(), _parts()[2]
    site = SoftmaxSite("attn", Kept.of(attention), Kept.of(value), None)
    assert product_can_be_observed(site, attention, value)
    assert not product_can_be_observed(site, attention * 1, value)  # a dropout between
    d_output = torch.zeros(2, 3, 11, 5, dtype=D)
    d_output[:, :, queries] = torch.randn(2, 3, 11, 5, dtype=D)[:, :, queries]
    wanted = torch.autograd.grad(torch.einsum("bhij,bhjd->bhid", attention, value), [attention, value], d_output)
    output, reader = ObservedProduct.apply(attention, value, site), _Reader()
    output.grad_fn.observer = lambda feed: feed(reader)
    found = torch.autograd.grad(output, [attention, value], d_output)
    assert torch.allclose(found[0], wanted[0], atol=1e-12)
    assert torch.allclose(found[1], wanted[1], atol=1e-12)
    assert torch.allclose(reader.weighted, wanted[0] * attention, atol=1e-12)


@pytest.mark.parametrize("rows", [range(40), [7], [7, 39], []])
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_pass_of_a_linear_is_that_of_its_formula(rows, bias):
    x, weight = torch.randn(2, 20, 6, dtype=D).requires_grad_(), torch.randn(4, 6, dtype=D)
    offset = torch.randn(4, dtype=D) if bias else None
    slope = torch.zeros(40, 4, dtype=D)
    slope[list(rows)] = torch.randn(len(rows), 4, dtype=D)
    slope = slope.reshape(2, 20, 4)
    output = linear(x, weight, offset)
    assert type(output.grad_fn).__name__ == f"{ConstantLinear.__name__}Backward"
    assert torch.equal(output, nn.functional.linear(x, weight, offset))
    found, wanted = (torch.autograd.grad(y, x, slope)[0] for y in (output, torch.einsum("bic,oc->bio", x, weight)))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_a_linear_whose_weights_have_a_gradient_is_left_alone():
    x, weight = torch.randn(3, 6).requires_grad_(), nn.Parameter(torch.randn(4, 6))
    linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_few_rows_are_those_that_are_not_zero():
    gradient = torch.zeros(200, 3)
    gradient[[3, 150], 2] = 1  # not in the entry that is looked at first
    assert few_rows(gradient).tolist() == [3, 150]
    gradient[: 200 // FEW + 1, 2] = 1
    assert few_rows(gradient) is None
    assert few_rows(torch.zeros(200, 3)).tolist() == []
    assert few_rows(torch.zeros(0, 3)) is None
    assert either(torch.tensor([1, 3]), torch.tensor([2, 3])).tolist() == [1, 2, 3]
    assert either(None, torch.tensor([2])) is None


def test_what_is_not_covered_keeps_its_own_backward_pass():
    q, k, v = (part.detach().requires_grad_() for part in _parts())
    assert not can_be_observed(_site(q, k, v), 0.1, None)
    assert not can_be_observed(_site(q, k, v), 0.0, MASKS["bias"].clone().requires_grad_())
    halves = [part.detach().bfloat16().requires_grad_() for part in (q, k, v)]
    assert not can_be_observed(_site(*halves), 0.0, None)
    assert not can_be_observed(_site(q, k[:, :1], v[:, :1]), 0.0, None)  # one key head for several of the queries
    assert not can_be_observed(_site(*(part.detach() for part in (q, k, v))), 0.0, None)


@pytest.mark.parametrize("name", ["vit-mini", "swin-mini"])
@pytest.mark.parametrize("method", [lambda model: LNStatAttribution(model, rule="gradient"), GenericAttention])
def test_both_backward_passes_give_the_same_map(name, method, monkeypatch):
    model, x = zoo.load(name).model.double(), torch.randn(2, 3, 64, 64, dtype=D)
    found = method(model).attribute(x, target=1)
    for place in ("fused.can_be_observed", "softmaxes.product_can_be_observed"):
        monkeypatch.setattr(f"captum_lnstat.recording.{place}", lambda *_: False)
    wanted = method(model).attribute(x, target=1)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.max()))


@pytest.mark.filterwarnings("ignore:the score reads the image besides the end")
def test_a_score_that_leaves_out_the_last_blocks_is_refused():
    model = zoo.load("vit-mini").model
    features: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: features.append(output))

    def forward(x: Tensor) -> Tensor:
        features.clear()
        model(x)
        return features[0][:, 0, :7]

    with pytest.raises(RecordingError, match="do not depend on the tokens where the blocks end"):
        LNStatAttribution(forward, model, rule="gradient").attribute(torch.randn(1, 3, 64, 64), target=1)
    handle.remove()
