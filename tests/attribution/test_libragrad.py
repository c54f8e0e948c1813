"""LibraGrad against every bias as a leaf of its own, and against a ViT that is written out."""

from __future__ import annotations

import pytest
import torch
from attribution.test_baselines import attention_by_hand, norm_by_hand, vit_by_hand
from helpers.contract import images as noise
from helpers.contract import swin, untouched, vit
from helpers.hierarchical_models import pvt_v2
from helpers.libra_oracle import Libra
from helpers.models import CASES, SWINS, VITS, build, images, targets
from helpers.oracles import dense
from torch import Tensor

from captum_lnstat import AttCAT, FrozenLayerNorm, LibraGrad, UnsupportedModelError

FORMS = ["fullgrad+", "attcat", "inputxgradient"]
NAMES = [
    "vit-class",
    "vit-avg",
    "vit-registers",
    "vit-distilled",
    "vit-layer-scale",
    "vit-res-post",
    "vit-dynamic-pad",
    "swin1-padded-7",
    "swin1-odd-grids",
    "swin1-shift-fused",
    "swin2-padded-4",
    "swin2-odd-grids",
]


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


def on_grid(tokens: Tensor, name: str) -> Tensor:
    case = CASES[name]
    return tokens[:, case.prefix :].reshape(len(tokens), *case.grid)


@pytest.mark.parametrize("name", [*VITS, *SWINS])
def test_every_form_is_what_the_leaves_say(name):
    target = targets(2)
    oracle = Libra(name, target)
    with untouched(oracle.model, oracle.x):
        found = {form: LibraGrad(oracle.model, form=form).relevance(oracle.x, target) for form in FORMS}
    assert close(found["inputxgradient"], on_grid(oracle.inputs[0], name))
    assert close(found["fullgrad+"], on_grid(oracle.full_gradient(), name))
    # Biases matter: the inputs of the layers alone are another map.
    inputs = oracle.lowered([(0, oracle.inputs[0]), *enumerate(oracle.inputs)])
    assert not torch.allclose(found["fullgrad+"], on_grid(inputs, name), rtol=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("swin2")])
def test_attcat_weighs_with_attention(name):
    target, oracle = targets(2), Libra(name, targets(2))
    expected = oracle.attentive(dense(name).blocks)
    found = LibraGrad(build(name), form="attcat").relevance(images(CASES[name]), target)
    assert close(found, on_grid(expected, name))
    assert not close(AttCAT(build(name)).relevance(images(CASES[name]), target), found)


def test_full_gradient_of_a_vit_written_by_hand():
    """All of it, the embedding's biases too: input times gradient of the pixels, of every layer and of every bias."""
    model, x, target = build("vit-class"), images(CASES["vit-class"]), targets(2)
    leaves: list[tuple[Tensor, bool]] = []

    def leaf(bias: Tensor, like: Tensor) -> Tensor:
        leaves.append((bias.detach().expand_as(like).clone().requires_grad_(), False))
        return leaves[-1][0]

    def norm(module, tokens):
        return norm_by_hand(module, tokens) - module.bias + leaf(module.bias, tokens)

    def linear(module, tokens):
        y = tokens @ module.weight.T
        return y + leaf(module.bias, y)

    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).clone()
    patches.requires_grad_()
    tokens = patches @ model.patch_embed.proj.weight.flatten(1).T
    tokens = tokens + leaf(model.patch_embed.proj.bias, tokens)
    tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], 1)
    tokens = tokens + leaf(model.pos_embed, tokens)
    inputs = []
    for block in model.blocks:
        inputs.append(tokens)
        n = norm(block.norm1, tokens)
        values = n @ block.attn.qkv.weight[48:].T
        values = values + leaf(block.attn.qkv.bias[48:], values)
        # What attention_by_hand says, from values that were made here.
        a = attention_maps(block.attn, n.detach())
        mixed = (a @ values.reshape(2, -1, 3, 8).transpose(1, 2)).transpose(1, 2).flatten(2)
        update = linear(block.attn.proj, mixed)
        assert torch.allclose(update, attention_by_hand(block.attn, n))
        tokens = tokens + update
        hidden = linear(block.mlp.fc1, norm(block.norm2, tokens))
        gate = (0.5 * (1 + torch.erf(hidden / 2**0.5))).detach()
        tokens = tokens + linear(block.mlp.fc2, hidden * gate)
    logits = norm_by_hand(model.norm, tokens)[:, 0] @ model.head.weight.T + model.head.bias
    assert torch.allclose(logits, vit_by_hand(model, x))
    every = [patches, *inputs, *(one for one, _ in leaves)]
    slopes = torch.autograd.grad(logits[torch.arange(2), target].sum(), every)
    expected = torch.zeros(2, 16, dtype=torch.float64)
    for one, slope in zip(every, slopes, strict=True):
        expected += (one.detach() * slope).sum(-1)[:, -16:]
    assert close(LibraGrad(model).relevance(x, target), expected.reshape(2, 4, 4))


def attention_maps(attn, x: Tensor) -> Tensor:
    q, k, _ = (x @ attn.qkv.weight.T + attn.qkv.bias).split(24, -1)
    q, k = (part.reshape(2, -1, 3, 8).transpose(1, 2) for part in (q, k))
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1).detach()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [vit, swin])
def test_a_batch_is_its_images(make, form):
    model, x, target = make().double(), noise(3).double(), torch.tensor([0, 3, 1])
    method = LibraGrad(model, form=form)
    whole = method.attribute(x, target)
    one_by_one = torch.cat([method.attribute(x[i : i + 1], int(target[i])) for i in range(3)])
    assert torch.allclose(whole, one_by_one, rtol=1e-9, atol=1e-12)
    assert whole.shape == x.shape
    assert torch.allclose(whole.sum((1, 2, 3)), method.relevance(x, target).sum((1, 2)))


def test_the_tokens_hold_what_the_pixels_hold_and_the_embedding_adds():
    """Without an embedding that adds anything, input x gradient at the tokens is that of the pixels of a patch."""
    model, x, target = build("swin1-shift"), images(CASES["swin1-shift"]), targets(2)
    with torch.no_grad():
        model.patch_embed.proj.bias.zero_()
    model.patch_embed.norm = torch.nn.Identity()
    pixels = FrozenLayerNorm(model).relevance(x, target)
    assert close(LibraGrad(model, form="inputxgradient").relevance(x, target), pixels)


def test_a_form_that_is_not_there():
    with pytest.raises(ValueError, match=r"form is 'fullgrad'; expected one of 'fullgrad\+', 'attcat', 'inputx"):
        LibraGrad(vit(), form="fullgrad")


def test_a_model_whose_blocks_pool_their_tokens_is_refused():
    model, x = pvt_v2().eval(), noise(1, 64)
    with untouched(model, x), pytest.raises(UnsupportedModelError, match="LibraGrad is not defined"):
        LibraGrad(model).attribute(x, target=1)
