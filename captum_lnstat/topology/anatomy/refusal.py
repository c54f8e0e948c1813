"""Why a model is of no known family: read off its structure, in a short first line and a few further ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from captum_lnstat.topology.anatomy.embedding import IMAGE_CHANNELS, convolutions, reads_images

_COPIES = (torch.jit.ScriptModule, torch.fx.GraphModule)
_QUERIES = {
    *("qkv", "q", "query", "to_q", "to_qkv", "q_proj", "qkv_proj", "in_proj", "proj_q", "proj_qkv", "c_attn"),
    *("wq", "w_q", "q_linear", "linear_q", "fc_q", "queries", "query_proj", "qkv_linear", "wqkv", "in_proj_qkv"),
}
_OVER_CHANNELS = ("channel", "xca", "crosscovariance")
_WITHOUT_ATTENTION = (
    "to do: explain it with a method that needs no attention, such as Captum's IntegratedGradients or LayerGradCam;\n"
    "       if forward_func runs a transformer that is not inside this module, pass the transformer as model="
)
_ADD = (
    "to do: pass a model of one of these, its blocks unedited;\n"
    "       or add its family: one subclass of Topology with @register_topology"
)


def no_family(model: nn.Module, known: Mapping[str, str]) -> str:
    """The message for a model that no family matches.

    Args:
        model: Any module.
        known: Every family's name, and the structure that it expects.

    Example:
        >>> print(no_family(nn.Sequential(nn.Linear(2, 2)), {}).splitlines()[0])
        Sequential is not a vision transformer of a known family: it holds no attention module
    """
    kind = type(model).__name__
    if any(calls_parts(module) for module in model.modules()):
        return (
            f"{kind} is, or holds, a graph (torch.fx, torch.export), which calls the "
            "parts of its blocks one by one and runs no block as a module\n"
            "to do: pass the model that it was made from, and take features by its own modules or with a forward "
            "hook, in place of create_feature_extractor"
        )
    if any(isinstance(module, _COPIES) for module in model.modules()):
        return (
            f"{kind} is, or holds, a scripted, traced or exported copy of a model, whose attention cannot be seen\n"
            "to do: pass the model that it was made from; a compiled model (torch.compile) may be passed as it is"
        )
    attention = {name: module for name, module in model.named_modules() if is_attention(module)}
    norms = [module for module in model.modules() if _is_layer_norm(module)]
    found = convolutions(model)
    seen = f"seen: {_listing(attention)}; LayerNorms: {len(norms)} of {len(list(model.modules()))} modules"
    over_channels = [(name, module) for name, module in attention.items() if weighs_channels(module)]
    if not attention:
        why, advice = "it holds no attention module", _WITHOUT_ATTENTION
    elif not norms:
        why, advice = "it holds no LayerNorm, whose token statistics say what a block keeps", _WITHOUT_ATTENTION
    elif over_channels:
        name, module = over_channels[0]
        why = f"{type(module).__name__} at {name!r} attends from channel to channel, not token to token"
        advice = (
            "to do: explain it with a method that needs no map from token to token, such as Captum's "
            "IntegratedGradients"
        )
    elif found and not reads_images(found):
        first, convolution = next(iter(found.items()))
        why = f"{first!r}, its first convolution, reads {convolution.in_channels} channels; one that reads images is "
        why += f"expected to read fewer than {IMAGE_CHANNELS}"
        advice = "to do: add its family: one subclass of Topology with @register_topology"
    else:
        why = "its attention and LayerNorms are not where those of a known family are"
        advice = "\n".join(["known families:", *(f"  {name}: {structure}" for name, structure in known.items()), _ADD])
    return f"{kind} is not a vision transformer of a known family: {why}\n{seen}\n{advice}"


def several_models(model: nn.Module, found: Sequence[nn.Module]) -> str:
    """The message for a model that holds several transformers side by side."""
    names = ", ".join(type(module).__name__ for module in found)
    return (
        f"{type(model).__name__} holds {len(found)} transformers side by side ({names}); expected one. Pass the one to "
        "explain as model="
    )


def calls_parts(module: nn.Module) -> bool:
    """Whether a module is a graph that calls modules with weights; one that was exported calls torch's functions."""
    if not isinstance(module, torch.fx.GraphModule):
        return False
    called = [module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"]
    return any(list(part.parameters()) for part in called)


def _listing(attention: Mapping[str, nn.Module]) -> str:
    """Every kind of attention with its number and where the first one is."""
    if not attention:
        return "no attention module"
    kinds: dict[str, list[str]] = {}
    for name, module in attention.items():
        kinds.setdefault(type(module).__name__, []).append(name)
    return ", ".join(f"{len(names)} {kind} (first at {names[0]!r})" for kind, names in kinds.items())


def is_attention(module: nn.Module) -> bool:
    """By what it is made of: a projection to queries; or by its own claim, with nothing of that kind inside."""
    if isinstance(module, nn.MultiheadAttention) or any(
        name.lower() in _QUERIES for name, _ in module.named_children()
    ):
        return True
    named = type(module).__name__.lower()
    claims = "attention" in named or named.endswith("attn")
    return claims and not any(is_attention(child) for child in module.children())


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "rmsnorm" in type(module).__name__.lower()


def weighs_channels(module: nn.Module) -> bool:
    """Attention over channels says so. A learned temperature says nothing: attention over tokens may have one, too."""
    named = type(module).__name__.lower()
    return any(word in named for word in _OVER_CHANNELS)
