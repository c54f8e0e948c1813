"""What an explanation costs on a GPU: ``python tests/benchmarks/gpu.py [--minutes M] [--tiny]``.

Needs torch, timm, captum and this checkout, nothing else, and begins nothing new after the minutes that it is given
(six by default). Of every model, dtype and batch: the forward pass, every rule, and Captum's Grad-CAM at the last
block (pytorch-grad-cam's where it is installed), the median of several calls by the device's own clock, in turns with
the forward pass; kernels launched and numbers read by the host; peak memory; and how far the map is from the CPU's.
Without a GPU, ``--tiny`` runs the same on the CPU, to see that the script works. The table goes to the standard
output, line by line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
from helpers.launches import Launches  # noqa: E402

from captum_lnstat import LNStatAttribution  # noqa: E402

RULES = ("lnstat", "evidence", "rollout", "gradient")
MODELS = {
    "ViT-S": ("vit_small_patch16_224", {}, 224),
    "ViT-B": ("vit_base_patch16_224", {}, 224),
    "Swin-T": ("swin_tiny_patch4_window7_224", {}, 224),
    "DINOv2-S": ("vit_small_patch14_dinov2", {"num_classes": 1000}, 518),
}
TINY = {
    "ViT, tiny": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "num_classes": 10}, 64),
    "Swin, tiny": ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 2), "window_size": 4}, 64),
}
CALLS = 7


def last_layer(model: nn.Module) -> nn.Module:
    """What Grad-CAM is taken at."""
    layers: Any = getattr(model, "blocks", None)
    if layers is not None:
        return layers[-1].norm1  # type: ignore[no-any-return]
    return model.layers[-1].blocks[-1].norm1  # type: ignore[no-any-return, index, union-attr]


def methods(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Name and call of everything that is measured."""
    for rule in RULES:
        method = LNStatAttribution(model, rule=rule)
        yield rule, lambda x, method=method: method.relevance(x, target=1)
    if len(images) == 1:  # a graph of its own for every shape takes its time
        yield from compiled(model, images)
    gradcam = LayerGradCam(model, last_layer(model))
    yield "Grad-CAM (Captum)", lambda x: gradcam.attribute(x, target=1)
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return
    flat = [None if hasattr(model, "blocks") else lambda t: t.permute(0, 3, 1, 2)]
    if flat[0] is None:
        side = int(last_side(model))
        flat = [lambda t: t[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))]
    theirs = GradCAM(model, [last_layer(model)], reshape_transform=flat[0])
    yield "Grad-CAM (pytorch-grad-cam)", lambda x: theirs(x, [ClassifierOutputTarget(1)] * len(x))


def compiled(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """The forward pass and ``lnstat`` as one graph each; on a GPU as CUDA graphs, on the CPU as they were captured."""
    on_gpu = images.device.type == "cuda"
    options: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"backend": None}
    if on_gpu:
        forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)

        def alone(x: Tensor) -> Any:
            with torch.no_grad():
                return forward(x)

        yield "forward, compiled", alone
    yield "lnstat, compiled", LNStatAttribution(model).compile(images, 1, **options).relevance


def last_side(model: Any) -> int:
    """Patches along a side of a ViT."""
    return int(model.patch_embed.grid_size[0])


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, by the device's clock where it has one."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def in_turns(forward: Callable[[], Any], method: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Medians of both, called in turns; the first calls do not count."""
    times: tuple[list[float], list[float]] = [], []
    for turn in range(CALLS + 2):
        for run, own in zip((forward, method), times, strict=True):
            taken = seconds(run, device)
            if turn > 1:
                own.append(taken)
    return statistics.median(times[0]), statistics.median(times[1])


def peak(run: Callable[[], Any], device: torch.device) -> float:
    """MiB beyond what is there before."""
    if device.type != "cuda":
        return float("nan")
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(
    name: str, made: tuple[str, dict[str, Any], int], device: torch.device, dtype: torch.dtype, batch: int
) -> None:
    """All lines of one model, dtype and batch."""
    kind, options, side = made
    torch.manual_seed(0)
    model = timm.create_model(kind, **options).eval()
    images = torch.randn(batch, 3, side, side)
    on_cpu = LNStatAttribution(model).relevance(images[:1], target=1) if dtype == torch.float32 and batch == 1 else None
    model, images = model.to(device, dtype), images.to(device, dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(images)
            return output

    with Launches() as plain:
        forward()
    for which, call in methods(model, images):
        try:
            found = call(images)
            once = partial(call, images)
            own, taken = in_turns(forward, once, device)
            with Launches() as launches:
                once()
            apart = ""
            if which == "lnstat" and on_cpu is not None:
                off = (found.cpu() - on_cpu).abs().max() / on_cpu.abs().max().clamp(min=1e-12)
                apart = f"{float(off):.0e}"
            mib = peak(once, device) / max(peak(forward, device), 1e-9)
            cells = f"{own * 1e3:.2f} | {taken * 1e3:.2f} | {taken / own:.2f} | {launches.count / plain.count:.1f}"
            cells += f" | {launches.reads} | {mib:.1f} | {apart}"
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            cells = "out of memory | | | | | |"
        print(f"| {name} | {str(dtype)[6:]} | {batch} | {which} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="nothing new is begun after so many")
    parser.add_argument("--tiny", action="store_true", help="small models, batches of one and two")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("no GPU was found; expected one, or --tiny, which runs small models on the CPU")
    warnings.simplefilter("ignore")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, timm {timm.__version__}\n")
    print("| model | dtype | batch | method | forward, ms | ms | times | launches | reads | memory | from CPU |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    begin = time.monotonic()
    for dtype in (torch.float32, torch.bfloat16):
        for batch in (1, 2) if arguments.tiny else (1, 8, 32):
            for name, made in (TINY if arguments.tiny else MODELS).items():
                if time.monotonic() - begin > 60 * arguments.minutes:
                    print(
                        f"| {name} | {str(dtype)[6:]} | {batch} | not begun: {arguments.minutes:g} minutes are over |"
                    )
                    continue
                measure(name, made, device, dtype, batch)


if __name__ == "__main__":
    main()
