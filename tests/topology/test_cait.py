"""CaiT: maps mixed across the heads, and a class token that joins late and asks alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from helpers.models import enliven, rule
from helpers.plain_models import CLASSES, Plain
from helpers.plain_oracle import Oracle, Step
from timm.models.cait import Cait
from torch import Tensor, nn

from captum_lnstat import LayerLNStat, LNStatAttribution, UnsupportedModelError
from captum_lnstat.topology import ClassAttentionTopology, find_topology

RULES = ("rollout", "evidence", "lnstat", "gradient")
TOKENS = 25


def cait(pool: str = "token", **options: Any) -> Cait:
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "depth_token_only": 2}
    return Cait(**{**sizes, "num_classes": CLASSES, "init_values": 1.0, "global_pool": pool, **options})


POOLINGS = {"token": "class token", "avg": "mean of the patches"}
CASES = {
    pool: Plain(pool, lambda pool=pool: cait(pool), (32, 48), (4, 6), (8, 8), 1, name)  # type: ignore[misc]
    for pool, name in POOLINGS.items()
}


@cache
def model_of(pool: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return CASES[pool].build(dtype)


class CaitOracle(Oracle):
    """Matrices of class token and patches, whoever takes part."""

    residual = "deviation"

    def _blocks(self) -> list[Any]:
        return [*self.model.blocks, *self.model.blocks_token_only]

    def _step(self, block: Any) -> Step:
        x, after = self.seen[block]
        attn, between = block.attn, self.seen[block.norm2][0]
        attention = self.seen[attn.attn_drop][1]
        heads = attn.num_heads
        if hasattr(attn, "proj_w"):
            cls = self.model.cls_token.expand(self.batch, -1, -1)
            before, between, after = (torch.cat([cls, t], 1) for t in (x, between, after))
            rows = slice(1, TOKENS)
            values = self._heads(torch.cat([cls, attn.qkv(self.seen[attn][0]).chunk(3, -1)[2]], 1), heads)
        else:
            before = self.seen[block.norm1][0]
            between, after = (torch.cat([t, x], 1) for t in (between, after))
            rows = slice(0, 1)
            values = self._heads(attn.v(self.seen[attn][0]), heads)
        dense = attention.new_zeros(self.batch, heads, TOKENS, TOKENS)
        dense[:, :, rows, TOKENS - attention.shape[-1] :] = attention
        taking_part = torch.zeros(TOKENS, 1).double()
        taking_part[rows] = 1
        out, offset = self._out(block, attn, dense, values)
        out, offset = out * taking_part[..., None], offset * taking_part
        heard = torch.einsum("bhim,bhmd->bihd", dense, values).flatten(2)
        update = torch.einsum("bica,bia->bic", out, heard) + offset
        torch.testing.assert_close(update, between - before, atol=1e-9, rtol=0)
        part = rows if hasattr(attn, "proj_w") else slice(None)
        return Step(dense, values, before, between, after, out, offset, part)

    def _roll(self, r: Tensor, step: Step, m: Tensor) -> Tensor:
        relation = step.relation(m)
        share = step.share() if self.residual == "deviation" else torch.full_like(r, 0.5)
        keep = torch.where(step.attention.ne(0).any(-1).any(1), share, 1.0)  # who takes no part stays
        relation = keep[..., None] * torch.eye(TOKENS).double() + (1 - keep)[..., None] * relation
        torch.testing.assert_close(relation.sum(-1), torch.ones_like(keep))
        return torch.einsum("bi,bij->bj", r, relation)

    def cotangent(self, target: Tensor) -> Tensor:
        leaf = self.seen[self.model.norm][0].detach().requires_grad_()
        norm = self.model.norm
        centred = leaf - leaf.mean(-1, keepdim=True)
        normed = centred / ((centred**2).mean(-1, keepdim=True) + norm.eps).sqrt().detach() * norm.weight + norm.bias
        logits = self.model.forward_head(normed)
        torch.testing.assert_close(logits, self.logits)
        (u,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), leaf)
        return u


@cache
def oracle(pool: str) -> CaitOracle:
    return CaitOracle(CASES[pool], model_of(pool), CASES[pool].images())


@pytest.mark.parametrize("pool", CASES)
def test_recognised(pool):
    assert isinstance(find_topology(model_of(pool)), ClassAttentionTopology)
    found = LNStatAttribution(model_of(pool)).describe(CASES[pool].images())
    assert (found.grid, found.patch, found.prefix_tokens, found.pooling) == ((4, 6), (8, 8), 1, POOLINGS[pool])
    assert [step.shape[2:] for step in found.steps] == [(24, 24), (24, 24), (1, 25), (1, 25)]


def test_the_maps_are_signed():
    """What the oracle is there for: rows that do not sum to one, and negative entries."""
    maps = torch.cat([step.attention.flatten() for step in oracle("token").steps[:2]])
    assert float(maps.min()) < 0
    rows = oracle("token").steps[0].attention[:, :, 1:].sum(-1)
    assert float((rows - 1).abs().min()) > 1e-3


@pytest.mark.parametrize("pool", CASES)
def test_perception_is_the_dense_product(pool):
    found = rule(model_of(pool), "rollout", CASES[pool].images())
    expected = oracle(pool).perception()
    torch.testing.assert_close(found.grid.flatten(1), expected[:, 1:], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.prefix, expected[:, :1], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.total, torch.ones(2).double())


@pytest.mark.parametrize("pool", CASES)
def test_evidence_is_that_of_the_oracle_and_complete(pool):
    target = torch.tensor([1, 3])
    found = rule(model_of(pool), "evidence", CASES[pool].images(), target)
    expected = oracle(pool).evidence(target)
    torch.testing.assert_close(found.grid.flatten(1), expected[:, 1:], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.prefix, expected[:, :1], atol=1e-9, rtol=1e-6)
    score = oracle(pool).logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found.total, score, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["rollout", "evidence"])
@pytest.mark.parametrize("residual", ["half", "deviation"])
def test_what_attention_adds_is_much(kind, residual):
    """In the models above it is so little that hardly anything hangs on where it goes."""
    with torch.random.fork_rng():
        model = enliven(cait(), 0).double()
    x, target = CASES["token"].images(), torch.tensor([1, 3])
    dense = CaitOracle(CASES["token"], model, x)
    dense.residual = residual
    assert float((1 - dense.steps[0].share()[:, 1:]).median()) > 0.1
    found = rule(model, kind, x, target if kind == "evidence" else None, residual=residual)
    expected = dense.evidence(target) if kind == "evidence" else dense.perception()
    torch.testing.assert_close(found.grid.flatten(1), expected[:, 1:], atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found.prefix, expected[:, :1], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("fusion", ["mean", "max", "min", lambda maps: maps.square().mean(1)])
def test_every_rule_in_float32(kind, fusion):
    if kind == "gradient":
        if fusion != "mean":
            return
        fusion = None  # it has a head fusion of its own
    model, x, target = (
        model_of("token", torch.float32),
        CASES["token"].images(3, torch.float32),
        torch.tensor([1, 3, 0]),
    )
    method = LNStatAttribution(model, rule=kind, head_fusion=fusion)
    grid = method.relevance(x, target)
    assert bool(torch.isfinite(grid).all())
    assert float(grid.flatten(1).std(1).min()) > 0
    single = torch.cat([method.relevance(x[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(single, grid, atol=1e-3 * float(grid.abs().max()), rtol=0)
    if kind == "rollout":
        assert float((rule(model, kind, x, head_fusion=fusion).total - 1).abs().max()) < 1e-5
    if kind == "evidence":
        _, delta = method.attribute(x, target, return_convergence_delta=True)
        assert float(delta.abs().max()) < 1e-4


def test_a_subclass_with_another_name_is_recognised():
    class Mine(Cait):
        pass

    model = cait()
    model.__class__ = Mine
    assert isinstance(find_topology(nn.Sequential(nn.Identity(), model)), ClassAttentionTopology)


def test_a_layer_norm_more_is_refused():
    model = cait().eval()
    model.head_drop = nn.LayerNorm(24)
    with pytest.raises(UnsupportedModelError, match="LayerNorms outside the blocks"):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 32, 48), 1)


def test_the_layer_form_before_the_class_token_joins():
    model, x = model_of("token", torch.float32), CASES["token"].images(2, torch.float32)
    patches = LayerLNStat(model, model.blocks[0], rule="rollout").attribute(x, attribute_to_layer_input=True)
    assert patches.shape == (2, 24, patches.shape[2])
    expected = LNStatAttribution(model, rule="rollout").relevance(x)
    torch.testing.assert_close(patches.sum(2), expected.flatten(1))
