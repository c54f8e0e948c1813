"""The head as a function: called again with other tokens, it is the model's own head."""

from __future__ import annotations

import pytest
import torch
from helpers.models import CASES, build, images
from torch import Tensor, nn

from captum_lnstat import Recorder, RecordingError


class Odd(nn.Module):
    """Several outputs, lists, keywords, and writing in place."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        y = torch.cat([second, first * 3], dim=-1)
        y[:, 0] = y[:, 0] * 2
        y.mul_(1.5)
        largest, _ = y.max(dim=-1, keepdim=True)
        return torch.where(condition=y > 0, input=y, other=largest)


class Elsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


def recorded(model: nn.Module, x: Tensor, *, detailed: bool = True) -> tuple[Recorder, Tensor]:
    with Recorder(model, head_begins=model.norm, differentiable="model", detailed=detailed) as recorder:
        scores = model(x.clone().requires_grad_() * 1)
    return recorder, scores


@pytest.mark.parametrize("name", ["vit-class", "vit-avg", "vit-map", "vit-distilled", "swin1-shift"])
@pytest.mark.parametrize("more", [nn.Identity, Odd])
def test_the_head_called_again_is_the_models(name, more):
    model, x = build(name), images(CASES[name])
    model.norm = nn.Sequential(model.norm, more())
    recorder, scores = recorded(model, x)
    end = recorder.recording.stream_end
    token = torch.randn(2, end.shape[-1], generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    found = recorder.tape.of_one_token(token, scores)
    tokens = token.reshape(2, *[1] * (end.dim() - 2), -1).expand(end.shape)
    expected = model.forward_head(model.norm(tokens))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, scores)
    found, expected = (torch.autograd.grad(one[:, 1].sum(), [token])[0] for one in (found, expected))
    torch.testing.assert_close(found, expected)
    # What was recorded is as it was.
    torch.testing.assert_close(scores, model(x))


def test_a_head_that_is_not_all_of_torch_is_refused():
    model, x = build("vit-class"), images(CASES["vit-class"])
    model.norm = nn.Sequential(model.norm, Elsewhere())
    recorder, scores = recorded(model, x)
    with pytest.raises(RecordingError, match="not all of the head is functions of torch"):
        recorder.tape.of_one_token(torch.zeros(2, 24), scores)


def test_nothing_is_kept_unless_it_is_asked_for():
    recorder, _ = recorded(build("vit-class"), images(CASES["vit-class"]), detailed=False)
    assert recorder.tape.calls == []
