"""The registry of methods: ``compare``, ``evaluate``, the demo and the sheets take them by their names from here.

A new method is one entry in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, Occlusion, Saliency
from torch import Tensor, nn

from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
from captum_lnstat.attribution.gradcam import GradCam, HiResCAM
from captum_lnstat.attribution.gradient_baselines import AGCAM, AttCAT, BeyondIntuition, LeGrad
from captum_lnstat.attribution.libragrad import LibraGrad
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.attribution.rise import RISE
from captum_lnstat.attribution.vitcx import ViTCX
from captum_lnstat.recording.forward import Output, pick_output
from captum_lnstat.rules import find_rule

INTEGRATED_STEPS = 32
# A quarter of what the paper takes: a look at a picture is not to take minutes.
RISE_MASKS = 1000
# Steps of IntegratedGradients that are in memory at once; more is no faster on a CPU and large models need the room.
INTEGRATED_BATCH = 8

# From inputs and the class of each to the attributions.
Attribute = Callable[[Tensor, Any], Tensor]
# From the model, which of its outputs is explained, and options, to the function that attributes.
Make = Callable[..., Attribute]


@dataclass(frozen=True)
class Method:
    """A method by which maps are made.

    Attributes:
        title: A few words, shown beside its maps.
        make: From the model, and which of its outputs is explained, to the function that attributes; options go by
            keyword.
        signed: Whether negative values mean "against the target".
        unit: What the values are, for the colour bar.
        caption: What a map shows, in a few words.
        per_class: Whether the map depends on the target.
        options: The options of ``make``; None for those of a class of this package, which says itself what it takes.
    """

    title: str
    make: Make
    signed: bool = False
    unit: str = ""
    caption: str = ""
    per_class: bool = True
    options: tuple[str, ...] | None = ()


def scores_of(model: nn.Module, output: Output) -> Callable[[Tensor], Tensor]:
    """The model as a function that returns scores alone, as Captum's own methods want it."""
    return lambda inputs: pick_output(model(inputs), output)


def _captum(kind: Callable[..., Any], *, alone: bool = False, **defaults: Any) -> Make:
    """A method of Captum's; ``alone``: for one image at a time."""

    def make(model: nn.Module, output: Output = None, **options: Any) -> Attribute:
        method, options = kind(scores_of(model, output)), {**defaults, **options}

        def attribute(inputs: Tensor, target: Any) -> Tensor:
            targets = torch.as_tensor(target, device=inputs.device).expand(len(inputs))
            found, size = [], 1 if alone else len(inputs)
            for start in range(0, len(inputs), size):
                part = slice(start, start + size)
                # These methods switch the gradients of their input on and warn that they do.
                leaf = inputs[part].detach().clone().requires_grad_()
                found.append(method.attribute(leaf, target=targets[part], **options).detach())
            return torch.cat(found)

        return attribute

    return make


def _cam(kind: type[GradCam]) -> Make:
    def make(model: nn.Module, output: Output = None, *, layer: str | None = None) -> Attribute:
        return kind(scores_of(model, output), model, layer).attribute

    return make


def _occlusion(
    model: nn.Module, output: Output = None, *, window: int | None = None, stride: int | None = None
) -> Attribute:
    """Grey windows an eighth of the image wide, half a window apart, unless others are given."""
    method = Occlusion(scores_of(model, output))
    given = [side for side in (stride, window) if side is not None]
    if min(given, default=1) < 1 or given != sorted(given):
        raise ValueError(f"window is {window} and stride {stride}; expected 1 <= stride <= window")

    def attribute(inputs: Tensor, target: Any) -> Tensor:
        least = min(inputs.shape[2:])
        side = window or max(1, least // 8)
        step = stride or max(1, side // 2)
        if not step <= side <= least:
            raise ValueError(f"window is {side} and stride {step}; expected 1 <= stride <= window <= {least}")
        with torch.no_grad():
            found: Tensor = method.attribute(
                inputs, target=target, sliding_window_shapes=(3, side, side), strides=(3, step, step)
            )
        return found

    return attribute


_SCORE = "score per pixel"


def _ours(
    title: str,
    unit: str,
    caption: str,
    kind: Callable[..., Any] = LNStatAttribution,
    *,
    signed: bool = False,
    per_class: bool = True,
    **fixed: Any,
) -> Method:
    def make(model: nn.Module, output: Output = None, **options: Any) -> Attribute:
        attribute: Attribute = kind(model, output=output, **{**fixed, **options}).attribute
        return attribute

    return Method(title, make, signed, unit, caption, per_class, None)


METHODS: dict[str, Method] = {
    "lnstat": _ours("LNStat", _SCORE, "counted for the class"),
    "lnstat-contrastive": _ours(
        "LNStat, contrastive", "contrast per pixel", "counted for the class, not for others", contrastive=True
    ),
    "evidence": _ours("evidence", _SCORE, "counted for the class, and against it", signed=True, rule="evidence"),
    "rollout": _ours(
        "rollout with token statistics", "share per pixel", "looked at, whatever the class", per_class=False,
        rule="rollout",
    ),
    "gradient": _ours(
        "Chefer's rule with token statistics", "per pixel", "attention by the class's gradient", rule="gradient"
    ),
    "chefer": _ours("Chefer et al. 2021", "per pixel", "attention weighted by the class's gradient", GenericAttention),
    "attention-rollout": _ours(
        "attention rollout", "share per pixel", "what attention alone carries, whatever the class", AttentionRollout,
        per_class=False,
    ),
    "raw-attention": _ours(
        "attention of the last block", "share per pixel", "whatever the class", RawAttention, per_class=False
    ),
    "frozen-layernorm": _ours(
        "frozen LayerNorm", _SCORE, "input x gradient, LayerNorm's statistics constant", FrozenLayerNorm, signed=True
    ),
    "libragrad": _ours(
        "LibraGrad FullGrad+", "score per layer and pixel", "gradients of all layers, linearised", LibraGrad,
        signed=True,
    ),
    "libragrad-attcat": _ours(
        "LibraGrad AttCAT", "per pixel", "gradients of all layers, linearised, by attention", LibraGrad, signed=True,
        form="attcat",
    ),
    "libragrad-tokens": _ours(
        "LibraGrad input x gradient", _SCORE, "of the input tokens, linearised", LibraGrad, signed=True,
        form="inputxgradient",
    ),
    "vitcx": _ours("ViT-CX", "probability per pixel", "what feature maps leave of the class", ViTCX),
    "rise": _ours(
        "RISE", "probability per pixel", f"what {RISE_MASKS:,} random masks leave of the class", RISE, masks=RISE_MASKS
    ),
    "gradcam": Method(
        "Grad-CAM", _cam(GradCam), unit="per pixel", caption="at the last block's first norm", options=("layer",)
    ),
    "hirescam": Method(
        "HiResCAM", _cam(HiResCAM), unit="per pixel", caption="at the last block's first norm", options=("layer",)
    ),
    "legrad": _ours("LeGrad", "per pixel", "what each block's attention does for its own score", LeGrad),
    "agcam": _ours("AGCAM", "per pixel", "attention's gradients, guided by its scores", AGCAM),
    "attcat": _ours("AttCAT", "per pixel", "token times gradient, by attention", AttCAT, signed=True),
    "beyond-intuition": _ours("Beyond Intuition", "per pixel", "token-wise, 20 passes", BeyondIntuition),
    "beyond-intuition-heads": _ours(
        "Beyond Intuition, heads", "per pixel", "head-wise, 20 passes", BeyondIntuition, approximation="head"
    ),
    "ig": Method(
        "Integrated Gradients",
        _captum(IntegratedGradients, alone=True, n_steps=INTEGRATED_STEPS, internal_batch_size=INTEGRATED_BATCH),
        True, _SCORE, f"Captum's, {INTEGRATED_STEPS} steps, signed", options=("n_steps", "method"),
    ),
    "inputxgradient": Method("input x gradient", _captum(InputXGradient), True, _SCORE, "Captum's, signed"),
    "saliency": Method("gradient, absolute", _captum(Saliency), unit="per pixel", caption="Captum's", options=("abs",)),
    "occlusion": Method(
        "occlusion", _occlusion, True, "score", "what a grey window takes from the class",
        options=("window", "stride"),
    ),
}  # fmt: skip


def method_of_rule(rule: str) -> Method:
    """The method of a rule of ``LNStatAttribution``, also of one that is registered elsewhere."""
    found = find_rule(rule)
    return METHODS.get(found.name) or _ours(
        found.name, "per pixel", "", signed=found.complete, per_class=found.class_specific, rule=found.name
    )
