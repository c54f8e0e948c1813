"""How the head reads the tokens is read off what ran: poolings of one's own, those without a start, and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.contract import lively, vit
from helpers.models import explain
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from captum_lnstat import (
    AttentionRollout,
    GenericAttention,
    LayerLNStat,
    LNStatAttribution,
    RawAttention,
    RecordingError,
    UnsupportedModelError,
)
from captum_lnstat.recording.fusion import fuse
from captum_lnstat.rules.engine import run
from captum_lnstat.testing.family import check_family
from captum_lnstat.topology import PlainTopology, register_topology
from captum_lnstat.topology import base as registry
from captum_lnstat.trace.pooling import FixedPooling

SCORED = ("lnstat", "evidence", "gradient")
PATCHES = 16


class Probe(nn.Module):
    """A pooling and a head of the user's on ``forward_features`` of a timm ViT, that is set to its class token."""

    def __init__(self, pool: Callable[[Tensor], Tensor], width: int = 32, **options: Any) -> None:
        super().__init__()
        self.backbone = vit(num_classes=0, **options)
        self.pool, self.head = pool, nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.pool(self.backbone.forward_features(images)))
        return scores


class Queries(nn.Module):
    """Latent queries that attend to the patches; the first is the image's, as in CoCa."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, count, 32))
        self.attend = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        queries, patches = self.queries.expand(len(tokens), -1, -1), tokens[:, 1:]
        pooled: Tensor = self.attend(queries, patches, patches, need_weights=False)[0]
        return pooled[:, 0]


def gem(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)


def largest(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].amax(1)


def class_and_mean(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def swin(pool: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
    return lively(SwinTransformer(window_size=4, num_classes=5, global_pool=pool, **options))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# Poolings with a start.

SEEN = {
    "class token": (lambda t: t[:, 0], 32, [1.0] + [0.0] * PATCHES),
    "mean of the patches": (lambda t: t[:, 1:].mean(1), 32, [0.0] + [1 / PATCHES] * PATCHES),
    "mean of the tokens": (lambda t: t.mean(1), 32, [1 / 17] * 17),
    "class token and mean of the patches": (class_and_mean, 64, [0.5] + [0.5 / PATCHES] * PATCHES),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_the_head_reads_counts_and_not_what_the_model_is_set_to(name: str) -> None:
    pool, width, start = SEEN[name]
    model = lively(Probe(pool, width))
    assert LNStatAttribution(model).describe(images()).pooling == name
    torch.testing.assert_close(run(model, model, images()).trace.start("mean"), torch.tensor(start).expand(2, -1))


@pytest.mark.parametrize(("setting", "pool"), [("avg", SEEN["mean of the patches"][0]), ("token", lambda t: t[:, 0])])
def test_every_rule_is_that_of_the_model_that_is_set_so(setting: str, pool: Any) -> None:
    """timm's own head on the same tokens, and the user's, are one function."""
    probe = lively(Probe(pool))
    own = vit(global_pool=setting, fc_norm=False)
    head = {"head.weight": probe.head.weight, "head.bias": probe.head.bias}
    own.load_state_dict({**probe.backbone.state_dict(), **head})
    for rule in (*SCORED, "rollout"):
        found, expected = (LNStatAttribution(m, rule=rule).relevance(images(), 1) for m in (probe, own))
        torch.testing.assert_close(found, expected, msg=rule)


def test_of_several_queries_those_count_that_are_read() -> None:
    """The map of the one that is read, not the mean over those of all."""
    several, one = lively(Probe(Queries(4))).double(), lively(Probe(Queries(1))).double()
    state = several.state_dict()
    one.load_state_dict(state | {"pool.queries": state["pool.queries"][:, :1]})
    for rule in ("rollout", "gradient", "lnstat"):
        found, expected = (LNStatAttribution(m, rule=rule).relevance(images().double(), 1) for m in (several, one))
        torch.testing.assert_close(found, expected, msg=rule)


# Poolings without one.

OWN = {
    "max": lambda: lively(Probe(largest)),
    "GeM": lambda: lively(Probe(gem)),
    "flat": lambda: lively(Probe(lambda t: t.flatten(1), 32 * 17)),
    "weighted softmax": lambda: lively(Probe(lambda t: (t.mean(-1, keepdim=True).softmax(1) * t).sum(1))),
    "timm max": lambda: vit(global_pool="max"),
    "timm avgmax": lambda: vit(global_pool="avgmax", class_token=False),
    "Swin max": lambda: swin("max"),
    "Swin avgmax": lambda: swin("avgmax"),
}


@pytest.mark.parametrize("name", OWN)
def test_one_score_is_explained_where_no_start_is_the_same_for_every_class(name: str) -> None:
    model, x = OWN[name](), images(3)
    scores = model(x)[:, 1].detach()
    _, delta = LNStatAttribution(model, rule="evidence").attribute(x, target=1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4 * max(1, float(scores.abs().max()))
    for rule in SCORED:
        method = LNStatAttribution(model, rule=rule)
        together = method.relevance(x, 1)
        assert bool(together.flatten(1).any(1).all())
        alone = torch.cat([method.relevance(image[None], 1) for image in x])
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))
        with torch.no_grad():
            assert torch.equal(method.relevance(x, 1), together)


@pytest.mark.parametrize("name", OWN)
def test_a_rollout_says_what_it_lacks_and_which_rules_do_not(name: str) -> None:
    model = OWN[name]()
    for method in (LNStatAttribution(model, rule="rollout"), AttentionRollout(model), RawAttention(model)):
        with pytest.raises(UnsupportedModelError, match="'lnstat', 'evidence' and 'gradient' explain one score"):
            method.attribute(images())
    assert "head: each patch in its own way" in str(LNStatAttribution(model).describe(images()))


def test_the_gradient_rule_starts_where_the_score_is_read() -> None:
    """Of a maximum: the share of the head's weights, channel by channel, that each token wins."""
    model: Any = lively(Probe(largest))
    for block in model.backbone.blocks:  # attention that adds nothing leaves relevance where it starts
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    with torch.no_grad():
        winners = model.backbone.forward_features(images())[:, 1:].argmax(1)
    won = torch.zeros(2, PATCHES, 32).scatter(1, winners[:, None], model.head.weight[1].detach().expand(2, 1, -1))
    expected = won.norm(dim=-1) / won.norm(dim=-1).sum(1, keepdim=True)
    found = GenericAttention(model).relevance(images(), 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


PLANTED = {
    "max": lambda: vit(global_pool="max", img_size=(32, 48)),
    "avgmax": lambda: vit(global_pool="avgmax", img_size=(32, 48)),
    "class and mean": lambda: Probe(class_and_mean, 64, img_size=(32, 48)),
    "deep prompts": lambda: Prompted(img_size=(32, 48)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_map_lies_where_the_stimulus_is(name: str) -> None:
    model = PLANTED[name]()
    rules = (*SCORED, "rollout") if name not in ("max", "avgmax") else SCORED
    report = check_family(model, (32, 48), rules=rules)
    assert all(report.placement[rule].hits == report.placement[rule].regions for rule in ("lnstat", "evidence"))


@pytest.mark.parametrize("name", ["max", "timm avgmax", "GeM"])
def test_half_precision(name: str) -> None:
    model = OWN[name]()
    exact = LNStatAttribution(model, rule="evidence").relevance(images(), 1)
    half = LNStatAttribution(model.bfloat16(), rule="evidence").relevance(images(), 1)
    assert float(torch.corrcoef(torch.stack([exact.flatten(), half.flatten().float()]))[0, 1]) > 0.9


@pytest.mark.parametrize("name", ["max", "Swin max"])
def test_images_that_are_not_finite_and_train_mode(name: str) -> None:
    model, x = OWN[name](), images()
    with pytest.warns(UserWarning, match="train mode"):
        assert LNStatAttribution(model.train()).attribute(x, target=1).isfinite().all()
    x[1, 0, 3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        LNStatAttribution(model.eval()).attribute(x, target=1)


def test_a_topology_that_says_what_is_read_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", list(registry._FAMILIES))

    @register_topology
    class ClassTokenOnly(PlainTopology):
        def trace(self, recording: Any, image_size: tuple[int, int]) -> Any:
            trace = super().trace(recording, image_size)
            weights = torch.zeros(trace.tokens.shape[1])
            weights[0] = 1.0
            return replace(trace, pooling=FixedPooling("class token", weights))

    model = vit(global_pool="avg")
    for rule in (*SCORED, "rollout"):
        with pytest.raises(RecordingError, match="reads token 1, but pooling was recognised as 'class token'"):
            LNStatAttribution(model, rule=rule).attribute(images(), target=1)


# Prompts.


class Prompted(nn.Module):
    """Visual prompt tuning: prompts behind the class token, or before it, once or anew for every block."""

    def __init__(self, deep: bool = True, how: str = "expand", first: bool = False, **options: Any) -> None:
        super().__init__()
        self.vit: Any = vit(**options)
        self.prompts = nn.Parameter(torch.randn(3, 4, 32))
        self.deep, self.how, self.first = deep, how, first

    def join(self, tokens: Tensor, layer: int, present: int) -> Tensor:
        prompts = self.prompts[layer : layer + 1]
        prompts = prompts.repeat(len(tokens), 1, 1) if self.how == "repeat" else prompts.expand(len(tokens), -1, -1)
        if self.how == "from the image":
            prompts = prompts + tokens[:, -4:]
        if self.first:
            return torch.cat([prompts, tokens[:, present:]], 1)
        return torch.cat([tokens[:, :1], prompts, tokens[:, 1 + present :]], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.join(self.vit._pos_embed(self.vit.patch_embed(images)), 0, 0)
        for layer, block in enumerate(self.vit.blocks):
            tokens = self.join(tokens, layer, 4) if layer and self.deep else tokens
            tokens = block(tokens)
        tokens = self.vit.norm(tokens)
        return self.vit.head(tokens[:, 4 if self.first else 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", ["expand", "repeat"])
@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_prefix_tokens(deep: bool, how: str, first: bool) -> None:
    model: Any = lively(Prompted(deep, how, first))
    description = LNStatAttribution(model, model.vit).describe(images())
    assert (description.grid, description.prefix_tokens) == ((4, 4), 5)
    assert description.pooling == ("prefix tokens 4" if first else "class token")
    assert ("new before blocks.1, blocks.2" in description.covers) == deep
    for rule in (*SCORED, "rollout"):
        method = LNStatAttribution(model, model.vit, rule=rule)
        alone = torch.cat([method.relevance(image[None], 1) for image in images()])
        torch.testing.assert_close(method.relevance(images(), 1), alone, rtol=1e-3, atol=1e-6)
    found = explain(LNStatAttribution(model, model.vit, rule="rollout"), images())
    torch.testing.assert_close(found.total, torch.ones(2))
    assert bool((found.padding > 1e-4).all()) == deep  # what was looked at of prompts that came from nowhere
    evidence = LNStatAttribution(model, model.vit, rule="evidence")
    _, delta = evidence.attribute(images(), target=1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4
    for block in model.vit.blocks:
        layer = LayerLNStat(model, block, model.vit, rule="evidence")
        assert layer.attribute(images(), target=1).shape == (2, 21, 32)


def test_relevance_of_new_prompts_is_dropped_before_the_block_that_they_join() -> None:
    model: Any = lively(Prompted())
    found = explain(AttentionRollout(model, model.vit), images())
    row, dropped = torch.zeros(2, 1, 21), torch.zeros(2)
    row[..., 0] = 1
    for block in reversed(run(model, model.vit, images()).trace.blocks):
        row = (row + row @ fuse(block.site, "mean")) / 2
        if block.name != "blocks.0":
            dropped = dropped + row[:, 0, 1:5].sum(1)
            row[..., 1:5] = 0
    torch.testing.assert_close(found.grid.flatten(1), row[:, 0, 5:])
    torch.testing.assert_close(found.padding, dropped)


def test_tokens_made_from_the_image_between_the_blocks_are_refused() -> None:
    model: Any = lively(Prompted(how="from the image"))
    for rule in (*SCORED, "rollout"):
        with pytest.raises(RecordingError, match="does not read what the step before it returned"):
            LNStatAttribution(model, model.vit, rule=rule).attribute(images(1), target=1)
