"""The shipped models and scenes: trained, exact, and small enough to ship."""

from importlib.resources import files

import pytest
import torch

from captum_lnstat import zoo

# Floors on the 240 single-object sample scenes; docs/reference-models.md has the figures on 5,000 fresh ones.
ACCURACY = {"swin-mini": 0.85, "vit-mini": 0.80}


@pytest.fixture(scope="module")
def scenes():
    return zoo.scenes()


@pytest.mark.parametrize("name", zoo.names())
def test_the_shipped_weights_are_trained(name, scenes):
    reference = zoo.load(name)
    single = [scene for scene in scenes if len(scene.labels) == 1]
    images = torch.stack([reference.transform(scene.image) for scene in single])
    with torch.no_grad():
        predicted = reference.model(images).argmax(1).tolist()
    right = sum(guess == scene.labels[0] for guess, scene in zip(predicted, single, strict=True))
    assert right / len(single) >= ACCURACY[name]
    assert not reference.model.training
    assert len(reference.class_names) == reference.model.num_classes == 7


@pytest.mark.parametrize("name", zoo.names())
def test_the_transform_maps_bytes_to_plus_minus_one(name, scenes):
    pixels = torch.frombuffer(bytearray(scenes[0].image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3)
    expected = pixels.permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(zoo.load(name).transform(scenes[0].image), expected, atol=1e-6, rtol=0)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no model 'resnet'; expected one of 'swin-mini', 'vit-mini'"):
        zoo.load("resnet")


def test_scenes_hold_what_they_say(scenes):
    assert len(scenes) == 400
    assert sum(len(scene.labels) == 2 for scene in scenes) == 160
    for scene in scenes:
        assert scene.image.size == (64, 64)
        assert scene.image.mode == "RGB"
        assert scene.masks.shape == (len(scene.labels), 64, 64)
        assert all(0 <= label < 7 for label in scene.labels)
        # The smallest items are sandals and trousers of 28 px: no mask is a stray pixel or the whole scene.
        assert ((scene.masks.sum((1, 2)) > 60) & (scene.masks.sum((1, 2)) < 1600)).all()
        if len(scene.labels) == 2:
            assert scene.labels[0] != scene.labels[1]
            assert not (scene.masks[0] & scene.masks[1]).any()


def test_boxes_are_the_tight_ones_of_the_masks(scenes):
    for scene in scenes[::40]:
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()


def test_the_object_is_brighter_than_the_dimmed_ground(scenes):
    # The masks are of these images: pasted items are on average brighter than photographs at half brightness.
    inside, outside = [], []
    for scene in scenes:
        pixels = torch.frombuffer(bytearray(scene.image.tobytes()), dtype=torch.uint8).reshape(64, 64, 3).float()
        mask = scene.masks.any(0)
        inside.append(pixels[mask].mean())
        outside.append(pixels[~mask].mean())
    assert torch.stack(inside).mean() > 1.5 * torch.stack(outside).mean()


def test_the_package_stays_small():
    folder = files("captum_lnstat.zoo")
    assert (folder / "scenes.npz").stat().st_size <= 6e6
    assert all((folder / "weights" / f"{name}.safetensors").stat().st_size <= 5e6 for name in zoo.names())
