"""Methods by name are the classes they say, and Grad-CAM is Captum's once its layer looks like an image."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, Occlusion, Saliency
from timm.data import create_transform
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import interpolate

from captum_lnstat import (
    AGCAM,
    RISE,
    AttCAT,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    HiResCAM,
    LeGrad,
    LibraGrad,
    LNStatAttribution,
    RawAttention,
    ViTCX,
)
from captum_lnstat.attribution.gradcam import GradCam, last_first_norm
from captum_lnstat.evaluation.frame import Frame
from captum_lnstat.evaluation.methods import Method, build, names
from captum_lnstat.evaluation.specs import parse
from captum_lnstat.evaluation.subject import Subject, read
from captum_lnstat.metrics import randomised

TARGETS = torch.tensor([1, 4])


@pytest.fixture(scope="module")
def subject():
    return read("vit-mini")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


DIRECT = {
    "lnstat": lambda model, x, t: LNStatAttribution(model).attribute(x, target=t),
    "lnstat(residual=update)": lambda model, x, t: LNStatAttribution(model, residual="update").attribute(x, target=t),
    "lnstat-contrastive": lambda model, x, t: LNStatAttribution(model, contrastive=True).attribute(x, target=t),
    "evidence": lambda model, x, t: LNStatAttribution(model, rule="evidence").attribute(x, target=t),
    "rollout": lambda model, x, t: LNStatAttribution(model, rule="rollout").attribute(x, target=t),
    "gradient": lambda model, x, t: LNStatAttribution(model, rule="gradient").attribute(x, target=t),
    "chefer": lambda model, x, t: GenericAttention(model).attribute(x, target=t),
    "attention-rollout": lambda model, x, t: AttentionRollout(model).attribute(x, target=t),
    "raw-attention(block=1)": lambda model, x, t: RawAttention(model, block=1).attribute(x, target=t),
    "frozen-layernorm": lambda model, x, t: FrozenLayerNorm(model).attribute(x, target=t),
    "libragrad": lambda model, x, t: LibraGrad(model).attribute(x, target=t),
    "libragrad-attcat": lambda model, x, t: LibraGrad(model, form="attcat").attribute(x, target=t),
    "libragrad-tokens": lambda model, x, t: LibraGrad(model, form="inputxgradient").attribute(x, target=t),
    "vitcx(distance=0.3)": lambda model, x, t: ViTCX(model, distance=0.3).attribute(x, target=t),
    "rise(masks=20)": lambda model, x, t: RISE(model, masks=20).attribute(x, target=t),
    "legrad": lambda model, x, t: LeGrad(model).attribute(x, target=t),
    "agcam": lambda model, x, t: AGCAM(model).attribute(x, target=t),
    "attcat": lambda model, x, t: AttCAT(model).attribute(x, target=t),
    "beyond-intuition(steps=2)": lambda model, x, t: BeyondIntuition(model, steps=2).attribute(x, target=t),
    "beyond-intuition-heads(steps=2)": lambda model, x, t: BeyondIntuition(
        model, approximation="head", steps=2
    ).attribute(x, target=t),
    "hirescam:blocks.1.norm1": lambda model, x, t: HiResCAM(model, model, "blocks.1.norm1").attribute(x, t),
    "ig(steps=3)": lambda model, x, t: IntegratedGradients(model).attribute(x, target=t, n_steps=3),
    "saliency": lambda model, x, t: Saliency(model).attribute(x, target=t),
    "saliency(abs=False)": lambda model, x, t: Saliency(model).attribute(x, target=t, abs=False),
    "captum.attr:Saliency(abs=False)": lambda model, x, t: Saliency(model).attribute(x, target=t, abs=False),
    "inputxgradient": lambda model, x, t: InputXGradient(model).attribute(x, target=t),
    "occlusion(window=32)": lambda model, x, t: Occlusion(model).attribute(
        x, target=t, sliding_window_shapes=(3, 32, 32), strides=(3, 16, 16)
    ),
}


@pytest.mark.filterwarnings("ignore:Input Tensor")  # Captum's, in the direct calls
@pytest.mark.filterwarnings("ignore:Setting forward")
def test_names_are_the_classes_they_say(subject, images):
    assert {re.split("[(:]", text)[0] for text in DIRECT} >= set(names()) - {"gradcam", "random", "centre"}
    for text, direct in DIRECT.items():
        (method,) = build(text, subject)
        expected = direct(subject.model, images.clone(), TARGETS).detach().sum(1)
        maps = method.maps(images, TARGETS, ["a", "b"])
        assert expected.std() > 0, text
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6, msg=text)


def test_the_random_map_hangs_on_the_name(subject, images):
    (method,) = build("random", subject)
    both = method.maps(images, TARGETS, ["a", "b"], 3)
    assert torch.equal(method.maps(images[:1], TARGETS[:1], ["b"], 3)[0], both[1])
    assert not torch.equal(method.maps(images, TARGETS, ["a", "b"], 4), both)
    assert not torch.equal(both[0], both[1])


def test_the_centre_is_a_gaussian_a_quarter_wide(subject, images):
    (method,) = build("centre", subject)
    (one, other) = method.maps(images, TARGETS, ["a", "b"])
    assert torch.equal(one, other)
    places = (torch.arange(64) + 0.5 - 32) / 16
    expected = torch.exp(-(places[:, None].square() + places.square()) / 2)
    torch.testing.assert_close(one, expected)


def test_a_method_on_another_model(subject, images):
    model = randomised(subject.model, ["head"])
    other = replace(subject, model=model, forward=model)
    for method in build("lnstat,captum.attr:Saliency", subject):
        (expected,) = build(method.name, other)
        maps = method.on(other).maps(images, TARGETS, ["a", "b"])
        assert torch.equal(maps, expected.maps(images, TARGETS, ["a", "b"]))
    with pytest.raises(ValueError, match="was made for one model"):
        Method("mine", lambda images, targets: images).on(other)


def test_nothing_is_left_on_the_callers_images(subject, images):
    given = images.clone()
    for method in build("ig(steps=2),inputxgradient,gradcam,captum.attr:InputXGradient,frozen-layernorm", subject):
        method.maps(given, TARGETS, ["a", "b"])
        assert torch.equal(given, images)
        assert not given.requires_grad
        assert given.grad is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lnsta", "unknown method 'lnsta'; did you mean 'lnstat'"),
        ("ig(stepps=3)", "'ig' has no option 'stepps'; expected n_steps or method or steps"),
        ("lnstat(depth=3)", "cannot be made: .*depth"),
        ("lnstat,lnstat", "named twice"),
        ("ig(3)", "expected key=value"),
        (" , ", "no method is named"),
        ("ig(steps=3", "is not understood"),
        ("occlusion(window=4,stride=5)", "expected 1 <= stride <= window"),
        ("captum.attr:Nothing", "cannot be imported"),
        ("captum.attr:visualization", "no class with a method attribute"),
        ("captum.attr:Saliency(steps=3)", "neither Saliency nor its attribute takes 'steps'"),
        ("captum.attr:LayerGradCam(layer=blocks.9)", "no attribute|has no"),
        ("gradcam:blocks.9.norm1", r"no module 'blocks\.9\.norm1'; the usual one is 'blocks\.3\.norm1'"),
    ],
)
def test_what_cannot_be_made_is_said(subject, text, message):
    with pytest.raises(ValueError, match=message):
        build(text, subject)


def test_a_map_of_another_size_is_refused(subject, images):
    (method,) = build("captum.attr:LayerGradCam(layer=patch_embed.proj)", subject)
    with pytest.raises(ValueError, match=r"returned \(1, 1, 8, 8\); expected the images' shape"):
        method.maps(images, TARGETS, ["a", "b"])


def test_specs_keep_commas_in_brackets():
    first, second = parse("a:b.c(x=1, y=(2, 3), z=word), d", "method")
    assert (first.name, first.options) == ("a:b.c", {"x": 1, "y": (2, 3), "z": "word"})
    assert (second.name, second.options) == ("d", {})


class Seen(nn.Module):
    """Tokens as they are, on the way through an image that Captum's layer method understands."""

    def __init__(self, grid, prefix):
        super().__init__()
        self.grid, self.prefix, self.image = grid, prefix, nn.Identity()

    def forward(self, tokens):
        if tokens.dim() == 4:
            return self.image(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        image = self.image(tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid))
        return torch.cat([tokens[:, : self.prefix], image.flatten(2).transpose(1, 2)], 1)


def tokens_of(family):
    """A non-square model, the name of a layer in it, a copy, and the module in the copy where the layer is an image."""
    torch.manual_seed(3)
    size = (32, 48)
    if family == "vit":
        model = VisionTransformer(
            img_size=size, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5, reg_tokens=2
        )
        seen, name = Seen((4, 6), 3), "blocks.1"
    else:
        model = SwinTransformer(
            img_size=size, patch_size=4, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2), num_classes=5
        )
        seen, name = Seen((4, 6), 0), "layers.1.blocks.1"
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    edited = deepcopy(model.eval())
    block = edited.get_submodule(name)
    block.norm1 = nn.Sequential(block.norm1, seen)
    return model, f"{name}.norm1", edited, seen.image


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_gradcam_is_captums_where_the_layer_is_an_image(family):
    model, name, edited, place = tokens_of(family)
    images = torch.randn(2, 3, 32, 48)
    grid = LayerGradCam(edited, place).attribute(images, target=TARGETS, relu_attributions=True)
    assert grid.shape == (2, 1, 4, 6)
    expected = interpolate(grid, (32, 48), mode="bilinear", align_corners=False)
    assert expected.std() > 0
    for text in (f"gradcam:{name}", "gradcam"):
        (method,) = build(
            text, Subject.of(model, Frame(create_transform((3, 32, 48), is_training=False, crop_pct=1.0)))
        )
        torch.testing.assert_close(method.maps(images, TARGETS, ["a", "b"]), expected[:, 0])


def test_gradcam_asks_for_the_grid_once(images):
    """One pass of the model a call: where its patches lie is known from the first."""
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=8, depth=2, num_heads=2, dynamic_img_size=True)
    passes = []
    model.eval().register_forward_pre_hook(lambda *_: passes.append(1))
    method = GradCam(model, model)
    counted = []
    for asked in (images, images, images[..., :32, :], images):
        method.attribute(asked, 1)
        counted.append(len(passes))
        passes.clear()
    assert counted == [2, 1, 2, 2]
    model.blocks[0].attn.scale *= 2  # another model
    method.attribute(images, 1)
    assert len(passes) == 2


def test_gradcam_at_a_convolution_is_captums(subject, images):
    layer = subject.model.patch_embed.proj
    for parameter in subject.model.parameters():
        parameter.requires_grad_(True)
    grid = LayerGradCam(subject.model, layer).attribute(images, target=TARGETS, relu_attributions=True)
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
    expected = interpolate(grid, (64, 64), mode="bilinear", align_corners=False)
    maps = GradCam(subject.forward, subject.model, "patch_embed.proj").attribute(images, TARGETS)
    torch.testing.assert_close(maps, expected.detach())


def test_gradcam_says_what_it_cannot_place(subject, images):
    assert last_first_norm(subject.model) == "blocks.3.norm1"
    with pytest.raises(ValueError, match="name a layer"):
        last_first_norm(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"layer 'head' returns \(2, 7\)"):
        GradCam(subject.forward, subject.model, "head").attribute(images, TARGETS)
    shared = nn.Sequential(conv := nn.Conv2d(3, 3, 1), conv, nn.Flatten(), nn.Linear(3 * 64 * 64, 5))
    with pytest.raises(ValueError, match="ran 2 times"):
        GradCam(shared, shared, "0").attribute(images, TARGETS)
