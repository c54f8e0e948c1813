"""The files of a finished run: results per image, summary, table, figure, and what it took."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_lnstat.evaluation import figure
from captum_lnstat.evaluation.methods import Method
from captum_lnstat.evaluation.question import Measure
from captum_lnstat.evaluation.records import Record, write_bytes, write_text
from captum_lnstat.evaluation.summary import summarize, table

_ABOUT = ("index", "name", "group", "target", "predicted", "confidence", "explained")


def write_outputs(
    folder: Path,
    manifest: dict[str, Any],
    records: Sequence[Record],
    methods: Sequence[Method],
    measures: Sequence[Measure],
    seed: int,
    form: str = "csv",
) -> dict[str, Any]:
    """Write all files, each in one step, and return the summary.

    ``summary.json`` and ``table.md`` hold nothing that differs from run to run of the same settings on the same
    machine; times are in ``timing.json`` and in a column of the results.
    """
    names = [method.name for method in methods]
    quantities = [quantity for measure in measures for quantity in measure.quantities]
    summary = {"settings": manifest, **summarize(records, names, quantities, seed)}
    counted = f"{summary['questions']} samples of {summary['images']} images"
    title = f"{manifest['model']} on {manifest['data']}, {counted}, {manifest['class']} class"
    write_bytes(folder / f"results.{form}", _FORMS[form](*rows(records, names)))
    write_text(folder / "timing.json", json.dumps(_timing(records, names), indent=2) + "\n")
    write_text(folder / "table.md", table(summary, title))
    write_bytes(folder / "figure.png", figure.png(summary, title))
    write_text(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def rows(records: Sequence[Record], methods: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names and one row an image and method; a metric that does not apply to an image is empty."""
    columns = dict.fromkeys((*_ABOUT, "method", "seconds"))
    found = []
    for record in records:
        about = {key: record.get(key) for key in _ABOUT}
        if "broken" in record:
            columns["broken"] = None
            found.append({**about, "broken": record["broken"]})
            continue
        for method in methods:
            values = record["methods"][method]
            columns.update(dict.fromkeys(values))
            found.append({**about, "method": method, **values})
    return list(columns), found


def _csv(columns: list[str], found: list[dict[str, Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return buffer.getvalue().encode()


def _parquet(columns: list[str], found: list[dict[str, Any]]) -> bytes:
    import pyarrow  # without it the command says what brings it
    from pyarrow import parquet

    buffer = io.BytesIO()
    values = {column: [row.get(column) for row in found] for column in columns}
    parquet.write_table(pyarrow.table(values), buffer)
    return buffer.getvalue()


_FORMS = {"csv": _csv, "parquet": _parquet}


def _timing(records: Sequence[Record], methods: Sequence[str]) -> dict[str, Any]:
    """Seconds an image, for information: on a busy machine they say little."""
    found = {}
    for method in methods:
        seconds = [
            record["methods"][method]["seconds"]
            for record in records
            if "broken" not in record and "seconds" in record["methods"][method]
        ]
        if seconds:
            found[method] = {"mean": statistics.fmean(seconds), "median": statistics.median(seconds), "n": len(seconds)}
    return {"seconds_per_image": found}
