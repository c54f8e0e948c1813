"""The recorder: what it sees, that it is right about it, and that it leaves no trace in the model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import CASES, FEW, build, float32_model, images, targets
from timm.layers import RmsNorm
from torch import Tensor, nn

from captum_lnstat import (
    AttentionRollout,
    GenericAttention,
    LNStatAttribution,
    Recorder,
    Recording,
    RecordingError,
    UnsupportedModelError,
)
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.stacked_sites import stacked_probabilities
from captum_lnstat.rules.engine import run
from captum_lnstat.trace.cotangent import Cotangent
from captum_lnstat.trace.maps import FrozenNorm

EVERYTHING = slice(0, None)


class Call(nn.Module):
    """A module that runs a function, with modules of its own."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def record(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Recording]:
    module = function if isinstance(function, nn.Module) else Call(function)
    with torch.no_grad(), Recorder(module) as recorder:
        output = module(*args, **kwargs)
    return output, recorder.recording


def only_site(recording: Recording) -> AttentionSite:
    (site,) = recording.sites
    return site


def whole(site: AttentionSite) -> tuple[Tensor, Tensor]:
    heads = slice(0, site.shape[1])
    return site.probabilities(heads), site.values(heads)


# Fused attention.

B, H, L, S, D = 2, 4, 5, 6, 8


def _qkv(queries: int = L, keys: int = S, key_heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, queries, D) * 2, torch.randn(B, key_heads, keys, D), torch.randn(B, key_heads, keys, D)


def _bool_mask(*shape: int) -> Tensor:
    mask = torch.rand(*shape) > 0.4
    mask[..., 0] = True
    return mask


def _blind_row() -> Tensor:
    mask = _bool_mask(L, S)
    mask[2] = False
    return mask


SDPA: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "float mask (q, k)": lambda: {"attn_mask": torch.randn(L, S)},
    "float mask (b, 1, q, k)": lambda: {"attn_mask": torch.randn(B, 1, L, S)},
    "float mask (1, h, q, k)": lambda: {"attn_mask": torch.randn(1, H, L, S)},
    "float mask (b, h, q, k)": lambda: {"attn_mask": torch.randn(B, H, L, S)},
    "float mask (h, q, k)": lambda: {"attn_mask": torch.randn(H, L, S)},
    "float mask with -inf": lambda: {"attn_mask": torch.randn(L, S).masked_fill(~_bool_mask(L, S), -torch.inf)},
    "float mask with a blind row": lambda: {"attn_mask": torch.zeros(L, S).masked_fill(~_blind_row(), -torch.inf)},
    "bool mask (q, k)": lambda: {"attn_mask": _bool_mask(L, S)},
    "bool mask (b, h, q, k)": lambda: {"attn_mask": _bool_mask(B, H, L, S)},
    "bool mask (h, q, k)": lambda: {"attn_mask": _bool_mask(H, L, S)},
    "bool mask with a blind row": lambda: {"attn_mask": _blind_row()},
    "scale": lambda: {"scale": 0.9},
    "causal": lambda: {"is_causal": True},
    "causal with scale": lambda: {"is_causal": True, "scale": 0.2},
    "mask with scale": lambda: {"attn_mask": torch.randn(L, S), "scale": 0.7},
}


@pytest.mark.parametrize("queries", [L, S], ids=["cross", "self"])
@pytest.mark.parametrize("case", SDPA)
def test_fused_attention_is_computed_again(case, queries):
    options = SDPA[case]()
    if queries == S:
        options = {name: F.pad(v, (0, 0, 0, 1), value=1) if name == "attn_mask" else v for name, v in options.items()}
    q, k, v = _qkv(queries)
    output, recording = record(F.scaled_dot_product_attention, q, k, v, **options)
    site = only_site(recording)
    assert site.shape == (B, H, queries, S)
    probabilities, values = whole(site)
    assert probabilities.dtype == torch.float32
    assert torch.equal(values, v)
    assert torch.allclose(probabilities @ values, output, atol=2e-6)
    blind = 2 if "blind" in case else -1
    for query in range(queries):
        expected = 0.0 if query == blind else 1.0
        assert torch.allclose(probabilities[:, :, query].sum(-1), torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["fused", "explicit", "stacked"])
def test_what_a_mask_left_of_a_weight_is_nothing(way, dtype):
    """Products of numbers such as 1e-44 are slow. Nothing else is changed, however small."""
    q, k, v = (tensor.to(dtype) for tensor in _qkv(S))
    mask = torch.zeros(S, S, dtype=dtype)
    mask[:, 2], mask[:, 3] = -50, -200
    if way == "explicit":
        _, recording = record(lambda: ((q @ k.mT) / D**0.5 + mask).softmax(-1) @ v)
    else:
        _, recording = record(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    site = only_site(recording)
    found = stacked_probabilities([site, site])[1] if way == "stacked" else whole(site)[0]
    expected = ((q @ k.mT).double() / D**0.5 + mask).softmax(-1)
    assert (found[..., 3] == 0).all()
    assert (found[..., 2] > 0).all()
    assert torch.allclose(found[..., :3].double(), expected[..., :3], rtol=2e-5, atol=0)


@pytest.mark.parametrize("case", SDPA)
def test_heads_can_be_asked_for_one_by_one(case, monkeypatch):
    monkeypatch.setattr("captum_lnstat.recording.sites.QUERIES", 1)
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", B * L * S)
    q, k, v = _qkv()
    _, recording = record(F.scaled_dot_product_attention, q, k, v, **SDPA[case]())
    site = only_site(recording)
    probabilities, _ = whole(site)
    ((queries, turns),) = site.chunks()
    chunks = list(turns)
    assert queries == slice(0, L)
    assert [part.shape for _, part in chunks] == [(B, 1, L, S)] * H
    torch.testing.assert_close(torch.cat([part for _, part in chunks], 1), probabilities)
    assert torch.equal(torch.cat([site.values(heads) for heads, _ in chunks], 1), v)
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", 2 * B * S)
    few = [(queries, torch.cat([part for _, part in turns], 1)) for queries, turns in site.chunks()]
    assert [part.shape[2] for _, part in few] == [2] * (L // 2) + [1] * (L % 2)
    assert torch.allclose(torch.cat([part for _, part in few], 2), probabilities, atol=1e-6)
    some = torch.tensor([3, 0])
    ((queries, turns),) = site.chunks(some)
    assert torch.equal(queries, some)
    assert torch.allclose(torch.cat([part for _, part in turns], 1), probabilities[:, :, some], atol=1e-6)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries(key_heads):
    q, k, v = _qkv(key_heads=key_heads)
    output, recording = record(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    site = only_site(recording)
    assert site.shape == (B, H, L, S)
    probabilities, values = whole(site)
    assert torch.allclose(probabilities @ values, output, atol=2e-6)
    one_by_one = [site.probabilities(slice(h, h + 1)) @ site.values(slice(h, h + 1)) for h in range(H)]
    assert torch.allclose(torch.cat(one_by_one, 1), output, atol=2e-6)


def test_fused_attention_by_name():
    q, k, v = _qkv()
    output, recording = record(lambda: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None))
    probabilities, values = whole(only_site(recording))
    assert torch.allclose(probabilities @ values, output, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_are_in_the_accumulation_dtype(dtype):
    q, k, v = (t.to(dtype) for t in _qkv())
    _, recording = record(F.scaled_dot_product_attention, q, k, v, attn_mask=torch.zeros(L, S, dtype=dtype))
    probabilities, values = whole(only_site(recording))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert probabilities.dtype == values.dtype == expected
    exact = (q.double() @ k.double().transpose(-2, -1) / D**0.5).softmax(-1)
    assert torch.allclose(probabilities.double(), exact, atol=1e-6)


def test_attention_after_an_error_that_the_model_caught_is_the_models_own():
    def broken(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    def attend(q: Tensor) -> Tensor:
        with suppress(ZeroDivisionError):
            model.inner(q)
        return F.scaled_dot_product_attention(q, q, q)

    model = Call(attend, inner=Call(broken))
    assert only_site(record(model, torch.randn(B, H, L, D))[1]).module == ""


def test_attention_without_a_batch_is_refused_loudly():
    q, k, v = (t[0] for t in _qkv())
    _, recording = record(F.scaled_dot_product_attention, q, k, v)
    with pytest.raises(UnsupportedModelError, match=r"\(4, 5, 8\)"):
        only_site(recording).shape  # noqa: B018


# Explicit softmax.

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.softmax(dim=)": lambda s: F.softmax(s, dim=-1),
    "F.softmax": lambda s: F.softmax(s, 3),
    "F.softmax(dtype=)": lambda s: F.softmax(s, -1, dtype=torch.float32),
    "F.softmax(input=)": lambda s: F.softmax(input=s, dim=-1),
    "torch.softmax": lambda s: torch.softmax(s, -1),
    "torch.softmax(dim=)": lambda s: torch.softmax(s, dim=3),
    "Tensor.softmax": lambda s: s.softmax(-1),
    "Tensor.softmax(dim=)": lambda s: s.softmax(dim=-1),
    "nn.Softmax": nn.Softmax(dim=-1),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": lambda a, v: a @ v,
    "torch.matmul": torch.matmul,
    "torch.matmul(other=)": lambda a, v: torch.matmul(a, other=v),
    "Tensor.matmul": lambda a, v: a.matmul(v),
    "dropout, contiguous, @": lambda a, v: nn.Dropout(0.5).eval()(a).contiguous() @ v,
    "F.dropout, to, @": lambda a, v: F.dropout(a, 0.5, False).to(v.dtype) @ v,
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_explicit_attention(softmax, product):
    q, k, v = _qkv()
    seen = {}

    def attend() -> Tensor:
        seen["a"] = SOFTMAXES[softmax](q @ k.transpose(-2, -1))
        return PRODUCTS[product](seen["a"], v)

    output, recording = record(attend)
    site = only_site(recording)
    assert site.shape == (B, H, L, S)
    probabilities, values = whole(site)
    assert torch.equal(probabilities, seen["a"])
    assert torch.equal(values, v)
    assert torch.allclose(probabilities @ values, output, atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[0, 0].softmax(-1),  # (tokens, classes)
        lambda x: x.softmax(1),
        lambda x: F.softmax(x, dim=0),
        lambda x: x.log_softmax(-1),
        lambda x: x.sigmoid() @ x.transpose(-2, -1),
    ],
)
def test_other_softmaxes_are_no_attention(other):
    assert record(other, torch.randn(2, 3, 4, 5))[1].sites == ()


def test_a_softmax_that_meets_no_values_says_so():
    _, recording = record(lambda s: s.softmax(-1) * 2, torch.randn(1, 2, 3, 3))
    site = only_site(recording)
    assert site.probabilities(EVERYTHING).shape == (1, 2, 3, 3)
    with pytest.raises(RecordingError, match="product"):
        site.values(EVERYTHING)


def test_only_the_first_product_is_with_the_values():
    v, w = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 3)

    def attend(s: Tensor) -> Tensor:
        a = s.softmax(-1)
        return (a @ v).sum() + (a @ w).sum()

    _, recording = record(attend, torch.randn(1, 2, 4, 4))
    assert torch.equal(only_site(recording).values(EVERYTHING), v)


def test_a_softmax_after_the_model_is_no_attention_of_a_block():
    model, x = build("swin1-shift"), images(CASES["swin1-shift"])
    plain = run(model, model, x)
    dressed = run(lambda x: model(x)[:, None, None].softmax(-1)[:, 0, 0], model, x)
    assert [b.site.module for b in dressed.trace.blocks] == [b.site.module for b in plain.trace.blocks]
    for one, other in zip(plain.trace.blocks, dressed.trace.blocks, strict=True):
        assert torch.equal(one.site.probabilities(EVERYTHING), other.site.probabilities(EVERYTHING))


# nn.MultiheadAttention.


def _multi_head(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(12, 3, **options).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape) * (0.6 if p.dim() == 2 else 0.3))
    return module


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "float attn_mask": lambda: {"attn_mask": torch.randn(4, 5)},
    "bool attn_mask": lambda: {"attn_mask": ~_bool_mask(4, 5)},
    "attn_mask by head": lambda: {"attn_mask": torch.randn(2 * 3, 4, 5)},
    "bool attn_mask by head": lambda: {"attn_mask": ~_bool_mask(2 * 3, 4, 5)},
    "key_padding_mask": lambda: {"key_padding_mask": ~_bool_mask(2, 5)},
    "float key_padding_mask": lambda: {"key_padding_mask": torch.randn(2, 5)},
    "both": lambda: {"attn_mask": ~_bool_mask(4, 5), "key_padding_mask": ~_bool_mask(2, 5)},
    "both, float": lambda: {"attn_mask": torch.randn(4, 5), "key_padding_mask": torch.randn(2, 5)},
}


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 7, "vdim": 9}, {"bias": False}], ids=["packed", "separate", "no bias"]
)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", MASKS)
def test_multi_head_attention(options, batch_first, masks):
    module = _multi_head(batch_first=batch_first, **options)
    q, k, v = torch.randn(2, 4, 12), torch.randn(2, 5, module.kdim), torch.randn(2, 5, module.vdim)
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    given = MASKS[masks]()
    with torch.no_grad():
        expected, weights = module(q, k, v, average_attn_weights=False, **given)
    for need in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        (output, _), recording = record(module, q, k, v, **given, **need)
        site = only_site(recording)
        assert site.module == ""
        assert site.shape == (2, 3, 4, 5)
        probabilities, values = whole(site)
        assert torch.allclose(probabilities, weights, atol=1e-6)
        joined = (probabilities @ values).transpose(1, 2).flatten(2)
        out = module.out_proj(joined)
        out = out if batch_first else out.transpose(0, 1)
        assert torch.allclose(output, out, atol=1e-5)
        assert torch.allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS)
def test_multi_head_attention_forward_as_a_function(masks):
    """The function is given boolean masks as they are; the module turns them into floats first."""
    module = _multi_head(kdim=12)
    q, k = torch.randn(4, 2, 12), torch.randn(5, 2, 12)
    given = MASKS[masks]()

    def attend() -> tuple[Tensor, Tensor]:
        projections = module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0
        out = module.out_proj.weight, module.out_proj.bias
        return F.multi_head_attention_forward(
            q, k, k, 12, 3, *projections, *out, training=False, average_attn_weights=False, **given
        )

    (_, weights), recording = record(attend)
    assert torch.allclose(whole(only_site(recording))[0], weights, atol=1e-6)


def test_multi_head_attention_without_a_batch():
    module = _multi_head()
    x = torch.randn(4, 12)
    with torch.no_grad():
        _, weights = module(x, x, x, average_attn_weights=False)
    _, recording = record(module, x, x, x)
    assert torch.allclose(whole(only_site(recording))[0], weights[None], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"need_weights": False}])
def test_causal_multi_head_attention(options):
    module = _multi_head(batch_first=True)
    x, mask = torch.randn(2, 5, 12), nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        _, weights = module(x, x, x, attn_mask=mask, average_attn_weights=False)
    _, recording = record(module, x, x, x, attn_mask=mask, is_causal=True, **options)
    assert torch.allclose(whole(only_site(recording))[0], weights, atol=1e-6)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_multi_head_attention_with_keys_of_its_own_is_refused(options):
    module = nn.MultiheadAttention(12, 3, **options).eval()
    x = torch.randn(4, 2, 12)
    _, recording = record(module, x, x, x)
    with pytest.raises(UnsupportedModelError, match="keys of its own"):
        only_site(recording).shape  # noqa: B018


@pytest.mark.parametrize("batch_first", [True, False])
def test_gradient_of_multi_head_attention(batch_first):
    module = _multi_head(batch_first=batch_first).double()
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    inputs = x if batch_first else x.transpose(0, 1)
    with Recorder(module) as recorder:
        output, _ = module(inputs, inputs, inputs, need_weights=False)
    weights = torch.randn_like(output)
    site = only_site(recorder.recording)
    assert site.output is not None
    (gradient,) = torch.autograd.grad((output * weights).sum(), [site.output])
    heads = slice(0, 3)
    found = site.output_gradient(gradient) @ site.values(heads).transpose(-2, -1)
    # The same from an attention written out.
    a = site.probabilities(heads).requires_grad_()
    out = module.out_proj((a @ site.values(heads)).transpose(1, 2).flatten(2))
    out = out if batch_first else out.transpose(0, 1)
    assert torch.allclose(out, output)
    (expected,) = torch.autograd.grad((out * weights).sum(), [a])
    assert torch.allclose(found, expected, atol=1e-10)


def test_an_encoder_layer_is_seen_although_it_has_a_fast_path():
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = layer(x)
    output, recording = record(layer, x)
    assert torch.allclose(output, expected, atol=1e-5)
    assert [site.module for site in recording.sites] == ["self_attn"]
    assert [norm.module for norm in recording.norms] == ["norm1", "norm2"]


# Norms.

NORMS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "module": lambda: nn.LayerNorm(10, eps=0.25),
    "module without affine": lambda: nn.LayerNorm(10, eps=0.25, elementwise_affine=False),
    "module without bias": lambda: nn.LayerNorm(10, eps=0.25, bias=False),
    "F.layer_norm": lambda: lambda x: F.layer_norm(x, (10,), eps=0.25),
    "F.layer_norm with a list": lambda: lambda x: F.layer_norm(x, [10], torch.ones(10, dtype=x.dtype), None, 0.25),
    "F.layer_norm by name": lambda: lambda x: F.layer_norm(input=x, normalized_shape=(10,), eps=0.25),
    "torch.layer_norm": lambda: lambda x: torch.layer_norm(x, (10,), eps=0.25),
    "torch.layer_norm by name": lambda: lambda x: torch.layer_norm(input=x, normalized_shape=(10,), eps=0.25),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NORMS)
def test_layer_norm_statistics(kind, dtype):
    norm = NORMS[kind]()
    norm = norm.to(dtype) if isinstance(norm, nn.Module) else norm
    x = (torch.randn(2, 3, 4, 10) * 2 + 7).to(dtype)
    output, recording = record(norm, x)
    (call,) = recording.norms
    assert (call.kind, call.dims, call.eps) == ("layer_norm", 1, 0.25)
    exact = x.double().numpy()
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert call.statistics.mean.dtype == call.statistics.variance.dtype == expected
    np.testing.assert_allclose(call.statistics.mean, exact.mean(-1), rtol=1e-6)
    np.testing.assert_allclose(call.statistics.variance, exact.var(-1, ddof=0), rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(output, norm(x))


def test_a_recorded_norm_as_an_affine_map():
    norm = nn.LayerNorm(10, eps=0.25).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    x, u = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 3, 10, dtype=torch.float64)
    output, recording = record(norm, x)
    cotangent, constant = FrozenNorm.of(recording.norms[0]).pull_back(Cotangent.of(u[:, :, None]))
    pulled = cotangent.dense()[:, :, 0]
    assert torch.allclose((u * output).sum(-1), (pulled * x).sum(-1) + constant[..., 0], rtol=1e-12)
    sigma = (x.var(-1, correction=0, keepdim=True) + 0.25).sqrt()
    g = u * norm.weight.detach()
    assert torch.allclose(pulled, (g - g.mean(-1, keepdim=True)) / sigma, rtol=1e-12)


@pytest.mark.parametrize(
    "norm", [nn.RMSNorm(10, eps=0.25), lambda x: F.rms_norm(x, (10,), eps=0.25), RmsNorm(10, eps=0.25)]
)
def test_rms_norm_is_recorded_as_such(norm):
    x = torch.randn(2, 3, 10) + 5
    _, recording = record(norm, x)
    (call,) = recording.norms
    assert (call.kind, call.dims, call.eps) == ("rms_norm", 1, 0.25)
    np.testing.assert_allclose(call.statistics.variance, (x.numpy() ** 2).mean(-1), rtol=1e-5)
    assert not bool(call.statistics.mean.any())
    assert recording.norm("") is call


def test_a_frozen_rms_norm_is_linear():
    x, u = torch.randn(2, 3, 10).double() + 5, torch.randn(2, 3, 10).double()
    norm = nn.RMSNorm(10, eps=0.25, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    output, recording = record(norm, x)
    frozen = FrozenNorm.of(recording.norms[0])
    cotangent, constant = frozen.pull_back(Cotangent.of(u[:, :, None]))
    expected = u * norm.weight.detach() / (x.square().mean(-1, keepdim=True) + 0.25).sqrt()
    torch.testing.assert_close(cotangent.dense()[:, :, 0], expected)
    torch.testing.assert_close(frozen.pull_back_each(u, None), expected)
    torch.testing.assert_close(frozen.apply(x), output.detach())
    torch.testing.assert_close((expected * x).sum(-1), (u * output.detach()).sum(-1))
    assert constant is None


def test_rms_norm_has_torchs_default_epsilon():
    _, recording = record(nn.RMSNorm(10), torch.randn(2, 3, 10))
    assert recording.norms[0].eps == torch.finfo(torch.float32).eps


# Which module ran.


def test_stamps_of_a_vit():
    _, recording = record(build("vit-map"), images(CASES["vit-map"]))
    assert [site.module for site in recording.sites] == [*(f"blocks.{i}.attn" for i in range(3)), "attn_pool"]
    blocks = [f"blocks.{i}.norm{n}" for i in range(3) for n in (1, 2)]
    assert [norm.module for norm in recording.norms] == [*blocks, "norm", "attn_pool.norm"]


def test_stamps_of_a_swin():
    _, recording = record(build("swin1-shift"), images(CASES["swin1-shift"]))
    blocks = [f"layers.{s}.blocks.{b}" for s in range(2) for b in range(2)]
    assert [site.module for site in recording.sites] == [f"{block}.attn.softmax" for block in blocks]
    norms = [f"{block}.norm{n}" for block in blocks for n in (1, 2)]
    expected = ["patch_embed.norm", *norms[:4], "layers.1.downsample.norm", *norms[4:], "norm"]
    assert [norm.module for norm in recording.norms] == expected


def test_stamps_after_a_module_that_failed():
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no")

    model = Call(lambda x: x, bad=Call(fails), good=nn.LayerNorm(4))

    def forward(x: Tensor) -> Tensor:
        with pytest.raises(ValueError, match="no"):
            model.bad(x)
        return F.layer_norm(model.good(x), (4,))

    model.function = forward
    _, recording = record(model, torch.randn(2, 3, 4))
    assert [norm.module for norm in recording.norms] == ["good", ""]


def test_events_by_module_are_unique_or_refused():
    norm = nn.LayerNorm(4)
    model = Call(lambda x: norm(norm(x)), twice=norm)
    _, recording = record(model, torch.randn(2, 3, 4))
    with pytest.raises(RecordingError, match="layer_norm, layer_norm"):
        recording.norm("twice")
    with pytest.raises(RecordingError, match="none"):
        recording.norm("missing")
    with pytest.raises(RecordingError, match="no attention was seen inside 'twice'"):
        recording.site("twice")
    with pytest.raises(RecordingError, match="ran 0 times"):
        recording.call("twice")


def test_names_are_not_confused_with_their_prefixes():
    model = Call(lambda x: model.norm10(model.norm1(x)), norm1=nn.LayerNorm(4), norm10=nn.LayerNorm(4))
    _, recording = record(model, torch.randn(2, 3, 4))
    assert recording.norm("norm1").module == "norm1"
    assert recording.norm("norm10").module == "norm10"


def test_taps_keep_what_went_in_and_out():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(2, 4)
    with torch.no_grad(), Recorder(model, [model[1]]) as recorder:
        output = model(x)
    call = recorder.recording.call("1")
    assert torch.equal(call.output.read(), output)
    assert torch.equal(call.input.read().relu(), output)
    with pytest.raises(RecordingError, match="ran 0 times"):
        recorder.recording.call("0")


def test_a_tapped_module_that_ran_twice_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad(), Recorder(model, [model[0]]) as recorder:
        model(model(torch.randn(2, 4)))
    with pytest.raises(RecordingError, match="ran 2 times"):
        recorder.recording.call("0")


# Nothing is changed.


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a bystander could notice about a model, bit for bit."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: training"] = module.training
        for attribute, value in vars(module).items():
            if "hook" in attribute:
                found[f"{name}: {attribute}"] = list(value.items()) if hasattr(value, "items") else value
        found[f"{name}: attributes"] = sorted(vars(module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (id(tensor), tensor.numpy(force=True).tobytes(), tensor.requires_grad, tensor._version)
        found[f"{name}: grad"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.numpy().tobytes())
    return found


def _lived_in(name: str) -> nn.Module:
    """A model in use: some gradients, frozen parameters and hooks of its owner."""
    model = copy.deepcopy(float32_model(name))
    for i, (_, parameter) in enumerate(model.named_parameters()):
        if i % 3 == 0:
            parameter.grad = torch.randn_like(parameter)
        parameter.requires_grad_(i % 4 != 1)
    for i, module in enumerate(model.modules()):
        if i % 5 == 0:
            module.register_forward_hook(lambda module, inputs, output: None)
            module.register_forward_pre_hook(lambda module, inputs: None)
    return model


METHODS: dict[str, Callable[..., Any]] = {
    "lnstat": LNStatAttribution,
    "evidence": lambda *args: LNStatAttribution(*args, rule="evidence"),
    "rollout": lambda *args: LNStatAttribution(*args, rule="rollout"),
    "gradient": lambda *args: LNStatAttribution(*args, rule="gradient"),
    "AttentionRollout": AttentionRollout,
    "GenericAttention": GenericAttention,
}
MODELS = ["vit-class", "swin1-odd-grids", "swin2-odd-grids"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_model_or_the_image_is_changed(name, method):
    model, x = _lived_in(name), images(CASES[name], dtype=torch.float32).requires_grad_()
    before, value = fingerprint(model), x.detach().clone()
    METHODS[method](model).attribute(x, targets(2))
    assert fingerprint(model) == before
    assert x.requires_grad
    assert x.grad is None
    assert x._version == 0
    assert torch.equal(x, value)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RecordingError])
@pytest.mark.parametrize("where", ["patch_embed", "blocks.1.attn.qkv", "blocks.2.mlp", "norm", "head"])
@pytest.mark.parametrize("method", ["lnstat", "gradient"])
def test_nothing_is_changed_when_the_model_fails(method, where, error):
    model, x = _lived_in("vit-class"), images(CASES["vit-class"], dtype=torch.float32)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise error("on purpose")

    model.get_submodule(where).register_forward_pre_hook(fail)
    before = fingerprint(model)
    with pytest.raises(error, match="on purpose"):
        METHODS[method](model).attribute(x, targets(2))
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_changed_when_the_explanation_fails(method):
    model, x = _lived_in("vit-class"), images(CASES["vit-class"], dtype=torch.float32)
    before = fingerprint(model)

    def twice(x: Tensor) -> Tensor:
        return model(x) + model(x)

    with pytest.raises(RecordingError, match="exactly one pass"):
        METHODS[method](twice, model).attribute(x, targets(2))
    assert fingerprint(model) == before
    # A target out of range is found after the pass.
    if "ollout" not in method:
        with pytest.raises((IndexError, AssertionError, RuntimeError)):
            METHODS[method](model).attribute(x, 1000)
    assert fingerprint(model) == before


def test_hooks_are_gone_when_they_cannot_all_be_set():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    before = fingerprint(model)
    own = vars(model[1]).pop("_forward_hooks_always_called")
    with pytest.raises(KeyError, match="always_called"), Recorder(model):
        pass
    vars(model[1])["_forward_hooks_always_called"] = own
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit-map", "swin1-shift"])
def test_the_model_runs_exactly_once(name, method):
    model, x = build(name), images(CASES[name])
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))

    def forward(x: Tensor) -> Tensor:
        calls.append(-len(x))
        return model(x)

    METHODS[method](forward, model).attribute(x, targets(2))
    assert calls == [-2, 2]


IDENTICAL = [name for name in FEW if "padded" not in name]
IDENTICAL += ["vit-map", "vit-scale-attn-norm", "swin1-shift-fused", "swin1-resized", "swin2-windows-per-stage"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", IDENTICAL)
def test_the_output_is_bit_identical(name, dtype):
    model, x = build(name, 0, dtype), images(CASES[name], dtype=dtype)
    with torch.no_grad():
        expected = model(x)
    output, recording = record(model, x)
    assert len(recording.sites) > 0
    assert torch.equal(output, expected)
    for specific in (False, True):
        assert torch.equal(run(model, model, x, [1], class_specific=specific).output, expected)
    # With a graph torch itself may take another kernel (a mask that needs a gradient), so the model is asked again;
    # where the recording holds the table of that mask constant, the kernel is the one without a graph.
    kept = run(model, model, x, [1], class_specific=True, differentiable="model")
    assert any(torch.equal(kept.output, one) for one in (expected, model(x.clone().requires_grad_())))


def test_the_output_is_what_forward_func_returns_when_the_graph_is_kept():
    model, x = build("vit-class"), images(CASES["vit-class"]).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x])[0]
    with Recorder(model):
        found = torch.autograd.grad(model(x).sum(), [x])[0]
    assert torch.equal(found, expected)


# Threads.


def test_other_threads_are_not_recorded():
    model, x = build("vit-class"), images(CASES["vit-class"])
    q = torch.randn(1, 2, 3, 4)

    def elsewhere() -> None:
        with torch.no_grad():
            model(x)
            F.scaled_dot_product_attention(q, q, q)
            F.layer_norm(q, (4,))

    with torch.no_grad(), Recorder(model, list(model.blocks)) as recorder:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        model(x)
    recording = recorder.recording
    assert [site.module for site in recording.sites] == [f"blocks.{i}.attn" for i in range(3)]
    assert len(recording.norms) == 7
    assert all(len(calls) == 1 for calls in recording.calls.values())


def test_threads_explain_the_same_model_side_by_side():
    name = "swin1-no-biases"
    model, x = build(name), images(CASES[name], 6)
    methods = [METHODS[m](model) for m in ("lnstat", "gradient", "evidence")]
    before = fingerprint(model)

    def one(i: int) -> Tensor:
        return methods[i % 3].relevance(x[i : i + 1], int(targets(6)[i]))

    expected = [one(i) for i in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, [*range(6)] * 2))
    for got, want in zip(found, expected * 2, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert fingerprint(model) == before


# Tensors that change after they were seen.


@pytest.mark.parametrize("which", ["q", "k", "v", "mask"])
def test_a_changed_tensor_of_fused_attention_is_refused(which):
    q, k, v = _qkv()
    tensors = {"q": q, "k": k, "v": v, "mask": torch.zeros(L, S)}

    def attend() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=tensors["mask"])
        tensors[which].add_(1)

    site = only_site(record(attend)[1])
    with pytest.raises(RecordingError, match="changed in place"):
        whole(site)


@pytest.mark.parametrize("which", ["q", "k", "v", "attn_mask", "key_padding_mask"])
def test_a_changed_tensor_of_multi_head_attention_is_refused(which):
    module = _multi_head(batch_first=True)
    given = {"q": torch.randn(2, 4, 12), "k": torch.randn(2, 5, 12), "v": torch.randn(2, 5, 12)}
    given |= {"attn_mask": torch.zeros(4, 5), "key_padding_mask": torch.zeros(2, 5)}

    def attend() -> None:
        masks = {name: given[name] for name in ("attn_mask", "key_padding_mask")}
        module(given["q"], given["k"], given["v"], **masks)
        given[which].add_(torch.randn_like(given[which]))

    site = only_site(record(attend)[1])
    with pytest.raises(RecordingError, match="changed in place"):
        whole(site)


def test_a_changed_softmax_is_refused():
    def attend(s: Tensor, v: Tensor) -> Tensor:
        a = s.softmax(-1)
        a.mul_(torch.rand_like(a))
        return a @ v

    site = only_site(record(attend, torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 4))[1])
    with pytest.raises(RecordingError, match="changed in place"):
        site.probabilities(EVERYTHING)


def test_a_changed_norm_input_is_refused():
    def forward(x: Tensor) -> Tensor:
        return x.add_(F.layer_norm(x, (4,)))

    _, recording = record(forward, torch.randn(2, 3, 4))
    with pytest.raises(RecordingError, match="changed in place"):
        recording.norms[0].statistics  # noqa: B018


class _InPlaceBlock(nn.Module):
    """A block that adds its updates to the stream in place: what norm1 read is gone afterwards."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


@pytest.mark.parametrize("method", ["lnstat", "rollout", "AttentionRollout"])
def test_a_model_that_works_in_place_is_refused(method):
    model, x = build("vit-class"), images(CASES["vit-class"])
    for i, block in enumerate(model.blocks):
        model.blocks[i] = _InPlaceBlock(block)
    with pytest.raises(RecordingError, match="changed in place"):
        METHODS[method](model).relevance(x, 1)


# Grad modes of the caller.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit-class", "swin2-no-biases"])
def test_the_callers_grad_mode_does_not_matter(name, method, mode):
    model, x = build(name), images(CASES[name])
    explainer = METHODS[method](model)
    target = targets(2)
    expected = explainer.relevance(x, target)
    with mode():
        here = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = explainer.relevance(x.clone(), target)  # made in this mode: an inference tensor in one of them
        attribution = explainer.attribute(x.clone(), target)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == here
    assert torch.equal(found, expected)
    for tensor in (found, attribution):
        assert not tensor.requires_grad
        assert not tensor.is_inference()


def test_the_recorder_gives_back_the_grad_mode_that_its_head_switched():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 3, 4)
    with torch.no_grad():
        with Recorder(model, head_begins=model[1]):
            assert model(x).requires_grad
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("method", ["lnstat", "rollout", "gradient"])
def test_a_target_made_under_inference_mode(method):
    model, x = build("vit-class"), images(CASES["vit-class"])
    explainer = METHODS[method](model)
    with torch.inference_mode():
        predicted = model(x).argmax(1)
        inside = explainer.relevance(x, predicted)
    assert predicted.is_inference()
    expected = explainer.relevance(x, predicted.clone())
    assert torch.equal(inside, expected)
    assert torch.equal(explainer.relevance(x, predicted), expected)


def test_no_grad_inside_forward_func_does_not_matter():
    model, x = build("vit-class"), images(CASES["vit-class"])

    @torch.no_grad()
    def forward(x: Tensor) -> Tensor:
        return model(x)

    expected = LNStatAttribution(model).relevance(x, 1)
    assert torch.equal(LNStatAttribution(forward, model).relevance(x, 1), expected)


@pytest.mark.parametrize(
    ("leave", "reason"),
    [(torch.no_grad, "without no_grad"), (torch.inference_mode, "runs the model under torch.inference_mode")],
)
def test_a_gradient_rule_says_why_there_is_no_gradient(leave, reason):
    model, x = build("vit-class"), images(CASES["vit-class"])

    def forward(x: Tensor) -> Tensor:
        with leave():
            return model(x)

    before = fingerprint(model)
    with pytest.raises(RecordingError, match=reason):
        METHODS["gradient"](forward, model).relevance(x, 1)
    assert fingerprint(model) == before


def test_a_model_made_under_inference_mode_is_refused_in_words():
    with torch.inference_mode():
        model = build("vit-class")
    with pytest.raises(RecordingError, match="inference_mode"):
        LNStatAttribution(model).relevance(images(CASES["vit-class"]), 1)


def test_inference_tensors_can_be_recorded():
    model = build("vit-class")
    with torch.inference_mode(), Recorder(model) as recorder:
        model(images(CASES["vit-class"]))
    assert len(recorder.recording.sites) == 3
    assert recorder.recording.sites[0].probabilities(EVERYTHING).shape == (2, 3, 17, 17)
