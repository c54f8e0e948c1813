"""Tokens that are not in the order of the image's rows are put back where they came from, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.models import enliven, rule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.errors import RecordingError, UnsupportedModelError
from captum_lnstat.rules.engine import run

pytestmark = pytest.mark.filterwarnings("ignore")
Move = Callable[[Tensor], Tensor]
SIZE, GRID, WIDTH = (32, 48), (4, 6), 24
P = torch.randperm(24, generator=torch.Generator().manual_seed(3))
MATRIX = torch.eye(24, dtype=torch.float64)[P]


def plain(kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    settings = {"embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": 5, "patch_size": 8}
    model = kind(img_size=options.pop("img_size", SIZE), **settings, **options)
    return enliven(model, 0).double().eval()  # type: ignore[return-value]


def moving(move: Move) -> VisionTransformer:
    """The same model, its patch tokens moved once they know their position: it computes the same scores."""

    class Moving(VisionTransformer):
        def _pos_embed(self, x: Tensor) -> Tensor:
            tokens = super()._pos_embed(x)
            return torch.cat([tokens[:, :1], move(tokens[:, 1:])], 1)

    return plain(Moving)


@cache
def images() -> Tensor:
    return torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@cache
def expected(name: str) -> Tensor:
    return LNStatAttribution(plain(), rule=name).relevance(images(), target=1)


def shuffled(x: Tensor) -> Tensor:
    order = torch.rand(x.shape[:2]).argsort(1)
    return torch.gather(x, 1, order[..., None].repeat(1, 1, x.shape[-1]))


def written(x: Tensor) -> Tensor:
    new = torch.zeros_like(x)
    new[:, P] = x
    return new


def exchanged(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :12], x[:, 12:] = x[:, 12:].clone(), x[:, :12].clone()
    return x


def snake(x: Tensor) -> Tensor:
    return torch.cat([row if place % 2 else row.flip(1) for place, row in enumerate(x.split(6, 1))], 1)


MOVES: dict[str, Move] = {
    "index": lambda x: x[:, P],
    "index_select": lambda x: x.index_select(1, P),
    "gather, each image its own": shuffled,
    "take_along_dim": lambda x: torch.take_along_dim(x, P[None, :, None], 1),
    "sorted by length": lambda x: x[torch.arange(len(x))[:, None], x.norm(dim=-1).argsort(1)],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(5, 1),
    "roll of the map": lambda x: x.view(-1, *GRID, WIDTH).roll((1, 2), (1, 2)).flatten(1, 2),
    "column by column": lambda x: x.transpose(1, 2).unflatten(2, GRID).transpose(2, 3).flatten(2).mT,
    "snake": snake,
    "halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "stack": lambda x: torch.stack([x[:, place] for place in P.tolist()], 1),
    "masks": lambda x: torch.cat([x[:, P % 3 == 0], x[:, P % 3 != 0]], 1),
    "matmul": lambda x: MATRIX @ x,
    "einsum": lambda x: torch.einsum("ij,bjc->bic", MATRIX, x),
    "written": written,
    "exchanged in place": exchanged,
    "scatter": lambda x: torch.zeros_like(x).scatter(1, P[None, :, None].expand_as(x), x),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(1, P, x),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moved_tokens_are_put_back(move: Move) -> None:
    numbered = P.double()[None, :, None].expand(3, -1, WIDTH)
    assert not torch.equal(move(numbered), numbered)
    model = moving(move)
    torch.testing.assert_close(model(images()), plain()(images()))
    found = LNStatAttribution(model).relevance(images(), target=1)
    torch.testing.assert_close(found, expected("lnstat"), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", ["evidence", "rollout", "gradient"])
def test_every_rule_puts_them_back_and_says_so(name: str) -> None:
    lnstat = LNStatAttribution(moving(shuffled), rule=name)
    torch.testing.assert_close(lnstat.relevance(images(), target=1), expected(name), atol=1e-9, rtol=1e-6)
    assert "another order" in lnstat.describe(images()).covers
    assert "another order" not in LNStatAttribution(plain(), rule=name).describe(images()).covers


def test_evidence_of_shuffled_tokens_is_complete() -> None:
    model = moving(shuffled)
    relevance = rule(model, "evidence", images(), 1)
    torch.testing.assert_close(relevance.total, plain()(images())[:, 1].detach())


REFUSED: dict[str, tuple[Move, str]] = {
    "mixed": (lambda x: torch.softmax(torch.randn(24, 24, dtype=x.dtype), -1) @ x, "matmul makes tokens that come"),
    "neighbours added": (lambda x: x + x.roll(1, 1), "a sum makes tokens that come from several"),
    "twice": (lambda x: x[:, torch.arange(24) // 2], "hold some patches twice"),
    "left out": (lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1), "23 tokens of patches where 24"),
    "rows of the batch": (lambda x: x.flip(0), "row 0 of the batch that the first block was given is image 2"),
}


@pytest.mark.parametrize(("move", "reason"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["lnstat", "rollout"])
def test_what_is_no_order_of_the_patches_is_refused(move: Move, reason: str, name: str) -> None:
    with pytest.raises((RecordingError, UnsupportedModelError), match=reason):
        LNStatAttribution(moving(move), rule=name).relevance(images(), target=1)


def test_masked_autoencoder_without_a_mask() -> None:
    config = transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        mask_ratio=0.0,
    )  # fmt: skip

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mae, self.head = transformers.ViTMAEModel(config), nn.Linear(24, 3)

        def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
            scores: Tensor = self.head(self.mae(x, noise=noise).last_hidden_state[:, 1:].mean(1))
            return scores

    model = enliven(Classifier(), 0).double().eval()
    lnstat, x = LNStatAttribution(model), images()[:, :, :, :32]
    in_order = torch.arange(16.0)[None].expand(3, -1)
    plainly = lnstat.relevance(x, 1, in_order)
    for _ in range(2):
        torch.testing.assert_close(lnstat.relevance(x, target=1), plainly, atol=1e-9, rtol=1e-6)


def test_a_flipped_image_is_flipped_back() -> None:
    model = plain()
    for dim in (-1, -2):
        found = LNStatAttribution(lambda x, dim=dim: model(x.flip(dim)), model).attribute(images(), target=1)
        again = LNStatAttribution(model).attribute(images().flip(dim), target=1).flip(dim)
        torch.testing.assert_close(found, again)


def test_a_flipped_image_in_a_swin() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4,
        num_classes=5,
    )  # fmt: skip
    model, x = enliven(swin, 0).double().eval(), images()[:, :, :, :32]
    found = LNStatAttribution(lambda x: model(x.flip(-1)), model).relevance(x, target=1)
    torch.testing.assert_close(found, LNStatAttribution(model).relevance(x.flip(-1), target=1).flip(-1))


def test_a_shifted_crop_is_where_it_was_cut() -> None:
    model = plain()

    def shifted(x: Tensor) -> Tensor:
        scores: Tensor = model(nn.functional.pad(x[:, :, 4:], (0, 0, 0, 4)))
        return scores

    found = LNStatAttribution(shifted, model, interpolation="nearest").attribute(images(), target=1)
    x = nn.functional.pad(images()[:, :, 4:], (0, 0, 0, 4))
    plainly = LNStatAttribution(model, interpolation="nearest").attribute(x, target=1)
    # Of the last row of patches half lies on the image; what it has stays on it.
    torch.testing.assert_close(found[:, :, 4:28], plainly[:, :, :24])
    torch.testing.assert_close(found.sum((1, 2, 3)), plainly.sum((1, 2, 3)))
    assert not found[:, :, :4].any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, x: model(x[[2, 0, 1]]), "row 0 of the batch that the first block was given is image 2"),
        (lambda model, x: model(x[[2, 0, 1]])[[1, 2, 0]], "row 0 of the batch that the first block was given"),
        (lambda model, x: model(x)[[2, 0, 1]], "row 0 of the scores is of row 2 of the batch"),
        (lambda model, x: model(x).flip(0).softmax(-1), "row 0 of the scores is of row 2 of the batch"),
        (lambda model, x: model(x.roll(3, -1)), "conv2d of pixels that do not lie side by side"),
        (
            lambda model, x: model(nn.functional.interpolate(x, scale_factor=1.25)[:, :, 4:36, 6:54]),
            "one token lies 6.4 x 6.4 px from the next",
        ),
    ],
)
def test_images_in_another_order_or_size_are_refused(change: Callable[..., Tensor], reason: str) -> None:
    model = plain()
    with pytest.raises((RecordingError, UnsupportedModelError), match=reason):
        LNStatAttribution(lambda x: change(model, x), model).relevance(images(), target=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: model(x.float().double()),
        lambda model, x: model(x.mT.mT),
        lambda model, x: model(x[torch.arange(3)]),
        lambda model, x: model(x.flip(-1).flip(-1)),
        lambda model, x: torch.stack(list(model(x))),
        lambda model, x: torch.cat([model(x)[:, :2], torch.ones(3, 1)], 1),
    ],
)
def test_what_changes_no_order_changes_no_map(change: Callable[..., Tensor]) -> None:
    model, x = plain(), images().float().double()
    found = LNStatAttribution(lambda x: change(model, x), model).relevance(x, target=1)
    torch.testing.assert_close(found, LNStatAttribution(model).relevance(x, target=1))


def patched(model: VisionTransformer, **settings: tuple[int, int]) -> VisionTransformer:
    for name, value in settings.items():
        setattr(model.patch_embed.proj, name, value)
    return model


GEOMETRY: list[tuple[dict[str, tuple[int, int]], tuple[int, int], tuple[int, int], tuple[float, float]]] = [
    ({"stride": (6, 6)}, (5, 7), (6, 6), (1.0, 1.0)),
    ({"stride": (10, 10)}, (3, 5), (10, 10), (-1.0, -1.0)),
    ({"padding": (2, 2)}, (4, 6), (8, 8), (-2.0, -2.0)),
    ({"dilation": (2, 2), "stride": (6, 6)}, (3, 6), (6, 6), (4.5, 4.5)),
    ({"stride": (7, 8)}, (4, 6), (7, 8), (0.5, 0.0)),
]


@pytest.mark.parametrize(("settings", "grid", "patch", "origin"), GEOMETRY)
def test_patches_lie_where_the_convolution_reads(
    settings: dict[str, tuple[int, int]], grid: tuple[int, int], patch: tuple[int, int], origin: tuple[float, float]
) -> None:
    model = patched(plain(dynamic_img_size=True), **settings)
    trace = run(model, model, images(), [1]).trace
    assert (trace.grid, trace.patch, trace.origin) == (grid, patch, origin)
    row, column = grid[0] // 2, grid[1] // 2
    pixels = images().requires_grad_()
    (read,) = torch.autograd.grad(model.patch_embed.proj(pixels)[0, :, row, column].square().sum(), pixels)
    one = torch.zeros(1, *grid)
    one[0, row, column] = 1
    for mode in ("nearest", "bilinear"):
        drawn = to_pixels(one, SIZE, patch, mode, origin)[0]
        assert float(drawn.sum()) == pytest.approx(1)
        middle = read[0].ne(0).any(0).nonzero().double().mean(0)
        seen = torch.stack([(drawn.sum(1) * torch.arange(32)).sum(), (drawn.sum(0) * torch.arange(48)).sum()])
        # Half a pixel for a patch that begins between two.
        torch.testing.assert_close(seen.double(), middle, atol=0.51, rtol=0)


@pytest.mark.parametrize(("settings", "grid", "patch", "origin"), [GEOMETRY[0], GEOMETRY[1], GEOMETRY[2], GEOMETRY[4]])
def test_evidence_is_on_the_patch_that_was_changed(
    settings: dict[str, tuple[int, int]], grid: tuple[int, int], patch: tuple[int, int], origin: tuple[float, float]
) -> None:
    """An image that is zero but for the middle of one patch has most evidence there."""
    model = patched(plain(dynamic_img_size=True), **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name in ("pos_embed", "cls_token"):
                parameter.zero_()
    for row, column in ((1, 1), (2, 3), (grid[0] - 1, 4)):
        y, x = (round(o + p * (c + 0.5) - 0.5) for o, p, c in zip(origin, patch, (row, column), strict=True))
        image = torch.zeros(1, 3, *SIZE, dtype=torch.float64)
        image[:, :, y, x] = 5.0
        found = LNStatAttribution(model, rule="evidence").attribute(image, target=1)[0].sum(0).abs()
        ys, xs = divmod(int(found.argmax()), SIZE[1])
        assert abs(ys - y) <= 1
        assert abs(xs - x) <= 1
