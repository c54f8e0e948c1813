"""``captum-lnstat report``: one file with every image that can be explained, and what cannot be is named on it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from captum_lnstat import cli, zoo
from captum_lnstat.explanation.subject import progress
from captum_lnstat.report import page
from captum_lnstat.visualize import overlay


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(progress, "FIRST_WORD", 600.0)


@pytest.fixture
def photos(tmp_path):
    """Two images, one of them with a name that is HTML, and a file that is called an image and is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, scene in zip(("a", "<b>&"), zoo.scenes()[:2], strict=True):
        scene.image.save(folder / f"{name}.png")
    (folder / "<i>.png").write_text("no image")
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="captum-lnstat")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(address: str) -> Image.Image:
    kind, _, data = address.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_every_image_is_on_the_page_and_what_is_broken_is_named(photos):
    result = run("report", photos)
    assert result.exit_code == 1
    assert result.stdout.startswith("2 images, report.html, ")
    assert result.stderr.endswith("1 of 3 images skipped\n")
    text = Path("report.html").read_text()
    found = Tags(text)
    assert [card["class"] for card in found.all("li") if card.get("class")] == ["card", "card"]
    assert "<i>.png: '" in found.text
    assert "cannot be read as an image" in found.text
    assert "<b>&" in found.text
    assert not found.all("i")
    assert '"rule": "lnstat"' in found.text  # what it was made with
    assert "swin-mini knows t-shirt" in found.text
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["report.html"]


def test_nothing_on_it_is_elsewhere(photos):
    run("report", photos, "--top-k", 2)
    text = Path("report.html").read_text()
    found = Tags(text)
    assert {name for _, attributes in found.tags for name in attributes} & {"href", "src"} == {"href", "src"}
    for _, attributes in found.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)
    (policy,) = [meta["content"] for meta in found.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_what_is_on_the_page_is_what_explain_writes(photos):
    (photos / "<i>.png").unlink()
    assert run("report", photos, "--alpha", 0.6).exit_code == 0
    assert run("explain", photos, "--alpha", 0.6).exit_code == 0
    images = Tags(Path("report.html").read_text()).all("img")
    for name in ("<b>&", "a"):
        place = next(i for i, image in enumerate(images) if image["alt"] == name)
        seen = np.asarray(picture(images[place]["src"]).convert("RGB")) / 255
        laid = np.asarray(picture(images[place + 1]["src"]).convert("RGBA")) / 255
        weight = 0.6 * laid[..., 3:]  # as a browser lays it, at the opacity of the page
        with Image.open(f"lnstat/{name}.png") as file:
            written = np.asarray(file.convert("RGB")) / 255
        apart = np.abs(seen * (1 - weight) + laid[..., :3] * weight - written).mean()
        assert apart < 0.02
        assert apart < np.abs(seen - written).mean() / 2  # the photograph alone is something else


def test_several_classes_are_a_menu(photos):
    run("report", photos / "a.png", "--target", "bag", "--top-k", 2)
    found = Tags(Path("report.html").read_text())
    assert len([image for image in found.all("img") if "data-of" in image]) == len(found.all("option")) - 4
    assert [image.get("hidden", "shown") for image in found.all("img") if "data-of" in image][:2] == ["shown", None]
    (card,) = [item for item in found.all("li") if item.get("class") == "card"]
    assert found.all("meter")[0]["value"] == card["data-confidence"][:6]  # of the first class, the bag


def test_nothing_is_written_where_nothing_can_be(photos, tmp_path):
    result = run("report", photos / "<i>.png")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        f"Error: '{photos}/<i>.png' cannot be read as an image: it is in no format that Pillow knows",
    )
    assert run("report", photos, "--output", "report.pdf").exit_code == 2
    assert run("report").exit_code == 2
    many = run("report", photos, "--top-k", 9000)
    assert many.exit_code == 2
    assert "3 images and their maps are 27003 pictures; expected 20000 at most on a page" in many.stderr
    assert list(Path.cwd().iterdir()) == []


def test_a_page_has_a_bounded_size():
    """Even of noise, which no format makes small, as many pictures as there may be are no more than the bound."""
    noise = np.random.default_rng(0)
    for pictures in (1, 700, 20_000):
        limit = page.room(pictures)
        image = Image.fromarray(noise.integers(0, 256, (640, 480, 3), np.uint8))
        taken = len(picture_bytes(page.data_uri(image, limit)))
        assert taken * pictures <= page.PAGE_BYTES
    assert picture(page.data_uri(image, 10**9)).size == (288, 384)


def picture_bytes(address: str) -> bytes:
    return base64.b64decode(address.partition(",")[2])


@pytest.mark.parametrize("signed", [False, True])
def test_colours_laid_over_an_image_are_its_overlay(signed):
    from captum_lnstat.visualize.colors import Look, rgba

    noise = np.random.default_rng(1)
    image, values = noise.random((5, 7, 3)), noise.random((5, 7)) - 0.5 * signed
    look = Look("viridis", 0.4, grey=False)
    laid = rgba(values, signed=signed, look=look)
    blended = image + 0.4 * laid[..., 3:] * (laid[..., :3] - image)
    np.testing.assert_allclose(overlay(image, values, signed=signed, look=look), blended)
