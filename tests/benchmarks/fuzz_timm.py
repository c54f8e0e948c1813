"""Every small model of timm, tried once: explained, refused, or an error of ours.

``python tests/benchmarks/fuzz_timm.py RECORD`` builds up to 500 names of ``timm.list_models()``, transformers and
hybrids first, with random weights and for the smallest images that they take, explains one random image with
``lnstat``, checks what was explained by the completeness of ``evidence``, and appends a JSON line for each to RECORD.
It ends after ``--seconds`` and goes on where it ended when run again. ``--summary docs/fuzz.json`` writes the outcome
of every name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.errors import RecordingError, UnsupportedModelError

_ATTEND = (
    "beit byoanet cait coat convit cpubone crossvit csatv2 davit deepseek_vit deit edgenext efficientformer "
    "efficientformer_v2 efficientvit_mit efficientvit_msra eva fastvit gcvit gemma4_vit hiera hieradet_sam2 "
    "iformer levit lowformer maxxvit metaformer mobilenetv5 mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 "
    "qwen3_vit shvit swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins "
    "vision_transformer vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam visformer "
    "vitamin volo xcit"
)
ATTEND = _ATTEND.split()
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 384)
LARGEST = 40e6
# Of the score: float error is far below.
COMPLETE = 1e-3


def names() -> list[str]:
    """Names in the order in which they are tried: one of every module with attention in turn, then all others."""
    turns = [timm.list_models(module=module) for module in ATTEND]
    first = [name for turn in zip_longest(*turns) for name in turn if name is not None]
    return [*first, *(name for name in timm.list_models() if name not in set(first))]


def build(name: str) -> tuple[nn.Module, int] | str:
    """The model and the size of its images; or why there is none."""
    with torch.device("meta"):
        try:
            parameters = sum(p.numel() for p in timm.create_model(name).parameters())
        except (RuntimeError, NotImplementedError):  # a model that reads numbers as it is built
            parameters = 0
    if parameters > LARGEST:
        return f"{parameters / 1e6:.0f} M parameters"
    told: dict[int, nn.Module] = {}
    for size in SIZES:
        try:
            model = timm.create_model(name, img_size=size, num_classes=10).eval()
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
            told[size] = model
            break
        except TypeError:
            break
        except Exception:  # not a size of this model
            continue
    if not told:
        model = timm.create_model(name, num_classes=10).eval()
        for size in SIZES:
            try:
                with torch.no_grad():
                    model(torch.zeros(1, 3, size, size))
                told[size] = model
                break
            except Exception:
                continue
    if not told:
        return "takes none of the sizes tried"
    ((size, model),) = told.items()
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return "too many parameters"
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return model, size


def outcome(name: str) -> dict[str, Any]:
    """What became of one name."""
    torch.manual_seed(0)
    try:
        built = build(name)
    except Exception as error:
        return {"outcome": "skipped", "why": f"cannot be built here: {type(error).__name__}"}
    if isinstance(built, str):
        return {"outcome": "skipped", "why": built}
    model, size = built
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    found: dict[str, Any] = {"size": size}
    try:
        relevance = LNStatAttribution(model).relevance(image, target=1)
        return found | {"outcome": "explained", "grid": list(relevance.shape[1:]), "off": off(model, image)}
    except (UnsupportedModelError, RecordingError) as error:
        lines = str(error).splitlines()
        return found | {"outcome": "refused", "error": type(error).__name__, "why": lines[0], "rest": lines[1:2]}
    except Exception as error:  # this is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return found | {"outcome": "internal error", "why": why, "at": f"{Path(last.filename).name}:{last.lineno}"}


def off(model: nn.Module, image: Tensor) -> float:
    """How far the evidence of patches, prefix and constant misses the score, in the score's size."""
    evidence = LNStatAttribution(model, rule="evidence")
    _, delta = evidence.attribute(image, target=1, return_convergence_delta=True)
    with torch.no_grad():
        score = model(image)[0, 1]
    return float(delta.abs().max() / max(1.0, float(score.abs())))


def summarise(record: Path, summary: Path) -> None:
    """One entry a name, and how many there are of each kind."""
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    found = {row.pop("name"): row for row in rows}
    counts = Counter(row["outcome"] for row in found.values())
    incomplete = [name for name, row in found.items() if row.get("off", 0.0) > COMPLETE]
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    whole = {"versions": versions, "counts": dict(sorted(counts.items())), "incomplete": incomplete, "models": found}
    lines = json.dumps(whole, indent=1)
    summary.write_text(lines + "\n")
    print(dict(counts), f"{len(incomplete)} incomplete")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=270)
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.summary is not None:
        summarise(options.record, options.summary)
        return 0
    options.record.touch()
    rows = [json.loads(line) for line in options.record.read_text().splitlines()]
    done, built = {row["name"] for row in rows}, sum(row["outcome"] != "skipped" for row in rows)
    end = time.monotonic() + options.seconds
    for name in (name for name in names() if name not in done):
        if built >= options.count:
            break
        if time.monotonic() > end:
            print(f"{built} built so far")
            return 1
        row = {"name": name, **outcome(name)}
        built += row["outcome"] != "skipped"
        with options.record.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(f"all of {built} built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
