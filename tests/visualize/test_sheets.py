"""Sheets of methods, blocks, heads and classes: what is drawn where, on which scale, and that the sheet says so."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from captum_lnstat import LNStatAttribution, zoo
from captum_lnstat.attribution.descent import BlockRelevance, HeadRelevance, descend
from captum_lnstat.attribution.methods import scores_of
from captum_lnstat.visualize import (
    METHODS,
    ComparedImage,
    Method,
    Row,
    Scale,
    class_sheet,
    compare_sheet,
    draw_rows,
    head_sheet,
    layer_sheet,
    overlay,
    to_map,
)
from captum_lnstat.visualize.canvas import DIFFER, DIFFERS
from captum_lnstat.visualize.colors import DIVERGING, SEQUENTIAL, STATISTIC
from captum_lnstat.visualize.layers import span

GREY = np.full((20, 30, 3), 0.5)
RAMP = np.linspace(0, 1, 600).reshape(20, 30)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_text()]


def pictures(figure: Figure) -> list[np.ndarray]:
    """The cells in reading order; the bars, which are one pixel wide or high, are left out."""
    arrays = [axes.images[0].get_array() for axes in figure.axes]
    return [np.asarray(array) for array in arrays if min(array.shape[:2]) > 1]


def method(title: str, *, signed: bool = False) -> Method:
    return Method(title, lambda model, output: lambda inputs, target: inputs, signed, "units")


TWO = [ComparedImage("weak $1", GREY, (RAMP, RAMP - 0.5)), ComparedImage("strong", GREY, (10 * RAMP, RAMP - 0.5))]


def test_one_scale_for_each_method():
    figure = compare_sheet(TWO, [method("a"), method("b", signed=True)], "title")
    shown = pictures(figure)
    rows = Scale.of([RAMP, 10 * RAMP]), Scale.of([RAMP - 0.5] * 2, signed=True)
    expected = [GREY, GREY, *(overlay(GREY, each, scale=rows[0]) for each in (RAMP, 10 * RAMP))]
    expected += [overlay(GREY, RAMP - 0.5, scale=rows[1])] * 2
    assert len(shown) == len(expected)
    for drawn, pixels in zip(shown, expected, strict=True):
        np.testing.assert_allclose(drawn, pixels)
    said = words(figure)
    assert {"title", "weak $1", "strong", "image", "a", "b", "units", f"one scale a row; {DIFFER}"} <= set(said)
    assert {f"{rows[0].high:.2g} {DIFFERS}", f"{rows[1].high:.2g} {DIFFERS}", f"{-rows[1].high:.2g}"} <= set(said)
    assert plt.get_fignums() == []


def test_every_map_on_its_own_scale_has_its_own_numbers():
    figure = compare_sheet(TWO, [method("a"), method("b", signed=True)], "title", scale="map")
    shown = pictures(figure)
    np.testing.assert_allclose(shown[2], shown[3])
    said = words(figure)
    assert {"least", "most", "against", "for"} <= set(said)
    assert said[-1] == f"every map on a scale of its own; {DIFFER}"
    numbers = [text for text in said if text.strip("-").replace(".", "").isdigit()]
    assert numbers == ["0", "0", *["-0.5", "0.5"] * 2]
    # The scales of the first row differ, and are marked; those of the second are one.
    assert {"0.99 \N{NOT EQUAL TO}", "9.9 \N{NOT EQUAL TO}"} <= set(said)


def test_a_shared_scale_compares_what_has_no_common_unit():
    loud = [ComparedImage("one", GREY, (RAMP, 1000 * RAMP))]
    shown = pictures(compare_sheet(loud, [method("a"), method("b")], "title", scale="shared"))
    np.testing.assert_allclose(shown[1], shown[2])
    figure = compare_sheet(loud, [method("a"), method("b")], "title", scale="method")
    assert "in multiples of the mean" not in " ".join(words(figure))
    peaked = RAMP**8
    figure = compare_sheet(
        [ComparedImage("one", GREY, (RAMP, peaked))], [method("a"), method("b")], "t", scale="shared"
    )
    flat, sharp = pictures(figure)[1:]
    assert np.ptp(sharp[19, 29]) > np.ptp(flat[19, 29])  # what is concentrated is stronger
    assert "one scale: relevance in multiples of the mean size of its map" in words(figure)


def test_a_sheet_that_makes_no_sense_is_refused():
    for images, methods, says in (
        ([], [method("a")], "0 images and 1 methods"),
        (TWO, [], "2 images and 0 methods"),
        (TWO, [method("a")], "'weak .1' has 2 maps for 1 methods"),
    ):
        with pytest.raises(ValueError, match=says):
            compare_sheet(images, methods, "title")
    with pytest.raises(ValueError, match="scale is 'rows'; expected one of 'method', 'map', 'shared'"):
        compare_sheet(TWO, [method("a"), method("b")], "title", scale="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds no picture"):
        draw_rows([Row("a", ())], "title")


def test_every_method_runs_on_one_image_and_its_sign_is_as_said():
    reference = zoo.load("vit-mini")
    inputs = reference.transform(zoo.scenes()[0].image)[None]
    for name, each in METHODS.items():
        found = to_map(each.make(reference.model, None)(inputs, 1)[0])
        assert found.shape == (64, 64), name
        assert np.isfinite(found).all(), name
        assert (found.min() < -1e-6 * np.abs(found).max()) == each.signed, name
    assert inputs.grad is None


def test_captum_s_methods_read_the_scores_of_what_a_model_returns():
    class Output:
        logits = torch.ones(1, 2)

    assert torch.equal(scores_of(lambda inputs: Output(), None)(torch.zeros(1)), torch.ones(1, 2))  # type: ignore[arg-type]
    found = scores_of(lambda inputs: {"kind": inputs, "age": None}, "kind")(torch.zeros(1))  # type: ignore[arg-type]
    assert torch.equal(found, torch.zeros(1))


def block(name: str, rows: int, columns: int, cell: tuple[int, int], hot: tuple[int, int] = (0, 0)) -> BlockRelevance:
    relevance = torch.zeros(rows, columns)
    relevance[hot] = 1
    return BlockRelevance(name, relevance, torch.full((rows, columns), 0.25), 1 + relevance * 99, cell)


def test_layers_are_read_from_the_head_to_the_image_and_lie_on_their_pixels():
    blocks = [block("first", 4, 6, (5, 5), (1, 4)), block("last", 2, 3, (10, 10), (1, 0))]
    figure = layer_sheet(blocks, GREY, "title")
    said = words(figure)
    assert said.index("last") < said.index("first")
    assert {f"from the head (left) to the image (right); {DIFFER}", "mean 0.25", "1 to 100"} <= set(said)
    last, first, share, *_ = pictures(figure)
    hot = np.ptp(last, axis=2) > 0.2
    assert hot[10:20, 0:10].all()
    assert hot.sum() == 100
    hot = np.ptp(first, axis=2) > 0.2
    assert hot[5:10, 20:25].all()
    assert hot.sum() == 25
    np.testing.assert_allclose(share, np.broadcast_to(matplotlib.colormaps[STATISTIC](0.25)[:3], (2, 3, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.98, 1.02, "0.98 to 1.02"), (0.9999, 1.0001, "0.9999 to 1.0001"), (1, 1, "1"), (1, 1 + 1e-9, "1"),
     (0.0123, 45.6, "0.0123 to 45.6"), (3e-7, 1234.5, "3e-07 to 1234")],
)  # fmt: skip
def test_ends_are_written_so_that_they_differ(low, high, words):
    assert span(low, high) == words


def test_tokens_of_an_odd_grid_are_as_wide_as_two():
    """7 columns merge to 4 of two patches each; the last reaches past the image."""
    image = np.full((28, 28, 3), 0.5)
    last = pictures(layer_sheet([block("odd", 4, 4, (8, 8), (3, 3))], image, "title"))[0]
    hot = np.ptp(last, axis=2) > 0.2
    assert hot[24:, 24:].all()
    assert hot.sum() == 16


def test_many_blocks_are_thinned_out_and_the_sheet_says_so():
    blocks = [block(f"blocks.{number}", 2, 3, (10, 10)) for number in range(9)]
    figure = layer_sheet(blocks, GREY, "title", most=3)
    assert [text for text in words(figure) if text.startswith("blocks")] == ["blocks.8", "blocks.4", "blocks.0"]
    assert any("; 3 of 9 blocks" in text for text in words(figure))
    with pytest.raises(ValueError, match="0 blocks"):
        layer_sheet([], GREY, "title")


def test_heads_share_the_scale_of_their_row():
    heads = torch.zeros(2, 2, 3)
    heads[0, 0, 0], heads[1, 1, 2] = 1, 0.1
    figure = head_sheet([HeadRelevance("block", heads, (10, 10))], GREY, "title")
    strong, weak = pictures(figure)
    assert {"head 0", "head 1", "block", "share per token"} <= set(words(figure))
    assert np.ptp(strong[5, 5]) > np.ptp(weak[15, 25]) > 0
    assert np.ptp(weak[5, 5]) < 1e-9


def test_many_heads_are_on_several_rows_that_can_be_read():
    heads = {"layers.2.blocks.5": 12, "layers.3.blocks.1": 24}
    blocks = [HeadRelevance(name, torch.rand(count, 2, 3), (10, 10)) for name, count in heads.items()]
    figure = head_sheet(blocks, GREY, "title")
    titles = [text for text in figure.texts if text.get_text().startswith("head ")]
    assert [text.get_text() for text in titles] == [f"head {n}" for n in (*range(24), *range(12))]
    rows = [sum(text.get_position()[1] == y for text in titles) for y in {t.get_position()[1]: 0 for t in titles}]
    assert rows == [8, 8, 8, 6, 6]
    assert figure.get_size_inches()[0] < 16
    cells = [axes for axes in figure.axes if axes.images[0].get_array().shape[:2] == GREY.shape[:2]]
    assert min(axes.get_window_extent().width for axes in cells) > 150
    assert words(figure).count("layers.3.blocks.1") == 1


def test_names_of_layers_break_at_their_dots():
    blocks = [block(f"encoder.layers.{n}.blocks.1", 2, 3, (10, 10)) for n in range(12)]
    titles = [text for text in words(layer_sheet(blocks, GREY, "title")) if text.startswith("encoder")]
    assert titles[0] == "encoder.\nlayers.11.\nblocks.1"


def test_two_classes_share_a_scale_and_the_difference_is_theirs():
    reference = zoo.load("swin-mini")
    inputs = reference.transform(zoo.scenes()[264].image)[None]
    image = np.full((64, 64, 3), 0.5)
    figure = class_sheet(reference.model, inputs, image, (4, 1), ("sandal", "trouser"), "title")
    one, other = (
        to_map(LNStatAttribution(reference.model, rule="evidence").attribute(inputs, target)[0]) for target in (4, 1)
    )
    scale = Scale.of([one, other], signed=True)
    expected = [overlay(image, each, scale=scale) for each in (one, other, one - other)]
    for drawn, pixels in zip(pictures(figure)[4:], expected, strict=True):
        np.testing.assert_allclose(drawn, pixels, atol=1e-4)
    assert {"sandal", "trouser", "sandal\nminus trouser"} <= set(words(figure))
    # Numbers below every map: of the difference, too, which has a sign in both rows.
    numbers = [text for text in words(figure) if text.strip("-").replace(".", "").isdigit()]
    assert numbers[4] == f"-{numbers[5]}"
    assert numbers[6:] == [f"{-scale.high:.2g}", f"{scale.high:.2g}"] * 3
    with pytest.raises(ValueError, match="both classes are 1"):
        class_sheet(reference.model, inputs, image, (1, 1), ("a", "b"), "title")


def test_a_real_descent_is_drawn():
    reference = zoo.load("vit-mini")
    inputs = reference.transform(zoo.scenes()[264].image)[None]
    blocks = descend(reference.model, inputs, 1, rule="evidence")
    figure = layer_sheet(blocks, np.full((64, 64, 3), 0.5), "title", signed=True)
    assert len(pictures(figure)) == 12
    assert {"for", "against"} <= set(words(figure))


def test_images_of_several_shapes_keep_theirs():
    tall = np.full((40, 20, 3), 0.5)
    figure = draw_rows([Row("row", (GREY, tall, None))], "title", titles=["wide", "tall", "nothing"])
    shapes = [axes.images[0].get_array().shape[:2] for axes in figure.axes]
    assert shapes == [(20, 30), (40, 20)]
    assert all(axes.get_aspect() == 1 for axes in figure.axes)
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 < boxes[1].x0


def lightness(colors: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours, from the definition."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


# sRGB as it is seen without the medium, long or short cones: Machado, Oliveira and Fernandes 2009, full severity.
BLINDNESS = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen(colors: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.array(matrix).T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("matrix", [np.eye(3).tolist(), *BLINDNESS.values()], ids=["everybody", *BLINDNESS])
def test_colormaps_can_be_read_by_everybody(matrix):
    for name in (SEQUENTIAL, STATISTIC):
        steps = np.diff(lightness(seen(matplotlib.colormaps[name](np.linspace(0, 1, 32))[:, :3], matrix)))
        assert (steps > 0).all(), name  # brighter and brighter
        assert steps.max() < 5 * steps.mean(), name
    colors = seen(matplotlib.colormaps[DIVERGING](np.linspace(0, 1, 33))[:, :3], matrix)
    light = lightness(colors)
    assert (np.diff(light[:17]) > 0).all()
    assert (np.diff(light[16:]) < 0).all()
    # The two ends are told apart by more than lightness.
    assert np.abs(colors[4] - colors[28]).max() > 0.2
