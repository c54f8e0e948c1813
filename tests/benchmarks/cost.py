"""What an explanation costs: time and memory against one plain forward pass, as a table and two figures.

    python tests/benchmarks/cost.py            # everything, about a quarter of an hour on one quiet core
    python tests/benchmarks/cost.py --quick    # the rules at 224 px and the memory at 518 px, two minutes, only printed
    python tests/benchmarks/cost.py --redraw   # the picture alone, from what was measured before
    python tests/benchmarks/cost.py --only swin_tiny_patch4_window7_224@224x4 --pairs 5

Time: CPU seconds of this process, one thread, methods taken in turns in one process, medians of the ratios to the
forward pass of the same turn. Memory: the largest resident size of a process of its own, over that with the model and
the images loaded. On a GPU, where there is one: batches of 32, wall-clock seconds between synchronisations. Results are
kept in ``docs/cost.json``, so that parts can be measured again, and written as a page.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from captum.attr import IntegratedGradients, LayerGradCam, Occlusion, Saliency
from torch import Tensor, nn

from captum_lnstat import (
    AttentionRollout,
    FrozenLayerNorm,
    GenericAttention,
    LNStatAttribution,
    RawAttention,
)

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "docs" / "cost.json", ROOT / "docs" / "cost.md"

VIT, DINO, SWIN = "vit_small_patch16_224", "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224"
# Model, pixels, images a batch.
SETTINGS = [
    (VIT, 224, 4),
    (VIT, 224, 1),
    (SWIN, 224, 4),
    (SWIN, 224, 1),
    (DINO, 518, 2),
    (SWIN, 448, 1),
    (SWIN, 896, 1),
    (VIT, 1024, 1),
]
MEMORY = [*SETTINGS, (VIT, 448, 1)]
# How often each is measured, unless --pairs says so: all of it has to end in a quarter of an hour.
TURNS = {(224, 4): 4, (224, 1): 5, (448, 1): 3, (518, 2): 2, (896, 1): 1, (1024, 1): 1}
QUICK = [(VIT, 224, 4), (SWIN, 224, 4)]
TARGET = 1
HUNDRED = "LNStatAttribution, 100 classes"
# Memory is that of the rules, and of what they are compared with.
WEIGHED = (
    "plain forward",
    "LNStatAttribution, lnstat",
    "LNStatAttribution, rollout",
    "LNStatAttribution, gradient",
    "Captum Saliency",
    "pytorch-grad-cam GradCAM",
)


def build(name: str, pixels: int) -> nn.Module:
    torch.manual_seed(0)
    options = {"num_classes": 1000} if "dinov2" in name else {}
    return timm.create_model(name, img_size=pixels, **options).eval()


def _last_norm(model: nn.Module) -> nn.Module:
    blocks = model.blocks if hasattr(model, "blocks") else model.layers[-1].blocks
    return blocks[-1].norm1


def _as_map(tokens: Tensor) -> Tensor:
    """Patch tokens as a map of channels, for those who explain convolutions."""
    if tokens.dim() == 3:
        side = int((tokens.shape[1] - 1) ** 0.5)
        tokens = tokens[:, 1:].unflatten(1, (side, side))
    return tokens.permute(0, 3, 1, 2)


def _grad_cam(model: nn.Module) -> Callable[[Tensor], object]:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = GradCAM(model, [_last_norm(model)], reshape_transform=_as_map)
    return lambda x: cam(x, [ClassifierOutputTarget(TARGET)] * len(x))


def _torchcam(model: nn.Module) -> Callable[[Tensor], object]:
    from torchcam.methods import GradCAM

    def run(x: Tensor) -> object:
        # Its hooks stay on the model until it is closed: the plain forward pass is not to pay for them.
        with GradCAM(model, _last_norm(model), reshape_transform=_as_map) as cam:
            return cam(TARGET, model(x.clone().requires_grad_()))

    return run


def _daam(model: nn.Module) -> Callable[[Tensor], object]:
    from daam import DAAM

    def run(x: Tensor) -> object:
        with DAAM(model) as method:  # as above; it also switches fused attention off
            return method(x, TARGET)

    return run


def _methods() -> dict[str, Callable[[nn.Module], Callable[[Tensor], object]]]:
    def forward(model: nn.Module) -> Callable[[Tensor], object]:
        def run(x: Tensor) -> object:
            with torch.no_grad():
                return model(x)

        return run

    def captum(
        method: Callable[[nn.Module], object], **options: object
    ) -> Callable[[nn.Module], Callable[[Tensor], object]]:
        def make(model: nn.Module) -> Callable[[Tensor], object]:
            made = method(model)
            return lambda x: made.attribute(x.requires_grad_(False).clone(), target=TARGET, **options)

        return make

    def occlusion(model: nn.Module) -> Callable[[Tensor], object]:
        made = Occlusion(model)
        return lambda x: made.attribute(x, sliding_window_shapes=(3, 64, 64), strides=(3, 32, 32), target=TARGET)

    def hundred(model: nn.Module) -> Callable[[Tensor], object]:
        made = LNStatAttribution(model)
        return lambda x: made.relevance_per_target(x, range(100))

    found: dict[str, Callable[[nn.Module], Callable[[Tensor], object]]] = {"plain forward": forward}
    for rule in ("lnstat", "evidence", "rollout", "gradient"):
        found[f"LNStatAttribution, {rule}"] = captum(lambda model, rule=rule: LNStatAttribution(model, rule=rule))
    for kind in (RawAttention, AttentionRollout, GenericAttention, FrozenLayerNorm):
        found[kind.__name__] = captum(kind)
    found[HUNDRED] = hundred
    found["Captum Saliency"] = captum(Saliency)
    found["Captum LayerGradCam"] = captum(lambda model: LayerGradCam(model, _last_norm(model)))
    if importlib.util.find_spec("pytorch_grad_cam"):
        found["pytorch-grad-cam GradCAM"] = _grad_cam
    if importlib.util.find_spec("torchcam"):
        found["torchcam GradCAM"] = _torchcam
    if importlib.util.find_spec("daam"):
        found["daam-timm-vit"] = _daam
    found["Captum IntegratedGradients, 50 steps"] = captum(IntegratedGradients, n_steps=50, internal_batch_size=4)
    found["Captum Occlusion, 64 px, stride 32"] = occlusion
    return found


# At more than 224 px the others would only repeat what these show; at 1024 px the rules alone are measured.
LARGE = (
    "plain forward",
    "LNStatAttribution, lnstat",
    "LNStatAttribution, rollout",
    "LNStatAttribution, gradient",
    "GenericAttention",
    "LNStatAttribution, 100 classes",
    "Captum Saliency",
    "pytorch-grad-cam GradCAM",
    "torchcam GradCAM",
    "daam-timm-vit",
)
SLOW = ("Captum IntegratedGradients, 50 steps", "Captum Occlusion, 64 px, stride 32")
METHODS = _methods()


def _key(name: str, pixels: int, batch: int) -> str:
    return f"{name}@{pixels}x{batch}"


def _seconds(run: Callable[[Tensor], object], x: Tensor) -> float:
    begin = time.process_time()
    run(x)
    return time.process_time() - begin


def _measured(method: str, name: str, pixels: int, batch: int) -> bool:
    if method in SLOW:
        return pixels == 224 and batch == 1
    if method == HUNDRED and "swin" in name and pixels > 224:
        return False
    return pixels == 224 or (method in LARGE and (pixels < 1000 or method in LARGE[:4]))


def time_setting(
    name: str, pixels: int, batch: int, pairs: int, methods: tuple[str, ...] = ()
) -> dict[str, dict[str, float]]:
    """Ratios to a plain forward pass: median, lowest and highest."""
    model, x = build(name, pixels), torch.randn(batch, 3, pixels, pixels)
    runs: dict[str, Callable[[Tensor], object]] = {}
    ratios: dict[str, list[float]] = {}
    for method, make in METHODS.items():
        if not _measured(method, name, pixels, batch) or (methods and method not in methods):
            continue
        run = make(model)
        try:
            run(x)
        except Exception as error:  # a rival that cannot: the row says so
            print(f"  {method}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
            continue
        runs[method], ratios[method] = run, []
    forwards = []
    for turn in range(pairs):
        base = _seconds(runs["plain forward"], x)
        forwards.append(base)
        for method, run in runs.items():
            if method == "plain forward" or (method in SLOW and turn):
                continue
            # The forward pass right before: what else the machine does changes within one turn.
            base = _seconds(runs["plain forward"], x)
            ratios[method].append(_seconds(run, x) / base)
    result = {m: {"median": statistics.median(r), "low": min(r), "high": max(r)} for m, r in ratios.items() if r}
    return {**result, "plain forward": {"seconds": statistics.median(forwards)}}


def time_on_gpu(name: str, kind: torch.dtype, turns: int = 20) -> dict[str, dict[str, float]]:
    """Ratios to a plain forward pass of 32 images at 224 px on a GPU, in wall-clock seconds."""
    model = build(name, 224).to("cuda", kind)
    x = torch.randn(32, 3, 224, 224, device="cuda", dtype=kind)

    def seconds(run: Callable[[Tensor], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(x)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    runs = {method: METHODS[method](model) for method in LARGE[:4]}
    for run in runs.values():
        run(x)
    plain, ratios = [], {method: [] for method in runs if method != "plain forward"}
    for _ in range(turns):
        for method, found in ratios.items():
            plain.append(seconds(runs["plain forward"]))
            found.append(seconds(runs[method]) / plain[-1])
    result = {m: {"median": statistics.median(r), "low": min(r), "high": max(r)} for m, r in ratios.items()}
    return {**result, "plain forward": {"seconds": statistics.median(plain)}}


def _resident(field: str) -> float:
    """MiB of this process: VmRSS is what it holds now, VmHWM the most since the peak was last forgotten (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure_memory(name: str, pixels: int, batch: int, method: str) -> float:
    """MiB over the loaded model, of this process: run in one of its own."""
    model, x = build(name, pixels), torch.randn(batch, 3, pixels, pixels)
    METHODS[method](build(VIT, 32))(torch.randn(1, 3, 32, 32))  # libraries, and what they load when first used
    run = METHODS[method](model)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(x)
    return _resident("VmHWM") - before


def memory_setting(name: str, pixels: int, batch: int) -> dict[str, float]:
    result = {}
    for method in METHODS:
        if method not in WEIGHED:
            continue
        arguments = [sys.executable, __file__, "--memory-of", name, str(pixels), str(batch), method]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            result[method] = float(done.stdout.split()[-1])
    return result


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _known(record: dict) -> list[str]:
    """The methods in order, those that were measured where a rival was installed included."""
    measured = [method for part in ("time", "memory") for row in record[part].values() for method in row]
    return [*METHODS, *sorted(set(measured) - set(METHODS))]


def _others_as_cheap(times: dict) -> list[str]:
    """What costs as little in words: Grad-CAM of others, which reads one layer, and attention that nothing weighs."""
    keys = [key for key in (_key(VIT, 224, 4), _key(SWIN, 224, 4)) if key in times]

    def found(*names: str) -> str:
        ratios = {name: [f"{times[key][name]['median']:.2f}" for key in keys if name in times[key]] for name in names}
        return ", ".join(f"{name} ({' and '.join(each)})" for name, each in ratios.items() if each)

    layers, maps = found("torchcam GradCAM", "Captum LayerGradCam"), found("RawAttention", "AttentionRollout")
    reasons = [f"{layers}, which read one layer" * bool(layers), f"{maps}, which know no class" * bool(maps)]
    return [f"As cheap as `lnstat`, or cheaper: {'; '.join(filter(None, reasons))}.", ""] if layers or maps else []


def _sizes(record: dict) -> bool:
    """Whether memory was measured at more than one size of one model."""
    return all(_key(VIT, size, 1) in record["memory"] for size in (224, 1024))


def _gpu_lines(gpu: dict) -> list[str]:
    rows = {key: row for key, row in gpu.items() if key != "machine"}
    if not rows:
        return []
    lines = ["", f"On a GPU ({gpu['machine']}), 32 images at 224 px, wall-clock seconds:", ""]
    lines += ["| model | plain forward, seconds | " + " | ".join(LARGE[1:4]) + " |", "|---" * 5 + "|"]
    for key, row in rows.items():
        cells = [f"{row[m]['median']:.2f} ({row[m]['low']:.2f} to {row[m]['high']:.2f})" for m in LARGE[1:4]]
        lines.append(f"| {key} | {row['plain forward']['seconds']:.4f} s | " + " | ".join(cells) + " |")
    return lines


def _equality_lines(equality: dict) -> list[str]:
    """How far the rules are from a slow oracle at these sizes."""
    if not equality:
        return []
    lines = [
        "",
        "The same maps from a slow oracle in float64 (`python tests/benchmarks/equality.py`; one image, random weights "
        "with peaky attention): the largest difference, of the largest entry of the map. In float32 the model rounds "
        "too. Last column: float32 against itself in pieces of a quarter and of four times the size, recorded tensors "
        "copied and not.",
        "",
        "| model@pixels | rule | float64 | float32 | other pieces |",
        "|---|---|---|---|---|",
    ]
    for key, rows in equality.items():
        for rule, row in rows.items():
            lines.append(f"| {key} | {rule} | {row['double']:.0e} | {row['single']:.0e} | {row['pieces']:.0e} |")
    return lines


def page(record: dict) -> str:
    times, memory = record["time"], record["memory"]
    lines = [
        "# What an explanation costs",
        "",
        "Written by `python tests/benchmarks/cost.py`. One thread of a shared two-core machine "
        f"({record['machine']}); CPU seconds; methods in turns in one process. Each entry: the median of "
        "the ratios to a plain forward pass without gradients, in brackets the lowest and the highest of the turns. "
        "Random weights (they do not change the cost). Integrated gradients and occlusion once.",
        "",
    ]
    columns = [key for key in (_key(*setting) for setting in SETTINGS) if key in times]
    lines += ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    seconds = [f"{times[key]['plain forward']['seconds']:.2f} s" for key in columns]
    lines.append("| plain forward, seconds | " + " | ".join(seconds) + " |")
    for method in _known(record):
        if method == "plain forward":
            continue
        cells = []
        for key in columns:
            row = times[key].get(method)
            cells.append("" if row is None else f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    turns = ", ".join(f"{key}: {record['pairs'][key]}" for key in columns)
    lines += ["", f"Columns: model@pixels x images. Turns: {turns}.", ""]
    columns = [key for key in (_key(*setting) for setting in MEMORY) if key in memory]
    lines += ["Largest resident memory over the loaded model, MiB, each in a process of its own:", ""]
    lines += ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for method in _known(record):
        cells = [_number(memory[key].get(method), ".0f") for key in columns]
        if any(cells):
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += _gpu_lines(record.get("gpu", {}))
    lines += _equality_lines(record.get("equality", {}))
    lines += [
        "",
        "![Cost of the methods](pictures/cost-methods.png)",
        "",
        *_others_as_cheap(times),
    ]
    lines += [
        "What is kept, in residual streams (tokens x channels) of each ViT block: 5 without a graph (queries, keys, "
        "values, the stream before and after the attention), 9 for `gradient` (and the hidden layer of the MLP). The "
        "backward pass of `gradient` makes a piece of a map and of its gradient once, for the queries, keys and values "
        "below and for the row vector, and rolls relevance as it goes. No map of all tokens against all tokens is "
        "kept: maps are made again in pieces of a megabyte. `tests/recording/test_memory.py` holds that in place, "
        "`tests/rules/test_flops.py` the arithmetic.",
        "",
        "Many classes of one image: what grows with their number is the evidence, `2 T K C S` operations a block for "
        "`T` tokens, `C` channels, `S` classes and the `K` directions that the head's weights have after the mergings "
        "above: 1 in a ViT, 4, 16 and 64 in the third, second and first stage of a Swin. In Swin-T's first stage, 2 "
        "blocks of 3136 tokens, a row of windows has 56 of the 64: 6.7 billion operations for 100 classes, three "
        "quarters of a forward pass; the other stages take 1.3 billion. To bring the directions of 100 classes through "
        "the mergings and the outputs of the attentions takes 2.1 billion more. These products run as fast as those of "
        "the model, so that 100 classes of a Swin cost at least one more forward pass than one class. A single window "
        "has 49 of the 64, but products of one window alone are slower by as much as that saves.",
        "",
    ]
    if _sizes(record):
        lines += ["![Memory against the size of the image](pictures/cost-size.png)", ""]
    return "\n".join(lines)


def methods_chart(record: dict) -> Any:
    """A bar for every method that was measured on both models' batches, in plain forward passes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    times = record["time"]
    keys = [key for key in (_key(VIT, 224, 4), _key(SWIN, 224, 4)) if key in times]
    names = [name for name in _known(record) if name != "plain forward" and any(name in times[key] for key in keys)]
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for shift, key in zip((-0.2, 0.2), keys, strict=False):
        values = [times[key].get(name, {}).get("median", 0) for name in names]
        axes.barh([i + shift for i in range(len(names))], values, 0.38, label=key)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("cost in plain forward passes")
    # Below the axes: wherever it stands inside them it covers the bars of some method.
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def figures(record: dict) -> None:
    memory, folder = record["memory"], ROOT / "docs" / "pictures"
    methods_chart(record).savefig(folder / "cost-methods.png", dpi=110)
    if not _sizes(record):
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for model, sizes in ((VIT, (224, 448, 1024)), (SWIN, (224, 448, 896))):
        for method, style in (
            ("plain forward", ":"),
            ("LNStatAttribution, lnstat", "-"),
            ("LNStatAttribution, gradient", "--"),
        ):
            points = [(s, memory.get(_key(model, s, 1), {}).get(method)) for s in sizes]
            points = [(s, value) for s, value in points if value is not None]
            color = "tab:blue" if model == VIT else "tab:orange"
            axes.plot(
                *zip(*points, strict=True), style, marker="o", color=color, label=f"{model}: {method}"
            ) if points else None
    axes.set_xlabel("pixels a side, one image")
    axes.set_ylabel("MiB over the model")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "cost-size.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="settings, such as vit_small_patch16_224@224x4")
    parser.add_argument("--pairs", type=int, help="turns; by default more of small settings than of large ones")
    parser.add_argument("--quick", action="store_true", help="the rules at 224 px, and memory at 518 px; only printed")
    parser.add_argument("--redraw", action="store_true", help="the picture alone, from what was measured before")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-time", action="store_true")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        name, pixels, batch, method = arguments.memory_of
        print(measure_memory(name, int(pixels), int(batch), method))
        return
    if arguments.redraw:
        figures(json.loads(RECORD.read_text()))
        return
    if arguments.quick:
        quick(arguments.pairs or 5)
        return
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"time": {}, "memory": {}, "pairs": {}}
    record["machine"] = f"{platform.machine()}, torch {torch.__version__.split('+')[0]}, timm {timm.__version__}"
    for setting in MEMORY:
        key = _key(*setting)
        if arguments.only and key not in arguments.only:
            continue
        print(key, flush=True)
        if setting in SETTINGS and not arguments.skip_time:
            record["pairs"][key] = arguments.pairs or TURNS[setting[1:]]
            record["time"][key] = time_setting(*setting, record["pairs"][key])
        if not arguments.skip_memory:
            record["memory"][key] = memory_setting(*setting)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    if torch.cuda.is_available() and not arguments.skip_time and not arguments.only:
        record["gpu"] = {"machine": torch.cuda.get_device_name()}
        for name, kind in itertools.product((VIT, SWIN), (torch.float32, torch.bfloat16)):
            record["gpu"][f"{name}, {str(kind).split('.')[1]}"] = time_on_gpu(name, kind)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    figures(record)
    PAGE.write_text(page(record))


def quick(pairs: int) -> None:
    """Print what the bars are about."""
    for setting in QUICK:
        for method, row in time_setting(*setting, pairs, (*LARGE[:4], HUNDRED)).items():
            shown = f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if "median" in row else row
            print(_key(*setting), method, shown, flush=True)
    for method, mib in memory_setting(DINO, 518, 2).items():
        print(_key(DINO, 518, 2), method, f"{mib:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
