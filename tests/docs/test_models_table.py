"""The long table of models is what the scripts write of their records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    matrix = importlib.import_module("family_matrix")
    written = (ROOT / "docs" / "models-table.md").read_text(encoding="utf-8")
    assert written == matrix.page(json.loads(matrix.RESULTS.read_text()))


def test_every_outcome_of_the_record_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    table = importlib.import_module("fuzz_table")
    record = json.loads(table.RECORD.read_text())
    rows = [line.split(" | ") for line in table.table(record) if line.count(" | ") == 2 and "models" not in line]
    assert sum(int(row[1]) for row in rows) == record["counts"]["refused"]
    assert {row[0].removeprefix("| ") for row in rows} <= set(table.REASONS.values())
