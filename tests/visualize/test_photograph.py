"""The photograph of a sheet, with a frame around what the model saw."""

import numpy as np
import pytest
from PIL import Image

from captum_lnstat.visualize import framed


def test_a_frame_is_around_what_the_model_saw():
    photo = Image.new("RGB", (300, 200), (200, 30, 30))
    drawn = framed(photo, (50.0, 0.0, 250.0, 200.0), (224, 224))
    assert drawn.shape == (200, 300, 3)
    np.testing.assert_allclose(drawn[100, 150], np.array([200, 30, 30]) / 255)
    assert drawn[100, 20].min() > 0.5  # pale
    assert drawn[100, 50].max() == 0
    assert drawn[100, 51].min() == 1
    assert drawn[100, 249].max() == 0
    # Beside square pictures a high one gets borders, so that it does not make its row higher; a large one gets smaller.
    assert framed(photo.rotate(90, expand=True), (0.0, 50.0, 200.0, 250.0), (224, 224)).shape == (300, 300, 3)
    assert framed(photo.resize((3000, 2000)), (500.0, 0.0, 2500.0, 2000.0), (224, 224)).shape == (480, 720, 3)
    assert framed(photo, (0.4, 0.0, 299.6, 200.0), (224, 224)) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_frame_is_around_what_the_model_saw_of_a_strip(turned):
    strip, box = Image.new("RGB", (8000, 50), (200, 30, 30)), (3978.0, 3.0, 4022.0, 47.0)
    if turned:
        strip, box = strip.rotate(90, expand=True), (3.0, 3978.0, 47.0, 4022.0)
    drawn = framed(strip, box, (224, 224))
    drawn = drawn[:, (drawn.shape[1] - 16) // 2 :][:, :16].transpose(1, 0, 2) if turned else drawn
    assert drawn.shape == (16, 732, 3)
    np.testing.assert_allclose(drawn[7, 366], np.array([200, 30, 30]) / 255)  # what the model saw
    assert drawn[7, 20].min() > 0.5  # pale
    assert drawn[1, 366].max() == 0  # the frame, above it
