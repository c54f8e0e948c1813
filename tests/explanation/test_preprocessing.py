"""Every library's own preprocessing, against that library's own code; names of classes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from captum_lnstat import SourceError, zoo
from captum_lnstat.explanation.subject.classes import class_count, class_names_of, find_class
from captum_lnstat.explanation.subject.preprocessing import image_size, preprocessing_of, preprocessing_of_weights

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).resize((450, 300))


def deit() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224", depth=1).eval()


def test_timm_models_say_their_own():
    model = deit()
    ours = preprocessing_of(model)
    expected = timm.data.create_transform(**resolve_model_data_config(model), is_training=False)(PHOTO)
    assert not ours.assumed
    assert torch.equal(ours.transform(PHOTO), expected)
    assert torch.equal(preprocessing_of(torch.nn.DataParallel(model)).transform(PHOTO), expected)


def test_a_timm_model_made_for_another_size_gets_that_size():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=(96, 160))
    inputs = preprocessing_of(model).transform(PHOTO)
    assert inputs.shape == (3, 96, 160)
    assert model.eval()(inputs[None]).shape == (1, 1000)


def test_a_model_of_the_zoo_alone_says_the_same_as_the_zoo():
    reference = zoo.load("vit-mini")
    scene = zoo.scenes()[0].image
    assert torch.equal(preprocessing_of(reference.model).transform(scene), reference.transform(scene))
    assert class_names_of(reference.model) == reference.class_names


def test_torchvision_weights_bring_their_transform_and_a_bare_model_does_not():
    weights = torchvision.models.Swin_V2_T_Weights.DEFAULT
    assert torch.equal(preprocessing_of_weights(weights).transform(PHOTO), weights.transforms()(PHOTO))
    model = torchvision.models.VisionTransformer(64, 16, 1, 2, 16, 32, num_classes=4)
    ours = preprocessing_of(model)
    assert ours.assumed
    assert ours.transform(PHOTO).shape == (3, 64, 64)
    assert class_count(model) == 4
    assert class_names_of(model) == ()


def test_the_usual_one_is_imagenet_s():
    inputs = preprocessing_of(nn.Linear(1, 1)).transform(Image.new("RGB", (300, 400), (255, 0, 0)))
    assert inputs.shape == (3, 224, 224)
    np.testing.assert_allclose(inputs[:, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], atol=1e-5)


def hugging_face(folder, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        **options,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    return transformers, transformers.ViTForImageClassification.from_pretrained(folder)


def test_hugging_face_s_processor_lies_next_to_the_weights(tmp_path):
    transformers, model = hugging_face(tmp_path, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    assert class_names_of(model) == ("cat", "dog")
    assert preprocessing_of(model).assumed  # there is none yet
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(tmp_path)
    ours = preprocessing_of(model)
    assert not ours.assumed
    expected = processor(images=PHOTO, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(ours.transform(PHOTO), expected, atol=1e-5)


def test_the_whole_image_is_squeezed_and_normalised_as_the_rest():
    ours = preprocessing_of(deit())
    whole = ours.whole().transform(PHOTO)
    assert whole.shape == ours.transform(PHOTO).shape
    plain = Image.new("RGB", (450, 300), (10, 200, 90))
    assert torch.allclose(ours.whole().transform(plain), ours.transform(plain), atol=2e-3)
    # The left border, which the crop loses, is in the first column.
    striped = PHOTO.copy()
    striped.paste((255, 255, 255), (0, 0, 20, 300))
    assert not torch.allclose(ours.whole().transform(striped)[:, :, :8], whole[:, :, :8])
    assert torch.allclose(ours.transform(striped), ours.transform(PHOTO))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (SimpleNamespace(image_size=96), (96, 96)),
        (SimpleNamespace(config=SimpleNamespace(image_size=[32, 64])), (32, 64)),
        (SimpleNamespace(patch_embed=SimpleNamespace(img_size=(8, 16))), (8, 16)),
        (SimpleNamespace(), (224, 224)),
    ],
)
def test_the_size_is_where_the_model_keeps_it(model, size):
    assert image_size(model) == size


def test_names_of_imagenet_only_for_as_many_classes():
    assert class_names_of(deit())[207].startswith("golden retriever")
    assert class_names_of(timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=3)) == ()
    tuned = zoo.load("vit-mini").model
    tuned.reset_classifier(3)
    assert class_names_of(tuned) == ()


def test_names_that_nobody_gave_are_none(tmp_path):
    _, model = hugging_face(tmp_path, num_labels=3)
    assert class_count(model) == 3
    assert class_names_of(model) == ()


@pytest.mark.parametrize(
    ("wanted", "names", "count", "says"),
    [
        (True, (), 2, "a target is True; expected the index or the name"),
        (1.0, (), 2, r"a target is 1\.0"),
        (2, (), 2, "there is no class 2; expected an index, 0 to 1"),
        (-1, (), None, "there is no class -1; expected an index$"),
        ("cat", (), 2, "names of this model's classes are not known; give an index, 0 to 1"),
        ("cats", ("cat", "dog"), 2, "did you mean 'cat'"),
        ("zebra", ("cat", "dog"), 2, "expected one of cat, dog"),
        ("crane", ("crane, bird", "crane, machine"), 2, "give one of the indices 0, 1"),
    ],
)
def test_a_class_that_is_not_there_or_there_twice(wanted, names, count, says):
    with pytest.raises(SourceError, match=says):
        find_class(wanted, names, count)
