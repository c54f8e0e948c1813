"""Random models: the peak of a map lies on the stimulus, or something is said, or the model is refused."""

from __future__ import annotations

from collections import Counter

import pytest
from helpers.planted_draws import outcome

# `tests/benchmarks/never_wrong.py` draws a thousand.
DRAWS = 25


@pytest.mark.parametrize("rule", ["lnstat", "evidence"])
@pytest.mark.parametrize("part", range(2))
def test_never_a_wrong_peak_without_a_word(part: int, rule: str) -> None:
    seen = [outcome(seed, rule) for seed in range(part * DRAWS, (part + 1) * DRAWS)]
    assert [one for one in seen if one.kind == "wrong"] == []
    kinds = Counter(one.kind for one in seen)
    # Most are told, or the test would tell nothing.
    assert kinds["found"] >= DRAWS / 5
    assert kinds["unclear"] <= DRAWS / 2
