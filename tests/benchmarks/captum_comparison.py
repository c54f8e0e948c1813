"""LNStat, its baselines and Captum's own methods on the same models and images; writes ``docs/captum-comparison.md``.

One command, on one core, no download: ``python tests/benchmarks/captum_comparison.py``.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captum
import timm
import torch
from captum.attr import (
    GradientAttribution,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from captum.log import log_usage
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import Tensor, nn

from captum_lnstat import (
    AttentionRollout,
    FrozenLayerNorm,
    GenericAttention,
    LNStatAttribution,
    RawAttention,
    __version__,
    zoo,
)

PAGE = Path(__file__).parents[2] / "docs" / "captum-comparison.md"
SEED = 0
IG_STEPS = 50  # Captum's default
PATCH = 8  # of the occlusion window, its stride too
NOISE = 0.1  # deviation of the noise for infidelity, in normalised pixels
FAITHFUL, RADIUS = 20, 0.02  # perturbations an image for infidelity; how far for sensitivity


@dataclass(frozen=True)
class Method:
    """A method out of the box: how it is made from a model, and how its ``attribute`` is called."""

    name: str
    make: Callable[[nn.Module], Any]
    options: dict[str, Any]
    global_attribution: bool = True

    def attribute(self, made: Any, images: Any, target: Any, **more: Any) -> Any:
        return made.attribute(images, target=target, **self.options, **more)


@dataclass(frozen=True)
class Scale:
    """How much is measured: images for the metrics, pairs of timings, draws an image for sensitivity."""

    images: int
    pairs: int
    draws: int


class GradCamOnPixels(GradientAttribution):
    """Captum's LayerGradCam at the model's last LayerNorm, interpolated and spread over the channels as users do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.method = LayerGradCam(model, model.norm)

    @log_usage()
    def attribute(self, inputs: Any, target: Any, **more: Any) -> Any:
        image = inputs[0] if isinstance(inputs, tuple) else inputs
        cam = self.method.attribute(inputs, target, **more)
        cam = cam[0] if isinstance(cam, tuple) else cam
        pixels = LayerAttribution.interpolate(cam, image.shape[-2:], "bilinear").detach()
        spread = (pixels / image.shape[1]).expand(image.shape).contiguous()
        return (spread,) if isinstance(inputs, tuple) else spread


def lnstat(rule: str) -> Method:
    return Method(f"**LNStat**, `{rule}`", lambda model: LNStatAttribution(model, rule=rule), {})


METHODS = (
    *map(lnstat, ("lnstat", "evidence", "rollout", "gradient")),
    Method("RawAttention", RawAttention, {}),
    Method("AttentionRollout", AttentionRollout, {}),
    Method("GenericAttention", GenericAttention, {}),
    Method("FrozenLayerNorm", FrozenLayerNorm, {}),
    Method("Captum Saliency", Saliency, {}, global_attribution=False),
    Method("Captum InputXGradient", InputXGradient, {}),
    Method(
        f"Captum IntegratedGradients, {IG_STEPS} steps",
        IntegratedGradients,
        {"n_steps": IG_STEPS, "internal_batch_size": 50},
    ),
    Method("Captum LayerGradCam, last norm", GradCamOnPixels, {}, global_attribution=False),
    Method(
        f"Captum Occlusion, {PATCH} x {PATCH} windows",
        Occlusion,
        {"sliding_window_shapes": (3, PATCH, PATCH), "strides": (3, PATCH, PATCH)},
    ),
)


# Works, or fails how.


def outcome(call: Callable[[], Any], expected: Any, loose: float = 1e-4) -> str:
    """``ok``, or what went wrong: another attribution than under plain conditions, or an error."""
    try:
        found = call()
    except Exception as error:
        return f"{type(error).__name__}: {short(error)}"
    if isinstance(found, str):
        return found
    if not isinstance(found, Tensor):
        return f"returns a {type(found).__name__}"
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}"
    if not bool(torch.isfinite(found).all()):
        return "not finite"
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    return "ok" if error <= loose else f"**wrong**: off by {error:.0%}"


def short(error: object, limit: int = 70) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text if len(text) <= limit else text[: limit - 3] + "..."


class TwoOutputs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.norm = model, model.norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.model(x)
        return scores, scores.mean(1)


def in_inference_mode(method: Method, made: Any, images: Tensor) -> Any:
    with torch.inference_mode():
        return method.attribute(made, images, 1)


def in_no_grad(method: Method, made: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return method.attribute(made, images, 1)


def several_outputs(method: Method, model: nn.Module, images: Tensor) -> Any:
    made = method.make(TwoOutputs(model))
    if hasattr(made, "output"):
        made.output = 0
    return method.attribute(made, images, 1)


def half_through_noise_tunnel(method: Method, model: nn.Module, images: Tensor) -> Any:
    """A bfloat16 model under NoiseTunnel, without noise."""
    tunnel = NoiseTunnel(method.make(copy.deepcopy(model).bfloat16()))
    return tunnel.attribute(images.bfloat16(), nt_samples=2, stdevs=0.0, target=1, **method.options)


def four_threads(method: Method, made: Any, images: Tensor, expected: Tensor) -> str | Tensor:
    """Four threads share one object; each has an image of its own and compares with what it gets alone."""
    found: list[Any] = [None] * 4
    start = threading.Barrier(4)

    def explain(number: int) -> None:
        start.wait()
        try:
            for _ in range(5):
                alone = method.attribute(made, images[number : number + 1], 1)
                if found[number] is None or not torch.allclose(alone, expected[number : number + 1], atol=1e-4):
                    found[number] = alone.detach()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=explain, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [error for error in found if isinstance(error, Exception)]
    if errors:
        raise errors[0]
    return torch.cat(found)


def channels_last_sensitivity(method: Method, made: Any, images: Tensor) -> Any:
    image = images.to(memory_format=torch.channels_last)
    sensitivity_max(lambda inputs: method.attribute(made, inputs, 1), image, n_perturb_samples=2, perturb_radius=RADIUS)
    return method.attribute(made, images, 1)


def callers_tensor(method: Method, made: Any, images: Tensor) -> Any:
    image = images.clone()
    attribution = method.attribute(made, image, 1)
    return "requires_grad is set" if image.requires_grad else attribution


CONDITIONS = (
    "no_grad",
    "inference_mode",
    "4 threads",
    "two outputs",
    "1-tuple",
    "bf16, NoiseTunnel",
    "channels_last, sensitivity_max",
    "caller's tensor",
)


def conditions(method: Method, model: nn.Module, images: Tensor) -> dict[str, str]:
    made, few = method.make(model), images[:4]
    try:
        plain = method.attribute(made, few, 1).detach()
    except Exception as error:
        return {"plain": f"{type(error).__name__}: {short(error)}"}
    if plain.shape != few.shape:
        return {"plain": f"shape {tuple(plain.shape)}"}
    calls: dict[str, Callable[[], Any]] = {
        "no_grad": lambda: in_no_grad(method, made, few),
        "inference_mode": lambda: in_inference_mode(method, made, few),
        "4 threads": lambda: four_threads(method, made, few, plain),
        "two outputs": lambda: several_outputs(method, model, few),
        "1-tuple": lambda: one_of(method.attribute(made, (few,), 1)),
        "bf16, NoiseTunnel": lambda: half_through_noise_tunnel(method, model, few),
        "channels_last, sensitivity_max": lambda: channels_last_sensitivity(method, made, few),
        "caller's tensor": lambda: callers_tensor(method, made, few),
    }
    loose = {"bf16, NoiseTunnel": 0.5}
    found = {name: outcome(call, plain, loose.get(name, 1e-3)) for name, call in calls.items()}
    return {"plain": "ok", **found}


def one_of(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) and len(found) == 1 else f"returns a {type(found).__name__}"


# Cost.


def count_calls(method: Method, model: nn.Module, image: Tensor) -> tuple[int, str]:
    """Forward calls of the model, and backward calls through its first and its last part, counted by hooks."""
    counted = copy.deepcopy(model)
    forwards: list[int] = []
    head: list[int] = []
    trunk: list[int] = []

    def note(calls: list[int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            scores = output if isinstance(output, Tensor) else None
            if scores is not None and scores.requires_grad:
                scores.register_hook(lambda gradient: calls.append(len(gradient)))

        return hook

    counted.register_forward_hook(lambda _module, inputs, _output: forwards.append(len(inputs[0])))
    counted.head.register_forward_hook(note(head))
    first = counted.blocks[0] if hasattr(counted, "blocks") else counted.layers[0].blocks[0]
    first.register_forward_hook(note(trunk))
    method.attribute(method.make(counted), image, 1)
    whole, top = sum(trunk), sum(head)
    return sum(forwards), str(whole) if whole or not top else f"head only ({top})"


def time_ratio(method: Method, model: nn.Module, images: Tensor, pairs: int) -> float:
    """CPU time of one call in no-grad forward passes of the same batch: the median over alternating pairs."""
    made = method.make(model)

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def seconds(call: Callable[[], Any], least: float = 0.02) -> float:
        count, begin = 0, time.process_time()
        while (spent := time.process_time() - begin) < least or count == 0:
            call()
            count += 1
        return spent / count

    explain = lambda: method.attribute(made, images, 1)  # noqa: E731
    explain()
    forward()
    return statistics.median(seconds(explain) / seconds(forward) for _ in range(pairs))


# Metrics.


def faithfulness(method: Method, model: nn.Module, images: Tensor, target: list[int]) -> float:
    """Captum's infidelity with normalize=True, the same noise for every method: the median over the images."""
    attributions = method.attribute(method.make(model), images, target).detach()

    @infidelity_perturb_func_decorator(multiply_by_inputs=method.global_attribution)
    def perturb(inputs: Tensor) -> Tensor:
        return inputs + NOISE * torch.randn_like(inputs)

    torch.manual_seed(SEED)
    with torch.no_grad():
        values = infidelity(
            model,
            perturb,
            images,
            attributions,
            target=target,
            n_perturb_samples=FAITHFUL,
            max_examples_per_batch=len(images),
            normalize=True,
        )
    return float(values.median())


def sensitivity(method: Method, model: nn.Module, images: Tensor, target: list[int], draws: int) -> float:
    made = method.make(model)
    torch.manual_seed(SEED)
    values = sensitivity_max(
        lambda inputs, target: method.attribute(made, inputs, target),
        images,
        perturb_radius=RADIUS,
        n_perturb_samples=draws,
        max_examples_per_batch=len(images),
        target=target,
    )
    return float(values.median())


# The page.


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def robustness(found: dict[str, dict[str, str]]) -> str:
    """One mark a condition; what is not ok is listed in words below the table."""
    notes: dict[str, list[str]] = {}
    rows = []
    for name, results in found.items():
        row = [name]
        for condition in ("plain", *CONDITIONS):
            result = results.get(condition, "-")
            if result in ("ok", "-"):
                row.append(result)
                continue
            notes.setdefault(f"{condition}: {result}", []).append(name)
            row.append(
                f"{'wrong' if 'wrong' in result else 'fails'} [{list(notes).index(f'{condition}: {result}') + 1}]"
            )
        rows.append(tuple(row))
    heads = ("method", "plain call", *CONDITIONS)
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
    return f"{table(heads, rows)}\n\n{listed or 'Nothing fails.'}"


def figures(method: Method, model: nn.Module, images: Tensor, target: list[int], scale: Scale) -> tuple[str, ...]:
    forwards, backwards = count_calls(method, model, images[:1])
    ratio = time_ratio(method, model, images[:4], scale.pairs)
    images = images[: len(target)]
    unfaithful = faithfulness(method, model, images, target)
    sensitive = sensitivity(method, model, images, target, scale.draws)
    return (method.name, str(forwards), backwards, f"{ratio:.1f}", f"{unfaithful:.3g}", f"{sensitive:.3f}")


def page(scale: Scale, models: tuple[str, ...]) -> str:
    scenes = [scene for scene in zoo.scenes() if len(scene.labels) == 1]
    parts = [INTRODUCTION.format(**context(scale))]
    for name in models:
        reference = zoo.load(name)
        model = reference.model
        images = torch.stack([reference.transform(scene.image) for scene in scenes[: max(scale.images, 4)]])
        target = [scene.labels[0] for scene in scenes[: scale.images]]
        works: dict[str, dict[str, str]] = {}
        rows: list[tuple[str, ...]] = []
        for method in METHODS:
            begin = time.process_time()
            works[method.name] = conditions(method, model, images)
            if works[method.name]["plain"] == "ok":
                rows.append(figures(method, model, images, target, scale))
            else:
                rows.append((method.name, *("-",) * 5))
            print(f"{name}, {method.name}: {time.process_time() - begin:.0f} s", file=sys.stderr)
        heads = ("method", "forward", "backward", "time", "infidelity", "sensitivity")
        parts += [f"## {name}\n\n{table(heads, rows)}", f"### Under which conditions\n\n{robustness(works)}"]
    return "\n\n".join(parts) + "\n"


def context(scale: Scale) -> dict[str, Any]:
    return {
        "count": scale.images,
        "pairs": scale.pairs,
        "noise": NOISE,
        "faithful": FAITHFUL,
        "radius": RADIUS,
        "neighbours": scale.draws,
        "versions": f"captum-lnstat {__version__}, captum {captum.__version__}, "
        f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}, Python {platform.python_version()}",
    }


INTRODUCTION = """# Comparison with Captum's own methods

Written by `python tests/benchmarks/captum_comparison.py`; do not edit. {versions}; one thread, float32, CPU.

- Models: the two of `captum_lnstat.zoo`, 64 x 64 px, trained. Images: the first {count} single-object scenes; target:
  the true class. Every method is taken as it comes, with its defaults.
- **forward**, **backward**: images that pass through the model, forward, and back through its first block, for one
  image explained; counted by hooks. "head only": a backward pass through the classifier head and nothing below it.
- **time**: CPU time of one call in plain no-grad forward passes, batches of 4: median of {pairs} alternating pairs.
- **infidelity**: Captum's, `normalize=True`, lower is better; noise of deviation {noise}, {faithful} draws an image,
  the same for every method; n = {count}, median. It asks how well a map predicts what noise on single pixels does to
  the score, which favours gradients: a map of patches, or one that is not about the class, cannot do well.
- **sensitivity**: Captum's `sensitivity_max`, lower is better; radius {radius}, {neighbours} draws an image;
  n = {count}, median. A map that does not look at the image would get 0: read it beside the
  [quality tables](quality.md), where maps are compared with the objects' masks.
- Conditions: the same method again, on 4 images: inside `no_grad`; inside `inference_mode`; from 4 threads that share
  one object; a model with two outputs (LNStat and the baselines have `output=0`; Captum's want a function around the
  model); inputs as a 1-tuple; a bfloat16 model under `NoiseTunnel`; `sensitivity_max` on channels-last images;
  whether the caller's tensor is left as it was. "wrong": no error, but another map than the plain call's.
- Captum's LayerGradCam knows no tokens: it takes dimension 1 for channels. Where a map comes out, it is interpolated
  to the image as a user would, but it is not a map of the image."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="for the metrics")
    parser.add_argument("--pairs", type=int, default=9, help="of timings")
    parser.add_argument("--draws", type=int, default=10, help="an image, for sensitivity")
    parser.add_argument("--models", nargs="+", choices=zoo.names(), default=zoo.names())
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Captum's notes on requires_grad
    text = page(Scale(options.images, options.pairs, options.draws), tuple(options.models))
    options.output.write_text(text, encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
