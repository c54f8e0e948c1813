"""Head fusion: rows stay distributions, whatever the heads come in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.fusion import Fuser, check_fusion, fuse
from captum_lnstat.recording.kept import Kept
from captum_lnstat.recording.sites import FusedSite


def _attention(heads: int = 4) -> Tensor:
    return (2 * torch.randn(3, heads, 5, 6, dtype=torch.float64)).softmax(-1)


def _weighted(attention: Tensor) -> Tensor:
    weights = torch.arange(1.0, attention.shape[1] + 1, dtype=attention.dtype)
    return (attention * weights[:, None, None]).sum(1)


FUSIONS = {
    "mean": lambda a: a.mean(1),
    "max": lambda a: a.max(1).values,
    "min": lambda a: a.min(1).values,
    _weighted: _weighted,
}


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("fusion", FUSIONS, ids=["mean", "max", "min", "callable"])
def test_fused_heads_do_not_depend_on_the_chunks(fusion, step):
    attention = _attention()
    fuser = Fuser(fusion, 4)
    for start in range(0, 4, step):
        fuser.add(attention[:, start : start + step])
    expected = FUSIONS[fusion](attention)
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(fuser.fused(), expected, rtol=1e-12)
    assert torch.allclose(fuser.fused().sum(-1), torch.ones(()).double(), rtol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS, ids=["mean", "max", "min", "callable"])
def test_a_row_that_sees_nothing_stays_zero(fusion):
    attention = _attention()
    attention[1, :, 2] = 0
    fuser = Fuser(fusion, 4)
    fuser.add(attention)
    fused = fuser.fused()
    assert bool(torch.isfinite(fused).all())
    assert torch.equal(fused[1, 2], torch.zeros(6).double())


def test_min_of_heads_that_share_no_key_stays_zero():
    attention = torch.zeros(1, 2, 1, 2)
    attention[0, 0, 0, 0] = attention[0, 1, 0, 1] = 1
    fuser = Fuser("min", 2)
    fuser.add(attention)
    assert torch.equal(fuser.fused(), torch.zeros(1, 1, 2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda a: a, "3, 4, 5, 6"),
        (lambda a: a.mean(1)[..., :-1], "3, 5, 5"),
        (lambda a: -a.mean(1), "negative"),
        (lambda a: 1.0, "float"),
    ],
)
def test_a_callable_that_gives_no_map_is_refused(bad, message):
    fuser = Fuser(bad, 4)
    fuser.add(_attention())
    with pytest.raises(ValueError, match=message):
        fuser.fused()


def test_attention_without_heads_is_refused():
    with pytest.raises(RecordingError, match="heads"):
        Fuser("max", 0).fused()


def test_unknown_fusion_is_refused():
    for fusion in ("mean", "max", "min", _weighted):
        check_fusion(fusion)
    with pytest.raises(ValueError, match="median"):
        check_fusion("median")


@pytest.mark.parametrize("fusion", FUSIONS, ids=["mean", "max", "min", "callable"])
@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_fuse_takes_all_heads_of_a_site(fusion, chunk, monkeypatch):
    monkeypatch.setattr("captum_lnstat.recording.sites.CHUNK", chunk)
    monkeypatch.setattr("captum_lnstat.recording.sites.QUERIES", 1)
    q, k, v = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64).unbind()
    site = FusedSite("", Kept.of(q), Kept.of(k), Kept.of(v), None, None, False, None)
    expected = FUSIONS[fusion]((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1))
    assert torch.allclose(fuse(site, fusion), expected / expected.sum(-1, keepdim=True), rtol=1e-12)
