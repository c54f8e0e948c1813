"""The map of a windowed model lies where the stimulus is that its score depends on: corners and window borders too."""

from __future__ import annotations

from typing import Any

import pytest
from test_convolved import GlobalContextVit
from test_swin import SwinTransformerV2Cr, _hugging_face, _swin_s3, _torchvision
from torch import nn

from captum_lnstat.testing.family import check_family, check_layout, check_placement, ground, planted_images, wake
from captum_lnstat.testing.placement import PEAKS
from captum_lnstat.topology.anatomy.parts import find_parts

THREE: dict[str, Any] = {"depths": [2, 2, 2], "num_heads": [2, 4, 4]}
SMALL: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 4, 4), "mlp_ratio": 2.0}


# Grids 12 x 20, 6 x 10 and 3 x 5: windows are shifted, padded, and in the last stage larger than the grid.
@pytest.mark.parametrize(
    ("build", "size", "output"),
    [
        (lambda: _torchvision(1, window_size=[5, 3], **THREE), (48, 80), None),
        (lambda: _hugging_face(1, attn_implementation="sdpa"), (32, 48), "logits"),
        (lambda: _swin_s3(img_size=(48, 80), window_size=(4, 5, 3)), (48, 80), None),
    ],
    ids=["torchvision-1", "hf-1", "timm-s3"],
)
def test_the_kit_is_passed(build, size, output):
    report = check_family(build().eval(), size, output=output, rules=PEAKS)  # the other rules are in test_swin.py
    assert report.description.family == "windowed"
    assert report.placement["lnstat"].hits >= 15


def _quiet(model: nn.Module) -> nn.Module:
    """The kit gives a norm of zeros a gain of one half: updates that do not drown the stream they are added to."""
    for block in model.modules():
        parts = find_parts(block)
        for name in () if parts is None else parts.norms[:2]:
            nn.init.zeros_(block.get_submodule(name).weight)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "size", "output"),
    [
        (lambda: _torchvision(2, **THREE), (80, 48), None),
        (lambda: _hugging_face(2, window_size=3, **THREE), (48, 80), "logits"),
        (lambda: SwinTransformerV2Cr(img_size=(48, 80), window_size=4, extra_norm_stage=True, **SMALL), (48, 80), None),
    ],
    ids=["torchvision-2", "hf-2", "timm-cr"],
)
def test_post_norm_blocks(build, size, output):
    model = _quiet(build())
    woken = wake(model)
    place = ground(woken, size, output=output)
    assert check_layout(woken, *planted_images(place), place.regions) == 6
    placement, _ = check_placement(woken, place, output=output, rules=("lnstat", "evidence"), required=())
    # Each update is as long as the stream's tokens, so a neighbour may hold more of the stimulus than its own token.
    assert sum(placement[rule].hits for rule in ("lnstat", "evidence")) >= 27
    assert all(placement[rule].hits >= 12 for rule in ("lnstat", "evidence"))


def test_behind_convolutions():
    """Evidence knows the tokens of the last stage only; the product with what the model looked at is sharper."""
    model = GlobalContextVit(img_size=(64, 128), window_size=None, window_ratio=16, **SMALL)
    woken = wake(model.eval())
    placement, _ = check_placement(woken, ground(woken, (64, 128)), rules=("lnstat",), required=("lnstat",))
    assert placement["lnstat"].hits == 15
