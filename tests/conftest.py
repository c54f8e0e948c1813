"""What no test may leave behind, and the methods and models that the contract is tested on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browser import chromium
from helpers.contract import METHODS, swin, vit
from hypothesis import HealthCheck, Phase, settings
from torch import nn

from captum_lnstat.rules import rule

# There is a process of the tests for every core. Threads of theirs besides would wait for one another, on a busy
# machine many times as long as they compute; processes that tests start are to know it too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Scripts that measure: run by hand, and not imported for their examples.
collect_ignore = ["benchmarks"]

# The same examples on every run; see seeded() for others.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
_PHASES = [Phase.explicit, Phase.generate, Phase.shrink]
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, phases=_PHASES, suppress_health_check=_SLOW
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _modes_stay() -> Iterator[None]:
    """Explaining gives back the grad mode, the inference mode, the default dtype and the random state it found."""
    torch.manual_seed(0)
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True)
def _no_rule_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that a test or a page registers is gone after it."""
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Every public method in turn, as a function of forward_func and model."""
    return METHODS[request.param]


@pytest.fixture(scope="module", params=[vit, swin])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small ViT and a small Swin."""
    return request.param()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A Chromium with nothing open."""
    driver = chromium(tmp_path / "profile")
    yield driver
    driver.quit()
