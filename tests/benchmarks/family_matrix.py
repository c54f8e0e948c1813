"""What holds on which model: ``docs/models-table.md``, with the table of fifteen models beside other packages.

``python tests/benchmarks/family_matrix.py`` examines every model of ``matrix_models.py``, each in a process of its own,
keeps what it found in ``docs/models.json`` and writes ``docs/models-table.md``. ``--only NAME`` (part of a name, may be
repeated) does so for some of them and leaves the other rows as they are; ``--missing`` takes up where a run was
stopped; ``--write`` only writes the page again. ``--defaults`` runs each model at its full size, as its name gives it,
instead. ``--quick`` trains nothing and writes nothing: it prints what each row has lost since the record.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_table import boxed
from fuzz_table import section as fuzz_section
from matrix_models import FIFTEEN, REFUSED, ROWS, Row

from captum_lnstat import LNStatAttribution
from captum_lnstat.attribution.base import explain_batch
from captum_lnstat.rules import rule_names
from captum_lnstat.testing import (
    PEAKS,
    Ground,
    check_batch,
    check_completeness,
    check_layout,
    check_mass,
    check_placement,
    check_recognised,
    check_rule,
    check_untouched,
    ground,
    noise,
    planted_images,
    wake,
)

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "models.json"
TIMEOUT = 600
NOT_TAKEN = "not taken by the model"
# What is said of a rule that a family does not have, in the words of the package: as it should be, not a fault.
UNDEFINED = "not defined for it; expected one of"
# Millions of parameters of the largest model that is run at full size.
LARGEST = 100

# Rival entry points on the fifteen, each called as its documentation says: run in November 2026 with grad-cam 1.5.5,
# vit-explain of 2020-12, fast-vit-rollout 0.1.1, timm 1.0.31, torchxai-explain 0.3.0, daam-timm-vit 0.2.1 and
# torchcam 0.5.0.
# ok: right shape, finite. -: an exception or an empty result. wrong: a map of a wrong shape, without a word. raw: the
# windows' own maps, not put on the image. other: another method in its place, without being asked.
FIELD_COLUMNS = (
    "grad-cam recipe",
    "vit-explain",
    "fast-vit-rollout",
    "timm AttentionExtract",
    "torchxai",
    "daam",
    "torchcam LeGrad",
)
FIELD = [
    ("timm vit_tiny", "ok", "-", "-", "-", "ok", "ok", "-"),
    ("timm vit_tiny, 224 x 320", "-", "-", "-", "-", "wrong", "ok", "-"),
    ("timm deit_tiny_distilled", "-", "-", "-", "-", "ok", "ok", "-"),
    ("timm DINOv2 with registers", "-", "-", "-", "-", "ok", "ok", "-"),
    ("timm swin_tiny", "-", "-", "-", "raw", "wrong", "-", "-"),
    ("timm swinv2_tiny", "-", "-", "-", "raw", "wrong", "-", "-"),
    ("timm maxvit_tiny", "-", "-", "-", "-", "wrong", "-", "-"),
    ("timm pvt_v2_b0", "-", "-", "-", "-", "wrong", "-", "-"),
    ("timm eva02_tiny", "-", "-", "-", "-", "ok", "ok", "-"),
    ("timm hiera_tiny", "-", "-", "-", "-", "other", "-", "-"),
    ("timm SigLIP, map pooling", "-", "-", "-", "-", "wrong", "-", "-"),
    ("torchvision vit_b_16", "-", "-", "-", "-", "other", "-", "ok"),
    ("torchvision swin_t", "-", "-", "-", "-", "other", "-", "-"),
    ("Hugging Face ViT", "-", "-", "-", "-", "other", "-", "-"),
    ("Hugging Face Swin", "-", "-", "-", "-", "other", "-", "-"),
]


def key(row: Row) -> str:
    return f"{row.library} {row.name}"


def said(error: BaseException) -> str:
    """The first line of an error."""
    return " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__


def examine(row: Row, *, quick: bool = False) -> dict[str, Any]:
    """Everything about one row; what fails is recorded in its place and the rest goes on. ``quick``: no training."""
    found: dict[str, Any] = {"size": list(row.size), "margin": row.margin, "rules": {}, "failed": {}}
    if row.stimulus is not None:
        found["stimulus"] = list(row.stimulus)
    try:
        model = wake(row.build()) if row.name != REFUSED[-1].name else row.build()
    except Exception as error:  # the library may be absent or of another version
        return {**found, "unavailable": f"{type(error).__name__}: {said(error)}"}
    images = noise(model, row.size)
    try:
        description = check_recognised(model, images)
    except AssertionError as error:
        cause = error.__cause__
        return {**found, "refused": said(cause or error), "error": type(cause or error).__name__}
    found |= {"family": description.family, "grid": list(description.grid), "prefix": description.prefix_tokens}
    found |= {
        "covers": getattr(description, "covers", ""),
        "attentions": sum(s.kind == "attention" for s in description.steps),
    }

    def measured(name: str, check: Callable[[], Any]) -> None:
        try:
            found[name] = check()
        except Exception as error:  # a row says what went wrong, whatever it was
            found["failed"][name] = said(error)

    target = _counted_for(model, images)
    for rule in rule_names():
        begin = time.process_time()
        try:
            check_rule(model, images, rule, target=target)
            found["rules"][rule] = round(time.process_time() - begin, 2)
        except AssertionError as error:
            found["failed"][f"rule {rule}"] = said(error)
    defined = [rule for rule in rule_names() if rule in found["rules"]]
    measured("mass", lambda: check_mass(model, images))
    measured("completeness", lambda: check_completeness(model, images))
    measured("batch", lambda: check_batch(model, images, defined))
    measured("untouched", lambda: check_untouched(model, images, defined) is None)
    measured("sizes", lambda: other_sizes(row))
    if quick:
        return found
    try:
        place = _ground(row, model)
    except Exception as error:
        found["failed"]["placement"] = said(error)
        return found
    regions = [region.grown(row.margin) for region in place.regions]
    measured("layout", lambda: check_layout(model, *planted_images(place), regions))

    def placed() -> dict[str, list[float]]:
        total: dict[str, list[float]] = {}
        for seed in range(row.seeds):
            # Of several, each is on a ground of its own from the beginning, so that one can be done again alone.
            here = place if row.seeds == 1 else _ground(row, model, seed)
            placement, (steps, loss) = check_placement(model, here, rules=defined, required=(), steps=row.steps)
            found.setdefault("training", []).append([steps, round(loss, 4)])
            for rule, p in placement.items():
                hits, regions, least, exact = total.get(rule, [0, 0, 1e6, 0])
                least = round(min(p.margin, least), 2)
                total[rule] = [hits + p.hits, regions + p.regions, least, exact + p.exact]
        return total

    measured("placed", placed)
    return found


def _ground(row: Row, model: torch.nn.Module, seed: int = 0) -> Ground:
    return ground(model, row.size, stimulus=row.stimulus, step=row.step, margin=row.margin, seed=seed)


def _counted_for(model: torch.nn.Module, images: torch.Tensor) -> int:
    """A class that something counts for in every image: of random weights, all may count against the first."""
    evidence = LNStatAttribution(model, rule="evidence")
    for target in range(5):
        try:
            grid = evidence.relevance(images, target)
        except Exception:  # a row says what the rules make of it
            return 0
        if bool((grid.flatten(1).amax(1) > 1e-6 * grid.flatten(1).abs().amax(1)).all()):
            return target
    return 0


def other_sizes(row: Row) -> dict[str, str]:
    """What came of images of other sizes."""
    model = wake((row.elsewhere or row.build)())
    return {f"{h} x {w}": _at(model, (h, w)) for h, w in row.others}


def _at(model: torch.nn.Module, size: tuple[int, int]) -> str:
    images = noise(model, size)
    try:
        with torch.no_grad():
            model(images)
    except Exception:  # the model's own limit
        return NOT_TAKEN
    try:
        for rule in ("lnstat", "rollout"):
            check_rule(model, images, rule, target=_counted_for(model, images))
        check_completeness(model, images)
    except AssertionError as error:
        return said(error.__cause__ or error)
    return "ok"


def examine_default(row: Row) -> dict[str, Any]:
    """The model as its name gives it, with the weights it is made with: one image, every rule."""
    assert row.default is not None
    build, size = row.default
    found: dict[str, Any] = {"size": list(size), "rules": {}, "failed": {}}
    try:
        found["parameters"] = round(_parameters(build) / 1e6, 1)
        if found["parameters"] > LARGEST:
            return {**found, "left out": f"{found['parameters']:.0f}M parameters; expected at most {LARGEST}M"}
        model = build().eval()
    except Exception as error:
        return {"unavailable": f"{type(error).__name__}: {said(error)}"}
    images = noise(model, size, 1)
    begin = time.process_time()
    with torch.no_grad():
        model(images)
    found["forward"] = round(time.process_time() - begin, 2)
    for rule in rule_names():
        begin = time.process_time()
        try:
            outcome, relevance = explain_batch(LNStatAttribution(model, rule=rule), images, [0])
        except Exception as error:
            found["failed"][rule] = f"{type(error).__name__}: {said(error)}"
            continue
        found["rules"][rule] = round(time.process_time() - begin, 2)
        grid = relevance.grid
        found["grid"] = list(grid.shape[1:])
        if not bool(torch.isfinite(grid).all()):
            found["failed"][rule] = "the map is not finite"
        elif float(grid.max() - grid.min()) <= 1e-6 * float(grid.abs().max()):
            found["failed"][rule] = f"the map is constant, {float(grid.max()):.2g} everywhere"
        if rule == "rollout":
            found["mass"] = float((relevance.total - 1).abs().max())
        if rule == "evidence" and outcome.score is not None:
            scale = outcome.score.abs().clamp(min=1.0)
            found["completeness"] = float(((relevance.total - outcome.score).abs() / scale).max())
    return found


def _parameters(build: Callable[[], torch.nn.Module]) -> int:
    """How many parameters a model has, without making them where it can be told so."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # a library that computes with numbers while it builds
        model = build()
    return sum(parameter.numel() for parameter in model.parameters())


def lost(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a row had in the record and has no more; nothing if it could not be run, before or now."""
    if "unavailable" in before or "unavailable" in now or "refused" in before:
        return []
    if "refused" in now:
        return [f"refused: {now['refused']}"]
    gone = [f"rule {rule}" for rule in before["rules"] if rule not in now["rules"]]
    gone += [f"{size}: {now['sizes'].get(size)}" for size, came in before["sizes"].items()
             if came == "ok" and now["sizes"].get(size, "ok") != "ok"]  # fmt: skip
    same = ("family", "grid", "prefix", "covers", "attentions")
    gone += [f"{name}: {before.get(name)}, now {now.get(name)}" for name in same if before.get(name) != now.get(name)]
    return gone + [f"{name}: {why}" for name, why in now["failed"].items() if name not in before["failed"]]


def in_a_process(name: str, *kind: str) -> dict[str, Any]:
    """One row in a process of its own, so that a crash or an endless loop costs that row alone."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", name, *kind]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return {"unavailable": f"not finished in {TIMEOUT} s"}
    if done.returncode != 0:
        return {"unavailable": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.monotonic() - begin, 1)}


def verdict(row: Row, found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if "unavailable" in found:
        return "not run"
    if "refused" in found:
        return "refused, as it must be" if row.refused else "refused"
    if row.refused:
        return "NOT REFUSED"
    peaks = found.get("placed", {})
    missed = [rule for rule in PEAKS if rule not in peaks or peaks[rule][0] < peaks[rule][1]]
    failed = [why for why in found["failed"].values() if UNDEFINED not in why]
    return "ok" if not failed and not missed else "part"


def number(value: object) -> str:
    return "" if value is None else f"{value:.0e}" if isinstance(value, float) and value > 0 else "0"


# These keep a cell of numbers in one line.
SPACE, HYPHEN = "\u00a0", "\u2011"


def joined(*cells: str) -> str:
    """Several numbers in one cell of one line."""
    return f",{SPACE}".join(cell.replace("-", HYPHEN) or HYPHEN for cell in cells) if any(cells) else ""


def by(sides: Any) -> str:
    """Rows by columns, without spaces, so that a cell of a table is not broken in it."""
    return "x".join(map(str, sides))


def _peaks(found: dict[str, Any]) -> str:
    """Peaks of each rule in so many regions; and on the stimulus itself, where a margin was allowed beside it."""
    counted = found.get("placed", {})
    if not counted:
        return ""
    regions = next(iter(counted.values()))[1]
    peaks = joined(*(str(counted[rule][0]) if rule in counted else "" for rule in rule_names()))
    exact = [str(p[3]) for rule, p in counted.items() if rule in PEAKS and len(p) > 3]
    beside = f" (exactly: {', '.join(exact)})" if found.get("margin") and exact else ""
    return f"{peaks}{SPACE}of{SPACE}{regions}{beside}"


def line(row: Row, found: dict[str, Any] | None) -> str:
    found = found or {}
    seen = "grid" in found
    margin = f"{SPACE}+{found['margin']}" if found.get("margin") else ""
    margin += f" (stimulus {by(found['stimulus'])})" if "stimulus" in found else ""
    cells = [
        row.library,
        row.name,
        verdict(row, found or None),
        found.get("family", ""),
        by(found["size"]) if seen else "",
        by(found["grid"]) + margin if seen else "",
        joined(*(number(found[name]) if name in found else "" for name in ("mass", "completeness", "batch"))),
        f"{found['layout']}/{found['attentions']}" if "layout" in found else "",
        _peaks(found),
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = "| library | model | verdict | family | px | grid | errors | layout | peaks |"


def sizes(results: dict[str, Any]) -> list[str]:
    """Other sizes that models took, a line for all that took the same."""
    taken: dict[tuple[str, str], list[str]] = {}
    for row in ROWS:
        found = results.get(key(row)) or {}
        held = [by(size.split(" x ")) for size, what in found.get("sizes", {}).items() if what == "ok"]
        if held:
            taken.setdefault((by(found["size"]), ", ".join(held)), []).append(row.name)
    return [f"- **{size}**, and {others}: {', '.join(names)}." for (size, others), names in taken.items()]


LAYOUT = re.compile(
    r"rows (-?\d+) to (-?\d+), columns (-?\d+) to (-?\d+) changes the values of '(\S+)' .*"
    r"most at row (\d+), column (\d+)"
)
LEARNT = re.compile(
    r"after (\d+) steps, loss (\S+), the score does not tell .*falls by (\S+) when .*let it fall by ([\d.]+)\."
)
COVERS = re.compile(r"The grid is that of the first attention block: .* \((.*?)\) .* it to\.\s*")


def in_words(what: str, why: str, found: dict[str, Any]) -> str:
    """What a check said, cut to what a reader needs."""
    margin = found.get("margin", 0)
    seen = LAYOUT.search(why)
    if seen:
        (top, bottom, left, right), (y, x) = map(int, seen.group(1, 2, 3, 4)), map(int, seen.group(6, 7))
        beside = max(top + margin - y, y - bottom + margin, left + margin - x, x - right + margin)
        size = " x ".join(str(-(-side // cells)) for side, cells in zip(found["size"], found["grid"], strict=True))
        return f"the values of `{seen.group(5)}` change most {beside} px beside a stimulus (patches of {size} px)"
    learnt = LEARNT.search(why)
    if learnt:
        steps, loss, drop, wanted = learnt.groups()
        return (
            f"peaks not measured: after {steps} steps, at a loss of {loss}, the small model's score falls by {drop} "
            f"when the stimulus is covered, not by {wanted}"
        )
    return f"{what}: {why.split('UnsupportedModelError: ', 1)[-1]}"


def exceptions(results: dict[str, Any]) -> list[str]:
    """What is not as it should be, or not all of it, in words: one line a model."""
    lines = []
    for row in ROWS:
        found = results.get(key(row))
        if row.refused and (found is None or "refused" in found):
            continue
        if found is None:
            lines.append(f"- **{key(row)}**: not run.")
            continue
        said_of = [f"not run: {found['unavailable']}"] if "unavailable" in found else []
        said_of += [f"refused: {found['refused']}"] if "refused" in found else []
        said_of += [in_words(what, why, found) for what, why in found.get("failed", {}).items()]
        margin = found.get("margin", 0)
        for rule, (hits, regions, *_) in found.get("placed", {}).items():
            if rule in PEAKS and hits < regions:
                where = f"within {margin} px of the stimulus" if margin else "on the stimulus"
                said_of.append(f"the peak of `{rule}` lies {where} in {hits} of {regions} regions")
        said_of += [
            f"at {size}: {what}" for size, what in found.get("sizes", {}).items() if what not in ("ok", NOT_TAKEN)
        ]
        if said_of and row.note:
            said_of.append(row.note)
        if said_of:
            lines.append(f"- **{key(row)}**: {'; '.join(said_of)}.")
    return lines


def covered(results: dict[str, Any]) -> list[str]:
    """What maps do not tell apart: what is below the grid, and what is said besides, one line a model."""
    lines = []
    for row in ROWS:
        found = results.get(key(row)) or {}
        text = found.get("covers", "")
        if not text:
            continue
        below = COVERS.match(text)
        names = ", ".join(f"`{name}`" for name in below.group(1).split(", ")) if below else ""
        rest = COVERS.sub("", text).strip().rstrip(".")
        lines.append(f"- **{key(row)}**: {'; '.join(filter(None, (names, rest)))}.")
    return lines


def fifteen(results: dict[str, Any]) -> list[str]:
    """The table of the fifteen: this package, then the others."""
    own = [verdict(row, results.get(key(row))) for row in FIFTEEN]
    lines = [f"| model | **this package** | {' | '.join(FIELD_COLUMNS)} |", "|---" * (len(FIELD_COLUMNS) + 2) + "|"]
    lines += [f"| {name} | {here} | {' | '.join(field)} |" for (name, *field), here in zip(FIELD, own, strict=True)]
    totals = [str(sum(row[i] == "ok" for row in FIELD)) for i in range(1, len(FIELD_COLUMNS) + 1)]
    return [*lines, f"| right on | **{own.count('ok')}** | {' | '.join(totals)} |"]


def full_size(full: list[tuple[Row, dict[str, Any]]]) -> list[str]:
    """The models as their names give them."""
    many = sum(row.default is not None for row in ROWS)
    timed = f"seconds: forward, {', '.join(rule_names())}"
    parts = [f"| model | M parameters | px | grid | {timed} | mass, complete |", "|---|---|---|---|---|---|"]
    besides = []
    for row, found in full:
        times = found.get("rules", {})
        why = {f"{rule}: {message}": None for rule, message in found.get("failed", {}).items()}
        messages = {message.split(": ", 1)[-1] for message in found.get("failed", {}).values()}
        if len(messages) == 1 and not times:
            why = {f"refused: {messages.pop()}": None}
        why |= {found[what]: None for what in ("left out", "unavailable") if what in found}
        besides += [f"- **{key(row)}**: {'; '.join(why)}."] if why else []
        seconds = [
            str(found.get("forward", "")),
            *(f"{times[rule]:.2f}" if rule in times else "" for rule in rule_names()),
        ]
        cells = [
            key(row),
            str(found.get("parameters", "")),
            by(found.get("size", ())),
            by(found.get("grid", ())),
            joined(*seconds),
            joined(*(number(found[name]) if name in found else "" for name in ("mass", "completeness"))),
        ]
        parts.append("| " + " | ".join(cells) + " |")
    return [
        "",
        "## At full size",
        "",
        f"{len(full)} of {many} models as their names give them, one image of noise: every rule, with weights that",
        "the library draws. Process time of one core in seconds, on a machine that did other things at once. A",
        "model that is made with a head of zeros has the same score whatever the image: 0.1 refused it, and now its",
        "map is zero, with a warning that says why. Written by",
        "`python tests/benchmarks/family_matrix.py --defaults`; `--missing` goes on where it was stopped.",
        *folded(f"{len(full)} models, and {len(besides)} exceptions", [*boxed(parts), "", *besides]),
    ]


def folded(title: str, lines: list[str]) -> list[str]:
    """Lines that a click unfolds."""
    return ["", "<details>", f"<summary>{title}</summary>", "", *lines, "", "</details>"]


def page(results: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for row in ROWS:
        name = verdict(row, results.get(key(row)))
        counts[name] = counts.get(name, 0) + 1
    parts = [
        "# Models, one by one",
        "",
        "*All figures but those of the last section are of 0.1, whose default maps were others; the families that",
        "work are held to in 0.2 by the tests. In short, what is explained and what is refused:",
        "[models](models.md).*",
        "",
        f"{len(ROWS)} models of timm, torchvision and transformers: "
        + ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
        + ". Written by `python tests/benchmarks/family_matrix.py`; made again for one model with `--only NAME`.",
        "",
        "`ok`: at its first size everything holds. `part`: an exception is listed below. `refused`: an",
        "`UnsupportedModelError` or `RecordingError`, listed below, and no map; `refused, as it must be` where a map",
        "would mean nothing.",
    ]
    table = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    table += [line(row, results.get(key(row))) for row in ROWS]
    parts += boxed(table, "library,verdict,family") + folded("What the columns say", columns())
    parts += [
        "",
        "## Beside other packages",
        "",
        "Fifteen models that people use, and seven other entry points, each called as its own documentation says.",
        "`ok` of the others: a map of the right shape, finite. `ok` of this package: all of the table above, on a",
        "small model of the same class. `-`: an exception or an empty result; `wrong`: a map of a wrong shape, without",
        "a word; `raw`: windows that are not put on the image; `other`: another method in its place. November 2026,",
        "with grad-cam 1.5.5, vit-explain of 2020-12, fast-vit-rollout 0.1.1, timm 1.0.31, torchxai-explain 0.3.0,",
        "daam-timm-vit 0.2.1 and torchcam 0.5.0.",
        *boxed(fifteen(results)),
        "",
        "## Models that must be refused",
        "",
    ]
    for row in REFUSED:
        found = results.get(key(row)) or {}
        parts.append(f"- **{row.name}**, {verdict(row, found or None)}: {found.get('refused', '')}.")
    parts += ["", "## Exceptions", *folded("What does not hold, on which model", exceptions(results) or ["None."])]
    parts += [
        "",
        "## What a map does not tell apart",
        "",
        "The grid of these is that of the first attention block: what the convolutions named here, below it, did is",
        "not told apart. What convolutions between the blocks added is counted at the token that they added it to.",
        *folded("Which convolutions", covered(results)),
        "",
        "## Other sizes",
        "",
        "Image sizes besides the first one on which `lnstat`, `rollout` and completeness held: smaller, larger,",
        "of another shape, and not a multiple of patch or window, as far as the model takes them. It is told to",
        "take any where its library can be told so (`dynamic_img_size`, `strict_img_size=False`,",
        "`interpolate_pos_encoding`). Models that are not here take the size that they were built for.",
        *folded("Which sizes", sizes(results)),
    ]
    full = [(row, results[key(row)]["default"]) for row in ROWS if "default" in (results.get(key(row)) or {})]
    parts += full_size(full) if full else []
    parts += fuzz_section()
    return "\n".join(parts) + "\n"


def columns() -> list[str]:
    """What the columns of the table say."""
    return [
        "Each is the library's own class with few, narrow blocks and random weights, on a small image, so that all of",
        "them can be examined in minutes; what differs between sizes of one family is width and depth, not wiring.",
        "",
        "- **errors**: of the sum of `rollout`, which is 1; of `evidence` against the score, relative to max(1,",
        "  |score|); the largest difference between a batch and its images one by one.",
        "- **layout**: attentions whose values change most where a stimulus was planted, at every one of the",
        "  regions.",
        "- **peaks**: regions in which the map's peak lies on the stimulus, after the model has been trained for",
        "  some seconds to score images by whether the stimulus is in them; of the rules in this order:",
        f"  {', '.join(rule_names())}.",
        "  `lnstat` and `evidence` have to find it; the others show what the model looks at and what its",
        "  attention carries, which need not peak there.",
        "- **grid**: with the pixels beside the stimulus that still count as on it, in layout and peaks (+4): none",
        "  where patches are cut apart. Where convolutions make the tokens, a token is made of more than the",
        "  patch it stands for and sees the stimulus from beside it; 8 px at most. *exactly*: of such a model,",
        "  peaks of `lnstat` and `evidence` on the stimulus itself. The stimulus is as large as a token of the",
        "  last block, or of the size that stands here.",
        "",
        "All rules ran, with relevance of the right shape, finite and not constant, unless an exception says",
        "otherwise.",
        "",
        "Regions of more than one training are counted together: six of `swinv2_tiny_window8_256`, three of",
        "`swinv2_cr_tiny_ns_224`, each with other textures and scenes.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="rows whose name holds this")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result yet")
    parser.add_argument("--defaults", action="store_true", help="the models at full size, instead")
    parser.add_argument("--write", action="store_true", help="run nothing, write the page")
    parser.add_argument("--quick", action="store_true", help="without training; print what was lost since the record")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--default-row", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        row = next(row for row in ROWS if key(row) == arguments.row)
        print(json.dumps(examine_default(row) if arguments.default_row else examine(row, quick=arguments.quick)))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    losses = 0
    for row in ROWS:
        chosen = not arguments.only or any(part in key(row) for part in arguments.only)
        done = key(row) in results and (not arguments.defaults or "default" in results[key(row)])
        if arguments.write or not chosen or (arguments.missing and done):
            continue
        if arguments.defaults:
            if row.default is None:
                continue
            results.setdefault(key(row), {})["default"] = found = in_a_process(key(row), "--default-row")
        elif arguments.quick:
            found = in_a_process(key(row), "--quick")
            gone = lost(results[key(row)], found) if key(row) in results else []
            print(f"{key(row)}: {'; '.join(gone) or found.get('unavailable') or 'as before'}", flush=True)
            losses += bool(gone)
            continue
        else:
            kept = {name: value for name, value in results.get(key(row), {}).items() if name == "default"}
            results[key(row)] = found = {**in_a_process(key(row)), **kept}
        print(f"{key(row)}: {verdict(row, found) if not arguments.defaults else found}", flush=True)
        RESULTS.write_text(json.dumps({key(r): results[key(r)] for r in ROWS if key(r) in results}, indent=1) + "\n")
    if arguments.quick:
        print(f"{losses} rows lost something")
        sys.exit(losses > 0)
    (DOCS / "models-table.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
