"""RawAttention and FrozenLayerNorm against small references of their own."""

from __future__ import annotations

import pytest
import torch
from contract_helpers import untouched
from models import CASES, FEW, SWINS, VITS, build, explain, images
from oracles import dense
from test_rules import assert_same, middle_heavy

from captum_lnstat import AttentionRollout, RawAttention


@pytest.mark.parametrize("name", [*VITS, *SWINS])
def test_raw_attention_is_the_dense_map(name):
    found = explain(RawAttention(build(name)), images(CASES[name]))
    assert_same(found, dense(name).raw_attention(), name)
    assert torch.allclose(found.total, torch.ones(2).double(), atol=1e-9)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("block", [0, 1, -2, -1])
@pytest.mark.parametrize("fusion", ["max", "min", middle_heavy])
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
