"""What a map of one photograph costs: forward passes, counted in operations, and memory."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from real_subjects import Photographs
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from captum_lnstat.errors import UnsupportedModelError
from captum_lnstat.evaluation.methods import build

# Of every method, forward passes and MiB.
Costs = dict[str, dict[str, float | None]]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


class _NoModules:
    """In the place of what counts module by module, whose hooks cannot stand gradients of a leaf."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _operations(run: Any) -> int:
    """Floating-point operations, counted; the fused kernel of the CPU as the attention that it is."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter: Any = FlopCounterMode(display=False, custom_mapping={kernel: _attention})
    counter.mod_tracker = _NoModules()
    with counter:
        run()
    return counter.get_total_flops()


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _mebibytes(run: Any) -> float | None:
    """The most that is held at once over what is held before (Linux, the CPU)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return _resident("VmHWM") - before


def cost(model: Photographs, methods: Sequence[str], folder: Path) -> Costs:
    """Forward passes and MiB of one photograph, kept in a file; a pass is counted in floating-point operations.

    What is refused on the model has None for both.
    """
    path = folder / model.name / "cost.json"
    known: Costs = json.loads(path.read_text()) if path.exists() else {}
    if set(methods) <= set(known):
        return known
    subject = model.subject
    image = subject.frame.example(model.dataset[0]).image[None].to(subject.device)
    target = torch.zeros(1, dtype=torch.long, device=subject.device)

    def forward() -> None:
        with torch.no_grad():
            subject.forward(image)

    forward()
    plain = _operations(forward)
    for name in methods:
        if name not in known:
            (method,) = build(name, subject)

            def run(method: Any = method) -> None:
                method.maps(image, target, ["one"])

            try:  # the first run, which loads what is loaded when first used
                passes = _operations(run) / plain
            except (UnsupportedModelError, ValueError) as error:
                known[name] = {"passes": None, "mib": None}
                print(f"{model.name}: {name} is refused: {error}", file=sys.stderr)
            else:
                known[name] = {"passes": passes, "mib": _mebibytes(run)}
                print(f"{model.name}: {name}, {passes:.2f} forward passes", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known, indent=1))
    return known
