"""What a model makes of an image: how probable each class is, and classes in words, the same wherever shown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from captum_lnstat.explanation.subject.names import label

if TYPE_CHECKING:
    from jaxtyping import Float

# Below this probability a map of the target was seen to lie on background or on another object.
FAINT_TARGET = 0.01
# Characters of a class in a title.
_TITLE = 28


@dataclass(frozen=True, eq=False)
class Prediction:
    """The classes of one image.

    Attributes:
        prediction: The class with the highest score.
        probabilities: Of every class; nothing for a model with one score alone.
        class_names: Of every class, or none.

    Example:
        >>> found = Prediction(1, np.array([0.25, 0.75]), ("dog", "cat, tomcat"))
        >>> found.label(1), found.likely(1), found.outcome(0), found.ranked(1)
        ('cat (1)', 'cat 75.0%', 'dog (0), confidence 25.0%', [1])
    """

    prediction: int
    probabilities: Float[np.ndarray, " class"] | None
    class_names: tuple[str, ...] = field(repr=False)

    @property
    def count(self) -> int:
        """How many classes there are."""
        return 1 if self.probabilities is None else len(self.probabilities)

    def label(self, index: int) -> str:
        """A class in words: its first name and its index."""
        return label(self.class_names, index)

    def likely(self, index: int) -> str:
        """A class for a title: its name, shortened, and its probability."""
        name = textwrap.shorten(_name(self.label(index)), _TITLE, placeholder="...")
        return f"{name} {self.percent(index)}".rstrip()

    def outcome(self, index: int) -> str:
        """A class and its probability in words."""
        if self.probabilities is None:
            return self.label(index)
        return f"{self.label(index)}, confidence {percent(self.probabilities[index])}"

    def percent(self, index: int) -> str:
        """The probability of a class for people; nothing for a model with one score alone."""
        return "" if self.probabilities is None else percent(self.probabilities[index])

    def ranked(self, count: int) -> list[int]:
        """The likeliest classes, the first first."""
        if self.probabilities is None:
            return [self.prediction]
        return [int(index) for index in np.argsort(-self.probabilities, kind="stable")[:count]]

    def top(self, count: int = 5) -> tuple[tuple[str, float], ...]:
        """The likeliest classes with their probabilities, the first first."""
        if self.probabilities is None:
            return ()
        return tuple((self.label(index), float(self.probabilities[index])) for index in self.ranked(count))

    def likeliest(self, count: int = 5) -> tuple[tuple[str, str, float], ...]:
        """The likeliest classes for a picture: names without their indices, probabilities in words and as numbers."""
        top = self.top(count)
        return tuple((_name(label), percent(share), share) for label, share in top)

    def faint(self, target: int) -> tuple[str, ...]:
        """What has to be known of the map of a class that the model all but rules out; nothing of others."""
        if self.probabilities is None or self.probabilities[target] >= FAINT_TARGET:
            return ()
        if target == self.prediction:
            likeliest = self.outcome(target)
            return (
                f"the model has hardly made up its mind: no class is likelier than {likeliest}; the map shows what "
                "argued for that one, and may lie on background or on another object",
            )
        return (
            f"the model all but rules {self.label(target)} out; the map shows what little argued for it, and may lie "
            "on background or on another object",
        )


def _name(label: str) -> str:
    """A class in words, without its index."""
    return label.rpartition(" (")[0] or label


def percent(probability: float) -> str:
    """A probability for people; a tiny one is not printed as zero.

    Example:
        >>> percent(0.5), percent(0.0004)
        ('50.0%', 'below 0.1%')
    """
    return f"{float(probability):.1%}" if probability >= 0.001 else "below 0.1%"
