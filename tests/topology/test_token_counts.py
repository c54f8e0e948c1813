"""Blocks that return fewer tokens than they were given, and maps of other shapes: refused with what was seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers.models import enliven
from timm.models import pvt_v2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from captum_lnstat import LayerLNStat, LNStatAttribution
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.recording.recording import Recording
from captum_lnstat.rules import engine
from captum_lnstat.topology.plain import PlainTopology
from captum_lnstat.trace.trace import Trace

pytestmark = pytest.mark.filterwarnings("ignore")
RULES = ("lnstat", "evidence", "rollout", "gradient")


class Merging(Block):
    """As in token merging: pairs become their mean, between attention and MLP."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = torch.cat([x[:, :-4], (x[:, -4:-2] + x[:, -2:]) / 2], 1)
        return x + self.mlp(self.norm2(x))


class Choosing(Block):
    """As in EViT: the longest tokens go on."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        x = x + self.attn(self.norm1(x))
        best = x[:, 1:].norm(dim=-1).topk(x.shape[1] - 4).indices
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, best[..., None].expand(-1, -1, x.shape[-1]))], 1)
        return x + self.mlp(self.norm2(x))


class Dropping(Block):
    """Fewer tokens after the block."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x)[:, :-3]


class Narrowing(Block):
    """Fewer tokens before the block reads them."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return super().forward(x[:, :-3])


def vit(kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    settings = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5, "patch_size": 8}
    return enliven(kind(**{**settings, **options}), 0)  # type: ignore[return-value]


@pytest.mark.parametrize("block", [Merging, Choosing, Dropping, Narrowing])
@pytest.mark.parametrize("rule", RULES)
def test_a_block_that_loses_tokens_is_refused(block: type[Block], rule: str) -> None:
    left = {Merging: 15, Choosing: 14, Dropping: 14, Narrowing: 14}[block]
    seen = (
        rf"'blocks.0' was given \(1, 17, 24\) and returned \(1, {left}, 24\).*17 tokens of 24 channels and then {left}"
    )
    with pytest.raises(RecordingError, match=seen):
        LNStatAttribution(vit(block_fn=block), rule=rule).attribute(torch.rand(1, 3, 32, 32), target=1)


def test_a_layer_of_such_a_model_is_refused_too() -> None:
    model = vit(block_fn=Choosing)
    with pytest.raises(RecordingError, match="dropped or merged"):
        LayerLNStat(model, model.blocks[1]).attribute(torch.rand(1, 3, 32, 32), target=1)


@pytest.mark.parametrize("change", [lambda x: x[:, :12], lambda x: torch.cat([x, x[:, :2]], 1)])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_lost_or_added_between_blocks_are_refused(change: Callable[[Tensor], Tensor], rule: str) -> None:
    model = vit()
    model.blocks[1].register_forward_pre_hook(lambda module, given: (change(given[0]), *given[1:]))
    with pytest.raises(RecordingError, match=r"blocks.1 reads 1[29] tokens, and the step before it returned 17"):
        LNStatAttribution(model, rule=rule).attribute(torch.rand(1, 3, 32, 32), target=1)


def test_attention_among_channels_is_told() -> None:
    model = timm.create_model("edgenext_xx_small", num_classes=5).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"CrossCovarianceAttn at .* from channel to channel, 22 x 22 in each"
    ):
        LNStatAttribution(model).attribute(torch.rand(1, 3, 64, 64), target=1)


@pytest.mark.parametrize("error", [RuntimeError("sizes"), KeyError("name"), StopIteration(), AttributeError("no x")])
def test_no_error_of_ours_comes_out_of_a_topology(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PlainTopology, recording: Recording, size: tuple[int, int]) -> Trace:
        raise error

    monkeypatch.setattr(PlainTopology, "trace", broken)
    with pytest.raises(RecordingError, match="does not fit what its structure says, 'plain'") as raised:
        LNStatAttribution(vit()).attribute(torch.rand(1, 3, 32, 32), target=1)
    assert raised.value.__cause__ is error
    assert str(error.args[0] if error.args else "StopIteration") in str(raised.value)


@pytest.mark.parametrize("error", [UnsupportedModelError("this"), torch.OutOfMemoryError("that")])
def test_its_own_errors_come_out_as_they_are(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> Trace:
        raise error

    monkeypatch.setattr(PlainTopology, "trace", refusing)
    with pytest.raises(type(error)) as raised:
        engine.run(*[vit()] * 2, torch.rand(1, 3, 32, 32), [1])
    assert raised.value is error


def test_a_block_that_is_run_twice_is_told_from_a_model_that_is() -> None:
    model = vit()

    def twice(x: Tensor) -> Tensor:
        return model.forward_head(model.blocks[-1](model.forward_features(x)))

    with pytest.raises(
        RecordingError, match=r"'blocks\.2', where the head of VisionTransformer begins, ran more than once"
    ):
        LNStatAttribution(twice, model).attribute(torch.rand(1, 3, 32, 32), target=1)


class TurnedBlock(pvt_v2.Block):
    """A block that is given a map with its channels first and returns one, as an encoder for segmentation does."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        tokens = super().forward(x.flatten(2).transpose(1, 2), x.shape[2:])
        return tokens.transpose(1, 2).reshape(x.shape)


class TurnedStage(pvt_v2.PyramidVisionTransformerStage):
    def forward(self, x: Tensor) -> Tensor:
        x = (x if self.downsample is None else self.downsample(x)).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_maps_with_their_channels_first_are_read(rule: str) -> None:
    options = {"embed_dims": (16, 24, 32), "num_heads": (1, 2, 2), "depths": (1, 1, 2), "num_classes": 5}
    model, turned = (enliven(timm.create_model("pvt_v2_b0", **options), 0).double() for _ in range(2))
    for stage in turned.stages:
        stage.__class__ = TurnedStage
        for block in stage.blocks:
            block.__class__ = TurnedBlock
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(turned(x), model(x))
    found, expected = (LNStatAttribution(one, rule=rule).relevance(x, target=1) for one in (turned, model))
    torch.testing.assert_close(found, expected)
