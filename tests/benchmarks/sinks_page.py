"""The tables and figures of ``docs/sinks.md``, from the numbers in ``docs/sinks.json``.

``python tests/benchmarks/sinks_page.py`` writes them; no weights are needed. ``sinks.py`` measures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
PAGE, FOUND, PICTURES = DOCS / "sinks.md", DOCS / "sinks.json", DOCS / "pictures"
TITLES = ("ViT-Tiny", "DeiT-Tiny")
COLORS = {"corner": "#c8311b", "object": "#1f6fb4", "class": "#777777"}
WORDS = {"corner": "four corners", "object": "in the object's box", "class": "class token"}
RELATIONS = {"A": "attention", "W": "share of the variance", "W less mean": "the same, values less their mean"}
OUTLIERS = {"corner": "corners", "other": "other patches"}
BLOCKS = range(12)
EVEN = 4 / 196
Found = dict[str, Any]


def short(value: float) -> str:
    """Three digits at most."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def by_block(found: Found, columns: Sequence[tuple[str, str, str, Callable[[float], str]]]) -> str:
    """A row a block; a column is its head, a model, the name of a quantity and how to write it."""
    rows = [
        [str(block), *(write(found[title]["blocks"][f"{block}/{name}"][0]) for _, title, name, write in columns)]
        for block in BLOCKS
    ]
    return table(["block", *(head for head, *_ in columns)], rows)


def attention(found: Found) -> str:
    groups = {"corner": "corners", "object": "object", "class": "class token"}
    return by_block(
        found,
        [
            (f"{title}: {word}", title, f"received/A/{group}", percent)
            for title in TITLES
            for group, word in groups.items()
        ],
    )


def of_variance(found: Found, title: str, places: dict[str, str]) -> str:
    columns = [
        (f"{group}: {word}", title, f"variance/{place}/{group}", short)
        for group in ("corner", "object")
        for place, word in places.items()
    ]
    columns += [(f"outliers: {word}", title, f"outliers/{kind}", short) for kind, word in OUTLIERS.items()]
    return by_block(found, columns)


def variance(found: Found) -> str:
    places = {"before": "before", "between": "after attention", "after": "after the MLP"}
    return of_variance(found, "ViT-Tiny", places)


def variance_deit(found: Found) -> str:
    return of_variance(found, "DeiT-Tiny", {"between": "after attention", "after": "after the MLP"})


def shares(found: Found) -> str:
    groups = {"corner": "corner", "object": "object", "class": "class token"}
    return by_block(
        found,
        [
            (f"`{form}`: {word}", "ViT-Tiny", f"share/{form}/{group}", short)
            for form in ("ratio", "update")
            for group, word in groups.items()
        ],
    )


def value(found: Found) -> str:
    columns: list[tuple[str, str, str, Callable[[float], str]]] = []
    for title in TITLES:
        columns += [(f"{title}: {group}", title, f"value/{group}", short) for group in ("corner", "object")]
    columns += [
        (f"ViT-Tiny, less the mean: {group}", "ViT-Tiny", f"value less mean/{group}", short)
        for group in ("corner", "object")
    ]
    return by_block(found, columns)


def received(found: Found) -> str:
    return by_block(
        found,
        [
            (f"{title}: {word}", title, f"received/{relation}/corner", percent)
            for title in TITLES
            for relation, word in RELATIONS.items()
        ],
    )


def walk(found: Found) -> str:
    rows = [
        [
            f"`{form}`",
            word,
            *(_with_range(found[t]["walk"][f"{form}/{name}/{g}"]) for t in TITLES for g in WORDS if g != "class"),
        ]
        for form in ("ratio", "update", "half")
        for name, word in RELATIONS.items()
    ]
    areas = [f"{percent(found[title]['area']['object'][0])}" for title in TITLES]
    rows.append(["", "*an even map*", percent(EVEN), areas[0], percent(EVEN), areas[1]])
    heads = [f"{title}: {word}" for title in TITLES for word in ("corners", "object")]
    return table(["residual share", "a token is shared by", *heads], rows)


def _with_range(estimate: Sequence[float]) -> str:
    middle, low, high = (100 * number for number in estimate)
    return f"{middle:.1f} % [{low:.1f}, {high:.1f}]"


TABLES = {f.__name__: f for f in (attention, variance, variance_deit, shares, value, received, walk)}


def curve(axes: Axes, found: Found, title: str, name: str, style: str = "-", **options: object) -> None:
    """A quantity over the blocks, with its range."""
    middle, low, high = zip(*(found[title]["blocks"][f"{block}/{name}"] for block in BLOCKS), strict=True)
    (line,) = axes.plot(BLOCKS, middle, style, marker="o", markersize=3, linewidth=1.6, **options)
    axes.fill_between(BLOCKS, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def pair(below: str, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Two plots beside each other, one a model, of the same height."""
    figure = Figure(figsize=(8.6, height), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, title in zip((left, right), TITLES, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(below, fontsize=9)
        axes.set_xticks(BLOCKS)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [left, right]


def draw_attention(found: Found) -> None:
    figure, plots = pair("block")
    for axes, title in zip(plots, TITLES, strict=True):
        for group, color in COLORS.items():
            curve(axes, found, title, f"received/A/{group}", color=color, label=WORDS[group])
        axes.axhline(EVEN, color=COLORS["corner"], linewidth=0.8, linestyle=":", label="corners, if it were even")
    plots[0].set_ylabel("attention received", fontsize=9)
    plots[0].set_ylim(0, 1)
    plots[1].legend(fontsize=8, frameon=False)
    save(figure, "sinks-attention.png")


def draw_variance(found: Found) -> None:
    figure, plots = pair("after block")
    for axes, title in zip(plots, TITLES, strict=True):
        for group in ("corner", "object"):
            for place, offset in (("between", -0.5), ("after", 0.0)):
                middle, low, high = zip(
                    *(found[title]["blocks"][f"{block}/variance/{place}/{group}"] for block in BLOCKS), strict=True
                )
                at = [block + offset for block in BLOCKS]
                filled = COLORS[group] if place == "after" else "white"
                axes.vlines(at, low, high, color=COLORS[group], linewidth=0.8)
                axes.plot(
                    at, middle, "o", color=COLORS[group], markerfacecolor=filled, markersize=4.2, linestyle="none",
                    label=f"{WORDS[group]}, after the {'MLP' if place == 'after' else 'attention'}", zorder=3,
                )  # fmt: skip
            steps = [
                (block + offset, found[title]["blocks"][f"{block}/variance/{place}/{group}"][0])
                for block in BLOCKS
                for place, offset in (("between", -0.5), ("after", 0.0))
            ]
            axes.plot(*zip(*steps, strict=True), color=COLORS[group], linewidth=1, alpha=0.6)
        axes.set_yscale("log")
    plots[0].set_ylabel("token variance, median", fontsize=9)
    plots[1].legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, "sinks-variance.png")


def draw_value(found: Found) -> None:
    figure = Figure(figsize=(8.6, 2.9), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    for title, style in zip(TITLES, ("-", "--"), strict=True):
        for group in ("corner", "object"):
            label = f"{title}, {WORDS[group]}"
            curve(left, found, title, f"value/{group}", style, color=COLORS[group], label=label)
    left.set_title("what flows from a key, by the attention that it gets", fontsize=9.5)
    left.set_ylim(bottom=0)
    for (relation, word), color in zip(RELATIONS.items(), ("#c8311b", "#2a8a4a", "#8a5ab4"), strict=True):
        curve(right, found, "ViT-Tiny", f"received/{relation}/corner", color=color, label=word)
    right.axhline(EVEN, color="#777777", linewidth=0.8, linestyle=":", label="an even map")
    right.set_title("ViT-Tiny: what the four corners get of a token", fontsize=9.5)
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("block", fontsize=9)
        axes.set_xticks(BLOCKS)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=7.5, frameon=False, loc="lower left")
    right.legend(fontsize=7.5, frameon=False, loc="upper left")
    save(figure, "sinks-value.png")


def save(figure: Figure, name: str) -> None:
    path = PICTURES / name
    figure.savefig(path, dpi=110, pil_kwargs={"optimize": True})
    print(f"{name}: {path.stat().st_size // 1000} kB")


def with_tables(page: str, found: Found) -> str:
    """The page with every table between its two markers made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        new = f"{begin}\n\n{make(found)}\n\n{end}"
        page, count = re.subn(pattern, lambda _, new=new: new, page, flags=re.S)
        assert count == 1, f"the page has {count} places for the table {name}"
    return page


def main() -> None:
    found = json.loads(FOUND.read_text())
    for draw in (draw_attention, draw_variance, draw_value):
        draw(found)
    PAGE.write_text(with_tables(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
