"""What was recognised in a model, in words."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from captum_lnstat.compiled import eager
from captum_lnstat.engine import Pass
from captum_lnstat.layout import Groups
from captum_lnstat.rules import Settings
from captum_lnstat.trace import Merging, Step, Transition, Update


@dataclass(frozen=True)
class StepDescription:
    """One block or merging.

    Attributes:
        name: Dotted name of the module.
        kind: ``"attention"``, ``"merging"``, ``"update"`` or ``"transition"``.
        shape: Of the attention: (groups in the batch, heads, queries, keys); of an update: (tokens,); of the others:
            (parents, children each).
        residual: Mean and range of the residual share over tokens, for an attention.
        padded: Places of its windows, or children, that are padding, per image.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    residual: tuple[float, float, float] | None
    padded: int


@dataclass(frozen=True)
class Description:
    """What was recognised; ``str`` gives it as a table."""

    model: str
    family: str
    grid: tuple[int, int]
    patch: tuple[int, int]
    prefix_tokens: int
    pooling: str
    outputs: tuple[int, ...]
    norms: int
    residual: str
    steps: tuple[StepDescription, ...]

    def __str__(self) -> str:
        head = (
            f"{self.model}: {self.family} transformer, {self.grid[0]} x {self.grid[1]} patches of "
            f"{self.patch[0]} x {self.patch[1]} px, {self.prefix_tokens} prefix tokens\n"
            f"head: {self.pooling}, output {self.outputs}; {self.norms} norm calls; residual share {self.residual!r}"
        )
        return "\n".join([head, *map(_line, self.steps)])


def _line(step: StepDescription) -> str:
    padded = f", {step.padded} padded" if step.padded else ""
    if step.kind == "update":
        return f"  {step.name}: added to each of {step.shape[0]} tokens"
    if step.kind != "attention":
        return f"  {step.name}: {step.kind}, {step.shape[0]} tokens of {step.shape[1]} children{padded}"
    assert step.residual is not None
    groups, heads, queries, keys = step.shape
    mean, low, high = step.residual
    return (
        f"  {step.name}: {groups} x {heads} heads x {queries} x {keys}, residual share {mean:.2f} "
        f"({low:.2f} to {high:.2f}){padded}"
    )


def describe_pass(model: nn.Module, outcome: Pass, settings: Settings) -> Description:
    """Describe a recorded and traced forward pass."""
    trace = outcome.trace
    return Description(
        model=type(eager(model)).__name__,
        family=trace.family,
        grid=trace.grid,
        patch=trace.patch,
        prefix_tokens=trace.prefix,
        pooling=trace.pooling.name,
        outputs=tuple(outcome.output.shape),
        norms=len(outcome.recording.norms),
        residual=settings.residual,
        steps=tuple(_describe_step(step, settings) for step in trace.steps),
    )


def _describe_step(step: Step, settings: Settings) -> StepDescription:
    if isinstance(step, Merging):
        padded = int((step.groups.index < 0).sum())
        return StepDescription(step.name, "merging", tuple(step.groups.index.shape), None, padded)
    if isinstance(step, Update):
        return StepDescription(step.name, "update", tuple(step.after.shape[1:2]), None, 0)
    if isinstance(step, Transition):
        return StepDescription(step.name, "transition", tuple(step.groups.index.shape), None, 0)
    share = step.residual_share(settings.residual)
    padded = int((step.layout.index < 0).sum()) if isinstance(step.layout, Groups) else 0
    spread = (float(share.mean()), float(share.min()), float(share.max()))
    return StepDescription(step.name, "attention", step.site.shape, spread, padded)
