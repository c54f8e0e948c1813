"""A rule of one's own: a function in any file, known everywhere a rule is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from captum_lnstat import LayerLNStat, LNStatAttribution, zoo
from captum_lnstat.cli import main
from captum_lnstat.rules.perception import perception
from captum_lnstat.rules.rule import find_rule, register, rule_names
from captum_lnstat.rules.walk import walk

OWN = '''
import torch
from captum_lnstat.rules import Relevance, register
from captum_lnstat.rules.perception import perception
from captum_lnstat.rules.walk import walk

@register("looked-above", formula="max(P - mean P, 0)", options=("residual",), class_specific=False)
def looked_above(outcome, settings):
    """What was looked at more than the average patch."""
    ((p,),) = walk(outcome.trace, settings, perception(outcome.trace, settings))
    grid = (p.grid - p.grid.mean((1, 2), keepdim=True)).clamp(min=0)
    return (Relevance(grid, p.prefix, p.padding, p.constant),)
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The rule above in a file of its own, by the name that imports it."""
    (tmp_path / "own_rules.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_rules", raising=False)
    return "own_rules:looked-above"


def test_it_is_short() -> None:
    assert len(OWN.strip().splitlines()) < 30


@pytest.mark.parametrize("name", ["vit-mini", "swin-mini"])
def test_it_explains(own: str, name: str) -> None:
    model, image = zoo.load(name).model, torch.randn(2, 3, 64, 64)
    lnstat = LNStatAttribution(model, rule=own)
    p = LNStatAttribution(model, rule="rollout", head_fusion="deviation").relevance(image)
    wanted = (p - p.mean((1, 2), keepdim=True)).clamp(min=0)
    assert torch.equal(lnstat.relevance(image), wanted)
    torch.testing.assert_close(lnstat.attribute(image).sum((1, 2, 3)), wanted.sum((1, 2)))
    assert LayerLNStat(model, model.get_submodule(_block(name)), rule=own).attribute(image).isfinite().all()


def _block(name: str) -> str:
    return "blocks.1" if name == "vit-mini" else "layers.1.blocks.0"


def test_it_is_described(own: str) -> None:
    description = LNStatAttribution(zoo.load("vit-mini").model, rule=own).describe(torch.randn(1, 3, 64, 64))
    assert "rule looked-above: max(P - mean P, 0)" in str(description).splitlines()
    assert description.to_dict()["formula"] == "max(P - mean P, 0)"


def test_the_command_takes_it(own: str, tmp_path: Path) -> None:
    picture = tmp_path / "own.png"
    done = CliRunner().invoke(main, ["explain", "--rule", own, "--picture", "overlay", "--output", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 0
    refused = CliRunner().invoke(main, ["explain", "--rule", "own_rules:none"])
    assert refused.exit_code == 2
    assert "'looked-above'" in refused.output


def test_an_option_that_it_does_not_read_is_refused(own: str) -> None:
    with pytest.raises(ValueError, match="contrastive does nothing with rule='looked-above'"):
        LNStatAttribution(zoo.load("vit-mini").model, rule=own, contrastive=True)


def test_a_rule_that_is_not_there_is_refused() -> None:
    for name in ("looked-above", "no_such_module:looked-above", 3, None):
        with pytest.raises(ValueError, match=re.escape("rule")):
            find_rule(name)
    with pytest.raises(ValueError, match=r"cannot be imported: No module named 'no_such_module'"):
        find_rule("no_such_module:looked-above")
    with pytest.raises(ValueError, match=r"did you mean 'evidence'\?"):
        find_rule("evidense")


def test_the_default_comes_first() -> None:
    assert rule_names()[0] == "lnstat"
    assert {"evidence", "rollout", "gradient"} < set(rule_names())


def test_rules_side_by_side_are_the_rules_alone() -> None:
    """One walk for several rules makes each attention map once, and gives each rule what it gets alone."""
    model, image = zoo.load("swin-mini").model, torch.randn(2, 3, 64, 64)
    plain = LNStatAttribution(model, rule="rollout", head_fusion="deviation")

    @register("twice", formula="P, P with a half", class_specific=False)
    def twice(outcome, settings):  # type: ignore[no-untyped-def]
        trace = outcome.trace
        half = perception(trace, settings, lambda block: block.residual_share("half"))
        one, other = walk(trace, settings, perception(trace, settings), half)
        torch.testing.assert_close(one[0].grid, plain.relevance(image))
        return other

    wanted = LNStatAttribution(model, rule="rollout", residual="half", head_fusion="deviation").relevance(image)
    torch.testing.assert_close(LNStatAttribution(model, rule="twice").relevance(image), wanted)
