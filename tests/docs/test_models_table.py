"""The long table of models is what the scripts write of their records."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
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


def test_the_summary_counts_as_the_records_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    matrix, table = importlib.import_module("family_matrix"), importlib.import_module("fuzz_table")
    results, counts = json.loads(matrix.RESULTS.read_text()), json.loads(table.RECORD.read_text())["counts"]
    whole = sum(matrix.verdict(row, results.get(matrix.key(row))) == "ok" for row in matrix.ROWS)
    summary = " ".join((ROOT / "docs" / "models.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"Of (\d+) classes .* (\d+) hold .* of (\d+) small .* (\d+) are explained and (\d+) refused", summary
    )
    assert said is not None
    tried = counts["explained"] + counts["refused"]
    assert [*map(int, said.groups())] == [len(matrix.ROWS), whole, tried, counts["explained"], counts["refused"]]


CHROMIUM = shutil.which("chromium")
ROWS = """<div class="rows" data-filter="verdict,no such column"><table>
<thead><tr><th>model</th><th>verdict</th></tr></thead>
<tbody><tr id="a"><td>Swin_T</td><td>ok</td></tr><tr id="b"><td>swin_s</td><td>part</td></tr>
<tr id="c"><td>vit</td><td>ok</td></tr></tbody></table></div><script>%s
const [search, menu] = document.querySelectorAll(".rows-filter input, .rows-filter select");
search.value = "swin"; menu.value = "ok"; search.dispatchEvent(new Event("input", {bubbles: true}));</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_filters_in_a_browser(tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    page.write_text(ROWS % (ROOT / "docs" / "_static" / "rows.js").read_text(encoding="utf-8"), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(CHROMIUM), *flags, "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r'<tr id="(\w)" hidden', seen) == ["b", "c"]
    assert seen.count("<select") == 1
    assert "1 of 3" in seen
