from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from captum_lnstat import AttentionRollout, GenericAttention, LNStatAttribution, zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.visualize import (
    GREY,
    PLAIN,
    Look,
    Panel,
    Scale,
    colored,
    comparison,
    draw_sheet,
    draw_targets,
    overlay,
    scaled,
    to_map,
    to_picture,
)
from captum_lnstat.visualize import write_sheet as write
from captum_lnstat.visualize.canvas import DIFFER, DIFFERS
from captum_lnstat.visualize.colors import outlined

GREEN = np.tile([0.1, 0.8, 0.1], (40, 60, 1))
RAMP = np.linspace(0, 1, 2400).reshape(40, 60)


def test_the_picture_is_the_input_with_its_normalisation_undone():
    pixels = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    picture = to_picture((pixels - mean[:, None, None]) / std[:, None, None], mean.tolist(), std.tolist())
    np.testing.assert_allclose(picture, pixels.permute(1, 2, 0).numpy(), atol=1e-6)


def test_a_picture_is_clipped_and_has_to_be_one_rgb_image():
    assert to_picture(torch.full((3, 1, 1), 9.0), (0,) * 3, (1,) * 3).max() == 1
    for shape in ((1, 3, 4, 4), (1, 4, 4)):
        with pytest.raises(ValueError, match="expected \\(3, height, width\\)"):
            to_picture(torch.zeros(shape), (0,) * 3, (1,) * 3)


def test_a_map_sums_the_channels():
    attribution = torch.arange(12.0).reshape(3, 2, 2).requires_grad_()
    np.testing.assert_array_equal(to_map(attribution), [[12, 15], [18, 21]])


def test_unsigned_maps_are_stretched_from_their_least_to_their_most_relevant_pixel():
    values = scaled(5 + 3 * RAMP)
    assert values.min() == 0
    assert values.max() == 1
    np.testing.assert_allclose(values[20, 30], RAMP[20, 30] / 0.99, rtol=1e-3)


def test_signed_maps_keep_zero_in_the_middle():
    values = scaled(np.array([[-1.0, 0.0, 4.0]]), signed=True)
    assert values[0, 1] == 0
    assert values[0, 0] == pytest.approx(-0.25, abs=0.01)


@pytest.mark.parametrize("signed", [False, True])
def test_one_hot_pixel_does_not_hide_the_rest(signed):
    relevance = RAMP.copy()
    relevance[0, 0] = 1000
    assert scaled(relevance, signed=signed)[39, 58] > 0.9


@pytest.mark.parametrize("signed", [False, True])
def test_a_single_relevant_pixel_is_shown(signed):
    relevance = np.zeros((40, 60))
    relevance[3, 4] = 1e-9
    values = scaled(relevance, signed=signed)
    assert values[3, 4] == 1
    assert values.sum() == 1


def test_float_error_of_a_flat_map_is_not_stretched_to_full_contrast():
    noise = np.random.default_rng(0).normal(0, 1e-7, (40, 60))
    assert not scaled(0.25 + noise).any()
    assert not scaled(np.zeros((2, 2)), signed=True).any()


def test_what_cannot_be_coloured_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        scaled(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="goes down to -1; expected none below zero, or signed=True"):
        scaled(np.array([[-1.0, 1.0]]))


def test_more_relevant_is_brighter_and_the_signs_are_red_and_blue():
    brightness = colored(np.linspace(0, 1, 50)[None])[0] @ [0.299, 0.587, 0.114]
    assert (np.diff(brightness) > 0).all()
    against, neither, favour = colored(np.array([[-1.0, 0.0, 1.0]]), signed=True)[0]
    assert against[2] > 2 * against[0]
    assert favour[0] > 2 * favour[2]
    assert neither.min() > 0.95


def test_an_overlay_is_grey_where_nothing_is_relevant_and_coloured_where_it_is():
    relevance = np.zeros((40, 60))
    relevance[10:20, 10:20] = 1
    pixels = overlay(GREEN, relevance, look=GREY)
    assert pixels.shape == (40, 60, 3)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert np.ptp(pixels[30, 30]) < 1e-9
    np.testing.assert_allclose(pixels[15, 15], colored(relevance)[15, 15], atol=0.1)


def test_an_overlay_shows_the_picture_under_weak_relevance():
    image = np.zeros((1, 2, 3))
    image[0, 1] = 1
    pixels = overlay(np.tile(image, (1, 20, 1)), np.zeros((1, 40)), signed=True)
    assert pixels[0, 1, 0] - pixels[0, 0, 0] > 0.4


def test_the_photograph_keeps_its_colours_unless_grey_is_asked_for():
    relevance = np.zeros((40, 60))
    relevance[:, 30:] = 1.0
    plain = overlay(GREEN, relevance, look=PLAIN)
    np.testing.assert_allclose(plain[:, :30], GREEN[:, :30])
    strongest = colored(np.array([[0.0, 1.0]]))[0, 1]
    np.testing.assert_allclose(plain[0, 40], 0.25 * GREEN[0, 40] + 0.75 * strongest)
    # How much it covers, and its colours, are what is asked for; signs too.
    np.testing.assert_allclose(overlay(GREEN, relevance, look=Look(alpha=0))[0, 40], GREEN[0, 40])
    full = overlay(GREEN, relevance, look=Look("viridis", 1.0))[0, 40]
    np.testing.assert_allclose(full, matplotlib.colormaps["viridis"](1.0)[:3])
    signed = overlay(GREEN, -relevance, signed=True, look=Look("PuOr", 1.0))[0, 40]
    np.testing.assert_allclose(signed, matplotlib.colormaps["PuOr"](0.0)[:3])


def test_below_signs_the_photograph_is_in_grey_unless_its_colours_are_asked_for():
    relevance = np.zeros((40, 60))
    relevance[:, 30:] = -1.0
    default, asked = (overlay(GREEN, relevance, signed=True, look=look) for look in (PLAIN, GREY))
    np.testing.assert_array_equal(default, asked)
    assert np.ptp(default[0, 0]) < 1e-9
    np.testing.assert_allclose(overlay(GREEN, relevance, signed=True, look=Look(grey=False))[:, :30], GREEN[:, :30])
    assert [look.cover(signed=True) for look in (PLAIN, GREY, Look(grey=False), Look(alpha=0.4))] == [
        0.9,
        0.9,
        0.75,
        0.4,
    ]
    assert [look.cover(signed=False) for look in (PLAIN, GREY, Look(grey=False), Look(alpha=0.4))] == [
        0.75,
        0.9,
        0.75,
        0.4,
    ]


def test_a_signed_overlay_is_red_for_and_blue_against():
    against, favour = overlay(np.full((1, 2, 3), 0.5), np.array([[-1.0, 1.0]]), signed=True)[0]
    assert against[2] > against[0] + 0.2
    assert favour[0] > favour[2] + 0.2


def test_an_overlay_needs_a_map_as_large_as_the_image():
    with pytest.raises(ValueError, match="of one size"):
        overlay(GREEN, np.zeros((20, 30)))


def test_the_comparison_holds_every_method_on_the_same_target(monkeypatch):
    few = replace(METHODS["ig"], make=partial(METHODS["ig"].make, n_steps=4))
    monkeypatch.setitem(METHODS, "ig", few)
    reference = zoo.load("swin-mini")
    model, inputs = reference.model, reference.transform(zoo.scenes()[0].image)[None]
    seen = []

    @contextmanager
    def during(title):
        seen.append(f"{title} begins")
        yield
        seen.append(f"{title} ends")

    panels = comparison(model, inputs, 5, rule="evidence", during=during)
    titles = ["rule evidence", "attention rollout", "Chefer et al. 2021", "Integrated Gradients"]
    assert [panel.title for panel in panels] == titles
    assert seen == [f"{title} {what}" for title in titles for what in ("begins", "ends")]
    assert [panel.signed for panel in panels] == [True, False, False, True]
    expected = [
        LNStatAttribution(model, rule="evidence").attribute(inputs, 5),
        AttentionRollout(model).attribute(inputs, 5),
        GenericAttention(model).attribute(inputs, 5),
        IntegratedGradients(model).attribute(inputs, target=5, n_steps=4),
    ]
    for panel, attribution in zip(panels, expected, strict=True):
        np.testing.assert_allclose(panel.relevance, attribution[0].sum(0).detach().numpy(), atol=1e-5)
    assert not comparison(model, inputs, 5)[0].signed


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_text()]


LEGENDS = ["least relevant", "most relevant", "against the target", "for the target"]


def test_a_sheet_has_image_map_and_overlay_and_the_others_beside_them():
    panels = [Panel("a", RAMP), Panel("b", RAMP), Panel("c", RAMP - 0.5, signed=True)]
    figure = draw_sheet(GREEN, panels, "a title with $ and $")
    own = ["0", f"0.99 {DIFFERS}"]
    first_row, second_row = ["image", "a, map", "a", *own, *own], ["b", "c", *own, "-0.5", f"0.5 {DIFFERS}"]
    assert words(figure) == ["a title with $ and $", *first_row, *second_row, DIFFER, *LEGENDS]
    assert not any(text.get_parse_math() for text in figure.texts)
    arrays = [axes.images[0].get_array() for axes in figure.axes]
    shown, bars = ([array for array in arrays if (len(array) == 1) is flat] for flat in (False, True))
    for drawn, pixels in zip(shown, [GREEN, colored(RAMP), overlay(GREEN, RAMP), overlay(GREEN, RAMP)], strict=False):
        np.testing.assert_allclose(drawn, pixels)
    np.testing.assert_allclose(shown[4], overlay(GREEN, RAMP - 0.5, signed=True))
    ramps = [colored(np.linspace(0, 1, 256)[None], scale=Scale(0, 1))]
    ramps.append(colored(np.linspace(-1, 1, 256)[None], scale=Scale(0, 1, signed=True)))
    # Of both panels in the first row, both in the second, and the two in the foot.
    for bar, ramp in zip(bars, [ramps[0], ramps[0], ramps[0], ramps[1], *ramps], strict=True):
        np.testing.assert_allclose(bar, ramp)
    first, fourth = figure.axes[0].get_position(), figure.axes[5].get_position()
    assert first.x0 == fourth.x0
    assert first.y0 > fourth.y1
    assert plt.get_fignums() == []


def test_a_sheet_keeps_the_shape_of_the_image_and_needs_a_panel():
    figure = draw_sheet(GREEN, [Panel("a", RAMP)], "title")
    box = figure.axes[0].get_window_extent()
    assert box.width / box.height == pytest.approx(60 / 40)
    assert words(figure) == ["title", "image", "a, map", "a", *["0", "0.99"] * 2, *LEGENDS[:2]]
    with pytest.raises(ValueError, match="panels is empty"):
        draw_sheet(GREEN, [], "title")


def test_a_sheet_shows_the_whole_photograph_and_the_likeliest_classes_beside():
    photo = np.zeros((40, 80, 3))
    top = [
        ("a name of a class that is far too long for its place", "75.0%", 0.75),
        ("b", "0.2%", 0.002),
    ]
    for figure in (
        draw_sheet(GREEN, [Panel("a", RAMP)], "title", photo=photo, beside=top),
        draw_targets(GREEN, [Panel("a", RAMP)], "title", photo=photo, beside=top),
    ):
        np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), photo)
        said = words(figure)
        assert "image (frame: what the model saw)" in said
        assert said[-4].endswith("...")
        assert said[-3:] == ["75.0%", "b", "0.2%"]
        behind, full, _, tiny = (axes.get_position() for axes in figure.axes[-4:])
        assert full.width == pytest.approx(0.75 * behind.width)
        assert tiny.width < 0.02 * behind.width
        drawn = FigureCanvasAgg(figure).get_renderer()
        name, share = (text.get_window_extent(drawn) for text in figure.texts[-4:-2])
        assert name.x1 < share.x0


@pytest.mark.parametrize(("targets", "rows"), [(2, 1), (3, 1), (4, 2), (5, 2), (7, 2), (8, 3)])
def test_few_places_of_a_sheet_stay_empty(targets, rows):
    figure = draw_targets(GREEN, [Panel("a class", RAMP)] * targets, "title")
    shown = [axes for axes in figure.axes if axes.images and axes.images[0].get_array().shape == GREEN.shape]
    assert len(shown) == 1 + targets
    assert len({round(axes.get_position().y0, 3) for axes in shown}) == rows


def test_a_contour_is_around_the_fifth_that_is_most_relevant():
    black, white = outlined(RAMP)
    plain, lined = overlay(GREEN, RAMP), overlay(GREEN, RAMP, look=Look(contour=True))
    assert (lined[white] == 1).all()
    assert (lined[black] == 0).all()
    np.testing.assert_array_equal(lined[~white & ~black], plain[~white & ~black])
    share = (RAMP[white].min() <= RAMP).mean()
    assert share == pytest.approx(0.2, abs=0.01)
    assert RAMP[black].max() < RAMP[white].min()
    # Not around what argues against, what is not known, or specks.
    assert not outlined(-RAMP - 1)[0].any()
    unknown = np.where(RAMP > 0.5, np.nan, RAMP)
    assert np.nanmax(RAMP[outlined(unknown)[1]]) <= 0.5
    assert not outlined(np.random.default_rng(0).random((40, 60)))[1].any()
    said = words(draw_sheet(GREEN, [Panel("a", RAMP)], "title", look=Look(contour=True)))
    assert "line: the fifth of the pixels with the most relevance" in said


def test_small_images_are_smoothed():
    small = draw_sheet(GREEN, [Panel("a", RAMP)], "title").axes[0].images[0]
    large = draw_sheet(np.ones((500, 500, 3)), [Panel("a", np.eye(500))], "title").axes[0].images[0]
    assert small.get_interpolation() == "bicubic"
    assert large.get_interpolation() in ("auto", "antialiased")


def test_a_sheet_is_written_with_the_image_in_its_first_cell(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_text("an older one")
    assert write(str(path), GREEN, [Panel("a", RAMP)], "title") == path
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")) / 255
    np.testing.assert_allclose(pixels[pixels.shape[0] // 2, pixels.shape[1] // 6], [0.1, 0.8, 0.1], atol=0.01)


@pytest.mark.parametrize("name", ["sheet.jpg", "sheet.pdf", "sheet.svg"])
def test_the_suffix_says_the_format(tmp_path, name):
    start = {"sheet.jpg": b"\xff\xd8", "sheet.pdf": b"%PDF", "sheet.svg": b"<?xml"}[name]
    assert write(tmp_path / name, GREEN, [Panel("a", RAMP)], "title").read_bytes().startswith(start)


def test_a_failure_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_text("an older one")
    with pytest.raises(ValueError, match="nope"):
        write(tmp_path / "sheet.nope", GREEN, [Panel("a", RAMP)], "title")
    with pytest.raises(OSError, match="no_folder"):
        write(tmp_path / "no_folder" / "sheet.png", GREEN, [Panel("a", RAMP)], "title")

    def fill_the_disk(self, file, **options):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, GREEN, [Panel("a", RAMP)], "title")
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]
    assert path.read_text() == "an older one"
