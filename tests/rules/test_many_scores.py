"""What values said about many scores, in pieces, against one sum over everything."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

from captum_lnstat import LNStatAttribution
from captum_lnstat.rules import many_scores
from captum_lnstat.rules.many_scores import read_many
from captum_lnstat.trace.cotangent import Cotangent


@pytest.mark.parametrize("held", [1, 50, 1000, 1 << 20])
@pytest.mark.parametrize("side_by_side", [1, 7, 12, 400])
@pytest.mark.parametrize(("images", "windows"), [(1, 1), (1, 5), (3, 2)])
def test_pieces_add_up_to_the_sum(
    images: int, windows: int, side_by_side: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_scores, "HELD", held)
    monkeypatch.setattr(many_scores, "SIDE_BY_SIDE", side_by_side)
    generator = torch.Generator().manual_seed(0)
    heads, kinds, keys, channels, scores = 2, 6, 5, 3, 4

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Each window has its own kinds; one kind is in none of them.
    used = torch.rand(images * windows, kinds, generator=generator) < 0.6
    used[:, 2] = False
    heard = draw(images * windows, heads, kinds, keys) * used[:, None, :, None]
    values, directions = draw(images * windows, heads, keys, channels), draw(images, kinds, scores, heads * channels)
    said = read_many(heard, values, directions, used)
    split = directions.reshape(images, kinds, scores, heads, channels)
    by_image = (
        heard.reshape(images, windows, heads, kinds, keys),
        values.reshape(images, windows, heads, keys, channels),
    )
    expected = torch.einsum("bwhkj,bwhjc,bkshc->bwjs", *by_image, split).flatten(0, 1)
    torch.testing.assert_close(said, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
@pytest.mark.parametrize("size", [(96, 128), (112, 112), (60, 92)])
def test_four_stages_with_shift_mask_and_padding(size: tuple[int, int], rule: str) -> None:
    """In the first stage 64 kinds of directions, of which a row of windows has some; a target of its own an image."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=size, patch_size=2, window_size=7, embed_dim=8, depths=(2, 2, 2, 1), num_heads=(1, 2, 2, 4),
        num_classes=6, strict_img_size=False,
    )  # fmt: skip
    model, image = model.double().eval(), torch.randn(2, 3, *size, dtype=torch.float64)
    method = LNStatAttribution(model, rule=rule)
    targets = [*range(6), [5, 2]]
    together = method.relevance_per_target(image, targets)
    for target, grid in zip(targets, together, strict=True):
        torch.testing.assert_close(grid, method.relevance(image, target), rtol=1e-9, atol=1e-11)
    one = LNStatAttribution(model.float(), rule=rule).relevance_per_target(image.float(), targets)
    assert (one - together).abs().max() < 1e-4 * together.abs().max()


def _parallel(scale: torch.Tensor, scores: int) -> torch.Tensor:
    return scale[:, :, None, None] * torch.randn(2, 1, scores, 8, dtype=torch.float64)


@pytest.mark.parametrize("others", ["the same scale", "another scale", "not parallel", "other tokens", "nothing"])
def test_a_cotangent_in_parts_is_the_whole(others: str) -> None:
    scale = torch.randn(2, 6, dtype=torch.float64)
    first, second = _parallel(scale, 3), _parallel(scale, 2)
    if others == "another scale":
        second = _parallel(torch.randn(2, 6, dtype=torch.float64), 2)
    if others == "not parallel":
        second = torch.randn(2, 6, 2, 8, dtype=torch.float64)
    if others == "other tokens":
        second[:, 1:3] = 0
    if others == "nothing":
        second.zero_()
    cotangent = Cotangent.of_parts([first, second, first])
    u = torch.cat([first, second, first], 2)
    assert cotangent.kinds == (1 if others in ("the same scale", "nothing") else 6)
    torch.testing.assert_close(cotangent.spread(cotangent.dense()), u, rtol=1e-12, atol=1e-12)
