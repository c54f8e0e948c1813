"""What a pass keeps, counted in tensors that are alive and not in the size of the process: it cannot grow unseen."""

from __future__ import annotations

import weakref

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from captum_lnstat import LNStatAttribution
from captum_lnstat.errors import RecordingError
from captum_lnstat.recording.kept import Arena, Kept

TOKENS, WIDTH, DEPTH = 1025, 48, 4
STREAM = TOKENS * WIDTH * 4


class Alive(TorchDispatchMode):
    """The most bytes of storages, made inside the context, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key in self._known or key in given:
                    continue
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _vit(pixels: int = 128) -> nn.Module:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=pixels, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=5
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.proj.weight)  # every update is large, so that no map is empty
    return model.eval()


def _most(rule: str, model: nn.Module, pixels: int = 128) -> int:
    with Alive() as alive:
        LNStatAttribution(model, rule=rule).attribute(torch.zeros(1, 3, pixels, pixels).normal_(), target=1)
    return alive.most


# In streams, a block: queries, keys, values and the two streams are kept (5), in a graph the MLP's hidden layer (4)
# too. One map of all queries and keys of one head is 21 streams; rows are normalised in pieces. Where on the image
# tokens come from takes less than one.
@pytest.mark.parametrize(("rule", "a_block", "beside"), [("lnstat", 5, 31), ("rollout", 5, 31), ("gradient", 9, 34)])
def test_no_more_is_kept_than_the_rule_reads(rule: str, a_block: int, beside: int) -> None:
    assert _most(rule, _vit()) < (a_block * DEPTH + beside) * STREAM


@pytest.mark.parametrize("rule", ["lnstat", "gradient"])
def test_no_map_of_all_tokens_against_all_tokens(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_lnstat.recording.kept.PIECE", 1)
    one, four = (_most(rule, _vit(pixels), pixels) for pixels in (128, 256))
    assert four < 5 * one  # four times the tokens; a map would be sixteen times as large


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    """Where the calls are run again for the backward pass, what was saved of them is not changed.

    The kernel's own backward pass runs there, which rounds otherwise.
    """
    model, image = _vit(32), torch.zeros(1, 3, 32, 32).normal_()
    method = LNStatAttribution(lambda x: checkpoint(model, x, use_reentrant=False), model, rule="gradient")
    found, expected = method.relevance(image, 1), LNStatAttribution(model, rule="gradient").relevance(image, 1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_large_tensors_give_the_same_map(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = _vit(32), torch.zeros(2, 3, 32, 32).normal_()
    for rule in ("lnstat", "rollout"):
        expected = LNStatAttribution(model, rule=rule).relevance(image, 1)
        with monkeypatch.context() as patch:
            patch.setattr("captum_lnstat.rules.engine.COMPACT", 0)
            patch.setattr(Arena.put, "__defaults__", (0,))
            assert torch.equal(LNStatAttribution(model, rule=rule).relevance(image, 1), expected)


def test_a_copy_is_of_what_was_seen() -> None:
    arena, x = Arena(), torch.arange(1 << 20).float()
    seen = Kept.on(arena, x[1:])
    assert torch.equal(seen.read(), x[1:])
    assert seen.read().data_ptr() == Kept.on(arena, x).read().data_ptr() + 4
    x += 1
    assert seen.read()[0] == 1  # nobody looked at the changed tensor: what was seen first is what counts
    after = Kept.on(arena, x)
    assert torch.equal(after.read(), x)
    with pytest.raises(RecordingError, match="changed in place"):
        seen.read()


def test_memory_that_is_used_again_is_another_tensor() -> None:
    arena, kept = Arena(), []
    for value in range(4):
        kept.append(Kept.on(arena, torch.full((1 << 20,), float(value))))
    assert [int(one.read()[0]) for one in kept] == [0, 1, 2, 3]
