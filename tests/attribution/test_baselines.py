"""RawAttention and FrozenLayerNorm against small references of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.choices import pairwise
from helpers.contract import untouched
from helpers.models import CASES, FEW, SWINS, VITS, build, explain, float32_model, images, targets
from helpers.oracles import Frozen, assert_same, dense, middle_heavy
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from captum_lnstat import AttentionRollout, FrozenLayerNorm, RawAttention, Recorder, UnsupportedModelError
from captum_lnstat.recording.freezing import FrozenAttention, FrozenGate, FrozenRMSNorm


@pytest.mark.parametrize("name", [*VITS, *SWINS])
def test_raw_attention_is_the_dense_map(name):
    found = explain(RawAttention(build(name)), images(CASES[name]))
    assert_same(found, dense(name).raw_attention(), name)
    assert torch.allclose(found.total, torch.ones(2).double(), atol=1e-9)


@pytest.mark.parametrize(("name", "block", "fusion"), pairwise(FEW, [0, 1, -2, -1], ["max", "min", middle_heavy]))
def test_raw_attention_settings_are_the_dense_map(name, block, fusion):
    found = explain(RawAttention(build(name), block=block, head_fusion=fusion), images(CASES[name]))
    assert_same(found, dense(name).raw_attention(block, fusion), name)


@pytest.mark.parametrize("name", ["vit-class", "swin1-padded-7"])
def test_raw_attention_reads_one_block(name):
    model, x = build(name), images(CASES[name])
    grids = [RawAttention(model, block=block).relevance(x) for block in range(3)]
    grids.append(AttentionRollout(model).relevance(x))
    for i, one in enumerate(grids):
        for other in grids[:i]:
            assert float((one - other).abs().max() / one.max()) > 0.01


def test_raw_attention_of_the_class_token_is_its_row():
    model, x = build("vit-class-explicit"), images(CASES["vit-class-explicit"])
    rows = []
    handle = model.blocks[-1].attn.attn_drop.register_forward_hook(lambda _, inputs, output: rows.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    torch.testing.assert_close(RawAttention(model).relevance(x).flatten(1), rows[0].mean(1)[:, 0, 1:])


@pytest.mark.parametrize("block", [3, -4, 99])
def test_a_block_that_is_not_there(block):
    model, x = build("vit-class"), images(CASES["vit-class"])
    with untouched(model, x), pytest.raises(ValueError, match="3 blocks, -3 to 2"):
        RawAttention(model, block=block).attribute(x)


@pytest.mark.parametrize("block", [None, 1.0, "last", True])
def test_a_block_that_is_no_index(block):
    with pytest.raises(TypeError, match="index of a block"):
        RawAttention(build("vit-class"), block=block)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> bool:
    return float((found - expected).abs().max()) <= rtol * float(expected.abs().max())


@pytest.mark.parametrize("name", [*VITS, *SWINS])
def test_frozen_layer_norm_is_input_times_gradient_of_the_detached_model(name):
    model, x, target = build(name), images(CASES[name]), targets(2)
    reference = Frozen(model, x, target)
    method = FrozenLayerNorm(model)
    with untouched(model, x):
        found = method.attribute(x, target)
    assert close(found, reference.attribution)
    # Exact to first order: what is not on the pixels is what the additive parameters add.
    score = model(x).detach()[torch.arange(2), target]
    assert torch.allclose(found.sum((1, 2, 3)) + sum(reference.added.values()), score, atol=1e-9)
    relevance = explain(method, x, target)
    assert torch.allclose(relevance.total, score, atol=1e-9)
    assert torch.allclose(relevance.constant, sum(reference.added.values()), atol=1e-9)
    assert relevance.grid.shape[1:] == CASES[name].grid


def attention_by_hand(attn: Any, x: Tensor) -> Tensor:
    batch, count, channels = x.shape
    heads = attn.num_heads
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).split(channels, -1)
    q, k, v = (part.reshape(batch, count, heads, -1).transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(-2, -1)) / (channels / heads) ** 0.5
    a = (scores.exp() / scores.exp().sum(-1, keepdim=True)).detach()
    return (a @ v).transpose(1, 2).reshape(batch, count, channels) @ attn.proj.weight.T + attn.proj.bias


def norm_by_hand(norm: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    deviation = (((x - mean) ** 2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return (x - mean) / deviation * norm.weight + norm.bias


def vit_by_hand(model: Any, image: Tensor) -> Tensor:
    """The whole of a tiny ViT, written out, with what is held constant detached where it is computed."""
    size = model.patch_embed.patch_size[0]
    patches = image.unfold(2, size, size).unfold(3, size, size)  # (batch, channel, row, column, y, x)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        x = x + attention_by_hand(block.attn, norm_by_hand(block.norm1, x))
        hidden = norm_by_hand(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        gate = (0.5 * (1 + torch.erf(hidden / 2**0.5))).detach()
        x = x + (hidden * gate) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return norm_by_hand(model.norm, x)[:, 0] @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_layer_norm_of_a_vit_written_by_hand(fused):
    model, x, target = build("vit-class"), images(CASES["vit-class"]), targets(2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    leaf = x.clone().requires_grad_()
    logits = vit_by_hand(model, leaf)
    assert torch.allclose(logits, model(x))
    (slope,) = torch.autograd.grad(logits[torch.arange(2), target].sum(), [leaf])
    method = FrozenLayerNorm(model)
    assert close(method.attribute(x, target), x * slope)
    patches = (x * slope).sum(1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).sum((2, 4))
    assert close(method.relevance(x, target), patches)
    # The frozen parts matter: with them live, the gradient is another one.
    (live,) = torch.autograd.grad(model(leaf)[torch.arange(2), target].sum(), [leaf])
    assert not close(x * live, x * slope, rtol=0.1)


def without_offsets(model: nn.Module) -> nn.Module:
    """Nothing in the model adds a constant."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in Frozen.ADDITIVE:
                parameter.zero_()
    return model


COMPLETE = ["vit-avg-no-class", "vit-layer-scale", "vit-res-post", "vit-map-no-class", "vit-non-square-patch"]
COMPLETE += ["vit-scale-attn-norm", "swin1-padded-7", "swin1-shift-fused", "swin1-odd-grids"]
COMPLETE += ["swin2-padded-4", "swin2-odd-grids", "swin2-shift"]


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_offsets_the_attribution_is_the_score(name, dtype):
    model, x, target = without_offsets(build(name)).to(dtype), images(CASES[name]).to(dtype), targets(2)
    with torch.no_grad():
        score = model(x)[torch.arange(2), target]
    assert float(score.abs().min()) > 0.01
    found = FrozenLayerNorm(model).attribute(x, target).sum((1, 2, 3))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert torch.allclose(found, score, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["vit-class", "vit-map", "swin1-padded-7", "swin1-padded-4-fused", "swin2-odd-grids"])
def test_frozen_values_are_the_models(name):
    model, x = float32_model(name), images(CASES[name], dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
    with Recorder(model, differentiable="affine"):
        found = model(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [GluMlp, SwiGLU])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.Sigmoid, nn.ReLU, nn.Tanh])
def test_gated_mlps(kind, act):
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "num_classes": 5, "class_token": False}
    model = VisionTransformer(32, mlp_layer=kind, act_layer=act, global_pool="avg", **options).double().eval()
    x = images(CASES["vit-class"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)
        score = without_offsets(model)(x)[:, 1]
    assert torch.allclose(FrozenLayerNorm(model).attribute(x, 1).sum((1, 2, 3)), score, rtol=1e-9, atol=1e-12)


ACTIVATIONS = [nn.GELU, nn.SiLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Mish, nn.Tanh]


class Alone(nn.Module):
    """A module inside a model, so that it is frozen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_a_constant_gate(activation):
    model = Alone(activation())
    x = (torch.arange(-200, 201, dtype=torch.float64) / 25).requires_grad_()
    assert bool((x == 0).any())
    with Recorder(model, differentiable="affine"):
        y = model(x)
    assert torch.equal(y, activation()(x))
    (gate,) = torch.autograd.grad(y.sum(), [x])
    assert bool(gate.isfinite().all())
    assert torch.allclose(gate * x, y, atol=1e-15)


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gate_at_zero_is_a_half(activation, dtype):
    x = torch.zeros(3, dtype=dtype, requires_grad=True)
    (gate,) = torch.autograd.grad(FrozenGate.apply(x, activation()).sum(), [x])
    assert torch.equal(gate, torch.full_like(gate, 0.5))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_an_activation_in_place(activation):
    model = Alone(activation(inplace=True))
    x = torch.randn(7, requires_grad=True)
    with Recorder(model, differentiable="affine"):
        passed = x * 1
        y = model(passed)
    assert y is passed
    assert torch.equal(y, activation()(x))
    (gate,) = torch.autograd.grad(y.sum(), [x])
    assert torch.allclose(gate * x, y)


@pytest.mark.parametrize("mask", [None, "bias", "boolean", "causal"])
@pytest.mark.parametrize("groups", [1, 2])
def test_fused_attention_is_a_constant_matrix(mask, groups, monkeypatch):
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", 1)
    monkeypatch.setattr("captum_lnstat.recording.sites.QUERIES", 1)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 3, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(2, 4 // groups, 5, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    upstream = torch.randn(2, 4, 5, 3, generator=rng, dtype=torch.float64)
    bias = torch.randn(2, 1, 5, 5, generator=rng, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.7, "enable_gqa": groups > 1, "is_causal": mask == "causal"}
    given = {"bias": bias, "boolean": (bias > -1) | torch.eye(5).bool()}.get(mask or "")
    q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    output = FrozenAttention.apply(q, k, v, given, options)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, given, **options))
    dq, dk, dv = torch.autograd.grad(output, [q, k, v], upstream, allow_unused=True)
    assert dq is None
    assert dk is None
    scores = 0.7 * q.detach() @ k.detach().repeat_interleave(groups, 1).transpose(-2, -1)
    if mask == "bias":
        scores = scores + bias
    elif mask is not None:
        seen = given if mask == "boolean" else torch.ones(5, 5).tril().bool()
        scores = scores.masked_fill(~seen, -torch.inf)
    (expected,) = torch.autograd.grad(scores.softmax(-1) @ v.repeat_interleave(groups, 1), [v], upstream)
    assert torch.allclose(dv, expected, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_divided_by_a_constant(weighted):
    model = Alone(nn.RMSNorm(6, elementwise_affine=weighted, dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with Recorder(model, differentiable="affine"):
        y = model(x)
    assert torch.equal(y, model(x))
    assert isinstance(y.grad_fn, FrozenRMSNorm._backward_cls)
    upstream = torch.randn_like(y)
    (slope,) = torch.autograd.grad(y, [x], upstream)
    root = ((x**2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt().detach()
    (expected,) = torch.autograd.grad(x / root * (model.inner.weight if weighted else 1), [x], upstream)
    assert torch.allclose(slope, expected)


@pytest.mark.parametrize(
    ("inner", "message"),
    [(nn.GroupNorm(1, 8), "GroupNorm"), (nn.GLU(), "GLU"), (nn.TransformerEncoderLayer(8, 2), "MultiheadAttention")],
)
def test_what_cannot_be_frozen_is_refused(inner, message):
    model = Alone(inner)
    x = torch.randn(2, 8, 8, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match=message), Recorder(model, differentiable="affine"):
        model(x)


def test_what_is_around_the_model_is_differentiated_as_it_is():
    model, x, target = build("vit-class"), images(CASES["vit-class"]), targets(2)
    plain, squashed = FrozenLayerNorm(model), FrozenLayerNorm(lambda x: model(x).sigmoid(), model)
    probability = model(x).detach().sigmoid()[torch.arange(2), target]
    slope = probability * (1 - probability)
    assert close(squashed.attribute(x, target), plain.attribute(x, target) * slope[:, None, None, None])


@pytest.mark.parametrize("squash", [nn.Softmax(-1), nn.Sigmoid()])
def test_probabilities_inside_the_model_are_part_of_the_score(squash):
    model, x, target = build("swin1-shift"), images(CASES["swin1-shift"]), targets(2)
    outside = FrozenLayerNorm(lambda x: squash(model(x)), model).attribute(x, target)
    inside = build("swin1-shift")
    inside.head.fc = nn.Sequential(inside.head.fc, squash)
    assert close(FrozenLayerNorm(inside).attribute(x, target), outside)


@pytest.mark.parametrize("fusion", ["deviation", "variance"])
@pytest.mark.parametrize("baseline", [RawAttention, AttentionRollout])
def test_a_baseline_takes_attention_as_it_is(baseline, fusion):
    with pytest.raises(ValueError, match=f"head_fusion is '{fusion}'; expected one of 'mean', 'max', 'min' or a"):
        baseline(build("vit-class"), head_fusion=fusion)
