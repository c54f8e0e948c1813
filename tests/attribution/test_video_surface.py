"""Captum's surface on videos: where the map lies, what wraps it, and what is said of videos that do not fit."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from helpers.models import rule, targets
from helpers.oracles import out_of_focus
from helpers.video import FramesFirst, Moment, VideoScenes, lively, timesformer, video_mae, video_swin, videos

from captum_lnstat import (
    AttentionRollout,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LNStatAttribution,
    UnsupportedModelError,
    explain,
    patch_feature_mask,
)
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.doctor import examine
from captum_lnstat.errors import SourceError
from captum_lnstat.rules.engine import run
from captum_lnstat.rules.evidence import Part, evidence
from captum_lnstat.rules.relevance import Settings
from captum_lnstat.rules.walk import walk
from captum_lnstat.testing.planting import plant

SHAPES = {"swin": (2, 3, 8, 32, 24), "mae": (2, 8, 3, 32, 32)}


def build(name, dtype=torch.float32):
    return lively(video_swin() if name == "swin" else video_mae(), dtype)


def scores(model):
    return lambda x: getattr(output := model(x), "logits", output)


# Where it lies.


@pytest.mark.parametrize("name", ["swin", "mae", "timesformer"])
def test_a_stimulus_is_found_in_its_frames_and_at_its_place(name):
    """A model that was trained to tell whether the stimulus is there, wherever and whenever that is."""
    model, patch = {
        "swin": (video_swin(), (2, 4, 4)),
        "mae": (FramesFirst(video_mae(image_size=16, num_frames=6)), (2, 8, 8)),
        "timesformer": (FramesFirst(timesformer(num_frames=6)), (1, 8, 8)),
    }[name]
    size = (6, 16, 16)
    scenes = VideoScenes(size, (2, 8, 8), patch, 3, 0, torch.float32)
    moments = [Moment(y, x, 8, 8, first, 2) for first, y, x in itertools.product((0, 2, 4), (0, 8), (0, 8))]
    with torch.random.fork_rng():
        planted = plant(model, scenes, moments, steps=300)
    videos = scenes.blank(len(moments))
    without = videos.clone()
    for video, moment in zip(videos, moments, strict=True):
        moment.cut(video).copy_(scenes.stimulus)
    with torch.no_grad():
        assert float((planted.readout(videos) - planted.readout(without)).min()) > 0.5, planted
    for kind in ("lnstat", "evidence"):
        method = LNStatAttribution(planted.readout, rule=kind)
        grids, pixels = method.relevance(videos), method.attribute(videos).sum(1)
        for moment, grid, one in zip(moments, grids, pixels, strict=True):
            peak = [int(at) for at in torch.unravel_index(grid.argmax(), grid.shape)]
            assert moment.holds_token(peak, patch), (kind, moment, peak)
            frame, y, x = (int(at) for at in torch.unravel_index(one.argmax(), one.shape))
            assert moment.first <= frame < moment.first + 2
            assert moment.holds(y, x)


def test_the_default_map_of_one_grid_is_smoothed_frame_by_frame():
    model, x, settings = build("mae", torch.float64), videos(*SHAPES["mae"]), Settings()
    outcome = run(model, model, x, [targets(2)], class_specific=True)
    with torch.no_grad():
        # What the upper one of the two blocks says.
        (raw,) = walk(outcome.trace, settings, evidence(outcome.trace, outcome.head, settings, Part(1, True)))[0]
    expected = torch.stack([torch.stack([out_of_focus(frame) for frame in video]) for video in raw.grid])
    found = LNStatAttribution(model).relevance(x, targets(2))
    torch.testing.assert_close(found, expected.clamp(min=0))


def test_relevance_is_spread_evenly_over_the_frames_of_a_token():
    grid = torch.zeros(1, 3, 2, 2)
    grid[0, 1, 0, 1] = 8.0
    pixels = to_pixels(grid, (5, 4, 4), (2, 2, 2), "nearest")
    assert pixels.shape == (1, 5, 4, 4)
    assert torch.equal(pixels[0].sum((1, 2)), torch.tensor([0.0, 0.0, 4.0, 4.0, 0.0]))
    assert torch.equal(pixels[0, 2], torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2 + [[0.0] * 4] * 2))
    smooth = to_pixels(grid, (5, 4, 4), (2, 2, 2))
    torch.testing.assert_close(smooth[0].sum((1, 2)), torch.tensor([0.0, 0.0, 4.0, 4.0, 0.0]))
    # The last token of a padded video keeps all of its relevance in the frames that exist.
    last = to_pixels(grid.flip(1).roll(1, 1), (5, 4, 4), (2, 2, 2), "nearest")
    assert torch.equal(last[0].sum((1, 2)), torch.tensor([0.0, 0.0, 0.0, 0.0, 8.0]))


# What wraps it.


@pytest.mark.parametrize("name", SHAPES)
def test_captum_wraps_it(name):
    forward, x = scores(model := build(name)), videos(*SHAPES[name], dtype=torch.float32)
    method = LNStatAttribution(forward, model)
    attribution = method.attribute(x, target=1)
    with torch.random.fork_rng():
        noisy = NoiseTunnel(method).attribute(x, nt_samples=2, stdevs=1e-6, target=1)
        torch.testing.assert_close(noisy, attribution, atol=1e-3 * float(attribution.max()), rtol=0)

        def perturb(inputs):
            noise = torch.randn_like(inputs) * 0.01
            return noise, inputs - noise

        assert infidelity(forward, perturb, x, attribution, target=1).shape == (2,)
        changes = sensitivity_max(method.attribute, x, perturb_radius=1e-5, target=1, n_perturb_samples=2)
    assert float(changes.max()) < 0.05
    (in_tuple,) = method.attribute((x,), target=1, internal_batch_size=1)
    torch.testing.assert_close(in_tuple, attribution, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [AttentionRollout, GenericAttention, FrozenLayerNorm])
def test_baselines(name, kind):
    model, x = build(name), videos(*SHAPES[name], dtype=torch.float32)
    method = kind(model)
    attribution, grid = method.attribute(x, target=1), method.relevance(x, target=1)
    assert attribution.shape == x.shape
    assert grid.dim() == 4
    torch.testing.assert_close(attribution.flatten(1).sum(1), grid.flatten(1).sum(1), atol=1e-4, rtol=1e-4)


def test_frozen_layer_norm_sums_the_pixels_of_every_token():
    model, x = build("swin"), videos(1, 3, 5, 30, 24, dtype=torch.float32)
    method = FrozenLayerNorm(model)
    grid, pixels = method.relevance(x, 1), method.attribute(x, 1).sum(1)
    assert grid.shape == (1, 3, 8, 6)
    torch.testing.assert_close(grid[0, 2, 7, 3], pixels[0, 4:, 28:, 12:16].sum(), atol=1e-6, rtol=1e-4)


def test_layers_and_many_targets():
    model, x = build("swin"), videos(*SHAPES["swin"], dtype=torch.float32)
    block = LayerLNStat(model, model.features[0][0], rule="evidence").attribute(x, 1, attribute_to_layer_input=True)
    assert block.shape == (2, 4, 8, 6, 16)
    expected = rule(model, "evidence", x, 1, merging="variance").grid
    torch.testing.assert_close(block.sum(-1), expected, atol=1e-5, rtol=1e-4)
    every = LNStatAttribution(model).relevance_per_target(x, range(3))
    torch.testing.assert_close(every[1], LNStatAttribution(model).relevance(x, 1), atol=1e-5, rtol=1e-3)


# What does not fit.


def test_videos_that_do_not_fit_are_refused_in_words():
    swin, mae = (LNStatAttribution(build(name)) for name in SHAPES)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\); expected videos, \(batch, channels, frames, height"):
        swin.attribute(torch.zeros(1, 3, 32, 32), 1)
    with pytest.raises(ValueError, match=r"are videos of shape \(1, 4, 8, 32, 32\); the model takes 3 channels"):
        swin.attribute(torch.zeros(1, 4, 8, 32, 32), 1)
    with pytest.raises(ValueError, match=r"shape \(1, 16, 3, 32, 32\); the model takes videos of 8 frames"):
        mae.attribute(torch.zeros(1, 16, 3, 32, 32), 1)
    with pytest.raises(
        ValueError, match=r"shape \(3, 32, 32\); expected \(batch, channels, height, width\), of videos"
    ):
        mae.attribute(torch.zeros(3, 32, 32), 1)


def test_what_is_for_images_only_says_so():
    model = build("swin")
    with pytest.raises(SourceError, match="SwinTransformer3d takes videos; expected a model of images"):
        explain(model, torch.zeros(3, 32, 32))
    with pytest.raises(UnsupportedModelError, match="takes videos; a mask of patches is made for images only"):
        patch_feature_mask(model, 32)


@pytest.mark.parametrize(
    ("build", "shape"),
    [(video_swin, (1, 3, 8, 32, 24)), (video_mae, (1, 8, 3, 32, 32)), (timesformer, (1, 4, 3, 16, 16))],
)
def test_a_video_that_is_the_same_everywhere(build, shape):
    """Its tokens do not show their order, which is that of the family then."""
    model, x = lively(build(), torch.float64), torch.full(shape, 0.5).double()
    _, delta = LNStatAttribution(model, rule="evidence").attribute(x, 1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-9


@pytest.mark.parametrize(("name", "grid"), [("swin", (8, 8, 6)), ("mae", (4, 4, 4))])
def test_a_model_of_videos_is_examined_with_a_video(name, grid):
    examined = examine(build(name), SHAPES[name][-2:])
    assert examined.refusal is None
    assert examined.description.grid == grid
    assert json.dumps(examined.to_dict())
