"""What was recognised in a recorded pass, as a ``Description``."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from captum_lnstat.description import Description, StepDescription
from captum_lnstat.layout import Groups
from captum_lnstat.recording.eager import eager
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.relevance import Settings
from captum_lnstat.rules.rule import Rule
from captum_lnstat.trace.steps import Merging, Step, Transition, Update


def describe_pass(model: nn.Module, outcome: Pass, rule: Rule, settings: Settings) -> Description:
    """Describe a recorded and traced forward pass."""
    trace, norms = outcome.trace, [norm.module for norm in outcome.recording.norms]
    return Description(
        model=type(eager(model)).__name__,
        family=trace.family,
        grid=trace.grid,
        patch=trace.patch,
        prefix_tokens=trace.prefix,
        pooling=", ".join([trace.pooling.name, *_earlier(outcome)]),
        outputs=tuple(outcome.output.shape),
        norms=len(outcome.recording.norms),
        residual=settings.residual,
        steps=tuple(replace(_describe_step(step, settings), norms=_inside(step.name, norms)) for step in trace.steps),
        covers=" ".join(filter(None, [trace.covers, outcome.head.left_out])),
        rule=rule.name,
        formula=rule.formula,
    )


def _earlier(outcome: Pass) -> list[str]:
    """Where the head reads the stream besides its end."""
    return [f"the stream after {read.name}" for read in outcome.head.reads if read.tokens is not None]


def _inside(name: str, modules: list[str]) -> tuple[str, ...]:
    return tuple(module[len(name) + 1 :] for module in modules if module.startswith(f"{name}."))


def _describe_step(step: Step, settings: Settings) -> StepDescription:
    if isinstance(step, Merging):
        padded = int((step.below.index < 0).sum())
        return StepDescription(step.name, "merging", tuple(step.below.index.shape), None, padded)
    if isinstance(step, Update):
        return StepDescription(step.name, "update", tuple(step.after.shape[1:2]), None, 0)
    if isinstance(step, Transition):
        return StepDescription(step.name, "transition", tuple(step.below.index.shape), None, 0)
    share = step.residual_share(settings.residual)
    step.forget()
    padded = int((step.layout.index < 0).sum()) if isinstance(step.layout, Groups) else 0
    spread = (float(share.mean()), float(share.min()), float(share.max()))
    return StepDescription(step.name, "attention", step.site.shape, spread, padded)
