"""Plain encoders are found by structure, read as their head reads, and refused where something is not known."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers.contract import lively
from helpers.models import rule
from helpers.plain_checks import placed_where_the_stimulus_is
from helpers.plain_models import CASES, CLASSES, HUGGING_FACE, WIDTH, Headed, Own, pooled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution, RecordingError, UnsupportedModelError
from captum_lnstat.rules.engine import run
from captum_lnstat.topology import EncoderTopology, PlainTopology, find_topology
from captum_lnstat.topology.anatomy.parts import find_parts

pytestmark = pytest.mark.filterwarnings("ignore")

# One case of each build; every other case was run through the kit once.
PLACED = [
    "timm-beit",
    "timm-eva02",
    "timm-dinov3",
    "timm-odd-sizes",
    "timm-naflex-map",
    "timm-sam-mlp-head",
    "torchvision-vit",
    "own",
    *(name for name in ("hf-vit-bare-eager", "hf-dinov2-sdpa", "hf-clip-sdpa", "hf-siglip-sdpa") if name in CASES),
]
STEMS = ["timm-hybrid", "timm-hybrid-odd-sizes", "torchvision-vit-stem"]


@pytest.mark.parametrize("name", PLACED)
def test_the_map_lies_where_the_stimulus_is(name):
    placed_where_the_stimulus_is(CASES[name])


@pytest.mark.parametrize("name", STEMS)
def test_tokens_of_a_stem_lie_within_a_cell_of_what_they_see(name):
    """The fields of a stem's tokens overlap, and their centres need not be those of the cells."""
    case = CASES[name]
    model = case.build()
    x = case.images(1)
    before = run(model, model, x).trace.tokens[:, case.prefix :]
    for row in range(case.grid[0] - 1):
        for column in range(case.grid[1] - 1):
            seen = x.clone()
            top, left = row * case.patch[0], column * case.patch[1]
            seen[..., top : top + case.patch[0], left : left + case.patch[1]] += 3.0
            after = run(model, model, seen).trace.tokens[:, case.prefix :]
            change = (after - before).square().sum(-1).reshape(case.grid)
            at = divmod(int(change.argmax()), case.grid[1])
            assert abs(at[0] - row) <= 1
            assert abs(at[1] - column) <= 1


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("-eager")])
def test_a_subclass_of_another_name_is_recognised(name):
    case = CASES[name]
    model = case.build()
    expected = rule(model, "rollout", case.images())
    for part in list(model.modules()):
        if any(True for _ in part.children()) and not isinstance(
            part, nn.ModuleList | nn.Sequential | nn.MultiheadAttention
        ):
            part.__class__ = type("Renamed", (type(part),), {})
    found = rule(nn.Sequential(nn.Identity(), model), "rollout", case.images())
    assert torch.equal(found.grid, expected.grid)


def test_the_kernels_of_hugging_face_are_both_seen():
    """The cases named sdpa and eager do run another attention."""
    names = [case.name for case in HUGGING_FACE]
    if not names:
        pytest.skip("Hugging Face models need transformers")
    for name in names:
        model, x = CASES[name].build(), CASES[name].images()
        kinds = {type(block.site).__name__ for block in run(model, model, x).trace.blocks}
        assert kinds == {"FusedSite" if name.endswith("sdpa") else "SoftmaxSite"}


# How the head reads.


class Reader(nn.Module):
    """Tokens of a small encoder, given to a head of one's own."""

    def __init__(self, read: Any, classes: int = WIDTH) -> None:
        super().__init__()
        self.encoder = Own()
        self.encoder.say = nn.Identity()  # type: ignore[assignment]
        self.read, self.score = read, nn.Linear(classes, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        own = self.encoder
        scores: Tensor = self.score(self.read(own.mix(own.cut(x).flatten(2).mT + own.place)))
        return scores


def _weighted(tokens: Tensor) -> Tensor:
    return (tokens * torch.linspace(0, 1, tokens.shape[1], dtype=tokens.dtype)[:, None]).sum(1)


@pytest.mark.parametrize(
    ("read", "classes"),
    [
        (_weighted, WIDTH),
        (lambda t: t[:, 3:].mean(1), WIDTH),
        (lambda t: t.amax(1), WIDTH),
        (lambda t: t.flatten(1), 24 * WIDTH),
    ],
    ids=["weighted", "some", "max", "flat"],
)
def test_a_head_that_reads_patches_each_in_its_own_way_has_no_start_for_every_class(read, classes):
    model, x = lively(Reader(read, classes)), torch.randn(2, 3, 32, 48)
    with pytest.raises(UnsupportedModelError, match="neither as their mean nor through one attention"):
        LNStatAttribution(model, rule="rollout").relevance(x, 1)
    _, delta = LNStatAttribution(model, rule="evidence").attribute(x, target=1, return_convergence_delta=True)
    assert float(delta.abs().max()) < 1e-4 * max(1, float(model(x).detach().abs().max()))
    for kind in ("lnstat", "gradient"):
        assert bool(LNStatAttribution(model, rule=kind).relevance(x, 1).flatten(1).any(1).all())


def test_a_mean_is_seen_as_one_whatever_the_scale():
    model = lively(Reader(lambda tokens: 1e3 * tokens.sum(1)))
    assert LNStatAttribution(model).describe(torch.randn(2, 3, 32, 48)).pooling == "mean of the tokens"


def test_scores_that_leave_the_graph_are_refused():
    model = lively(Own())
    for kind in ("rollout", "evidence"):
        with pytest.raises(RecordingError, match="no gradient"):
            LNStatAttribution(lambda x: model(x).detach(), model, rule=kind).relevance(torch.randn(1, 3, 32, 48), 1)


# What is refused.


def test_a_block_that_adds_something_else_is_refused():
    """x = norm(x + attention(x)), then the MLP's update twice."""
    model = lively(Own(norm_first=False))
    layer = model.mix.layers[0]
    layer.norm2.register_forward_hook(lambda module, inputs, output: output + inputs[0])
    with pytest.raises(RecordingError, match="neither pre-norm nor post-norm"):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 32, 48), 1)


def test_patch_dictionaries_are_refused():
    model = CASES["timm-naflex"].build(torch.float32)
    patches = {
        "patches": torch.randn(1, 24, 192),
        "patch_coord": torch.zeros(1, 24, 2, dtype=torch.long),
        "patch_valid": torch.ones(1, 24, dtype=torch.bool),
    }
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        LNStatAttribution(model).attribute(patches, target=1)
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\)"):
        LNStatAttribution(model).attribute(patches["patches"], target=1)


def test_shifted_windows_in_one_list_are_refused():
    model = CASES["timm-sam"].build(torch.float32)
    model.blocks[0].shift_size = 1
    with pytest.raises((UnsupportedModelError, RecordingError)):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 32, 40), 1)


def test_windows_of_another_size_than_the_block_says_are_refused():
    model = CASES["timm-sam-no-neck"].build(torch.float32)
    block = model.blocks[0]
    forward = type(block).forward

    def with_other_windows(x: Tensor) -> Tensor:
        block.window_size = 4
        try:
            y: Tensor = forward(block, x)
        finally:
            block.window_size = 3
        return y

    block.forward = with_other_windows
    for module in block.modules():
        module.use_rel_pos = False
    with pytest.raises((UnsupportedModelError, RecordingError)):
        LNStatAttribution(model).relevance(torch.randn(1, 3, 32, 40), 1)


class Stray(nn.Module):
    """A convolution between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Own()
        self.between = nn.Conv2d(WIDTH, WIDTH, 1)
        nn.init.dirac_(self.between.weight)

    def forward(self, x: Tensor) -> Tensor:
        own = self.own
        x = own.mix.layers[0](own.cut(x).flatten(2).mT + own.place)
        x = self.between(x.mT.unflatten(2, (4, 6))).flatten(2).mT
        scores: Tensor = own.say(own.mix.norm(own.mix.layers[1](x)).mean(1))
        return scores


class Together(Stray):
    """The same where the convolution is part of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        between = self.between
        del self.between
        self.cut, self.layers, self.say = self.own.cut, self.own.mix.layers, self.own.say
        self.place, self.norm = self.own.place, self.own.mix.norm
        self.between = between
        del self.own

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](self.cut(x).flatten(2).mT + self.place)
        x = self.between(x.mT.unflatten(2, (4, 6))).flatten(2).mT
        scores: Tensor = self.say(self.norm(self.layers[1](x)).mean(1))
        return scores


@pytest.mark.parametrize("kind", [Stray, Together])
def test_a_convolution_between_the_blocks_is_refused(kind):
    with pytest.raises((UnsupportedModelError, RecordingError), match="between"):
        LNStatAttribution(lively(kind())).relevance(torch.randn(1, 3, 32, 48), 1)


@pytest.mark.parametrize(
    "name",
    ["mixer_s32_224", "resmlp_12_224", "gmlp_s16_224", "xcit_nano_12_p16_224", "poolformer_s12", "convnext_atto"],
)
def test_models_without_attention_from_token_to_token_are_refused(name):
    with pytest.raises(UnsupportedModelError, match="not a vision transformer of a known family"):
        find_topology(timm.create_model(name, device="meta"))


# What is asked first.


def test_what_is_known_of_timm_comes_before_the_structure():
    assert isinstance(find_topology(CASES["timm-deit3"].make()), PlainTopology)
    assert isinstance(find_topology(CASES["own"].make()), EncoderTopology)
    wrapped = nn.Sequential(nn.Conv2d(3, 3, 1), CASES["timm-deit3"].make())
    assert isinstance(find_topology(wrapped), PlainTopology)


def test_a_tower_beside_a_text_model_is_found():
    if not HUGGING_FACE:
        pytest.skip("Hugging Face models need transformers")
    model = CASES["hf-clip-classes-sdpa"].build()
    assert find_topology(model).model is model.vision_model
    assert isinstance(find_topology(Headed(model, pooled)), EncoderTopology)


def test_parts_of_a_block():
    block = nn.TransformerEncoderLayer(8, 2)
    parts = find_parts(block)
    assert parts is not None
    assert parts.out.module is block.self_attn.out_proj
    assert parts.scale is None
    block.gamma = nn.Parameter(torch.ones(8))
    found = find_parts(block)
    assert found is not None
    assert found.scale is block.gamma
    assert find_parts(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))) is None
    assert find_parts(nn.MultiheadAttention(8, 2)) is None


class _Joining(nn.Module):
    """A user's ViT that joins its class token where it is told to."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.patches = nn.Conv2d(3, 32, kernel_size=8, stride=8)
        self.extra = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList(Block(32, num_heads=2) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        extra = self.extra.expand(len(images), -1, -1)
        if self.order == "unseen":
            tokens = patches.new_empty(len(images), patches.shape[1] + 1, 32)
            tokens[:, :1], tokens[:, 1:] = extra, patches
        else:
            tokens = torch.cat([extra, patches] if self.order == "first" else [patches, extra], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, -1 if self.order == "last" else 0])


@pytest.mark.parametrize("order", ["first", "last"])
def test_tokens_joined_before_or_behind_the_patches(order: str) -> None:
    """The token that the head reads is found where it is, and no patch takes its place."""
    model, x = lively(_Joining(order)).double(), torch.randn(2, 3, 32, 32).double()
    found = rule(model, "evidence", x, torch.tensor([1, 1]))
    assert found.grid.shape == (2, 4, 4)
    assert found.prefix.shape == (2, 1)
    torch.testing.assert_close(found.total, model(x)[:, 1].detach())
    trace = run(model, model, x).trace
    at = 0 if order == "first" else 16
    assert trace.start("mean")[0].nonzero().flatten().tolist() == [at]
    torch.testing.assert_close(trace.off_grid(trace.tokens)[0], model.extra[0])
    patches = trace.on_grid(trace.tokens)
    torch.testing.assert_close(patches.permute(0, 3, 1, 2), model.patches(x))


@pytest.mark.parametrize(("order", "why"), [("unseen", "not joined by torch.cat")])
def test_tokens_joined_elsewhere_are_refused(order: str, why: str) -> None:
    for kind in ("lnstat", "rollout", "gradient"):
        with pytest.raises(UnsupportedModelError, match=why):
            LNStatAttribution(_Joining(order).eval(), rule=kind).attribute(torch.randn(1, 3, 32, 32), target=1)
