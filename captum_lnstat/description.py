"""What was recognised in a model, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        norms: Names of the norms that ran inside it, in the order they ran, without its own name.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    residual: tuple[float, float, float] | None
    padded: int
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What was recognised; ``str`` gives it as a table, ``to_dict`` as plain values for JSON.

    Attributes:
        model: Class of the transformer's model.
        family: The topology that it was recognised as.
        grid: Rows and columns of patches, and so of every map; of a video frames, rows and columns.
        patch: Height and width of a patch in pixels; of a video frames, height and width.
        prefix_tokens: Tokens before the patches.
        pooling: How the head reads the tokens.
        outputs: Shape of the model's output.
        norms: Norm calls seen in the pass.
        residual: The form of the residual share that the steps give.
        steps: Blocks, mergings and what else lies between image and head.
        covers: What the map leaves out, in words; empty if it leaves out nothing.
        rule: The rule that was asked for.
        formula: What it computes, in one line.
    """

    model: str
    family: str
    grid: tuple[int, ...]
    patch: tuple[int, ...]
    prefix_tokens: int
    pooling: str
    outputs: tuple[int, ...]
    norms: int
    residual: str
    steps: tuple[StepDescription, ...]
    covers: str = ""
    rule: str = ""
    formula: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The same record in numbers, strings, lists and dictionaries."""
        record = asdict(self)
        for step in record["steps"]:
            if step["residual"] is not None:
                step["residual"] = dict(zip(("mean", "min", "max"), step["residual"], strict=True))
        return _plain(record)  # type: ignore[no-any-return]

    @property
    def patches(self) -> str:
        """The model and its patches in words."""
        frames = f"{self.patch[0]} frames x " if len(self.patch) > 2 else ""
        return (
            f"{self.model}: {self.family} transformer, {' x '.join(map(str, self.grid))} patches of "
            f"{frames}{self.patch[-2]} x {self.patch[-1]} px"
        )

    def __str__(self) -> str:
        head = (
            f"{self.patches}, {self.prefix_tokens} prefix tokens\n"
            f"head: {self.pooling}, output {self.outputs}; {self.norms} norm calls; residual share {self.residual!r}"
        )
        rule = [f"rule {self.rule}: {self.formula}"] if self.rule else []
        covers = [f"covers: {self.covers}"] if self.covers else []
        return "\n".join([head, *rule, *covers, *map(_line, self.steps)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value


def _line(step: StepDescription) -> str:
    padded = f", {step.padded} padded" if step.padded else ""
    norms = f"; {', '.join(step.norms)}" if step.norms else ""
    if step.kind == "update":
        return f"  {step.name}: added to each of {step.shape[0]} tokens"
    if step.kind != "attention":
        return f"  {step.name}: {step.kind}, {step.shape[0]} tokens of {step.shape[1]} children{padded}{norms}"
    assert step.residual is not None
    groups, heads, queries, keys = step.shape
    mean, low, high = step.residual
    return (
        f"  {step.name}: {groups} x {heads} heads x {queries} x {keys}, residual share {mean:.2f} "
        f"({low:.2f} to {high:.2f}){padded}{norms}"
    )
