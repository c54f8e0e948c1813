"""For metrics that ask a method about another model than the run's: a larger one, one that has forgotten."""

from __future__ import annotations

from collections.abc import Callable

from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.question import Batch
from captum_lnstat.evaluation.subject import Subject


class OtherModel:
    """Methods on a model that is made from the run's, once for all images.

    Args:
        make: From the run's model and seed to the other model.
    """

    def __init__(self, make: Callable[[Subject, int], Subject]) -> None:
        self._make = make
        self._subjects: dict[tuple[str, int], Subject] = {}
        self._methods: dict[tuple[str, int, str], Method] = {}

    def method(self, batch: Batch, method: Method) -> Method:
        """The method on the other model."""
        model = (batch.subject.digest, batch.seed)
        if model not in self._subjects:
            self._subjects[model] = self._make(batch.subject, batch.seed)
        key = (*model, method.name)
        if key not in self._methods:
            self._methods[key] = method.on(self._subjects[model])
        return self._methods[key]
