"""Maps as files in Python, what they say of themselves, and errors that name what was asked for."""

from __future__ import annotations

import gc
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from captum_lnstat import SourceError, Topology, explain, register_topology, zoo
from captum_lnstat.attribution.methods import METHODS
from captum_lnstat.errors import near
from captum_lnstat.explanation.prediction import Prediction
from captum_lnstat.explanation.provenance import digest


@pytest.fixture(scope="module")
def reference():
    return zoo.load("vit-mini")


def test_a_signed_map_as_a_png_has_zero_in_its_middle(reference, tmp_path):
    found = explain(reference, zoo.scenes()[264].image, rule="evidence")
    path = found.save(tmp_path / "map.png", raw=True)
    with Image.open(path) as file:
        levels, about = np.asarray(file).astype(float), json.loads(file.text["captum-lnstat"])
    assert METHODS["evidence"].signed
    values = about["black"] + levels / 65535 * (about["white"] - about["black"])
    np.testing.assert_allclose(values, found.values_on_original, atol=about["white"] / 60000)
    assert about["black"] == -about["white"]
    assert json.loads((tmp_path / "map.png.json").read_text()) == about


def test_of_an_input_of_the_model_it_is_what_the_model_saw(reference, tmp_path):
    found = explain(reference, torch.rand(3, 64, 64))
    with Image.open(found.save(tmp_path / "map.png", raw=True)) as file:
        levels, about = np.asarray(file).astype(float), json.loads(file.text["captum-lnstat"])
    assert about["on"] == "what the model saw"
    np.testing.assert_allclose(levels / 65535 * about["white"], found.relevance, atol=about["white"] / 60000)


def test_several_are_written_in_any_form(reference, tmp_path):
    found = explain(reference, [scene.image for scene in zoo.scenes()[:2]])
    paths = found.save(tmp_path / "maps", suffix=".npz")
    for each, path in zip(found, paths, strict=True):
        with np.load(path) as file:
            np.testing.assert_array_equal(file["grid"], each.grid)
            np.testing.assert_array_equal(file["relevance"], each.relevance)
    assert [path.name for path in found.save(tmp_path / "maps", raw=True)] == ["image-0.png", "image-1.png"]


def test_the_hash_is_that_of_the_weights_the_map_was_made_with(tmp_path):
    reference = zoo.load("vit-mini")
    before = digest(reference.model)
    first, second = (explain(reference, zoo.scenes()[0].image) for _ in range(2))
    assert json.loads(first.save(tmp_path / "a.npy").with_name("a.npy.json").read_text())["weights_sha256"] == before
    with torch.no_grad():
        reference.model.head.bias += 1
    # Known before the change; not known after it.
    assert first.provenance.weights_sha256 == before
    assert second.provenance.weights_sha256 is None
    third = explain(reference, zoo.scenes()[0].image)
    assert third.provenance.weights_sha256 == digest(reference.model) != before


def test_the_hash_of_a_model_given_by_its_name_is_there_when_the_model_is_gone(tmp_path):
    found = explain("vit-mini", zoo.scenes()[0].image)
    gc.collect()
    with Image.open(found.save(tmp_path / "a.png")) as file:
        about = json.loads(file.text["captum-lnstat"])
    assert about["weights_sha256"] == digest(zoo.load("vit-mini").model)


def test_errors_name_the_file_that_was_asked_for(reference, tmp_path):
    found = explain(reference, zoo.scenes()[0].image)
    for name in ("nowhere/a.png", "nowhere/a.npy"):
        with pytest.raises(FileNotFoundError) as raised:
            found.save(tmp_path / name)
        assert str(raised.value) == f"[Errno 2] No such file or directory: '{tmp_path / name}'"
    with pytest.raises(ValueError, match=r"'a\.csv' is no kind of map; expected \.npy, \.npz, \.safetensors or \.png"):
        found.save(tmp_path / "a.csv", raw=True)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match="folder") as raised:
        found.save(tmp_path / "folder.png")
    assert ".part" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_an_address_is_no_file(reference):
    for address in ("https://example.org/cat.jpg", "s3://bucket/cat.jpg"):
        with pytest.raises(SourceError, match=f"'{address}' is an address; expected a file"):
            explain(reference, address)


def test_names_that_hold_what_was_asked_for_come_first():
    classes = ["crate", "coast", "polecat", "tabby, tabby cat", "cat shark", "vat"]
    assert near("cat", classes, "") == "did you mean 'tabby, tabby cat' or 'cat shark' or 'polecat'?"
    assert near("CAT", ["wild_cat"], "") == "did you mean 'wild_cat'?"
    assert near("vit", ["vit_tiny", "swin"], "") == "did you mean 'vit_tiny'?"
    assert near("at", ["cat"], "nothing") != "nothing"
    assert near("(", ["cat"], "nothing") == "nothing"


def test_a_predicted_class_is_never_ruled_out():
    flat = Prediction(1, np.full(1000, 0.001), ())
    (said,) = flat.faint(1)
    assert said.startswith("the model has hardly made up its mind: no class is likelier than class 1, confidence 0.1%")
    assert flat.faint(2)[0].startswith("the model all but rules class 2 out")


def test_what_is_no_family_is_not_registered():
    for wrong in (5, Topology.__init__, int, None):
        with pytest.raises(TypeError, match="expected a subclass of Topology"):
            register_topology(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain("vit-mini", zoo.scenes()[0].image).grid.shape == (8, 8)
