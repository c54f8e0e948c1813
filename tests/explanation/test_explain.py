"""``explain``: the same numbers as the long way, whatever the image comes in, and nothing silently wrong."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from captum_lnstat import LNStatAttribution, SourceError, explain, zoo
from captum_lnstat.explanation import explanation
from captum_lnstat.explanation.explanation import Explanation, Explanations, unique_names
from captum_lnstat.explanation.prediction import percent
from captum_lnstat.visualize.colors import outlined

SCENES = [scene.image for scene in zoo.scenes()[:3]]


@pytest.fixture(scope="module")
def swin() -> zoo.ReferenceModel:
    return zoo.load("swin-mini")


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """A small ViT that says its preprocessing: 64 of 80 pixels are seen."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    nn.init.normal_(model.head.weight)
    model.pretrained_cfg = {
        "input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.8, "interpolation": "bilinear",
        "label_names": ("ant", "bee", "cat, tomcat", "dog"),
    }  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    pixels = np.random.default_rng(1).integers(0, 255, (10, 16, 3), np.uint8)
    path = tmp_path_factory.mktemp("photos") / "garden.png"
    Image.fromarray(pixels).resize((320, 200), Image.Resampling.BICUBIC).save(path)
    return path


def test_the_map_is_that_of_the_long_way(swin):
    inputs = swin.transform(SCENES[0])[None]
    found = explain(swin, SCENES[0], target="bag")
    lnstat = LNStatAttribution(swin.model)
    np.testing.assert_allclose(found.grid, lnstat.relevance(inputs, 5)[0], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found.relevance, lnstat.attribute(inputs, 5)[0].sum(0), rtol=1e-4, atol=1e-8)
    likely = swin.model(inputs).softmax(1)[0].detach().numpy()
    np.testing.assert_allclose(found.probabilities, likely, rtol=1e-5)
    assert (found.target, found.prediction) == (5, int(likely.argmax()))
    assert found.confidence == pytest.approx(float(likely[5]), rel=1e-5)
    assert found.top(2)[0] == (found.label(found.prediction), pytest.approx(float(likely.max()), rel=1e-5))
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(SCENES[0]))


def test_without_a_target_it_is_the_predicted_class(swin):
    found = explain(swin, SCENES[1])
    assert found.target == found.prediction == int(swin.model(swin.transform(SCENES[1])[None]).argmax())
    assert str(found).startswith(f"image: predicted {found.label(found.target)}, ")


def test_rules_and_options_are_those_of_the_attribution(swin):
    inputs = swin.transform(SCENES[0])[None]
    found = explain(swin, SCENES[0], 3, rule="evidence", residual="half")
    expected = LNStatAttribution(swin.model, rule="evidence", residual="half").relevance(inputs, 3)[0]
    np.testing.assert_allclose(found.grid, expected, rtol=1e-4, atol=1e-7)
    assert found.signed
    with pytest.raises(ValueError, match="rule is 'nope'"):
        explain(swin, SCENES[0], rule="nope")  # type: ignore[call-overload]


def test_a_name_a_module_and_a_reference_model_are_one_model(swin):
    names = [explain(model, SCENES[0]) for model in ("swin-mini", swin, swin.model)]
    for other in names[1:]:
        np.testing.assert_allclose(other.grid, names[0].grid, rtol=1e-5, atol=1e-8)
        assert other.class_names == names[0].class_names == swin.class_names


def test_paths_pictures_and_arrays_are_one_image(vit, photo):
    with Image.open(photo) as file:
        picture = file.convert("RGB")
    forms = [
        photo,
        str(photo),
        picture,
        np.asarray(picture),
        torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy()),
    ]
    found = [explain(vit, form) for form in forms]
    for other in found[1:]:
        np.testing.assert_allclose(other.grid, found[0].grid, rtol=1e-5)
    assert [each.name for each in found] == ["garden", "garden", "image", "image", "image"]
    assert found[0].original is not None
    assert found[0].original.size == (320, 200)


def test_a_floating_tensor_goes_to_the_model_as_it_is(vit, photo):
    from_file = explain(vit, photo)
    inputs = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))(Image.open(photo))
    found = explain(vit, inputs)
    assert isinstance(found, Explanation)
    np.testing.assert_allclose(found.grid, from_file.grid, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(from_file.image))
    assert found.original is None
    with pytest.raises(SourceError, match="there is no original image"):
        _ = found.on_original
    batch = explain(vit, torch.stack([inputs, inputs.flip(-1)]))
    assert isinstance(batch, Explanations)
    np.testing.assert_allclose(batch[0].grid, found.grid, rtol=1e-4)


def test_batches_give_what_single_images_give(swin):
    one_by_one = [explain(swin, image, target) for image, target in zip(SCENES, (1, "bag", None), strict=True)]
    for size in (1, 2, 8):
        together = explain(swin, SCENES, [1, "bag", None], batch_size=size)
        assert len(together) == 3
        for each, alone in zip(together, one_by_one, strict=True):
            assert each.target == alone.target
            np.testing.assert_allclose(each.grid, alone.grid, rtol=1e-4, atol=1e-6)
    assert [each.target for each in explain(swin, SCENES, "dress")] == [3, 3, 3]


def test_images_of_several_sizes_are_explained_each_at_its_own(swin):
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=2, dynamic_img_size=True
    ).eval()
    found = explain(
        model,
        [torch.rand(3, 32, 32), torch.rand(3, 48, 32), torch.rand(3, 48, 32)],
        transform=swin.transform,
        rule="evidence",
    )
    assert [each.grid.shape for each in found] == [(2, 2), (3, 2), (3, 2)]


def test_the_overlay_is_of_what_the_model_saw_and_fits_the_original(vit, photo):
    found = explain(vit, photo, rule="rollout")
    assert found.overlay.size == found.image.size == (64, 64)
    assert found.on_original.size == (320, 200)
    # 64 of 80 pixels of the shorter side, so 160 of 200, in the middle.
    np.testing.assert_allclose(found.box, (80, 20, 240, 180), atol=0.6)
    pixels = np.asarray(found.on_original).astype(int)
    outside = np.ones((200, 320), bool)
    outside[19:181, 79:241] = False
    assert np.ptp(pixels[outside], axis=1).max() <= 1  # grey, no colour where the model saw nothing


def test_a_large_original_is_drawn_in_parts_that_do_not_show(vit, photo, monkeypatch):
    found = explain(vit, photo, rule="evidence")
    whole = np.asarray(found.on_original)
    monkeypatch.setattr(explanation, "_PIXELS", 7 * 320 + 5)
    parts = np.asarray(explain(vit, photo, rule="evidence").on_original)
    np.testing.assert_array_equal(parts, whole)


def test_the_contour_on_the_original_is_that_of_the_whole_map(vit, photo, monkeypatch):
    monkeypatch.setattr(explanation, "_PIXELS", 7 * 320 + 5)  # drawn in parts
    found = explain(vit, photo)
    black, white = outlined(found.values_on_original)
    plain, lined = np.asarray(found.on_original), np.asarray(found.with_look(contour=True).on_original)
    assert (lined[white] == 255).all()
    assert (lined[black] == 0).all()
    np.testing.assert_array_equal(lined[~black & ~white], plain[~black & ~white])
    seen = np.isfinite(found.values_on_original)
    assert white.any()
    assert not (white & ~seen).any()


def test_a_sheet_shows_what_the_model_saw_of_the_photograph(vit, photo):
    found = explain(vit, photo)
    left, top, right, bottom = (round(edge) for edge in found.box)
    edges = found.framed[(top + bottom) // 2, [left, right - 1]]
    np.testing.assert_array_equal(edges, 0)
    assert explain(vit, photo, whole=True).framed is None
    assert explain(vit, torch.rand(3, 64, 64)).framed is None


def test_a_hot_patch_is_hot_at_its_pixels_of_the_original(vit, photo):
    found = explain(vit, photo, rule="rollout")
    for row, column in ((0, 0), (0, 3), (3, 0), (2, 1)):
        grid = np.zeros((4, 4))
        grid[row, column] = 1
        hot = Explanation(**{**{name: getattr(found, name) for name in found.__dataclass_fields__}, "grid": grid})
        hot = hot.with_look(grey=True)
        pixels = np.asarray(hot.on_original).astype(int)
        colored = np.argwhere(np.ptp(pixels, axis=2) > 40)
        middle = colored.mean(0)
        # A patch is 40 px of the photograph; at the border of the box the blob is cut off and its middle moves in.
        assert abs(middle[0] - (20 + 40 * row + 20)) < 12
        assert abs(middle[1] - (80 + 40 * column + 20)) < 12


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (1, 4)])
def test_patches_of_an_image_that_is_not_square_and_ends_between_patches(row, column):
    """100 x 70 px of 4 x 6 patches of 16 px, twice as large in the photograph, 10 px from its corner."""
    grid = np.zeros((4, 6))
    grid[row, column] = 1
    original = Image.new("RGB", (230, 180), "grey")
    found = Explanation(
        name="a", rule="lnstat", target=0, prediction=0, probabilities=None, class_names=(), grid=grid,
        relevance=np.zeros((70, 100)), image=Image.new("RGB", (100, 70)), original=original, box=(10, 20, 210, 160),
        patch=(16, 16),
    )  # fmt: skip
    pixels = np.asarray(found.on_original).astype(int)
    hottest = np.argwhere(pixels.sum(2) == pixels.sum(2).max())
    np.testing.assert_allclose(hottest.mean(0) + 0.5, (20 + 32 * (row + 0.5), 10 + 32 * (column + 0.5)), atol=17)
    colored = np.argwhere(np.ptp(pixels, axis=2) > 40)
    assert (colored.min(0) >= (20 + 32 * row - 32, 10 + 32 * column - 32)).all()
    assert (colored.max(0) <= (20 + 32 * row + 64, 10 + 32 * column + 64)).all()
    assert np.ptp(pixels[20 + 128 + 1 :], axis=2).max() <= 1  # rows that no patch covers


def test_the_whole_image_is_seen_if_asked_for(vit, photo):
    found = explain(vit, photo, whole=True, rule="evidence")
    assert found.box == (0, 0, 320, 200)
    assert found.image.size == (64, 64)


def test_a_transform_that_turns_images_has_no_place_on_the_original(vit, photo):
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    found = explain(vit, photo, transform=lambda image: transform(image).flip(-1))
    assert found.box is None
    assert found.overlay.size == (64, 64)
    with pytest.raises(SourceError, match="cannot be placed on the original"):
        _ = found.on_original


def test_a_transform_and_names_given_override_the_model_s(vit, photo):
    black = explain(vit, photo, transform=lambda image: torch.full((3, 64, 64), -1.0), rule="evidence", target=1)
    expected = LNStatAttribution(vit, rule="evidence").relevance(torch.full((1, 3, 64, 64), -1.0), 1)[0]
    np.testing.assert_allclose(black.grid, expected.detach(), rtol=1e-4)
    assert explain(vit, photo, "d", class_names=list("abcd")).target == 3
    assert explain(vit, photo, "tomcat").target == 2
    with pytest.raises(SourceError, match="class_names holds 2 names"):
        explain(vit, photo, class_names=["a", "b"])


def test_what_is_not_certain_is_warned_of(photo, monkeypatch):
    class Bare(timm.models.VisionTransformer):
        """Not one of timm's own: it says nothing of its images."""

    bare = Bare(img_size=224, patch_size=56, embed_dim=16, depth=1, num_heads=1, num_classes=2).eval()
    with pytest.warns(UserWarning, match="Bare does not say how its images were prepared; the usual one for ImageNet"):
        explain(bare, photo, rule="evidence")
    bare.pretrained_cfg = {"input_size": (3, 224, 224)}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: bare)
    with pytest.warns(UserWarning, match="weights of deit_tiny_patch16_224 are random") as caught:
        explain("deit_tiny_patch16_224", photo, rule="evidence")
    assert caught[0].filename == __file__
    bare.train()
    with pytest.warns(UserWarning, match="train mode"):
        explain(bare, photo, rule="evidence")


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((3, SCENES[0]), {}, "model is a int; expected"),
        (("swin-mny", SCENES[0]), {}, "did you mean 'swin-mini'"),
        (("swin-mini", SCENES[0], "troser"), {}, "did you mean 'trouser'"),
        (("swin-mini", SCENES[0], 7), {}, "expected an index, 0 to 6"),
        (("swin-mini", SCENES[0], [1]), {}, r"target is \[1\] for 1 image;"),
        (("swin-mini", SCENES[:2], [1]), {}, r"target is \[1\] for 2 images"),
        (("swin-mini", SCENES[0], True), {}, "a target is True"),
        (("swin-mini", SCENES[0]), {"transform": 3}, "transform is a int"),
        (("swin-mini", SCENES[0]), {"transform": lambda image: image, "whole": True}, "exclude each other"),
        ((zoo.architecture("vit-mini"), SCENES[0]), {"pretrained": True}, "given by its name"),
    ],
)
def test_a_mistake_is_said_plainly(arguments, options, says):
    with pytest.raises(SourceError, match=says):
        explain(*arguments, **options)


def test_a_model_with_one_score_has_no_probability(photo):
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=1, num_classes=1
    ).eval()
    found = explain(model, torch.rand(3, 32, 32), transform=lambda image: torch.zeros(3, 32, 32), rule="evidence")
    assert found.probabilities is None
    assert found.confidence is None
    assert found.top() == ()
    assert "score only" in str(found)


def test_pictures_are_written_whole_or_not_at_all(swin, tmp_path, monkeypatch):
    found = explain(swin, SCENES[0])
    assert found.save(tmp_path / "a.png") == tmp_path / "a.png"
    with Image.open(tmp_path / "a.png") as file:
        np.testing.assert_array_equal(np.asarray(file), np.asarray(found.overlay))
    with pytest.raises(ValueError, match=r"'a\.nope' is no kind of image"):
        found.save(tmp_path / "a.nope")

    def interrupt(self, file, format, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        found.save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").stat().st_size > 500


def test_several_are_written_into_a_folder(swin, tmp_path):
    found = explain(swin, [SCENES[0]] * 2)
    assert [path.name for path in found.save(tmp_path / "new")] == ["image-0.png", "image-1.png"]
    with Image.open(io.BytesIO(found._repr_png_())) as strip:
        assert strip.size == (2 * 224 + 4, 224)
    with Image.open(io.BytesIO(found[0]._repr_png_())) as one:
        assert one.size == (64, 64)


def test_numbers_for_machines_are_plain(swin):
    record = json.loads(json.dumps(explain(swin, SCENES[0]).to_dict()))
    assert record["target_name"] in swin.class_names
    assert np.asarray(record["grid"]).shape == (16, 16)
    assert record["box"] == [0, 0, 64, 64]


def test_small_words():
    assert percent(0.0004) == "below 0.1%"
    assert percent(0.0014) == "0.1%"
    assert unique_names(["a", "a", "a-2", "a"]) == ["a", "a-3", "a-2", "a-4"]


def test_models_of_hugging_face_and_torchvision_explain_photographs(photo, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    found = explain(model, photo, "dog", rule="evidence")
    assert (found.label(found.target), found.grid.shape, found.box) == ("dog (1)", (4, 4), (0, 0, 320, 200))
    with Image.open(photo) as file:
        inputs = processor(images=file.convert("RGB"), return_tensors="pt")["pixel_values"]
    expected = LNStatAttribution(model, rule="evidence").relevance(inputs, 1)[0]
    np.testing.assert_allclose(found.grid, expected, rtol=1e-3, atol=1e-6)

    model = torchvision.models.VisionTransformer(64, 16, 1, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    with pytest.warns(UserWarning, match="VisionTransformer does not say how its images were prepared"):
        found = explain(model, photo, 2, rule="rollout")
    assert (found.grid.shape, found.image.size, found.class_names) == ((4, 4), (64, 64), ())
