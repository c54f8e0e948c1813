"""A video and its map: which frames are drawn, and on what scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from captum_lnstat.visualize import frame_sheet

MEAN, STD = (0.5,) * 3, (0.25,) * 3


def pictures(figure):
    return [axes.images[0].get_array() for axes in figure.axes]


def test_frames_above_their_overlays_on_one_scale():
    video = torch.randn(3, 5, 8, 6, generator=torch.Generator().manual_seed(0)) * 0.2
    attribution = torch.zeros(3, 5, 8, 6)
    attribution[:, 2, 3:5, 2:4] = 4.0
    attribution[:, 4, 0:2, 0:2] = 2.0
    cells = pictures(frame_sheet(video, attribution, MEAN, STD, "title"))
    frames, overlays = cells[:5], cells[5:10]
    assert len(cells) == 11  # and the bar
    for number, frame in enumerate(frames):
        expected = video[:, number].permute(1, 2, 0).numpy() * 0.25 + 0.5
        np.testing.assert_allclose(frame, expected.clip(0, 1), atol=1e-6)
    # A frame with nothing in it is as it was; half as much is half as strong, whatever the frame's own most is.
    np.testing.assert_allclose(overlays[0], frames[0])
    strong, weak = (np.abs(overlays[n] - np.asarray(frames[n])).max(-1) for n in (2, 4))
    assert strong[3, 2] > 0.1
    assert weak[0, 0] > 0.1
    assert not np.allclose(overlays[2][3, 2], overlays[4][0, 0], atol=0.1)
    assert strong[0].max() == 0


def test_some_of_many_frames_the_first_and_the_last_among_them():
    video = torch.arange(20.0).reshape(1, 20, 1, 1).expand(1, 20, 4, 4) / 40
    figure = frame_sheet(video, video, (0.0,), (1.0,), "title", most=4)
    titles = [text.get_text() for text in figure.texts if text.get_text().startswith("frame ")]
    assert titles == ["frame 0", "frame 6", "frame 13", "frame 19"]
    assert [float(cell[0, 0, 0]) for cell in pictures(figure)[:4]] == pytest.approx([0, 6 / 40, 13 / 40, 19 / 40])


def test_signed_maps_are_drawn_as_such():
    video = torch.zeros(3, 2, 4, 4)
    attribution = torch.ones(3, 2, 4, 4)
    attribution[:, 1] = -1
    with pytest.raises(ValueError, match="expected none below zero, or signed=True"):
        frame_sheet(video, attribution, MEAN, STD, "title")
    _, _, against, *_ = pictures(frame_sheet(video, -attribution, MEAN, STD, "title", signed=True))
    assert float(against[0, 0, 2]) > float(against[0, 0, 0])  # blue


@pytest.mark.parametrize(
    ("shape", "other"), [((3, 4, 8, 8), (3, 4, 8, 6)), ((4, 3, 8, 8), (4, 3, 8, 8)), ((1, 3, 4, 8, 8),) * 2]
)
def test_what_is_no_video_with_its_attribution(shape, other):
    with pytest.raises(ValueError, match=r"expected \(3, frame, height, width\)"):
        frame_sheet(torch.zeros(shape), torch.zeros(other), MEAN, STD, "title")
