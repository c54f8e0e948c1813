"""What a map of one photograph costs: forward passes, counted in operations, and memory."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Sequence
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


def _measured(run: Callable[[], object]) -> tuple[float, float | None]:
    """Floating-point operations, and the most MiB held at once over what is held before (Linux, the CPU).

    The fused kernel of the CPU counts as the attention that it is.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter: Any = FlopCounterMode(display=False, custom_mapping={kernel: _attention})
    counter.mod_tracker = _NoModules()
    seen = Path("/proc/self/clear_refs").exists()
    if seen:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
    with counter:
        run()
    return counter.get_total_flops(), _resident("VmHWM") - before if seen else None


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


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
    plain, _ = _measured(forward)
    for name in methods:
        if name not in known:
            (method,) = build(name, subject)

            def run(method: Any = method) -> None:
                method.maps(image, target, ["one"])

            try:
                operations, mib = _measured(run)
                # The first run loads what is loaded once, and asks the model where patches lie.
                if operations < 10 * plain:
                    operations, mib = _measured(run)
            except (UnsupportedModelError, ValueError) as error:
                known[name] = {"passes": None, "mib": None}
                print(f"{model.name}: {name} is refused: {error}", file=sys.stderr)
            else:
                known[name] = {"passes": operations / plain, "mib": mib}
                print(f"{model.name}: {name}, {operations / plain:.2f} forward passes", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known, indent=1))
    return known
