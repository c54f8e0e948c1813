"""Where attention goes in two real ViTs, block by block, and what flows from there: the numbers of ``docs/sinks.md``.

``python tests/benchmarks/sinks.py`` writes ``docs/sinks.json``, then the page's tables and figures as
``sinks_page.py`` does. It needs the folder that ``real_data.py`` describes (``--real``) and takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sinks_page
import torch
from real_data import FOLDER, MODELS, Photographs, check_folder, photographs, real_model
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from captum_lnstat.evaluation.intervals import Ratios, bootstrap
from captum_lnstat.recording.sites import AttentionSite
from captum_lnstat.recording.statistics import token_variance
from captum_lnstat.rules.engine import run
from captum_lnstat.trace.maps import FrozenLinear
from captum_lnstat.trace.steps import Block
from captum_lnstat.trace.trace import Trace

SHARES = ("ratio", "update", "half")
BATCH = 8
# A token with so many times the median variance is counted as one.
OUTLIER = 20
# A value of every image, by a path of names such as "3/attention/corner".
Values = dict[str, Tensor]


def every_head(site: AttentionSite) -> Tensor:
    """All attention maps of a site, ``(image, head, query, key)``."""
    return torch.cat([torch.cat([part for _, part in heads], 1) for _, heads in site.chunks()], 2)


def sent(block: Block) -> Tensor:
    """``f^h_j = v^h_j W_O^h`` less its mean over the channels, ``(image, head, key, channel)``."""
    (projection,) = block.path
    assert isinstance(projection, FrozenLinear)
    values = block.site.values(slice(0, block.site.shape[1]))
    weight = projection.weight.detach().reshape(len(projection.weight), values.shape[1], -1)
    f = torch.einsum("bhjd,chd->bhjc", values, weight)
    return f - f.mean(-1, keepdim=True)


def of_variance(attention: Tensor, f: Tensor, d: Tensor) -> Tensor:
    """The share of the update's variance that each source accounts for, ``(image, query, key)``; rows sum to one.

    ``W_ij = max(0, sum_h A^h_ij <f^h_j, d_i>)``, rows divided by their sums; a row of zeros is that of ``A``.
    """
    W = (attention * torch.einsum("bic,bhjc->bhij", d, f)).sum(1).clamp(min=0)
    total = W.sum(-1, keepdim=True)
    return torch.where(total > 0, W / total.clamp(min=1e-30), attention.mean(1))


def relations(block: Block) -> dict[str, Tensor]:
    """Three ways to share a token among its sources, ``(image, query, key)`` each, rows that sum to one.

    ``"A"`` is attention, the mean over the heads. ``"W"`` is ``of_variance``. ``"W less mean"`` is the same with values
    less their mean over the keys of the image, and the update that these make.
    """
    attention, f = every_head(block.site), sent(block)
    d = block.attention_update - block.attention_update.mean(-1, keepdim=True)
    deviation = f - f.mean(2, keepdim=True)
    moved = torch.einsum("bhij,bhjc->bic", attention, deviation)
    return {
        "A": attention.mean(1),
        "W": of_variance(attention, f, d),
        "W less mean": of_variance(attention, deviation, moved),
    }


def per_attention(block: Block, less_mean: bool) -> tuple[Tensor, Tensor]:
    """For every key the norm of what flows from it, summed over the queries, and the attention given to it.

    The norm is that of ``sum_h A^h_ij f^h_j``, over the channels.
    """
    attention, f = every_head(block.site), sent(block)
    if less_mean:
        f = f - f.mean(2, keepdim=True)
    gram = torch.einsum("bhjc,bkjc->bjhk", f, f)
    squared = torch.einsum("bhij,bkij,bjhk->bij", attention, attention, gram)
    return squared.clamp(min=0).sqrt().sum(1), attention.mean(1).sum(1)


class Tokens:
    """Which tokens of each image are corners, and which lie in a box: ``(image, token)`` bool, the class token first.

    A patch lies in a box if more than half of it does. A corner counts as a corner only.
    """

    def __init__(self, boxes: Tensor, grid: tuple[int, int], patch: int) -> None:
        rows, columns = grid
        inside = avg_pool2d(boxes[:, None].float(), patch)[:, 0] > 0.5
        corner = torch.zeros(grid, dtype=torch.bool)
        corner[:: rows - 1, :: columns - 1] = True
        first = torch.zeros(len(boxes), 1, dtype=torch.bool)
        corners = torch.cat([first, corner.flatten().expand(len(boxes), -1)], 1)
        objects = torch.cat([first, (inside & ~corner).flatten(1)], 1)
        head = torch.zeros_like(objects)
        head[:, 0] = True
        self.groups = {"corner": corners, "object": objects, "class": head}
        self.area = objects.sum(1) / (rows * columns)

    def total(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The sum over each group, ``(image,)``."""
        for name, group in self.groups.items():
            yield name, (values * group).sum(1)

    def median(self, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The median over each group, ``(image,)``."""
        for name, group in self.groups.items():
            yield name, torch.where(group, values, torch.nan).nanquantile(0.5, dim=1)


def of_block(block: Block, tokens: Tokens) -> Values:
    """What is said of one block."""
    found: Values = {}
    for name, relation in relations(block).items():
        found |= {f"received/{name}/{group}": value for group, value in tokens.total(relation.mean(1))}
    for name, stream in (("before", block.before), ("between", block.between), ("after", block.after)):
        found |= {f"variance/{name}/{group}": value for group, value in tokens.median(token_variance(stream))}
    outlier = token_variance(block.after) > OUTLIER * token_variance(block.after).quantile(0.5, dim=1, keepdim=True)
    corners = dict(tokens.total(outlier))["corner"]
    found |= {"outliers/corner": corners, "outliers/other": outlier[:, 1:].sum(1) - corners}
    for form in SHARES:
        found |= {f"share/{form}/{group}": value for group, value in tokens.median(block.residual_share(form))}
    for name, less_mean in (("value", False), ("value less mean", True)):
        norm, attention = per_attention(block, less_mean)
        below = dict(tokens.total(attention))
        found |= {f"{name}/{group}": value / below[group] for group, value in tokens.total(norm)}
    return found


def of_walk(trace: Trace, tokens: Tokens) -> Values:
    """Perception at the image with every share and relation: what part of the patches' relevance each group gets."""
    found: Values = {}
    start = trace.start("mean")
    made = [(block, relations(block)) for block in reversed(trace.blocks)]
    for form in SHARES:
        for name in made[0][1]:
            r = start
            for block, relation in made:
                alpha = block.residual_share(form)
                r = alpha * r + torch.einsum("bi,bij->bj", (1 - alpha) * r, relation[name])
            patches = r[:, trace.prefix :].sum(1)
            for group, value in tokens.total(r):
                if group != "class":
                    found[f"{form}/{name}/{group}"] = value / patches
    return found


@torch.no_grad()
def measure(model: nn.Module, shown: Photographs) -> dict[str, Values]:
    """Values of every image: of ``blocks``, and of the ``walk`` through them."""
    parts: list[dict[str, Values]] = []
    for images, boxes in zip(shown.images.split(BATCH), shown.boxes.split(BATCH), strict=True):
        trace = run(model, model, images).trace
        tokens = Tokens(boxes, trace.grid, trace.patch[0])
        blocks = {
            f"{number}/{name}": value
            for number, block in enumerate(trace.blocks)
            for name, value in of_block(block, tokens).items()
        }
        parts.append({"blocks": blocks, "walk": of_walk(trace, tokens), "area": {"object": tokens.area}})
    return {
        kind: {name: torch.cat([part[kind][name] for part in parts]) for name in parts[0][kind]} for kind in parts[0]
    }


def summary(values: Values) -> dict[str, list[float]]:
    """The middle of every quantity, then the ends of a range.

    The mean and its 95 % interval, or for a variance the median and the quartiles: it varies by a factor.
    """
    variances = {name: column for name, column in values.items() if "variance/" in name}
    found = {name: np.nanquantile(column, [0.5, 0.25, 0.75]).tolist() for name, column in variances.items()}
    means = {name: column.double().numpy()[:, None] for name, column in values.items() if name not in variances}
    ratios = [Ratios(np.nan_to_num(column), (~np.isnan(column)).astype(float)) for column in means.values()]
    for name, estimate in zip(means, bootstrap(ratios, seed=0), strict=True):
        found[name] = [estimate.value, estimate.low, estimate.high]
    return {name: [float(f"{value:.4g}") for value in found[name]] for name in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, default=FOLDER, help="weights and photographs; default: %(default)s")
    parser.add_argument("--images", type=int, default=32, help="photographs of even number; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_folder(options.real)
    found: dict[str, Any] = {}
    for title in MODELS:
        subject = real_model(options.real, title)
        shown = photographs(options.real, subject, options.images, odd=False)
        found["numbers"] = list(shown.numbers)
        found[title] = {kind: summary(values) for kind, values in measure(subject.model, shown).items()}
        print(title, flush=True)
    sinks_page.FOUND.write_text(json.dumps(found, indent=0) + "\n")
    sinks_page.main()


if __name__ == "__main__":
    main()
