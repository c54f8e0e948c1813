"""Relevance at a block: against dense matrices, complete at every block, in Captum's layer convention."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from captum.attr import GradientAttribution, LayerActivation, LayerAttribution, NoiseTunnel
from captum.concept import TCAV, Classifier, Concept
from captum.metrics import sensitivity_max
from helpers.contract import MODELS, CountCalls, images, registers, swin, swin_v2, untouched, vit
from helpers.models import CASES, FEW, OPTIONS, build, targets
from helpers.models import images as case_images
from helpers.oracles import Dense, DenseMerging, dense, out_of_focus
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_lnstat import LayerLNStat, LNStatAttribution
from captum_lnstat.attribution.layer import explain_layer

RULES = ("lnstat", "evidence", "rollout")


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Found by name, not by the package."""
    if hasattr(model, "layers"):
        return {f"layers.{i}.blocks.{j}": b for i, s in enumerate(model.layers) for j, b in enumerate(s.blocks)}
    return {f"blocks.{i}": block for i, block in enumerate(model.blocks)}


def above(oracle: Dense, name: str, into: bool) -> tuple[Dense, Tensor]:
    """The oracle of the steps above, and the tokens where they begin."""
    index = next(i for i, step in enumerate(oracle.steps) if getattr(step, "name", None) == name)
    short, block = copy.copy(oracle), oracle.steps[index]
    short.steps = oracle.steps[index if into else index + 1 :]
    if short.steps and isinstance(short.steps[0], DenseMerging):
        short.steps[0] = dataclasses.replace(short.steps[0])
        short.steps[0].before = short.steps[0].x
    return short, block.before if into else block.before + block.update + block.mlp


def halved(grid: tuple[int, int], times: int) -> tuple[int, int]:
    return grid if not times else halved((-(-grid[0] // 2), -(-grid[1] // 2)), times - 1)


def expected(case: Any, oracle: Dense, name: str, into: bool, target: Tensor) -> dict[str, Tensor]:
    """Relevance of every rule."""
    short, tokens = above(oracle, name, into)
    start, end = oracle.start("mean"), oracle.cotangent(target)[0]
    looked = short.rollout().tokens if short.steps else start
    argued = short.evidence(target).tokens if short.steps else (end * tokens).sum(-1)
    found = torch.zeros_like(argued)
    merged, merged_above = (sum(isinstance(step, DenseMerging) for step in one.steps) for one in (oracle, short))
    grid = halved(case.grid, merged - merged_above)
    # Of one grid, what the upper third of the model contributed.
    skipped = len(oracle.blocks) - len(short.blocks)
    since = 0 if merged_above else max(0, 2 * len(oracle.blocks) // 3 - skipped)
    counted = short.evidence(target, since=since, prefix=case.prefix).tokens if since else argued
    for i in range(len(argued)):
        e = counted[i, case.prefix :].reshape(grid)
        found[i, case.prefix :] = out_of_focus(e).flatten().clamp(min=0)
    return {"lnstat": found, "evidence": argued, "rollout": looked}


@pytest.mark.filterwarnings("ignore:every patch token is zero")
@pytest.mark.parametrize("name", FEW)
def test_against_dense_matrices(name: str) -> None:
    case, oracle, model = CASES[name], dense(name), build(name)
    target, options = targets(2), {k: v for k, v in OPTIONS.items() if k != "normalized"}
    for block_name, block in named_blocks(model).items():
        for into in (True, False):
            by_hand = expected(case, oracle, block_name, into, target)
            assert set(by_hand) == set(RULES)
            for rule in RULES:
                layer = LayerLNStat(model, block, rule=rule, **options)
                found = layer.attribute(case_images(case), target=target, attribute_to_layer_input=into)
                torch.testing.assert_close(found.sum(-1).flatten(1), by_hand[rule], rtol=1e-6, atol=1e-9)


# The contrast is another score at the head: below it the way is the same for both.
@pytest.mark.parametrize(
    ("name", "contrastive"),
    [(name, name in FEW) for name in CASES if CASES[name].affine],
)
def test_evidence_is_complete_at_every_block(name: str, contrastive: bool) -> None:
    case, model = CASES[name], build(name)
    image, target = case_images(case), targets(2)
    logits = model(image).detach()
    score = logits.gather(1, target[:, None])[:, 0]
    if contrastive:
        others = logits.scatter(1, target[:, None], -torch.inf).softmax(1)
        score = score - (others * logits).sum(1)
    blocks = named_blocks(model)
    layer = LayerLNStat(model, None, rule="evidence", contrastive=contrastive)
    constants = []
    for layer.layer in blocks.values():
        for into in (True, False):
            relevance, *_ = explain_layer(layer, image, target, None, into)
            tokens = layer.attribute(image, target, attribute_to_layer_input=into).flatten(1).sum(1)
            torch.testing.assert_close(tokens + relevance.padding + relevance.constant, score, rtol=1e-8, atol=1e-8)
            constants.append(relevance.constant)
    if "no-biases" not in name:
        # Every block above adds its biases to what no token holds.
        assert not torch.allclose(constants[0], constants[-1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_input_of_the_first_block_is_the_patch_grid(name: str, rule: str) -> None:
    model, image = MODELS[name](), images(2)
    layer = LayerLNStat(model, next(iter(named_blocks(model).values())), rule=rule)
    found = layer.attribute(image, 1, attribute_to_layer_input=True).sum(-1).flatten(1)
    grid = LNStatAttribution(model, rule=rule).relevance(image, target=1).flatten(1)
    torch.testing.assert_close(found[:, -grid.shape[1] :], grid, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:every patch token is zero")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_shape_is_that_of_the_activation(name: str, rule: str) -> None:
    model, image = MODELS[name](), images(2)
    for block in named_blocks(model).values():
        layer = LayerLNStat(model, block, rule=rule)
        for into in (False, True):
            activation = LayerActivation(model, block).attribute(image, attribute_to_layer_input=into)
            with untouched(model, image):
                found = layer.attribute(image, 1, None, into)
            assert found.shape == activation.shape
            assert found.is_contiguous()
            assert not found.requires_grad
            assert torch.equal(found, found[..., :1].expand_as(found))
            last = block is list(named_blocks(model).values())[-1]
            behind_all = rule == "lnstat" and last and not into and "swin" not in name
            assert bool(found.any()) is not behind_all


def test_input_and_output_are_told_apart() -> None:
    model, image = swin(), images(2)
    first, second = model.layers[0].blocks
    layer = LayerLNStat(model, first)
    output = layer.attribute(image, target=1)
    assert not torch.allclose(output, layer.attribute(image, target=1, attribute_to_layer_input=True))
    again = LayerLNStat(model, second).attribute(image, target=1, attribute_to_layer_input=True)
    torch.testing.assert_close(output, again, rtol=1e-4, atol=1e-6)


def test_rollout_is_conserved_and_needs_no_target() -> None:
    model, image = registers(), images(2)
    for block in model.blocks:
        found = LayerLNStat(model, block, rule="rollout").attribute(image)
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))
    # After the last block the head reads the class token alone.
    assert torch.equal(found.sum(-1) != 0, (torch.arange(21) == 0).expand(2, -1))
    assert LayerLNStat(model, model.blocks[0], rule="rollout").attribute(image)[:, :5].sum(-1).min() > 0


def test_prefix_tokens() -> None:
    model, image = registers(), images(2)
    assert LayerLNStat(model, model.blocks[0]).attribute(image, target=1)[:, :5].abs().max() == 0
    evidence = LayerLNStat(model, model.blocks[0], rule="evidence").attribute(image, target=1)
    assert (evidence[:, :5, 0] != 0).all()


def test_zero_behind_the_last_block_says_so() -> None:
    model, image = vit(), images(2)
    layer = LayerLNStat(model, model.blocks[2])
    with pytest.warns(UserWarning, match=r"zero at the output of 'blocks\.2'.*rule='evidence'") as caught:
        assert not layer.attribute(image, target=1).any()
    assert caught[0].filename == __file__
    assert layer.attribute(image, target=1, attribute_to_layer_input=True).any()
    pooled = vit(global_pool="avg")
    assert LayerLNStat(pooled, pooled.blocks[2]).attribute(image, target=1).any()


@pytest.mark.parametrize("make", [vit, swin, swin_v2])
def test_reassigned_layer(make: Any) -> None:
    model, image = make(), images(2)
    blocks = list(named_blocks(model).values())
    layer = LayerLNStat(model, blocks[0])
    layer.attribute(image, target=1)
    layer.layer = blocks[-2]
    assert torch.equal(layer.attribute(image, target=1), LayerLNStat(model, blocks[-2]).attribute(image, target=1))


def test_what_is_not_a_block() -> None:
    model = vit()
    for wrong in (model.blocks[0].attn, vit().blocks[0], model.blocks, model, None, "blocks.0"):
        with pytest.raises(ValueError, match=r"not a block of VisionTransformer; .*: blocks\.0, blocks\.1, blocks\.2$"):
            LayerLNStat(model, wrong).attribute(images(1), target=1)
    model = swin()
    with pytest.raises(ValueError, match=r"layer is a PatchMerging.*: layers\.0\.blocks\.0, .*, layers\.1\.blocks\.1$"):
        LayerLNStat(model, model.layers[1].downsample).attribute(images(1), target=1)
    with pytest.raises(ValueError, match="rule is 'gradient'"):
        LayerLNStat(model, model.layers[0].blocks[0], rule="gradient")


def test_captums_classes_and_names() -> None:
    model = vit()
    layer = LayerLNStat(model, model.blocks[1])
    assert isinstance(layer, LayerAttribution)
    assert isinstance(layer, GradientAttribution)
    assert layer.forward_func is model
    assert layer.layer is model.blocks[1]
    assert callable(layer.gradient_func)
    assert layer.get_name() == "Layer LN Stat"
    assert layer.multiplies_by_inputs is True
    assert layer.has_convergence_delta() is False
    with pytest.raises(NotImplementedError):
        layer.attribute_future()
    with pytest.raises(NotImplementedError):
        layer.compute_convergence_delta()
    assert hasattr(LayerLNStat.attribute, "__wrapped__")


def test_tuples_and_targets() -> None:
    model, image = vit(), images(2)
    layer = LayerLNStat(model, model.blocks[1])
    found = layer.attribute(image, target=torch.tensor([1, 3]))
    mirrored = layer.attribute((image,), target=[1, 3])
    assert isinstance(mirrored, tuple)
    assert len(mirrored) == 1
    assert torch.equal(mirrored[0], found)
    torch.testing.assert_close(found[1:], layer.attribute(image[1:], target=3), rtol=1e-3, atol=1e-6)
    with pytest.raises(AssertionError, match="Target not provided"):
        layer.attribute(image)
    with pytest.raises(IndexError):
        layer.attribute(image, target=9)


def test_callers_modes_and_dtypes() -> None:
    model, image = swin(), images(2)
    layer = LayerLNStat(model, model.layers[1].blocks[0])
    found = layer.attribute(image, target=1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = layer.attribute(image, target=1)
        assert torch.equal(again, found)
        assert not again.is_inference()
    half = LayerLNStat(copy.deepcopy(model).bfloat16(), None)
    half.layer = half.forward_func.layers[1].blocks[0]
    assert half.attribute(image.bfloat16(), target=1).dtype == torch.bfloat16
    assert half.attribute(image, target=1).dtype == torch.float32
    double = layer.attribute(image.double(), target=1)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), found)


def test_forward_functions() -> None:
    model, image = swin(), images(2)
    block = model.layers[0].blocks[1]
    found = LayerLNStat(model, block).attribute(image, target=1)
    counted = CountCalls(model)
    for forward, given in ((lambda x: model(x), model), (nn.DataParallel(model), None), (counted, None)):
        assert torch.equal(LayerLNStat(forward, block, given).attribute(image, target=1), found)
    assert counted.count == 1
    layer = LayerLNStat(model, block, rule="evidence")
    once = layer.attribute(image, target=1)
    layer.forward_func = lambda x, scale: scale * model(x)
    twice = layer.attribute(image, target=1, additional_forward_args=2.0)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-4, atol=1e-6)
    copied = copy.deepcopy(LayerLNStat(model, block))
    assert torch.equal(copied.attribute(image, target=1), found)


def test_interpolate_with_the_channels_first() -> None:
    model, image = swin(), images(2)
    found = LayerLNStat(model, model.layers[1].blocks[1]).attribute(image, target=1)
    pixels = LayerAttribution.interpolate(found.permute(0, 3, 1, 2), (32, 32))
    assert pixels.shape == (2, 48, 32, 32)
    assert torch.equal(pixels[:, 0, 8:16, 24:32], found[:, 1, 3, 0, None, None].expand(2, 8, 8))


def test_noise_tunnel_and_sensitivity() -> None:
    model, image = vit(), images(2)
    layer = LayerLNStat(model, model.blocks[1])
    found = layer.attribute(image, target=1)
    smooth = NoiseTunnel(layer).attribute(image, nt_samples=3, stdevs=1e-6, target=1)
    torch.testing.assert_close(smooth, found, rtol=1e-2, atol=1e-4)
    assert (
        NoiseTunnel(layer).attribute(image, nt_samples=3, target=1, attribute_to_layer_input=True).shape == found.shape
    )
    assert sensitivity_max(layer.attribute, image, n_perturb_samples=3, target=1).shape == (2,)


class MeanDifference(Classifier):
    """The direction from one concept's mean activation to the other's; Captum's own classifier needs scikit-learn."""

    def __init__(self) -> None:
        self.direction = torch.empty(0)

    def train_and_eval(self, dataloader: Any, **kwargs: Any) -> dict[str, Any]:
        batches = [(x.flatten(1), y) for x, y in dataloader]
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        means = torch.stack([x[y == label].mean(0) for label in (0, 1)])
        self.direction = means[0] - means[1]
        return {"accs": torch.tensor(1.0)}

    def weights(self) -> Tensor:
        return torch.stack([self.direction, -self.direction])

    def classes(self) -> list[int]:
        return [0, 1]


def test_tcav(tmp_path: Any) -> None:
    model, image = vit(), images(2)
    concepts = [Concept(i, str(i), DataLoader(list(images(8, seed=5 + i) + i), batch_size=4)) for i in range(2)]
    method = LayerLNStat(model, None, rule="evidence")
    names = ["blocks.0", "blocks.1"]
    tcav = TCAV(model, names, classifier=MeanDifference(), layer_attr_method=method, save_path=str(tmp_path))
    scores = next(iter(tcav.interpret(image, [concepts], target=1).values()))
    assert set(scores) == set(names)
    for index, name in enumerate(names):
        with torch.no_grad():
            means = [
                LayerActivation(model, model.blocks[index]).attribute(images(8, seed=5 + i) + i).mean(0).flatten()
                for i in range(2)
            ]
        found = LayerLNStat(model, model.blocks[index], rule="evidence").attribute(image, target=1)
        along = found.flatten(1) @ (means[0] - means[1])
        torch.testing.assert_close(scores[name]["sign_count"][0], (along > 0).float().mean())
        torch.testing.assert_close(scores[name]["magnitude"][0], along.mean(), rtol=1e-3, atol=1e-5)
    assert method.layer in (model.blocks[0], model.blocks[1])
