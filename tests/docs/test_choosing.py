"""Which method for which question: every figure there is one of the pages that the row links to."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
ROWS = [line for line in (DOCS / "choosing.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


def test_every_row_has_figures_of_the_pages_that_it_names():
    assert len(ROWS) > 10
    for row in ROWS[1:]:
        figures = re.findall(r"\d+\.\d+", row)
        assert figures, row
        linked = [DOCS / name for name in re.findall(r"\]\((\w+\.md)\)", row)]
        text = "\n".join(page.read_text(encoding="utf-8") for page in linked)
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text), (figure, row)


def test_every_method_that_it_names_is_one():
    from captum_lnstat.evaluation.methods import names

    taken = {name for row in ROWS[1:] for name in re.findall(r"`([\w-]+)`", row.split("|")[2])}
    assert taken - {"relevance_per_target"} <= set(names())
    assert {"lnstat", "evidence", "rollout"} <= taken
