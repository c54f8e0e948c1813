"""How good are the maps on photographs? Real weights, every method, through ``captum_lnstat.evaluation``.

    python tests/benchmarks/real.py                                       # the report: all models, all parts
    python tests/benchmarks/real.py --split tune --models deit --parts localisation --limit 40
    python tests/benchmarks/real.py --methods lnstat --again              # after a change of the default rule
    python tests/benchmarks/real.py --tables                              # the page alone, from what is there

writes ``docs/real.md``. Every method of every part of every model is a run of its own in ``--folder``: a stopped one
goes on, a larger ``--limit`` adds photographs, a method can be added or done again alone; nothing notices that the
code has changed, so that is what ``--again`` is for. ``--split tune`` is for choosing an option, and its page is
beside the records.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_subjects import COVER, REAL, Photographs, Seen, confident, known, open_model, title

from captum_lnstat.evaluation import measures
from captum_lnstat.evaluation.datasets import Dataset, open_dataset
from captum_lnstat.evaluation.intervals import Ratios, bootstrap
from captum_lnstat.evaluation.records import Record, Records, ResumeError
from captum_lnstat.evaluation.run import Settings, evaluate
from captum_lnstat.evaluation.specs import split as names_of
from captum_lnstat.evaluation.summary import SURE, summarize, table
from captum_lnstat.evaluation.team import Team

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "real.md"
# Every row stays on the page, whatever it shows. Differences are from the first one.
METHODS = (
    "lnstat",
    "lnstat-contrastive",
    "evidence",
    "rollout",
    "gradient",
    "chefer",
    "attention-rollout",
    "raw-attention",
    "frozen-layernorm",
    "gradcam",
    "libragrad",
    "inputxgradient",
    "saliency",
    "random",
    "centre",
)


@dataclass(frozen=True)
class Part:
    """What is asked of the maps of one set of photographs.

    Attributes:
        title: A heading.
        metrics: Of ``captum-lnstat evaluate``.
        explained: Which class.
        images: How many, unless ``--limit`` says otherwise.
        unit: Of what.
        photographs: Which: ``"small"`` objects that are classed right, ``"sure"`` ones for mosaics, ``"pets"``,
            ``"pairs"``, scenes with two objects, or ``"all"`` of the split.
    """

    title: str
    metrics: str
    explained: Any = "true"
    images: int = 100
    unit: str = "photographs"
    photographs: str = "small"


PARTS = {
    "localisation": Part("Boxes", "pointing,energy,iou,ap,corners"),
    "pets": Part(
        "Masks, Oxford-IIIT pets", "segmentation,pointing,energy,iou,ap,corners", "predicted", 250, photographs="pets"
    ),
    "mosaics": Part(
        "Mosaics of four photographs, twice the side",
        "grid(size=full,ask=all)",
        images=10,
        unit="mosaics",
        photographs="sure",
    ),
    "randomisation": Part("After the upper half of the layers forgot", "randomisation(layers=0.5)"),
    "perturbation": Part(
        "Perturbation",
        "positive,negative,positive(fill=blur),negative(fill=blur),insertion(steps=16),deletion(steps=16)",
    ),
}


def place(folder: Path, model: str, split: str, part: str, method: str) -> Path:
    """Where the records of one method are.

    >>> place(Path("real"), "deit", "tune", "pets", "ig(n_steps=16)").as_posix()
    'real/deit/tune/pets/ig-n_steps-16'
    """
    return folder / model / split / part / re.sub(r"[^\w.]+", "-", method).strip("-")


def dataset_of(model: Photographs, part: Part, folder: Path) -> tuple[str, Dataset] | None:
    """The photographs of a part, and what they are called; None if the model has none."""
    if part.photographs == "pets":
        return None if model.pets is None else (model.pets, open_dataset(model.pets))
    if part.photographs == "all":
        return model.data, model.dataset
    if part.photographs == "pairs":
        return model.data, model.pairs()
    seen = model.seen(folder / model.name / model.split / "seen.json")
    return model.data, model.confident_ones(seen) if part.photographs == "sure" else model.small_objects(seen)


def measure(
    model: Photographs,
    part: str,
    methods: Sequence[str],
    folder: Path,
    options: argparse.Namespace,
    parts: dict[str, Part] = PARTS,
) -> None:
    """One part of one model, method by method."""
    asked = parts[part]
    found = dataset_of(model, asked, folder)
    if found is None:
        print(f"{model.name}: no {part} in the split {model.split!r}", file=sys.stderr)
        return
    data, dataset = found
    limit = options.limit or asked.images
    for method in methods:
        output = place(folder, model.name, model.split, part, method)
        if options.again and output.exists():
            shutil.rmtree(output)
        print(f"{model.name}, {model.split}, {part}: {method}, {min(limit, len(dataset))} images", file=sys.stderr)
        settings = Settings(
            f"{data.partition(':')[0]}, {model.split}",
            model.name,
            method,
            asked.metrics,
            asked.explained,
            limit=limit,
            autocast=getattr(options, "autocast", ""),
            batch_size=options.batch_size,
        )
        try:
            evaluate(settings, dataset, model.subject, output, Team(0, 1, model.subject.device))
        except ResumeError as error:
            raise SystemExit(f"{error}. --again forgets what is there") from None


def merged(folders: dict[str, Path]) -> list[Record]:
    """The records of runs of one method each, as those of one run of all."""
    found: dict[int, Record] = {}
    for method, folder in folders.items():
        for record in Records(folder / "records").read():
            kept = found.setdefault(record["index"], {**record, "methods": {name: {} for name in folders}})
            kept["methods"][method] = record["methods"][method]
    return [found[index] for index in sorted(found)]


def tables(model: str, split: str, folder: Path) -> Iterator[str]:
    """The tables of a model, of the parts that there are records of."""
    for name, part in PARTS.items():
        present = [*METHODS, *others(folder / model / split / name)]
        folders = {method: place(folder, model, split, name, method) for method in present}
        folders = {method: path for method, path in folders.items() if any((path / "records").glob("*.jsonl"))}
        if not folders:
            continue
        quantities = [quantity for one in measures.build(part.metrics) for quantity in one.quantities]
        records = merged(folders)
        summary = summarize(records, list(folders), quantities, seed=0)
        heading = f"### {part.title}\n\n{len(records)} {part.unit}, {part.explained} class"
        if not next(iter(folders)).startswith(METHODS[0]):
            heading += f"; compared with {next(iter(folders))}"
        # What the table's last paragraph says is on the page once.
        yield table(summary, heading + ".").rpartition("\n\n")[0] + over_chefer(records)


def over_chefer(records: Sequence[Record]) -> str:
    """The IoU of the default over that of Chefer's rule, if both were measured, on the photographs of both."""
    both = [[record["methods"].get(method, {}).get("iou") for method in ("lnstat", "chefer")] for record in records]
    pairs = np.array([pair for pair in both if None not in pair], dtype=float).reshape(-1, 2, 1)
    if not len(pairs):
        return ""
    (found,) = bootstrap([Ratios(pairs[:, 0], pairs[:, 1])], seed=0)
    return f"\n\nIoU of `lnstat` over that of `chefer`: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]."


def others(folder: Path) -> list[str]:
    """Methods with records that are no rows of their own: options that were tried."""
    listed = {place(Path(), "", "", "", method).name for method in METHODS}
    found = []
    for path in sorted(folder.glob("*/manifest.json")):
        if path.parent.name not in listed:
            found.append(json.loads(path.read_text())["methods"])
    return found


def about(model: str, split: str, folder: Path) -> str:
    """How many photographs a model was shown, and how many could be taken."""
    path = folder / model / split / "seen.json"
    if not path.exists():
        return ""
    seen = [Seen(**entry) for entry in json.loads(path.read_text())["seen"].values()]
    right, small = sum(one.right for one in seen), sum(one.says_where for one in seen)
    sure = sum(one.confidence >= confident(model) for one in seen)
    return (
        f"{len(seen)} photographs with boxes in the split, {right / len(seen):.1%} classed right. Of those, {small} "
        f"have boxes on {COVER[0]:.0%} to {COVER[1]:.0%} of the image. For mosaics: {sure} whose class has "
        f"a probability of {confident(model)} or more."
    )


def write(page: Path, split: str, folder: Path) -> None:
    """The page, from all records that there are; what stands above the tables stays."""
    command = "python tests/benchmarks/real.py" + (" --split tune" if split == "tune" else "")
    text = [
        f"Split: **{split}**. Made by `{command}`. In brackets: 95 % bootstrap interval over photographs, 2,000 "
        f"resamples. `+` better, `-` worse than `{METHODS[0]}`: p < {SURE}, paired permutation test on the photographs "
        "that both have, not corrected for the number of comparisons. ↑ higher is better, ↓ lower is better."
    ]
    for model in known():
        found = list(tables(model, split, folder))
        if found:
            text += [f"## {title(model)}", about(model, split, folder), *found]
    mark = "<!-- tables -->"
    head = page.read_text().partition(mark)[0] if page.exists() else f"# Photographs, split {split}\n\n"
    page.write_text(head + mark + "\n\n" + "\n\n".join(filter(None, text)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(known()), help="%(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="%(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="as for captum-lnstat evaluate; %(default)s")
    parser.add_argument("--split", choices=["tune", "report"], default="report")
    parser.add_argument("--limit", type=int, help="photographs a part; by default 100, of the pets 250, mosaics 10")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="%(default)s")
    parser.add_argument("--again", action="store_true", help="forget what is there of these methods and parts")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the page")
    parser.add_argument("--data", type=Path, default=REAL, help="photographs and weights; %(default)s")
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "build" / "real", help="records")
    parser.add_argument("--page", type=Path, help="docs/real.md; for the other split, in --folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()!r}; expected {', '.join(PARTS)}")
    if not options.tables:
        for name in options.models.split(","):
            model = open_model(name, options.split, options.data, options.folder, options.device)
            for part in parts:
                measure(model, part, names_of(options.methods), options.folder, options)
    page = options.page or (PAGE if options.split == "report" else options.folder / "tune.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    write(page, options.split, options.folder)
    print(f"written to {page}", file=sys.stderr)


if __name__ == "__main__":
    main()
