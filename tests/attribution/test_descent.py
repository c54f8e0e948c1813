"""Relevance at every block and of every head: against ``LayerLNStat``, the rules, and dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.contract import registers, vit
from timm.models.hiera import Hiera
from torch import Tensor

from captum_lnstat import LayerLNStat, LNStatAttribution, UnsupportedModelError, zoo
from captum_lnstat.attribution.descent import descend, descend_heads

SCENE = zoo.scenes()[264].image


@pytest.fixture(scope="module", params=["swin-mini", "vit-mini"])
def reference(request):
    found = zoo.load(request.param)
    return found.model, found.transform(SCENE)[None]


@pytest.mark.parametrize("rule", ["rollout", "evidence"])
def test_relevance_at_a_block_is_that_of_the_layer_attribution(reference, rule):
    model, inputs = reference
    target = None if rule == "rollout" else 1
    found = descend(model, inputs, target, rule=rule)
    for block in (found[0], found[len(found) // 2], found[-1]):
        layer = LayerLNStat(model, model.get_submodule(block.name), rule=rule)
        tokens = layer.attribute(inputs, target, attribute_to_layer_input=True).sum(-1).flatten()
        patches = tokens[len(tokens) - block.relevance.numel() :]
        torch.testing.assert_close(block.relevance.flatten(), patches, rtol=1e-4, atol=1e-6)


def test_at_the_first_block_it_is_the_map(reference):
    model, inputs = reference
    first = descend(model, inputs, 1, rule="lnstat")[0]
    torch.testing.assert_close(first.relevance, LNStatAttribution(model).relevance(inputs, 1)[0], rtol=1e-4, atol=1e-6)
    assert first.cell == ((4, 4) if first.relevance.shape == (16, 16) else (8, 8))


def test_variances_are_those_of_the_tokens_that_the_norm_reads(reference):
    model, inputs = reference
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0].detach()))
        for name, module in model.named_modules()
        if name.endswith("norm1")
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    for block in descend(model, inputs):
        tokens = seen[f"{block.name}.norm1"].var(-1, correction=0).flatten()
        patches = tokens[len(tokens) - block.variance.numel() :]
        torch.testing.assert_close(block.variance.flatten(), patches, rtol=1e-4, atol=1e-6)
        assert float(block.residual.min()) >= 0
        assert float(block.residual.max()) <= 1


def test_shares_are_those_that_are_described(reference):
    model, inputs = reference
    steps = {step.name: step.residual for step in LNStatAttribution(model).describe(inputs).steps if step.residual}
    for block in descend(model, inputs):
        low, high = steps[block.name][1:]
        assert low - 1e-6 <= float(block.residual.min()) <= float(block.residual.max()) <= high + 1e-6


def test_the_mean_of_the_heads_is_what_the_attention_hands_down(reference):
    """What is kept, and the mean of the heads, make the relevance at the block's tokens."""
    model, inputs = reference
    rolled = {block.name: block for block in descend(model, inputs)}
    for heads in descend_heads(model, inputs):
        block = rolled[heads.name]
        layer = LayerLNStat(model, model.get_submodule(heads.name), rule="rollout", head_fusion="mean")

        def tokens(*given: Any, layer: LayerLNStat = layer, like: Tensor = block.relevance) -> Tensor:
            values = layer.attribute(given[0], None, None, *given[1:]).sum(-1).flatten()
            return values[len(values) - like.numel() :].reshape(like.shape)

        kept = (tokens(inputs, True) - heads.heads.mean(0)) / block.residual
        # The kept part is the relevance after the block, which no head changes: LayerLNStat knows it.
        after = tokens(inputs)
        torch.testing.assert_close(kept, after, rtol=1e-3, atol=1e-6)
        assert float(heads.heads.min()) >= 0


def test_heads_of_a_vit_against_the_dense_product():
    model = vit()
    inputs = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    last = descend_heads(model, inputs)[-1]
    block = model.blocks[-1]
    seen = []
    hook = block.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    model(inputs)
    hook.remove()
    x = seen[0]
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).reshape(1, x.shape[1], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    maps = (qkv[0] @ qkv[1].transpose(-2, -1) * attention.scale).softmax(-1)[0]
    update = attention(block.norm1(x)) - attention.proj(qkv[2].mean(2).flatten(1))
    own, other = ((one - one.mean(-1, keepdim=True)).square().mean(-1)[0, 0] for one in (x - x.mean(1), update))
    share = own / (own + other)
    prefix = model.num_prefix_tokens
    expected = ((1 - share) * maps[:, 0, prefix:]).reshape(last.heads.shape)
    torch.testing.assert_close(last.heads, expected.detach(), rtol=1e-4, atol=1e-6)


def test_prefix_tokens_are_not_on_the_maps():
    inputs = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for block in descend(registers(), inputs):
        assert block.relevance.shape == block.residual.shape == block.variance.shape == (4, 4)


def test_tokens_in_another_order_are_refused():
    model = Hiera(
        img_size=(64, 64), embed_dim=16, stages=(1, 2, 2), mask_unit_size=(4, 4), q_pool=2, head_init_scale=1.0,
        num_classes=3,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.head.fc.weight)
    inputs = torch.rand(1, 3, 64, 64)
    assert torch.isfinite(LNStatAttribution(model, rule="rollout").relevance(inputs)).all()
    for refused in (lambda: descend(model, inputs), lambda: descend_heads(model, inputs)):
        with pytest.raises(UnsupportedModelError, match="not in the order of the image's rows"):
            refused()


def test_one_image_at_a_time_and_a_rule_that_is_read_at_blocks(reference):
    model, inputs = reference
    with pytest.raises(ValueError, match="expected one image"):
        descend(model, inputs.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="rule is 'gradient'"):
        descend(model, inputs, 0, rule="gradient")  # type: ignore[arg-type]
