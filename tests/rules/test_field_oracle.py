"""The oracle for large images on small ones: against the package, against the dense oracle, and against mistakes."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from helpers.field_oracle import Field, FieldOracle, out_of_focus
from helpers.models import CASES, build, images, rule
from helpers.oracles import dense

from captum_lnstat import layout
from captum_lnstat.recording import statistics
from captum_lnstat.trace.steps import Merging

RULES = ("rollout", "evidence", "lnstat", "gradient")
# A class token and registers; windows that are shifted and padded, a merging that is padded.
NAMES = ["vit-registers", "swin1-padded-7"]
TARGET = 4


@cache
def answers(name: str) -> dict[str, Field]:
    return FieldOracle(build(name), images(CASES[name], 1), TARGET).run()


def apart(name: str, kind: str) -> float:
    """How far the package is from the oracle, of the largest entry."""
    found = rule(build(name), kind, images(CASES[name], 1), torch.tensor([TARGET]), merging="variance")
    wanted = answers(name)[kind]
    differences = torch.cat([(found.grid - wanted.grid).flatten(), (found.prefix - wanted.prefix).flatten()])
    return float(differences.abs().max() / wanted.grid.abs().max())


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_the_package_is_the_field_oracle(name, kind):
    assert answers(name)[kind].grid.dtype == torch.float64
    assert apart(name, kind) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_the_field_oracle_is_the_dense_oracle(name):
    target, slow = torch.tensor([TARGET]), dense(name, 0, 1, True)
    wanted = {
        "rollout": slow.rollout(merging="variance"),
        "evidence": slow.evidence(target, merging="variance"),
        "gradient": slow.gradient(target, normalize=True, merging="variance"),
    }
    for kind, answer in wanted.items():
        grid, prefix = (part.detach() for part in answer.split(CASES[name]))
        found, size = answers(name)[kind], float(grid.abs().max())
        assert float((found.grid - grid).abs().max()) <= 1e-12 * size, kind
        assert float((found.prefix - prefix).abs().sum()) <= 1e-12 * size, kind


def _uniform(merging, form, shares=Merging.shares):
    return shares(merging, "uniform")


def _a_thousandth_less(*args):
    return 0.999 * statistics.update_share(*args)


def _other_shift(grid, window, shift, device=None, **options):
    return layout.windows(grid, window, (shift[0], max(0, shift[1] - 1)), device, **options)


@pytest.mark.parametrize(
    ("place", "mistake", "kinds"),
    [
        # A thousandth of every share; what the topology knows of a shift; a merging that gives all children the same.
        ("trace.steps.update_share", _a_thousandth_less, RULES),
        ("topology.windowed.windows", _other_shift, RULES),
        ("trace.steps.Merging.shares", _uniform, RULES),
    ],
    ids=["share", "shift", "merging"],
)
def test_a_mistake_is_seen(place, mistake, kinds, monkeypatch):
    name = "swin1-padded-7"
    answers(name)
    # Block by block, where the shares are made of variances; stacks are held to it in ``test_stacked_blocks``.
    monkeypatch.setattr("captum_lnstat.rules.stacked_blocks.ON_CPU", 0)
    monkeypatch.setattr(f"captum_lnstat.{place}", mistake)
    # Else the package itself sees that its windows are not the model's, and draws nothing.
    monkeypatch.setattr("captum_lnstat.rules.engine.check_own_values", lambda *_: None)
    monkeypatch.setattr("captum_lnstat.rules.wiring.Wiring.verify", lambda self: None)
    monkeypatch.setattr("captum_lnstat.rules.evidence.check_complete", lambda *_: None)
    for kind in kinds:
        assert apart(name, kind) > 1e-5, kind


@pytest.mark.parametrize("sigma", [(1.0, 2.5), (4.0, 1.0)])
def test_out_of_focus_is_the_sum_over_all_patches(sigma):
    grid = torch.rand(5, 8, dtype=torch.float64)
    expected = torch.zeros_like(grid)
    for row, column in torch.cartesian_prod(torch.arange(5), torch.arange(8)).tolist():
        down, across = torch.arange(5.0).double() - row, torch.arange(8.0).double() - column
        weights = torch.exp(-((down[:, None] / sigma[0]) ** 2 + (across / sigma[1]) ** 2) / 2)
        expected[row, column] = (weights * grid).sum() / weights.sum()
    assert torch.allclose(out_of_focus(grid, list(sigma)), expected, rtol=1e-12)


def test_other_models_are_refused():
    for name in ("vit-avg", "vit-scale-attn-norm"):
        with pytest.raises(AssertionError):
            partial(FieldOracle(build(name), images(CASES[name], 1), TARGET).run)()
