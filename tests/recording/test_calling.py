"""Modules called by keyword, and models that return their scores in something: the same maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers.contract import untouched
from helpers.models import enliven
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from captum_lnstat import GenericAttention, LayerLNStat, LNStatAttribution

RULES = ("lnstat", "evidence", "rollout", "gradient")


class ByKeyword(nn.Module):
    """A ViT whose parts are all called by keyword, as much code around Hugging Face's models does."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.vit._pos_embed(self.vit.patch_embed(x=image))
        for block in self.vit.blocks:
            tokens = block(x=tokens)
        scores: Tensor = self.vit.head(input=self.vit.norm(x=tokens)[:, 0])
        return scores


@dataclass
class Scores:
    logits: Tensor


class Cut(nn.Module):
    """Cuts its patches itself and reads them with a Linear, so that it is given the images as a whole."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(192, 24), nn.Sequential(*[Block(24, 2) for _ in range(2)])
        self.norm, self.head, self.returns = nn.LayerNorm(24), nn.Linear(24, 7), returns

    def forward(self, image: Tensor) -> Any:
        patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.returns(self.head(self.norm(self.blocks(self.embed(patches))).mean(1)))


def vit() -> VisionTransformer:
    made = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=2, num_classes=7)
    return enliven(made, 0).eval()  # type: ignore[return-value]


@pytest.mark.parametrize("make", [*RULES, GenericAttention], ids=[*RULES, "GenericAttention"])
def test_by_keyword_is_as_by_place(make: Any) -> None:
    plain, x = vit(), torch.randn(2, 3, 32, 48)
    model = ByKeyword(plain).eval()

    def method(model: nn.Module) -> Any:
        return LNStatAttribution(model, rule=make) if isinstance(make, str) else make(model)

    with untouched(model):
        found = method(model).relevance(x, 1)
    assert torch.equal(found, method(plain).relevance(x, 1))


def test_a_layer_by_keyword() -> None:
    plain, x = vit(), torch.randn(2, 3, 32, 48)
    model = ByKeyword(plain).eval()
    found = LayerLNStat(model, model.vit.blocks[0]).attribute(x, 1)
    assert torch.equal(found, LayerLNStat(plain, plain.blocks[0]).attribute(x, 1))


def test_hooks_of_the_users_are_called_as_they_were_registered() -> None:
    model, x, seen = ByKeyword(vit()).eval(), torch.randn(1, 3, 32, 48), list[tuple[str, ...]]()
    block = model.vit.blocks[0]
    block.register_forward_pre_hook(lambda _, args: seen.append(("before", str(len(args)))))
    block.register_forward_pre_hook(lambda _, args, named: seen.append(("before", *named)), with_kwargs=True)
    block.register_forward_hook(lambda _, args, out: seen.append(("after", str(len(args)))))
    block.register_forward_hook(lambda _, args, named, out: seen.append(("after", *named)), with_kwargs=True)
    with untouched(model):
        LNStatAttribution(model).relevance(x, 1)
    assert seen == [("before", "0"), ("before", "x"), ("after", "0"), ("after", "x")]


@pytest.mark.parametrize(
    ("returns", "output"),
    [
        (lambda scores: {"loss": None, "logits": scores}, "logits"),
        (lambda scores: [scores], 0),
        (lambda scores: (scores,), 0),
        (lambda scores: SimpleNamespace(logits=scores), "logits"),
        (Scores, "logits"),
    ],
    ids=["dict", "list", "tuple", "namespace", "dataclass"],
)
def test_scores_in_anything(returns: Callable[[Tensor], Any], output: Any) -> None:
    model, x = enliven(Cut(lambda scores: scores), 0).eval(), torch.randn(2, 3, 32, 48)
    wanted = LNStatAttribution(model).relevance(x, 1)
    model.returns = returns
    assert torch.equal(LNStatAttribution(model, output=output).relevance(x, 1), wanted)
