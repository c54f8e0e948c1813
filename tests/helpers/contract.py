"""Small models with lively parameters, and one snapshot that sees every change of state."""

from __future__ import annotations

import os
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import seed
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_lnstat import (
    AGCAM,
    AttCAT,
    AttentionRollout,
    BeyondIntuition,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LeGrad,
    LibraGrad,
    LNStatAttribution,
    RawAttention,
)
from captum_lnstat.recording.eager import run_eagerly

CLASSES = 5


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters large enough that attention is not uniform and no logit vanishes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.mul_(3)
            parameter.add_(noise, alpha=0.1)
    return model.eval()


def vit(seed: int = 0, kind: type[VisionTransformer] = VisionTransformer, **options: Any) -> VisionTransformer:
    """A ViT of 32 px with 4 x 4 patches."""
    torch.manual_seed(seed)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": CLASSES, **options}
    return lively(kind(**{"img_size": 32, "patch_size": 8, **options}), seed)


def distilled(seed: int = 0, **options: Any) -> VisionTransformer:
    """A DeiT with class and distillation token."""
    return vit(seed, VisionTransformerDistilled, **options)


def registers(seed: int = 0, **options: Any) -> VisionTransformer:
    """A ViT as DINOv2's: class token, registers, LayerScale, position embedding of the patches alone."""
    return vit(seed, reg_tokens=4, no_embed_class=True, init_values=0.5, **options)


def swin(seed: int = 0, kind: type[nn.Module] = SwinTransformer, **options: Any) -> nn.Module:
    """A Swin of 32 px: stages of 8 x 8 and 4 x 4 tokens, shifted windows of 4 x 4."""
    torch.manual_seed(seed)
    options = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, **options}
    return lively(kind(**{"img_size": 32, "patch_size": 4, "num_classes": CLASSES, **options}), seed)


def swin_v2(seed: int = 0, **options: Any) -> nn.Module:
    """The same as a Swin v2."""
    return swin(seed, SwinTransformerV2, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "deit": distilled,
    "dinov2": registers,
    "swin": swin,
    "swinv2": swin_v2,
}

Method = Callable[..., Any]
PASSES = 1
METHODS: dict[str, Method] = {
    "lnstat": lambda f, model=None: LNStatAttribution(f, model),
    "evidence": lambda f, model=None: LNStatAttribution(f, model, rule="evidence"),
    "rollout": lambda f, model=None: LNStatAttribution(f, model, rule="rollout"),
    "gradient": lambda f, model=None: LNStatAttribution(f, model, rule="gradient"),
    "RawAttention": RawAttention,
    "AttentionRollout": AttentionRollout,
    "GenericAttention": GenericAttention,
    "FrozenLayerNorm": FrozenLayerNorm,
    "LibraGrad": LibraGrad,
    "LeGrad": LeGrad,
    "AGCAM": AGCAM,
    "AttCAT": AttCAT,
    "BeyondIntuition": lambda f, model=None: BeyondIntuition(f, model, steps=PASSES),
    "BeyondIntuition-head": lambda f, model=None: BeyondIntuition(f, model, approximation="head", steps=PASSES),
}

CLASS_AGNOSTIC = ("rollout", "RawAttention", "AttentionRollout")
# Those with a backward pass through the model, and of these the ones that read the gradient of attention.
OF_GRADIENTS = ("gradient", "GenericAttention", "LeGrad", "AGCAM", "AttCAT", "BeyondIntuition", "BeyondIntuition-head")
WITH_A_GRAPH = (*OF_GRADIENTS, "FrozenLayerNorm", "LibraGrad")


def passes(make: Method) -> int:
    """How often a method runs the model for one map."""
    return PASSES if make in (METHODS["BeyondIntuition"], METHODS["BeyondIntuition-head"]) else 1


# Options that take a way of their own through the package.
VARIANTS: dict[str, Method] = {
    "LibraGrad attcat": lambda f, model=None: LibraGrad(f, model, form="attcat"),
    "contrastive": lambda f, model=None: LNStatAttribution(f, model, contrastive=True),
    "update": lambda f, model=None: LNStatAttribution(f, model, residual="update", head_fusion="mean"),
}


def a_block(model: nn.Module) -> nn.Module:
    """A block in the middle of the transformer that ``model`` is or holds."""
    for module in model.modules():
        if hasattr(module, "patch_embed"):
            return module.layers[1].blocks[0] if hasattr(module, "layers") else module.blocks[-2]
    raise AssertionError("no transformer inside")


LAYERS: dict[str, Method] = {"LayerLNStat": lambda f, model=None: LayerLNStat(f, a_block(model or f), model)}

# Every public method, and what the whole contract is run on.
EVERY_METHOD: dict[str, Method] = {**METHODS, **VARIANTS, **LAYERS}

# What Captum, a thread or a caller's mode does to a method does not hang on the model's family: every method on one
# model without and one with windows, and every model by a rule without and one with a backward pass.
PAIRS = [
    (name, kind)
    for name in EVERY_METHOD
    for kind in MODELS
    if kind in {"vit", "swin"} or name in {"lnstat", "gradient"}
]


def expected_shape(method: Any, image: Tensor) -> tuple[int, ...]:
    """The image's shape; for the layer form that of the block's output, counted by hand for the models below."""
    if not isinstance(method, LayerLNStat):
        return tuple(image.shape)
    if hasattr(method.layer, "window_size"):
        return len(image), 4, 4, 48
    prefix = {m.num_prefix_tokens for m in method.lnstat.transformer.modules() if hasattr(m, "num_prefix_tokens")}
    return len(image), prefix.pop() + 16, 32


def seeded(*parts: Any) -> Callable[[Any], Any]:
    """Hypothesis' examples for one test: the same on every run, others for another HYPOTHESIS_SEED."""
    return seed(zlib.crc32(repr((os.environ.get("HYPOTHESIS_SEED", "0"), *parts)).encode()))


def images(batch: int = 2, size: int | tuple[int, int] = 32, seed: int = 0, channels: int = 3) -> Tensor:
    """Normalised noise."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    grad = None if not tensor.is_leaf or tensor.grad is None else _bits(tensor.grad)
    return (
        id(tensor),
        bytes(plain.numpy()),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        -1 if tensor.is_inference() else tensor._version,
        tensor.requires_grad,
        tensor.is_leaf,
        id(tensor.grad_fn),
        grad,
    )


_KERNELS = ("flash", "mem_efficient", "math")
_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_NO_HOOKS = frozenset(_HOOKS)


def _module_state(module: nn.Module) -> dict[str, Any]:
    held = vars(module)
    return {
        "training": module.training,
        "forward": module.forward.__func__,
        "hooks": [tuple((key, id(hook)) for key, hook in held[name].items()) if held[name] else () for name in _HOOKS],
        "attributes": {name: id(value) for name, value in held.items() if name not in _NO_HOOKS},
    }


def snapshot(*objects: nn.Module | Tensor) -> dict[str, Any]:
    """Everything an explanation could change, bit by bit: modules, tensors, and the modes of this thread."""
    state: dict[str, Any] = {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "kernels": [getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")() for kernel in _KERNELS],
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "recordings under way": run_eagerly._inside,
        "rng": bytes(torch.get_rng_state().numpy()),
        "python rng": hash(random.getstate()),
        "numpy rng": bytes(np.random.get_state()[1]),  # noqa: NPY002
        "warning filters": list(warnings.filters),
        "global hooks": [
            len(hooks)
            for name, hooks in vars(torch.nn.modules.module).items()
            if name.startswith("_global") and "hooks" in name and hasattr(hooks, "__len__")
        ],
    }
    for number, thing in enumerate(objects):
        if isinstance(thing, Tensor):
            state[f"tensor {number}"] = _bits(thing) if not thing.is_inference() else (id(thing), thing.tolist())
            continue
        for name, module in thing.named_modules():
            state[f"module {number} {name}"] = _module_state(module)
        for name, tensor in [*thing.named_parameters(), *thing.named_buffers()]:
            state[f"tensor {number} {name}"] = _bits(tensor)
    return state


def same_when_checkpointed(make: Method, found: Tensor, expected: Tensor) -> bool:
    """The same bits, but of the methods that weigh attention with its gradient.

    Under checkpointing these have the kernel's own backward pass of attention, which rounds otherwise than theirs.
    """
    if make not in [METHODS[name] for name in OF_GRADIENTS]:
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@contextmanager
def untouched(*objects: nn.Module | Tensor) -> Iterator[None]:
    """Whatever happens inside, an exception included, nothing of ``objects`` or of the modes is changed."""
    before = snapshot(*objects)
    try:
        yield
    finally:
        after = snapshot(*objects)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        assert not changed, f"changed: {changed}"


class Normalise(nn.Module):
    """Normalisation as the first part of a model."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]).reshape(3, 1, 1))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(self.mean).mul_(1.5) if self.inplace else (x - self.mean) * 1.5


class CountCalls(nn.Module):
    """Counts its forward calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.count = model, 0

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.count += 1
        return self.model(x)
