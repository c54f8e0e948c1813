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
from PIL import Image
from torch import Tensor

from captum_lnstat import AttentionRollout, LNStatAttribution, zoo
from captum_lnstat.layout import Groups
from captum_lnstat.metrics import pointing
from captum_lnstat.recording.fusion import fuse
from captum_lnstat.rules.engine import run
from captum_lnstat.trace.steps import Block, Merging
from captum_lnstat.trace.trace import Trace
from captum_lnstat.visualize import overlay, to_map

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SCENE = 264  # two objects well apart: a sandal and trousers
SINGLE = (0, 27, 54, 135, 162)
CELL, DPI, INK = 1.5, 90, "#222222"
Descent = Iterator[tuple[Block, Tensor]]


def traced(model: torch.nn.Module, images: Tensor) -> Trace:
    """One recorded forward pass, as the rules read it."""
    return run(model, model, images).trace


def descend(trace: Trace, share: Callable[[Block], Tensor], merging: str = "variance") -> Descent:
    """Perception from the head to the image: every block with the relevance of the tokens before it."""
    r = trace.start("mean")
    for step in reversed(trace.steps):
        if isinstance(step, Merging):
            children = r[:, :, None] * step.shares(merging)
            r = step.below.scatter(children.flatten(0, 1)[..., None], len(r))[0][..., 0]
        elif isinstance(step, Block):
            alpha = share(step)
            given = step.layout.gather(((1 - alpha) * r)[..., None])[..., 0]
            handed = torch.einsum("gq,gqk->gk", given, fuse(step.site, "mean"))
            r = alpha * r + step.layout.scatter(handed[..., None], len(r))[0][..., 0]
            yield step, r


def ratio(block: Block) -> Tensor:
    return block.residual_share("ratio")


def received(block: Block, batch: int = 1) -> Tensor:
    """Attention that each token is given by all the others, heads averaged."""
    columns = fuse(block.site, "mean").sum(1)
    return block.layout.scatter(columns[..., None], batch)[0][..., 0]


def on_grid(values: Tensor, prefix: int) -> np.ndarray:
    patches = values[0, prefix:]
    size = int(len(patches) ** 0.5)  # the models of the zoo are square
    return patches.reshape(size, size).numpy()


class Sheet:
    """A grid of small pictures with a word above each; at ``dpi`` and in flat colours it stays a small file."""

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
            axes.imshow(values, interpolation="nearest", **{"cmap": "inferno", **options})
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
        self.figure.savefig(path)
        # A palette is enough for flat fields and dark photographs, and a third of the bytes.
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size // 1000} kB")


def picture(scene: zoo.Scene) -> np.ndarray:
    return np.asarray(scene.image) / 255


def method_descent() -> None:
    """Block by block through the ViT: what the statistics are, and where the relevance goes."""
    vit, scene = zoo.load("vit-mini"), zoo.scenes()[SCENE]
    trace = traced(vit.model, vit.transform(scene.image)[None])
    sheet = Sheet(len(trace.blocks), 5, left=0.75)
    for row, (block, r) in enumerate(descend(trace, ratio)):
        variance = block.statistics[0].variance[:, 1:]
        share = ratio(block)[:, 1:]
        attention = fuse(block.site, "mean")[:, 0, 1:]
        sheet.row(row, block.name)
        sheet.cell(row, 0, "image" if not row else "", picture(scene))
        sheet.cell(row, 1, f"variance, {variance.min():.2f} to {variance.max():.2f}", on_grid(variance, 0))
        sheet.cell(row, 2, f"class token attends, {1 - fuse(block.site, 'mean')[0, 0, 0]:.0%}", on_grid(attention, 0))
        shares = f"residual share, {share.min():.2f} to 1" if share.max() == 1 else f"share, to {share.max():.2f}"
        sheet.cell(row, 3, shares, on_grid(share, 0), vmin=0, vmax=1, cmap="viridis")
        sheet.cell(row, 4, f"P before it, {r[0, 1:].sum():.0%} on patches", on_grid(r, 1))
    sheet.save("method-descent.png")


def method_classes() -> None:
    """Two classes in one image: perception is one, evidence is two, and so is their product."""
    scene = zoo.scenes()[SCENE]
    sheet = Sheet(4, 4, left=0.75)
    for place, name in enumerate(("swin-mini", "vit-mini")):
        reference = zoo.load(name)
        image = reference.transform(scene.image)[None]
        looked = to_map(LNStatAttribution(reference.model, rule="rollout").attribute(image)[0])
        for index, label in enumerate(scene.labels):
            row = 2 * place + index
            argued = to_map(LNStatAttribution(reference.model, rule="evidence").attribute(image, target=label)[0])
            both = to_map(LNStatAttribution(reference.model).attribute(image, target=label)[0])
            sheet.row(row, f"{name}\n{reference.class_names[label]}")
            first = not row
            sheet.cell(row, 0, "image" * first, picture(scene))
            sheet.cell(row, 1, "P: looked at" * first, overlay(picture(scene), looked))
            sheet.cell(row, 2, "E: for (red), against (blue)" * first, overlay(picture(scene), argued, signed=True))
            sheet.cell(row, 3, "lnstat: both" * first, overlay(picture(scene), both))
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
    sheet = Sheet(1, 5, above=0.3)
    sheet.cell(0, 0, "image, 16 x 16 tokens", picture(scene))
    chosen = [trace.blocks[0], trace.blocks[1], trace.blocks[3], trace.blocks[5]]
    words = ("windows of 4 x 4", "shifted by 2", "8 x 8 tokens, shifted", "4 x 4 tokens, one window")
    for column, (block, word) in enumerate(zip(chosen, words, strict=True), 1):
        index = block.layout.index if isinstance(block.layout, Groups) else torch.arange(16)[None]
        size = int(index.numel() ** 0.5)
        window = torch.empty(index.numel(), dtype=torch.long)
        window[index.flatten()] = torch.arange(len(index)).repeat_interleave(index.shape[1])
        axes = sheet.cell(
            0, column, f"{block.name}: {word}", window.reshape(size, size).numpy(), cmap="tab20", alpha=0.75
        )
        axes.title.set_fontsize(5.6)
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
    """Every block of the Swin: the spread of its tokens, who is attended to, what each token keeps."""
    swin, scene = zoo.load("swin-mini"), zoo.scenes()[SCENE]
    trace = traced(swin.model, swin.transform(scene.image)[None])
    sheet = Sheet(3, 1 + len(trace.blocks), left=0.75)
    for row, name in enumerate(("token\nvariance", "attention\nreceived", "residual\nshare")):
        sheet.row(row, name)
        sheet.cell(row, 0, "image" * (not row), picture(scene))
    for column, block in enumerate(trace.blocks, 1):
        variance, columns, share = block.statistics[0].variance, received(block), ratio(block)
        name = block.name.replace("layers.", "stage ").replace(".blocks.", ", block ")
        sheet.cell(0, column, f"{name}\n{variance.min():.2f} to {variance.max():.2f}", on_grid(variance, 0))
        sheet.cell(1, column, f"{columns.min():.2f} to {columns.max():.1f}", on_grid(columns, 0))
        sheet.cell(
            2, column, f"{share.min():.2f} to {share.max():.2f}", on_grid(share, 0), vmin=0, vmax=1, cmap="viridis"
        )
    sheet.save("swin-blocks.png")


def swin_rollout() -> None:
    """Rollout with 1/2 everywhere, with residual shares, with merging shares, and ``lnstat``."""
    swin = zoo.load("swin-mini")
    methods = {
        "attention rollout": AttentionRollout(swin.model, interpolation="nearest"),
        "with residual shares": LNStatAttribution(
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
    rows: dict[str, Sequence[str]] = {"1/2 everywhere": (), f"ratio in {names[0]} alone": names[:1]}
    rows |= {"ratio in the first stage": names[:2], "ratio in the other stages": names[2:], "ratio everywhere": names}
    found: dict[str, list[Tensor]] = {name: [] for name in (*rows, "ratio, and merging by variance")}
    shares, ratios, agreement = [], [], []
    for first in range(0, count, 60):
        trace = traced(swin.model, images[first : first + 60])
        for name, chosen in rows.items():

            def share(block: Block, chosen: Sequence[str] = chosen) -> Tensor:
                return block.residual_share("ratio" if block.name in chosen else "half")

            found[name].append(list(descend(trace, share, "uniform"))[-1][1])
        found["ratio, and merging by variance"].append(list(descend(trace, ratio))[-1][1])
        taken = received(trace.blocks[0], len(trace.tokens))
        shares.append(ratio(trace.blocks[0]).mean(1))
        ratios.append(taken.max(1).values / taken.median(1).values)
        plain = found["1/2 everywhere"][-1]
        agreement += [np.corrcoef(taken[i], plain[i])[0, 1] for i in range(len(taken))]
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    print(f"\n| residual share | peak on the object, {count} scenes | peak on the outermost tokens |\n|---|---|---|")
    for name, parts in found.items():
        tokens = torch.cat(parts).reshape(count, 16, 16)
        pixels = tokens.repeat_interleave(4, 1).repeat_interleave(4, 2)
        outside = border.flatten()[tokens.flatten(1).argmax(1)].float().mean()
        print(f"| {name} | {pointing(pixels, masks).float().mean():.3f} | {outside:.3f} |")
    print(f"\n{names[0]}: mean residual share {torch.cat(shares).mean():.3f}; the token that is attended to most takes")
    print(
        f"{torch.cat(ratios).median():.1f} times the median (median over the scenes); correlation of what is attended"
    )
    print(f"to there with the rollout map: {np.mean(agreement):.2f}")


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
