"""From records to numbers for people: values with intervals, tests against the first method, and a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from captum_lnstat.evaluation.intervals import Estimate, Ratios, bootstrap, differences
from captum_lnstat.evaluation.question import Quantity
from captum_lnstat.evaluation.records import Record

SURE = 0.01  # p-value below which the table marks a difference
NOTHING = "No metric has a value: none of them applies to a sample of those that were drawn, or every method failed."
FEW = 10  # values below which neither an interval nor a test means anything to people


def summarize(
    records: Sequence[Record], methods: Sequence[str], quantities: Sequence[Quantity], seed: int
) -> dict[str, Any]:
    """Numbers of a finished run, plain values for JSON; the order of the records does not matter.

    Questions about one image are resampled together. A method is compared with the first one on the images on which
    both have a value.
    """
    records = sorted(records, key=lambda record: int(record["index"]))
    good = [record for record in records if "broken" not in record]
    groups = {name: place for place, name in enumerate(dict.fromkeys(record["group"] for record in good))}
    rows = np.array([groups[record["group"]] for record in good], np.int64)
    tables = {
        (method, quantity.name): _columns(good, method, quantity) for method in methods for quantity in quantities
    }
    keys, alone, paired, pair_keys = [], [], [], []
    best = {quantity.name: quantity.best_of for quantity in quantities}
    for (method, name), (above, below) in tables.items():
        if not (below > 0).any():
            continue
        keys.append((method, name))
        alone.append(_by_group(above, below, rows, len(groups), best[name]))
        first_above, first_below = tables[methods[0], name]
        both = ((below > 0).any(1) & (first_below > 0).any(1))[:, None]
        if method != methods[0] and both.any():
            pair_keys.append((method, name))
            paired.append(
                (
                    _by_group(above * both, below * both, rows, len(groups), best[name]),
                    _by_group(first_above * both, first_below * both, rows, len(groups), best[name]),
                )
            )
    estimates = dict(zip(keys, bootstrap(alone, seed), strict=True))
    against = dict(zip(pair_keys, differences(paired, seed), strict=True))
    known = [record for record in good if record["target"] is not None and not record["only_two"]]
    return {
        "questions": len(good),
        "images": len(groups),
        "broken": [{"name": r["name"], "reason": r["broken"]} for r in records if "broken" in r],
        "accuracy": sum(r["predicted"] == r["target"] for r in known) / len(known) if known else None,
        "compared_with": methods[0],
        "methods": {
            method: {
                "failed": [
                    {"name": record["name"], "reason": record["methods"][method]["failed"]}
                    for record in good
                    if "failed" in record["methods"][method]
                ],
                "metrics": {
                    quantity.name: _entry(
                        quantity,
                        int((tables[method, quantity.name][1] > 0).any(1).sum()),
                        estimates[method, quantity.name],
                        against.get((method, quantity.name)),
                    )
                    for quantity in quantities
                    if (method, quantity.name) in estimates
                },
            }
            for method in methods
        },
    }


def _columns(records: Sequence[Record], method: str, quantity: Quantity) -> tuple[Any, Any]:
    """What is above and below of every part, one row a record; zeros where a record has no value."""
    above, below = np.zeros((2, len(records), len(quantity.parts)))
    for row, record in enumerate(records):
        values = record["methods"][method]
        for column, (over, under) in enumerate(quantity.parts):
            if values.get(over) is not None:
                above[row, column] = values[over]
                below[row, column] = 1.0 if under is None else values[under]
    return above, below


def _by_group(above: Any, below: Any, rows: Any, count: int, best_of: int) -> Ratios:
    sums = np.zeros((2, count, above.shape[1]))
    np.add.at(sums[0], rows, above)
    np.add.at(sums[1], rows, below)
    return Ratios(sums[0], sums[1], best_of)


def _entry(quantity: Quantity, count: int, found: Estimate, against: Estimate | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "n": count,
        "value": found.value,
        "interval": [found.low, found.high],
        "higher_is_better": quantity.higher,
    }
    if against is not None:
        entry["difference"] = against.value
        entry["difference_interval"] = [against.low, against.high]
        entry["p"] = against.p
    return entry


def table(summary: dict[str, Any], title: str) -> str:
    """A Markdown table: value, 95 % interval, and whether it is surely better or worse than the first method's.

    Args:
        summary: Of ``summarize``.
        title: One line above it.
    """
    methods = summary["methods"]
    names = list(dict.fromkeys(name for method in methods.values() for name in method["metrics"]))
    first = next(iter(methods))
    if not names:
        return f"{title}\n\n{NOTHING}\n"
    arrows, counts = {}, {}
    few: dict[str, int] = {}
    for name in names:
        entries = [method["metrics"][name] for method in methods.values() if name in method["metrics"]]
        arrows[name] = "" if entries[0]["higher_is_better"] is None else "↑" if entries[0]["higher_is_better"] else "↓"
        counts[name] = "/".join(str(n) for n in sorted({entry["n"] for entry in entries}))
        if (least := min(entry["n"] for entry in entries)) < FEW:
            few[name] = least
    lines = [
        title,
        "",
        "| method | " + " | ".join(f"{name} {arrows[name]}".strip() for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method, found in methods.items():
        cells = [_cell(found["metrics"].get(name)) for name in names]
        lines.append(f"| {method.replace('|', ' ')} | " + " | ".join(cells) + " |")
    lines.append("| *n* | " + " | ".join(counts[name] for name in names) + " |")
    notes = []
    if any(entry["n"] >= FEW for method in methods.values() for entry in method["metrics"].values()):
        notes.append(
            f"In brackets: 95 % bootstrap interval over images. `+` better, `-` worse than {first}: p < {SURE}, paired "
            "permutation test, not corrected for the number of comparisons."
        )
    if few:
        listed = ", ".join(f"{name} {count}" for name, count in few.items())
        notes.append(
            f"Without brackets: fewer than {FEW} values ({listed}), too few for an interval or a test, and for a "
            "conclusion. A metric is asked only of samples that it applies to: *n* says of how many."
        )
    return "\n".join([*lines, "", " ".join([*notes, "↑ higher is better, ↓ lower is better."])]) + "\n"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["n"] < FEW:
        return f"{entry['value']:.3f}"
    low, high = entry["interval"]
    mark = ""
    if entry["higher_is_better"] is not None and entry.get("p", 1.0) < SURE:
        mark = " +" if (entry["difference"] > 0) == entry["higher_is_better"] else " -"
    return f"{entry['value']:.3f} [{low:.3f}, {high:.3f}]{mark}"
