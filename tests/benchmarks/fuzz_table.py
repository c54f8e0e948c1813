"""The table of ``docs/fuzz.json``: what became of every model of timm that was built, refusals by their reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[2] / "docs" / "fuzz.json"
# Part of a message, and what it says in a row of a table; the first that is found counts.
REASONS = {
    "holds no attention module": "no attention: convolutions or pooling alone",
    "from channel to channel": "attention from channel to channel",
    "holds no LayerNorm": "no LayerNorm, whose token statistics say what a block keeps",
    "are not where those": "attention or norms wired in a way that is not known",
    "times in the forward pass": "a module that several places share runs more than once",
    "attention computations were seen": "several attention maps in one module",
    "attention maps were seen": "several attention maps in one module",
    "Tokens that were dropped or merged": "another number of tokens on the way",
    "between its blocks that its topology does not know": "something unknown between the blocks",
    "on the grid of the last convolution": "patches that are unfolded into the batch",
    "in the order in which tokens are pooled": "tokens in another order than the one in which they are pooled",
    "is not its attention's output as recorded": "a block that adds something else than its attention",
    "the transformer was given images of shape": "images resized inside",
    "one that reads images is expected": "a first convolution that does not read the images",
    "ran between the blocks, or none before": "convolutions between the blocks of one list",
    "reads what the block is given, or none": "norms that do not read what the block is given",
}
EXAMPLES = 4


def reason(message: str) -> str:
    """What a message says, in the words of the table."""
    return next((words for part, words in REASONS.items() if part in message), message)


def short(name: str) -> str:
    """A name up to what tells sizes apart."""
    return name.partition("_")[0]


def boxed(lines: list[str], filters: str = "") -> list[str]:
    """A table whose rows are single lines, in a box that scrolls, with a menu for each column in ``filters``."""
    attribute = f' data-filter="{filters}"' if filters else ""
    return ["", f'<div class="rows"{attribute}>', "", *lines, "", "</div>"]


def table(record: dict[str, Any]) -> list[str]:
    """The lines of the section."""
    counts, versions, models = record["counts"], record["versions"], record["models"]
    built = [name for name, found in models.items() if found["outcome"] != "skipped"]
    refused: dict[str, list[str]] = defaultdict(list)
    for name in built:
        if models[name]["outcome"] == "refused":
            refused[reason(models[name]["why"])].append(name)
    explained = Counter(short(name) for name in built if models[name]["outcome"] == "explained")
    worst = max((models[name].get("off", 0.0) for name in built), default=0.0)
    lines = [
        "",
        "## Every small model of timm, tried once",
        "",
        f"{len(built)} of timm {versions['timm']}, up to 40 M parameters, with random weights, on the smallest images",
        f"that they take: {counts.get('explained', 0)} explained, {counts.get('refused', 0)} refused, "
        f"{counts.get('internal error', 0)} errors of ours. Where they are explained, `evidence`",
        f"misses the score by {worst:.0e} of max(1, |score|) at most. {len(models) - len(built)} more were too large. "
        "Transformers and",
        "hybrids come first, then all others. Written by `python tests/benchmarks/fuzz_timm.py`; model by model in",
        "`docs/fuzz.json`.",
    ]
    rows = ["| refused because of | models | for example |", "|---|---|---|"]
    for why, names in sorted(refused.items(), key=lambda item: -len(item[1])):
        kinds = list(dict.fromkeys(short(name) for name in names))
        more = ", ..." if len(kinds) > EXAMPLES else ""
        rows.append(f"| {why} | {len(names)} | {', '.join(kinds[:EXAMPLES])}{more} |")
    kinds_of = ", ".join(f"{name} {count}" for name, count in sorted(explained.items(), key=lambda item: -item[1]))
    return [*lines, *boxed(rows), "", f"Explained, by the beginning of the name: {kinds_of}."]


def section() -> list[str]:
    """The section, if there is a record."""
    return table(json.loads(RECORD.read_text())) if RECORD.exists() else []


if __name__ == "__main__":
    print("\n".join(section()))
