"""What a rule is, and the registry of rules: one file a rule, which registers itself.

A rule goes from one recorded pass to relevance on the patch grid. This is a whole one:

    @register("looked", formula="P", options=("residual",), class_specific=False)
    def looked(outcome, settings):
        (relevance,) = walk(outcome.trace, settings, perception(outcome.trace, settings))
        return relevance
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from captum_lnstat.errors import near
from captum_lnstat.recording.fusion import HeadFusion
from captum_lnstat.recording.recorder import Differentiable
from captum_lnstat.rules.relevance import Relevance, Settings

if TYPE_CHECKING:
    from captum_lnstat.rules.engine import Pass

Compute = Callable[["Pass", Settings], tuple[Relevance, ...]]

Function = TypeVar("Function", bound=Callable[..., tuple[Relevance, ...]])

DEFAULT = "lnstat"


@dataclass(frozen=True)
class Rule:
    """A way from one recorded pass to relevance on the patch grid.

    Attributes:
        name: What it is asked for by.
        formula: In one line; ``describe`` prints it.
        compute: The rule: from the pass and the settings to one relevance for every score.
        options: The options of ``LNStatAttribution`` that it reads, beside those that all rules read.
        class_specific: It explains a target; without it the map is the same for every class.
        complete: Relevance of patches, prefix tokens, padding and constant adds up to the score.
        differentiable: What of the model has to be differentiable: its ``"head"``, all of it (``"model"``), or all of
            it with everything held constant that is not affine (``"affine"``).
        head_fusion: How the heads become one map where the caller does not say.
        starts: It may start with what the head reads, whatever the class. Where no such start is defined, a rule that
            says it does not is.
        detailed: It reads what the attentions' softmaxes were given, or calls the head with other tokens.
    """

    name: str
    formula: str
    compute: Compute
    options: tuple[str, ...] = ()
    class_specific: bool = True
    complete: bool = False
    differentiable: Differentiable = "head"
    head_fusion: HeadFusion = "deviation"
    starts: bool = True
    detailed: bool = False

    @property
    def at_every_block(self) -> bool:
        """It can be read at the tokens of any block, and for many targets of one pass."""
        return self.differentiable == "head"


_RULES: dict[str, Rule] = {}


def register(
    name: str,
    *,
    formula: str,
    options: tuple[str, ...] = (),
    class_specific: bool = True,
    complete: bool = False,
    differentiable: Differentiable = "head",
    head_fusion: HeadFusion = "deviation",
    starts: bool = True,
    detailed: bool = False,
) -> Callable[[Function], Function]:
    """A decorator: the function becomes the rule of this name, in every class, command and page that takes a rule.

    Args:
        name: What it is asked for by; the rule registered last under a name is taken.
        formula: As for ``Rule``, and so are the others.
        options: Names of options.
        class_specific: Whether it explains a target.
        complete: Whether it adds up to the score.
        differentiable: What of the model has to be differentiable.
        head_fusion: How the heads become one map by default.
        starts: Whether it may start with what the head reads, whatever the class.
        detailed: Whether it reads what the softmaxes were given, or calls the head with other tokens.
    """

    def add(compute: Function) -> Function:
        _RULES[name] = Rule(
            name, formula, compute, options, class_specific, complete, differentiable, head_fusion, starts, detailed
        )
        return compute

    return add


def rule_names() -> tuple[str, ...]:
    """Every registered rule, the default first."""
    return tuple(sorted(_RULES, key=lambda name: name != DEFAULT))


def layer_rule_names() -> tuple[str, ...]:
    """The rules that can be read at any block."""
    return tuple(name for name in rule_names() if _RULES[name].at_every_block)


def find_rule(name: object, *, at_every_block: bool = False) -> Rule:
    """The rule of a name; ``"package.module:name"`` imports the module that registers it first.

    Args:
        name: The name.
        at_every_block: Only of the rules that can be read at any block.

    Raises:
        ValueError: There is none; the message says which there are.

    Example:
        >>> find_rule("rollout").formula
        'P: r <- alpha * r + ((1 - alpha) * r) W, class-agnostic, sums to 1'
    """
    known = layer_rule_names() if at_every_block else rule_names()
    hint = ""
    if isinstance(name, str):
        module, colon, last = name.rpartition(":")
        if colon and last not in _RULES:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"rule {name!r} cannot be imported: {error}") from error
            known = layer_rule_names() if at_every_block else rule_names()
        if last in known:
            return _RULES[last]
        hint = near(name, known, "")
    raise ValueError(
        f"rule is {name!r}; expected one of {', '.join(map(repr, known))}, or the module that registers another, "
        f"package.module:NAME{f'; {hint}' if hint else ''}"
    )
