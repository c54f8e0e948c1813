"""How the rule was chosen: every open choice, on scenes of the training split, three seeds of a Swin and of a ViT.

``python tests/benchmarks/ablation.py`` writes ``docs/ablation.md``, in about half an hour on one core. It needs the
photographs and items that ``train_reference_models.py`` names. The sample scenes of the package, on which results are
reported, are not looked at.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from reference_scenes import SceneSource
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_lnstat import AttentionRollout, GenericAttention, LNStatAttribution, zoo
from captum_lnstat.attribution.pixels import to_pixels
from captum_lnstat.metrics import average_precision, energy, iou, perturbation_curve, pointing, two_object
from captum_lnstat.rules import Relevance, Settings, evidence, lnstat, register, relation, walk
from captum_lnstat.rules.engine import Pass
from captum_lnstat.rules.lnstat import smoothed
from captum_lnstat.rules.perception import keep_all, perception
from captum_lnstat.trace.steps import Block

HERE = Path(__file__).parent
FAMILIES = {"swin-mini": 1.0, "vit-mini": 1.0}  # a quarter of the side of a token at the head, in patches; one at least
SEED = 78  # of the scenes; training used 0 to 2
COLUMNS = ("pointing", "energy", "IoU", "AP", "positive", "negative", "two")
LOWER = ("positive",)
DEFAULT = "**the default**"


def models(name: str) -> Iterator[nn.Module]:
    """The shipped model and its two replicas."""
    yield zoo.load(name).model
    for seed in (1, 2):
        model = zoo.load(name).model
        model.load_state_dict(load_file(HERE / "replicas" / f"{name}-{seed}.safetensors"))
        yield model


@dataclass(frozen=True)
class Scenes:
    """Single-object scenes, then each two-object scene once for both of its objects."""

    images: Tensor
    target: Tensor
    asked: Tensor
    other: Tensor
    singles: int

    @classmethod
    def draw(cls, singles: int, doubles: int) -> Scenes:
        source = SceneSource("train", SEED, crops_per_photo=20)
        one, two = source.single(singles), source.double(doubles)
        return cls(
            torch.cat([one.images, two.images, two.images]) * 2 - 1,
            torch.cat([one.labels[:, 0], two.labels[:, 0], two.labels[:, 1]]),
            torch.cat([one.masks[:, 0], two.masks[:, 0], two.masks[:, 1]]),
            torch.cat([torch.zeros_like(one.masks[:, 0]), two.masks[:, 1], two.masks[:, 0]]),
            singles,
        )


def mean(grid: Tensor) -> Tensor:
    return grid.mean((1, 2), keepdim=True)


def median(grid: Tensor) -> Tensor:
    return grid.flatten(1).median(1).values[:, None, None]


def above(grid: Tensor, level: Tensor) -> Tensor:
    return (grid - level).clamp(min=0)


def looked(p: Tensor, level: Tensor) -> Tensor:
    return torch.maximum(p - level, p / lnstat.FAINT)


def geometric(attention: Tensor) -> Tensor:
    """Geometric mean over the heads: where they agree."""
    return attention.clamp(min=1e-30).log().mean(1).exp()


class Parts:
    """Perception and evidence of one model on all scenes, each computed when it is first asked for."""

    def __init__(self, model: nn.Module, scenes: Scenes) -> None:
        self.model, self.scenes = model, scenes
        self._found: dict[str, Tensor] = {}

    def grid(self, method: type = LNStatAttribution, **options: object) -> Tensor:
        key = f"{method.__name__} {sorted((k, getattr(v, '__name__', v)) for k, v in options.items())}"
        if key not in self._found:
            explainer = method(self.model, **options)
            batches = zip(self.scenes.images.split(50), self.scenes.target.split(50), strict=True)
            self._found[key] = torch.cat([explainer.relevance(x, t).detach() for x, t in batches])
        return self._found[key]

    def p(self, **options: object) -> Tensor:
        return self.grid(rule="rollout", **options)

    def e(self, **options: object) -> Tensor:
        return self.grid(rule="evidence", **options)

    @contextmanager
    def changed(self, target: object, name: str, new: object) -> Iterator[None]:
        """The package with one function replaced, for what is no option of it."""
        kept, self._found = self._found, {}
        # Evidence without some of its terms does not add up to the score, as the package would say.
        with patch.object(evidence, "check_complete"), patch.object(target, name, new):
            yield
        self._found = kept

    def _evidence_without(self, left_out: Callable[[Tensor | None], bool]) -> Tensor:
        read = evidence.Rest.read

        def some(rest: evidence.Rest, after: Tensor, before: Tensor | None = None) -> Tensor | None:
            return None if left_out(before) else read(rest, after, before)

        with self.changed(evidence.Rest, "read", some):
            return self.e()

    @cached_property
    def without_mlp(self) -> Tensor:
        return self._evidence_without(lambda before: before is not None)

    @cached_property
    def without_embedding(self) -> Tensor:
        return self._evidence_without(lambda before: before is None)

    def p_without_block(self, index: int) -> Tensor:
        """Perception that leaves one block out, as if its attention moved nothing."""

        @register(f"without block {index}", formula="P", class_specific=False)
        def without(outcome: Pass, settings: Settings) -> tuple[Relevance, ...]:
            left_out = outcome.trace.blocks[index]

            def share(block: Block) -> Tensor:
                return keep_all(block) if block is left_out else block.residual_share(settings.residual)

            return walk.walk(outcome.trace, settings, perception(outcome.trace, settings, share))[0]

        return self.grid(rule=f"without block {index}")

    @cached_property
    def p_of_telling_heads(self) -> Tensor:
        """Perception whose heads weigh what their values contributed to the class, in every window."""
        whole = relation.propagate

        def propagate(block: Block, rows: Tensor, at: object, u: object, *rest: object) -> relation.Propagated:
            came = whole(block, rows, at, u, *rest)
            if u is None:
                return came
            with patch.object(relation, "FEW", 0):
                dense = relation._Contributions(block, u)._dense[:, :, :, 0]  # (window, head, query, channel)
            maps = torch.cat([torch.cat([a for _, a in heads], 1) for _, heads in block.site.chunks(None)], 2)
            values = block.site.values(slice(None))
            given = ((maps.transpose(-2, -1) @ dense) * values).sum(-1).clamp(min=0).sum(-1)
            weight = torch.where(given.sum(1, keepdim=True) > 0, given, 1)
            weight = weight / weight.sum(1, keepdim=True)
            fused = (maps * weight[..., None, None]).sum(1)
            grouped = block.layout.gather(rows)
            below, padding = (block.keys or block.layout).scatter(fused.transpose(-2, -1) @ grouped, len(rows))
            return replace(came, rows=below, padding=padding)

        def seen(grid: Tensor, *rest: object) -> Tensor:
            return grid[None]

        with self.changed(walk, "propagate", propagate), patch.object(lnstat, "_both", seen):
            return self.grid(rule="lnstat")


Row = Callable[[Parts, float], Tensor]


def rule(p: Tensor, e: Tensor, sigma: float) -> Tensor:
    """The default's formula on other parts."""
    around = smoothed(e, (sigma, sigma)) if sigma else e
    return looked(p, mean(p)) * above(around, median(around))


ROWS: dict[str, dict[str, Row]] = {
    "": {DEFAULT: lambda x, s: x.grid(), "as computed here from its parts": lambda x, s: rule(x.p(), x.e(), s)},
    "Evidence out of focus": {
        "not smoothed": lambda x, s: rule(x.p(), x.e(), 0),
        "half as wide": lambda x, s: rule(x.p(), x.e(), s / 2),
        "twice as wide": lambda x, s: rule(x.p(), x.e(), 2 * s),
        "1.5 times as wide": lambda x, s: rule(x.p(), x.e(), 1.5 * s),
        "perception smoothed as well": lambda x, s: rule(smoothed(x.p(), (s / 2, s / 2)), x.e(), s),
    },
    "What is taken of perception and evidence": {
        "`P - median P`": lambda x, s: looked(x.p(), median(x.p())) * rule(torch.ones_like(x.p()), x.e(), s),
        "`P` as it is": lambda x, s: x.p() * rule(torch.ones_like(x.p()), x.e(), s),
        "`P * P`": lambda x, s: x.p() ** 2 * rule(torch.ones_like(x.p()), x.e(), s),
        "square root of `G - median G`": lambda x, s: (
            looked(x.p(), mean(x.p())) * rule(torch.ones_like(x.p()), x.e(), s).sqrt()
        ),
        "`G - mean G`": lambda x, s: (
            looked(x.p(), mean(x.p())) * above(smoothed(x.e(), (s, s)), mean(smoothed(x.e(), (s, s))))
        ),
        "`max(G, 0)`": lambda x, s: looked(x.p(), mean(x.p())) * smoothed(x.e(), (s, s)).clamp(min=0),
        '`P` alone (`rule="rollout"`)': lambda x, s: x.p(),
        '`E` alone (`rule="evidence"`)': lambda x, s: x.e(),
    },
    "Residual share of perception": {
        '`residual="update"`': lambda x, s: rule(x.p(residual="update"), x.e(), s),
        '`residual="half"`': lambda x, s: rule(x.p(residual="half"), x.e(), s),
    },
    "How evidence is rolled": {
        '`evidence_residual="ratio"`': lambda x, s: rule(x.p(), x.e(evidence_residual="ratio"), s),
        '`evidence_residual="update"`': lambda x, s: rule(x.p(), x.e(evidence_residual="update"), s),
    },
    "What counts as evidence": {
        "`contrastive=True`": lambda x, s: rule(x.p(), x.e(contrastive=True), s),
        "half contrastive": lambda x, s: rule(x.p(), x.e() + x.e(contrastive=True), s),
        "without the MLPs": lambda x, s: rule(x.p(), x.without_mlp, s),
        "without the input tokens": lambda x, s: rule(x.p(), x.without_embedding, s),
    },
    "Heads": {
        '`head_fusion="max"`': lambda x, s: rule(x.p(head_fusion="max"), x.e(), s),
        '`head_fusion="min"`': lambda x, s: rule(x.p(head_fusion="min"), x.e(), s),
        "geometric mean": lambda x, s: rule(x.p(head_fusion=geometric), x.e(), s),
        "weighed by what they said for the class": lambda x, s: rule(x.p_of_telling_heads, x.e(), s),
    },
    "Blocks and mergings": {
        "perception without the first block": lambda x, s: rule(x.p_without_block(0), x.e(), s),
        "perception without the last block": lambda x, s: rule(x.p_without_block(-1), x.e(), s),
        '`merging="uniform"`': lambda x, s: rule(x.p(merging="uniform"), x.e(merging="uniform"), s),
    },
    "Other rules": {
        '`rule="gradient"`': lambda x, s: x.grid(rule="gradient"),
        '`rule="gradient", normalized=False`': lambda x, s: x.grid(rule="gradient", normalized=False),
        '`rule="gradient", normalized=False, contrastive=True`': lambda x, s: x.grid(
            rule="gradient", normalized=False, contrastive=True
        ),
        "that, not contrastive, in the place of `P`": lambda x, s: rule(
            x.grid(rule="gradient", normalized=False), x.e(), s
        ),
        "Chefer's generic rule": lambda x, s: x.grid(GenericAttention),
        "attention rollout": lambda x, s: x.grid(AttentionRollout),
    },
}


def measured(model: nn.Module, scenes: Scenes, grid: Tensor) -> dict[str, Tensor]:
    """Every column, one value a scene."""
    patch_side = scenes.images.shape[2] // grid.shape[1]
    maps = to_pixels(grid.float(), (64, 64), (patch_side, patch_side))
    n = scenes.singles
    one, mask = maps[:n], scenes.asked[:n]
    both = two_object(maps[n:], scenes.asked[n:], scenes.other[n:])
    found = {"pointing": pointing(one, mask), "energy": energy(one, mask), "IoU": iou(one, mask)}
    found["AP"] = average_precision(one, mask)
    for order in ("positive", "negative"):
        curve = perturbation_curve(
            model, scenes.images[:n], one, scenes.target[:n], order=order, fill=-torch.ones_like(scenes.images[:n])
        )
        found[order] = curve.auc
    # Both questions about a scene are resampled together.
    found["two"] = both.reshape(2, -1).mean(0)
    return found


def marked(values: np.ndarray, default: np.ndarray, column: str) -> str:
    """The mean; bold or struck out where the paired difference from the default is more than chance."""
    text, difference = f"{values.mean():.3f}", values - default
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(difference[draws].mean(1), [2.5, 97.5])
    if column in LOWER:
        low, high = -high, -low
    return f"{text} +" if low > 0 else f"{text} -" if high < 0 else text


def table(name: str, scenes: Scenes) -> str:
    sigma, found = FAMILIES[name], {}
    for model in models(name):
        parts = Parts(model, scenes)
        for group in ROWS.values():
            for title, row in group.items():
                start = time.time()
                for column, values in measured(model, scenes, row(parts, sigma)).items():
                    found.setdefault(title, {}).setdefault(column, []).append(values)
                print(f"{name} {title} {time.time() - start:.0f} s", file=sys.stderr)
    # A scene's value is the mean over the seeds.
    means = {t: {c: torch.stack(v).mean(0).double().numpy() for c, v in row.items()} for t, row in found.items()}
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for heading, group in ROWS.items():
        if heading:
            lines.append(f"| *{heading}* |" + " |" * len(COLUMNS))
        for title in group:
            cells = [marked(means[title][c], means[DEFAULT][c], c) for c in COLUMNS]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--singles", type=int, default=160, help="scenes with one object")
    parser.add_argument("--doubles", type=int, default=120, help="scenes with two")
    parser.add_argument("--model", choices=FAMILIES, help="one family, printed; default: both, to docs/ablation.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scenes = Scenes.draw(arguments.singles, arguments.doubles)
    if arguments.model:
        print(table(arguments.model, scenes))
        return
    page = HERE.parents[1] / "docs" / "ablation.md"
    head, tables = page.read_text().split("<!-- tables -->")[0], []
    for name in FAMILIES:
        tables.append(f"## {name}\n\n{table(name, scenes)}")
    page.write_text(head + "<!-- tables -->\n\n" + "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
