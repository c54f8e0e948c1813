"""Methods by name, for sheets that set them beside each other: this package's, its baselines and Captum's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor, nn

from captum_lnstat.attribution.baselines import AttentionRollout, FrozenLayerNorm, GenericAttention, RawAttention
from captum_lnstat.attribution.lnstat import LNStatAttribution
from captum_lnstat.recording.forward import Output, pick_output

INTEGRATED_STEPS = 32
# Steps of IntegratedGradients that are in memory at once; more is no faster on a CPU and large models need the room.
INTEGRATED_BATCH = 8

# From inputs and the class of each to the attributions.
Attribute = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Method:
    """A method as a sheet shows it.

    Attributes:
        title: A few words, shown beside its maps.
        make: From the model, and which of its outputs is explained, to the function that attributes.
        signed: Whether negative values mean "against the target".
        unit: What the values are, for the colour bar.
    """

    title: str
    make: Callable[[nn.Module, Output], Attribute]
    signed: bool = False
    unit: str = ""


def scores_of(model: nn.Module, output: Output) -> Callable[[Tensor], Tensor]:
    """The model as a function that returns scores alone, as Captum's own methods want it."""
    return lambda inputs: pick_output(model(inputs), output)


def _lnstat(**options: Any) -> Callable[[nn.Module, Output], Attribute]:
    return lambda model, output: LNStatAttribution(model, output=output, **options).attribute


def _ours(kind: Callable[..., Any]) -> Callable[[nn.Module, Output], Attribute]:
    return lambda model, output: kind(model, output=output).attribute


def _captum(kind: Callable[..., Any]) -> Callable[[nn.Module, Output], Attribute]:
    def make(model: nn.Module, output: Output) -> Attribute:
        method = kind(scores_of(model, output))

        def attribute(inputs: Tensor, target: Any) -> Tensor:
            # These methods switch the gradients of their input on and warn that they do.
            found: Tensor = method.attribute(inputs.detach().clone().requires_grad_(), target=target)
            return found.detach()

        return attribute

    return make


def _integrated(model: nn.Module, output: Output) -> Attribute:
    steps = IntegratedGradients(scores_of(model, output))

    def attribute(inputs: Tensor, target: Any) -> Tensor:
        found = [
            steps.attribute(
                one[None], target=int(wanted), n_steps=INTEGRATED_STEPS, internal_batch_size=INTEGRATED_BATCH
            )
            for one, wanted in zip(inputs, torch.as_tensor(target).expand(len(inputs)), strict=True)
        ]
        return torch.cat(found).detach()

    return attribute


METHODS: dict[str, Method] = {
    "lnstat": Method("LNStat", _lnstat(), unit="of the score, a pixel"),
    "lnstat-contrastive": Method("LNStat, contrastive", _lnstat(contrastive=True), unit="of the contrast, a pixel"),
    "evidence": Method("evidence", _lnstat(rule="evidence"), True, "of the score, a pixel"),
    "rollout": Method("rollout with token statistics", _lnstat(rule="rollout"), unit="share, a pixel"),
    "gradient": Method("Chefer's rule with token statistics", _lnstat(rule="gradient"), unit="a pixel"),
    "chefer": Method("Chefer et al. 2021", _ours(GenericAttention), unit="a pixel"),
    "attention-rollout": Method("attention rollout", _ours(AttentionRollout), unit="share, a pixel"),
    "raw-attention": Method("attention of the last block", _ours(RawAttention), unit="share, a pixel"),
    "frozen-layernorm": Method("frozen LayerNorm", _ours(FrozenLayerNorm), True, "of the score, a pixel"),
    "ig": Method("Integrated Gradients", _integrated, True, "of the score, a pixel"),
    "inputxgradient": Method("input x gradient", _captum(InputXGradient), True, "of the score, a pixel"),
    "saliency": Method("gradient, absolute", _captum(Saliency), unit="a pixel"),
}
