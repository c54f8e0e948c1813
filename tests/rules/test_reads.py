"""Scores that read the image elsewhere than at the end of the residual stream: earlier, or by another path."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contract import images, swin, vit
from helpers.oracles import out_of_focus
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError
from captum_lnstat.doctor import examine

Pipeline = Callable[[Tensor], Tensor]


def _probe(width: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, 3)


def _head_of_blocks(model: nn.Module, places: tuple[int, ...], norm: bool) -> Pipeline:
    """The sum of a Linear for the class token of each of some blocks, as linear probes of DINOv2 have."""
    probes = [_probe(32, place) for place in places]

    def scores(x: Tensor) -> Tensor:
        found = model.forward_intermediates(
            x, indices=list(places), norm=norm, return_prefix_tokens=True, intermediates_only=True
        )
        return sum(
            probe(prefix[:, 0] + patches.mean((2, 3))) for probe, (patches, prefix) in zip(probes, found, strict=True)
        )

    return scores


def _cut(model: nn.Module, blocks: int) -> nn.Module:
    """The first blocks of a ViT, with its own norm at their end."""
    cut = copy.deepcopy(model)
    cut.blocks = cut.blocks[:blocks]
    return cut


@pytest.mark.parametrize("norm", [True, False])
def test_evidence_of_several_blocks_is_the_sum_of_that_of_models_cut_there(norm: bool) -> None:
    model, x, places = vit(), images(2), (0, 1, 2)
    found = LNStatAttribution(_head_of_blocks(model, places, norm), model, rule="evidence").relevance(x, target=1)
    expected = torch.zeros_like(found)
    for place in places:
        alone = _cut(model, place + 1)
        pipeline = _head_of_blocks(alone, (place,), norm)
        expected += LNStatAttribution(pipeline, alone, rule="evidence").relevance(x, target=1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def _two_scales(model: nn.Module, weights: tuple[float, float]) -> Pipeline:
    probes = [_probe(width, width) for width in (model.num_features // 2, model.num_features)]

    def scores(x: Tensor) -> Tensor:
        found = model.forward_intermediates(x, norm=False, intermediates_only=True)
        return sum(w * probe(f.mean((2, 3))) for w, probe, f in zip(weights, probes, found, strict=True))

    return scores


def test_evidence_of_two_stages_of_a_swin_is_linear_in_them_and_complete() -> None:
    model, x = swin(), images(2)
    both = LNStatAttribution(_two_scales(model, (1.0, 1.0)), model, rule="evidence")
    _, delta = both.attribute(x, target=2, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4
    parts = [
        LNStatAttribution(_two_scales(model, weights), model, rule="evidence").relevance(x, target=2)
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]
    assert all(float(part.abs().max()) > 0 for part in parts)
    assert torch.allclose(both.relevance(x, target=2), sum(parts), rtol=1e-4, atol=1e-5)
    # The first stage alone, in a model that has no more of it.
    first = copy.deepcopy(model)
    first.layers = first.layers[:1]
    first.norm = nn.Identity()
    probe = _probe(model.num_features // 2, model.num_features // 2)
    alone = LNStatAttribution(lambda x: probe(first.forward_features(x).mean((1, 2))), first, rule="evidence")
    assert torch.allclose(alone.relevance(x, target=2), parts[0], rtol=1e-4, atol=1e-5)


def test_a_stage_below_the_last_alone() -> None:
    model, x = swin(), images(1)
    pipeline = _two_scales(model, (1.0, 0.0))
    evidence = LNStatAttribution(pipeline, model, rule="evidence").relevance(x, target=0)
    assert float(evidence.max()) > 0
    expected = torch.stack([out_of_focus(one) for one in evidence]).clamp(min=0)
    torch.testing.assert_close(LNStatAttribution(pipeline, model).relevance(x, target=0), expected)


def test_many_targets_one_by_one_and_batches() -> None:
    model, x = vit(), images(3)
    method = LNStatAttribution(_head_of_blocks(model, (0, 2), True), model, rule="evidence")
    together = method.relevance_per_target(x, [0, 1, 2])
    for target in range(3):
        one_by_one = torch.cat([method.relevance(image[None], target=target) for image in x])
        assert torch.allclose(together[target], one_by_one, rtol=1e-4, atol=1e-5)


def test_the_layer_form_puts_the_rest_into_the_constant() -> None:
    """At a block, what is read above it, as of models cut there; what is read below it is no part of the tokens."""
    model, x, places = vit(), images(1), (0, 2)
    pipeline = _head_of_blocks(model, places, True)
    for number, layer in enumerate(model.blocks):
        found = LayerLNStat(pipeline, layer, model=model, rule="evidence").attribute(x, target=1)
        expected = torch.zeros_like(found)
        for place in places:
            if place >= number:
                alone = _cut(model, place + 1)
                one = LayerLNStat(
                    _head_of_blocks(alone, (place,), True), alone.blocks[number], model=alone, rule="evidence"
                )
                expected += one.attribute(x, target=1)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


class _Beside(nn.Module):
    """A ViT, and a small network that reads the image by itself, before or after it, inside or outside of it."""

    def __init__(self, place: str, weight: float) -> None:
        super().__init__()
        self.vit, self.place, self.weight = vit(), place, weight
        torch.manual_seed(0)
        self.other = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "skip":
            return self.vit(x) + self.weight * self.head(x.mean((2, 3)).repeat(1, 3)[:, :8])
        if self.place == "before":
            seen = self.other(x)
            return self.vit(x) + self.weight * self.head(seen)
        return self.vit(x) + self.weight * self.head(self.other(x))


@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout"])
@pytest.mark.parametrize("place", ["before", "after", "skip"])
def test_another_path_is_said_and_the_map_is_that_of_the_transformer(place: str, rule: str) -> None:
    model, x = _Beside(place, 1.0), images(2)
    with pytest.warns(UserWarning, match="by another path than the residual stream") as said:
        found = LNStatAttribution(model, rule=rule).relevance(x, target=1)
    assert torch.allclose(found, LNStatAttribution(model.vit, rule=rule).relevance(x, target=1), atol=1e-5)
    assert "the image" in str(said[0].message)


def test_the_share_of_another_path_grows_with_it() -> None:
    x, shares = images(1), []
    for weight in (0.1, 1.0, 10.0):
        model = _Beside("skip", weight)
        model.head.bias.data.zero_()
        with pytest.warns(UserWarning, match="to first order") as said:
            LNStatAttribution(model, rule="evidence").relevance(x, target=1)
        shares.append(int(re.search(r"(\d+)%", str(said[0].message)).group(1)))
    assert shares[0] < shares[1] < shares[2]


class _Scores(nn.Module):
    """Scores of a ViT, and behind them those that a small network has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = _Beside("after", 1.0)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.beside.vit(x)
        return torch.cat([scores, scores + self.beside.head(self.beside.other(x))], 1)


@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout"])
def test_what_is_returned_beside_the_score_is_no_part_of_it(rule: str) -> None:
    model, x = _Scores(), images(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LNStatAttribution(model, rule=rule).relevance(x, target=1)
    assert torch.equal(found, LNStatAttribution(model.beside.vit, rule=rule).relevance(x, target=1))
    with pytest.warns(UserWarning, match="of it, to first order"):
        LNStatAttribution(model, rule=rule).relevance(x, target=6)


def test_one_of_several_targets_is_enough_to_say_it() -> None:
    with pytest.warns(UserWarning, match="by another path than the residual stream"):
        LNStatAttribution(_Scores(), rule="evidence").relevance_per_target(images(1), [1, 6])


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
def test_checkpointing_of_the_whole_model_changes_nothing_or_is_refused(rule: str) -> None:
    model, x = vit(), images(1)
    own, again = (
        LNStatAttribution(partial(checkpoint, model, use_reentrant=re_entrant), model=model, rule=rule)
        for re_entrant in (False, True)
    )
    assert torch.equal(own.relevance(x, target=1), LNStatAttribution(model, rule=rule).relevance(x, target=1))
    with pytest.raises(RecordingError, match="re-entrant checkpointing"):
        again.relevance(x, target=1)


def test_checkpointing_of_its_blocks_changes_nothing() -> None:
    model, x = vit(), images(1)
    expected = LNStatAttribution(model, rule="evidence").relevance(x, target=1)
    model.set_grad_checkpointing()
    assert torch.equal(LNStatAttribution(model, rule="evidence").relevance(x, target=1), expected)


def test_the_doctor_says_it_too() -> None:
    assert "another path" in str(examine(_Beside("after", 1.0), (32, 32)))
    assert "another path" not in str(examine(vit(), (32, 32)))


def test_a_class_agnostic_rule_says_where_it_does_not_begin() -> None:
    model = vit()
    with pytest.warns(UserWarning, match=r"blocks\.0, too; a class-agnostic rule begins at its end alone"):
        LNStatAttribution(_head_of_blocks(model, (0, 2), False), model, rule="rollout").relevance(images(1))


@pytest.mark.parametrize("rule", ["gradient"])
@pytest.mark.parametrize("build", [lambda: _Beside("after", 1.0), lambda: _Several()])
def test_rules_with_the_whole_graph_say_it(rule: str, build: Callable[[], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="besides the end of the residual stream"):
        LNStatAttribution(build(), rule=rule).relevance(images(1), target=1)


class _Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()
        self.scores = _head_of_blocks(self.vit, (0, 2), True)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


@pytest.mark.parametrize("build", [vit, swin])
@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout", "gradient"])
def test_nothing_is_said_of_a_model_that_reads_its_end(rule: str, build: Callable[[], nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LNStatAttribution(build(), rule=rule).relevance(images(1), target=1)


def _collecting(model: nn.Module) -> tuple[Pipeline, list[Any]]:
    """A probe on what a hook of the user's, older than any of ours, sees a block return."""
    seen: list[Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    probe = _probe(32)

    def scores(x: Tensor) -> Tensor:
        seen.clear()
        model(x)
        return probe(seen[-1].mean(1))

    return scores, [handle]


def test_features_that_a_hook_collects() -> None:
    model, x = vit(), images(2)
    pipeline, (handle,) = _collecting(model)
    found = [LNStatAttribution(pipeline, model, rule="evidence").relevance(x, target=1) for _ in range(2)]
    handle.remove()
    cut, probe = _cut(model, 2), _probe(32)
    cut.norm = nn.Identity()
    expected = LNStatAttribution(lambda x: probe(cut.forward_features(x).mean(1)), cut, rule="evidence")
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], expected.relevance(x, target=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.mlp", "patch_embed"])
def test_a_hook_that_looks_on_is_not_spoken_of_and_may_leave_torch(place: str) -> None:
    model, seen = vit(), list[Any]()
    alone = LNStatAttribution(model).relevance(images(2), 1)
    model.get_submodule(place).register_forward_hook(lambda module, given, output: seen.append(output.numpy()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(LNStatAttribution(model).relevance(images(2), 1), alone)
    assert len(seen) == 1


class _FromInside(nn.Module):
    """A ViT, and a Linear of what one of its modules was given or returned inside a block, in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.vit, self.found = vit(), list[Tensor]()
        self.probe, self.place = _probe(32), self.vit.get_submodule("blocks.1.mlp")
        if way == "hook":
            self.place.register_forward_hook(lambda module, given, output: self.found.append(output))
        elif way == "made in a hook":
            self.place.register_forward_hook(lambda module, given, output: self.found.append(2 * output.clone()))
        elif way == "given":
            self.place.register_forward_hook(lambda module, given, output: self.found.append(given[0]))
        elif way == "attribute":
            forward = self.place.forward
            self.place.forward = lambda x: self.found.append(forward(x)) or self.found[-1]  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.found.clear()
        scores = self.vit(x)
        return scores[:, :3] + self.probe(self.found[0].mean(1))


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
@pytest.mark.parametrize("way", ["hook", "made in a hook", "given", "attribute"])
def test_what_is_taken_from_inside_a_block_is_said_with_its_share(way: str, rule: str) -> None:
    model, x = _FromInside(way).eval(), images(2)
    with pytest.warns(UserWarning, match=r"reads the inside of blocks\.1(\.\w+)? .* about \d+% of it") as said:
        found = LNStatAttribution(model, model.vit, rule=rule).relevance(x, target=1)
    # The share by hand: |slope . value| of what was taken, and of the class token that the norm and the head read.
    end: list[Tensor] = []
    model.vit.blocks[-1].register_forward_hook(lambda module, given, output: end.append(output[:, 0].detach()))
    with torch.no_grad():
        model(x)
        token, norm = end[0].double(), model.vit.norm
        deviation = (token.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        normed = (token - token.mean(-1, keepdim=True)) / deviation * norm.weight
        ended = (normed @ model.vit.head.weight[1].double()).abs().mean()
        taken = (model.found[0].mean(1) @ model.probe.weight[1]).abs().mean()
    (percent,) = re.findall(r"about (\d+)%", str(said[0].message))
    assert int(percent) == pytest.approx(100 * float(taken / (taken + ended)), abs=1)
    assert torch.allclose(found, LNStatAttribution(model.vit, rule=rule).relevance(x, target=1), atol=1e-6)


def test_several_things_from_inside_one_module_are_all_counted() -> None:
    model, x = vit(), images(2)
    maps: list[Tensor] = []
    model.blocks[1].mlp.register_forward_hook(lambda module, given, output: maps.extend([given[0], output]))
    probe = _probe(32)

    def scores(x: Tensor) -> Tensor:
        maps.clear()
        first = model(x)[:, :3]
        return first + probe(maps[0].mean(1)) + probe(maps[1].mean(1))

    with pytest.warns(UserWarning, match=r"the inside of blocks\.1\S*, the inside of blocks\.1\S*"):
        LNStatAttribution(scores, model).relevance(x, target=1)


def test_a_table_that_blocks_share_with_the_head_is_not_taken_from_inside() -> None:
    model, x = vit(), images(2)
    model.register_buffer("table", torch.rand(32))
    for block in model.blocks:
        forward = block.mlp.forward
        block.mlp.forward = lambda x, forward=forward: forward(x) + model.table.to(x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LNStatAttribution(lambda x: model(x) + model.table.to(x.dtype).sum(), model).relevance(x, target=1)


def test_what_is_taken_from_inside_may_leave_torch_after_the_model() -> None:
    model, x, seen = vit(), images(2), list[Tensor]()
    model.blocks[1].mlp.register_forward_hook(lambda module, given, output: seen.append(output))
    logged: list[Any] = []

    def scores(x: Tensor) -> Tensor:
        scores = model(x)
        logged.extend([seen[-1].mean(1).numpy(), np.asarray(seen[-1])])
        return scores

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LNStatAttribution(scores, model).relevance(x, target=1)
        assert torch.equal(found, LNStatAttribution(model).relevance(x, target=1))
    assert np.array_equal(logged[0], logged[1].mean(1)) or np.allclose(logged[0], logged[1].mean(1), atol=1e-6)


def test_a_hook_that_changes_what_the_last_block_returns_is_part_of_the_model() -> None:
    model, x = vit(), images(1)
    plain = LNStatAttribution(model).relevance(x, target=1)
    handle = model.blocks[-1].register_forward_hook(lambda module, inputs, output: output * 1.0)
    assert torch.equal(LNStatAttribution(model).relevance(x, target=1), plain)
    handle.remove()


@pytest.mark.parametrize("caller", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_grad_mode_and_the_hooks_stay_as_they_are(caller: Callable[[], Any]) -> None:
    model, x = vit(), images(1)
    pipeline = _head_of_blocks(model, (0, 2), True)
    with caller():
        before = torch.is_grad_enabled()
        LNStatAttribution(pipeline, model).relevance(x, target=1)
        assert torch.is_grad_enabled() == before
        with pytest.raises(ZeroDivisionError):
            LNStatAttribution(lambda x: pipeline(x) / 0 if 1 / 0 else x, model).relevance(x, target=1)
        assert torch.is_grad_enabled() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("norm", [True, False])
def test_blocks_that_never_ran_are_no_part_of_the_model(norm: bool) -> None:
    model, x, probe = vit(), images(2), _probe(32)

    def early(x: Tensor) -> Tensor:
        (seen,) = model.forward_intermediates(x, indices=[1], norm=norm, stop_early=True, intermediates_only=True)
        return probe(seen.mean((2, 3)))

    cut = _cut(model, 2)
    cut.norm = cut.norm if norm else nn.Identity()
    whole = LNStatAttribution(lambda x: probe(cut.forward_features(x)[:, 1:].mean(1)), cut)
    assert torch.allclose(
        LNStatAttribution(early, model).relevance(x, target=1), whole.relevance(x, target=1), atol=1e-6
    )


def test_stages_of_a_swin_that_never_ran_are_no_part_of_it() -> None:
    model, x = swin(), images(1)
    probe = _probe(model.num_features // 2)

    def early(x: Tensor) -> Tensor:
        (seen,) = model.forward_intermediates(x, indices=[0], stop_early=True, norm=False, intermediates_only=True)
        return probe(seen.mean((2, 3)))

    attribution, delta = LNStatAttribution(early, model, rule="evidence").attribute(
        x, target=1, return_convergence_delta=True
    )
    assert float(attribution.abs().max()) > 0
    assert float(delta.abs().max()) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout"])
def test_a_head_under_checkpoint_is_refused_in_words(rule: str, reentrant: bool) -> None:
    """Its norms are frozen as it is recorded, and would not be as it is run again."""
    model = vit()
    head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))

    def pipeline(x: Tensor) -> Tensor:
        return checkpoint(lambda t: head(t).mean(1), model.forward_features(x), use_reentrant=reentrant)

    with pytest.raises(RecordingError, match=r"runs under torch\.utils\.checkpoint, which runs it again"):
        LNStatAttribution(pipeline, model, rule=rule).relevance(images(1), target=1)
