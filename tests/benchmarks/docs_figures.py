"""The figures of the documentation, drawn from recordings of the models in the package.

Run ``python tests/benchmarks/docs_figures.py``: it writes ``docs/pictures`` and prints the numbers of ``docs/swin.md``.
It reads what a rule reads, a traced forward pass, which is no public interface and may change.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_lnstat import AttentionRollout, LNStatAttribution, zoo
from captum_lnstat.layout import Groups
from captum_lnstat.metrics import pointing
from captum_lnstat.recording.fusion import fuse
from captum_lnstat.recording.statistics import token_variance
from captum_lnstat.rules.engine import run
from captum_lnstat.rules.relation import propagate
from captum_lnstat.trace.deviations import less_the_mean
from captum_lnstat.trace.steps import Block, Merging
from captum_lnstat.trace.trace import Trace
from captum_lnstat.visualize import overlay, to_map

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SCENE = 264  # two objects well apart: a sandal and trousers
SINGLE = (0, 27, 54, 135, 162)
CELL, DPI, INK = 1.5, 110, "#222222"
Descent = Iterator[tuple[Block, Tensor]]


def traced(model: torch.nn.Module, images: Tensor) -> Trace:
    """One recorded forward pass, as the rules read it."""
    return run(model, model, images).trace


def descend(
    trace: Trace, share: Callable[[Block], Tensor], merging: str = "variance", relation: str = "variance"
) -> Descent:
    """Perception from the head to the image: every block with the relevance of the tokens before it."""
    r = trace.start(relation)
    for step in reversed(trace.steps):
        if isinstance(step, Merging):
            children = r[:, :, None] * step.shares(merging)
            r = step.below.scatter(children.flatten(0, 1)[..., None], len(r))[0][..., 0]
        elif isinstance(step, Block):
            alpha = share(step)
            r = alpha * r + propagate(step, ((1 - alpha) * r)[..., None], fusion=relation).rows[..., 0]
            yield step, r


def deviation(block: Block) -> Tensor:
    return block.residual_share("deviation")


def taken(block: Block, batch: int = 1) -> Tensor:
    """What is taken from each token by all the others, by the share of the update's variance."""
    return propagate(block, block.between.new_ones(batch, block.between.shape[1], 1), fusion="variance").rows[..., 0]


def received(block: Block, batch: int = 1) -> Tensor:
    """Attention that each token is given by all the others, heads averaged."""
    columns = fuse(block.site, "mean").sum(1)
    return block.layout.scatter(columns[..., None], batch)[0][..., 0]


def on_grid(values: Tensor, prefix: int) -> np.ndarray:
    patches = values[0, prefix:]
    size = int(len(patches) ** 0.5)  # the models of the zoo are square
    return patches.reshape(size, size).numpy()


class Sheet:
    """A grid of small pictures with a word above each; in flat colours it stays a small file."""

    def __init__(self, rows: int, columns: int, *, left: float = 0.0, above: float = 0.26) -> None:
        self._rows, self._left, self._above = rows, left, above
        self._width, self._height = left + columns * (CELL + 0.08), rows * (CELL + above + 0.06)
        self.figure = Figure(figsize=(self._width, self._height), dpi=DPI, facecolor="white")

    def cell(self, row: int, column: int, title: str = "", values: np.ndarray | None = None, **options: object):
        left = self._left + column * (CELL + 0.08)
        below = self._height - row * (CELL + self._above + 0.06) - self._above - CELL
        axes = self.figure.add_axes((left / self._width, below / self._height, CELL / self._width, CELL / self._height))
        axes.set_axis_off()
        axes.set_title(title, fontsize=7.5, color=INK, pad=2.5)
        if values is not None:
            smooth = "bicubic" if values.ndim == 3 else "nearest"  # a photograph; tokens
            axes.imshow(values, interpolation=smooth, **{"cmap": "inferno", **options})
        return axes

    def row(self, row: int, name: str) -> None:
        middle = self._height - row * (CELL + self._above + 0.06) - self._above - CELL / 2
        self.figure.text(
            (self._left - 0.08) / self._width,
            middle / self._height,
            name,
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
        )

    def save(self, name: str) -> None:
        path = PICTURES / name
        self.figure.savefig(path, pil_kwargs={"optimize": True})
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


def picture(scene: zoo.Scene) -> np.ndarray:
    return np.asarray(scene.image) / 255


def method_descent() -> None:
    """Block by block through the ViT: what the statistics are, and where the relevance goes."""
    vit, scene = zoo.load("vit-mini"), zoo.scenes()[SCENE]
    trace = traced(vit.model, vit.transform(scene.image)[None])
    sheet = Sheet(len(trace.blocks), 6, left=0.75)
    for row, (block, r) in enumerate(descend(trace, deviation)):
        variance = token_variance(less_the_mean(block.base))[:, 1:]
        share = deviation(block)[:, 1:]
        attention = fuse(block.site, "mean")[:, 0]
        weights = propagate(block, torch.eye(1, len(block.base[0]))[..., None], fusion="variance").rows[..., 0]
        sheet.row(row, block.name)
        sheet.cell(row, 0, "image" if not row else "", picture(scene))
        sheet.cell(row, 1, f"variance, {variance.min():.2f} to {variance.max():.2f}", on_grid(variance, 0))
        sheet.cell(row, 2, f"share kept, {share.min():.2f} to {share.max():.2f}", on_grid(share, 0), vmin=0, vmax=1,
                   cmap="viridis")  # fmt: skip
        sheet.cell(row, 3, f"class token attends, {attention[0, 1:].sum():.0%}", on_grid(attention, 1))
        sheet.cell(row, 4, f"and is brought, {weights[0, 1:].sum():.0%}", on_grid(weights, 1))
        sheet.cell(row, 5, f"P before it, {r[0, 1:].sum():.0%} on patches", on_grid(r, 1))
    sheet.save("method-descent.png")


def method_classes() -> None:
    """Two classes in one image: perception is one, evidence is two, and so is its positive part."""
    scene = zoo.scenes()[SCENE]
    sheet = Sheet(4, 4, left=0.75)
    for place, name in enumerate(("swin-mini", "vit-mini")):
        reference = zoo.load(name)
        image = reference.transform(scene.image)[None]
        looked = to_map(LNStatAttribution(reference.model, rule="rollout").attribute(image)[0])
        for index, label in enumerate(scene.labels):
            row = 2 * place + index
            argued = to_map(LNStatAttribution(reference.model, rule="evidence").attribute(image, target=label)[0])
            counted = to_map(LNStatAttribution(reference.model).attribute(image, target=label)[0])
            sheet.row(row, f"{name}\n{reference.class_names[label]}")
            first = not row
            sheet.cell(row, 0, "image" * first, picture(scene))
            sheet.cell(row, 1, "P: looked at" * first, overlay(picture(scene), looked))
            sheet.cell(row, 2, "E: for (red), against (blue)" * first, overlay(picture(scene), argued, signed=True))
            sheet.cell(row, 3, "lnstat: for" * first, overlay(picture(scene), counted))
    sheet.save("method-classes.png")


def rules() -> None:
    """Every rule, and every baseline, on a few scenes."""
    swin = zoo.load("swin-mini")
    methods = {
        "lnstat": LNStatAttribution(swin.model),
        "lnstat, contrastive": LNStatAttribution(swin.model, contrastive=True),
        "evidence": LNStatAttribution(swin.model, rule="evidence"),
        "rollout": LNStatAttribution(swin.model, rule="rollout"),
        "gradient": LNStatAttribution(swin.model, rule="gradient"),
    }
    scenes = [zoo.scenes()[number] for number in (*SINGLE[:3], SCENE)]
    sheet = Sheet(len(scenes), 1 + len(methods), left=0.75)
    for row, scene in enumerate(scenes):
        image = swin.transform(scene.image)[None]
        sheet.row(row, swin.class_names[scene.labels[0]])
        sheet.cell(row, 0, "image" * (not row), picture(scene))
        for column, (name, method) in enumerate(methods.items(), 1):
            values = to_map(method.attribute(image, target=scene.labels[0])[0])
            sheet.cell(row, column, name * (not row), overlay(picture(scene), values, signed=name == "evidence"))
    sheet.save("rules.png")


def swin_windows() -> None:
    """Which tokens attend to each other: one colour a window, a white line where the mask parts a window."""
    swin, scene = zoo.load("swin-mini"), zoo.scenes()[SCENE]
    trace = traced(swin.model, swin.transform(scene.image)[None])
    sheet = Sheet(1, 5, above=0.4)
    sheet.cell(0, 0, "image, 16 x 16 tokens", picture(scene))
    chosen = [trace.blocks[0], trace.blocks[1], trace.blocks[3], trace.blocks[5]]
    words = ("windows of 4 x 4", "shifted by 2", "8 x 8 tokens, shifted", "4 x 4 tokens, one window")
    for column, (block, word) in enumerate(zip(chosen, words, strict=True), 1):
        index = block.layout.index if isinstance(block.layout, Groups) else torch.arange(16)[None]
        size = int(index.numel() ** 0.5)
        window = torch.empty(index.numel(), dtype=torch.long)
        window[index.flatten()] = torch.arange(len(index)).repeat_interleave(index.shape[1])
        axes = sheet.cell(
            0, column, f"{block.name}\n{word}", window.reshape(size, size).numpy(), cmap="tab20", alpha=0.75
        )
        _lines(axes, index, fuse(block.site, "mean"), size)
    sheet.save("swin-windows.png")


def _lines(axes, index: Tensor, attention: Tensor, size: int) -> None:
    """A line between neighbours that do not attend to each other."""
    attend = torch.zeros(index.numel(), index.numel(), dtype=torch.bool)
    for tokens, weights in zip(index, attention, strict=True):
        attend[tokens[:, None], tokens[None]] = weights > 1e-20
    for token in range(size * size):
        row, column = divmod(token, size)
        if column + 1 < size and not attend[token, token + 1]:
            axes.plot([column + 0.5] * 2, [row - 0.5, row + 0.5], color="white", linewidth=1.1)
        if row + 1 < size and not attend[token, token + size]:
            axes.plot([column - 0.5, column + 0.5], [row + 0.5] * 2, color="white", linewidth=1.1)


def swin_blocks() -> None:
    """Every block of the Swin: the spread of its tokens, who is attended to, what of it counts, what each keeps."""
    swin, scene = zoo.load("swin-mini"), zoo.scenes()[SCENE]
    trace = traced(swin.model, swin.transform(scene.image)[None])
    sheet = Sheet(4, 1 + len(trace.blocks), left=0.75, above=0.32)
    for row, name in enumerate(("token\nvariance", "attention\nreceived", "variance\nbrought", "residual\nshare")):
        sheet.row(row, name)
        sheet.cell(row, 0, "image" * (not row), picture(scene))
    for column, block in enumerate(trace.blocks, 1):
        values = token_variance(less_the_mean(block.base)), received(block), taken(block), deviation(block)
        name = block.name.replace("layers.", "stage ").replace(".blocks.", ", block ")
        for row, one in enumerate(values):
            title = f"{name}\n" * (not row) + f"{one.min():.2f} to {one.max():.{1 if row in (1, 2) else 2}f}"
            options = {"vmin": 0, "vmax": 1, "cmap": "viridis"} if row == 3 else {}
            sheet.cell(row, column, title, on_grid(one, 0), **options)
    sheet.save("swin-blocks.png")


def swin_rollout() -> None:
    """Rollout with 1/2 everywhere, residual shares, what attention brings, merging shares; ``lnstat``."""
    swin = zoo.load("swin-mini")
    shares = LNStatAttribution(
        swin.model, rule="rollout", head_fusion="mean", merging="uniform", interpolation="nearest"
    )
    methods = {
        "attention rollout": AttentionRollout(swin.model, interpolation="nearest"),
        "with residual shares": shares,
        "and variance brought": LNStatAttribution(
            swin.model, rule="rollout", merging="uniform", interpolation="nearest"
        ),
        "and merging shares": LNStatAttribution(swin.model, rule="rollout", interpolation="nearest"),
        "lnstat": LNStatAttribution(swin.model, interpolation="nearest"),
    }
    sheet = Sheet(len(SINGLE), 1 + len(methods))
    for row, number in enumerate(SINGLE):
        scene = zoo.scenes()[number]
        image = swin.transform(scene.image)[None]
        sheet.cell(row, 0, "image" * (not row), picture(scene))
        for column, (name, method) in enumerate(methods.items(), 1):
            values = to_map(method.attribute(image, target=scene.labels[0])[0])
            sheet.cell(row, column, name * (not row), overlay(picture(scene), values))
    sheet.save("swin-rollout.png")


def print_swin_figures(count: int = 240) -> None:
    """Where rollout peaks if only some blocks have a share from their statistics; what is behind it."""
    swin, scenes = zoo.load("swin-mini"), zoo.scenes()[:count]
    images = torch.stack([swin.transform(scene.image) for scene in scenes])
    masks = torch.stack([scene.masks[0] for scene in scenes])
    names = [block.name for block in traced(swin.model, images[:1]).blocks]
    # The blocks with a share from their statistics, the form of it, what shares an update out, and mergings.
    rows: dict[tuple[str, str, str], tuple[Sequence[str], str]] = {}
    for relation in ("mean", "variance"):
        rows["1/2 everywhere", relation, "uniform"] = (), "deviation"
        rows[f"{names[0]} alone", relation, "uniform"] = names[:1], "deviation"
        rows["the first stage", relation, "uniform"] = names[:2], "deviation"
        rows["the other stages", relation, "uniform"] = names[2:], "deviation"
        rows["everywhere", relation, "uniform"] = names, "deviation"
        rows["everywhere", relation, "variance"] = names, "deviation"
    rows["ratio everywhere (deprecated)", "mean", "variance"] = names, "ratio"
    found: dict[tuple[str, str, str], list[Tensor]] = {row: [] for row in rows}
    shares, ratios, agreement, gone = [], [], [], []
    for first in range(0, count, 60):
        trace = traced(swin.model, images[first : first + 60])
        for row, (chosen, form) in rows.items():

            def share(block: Block, chosen: Sequence[str] = chosen, form: str = form) -> Tensor:
                return block.residual_share(form if block.name in chosen else "half")

            found[row].append(list(descend(trace, share, row[2], row[1]))[-1][1])
        block, batch = trace.blocks[0], len(trace.tokens)
        attended, brought = received(block, batch), taken(block, batch)
        shares.append(deviation(block).mean(1))
        ratios.append(attended.max(1).values / attended.median(1).values)
        gone.append(brought.gather(1, attended.argmax(1, keepdim=True))[:, 0] / brought.median(1).values)
        plain = found["1/2 everywhere", "mean", "uniform"][-1]
        agreement += [np.corrcoef(attended[i], plain[i])[0, 1] for i in range(batch)]
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    print(f"\n{count} scenes, the peak:")
    print("| residual share | an update is shared by | mergings | on the object | on the outermost tokens |")
    print("|---|---|---|---|---|")
    for (name, relation, merging), parts in found.items():
        tokens = torch.cat(parts).reshape(count, 16, 16)
        pixels = tokens.repeat_interleave(4, 1).repeat_interleave(4, 2)
        outside = border.flatten()[tokens.flatten(1).argmax(1)].float().mean()
        by = "attention" if relation == "mean" else "variance"
        print(f"| {name} | {by} | {merging} | {pointing(pixels, masks).float().mean():.3f} | {outside:.3f} |")
    print(f"\n{names[0]}: mean residual share {torch.cat(shares).mean():.3f}; the token that is attended to most gets")
    print(f"{torch.cat(ratios).median():.1f} times the median attention (median over the scenes),")
    print(f"and brings {torch.cat(gone).median():.1f} times the median part of the variance; correlation of attention")
    print(f"received there with the map of plain rollout: {np.mean(agreement):.2f}")


FIGURES = (method_descent, method_classes, rules, swin_windows, swin_blocks, swin_rollout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="figures to draw: " + ", ".join(f.__name__ for f in FIGURES))
    names = parser.parse_args().names
    for figure in FIGURES:
        if not names or figure.__name__ in names:
            figure()
    if not names:
        print_swin_figures()


if __name__ == "__main__":
    main()
