"""The demo without its page: photos, samples, maps at a depth, the studio and what it says. Needs no Gradio."""

import base64
import importlib.util
import io
import re
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from captum_lnstat import LayerLNStat, LNStatAttribution, zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.cli import main
from captum_lnstat.demo import depth, photo, report, server, studio
from captum_lnstat.demo.photo import DemoError, from_bytes, from_upload
from captum_lnstat.demo.samples import samples
from captum_lnstat.demo.studio import BESIDE, Question, Shown, Studio
from captum_lnstat.errors import warn_caller
from captum_lnstat.explanation.explainer import Explainer
from captum_lnstat.explanation.subject.images import Item
from captum_lnstat.explanation.subject.subject import subject_of


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Photos


def test_a_photo_is_read_the_right_way_up():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif)
    assert from_bytes(data, "sideways").image().size == (20, 30)


@pytest.mark.parametrize("data", [b"", b"text", encoded(Image.new("RGB", (40, 40)))[:60], b"<svg></svg>"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DemoError, match="cannot be read as an image"):
        from_bytes(data, "broken")


def test_too_large_a_file_is_refused(monkeypatch):
    monkeypatch.setattr(photo, "MAX_BYTES", 50)
    with pytest.raises(DemoError, match="expected at most"):
        from_bytes(encoded(Image.new("RGB", (40, 40))), "large")


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (9000, 9000)))
    assert len(bomb) < 20_000
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DemoError, match=r"9000 x 9000 pixels; expected at most 40 million"):
        from_bytes(bomb, "bomb")


def test_only_what_was_uploaded_is_read(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    data = encoded(Image.new("RGB", (4, 4), "blue"))
    outside.write_bytes(data)
    (folder / "inside.png").write_bytes(data)
    (folder / "link.png").symlink_to(outside)
    assert from_upload(str(folder / "inside.png"), folder).data == data
    paths = [outside, folder / "link.png", folder / "none.png", f"{folder}/../outside.png", folder, "outside.png", ""]
    for path in paths:
        with pytest.raises(DemoError, match="no file that was uploaded here"):
            from_upload(str(path), folder)


def test_samples_are_understood_by_the_bundled_models():
    assert 8 <= len(samples()) <= 16
    for sample in samples():
        assert sample.image().size == (64, 64)
    assert "and" in samples()[0].title  # two objects first: another class moves the map


# Maps at a depth


def map_after(model, inputs, target, **options):
    """The map that the studio shows, of one input."""
    explainer = depth.DepthExplainer(subject_of(model), **options)
    return explainer.explain([explainer.prepare(Item("input", None, inputs[0]))], [target])[0].relevance


@pytest.mark.parametrize("name", ["swin-mini", "vit-mini"])
@pytest.mark.parametrize("rule", ["lnstat", "evidence", "rollout"])
def test_a_map_at_a_depth_is_the_layers_relevance_where_its_tokens_are(name, rule):
    reference = zoo.load(name)
    inputs = reference.transform(zoo.scenes()[270].image)[None]
    blocks = [b for s in reference.model.layers for b in s.blocks] if name == "swin-mini" else reference.model.blocks
    for k in range(1, len(blocks)):
        found = map_after(reference.model, inputs, 5, depth=k, rule=rule)
        layer = LayerLNStat(reference.model, blocks[k], rule=rule)
        tokens = layer.attribute(inputs, 5, attribute_to_layer_input=True).sum(-1)[0]
        grid = tokens if tokens.dim() == 2 else tokens[1:].reshape(8, 8)
        assert float(found.sum()) == pytest.approx(float(grid.sum()), rel=1e-4, abs=1e-5)
        # Every token's square of the image, where smoothing across its border moves but little.
        side = 64 // len(grid)
        squares = found.reshape(len(grid), side, len(grid), side).sum((1, 3))
        assert np.corrcoef(squares.flatten(), grid.flatten())[0, 1] > 0.9


def test_tokens_behind_a_merging_are_spread_over_their_own_patches():
    swin = zoo.load("swin-mini").model
    trace = depth.geometry(subject_of(swin), torch.zeros(1, 3, 64, 64))
    for block, side in ((trace.blocks[2], 8), (trace.blocks[4], 4)):
        tokens = torch.arange(1.0, side * side + 1)[None]
        expected = tokens.reshape(side, side).repeat_interleave(16 // side, 0).repeat_interleave(16 // side, 1)
        torch.testing.assert_close(depth.to_patches(tokens, trace, block)[0], expected / (16 // side) ** 2)


def test_tokens_in_another_order_are_put_back():
    """Hiera cuts its patches into units; the token that a change of the image changes most stands for that place."""
    torch.manual_seed(0)
    stages = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1), "mask_unit_attn": (True, False, False)}
    hiera = timm.models.hiera.Hiera(img_size=64, q_pool=2, num_classes=3, **stages).eval()
    torch.nn.init.normal_(hiera.head.fc.weight)
    with torch.no_grad():  # the embedding's kernels reach over their patch's border; not here
        hiera.patch_embed.proj.weight[:, :, :3] = 0
        hiera.patch_embed.proj.weight[:, :, :, :3] = 0
    plain = torch.zeros(1, 3, 64, 64)
    before, orders = depth.geometry(subject_of(hiera), plain), []
    for index, cells in ((0, 16), (2, 8)):
        side = 64 // cells
        for row, column in ((0, 0), (1, 2), (cells - 1, 1), (2, cells - 1)):
            changed = plain.clone()
            changed[..., row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
            after = depth.geometry(subject_of(hiera), changed)
            moved = (after.blocks[index].before - before.blocks[index].before).norm(dim=-1)
            token = int(moved.argmax())
            orders.append(token == row * cells + column)
            patches = depth.to_patches(torch.eye(moved.shape[1])[token : token + 1], before, before.blocks[index])[0]
            expected = torch.zeros(cells, cells)
            expected[row, column] = 1
            expected = expected.repeat_interleave(16 // cells, 0).repeat_interleave(16 // cells, 1)
            torch.testing.assert_close(patches, expected / expected.sum())
    assert not all(orders)  # else nothing was out of order


def test_depths_that_are_not_there():
    vit, inputs = zoo.load("vit-mini").model, torch.rand(1, 3, 64, 64)
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match=f"depth is {k}; expected 1 to 3"):
            map_after(vit, inputs, 0, depth=k)
    with pytest.raises(ValueError, match="rule is 'gradient'; expected one of 'lnstat', 'evidence', 'rollout'"):
        map_after(vit, inputs, 0, depth=1, rule="gradient")


# The studio


@pytest.fixture(scope="module")
def own():
    """A studio and what swin-mini makes of the first sample."""
    made = Studio()
    return made, made.case(samples()[0], "swin-mini", pretrained=False)


@pytest.fixture
def few_steps(monkeypatch):
    method = METHODS["ig"]
    monkeypatch.setitem(METHODS, "ig", replace(method, make=partial(method.make, n_steps=2)))


def test_a_case_is_what_the_model_says(own):
    _, case = own
    reference = zoo.load("swin-mini")
    image = samples()[0].image()
    expected = reference.model(reference.transform(image)[None]).softmax(1)[0].detach()
    np.testing.assert_allclose(case.probabilities, expected, rtol=1e-5)
    assert case.prediction == int(expected.argmax()) == case.ranked(3)[0]
    assert case.label(case.prediction) == f"{reference.class_names[case.prediction]} ({case.prediction})"
    assert case.depths == 6
    assert not case.subject.random
    np.testing.assert_allclose(case.prepared.pixels, np.asarray(image) / 255, atol=1e-6)


def test_the_maps_are_those_of_the_methods(own, few_steps):
    made, case = own
    shown = list(made.maps(case, Question(3, "evidence", beside=tuple(BESIDE))))
    assert [one.title for one in shown] == ["evidence", *(METHODS[name].title for name in BESIDE)]
    assert [one.signed for one in shown] == [True, *(METHODS[name].signed for name in BESIDE)]
    model = zoo.load("swin-mini").model
    expected = LNStatAttribution(model, rule="evidence").attribute(case.inputs, 3)
    np.testing.assert_allclose(shown[0].relevance, expected[0].sum(0), atol=1e-6)
    other = next(made.maps(case, Question(case.prediction, "evidence")))
    assert np.abs(other.relevance - shown[0].relevance).max() > 1e-3
    sharp = next(made.maps(case, Question(3, "evidence", contrastive=True)))
    expected = LNStatAttribution(model, rule="evidence", contrastive=True).attribute(case.inputs, 3)
    np.testing.assert_allclose(sharp.relevance, expected[0].sum(0), atol=1e-6)
    deep = next(made.maps(case, Question(3, "evidence", depth=2)))
    assert deep.caption.endswith("read after block 2")
    np.testing.assert_allclose(deep.relevance, map_after(model, case.inputs, 3, depth=2, rule="evidence"))


def test_what_was_computed_is_kept_and_another_rule_does_not_repeat_the_others(few_steps, monkeypatch):
    made = Studio()
    case = made.case(samples()[0], "vit-mini", pretrained=False)
    first = list(made.maps(case, Question(1, beside=tuple(BESIDE))))
    calls = []
    monkeypatch.setattr(studio, "Shown", lambda *what: calls.append(what[0]) or Shown(*what))
    second = list(made.maps(case, Question(1, "rollout", beside=tuple(BESIDE))))
    assert calls == ["rollout"]
    assert all(a is b for a, b in zip(first[1:], second[1:], strict=True))
    assert made.case(samples()[0], "vit-mini", pretrained=True) is case  # its weights are its own either way
    third = list(made.maps(case, Question(2, "rollout", beside=tuple(BESIDE))))
    # Both rollouts explain no class.
    assert calls == ["rollout", *(METHODS[name].title for name in BESIDE[1:])]
    assert third[1] is first[1]


def test_only_so_much_is_kept(monkeypatch):
    monkeypatch.setattr(studio, "_CASES", 2)
    made, seen, explain = Studio(), [], Explainer.predict
    monkeypatch.setattr(Explainer, "predict", lambda self, inputs: seen.append(1) or explain(self, inputs))
    for number in (0, 1, 0, 2, 0, 1):
        made.case(samples()[number], "vit-mini", pretrained=False)
    assert len(seen) == 4  # the first, the second, the third, and the second again


@pytest.mark.parametrize(
    "name", ["local-dir:/etc", "hf-hub:someone/model", "/etc/passwd", "../x", "", "a b", "vit\0", "x" * 200, "<script>"]
)
def test_a_models_name_leads_to_no_file_and_no_hub(name, monkeypatch):
    monkeypatch.setattr(studio, "read_subject", lambda *_: pytest.fail("reached"))
    with pytest.raises(DemoError, match="no model's name"):
        Studio().case(samples()[0], name, pretrained=True)


def test_models_that_fail_are_messages():
    made = Studio()
    with pytest.raises(DemoError, match="unknown model 'vit_tiny_patch16'; did you mean"):
        made.case(samples()[0], "vit_tiny_patch16", pretrained=False)
    case = made.case(samples()[0], "resnet10t", pretrained=False)
    assert case.depths == 1
    with pytest.raises(DemoError, match=r"lnstat cannot be computed\.\nResNet is not a vision transformer"):
        next(made.maps(case, Question(0)))


def test_weights_that_cannot_be_had_are_a_message(monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DemoError, match="with pretrained weights: no route to host"):
        Studio().case(samples()[0], "vit_tiny_patch16_224", pretrained=True)


def test_questions_that_make_no_sense(own):
    made, case = own
    for question, reason in (
        (Question(7), "no class 7; expected 0 to 6"),
        (Question(-1), "no class -1"),
        (Question(0, "magic"), "no rule 'magic'"),
        (Question(0, depth=6), "no depth 6; expected 0 to 5"),
        (Question(0, "gradient", depth=1), "the full map only"),
    ):
        with pytest.raises(DemoError, match=reason):
            next(made.maps(case, question))
    with pytest.raises(DemoError, match="no method 'magic'"):
        list(made.maps(case, Question(0, beside=("magic",))))


def test_one_computation_at_a_time(monkeypatch):
    made = Studio()
    case = made.case(samples()[0], "vit-mini", pretrained=False)
    running, most = [], []

    class Slow:
        def __init__(self, *arguments, **options):
            pass

        def explain(self, *arguments):
            running.append(1)
            most.append(len(running))
            threading.Event().wait(0.05)
            running.pop()
            small = SimpleNamespace(framed=None)
            return [SimpleNamespace(relevance=np.zeros((64, 64)), smaller=lambda longer: small)]

    monkeypatch.setattr(studio, "Explainer", Slow)
    threads = [threading.Thread(target=lambda c=c: list(made.maps(case, Question(c)))) for c in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == [1] * 4


def test_who_waits_for_somebody_elses_computation_is_told_so_in_the_end(monkeypatch):
    monkeypatch.setattr(studio, "_PATIENCE", 0.1)
    inside, done, explainer = threading.Event(), threading.Event(), studio._explainer

    def hangs(name, pretrained):
        if inside.is_set():
            return explainer(name, pretrained)
        inside.set()
        done.wait(60)
        raise DemoError("no such model")

    def first():
        with pytest.raises(DemoError, match="no such model"):
            made.case(samples()[0], "vit-mini", pretrained=False)

    monkeypatch.setattr(studio, "_explainer", hangs)
    made = Studio()
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(DemoError, match="try again later"):
        made.case(samples()[1], "vit-mini", pretrained=False)
    done.set()
    thread.join(60)
    assert made.case(samples()[1], "vit-mini", pretrained=False).depths > 1


# What is said


def test_notes_say_what_a_map_is_worth(own, monkeypatch):
    _, case = own
    faint = case.ranked(7)[-1]
    assert case.probabilities[faint] < 0.01
    (note,) = studio.notes(case, Question(faint), [])
    assert note.startswith(f"the model all but rules {case.label(faint)} out; ")
    assert studio.notes(case, Question(case.prediction), []) == []

    def warns(self, inputs, targets):
        warn_caller("the map is <zero> everywhere")
        warnings.warn("of no interest", FutureWarning, stacklevel=1)
        return relevance(self, inputs, targets)

    relevance = Explainer.relevance
    monkeypatch.setattr(Explainer, "relevance", warns)
    fresh = Studio()
    case = fresh.case(samples()[0], "swin-mini", pretrained=False)
    shown = list(fresh.maps(case, Question(case.prediction)))
    assert studio.notes(case, Question(case.prediction), shown) == ["the map is <zero> everywhere"]
    html = report.results(case, Question(case.prediction), shown)
    assert "the map is &lt;zero&gt; everywhere" in html
    assert "<zero>" not in html


def test_random_weights_are_said_plainly():
    made = Studio()
    case = made.case(samples()[0], "vit_tiny_patch16_224", pretrained=False)
    assert case.subject.random
    (note,) = studio.notes(case, Question(case.prediction), [])
    assert "weights of vit_tiny_patch16_224 are random, and so is the explanation" in note
    assert "random weights" in report.results(case, Question(case.prediction), [])


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def test_results_hold_the_pictures_and_the_sheet(own, few_steps):
    made, case = own
    question = Question(case.prediction, beside=("attention-rollout",))
    shown = list(made.maps(case, question))
    begun = report.results(case, question, shown[:1], question.beside)
    assert 'data-state="busy"' in begun
    assert begun.count('class="waiting"') == 1
    assert "download" not in begun
    html = report.results(case, question, shown)
    assert 'data-state="done"' in html
    assert "waiting" not in html
    image, colours, _, rollout, _ = pictures(html)
    assert image.shape == colours.shape == rollout.shape == (384, 384, 3)
    expected = np.asarray(samples()[0].image().resize((384, 384), Image.Resampling.BICUBIC))
    assert np.abs(image.astype(int) - expected).mean() < 4
    reference_label = re.sub("[ ()]+", "-", case.label(case.prediction)).strip("-")
    link = re.search(r'download="([^"]+)" href="data:image/png;base64,([^"]+)"', html)
    assert link.group(1) == f"swin-mini-{reference_label}-lnstat.png"
    with Image.open(io.BytesIO(base64.b64decode(link.group(2)))) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 4 * 384  # image, map, overlay and another method, beside each other
        assert sheet.height > 384
    assert len(html) < 3_000_000


def test_wide_images_keep_their_shape():
    wide = np.zeros((32, 96, 3))
    assert report._enlarged(wide).size == (1152, 384)


def test_names_are_escaped():
    assert "<img" not in report.failure("no model '<img src=x>'")


# The command


def run(*arguments):
    return CliRunner().invoke(main, ["demo", *arguments])


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "pip install 'captum-lnstat[demo]'" in result.output


@pytest.fixture
def served(monkeypatch):
    """Stands in for Gradio and for the server: what ``serve`` was called with."""
    calls, models = [], []
    monkeypatch.setattr(server, "models", models, raising=False)

    def serve(host, port, ready, own):
        calls.append((host, port))
        models.append(own)
        ready("http://there/")

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "gradio" else found(name))
    monkeypatch.setattr(server, "serve", serve)
    return calls


def test_the_page_is_served_on_the_loopback_address(served):
    result = run()
    assert result.exit_code == 0
    assert served == [("127.0.0.1", 7860)]
    assert result.output == "the page is at http://there/ (Ctrl-C stops it)\nstopped\n"


def test_the_page_begins_with_the_model_that_is_chosen(served, tmp_path):
    assert run().exit_code == 0
    model = zoo.load("vit-mini").model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    chosen = ["--model", "vit-mini", "--checkpoint", str(tmp_path / "last.ckpt")]
    assert run(*chosen, "--class-names", str(tmp_path / "names.txt")).exit_code == 0
    none, own = server.models
    assert none is None
    assert own.title == "vit-mini (last.ckpt)"
    assert own.class_names == tuple("abcdefg")
    result = run("--model", "vit-mni")
    assert (result.exit_code, "did you mean 'vit-mini'" in result.output) == (2, True)
    assert len(server.models) == 2


def test_another_address_is_warned_about(served):
    result = run("--host", "0.0.0.0", "--port", "8080")
    assert served == [("0.0.0.0", 8080)]
    assert "whoever can reach this machine can use the page" in result.stderr


def test_a_port_that_is_taken_is_one_line(served, monkeypatch):
    def taken(host, port, ready, own):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(server, "serve", taken)
    result = run("--port", "80")
    assert result.exit_code == 2
    assert result.stderr == ("Error: the page cannot be served on 127.0.0.1, port 80: Address already in use\n")


def test_ports():
    with server.socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            server.free_port("127.0.0.1", other.getsockname()[1])
    assert server.free_port("127.0.0.1") > 1023


def test_what_the_environment_says_of_gradio_does_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/elsewhere")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(server.tempfile, "tempdir", None)
    server._settle("127.0.0.1", tmp_path)
    own = {name: value for name, value in server.os.environ.items() if name.startswith("GRADIO_")}
    assert own == {"GRADIO_TEMP_DIR": str(tmp_path), "GRADIO_ANALYTICS_ENABLED": "False"}
    assert server.os.environ["NO_PROXY"].startswith("example.com,127.0.0.1,localhost")
    assert server.tempfile.gettempdir() == str(tmp_path)


def test_the_style_sheet_asks_no_other_host():
    text = Path(report.__file__).with_name("page.css").read_text("utf-8")
    assert "url(" not in text
    assert "@import" not in text
