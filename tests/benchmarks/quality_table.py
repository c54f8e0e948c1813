"""How good are the maps on the package's scenes? Three seeds of a Swin and of a ViT.

``python tests/benchmarks/quality_table.py`` runs ``captum-lnstat evaluate`` for the two models of the package and their
replicas in ``tests/benchmarks/replicas``, and writes ``docs/quality.md``; about a quarter of an hour on one core. What
was done is kept in ``build/quality``, and a stopped run goes on. No item or photograph of the scenes was in
training; 66 of them are also on the page of how the rule was chosen.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from captum_lnstat import GenericAttention, LNStatAttribution, zoo
from captum_lnstat.metrics import map_correlation, randomised

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "quality.md"
# Grad-CAM at the beginning, in the middle and at the end; at the final norm it was worse than anywhere else.
LAYERS = {
    "swin-mini": [f"layers.{stage}.blocks.1.norm1" for stage in range(3)],
    "vit-mini": [f"blocks.{block}.norm1" for block in (0, 2, 3)],
}
OURS = ("lnstat", "lnstat-contrastive", "evidence", "rollout", "gradient")
OTHERS = ("chefer", "attention-rollout", "frozen-layernorm", "ig(n_steps=32)", "saliency")
TITLES = {
    "lnstat": "**lnstat**",
    "lnstat-contrastive": "lnstat, contrastive=True",
    "rollout": "rollout with token statistics",
    "gradient": "gradient with token statistics",
    "chefer": "Chefer generic attention",
    "attention-rollout": "attention rollout",
    "frozen-layernorm": "gradient x input, LayerNorm frozen",
    "ig(n_steps=32)": "Captum IntegratedGradients, 32 steps",
    "saliency": "Captum Saliency",
    "gradcam": "Grad-CAM, best of three layers in each column",
}
# How faithful a map is, and mosaics, are measured on photographs: real.py.
METRICS = {"pointing": "pointing", "energy": "energy", "iou": "IoU", "ap": "AP", "two": "two"}
LOWER: tuple[str, ...] = ()
SEEDS = 3
Values = dict[str, dict[str, dict[str, float]]]  # method, metric, sample


def run(name: str, seed: int, folder: Path) -> Path:
    """One model through ``captum-lnstat evaluate``; goes on where it was stopped."""
    output = folder / f"{name}-{seed}"
    methods = [*OURS, *OTHERS, *(f"gradcam:{layer}" for layer in LAYERS[name])]
    command = [sys.executable, "-m", "captum_lnstat", "evaluate", "--model", name, "--output", str(output)]
    command += ["--methods", ",".join(methods), "--metrics", ",".join(METRICS), "--batch-size", "40"]
    if seed:
        command += ["--checkpoint", str(HERE / "replicas" / f"{name}-{seed}.safetensors")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output / "results.csv"


def read(path: Path) -> tuple[Values, float]:
    values: Values = defaultdict(lambda: defaultdict(dict))
    right = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            right[row["name"]] = float(row["target"] == row["predicted"])
            for metric in METRICS:
                if row[metric]:
                    values[row["method"]][metric][row["name"]] = float(row[metric])
    singles = values["lnstat"]["pointing"]
    return values, float(np.mean([right[name] for name in singles]))


@dataclass(frozen=True)
class Column:
    """One metric of every method: the mean over the seeds for every question, and which questions go together."""

    metric: str
    values: dict[str, np.ndarray]
    draws: np.ndarray  # (resample, question)

    @classmethod
    def of(cls, metric: str, seeds: list[Values]) -> Column:
        names = sorted(seeds[0]["lnstat"][metric])
        means = {
            method: np.mean([[seed[method][metric][name] for name in names] for seed in seeds], axis=0)
            for method in seeds[0]
        }
        # The two questions about one two-object scene are resampled together.
        groups: dict[str, list[int]] = defaultdict(list)
        for place, name in enumerate(names):
            groups[name.split("#")[0]].append(place)
        members = np.array(list(groups.values()))
        chosen = np.random.default_rng(0).integers(0, len(members), (2000, len(members)))
        return cls(metric, means, members[chosen].reshape(2000, -1))

    def better(self, method: str) -> float:
        """Larger is better, whatever the metric."""
        return float(self.values[method].mean()) * (-1 if self.metric in LOWER else 1)

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values[self.draws].mean(1), [2.5, 97.5])
        return float(low), float(high)

    def cell(self, method: str) -> str:
        text = f"{self.values[method].mean():.3f}"
        if method == "lnstat":
            low, high = self.interval(self.values[method])
            return f"{text} [{low:.3f}, {high:.3f}]"
        low, high = self.interval(self.values[method] - self.values["lnstat"])
        if self.metric in LOWER:
            low, high = -high, -low
        return f"{text} +" if low > 0 else f"{text} -" if high < 0 else text

    def against(self, rivals: list[str]) -> str:
        """Where ``lnstat`` stands among the rivals."""
        best = max(rivals, key=self.better)
        low, high = self.interval(self.values["lnstat"] - self.values[best])
        if self.metric in LOWER:
            low, high = -high, -low
        ahead = "first" if self.better("lnstat") >= self.better(best) else "within the interval of the first"
        title = TITLES.get(best, TITLES["gradcam"]) if best.startswith("gradcam") else TITLES[best]
        place = ahead if high >= 0 else "behind"
        return f"| {METRICS[self.metric]} | {place} | {title} | {low:+.3f} to {high:+.3f} |"


def tables(name: str, seeds: list[Values], accuracies: list[float]) -> str:
    columns = [Column.of(metric, seeds) for metric in METRICS]
    cams = [f"gradcam:{layer}" for layer in LAYERS[name]]
    lines = ["| method | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for method in (*OURS, *OTHERS, "gradcam"):
        chosen = [max(cams, key=c.better) if method == "gradcam" else method for c in columns]
        cells = " | ".join(column.cell(one) for column, one in zip(columns, chosen, strict=True))
        lines.append(f"| {TITLES.get(method, method)} | {cells} |")
    counts = " | ".join(str(len(column.values["lnstat"])) for column in columns)
    lines.append(f"| *questions* | {counts} |")
    accurate = ", ".join(f"{value:.1%}" for value in accuracies)
    text = f"Three seeds, {accurate} accurate on the single-object scenes.\n\n" + "\n".join(lines)
    text += "\n\n| column | lnstat is | best method of others | difference, 95 % interval |\n|---|---|---|---|\n"
    text += "\n".join(column.against([*OTHERS, *cams]) for column in columns)
    iou = next(column for column in columns if column.metric == "iou")
    ratios = []
    for seed in seeds:
        ours, theirs = (np.mean(list(seed[method]["iou"].values())) for method in ("lnstat", "chefer"))
        ratios.append(float(ours / theirs))
    draws = iou.values["lnstat"][iou.draws].mean(1) / iou.values["chefer"][iou.draws].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    whole = iou.values["lnstat"].mean() / iou.values["chefer"].mean()
    text += f"\n\nIoU of `lnstat` over that of Chefer's rule: {whole:.2f}, 95 % interval {low:.2f} to {high:.2f}; by "
    text += "seed "
    return text + ", ".join(f"{value:.2f}" for value in ratios) + "."


@torch.no_grad()
def randomisation(name: str) -> str:
    """Rank correlation with the maps of the same model after its upper layers forgot what they learned."""
    scenes = [scene for scene in zoo.scenes() if len(scene.labels) == 1][:120]
    rows = []
    for title, layers in (("head", 0.01), ("upper quarter", 0.25), ("upper half", 0.5), ("everything", 1.0)):
        found = defaultdict(list)
        for seed in range(SEEDS):
            reference = zoo.load(name)
            if seed:
                reference.model.load_state_dict(load_file(HERE / "replicas" / f"{name}-{seed}.safetensors"))
            images = torch.stack([reference.transform(scene.image) for scene in scenes])
            target = torch.tensor([scene.labels[0] for scene in scenes])
            other = randomised(reference.model, layers, seed=seed)
            for method, make in (("lnstat", LNStatAttribution), ("chefer", GenericAttention)):
                maps = [make(model).attribute(images, target=target).sum(1) for model in (reference.model, other)]
                found[method].append(map_correlation(*maps))
        rows.append(f"| {title} | " + " | ".join(f"{float(torch.cat(v).mean()):.2f}" for v in found.values()) + " |")
    return "| randomised | lnstat | Chefer generic attention |\n|---|---|---|\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE.parents[1] / "build" / "quality")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    parts = []
    for name in LAYERS:
        found = [read(run(name, seed, folder)) for seed in range(SEEDS)]
        table = tables(name, [values for values, _ in found], [accuracy for _, accuracy in found])
        parts.append(f"## {name}\n\n{table}\n\n{randomisation(name)}")
    head = PAGE.read_text().split("<!-- tables -->")[0]
    PAGE.write_text(head + "<!-- tables -->\n\n" + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
