"""The demo with a model of one's own, whole photographs, and two classes. Needs no Gradio."""

import base64
import io
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from captum_lnstat import LNStatAttribution, zoo
from captum_lnstat.demo import report
from captum_lnstat.demo.photo import DemoError, from_bytes
from captum_lnstat.demo.samples import samples
from captum_lnstat.demo.studio import Question, Studio
from captum_lnstat.explanation.subject.preprocessing import preprocessing_of
from captum_lnstat.explanation.subject.subject import Subject
from captum_lnstat.rules.perception import perception
from captum_lnstat.rules.rule import register
from captum_lnstat.rules.walk import walk
from captum_lnstat.visualize import Scale, overlay


@pytest.fixture(scope="module")
def own():
    """A studio and what swin-mini makes of the first sample."""
    made = Studio()
    return made, made.case(samples()[0], "swin-mini", pretrained=False)


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def test_a_rule_of_ones_own_that_has_no_class_says_so(own):
    made, case = own
    register("looked", formula="P", class_specific=False)(
        lambda outcome, settings: walk(outcome.trace, settings, perception(outcome.trace, settings))[0]
    )
    question = Question(case.prediction, "looked")
    html = report.results(case, question, list(made.maps(case, question)))
    assert "whatever the class" in html
    assert "for: " not in html


def test_a_model_too_large_for_the_page_is_refused_before_it_takes_memory(monkeypatch):
    made, build = [], timm.create_model

    def create(name, **options):
        made.append(next(iter(build(name, **options).parameters())))
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(DemoError, match=r"vit_huge_patch14_224 has 631 million parameters; .* at most 350 million"):
        Studio().case(samples()[0], "vit_huge_patch14_224", pretrained=False)
    assert [parameter.is_meta for parameter in made] == [True]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A studio that was started with a model of its own, and what that makes of a wide photograph."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=3).eval()
    preprocessing = preprocessing_of(model)
    subject = Subject(model, preprocessing, ("red", "green", "blue"), "tiny", weights="last.ckpt: state_dict")
    file = io.BytesIO()
    samples()[0].image().resize((1200, 800)).save(file, "PNG")
    made = Studio(subject)
    return made, made.case(from_bytes(file.getvalue(), "a wide one"), "tiny (last.ckpt)", pretrained=False)


def test_a_model_of_one_s_own_goes_by_its_title_and_comes_first(started):
    made, case = started
    assert made.trained == ("tiny (last.ckpt)", *zoo.names())
    assert case.subject is made.own.subject
    assert case.label(0) == "red (0)"
    assert "<b>tiny (last.ckpt)</b> trained weights" in report.results(case, Question(0), [])
    with pytest.raises(DemoError, match="no model's name"):
        Studio().case(samples()[0], "tiny (last.ckpt)", pretrained=False)


def test_the_map_is_on_the_whole_photograph_too_where_the_model_saw_a_part(started, own):
    made, case = started
    shown = next(made.maps(case, Question(1)))
    assert shown.whole.size == (640, 427)
    explained = made.own.explain([case.prepared], [1], [case])[0]
    expected = np.asarray(explained.on_original.resize((640, 427), Image.Resampling.BOX)).astype(int)
    assert np.abs(expected - np.asarray(shown.whole)).mean() < 4
    image, _, _, whole = pictures(report.results(case, Question(1), [shown]))[:4]
    assert image.shape[1] / image.shape[0] == pytest.approx(1.5, abs=0.01)  # all of it, with a frame
    assert whole.shape == (384, 576, 3)
    made, case = own
    assert next(made.maps(case, Question(1))).whole is None


def test_two_classes_are_on_one_scale_beside_each_other(own):
    made, case = own
    question = Question(5, "evidence", other=3, beside=("attention-rollout",))
    shown = list(made.maps(case, question))
    assert [one.title for one in shown] == ["evidence", "evidence", "attention rollout"]
    model = zoo.load("swin-mini").model
    for one, target in zip(shown, (5, 3), strict=False):
        expected = LNStatAttribution(model, rule="evidence").attribute(case.inputs, target)[0].sum(0)
        np.testing.assert_allclose(one.relevance, expected, atol=1e-6)
    begun = report.results(case, question, shown[:1], question.beside)
    assert 'data-state="busy"' in begun
    assert begun.count('class="waiting"') == 3
    html = report.results(case, question, shown)
    assert 'data-state="done"' in html
    scale = Scale.of([one.relevance for one in shown[:2]], signed=True)
    assert html.count(f"evidence, {-scale.high:.2g} to {scale.high:.2g}") == 2
    drawn = overlay(case.prepared.pixels, shown[1].relevance, scale=scale)
    expected = np.asarray(Image.fromarray((drawn * 255).round().astype(np.uint8)).resize((384, 384), 3)).astype(int)
    assert np.abs(pictures(html)[4] - expected).mean() < 4
    # Of one class, or where no class is told apart, there are no two.
    assert not Question(5, other=5).two
    assert not Question(5, "rollout", other=3).two
    assert len(list(made.maps(case, Question(5, "rollout", other=3)))) == 1
    with pytest.raises(DemoError, match="no class 7"):
        next(made.maps(case, Question(5, other=7)))
