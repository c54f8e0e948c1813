"""Models by name: how they are called, how their images are made, which weights they have."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from captum_lnstat.cli import Failure
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.evaluation.methods import build
from captum_lnstat.evaluation.subject import Scores, Subject, _transformers_frame, digest, read


@pytest.fixture(scope="module")
def hugging():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    return ViTForImageClassification(config)


def test_a_model_with_logits_is_called_for_its_scores(hugging):
    subject = Subject.of(hugging, Frame((32, 32), (32, 32)))
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
        ViTImageProcessor(size={"height": 40, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}),
    ],
)
def test_images_are_those_of_the_image_processor(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    frame = _transformers_frame(str(tmp_path), True, (1, 1))
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    image = Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    # The processor may resize tensors where this package resizes images: a few grey values apart.
    torch.testing.assert_close(frame.image(image), expected, rtol=0, atol=6 / 255 / 0.25)
    assert float((frame.image(image) - expected).abs().mean()) < 1 / 255 / 0.25


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
    assert read(name).frame.size == read(name, fit="squash").frame.scale == (224, 224)


def test_what_cannot_be_evaluated_is_said(tmp_path):
    with pytest.raises(Failure, match="--checkpoint is for models of the zoo and of timm"):
        read("torchvision:swin_t", checkpoint=tmp_path / "x.pth")
    with pytest.raises(TypeError, match=r"returns a tuple; expected \(batch, class\) scores"):
        Subject.of(Pair(), Frame((8, 8), (8, 8)))
    with pytest.raises(TypeError, match="returns a Tensor"):
        Subject.of(nn.Flatten(0), Frame((8, 8), (8, 8)))


class Pair(nn.Module):
    def forward(self, images):
        return images, images
