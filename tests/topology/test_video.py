"""Videos: Video Swin of torchvision, VideoMAE and ViViT of Hugging Face, against dense matrices of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from helpers.models import rule, targets
from helpers.swin_oracle import SwinDense
from helpers.video import (
    PlainVideo,
    TorchvisionVideo,
    Tubelets,
    lively,
    swin_oracle,
    timesformer,
    video_mae,
    video_swin,
    videos,
    vivit,
)
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from captum_lnstat import AttentionRollout, LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.layout import Groups, quads, windows
from captum_lnstat.rules.engine import run
from captum_lnstat.topology.anatomy.volumes import channel_axis

RULES = ("rollout", "evidence", "lnstat", "gradient")


@dataclass(frozen=True)
class Model:
    """A model to build, the videos it is shown, and what is known of it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    grid: tuple[int, int, int]
    patch: tuple[int, int, int]
    post: bool = False


_post = {"block": partial(SwinTransformerBlockV2, attn_layer=ShiftedWindowAttention3d)}
SWINS = {
    "swin": Model(video_swin, (2, 3, 8, 32, 32), (4, 8, 8), (2, 4, 4)),
    # Tubelets, windows and mergings that are padded, along every axis.
    "swin-odd": Model(video_swin, (2, 3, 5, 26, 36), (3, 7, 9), (2, 4, 4)),
    # The windows cover frames and columns, which are not shifted then; rows are.
    "swin-covered": Model(partial(video_swin, window_size=[8, 4, 7]), (2, 3, 8, 36, 20), (4, 9, 5), (2, 4, 4)),
    "swin-frames": Model(partial(video_swin, window_size=[3, 7, 7]), (2, 3, 8, 16, 24), (4, 4, 6), (2, 4, 4)),
    "swin-post-norm": Model(partial(video_swin, **_post), (2, 3, 6, 24, 36), (3, 6, 9), (2, 4, 4), post=True),
}
PLAIN = {
    "video-mae": Model(video_mae, (2, 8, 3, 32, 32), (4, 4, 4), (2, 8, 8)),
    "video-mae-flat": Model(partial(video_mae, image_size=(16, 40)), (2, 8, 3, 16, 40), (4, 2, 5), (2, 8, 8)),
    "vivit": Model(vivit, (2, 8, 3, 32, 32), (4, 2, 4), (2, 16, 8)),
}
DIVIDED = {
    "timesformer": Model(timesformer, (2, 4, 3, 16, 16), (4, 2, 2), (1, 8, 8)),
    "timesformer-3": Model(partial(timesformer, image_size=24, num_frames=3), (2, 3, 3, 24, 24), (3, 3, 3), (1, 8, 8)),
}
MODELS = {**SWINS, **PLAIN, **DIVIDED}
FAMILIES = {**dict.fromkeys(SWINS, "windowed"), **dict.fromkeys(PLAIN, "video")}
NO_CLASS = {*SWINS, "video-mae", "video-mae-flat"}


@cache
def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return lively(MODELS[name].build(), dtype)


def show(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return videos(*MODELS[name].shape, dtype=dtype)


@cache
def swin(name: str) -> SwinDense:
    return swin_oracle(build(name), show(name), MODELS[name].grid, post=MODELS[name].post)


@cache
def plain(name: str) -> PlainVideo:
    grid = MODELS[name].grid
    count = grid[0] * grid[1] * grid[2]
    start = torch.full((count,), 1 / count) if name != "vivit" else torch.eye(1 + count)[0]
    return PlainVideo(build(name), show(name), start.double())


# Against dense matrices.


@pytest.mark.parametrize("name", SWINS)
@pytest.mark.parametrize("kind", ["rollout", "evidence", "gradient"])
def test_rules_on_a_video_swin_are_the_dense_products(name, kind):
    target, dense = targets(2), swin(name)
    with nullcontext() if kind == "gradient" else torch.no_grad():
        options = {"normalize": True} if kind == "gradient" else {}
        expected = getattr(dense, kind)(*(() if kind == "rollout" else (target,)), merging="variance", **options)
    found = rule(build(name), kind, show(name), None if kind == "rollout" else target, merging="variance")
    grid, _ = expected.split(dense.case)
    assert found.grid.shape == (2, *MODELS[name].grid)
    torch.testing.assert_close(found.grid, grid, rtol=0, atol=1e-9 * float(grid.abs().max()))
    torch.testing.assert_close(found.padding, expected.padding, rtol=0, atol=1e-8 * float(grid.abs().max()))
    if kind == "evidence":
        torch.testing.assert_close(found.constant, expected.constant)


@pytest.mark.parametrize("name", SWINS)
def test_the_oracle_of_a_video_swin_has_something_to_see(name):
    found = swin(name).liveliness
    assert found["share spread"] > 0.1
    assert found["highest relative entropy"] < 0.95
    assert found["logit spread"] > 0.3


@pytest.mark.parametrize("name", PLAIN)
def test_rules_on_a_plain_encoder_are_the_dense_products(name):
    target, prefix = targets(2), int(name == "vivit")
    # Hugging Face may take its softmax in float32 in a float64 model too, and the oracle with it.
    for kind, expected in (("rollout", plain(name).perception()), ("evidence", plain(name).evidence(target))):
        found = rule(build(name), kind, show(name), None if kind == "rollout" else target)
        grid = expected[:, prefix:].reshape(found.grid.shape)
        torch.testing.assert_close(found.grid, grid, rtol=0, atol=2e-6 * float(grid.abs().max()))
        torch.testing.assert_close(found.prefix, expected[:, :prefix], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SWINS)
def test_windows_and_mergings_are_those_of_the_modules_as_they_ran(name):
    model, grid = build(name), MODELS[name].grid
    steps = {step.name: step for step in run(model, model, show(name)).trace.steps}
    names = {id(module): dotted for dotted, module in model.named_modules()}
    library = TorchvisionVideo(post=False)
    for module in library.steps(model):
        step = steps.pop(names[id(module)])
        if hasattr(module, "reduction"):
            assert torch.equal(step.below.index, library.merging_ids(module, grid))
            grid = step.grid
        else:
            assert isinstance(step.layout, Groups)
            assert torch.equal(step.layout.index, library.window_ids(module, grid, 1) - 1)
    assert not steps


def test_windows_of_three_axes():
    index = windows((2, 2, 3), (2, 2, 2), (0, 0, 1), pad_first=True).index
    assert index.tolist() == [[1, 2, 4, 5, 7, 8, 10, 11], [-1, 0, -1, 3, -1, 6, -1, 9]]
    assert quads((2, 2, 3)).index.tolist() == [[0, 3, 1, 4], [2, 5, -1, -1], [6, 9, 7, 10], [8, 11, -1, -1]]


# TimeSformer, whose class token stands in every frame.


def _dense_attentions(model: Any, x: Tensor) -> list[Tensor]:
    """The mean over the heads of both attentions of every block, among all tokens, the class token's first."""
    seen = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for name, module in model.named_modules()
        if name.endswith("attn_drop")
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    batch, frames = x.shape[:2]
    places = len(seen[0]) // batch
    tokens = torch.arange(places * frames).reshape(places, frames) + 1  # as the model has them
    found = []
    for number, heads in enumerate(seen):
        maps = heads.mean(1).unflatten(0, (batch, -1))
        dense = torch.zeros(batch, 1 + places * frames, 1 + places * frames, dtype=x.dtype)
        for group in range(maps.shape[1]):
            if number % 2:
                members = torch.cat([torch.zeros(1, dtype=torch.long), tokens[:, group]])
                dense[:, members[1:, None], members] = maps[:, group, 1:]
                dense[:, 0, members] += maps[:, group, 0] / frames
            else:
                dense[:, tokens[group][:, None], tokens[group]] = maps[:, group]
        if number % 2 == 0:
            dense[:, 0, 0] = 1
        found.append(dense)
    return found


@pytest.mark.parametrize("name", DIVIDED)
def test_rollout_on_a_timesformer_is_the_dense_product(name):
    model, x, grid = build(name), show(name), MODELS[name].grid
    row = torch.eye(1 + grid[0] * grid[1] * grid[2]).double()[:1].expand(2, -1)
    for dense in reversed(_dense_attentions(model, x)):
        half = (torch.eye(dense.shape[1]).double() + dense) / 2
        row = torch.einsum("bi,bij->bj", row, half)
    expected = row[:, 1:].reshape(2, grid[1], grid[2], grid[0]).permute(0, 3, 1, 2)
    torch.testing.assert_close(AttentionRollout(model).relevance(x), expected)


@pytest.mark.parametrize("name", DIVIDED)
def test_layers_of_a_timesformer_are_refused(name):
    model = build(name)
    with pytest.raises(UnsupportedModelError, match="attends twice, over time and over space"):
        LayerLNStat(model, model.timesformer.encoder.layer[0]).attribute(show(name), 1)


# What holds for all of them.


@pytest.mark.parametrize("name", MODELS)
def test_recognised(name):
    case = MODELS[name]
    found = LNStatAttribution(build(name)).describe(show(name))
    assert (found.grid, found.patch, found.prefix_tokens) == (case.grid, case.patch, int(name not in NO_CLASS))
    assert found.family == FAMILIES.get(name, "divided space and time")
    assert found.pooling == ("mean of the tokens" if name in NO_CLASS else "class token")
    sizes = " x ".join(map(str, case.grid))
    pixels = f"{case.patch[0]} frames x {case.patch[1]} x {case.patch[2]} px"
    assert f"{sizes} patches of {pixels}" in str(found)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_every_rule_in_float32(name, kind):
    model, x, target = build(name, torch.float32), show(name, torch.float32), targets(2)
    method = LNStatAttribution(model, rule=kind)
    attribution, grid = method.attribute(x, target), method.relevance(x, target)
    assert attribution.shape == x.shape
    assert grid.shape == (2, *MODELS[name].grid)
    assert float(grid.flatten(1).std(1).min()) > 0
    torch.testing.assert_close(attribution.flatten(1).sum(1), grid.flatten(1).sum(1), atol=1e-4, rtol=1e-4)
    single = torch.cat([method.relevance(x[i : i + 1], target[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(single, grid, atol=1e-3 * float(grid.abs().max()), rtol=0)
    total = rule(model, kind, x, target).total
    if kind == "rollout":
        torch.testing.assert_close(total, torch.ones(2), atol=1e-5, rtol=0)
    if kind == "evidence":
        with torch.no_grad():
            logits = model(x)
        score = getattr(logits, "logits", logits).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(total, score, atol=1e-4, rtol=1e-4)


# Where the channels are.


def test_frames_and_channels_may_be_exchanged_around_the_model():
    model, x = build("swin"), show("swin")
    expected = LNStatAttribution(model, rule="evidence").attribute(x, 1)
    turned = LNStatAttribution(lambda v: model(v.transpose(1, 2)), model, rule="evidence")
    assert torch.equal(turned.attribute(x.transpose(1, 2), 1), expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["swin", "video-mae"])
def test_as_many_frames_as_channels(name):
    model = lively(MODELS[name].build()) if name == "swin" else lively(video_mae(num_frames=3, tubelet_size=1))
    x = videos(1, 3, 3, 32, 32)
    found = LNStatAttribution(model, interpolation="nearest").attribute(x, 1)
    # Relevance is spread evenly over the channels, and over nothing else.
    over, along = (1, 2) if name == "swin" else (2, 1)
    assert torch.equal(found.amin(over), found.amax(over))
    assert not torch.equal(found.amin(along), found.amax(along))


def test_where_the_channels_are_is_not_guessed():
    assert channel_axis(torch.zeros(1, 3, 8, 4, 4), torch.zeros(1, 3, 9, 4, 4)) == 1
    same = torch.zeros(1, 3, 3, 4, 4)
    with pytest.raises(UnsupportedModelError, match=r"which axis of videos of shape \(1, 3, 3, 4, 4\) has the frames"):
        channel_axis(same, same)
    with pytest.raises(RecordingError, match="expected as many frames and channels"):
        channel_axis(torch.zeros(1, 4, 8, 4, 4), torch.zeros(1, 3, 8, 4, 4))
    model, x = build("swin"), show("swin")
    with pytest.raises(RecordingError, match="the transformer was given images of shape"):
        LNStatAttribution(lambda v: model(v[:, :, ::2]), model).attribute(x, 1)


# The order of the tokens.


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_tokens_in_any_order_of_the_axes_are_placed(order):
    """The same encoder, its tokens and positions in another order: the map is the same."""
    straight, x = Tubelets(), videos(1, 3, 4, 24, 32)
    lively(straight)
    turned = Tubelets(order).eval()
    turned.load_state_dict(straight.state_dict())
    turned.double()
    with torch.no_grad():
        place = straight.place.reshape(1, 2, 3, 4, 24).permute(0, *(axis + 1 for axis in order), 4)
        turned.place.copy_(place.flatten(1, 3))
    torch.testing.assert_close(turned(x), straight(x))
    expected, found = (rule(model, "evidence", x, targets(1)) for model in (straight, turned))
    torch.testing.assert_close(found.grid, expected.grid)


def test_positions_of_frames_and_places_added_up_are_positions():
    model, x = lively(Tubelets((1, 2, 0))), videos(1, 3, 4, 24, 32)
    with torch.no_grad():
        sums = torch.randn(3, 4, 1, 24).double() + torch.randn(1, 1, 2, 24).double()
    del model.place
    model.place = type("Held", (), {"__radd__": lambda _, tokens: tokens + sums.reshape(1, 24, 24)})()
    place = run(model, model, x).trace.place
    assert place is not None
    assert torch.equal(place, torch.arange(24).reshape(3, 4, 2).permute(2, 0, 1).flatten())


def test_tokens_that_are_not_those_of_the_convolution_are_refused():
    model = lively(Tubelets(bend=True))
    with pytest.raises(UnsupportedModelError, match="not those of the convolution over frames, rows and columns plus"):
        LNStatAttribution(model).attribute(videos(1, 3, 4, 24, 32), 1)


def test_a_norm_that_does_not_run_is_no_part_of_a_block():
    """MONAI's blocks have one for the cross-attention that an encoder does not have."""
    model, x = lively(Tubelets()), videos(1, 3, 4, 24, 32)
    expected = rule(model, "evidence", x, targets(1)).grid
    for layer in model.mix.layers:
        layer.norm_cross = nn.LayerNorm(24)
    assert torch.equal(rule(model, "evidence", x, targets(1)).grid, expected)


# What is refused.


def test_patches_that_do_not_cover_the_video_are_refused():
    model, x = Tubelets(count=4 * 5 * 3).eval(), torch.rand(1, 3, 4, 22, 12)
    model.cut = nn.Conv3d(3, 24, (1, 6, 4), (1, 4, 4))
    assert run(model, model, x).trace.patch == (1, 4, 4)
    model.cut = nn.Conv3d(3, 24, (1, 6, 4), (1, 4, 4), dilation=(1, 1, 2))
    model.place = nn.Parameter(torch.randn(1, 4 * 5 * 2, 24))
    with pytest.raises(
        UnsupportedModelError, match="makes 2 tokens of 12 pixels or frames; expected patches of 4 side"
    ):
        run(model, model, x)


def test_attention_that_is_pooled_is_refused():
    settings = [MSBlockConfig(2, 24, 24, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2])] * 2
    options = {"spatial_size": (32, 32), "temporal_size": 4, "block_setting": settings, "residual_pool": False}
    options |= {"residual_with_cls_embed": False, "rel_pos_embed": False, "proj_after_attn": False, "num_classes": 3}
    with torch.random.fork_rng():
        model = MViT(**options).eval()
    with pytest.raises(UnsupportedModelError, match="expected attention among all tokens of a video"):
        LNStatAttribution(model).describe(torch.randn(1, 3, 4, 32, 32))


@pytest.mark.parametrize("kind", ["joint_space_time", "space_only"])
def test_frames_that_are_cut_one_by_one_are_refused(kind):
    model = timesformer(attention_type=kind)
    with pytest.raises(ValueError, match="the convolution that cuts the patches is one of images"):
        LNStatAttribution(model).describe(torch.randn(1, 4, 3, 16, 16))
