"""The page of sinks: its tables are those of the numbers beside it, and the numbers are what their words say."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.contract import images, vit

from captum_lnstat.rules.engine import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    yield importlib.import_module(request.param)
    for name in ("sinks", "sinks_page", "real_data", "real_subjects"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", ["sinks_page"], indirect=True)
def test_the_tables_are_those_of_the_numbers(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_tables(page, json.loads(script.FOUND.read_text(encoding="utf-8"))) == page


@pytest.mark.parametrize("script", ["sinks"], indirect=True)
def test_relations_against_loops(script: ModuleType) -> None:
    model = vit().double()
    block = run(model, model, images(1).double()).trace.blocks[1]
    attention = script.every_head(block.site)[0]
    values = block.site.values(slice(0, len(attention)))[0]
    weight = block.path[0].weight.detach().reshape(len(block.path[0].weight), len(attention), -1)
    tokens = attention.shape[-1]
    d = block.attention_update[0]
    W = torch.zeros(tokens, tokens, dtype=torch.float64)
    norms = torch.zeros(tokens, dtype=torch.float64)
    for i in range(tokens):
        for j in range(tokens):
            flow = sum(attention[h, i, j] * (weight[:, h] @ values[h, j]) for h in range(len(attention)))
            W[i, j] = torch.cov(torch.stack([flow, d[i]]), correction=0)[0, 1].clamp(min=0)
            norms[j] += (flow - flow.mean()).norm()
    torch.testing.assert_close(script.relations(block)["W"][0], W / W.sum(1, keepdim=True))
    found, received = script.per_attention(block, False)
    torch.testing.assert_close(found[0], norms)
    torch.testing.assert_close(received[0], attention.mean(0).sum(0))
    for relation in script.relations(block).values():
        torch.testing.assert_close(relation.sum(2), torch.ones(1, tokens, dtype=torch.float64))
