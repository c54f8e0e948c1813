"""Names with options, as they are given on the command line: ``ig(n_steps=64),gradcam:blocks.3.norm1``."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

_FORM = re.compile(r"(?P<name>[^()]+?)\s*(?:\((?P<options>.*)\))?", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """A name and its options.

    Attributes:
        text: As it was given; what rows and columns are called.
        name: What stands before the bracket.
        options: What stands in it: numbers, ``True``, ``False`` and ``None`` by their value, all else as text.
    """

    text: str
    name: str
    options: dict[str, Any]


def split(text: str) -> list[str]:
    """The parts between commas that are not in brackets.

    Example:
        >>> split("lnstat, ig(n_steps=64,method=riemann_trapezoid)")
        ['lnstat', 'ig(n_steps=64,method=riemann_trapezoid)']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(text: str, what: str) -> list[Spec]:
    """Names with options from one line.

    Args:
        text: Names separated by commas.
        what: What they name, for errors.

    Raises:
        ValueError: Nothing is named, something twice, or a bracket does not hold ``key=value``.

    Example:
        >>> parse("ig(n_steps=64)", "method")
        [Spec(text='ig(n_steps=64)', name='ig', options={'n_steps': 64})]
    """
    specs = [_one(part, what) for part in split(text)]
    if not specs:
        raise ValueError(f"no {what} is named; expected names separated by commas")
    texts = [spec.text for spec in specs]
    for spec in specs:
        if texts.count(spec.text) > 1:
            raise ValueError(f"{what} {spec.text!r} is named twice; expected each once")
    return specs


def _one(text: str, what: str) -> Spec:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{what} {text!r} is not understood; expected NAME or NAME(key=value,...)")
    options = {}
    for part in split(match["options"] or ""):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key.isidentifier() or not value:
            raise ValueError(f"{part!r} in {what} {text!r} is not understood; expected key=value")
        options[key] = _value(value)
    return Spec(text, match["name"], options)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
