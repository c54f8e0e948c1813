"""Models by name: how they are called, how their images are made, which weights they have."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from captum_lnstat import SourceError, zoo
from captum_lnstat.evaluation.datasets import Sample
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.evaluation.methods import build
from captum_lnstat.evaluation.subject import Scores, Subject, digest, read


@pytest.fixture(scope="module")
def hugging():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return ViTForImageClassification(config)


def test_a_model_with_logits_is_called_for_its_scores(hugging):
    subject = Subject.of(hugging, Frame(create_transform(32, is_training=False)))
    assert isinstance(subject.forward, Scores)
    assert (subject.classes, subject.model.training) == (5, False)
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([0, 3])
    for method in build("lnstat,chefer,frozen-layernorm,ig(steps=2),saliency,gradcam,captum.attr:Saliency", subject):
        maps = method.maps(images, targets, ["a", "b"])
        assert maps.shape == (2, 32, 32)
        assert float(maps.abs().max()) > 0, method.name


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ],
)
def test_images_are_those_of_the_image_processor(tmp_path, hugging, processor):
    hugging.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    frame = read(f"hf:{tmp_path}", pretrained=True).frame
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    image = Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(frame.example(Sample("a", image)).image, expected)
    np.testing.assert_allclose(frame.mean, processor.image_mean, atol=1e-6)
    np.testing.assert_allclose(frame.std, processor.image_std, atol=1e-6)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "torchvision:swin_t", "vit-mini"])
def test_images_are_those_of_the_library(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), np.uint8))
    if name == "torchvision:swin_t":
        expected = torchvision.models.Swin_T_Weights.DEFAULT.transforms()(image)
    else:
        model = zoo.load(name).model if name in zoo.names() else timm.create_model(name)
        expected = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    assert torch.equal(read(name).frame.example(Sample("a", image)).image, expected)


def test_weights_are_told_apart(tmp_path):
    first, again = read("vit-mini"), read("vit-mini")
    assert first.digest == again.digest != read("swin-mini").digest
    state = {name: value.clone() for name, value in first.model.state_dict().items()}
    state["blocks.2.mlp.fc1.weight"][3, 5] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    other = read("vit-mini", checkpoint=tmp_path / "other.safetensors")
    assert other.digest != first.digest
    same = nn.Linear(2, 2, dtype=torch.float64)
    assert digest(same) == digest(same)
    assert digest(same) != digest(same.float())


def test_random_weights_come_from_the_seed():
    name = "helpers.slow_method:tiny_model"
    assert read(name, seed=1).digest == read(name, seed=1).digest != read(name, seed=2).digest
    assert read(name).classes == 3
    frames = read(name).frame, read(name, fit="squash").frame
    assert [frame.size for frame in frames] == [(224, 224)] * 2
    assert [frame.cut(500, 375) for frame in frames] == [((256, 341), 16, 58), ((224, 224), 0, 0)]


def test_what_cannot_be_evaluated_is_said(tmp_path):
    with pytest.raises(SourceError, match="--checkpoint is for models of the zoo and of timm"):
        read("torchvision:swin_t", checkpoint=tmp_path / "x.pth")
    with pytest.raises(TypeError, match=r"returns a tuple; expected \(batch, class\) scores"):
        Subject.of(Pair(), Frame(create_transform(8, is_training=False)))
    with pytest.raises(TypeError, match="returns a Tensor"):
        Subject.of(nn.Flatten(0), Frame(create_transform(8, is_training=False)))


class Pair(nn.Module):
    def forward(self, images):
        return images, images
