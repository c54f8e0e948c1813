"""Values that are not those of the tokens they are taken for are refused; what each token does by itself is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers.models import enliven
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.errors import UnsupportedModelError

Move = Callable[[Tensor], Tensor]
WIDTH, GRID = 24, (4, 6)
RULES = ("lnstat", "evidence", "rollout", "gradient")


def vit(seed: int = 0) -> VisionTransformer:
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 7}
    model = VisionTransformer(**options)
    return enliven(model, seed).double().eval()  # type: ignore[return-value]


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def patches(move: Move) -> Move:
    """Of the patches alone, behind the class token."""
    return lambda tokens: torch.cat([tokens[:, :1], move(tokens[:, 1:])], 1)


def by_norm(tokens: Tensor) -> Tensor:
    return tokens.gather(1, tokens.norm(dim=-1).argsort(1)[..., None].expand_as(tokens))


def depthwise(tokens: Tensor) -> Tensor:
    kernel = torch.full((tokens.shape[-1], 1, 3, 3), 1 / 9, dtype=tokens.dtype)
    maps = tokens.transpose(1, 2).unflatten(2, GRID)
    return F.conv2d(maps, kernel, padding=1, groups=tokens.shape[-1]).flatten(2).transpose(1, 2)


MOVES: dict[str, tuple[Move, str]] = {
    "flip": (patches(lambda t: t.flip(1)), "are moved: 24 of 25 values"),
    "roll": (lambda t: t.roll(1, 1), "are moved"),
    "sort": (patches(by_norm), "are moved"),
    "some channels": (lambda t: torch.cat([t[..., :12], t[..., 12:].roll(1, 1)], -1), "are (mixed|moved)"),
    "neighbours": (lambda t: (t + t.roll(1, 1)) / 2, r"are mixed \(a sum\)"),
    "convolution": (patches(depthwise), "are mixed"),
    "convolution beside": (patches(lambda t: t + depthwise(t)), "are mixed"),
}


def hooked(model: nn.Module, move: Move, where: str, first: int = 0) -> nn.Module:
    """The model with its keys and values moved: by a hook on what makes them, or on what these are made of."""
    for block in model.blocks[first:]:  # type: ignore[index]
        if where == "qkv":
            block.attn.qkv.register_forward_hook(
                lambda _, __, out: torch.cat([out[..., :WIDTH], move(out[..., WIDTH:])], -1)
            )
        elif where == "norm":
            block.norm1.register_forward_hook(lambda _, __, out: move(out))
        else:
            block.attn.register_forward_pre_hook(lambda _, args: (move(args[0]), *args[1:]))
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "softmax"])
@pytest.mark.parametrize("where", ["qkv", "norm", "attention"])
@pytest.mark.parametrize("move", MOVES)
def test_moved_values_are_refused(move: str, where: str, fused: bool) -> None:
    made, reason = MOVES[move]
    model = hooked(vit(), made, where)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused
    with pytest.raises(UnsupportedModelError, match=rf"'blocks.0' is given .* tokens {reason}"):
        LNStatAttribution(model).relevance(images(), 1)


@pytest.mark.parametrize("move", ["flip", "convolution", "some channels"])
def test_of_every_block(move: str) -> None:
    model = hooked(vit(), MOVES[move][0], "qkv", first=1)
    with pytest.raises(UnsupportedModelError, match=r"'blocks.1' is given"):
        LNStatAttribution(model).relevance(images(), 1)


@pytest.mark.parametrize("change", ["hook", "forward", "image size"])
def test_what_changes_after_the_first_call_is_followed_again(change: str) -> None:
    """The values are followed once, as long as the model, the hooks on it and the images' size are the same."""
    model = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=7, dynamic_img_size=True
    )
    model, x = enliven(model, 0).double().eval(), images()
    attention = model.blocks[1].attn

    def moved(tokens: Tensor) -> Tensor:
        return tokens if change == "image size" and tokens.shape[1] == 25 else tokens.roll(1, 1)

    if change == "image size":
        attention.register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))
    method = LNStatAttribution(model)
    assert torch.equal(method.relevance(x, 1), method.relevance(x, 1))
    if change == "hook":
        attention.register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))
    elif change == "forward":
        own = attention.forward
        attention.forward = lambda tokens, *args, **named: own(moved(tokens), *args, **named)
    else:
        x = x[..., :32]
    with pytest.raises(UnsupportedModelError, match=r"'blocks.1' is given .* tokens are moved"):
        method.relevance(x, 1)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_refuses_them(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="tokens are moved"):
        LNStatAttribution(hooked(vit(), MOVES["roll"][0], "qkv"), rule=name).relevance(images(), 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "change",
    [lambda t: 1.5 * t, lambda t: t + t.mean(-1, keepdim=True), torch.clone],
    ids=["scaled", "shifted", "copied"],
)
def test_what_a_token_does_by_itself_is_read(change: Move, batch: int) -> None:
    x = images()[:batch]
    for where in ("qkv", "norm", "attention"):
        found = LNStatAttribution(hooked(vit(), change, where), rule="evidence").relevance(x, 1)
        assert found.isfinite().all()


def test_moved_keys_alone_change_no_place() -> None:
    """A weight is given to a value, whatever it was found by."""
    model = vit()
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda _, __, out: torch.cat([part.roll(int(k == 1), 1) for k, part in enumerate(out.chunk(3, -1))], -1)
        )
    _, delta = LNStatAttribution(model, rule="evidence").attribute(images(), 1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-9


def test_of_nn_multihead_attention_too() -> None:
    class Shifted(nn.MultiheadAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
            return super().forward(query, key, value.roll(1, 1), **options)

    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=7)
    enliven(model, 0).eval()
    x = torch.randn(2, 3, 32, 32)
    assert LNStatAttribution(model).relevance(x, 1).isfinite().all()
    for block in model.encoder.layers:
        block.self_attention.__class__ = Shifted
    with pytest.raises(UnsupportedModelError, match="tokens are moved"):
        LNStatAttribution(model).relevance(x, 1)


@pytest.mark.parametrize("windows", [True, False], ids=["shifted", "whole"])
def test_of_windows_too(windows: bool) -> None:
    """The roll of a shifted window is known; another one inside the window is not."""
    settings = {"img_size": 64, "patch_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}
    model = timm.models.swin_transformer.SwinTransformer(**settings, num_classes=7, window_size=4 if windows else 16)
    enliven(model, 0).eval()
    x = torch.randn(2, 3, 64, 64)
    before = LNStatAttribution(model).relevance(x, 1)
    assert torch.equal(LNStatAttribution(model).relevance(x, 1), before)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.register_forward_pre_hook(lambda _, args: (args[0].roll(1, 1), *args[1:]))
    with pytest.raises(UnsupportedModelError, match="tokens are moved"):
        LNStatAttribution(model).relevance(x, 1)
