"""Which method for which question, and what is said of the comparison: figures are those of the pages."""

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


def test_what_is_said_of_the_comparison_has_figures_of_its_tables():
    said, _, tables = (DOCS / "rivals.md").read_text(encoding="utf-8").partition("<!-- tables -->")
    figures = re.findall(r"\d*\.\d+", said.partition("What stands out")[2].partition("## Beside")[0])
    assert len(figures) > 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", tables), figure
