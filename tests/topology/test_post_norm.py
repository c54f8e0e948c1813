"""Encoders as PyTorch makes them: norms that the stream goes through, and tokens before the batch."""

from __future__ import annotations

import pytest
import torch
from helpers.contract import lively
from helpers.own_models import ENCODERS, Encoder
from helpers.plain_checks import as_the_oracle, every_rule_in_float32, placed_where_the_stimulus_is
from helpers.plain_oracle import Oracle

from captum_lnstat import LayerLNStat, LNStatAttribution, RecordingError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {case.name: case for case in ENCODERS}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_that_of_the_oracle(name):
    as_the_oracle(CASES[name], Oracle)


@pytest.mark.parametrize("name", CASES)
def test_every_rule_in_float32(name):
    every_rule_in_float32(CASES[name])


@pytest.mark.parametrize("name", ["encoder-as-made", "encoder-post-norm", "encoder-tokens-first-mean-final"])
def test_the_map_lies_where_the_stimulus_is(name):
    placed_where_the_stimulus_is(CASES[name])


@pytest.mark.parametrize("name", ["encoder-as-made", "encoder-tokens-first-mean-final", "encoder-post-norm"])
def test_as_many_images_as_tokens(name):
    """Which dimension is the batch cannot be seen from the shape then."""
    case = CASES[name]
    model, x = case.build(), case.images(24 + case.prefix)
    for kind in ("rollout", "evidence", "gradient"):
        method = LNStatAttribution(model, rule=kind)
        torch.testing.assert_close(method.relevance(x, 2)[:2], method.relevance(x[:2], 2))


@pytest.mark.parametrize("name", ["encoder-as-made", "encoder-post-norm"])
@pytest.mark.parametrize("into", [True, False])
def test_at_a_layer(name, into):
    """At the input of the first and the output of the last layer, evidence is the score less what is constant there."""
    case = CASES[name]
    model, x = case.build(), case.images(3)
    layer = model.mix.layers[0 if into else 1]
    seen = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    scores = model(x)
    handle.remove()
    found = LayerLNStat(model, layer, rule="evidence").attribute(x, 1, attribute_to_layer_input=into)
    assert found.shape == seen[0][0 if into else 1].shape
    if into:
        whole = LNStatAttribution(model, rule="evidence").relevance(x, 1)
        tokens = found.sum(-1) if model.batch_first else found.sum(-1).T
        torch.testing.assert_close(tokens[:, case.prefix :].unflatten(1, case.grid), whole)
    else:
        torch.testing.assert_close(found.sum((1, 2) if model.batch_first else (0, 2)), scores[:, 1] - model.say.bias[1])


class Misled(Encoder):
    """Gives ``(batch, tokens, channels)`` to an encoder that takes the tokens first: images attend to each other."""

    def forward(self, x):
        return self.say(self.mix(self.cut(x).flatten(2).mT + self.place).mean(1))


@pytest.mark.parametrize("batch", [1, 2, 24])
def test_attention_among_the_images_is_refused(batch):
    with pytest.raises((RecordingError, UnsupportedModelError)):
        LNStatAttribution(lively(Misled()), rule="rollout").relevance(torch.randn(batch, 3, 32, 48), 1)
