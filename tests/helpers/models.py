"""Small random models whose attention is peaky, whose shares vary and whose logits are not near zero."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Attention, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from captum_lnstat import LNStatAttribution
from captum_lnstat.attribution.base import GridAttribution, explain_batch
from captum_lnstat.rules.relevance import Relevance

CLASSES = 7


class GatedAttention(Attention):
    """timm's attention with its sigmoid gate on; the model class has no switch for it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


HAS_GATE = "gated" in inspect.signature(Attention.__init__).parameters


@dataclass(frozen=True)
class Case:
    """A model to build and what a reader of its configuration knows about it.

    Attributes:
        name: Test id.
        build: Makes the model.
        image: Height and width of the images it is shown.
        grid: Patch tokens of the first stage.
        patch: Pixels of a patch.
        start: What the head reads: "class", "patches", "all", "distilled" or "pool".
        prefix: Prefix tokens.
        fused: Use the fused attention kernel; ``None`` leaves timm's choice.
        prepare: Last change to the model, for instance its input size.
        affine: The head is affine once its LayerNorm statistics are frozen.
        gain: How peaky attention is made.
    """

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    image: tuple[int, int]
    grid: tuple[int, int]
    patch: tuple[int, int]
    start: str
    prefix: int = 0
    fused: bool | None = None
    prepare: Callable[[Any], None] | None = None
    affine: bool = True
    gain: float = 2.0

    def __str__(self) -> str:
        return self.name


def _vit(name: str, start: str = "class", prefix: int = 1, size: Any = 32, **kwargs: Any) -> Case:
    options = {"embed_dim": 24, "depth": 3, "num_heads": 3, "patch_size": 8, "mlp_ratio": 2.0, "num_classes": CLASSES}
    extra = {key: kwargs.pop(key) for key in ("image", "grid", "fused") if key in kwargs}
    gain = kwargs.pop("gain", 2.0)
    cls = kwargs.pop("cls", VisionTransformer)
    build = partial(cls, img_size=size, **{**options, **kwargs})
    height, width = extra.get("image", (size, size) if isinstance(size, int) else size)
    patch = kwargs.get("patch_size", 8)
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    grid = extra.get("grid", (height // ph, width // pw))
    return Case(
        "vit-" + name,
        build,
        (height, width),
        grid,
        (ph, pw),
        start,
        prefix,
        fused=extra.get("fused"),
        affine=start != "pool",
        gain=gain,
    )


def _swin(version: int, name: str, size: Any = 64, **kwargs: Any) -> Case:
    options = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    options |= {"patch_size": 4, "mlp_ratio": 2.0}
    extra = {key: kwargs.pop(key) for key in ("image", "fused", "prepare") if key in kwargs}
    cls = SwinTransformer if version == 1 else SwinTransformerV2
    build = partial(cls, img_size=size, num_classes=CLASSES, drop_path_rate=0.0, **{**options, **kwargs})
    height, width = extra.get("image", (size, size) if isinstance(size, int) else size)
    return Case(
        f"swin{version}-{name}",
        build,
        (height, width),
        (height // 4, width // 4),
        (4, 4),
        "patches",
        fused=extra.get("fused"),
        prepare=extra.get("prepare"),
    )


_ALL_VITS = [
    _vit("class"),
    _vit("class-explicit", fused=False),
    _vit("avg", start="patches", global_pool="avg"),
    _vit("avg-norm-first", start="patches", global_pool="avg", fc_norm=False),
    _vit("avg-of-all", start="all", prefix=3, reg_tokens=2, global_pool="avg", pool_include_prefix=True),
    _vit("avg-no-class", start="patches", prefix=0, global_pool="avg", class_token=False),
    _vit("class-fc-norm", fc_norm=True),
    _vit("class-no-final-norm", final_norm=False),
    _vit("registers", prefix=5, reg_tokens=4),
    _vit("registers-avg", start="patches", prefix=3, reg_tokens=2, global_pool="avg"),
    _vit("distilled", start="distilled", prefix=2, cls=VisionTransformerDistilled),
    _vit("map", start="pool", global_pool="map"),
    _vit("map-registers", start="pool", prefix=3, reg_tokens=2, global_pool="map"),
    _vit("map-no-class", start="pool", prefix=0, global_pool="map", class_token=False),
    _vit("non-square", size=(32, 48)),
    _vit("non-square-patch", size=(32, 24), patch_size=(8, 4)),
    _vit("dynamic", image=(40, 24), dynamic_img_size=True),
    _vit("dynamic-pad", image=(37, 26), grid=(5, 4), dynamic_img_size=True, dynamic_img_pad=True),
    _vit("layer-scale", init_values=0.5),
    _vit("qk-norm", qk_norm=True),
    _vit("scale-attn-norm", scale_attn_norm=True),
    _vit("pre-norm", pre_norm=True, no_embed_class=True),
    _vit("res-post", block_fn=ResPostBlock, gain=0.7),
    _vit("no-biases", qkv_bias=False, proj_bias=False),
]
if HAS_GATE:
    _ALL_VITS += [
        _vit("gated", attn_layer=GatedAttention),
        _vit("gated-scale-norm-layer-scale", attn_layer=GatedAttention, scale_attn_norm=True, init_values=0.5),
    ]


def _swins(version: int) -> list[Case]:
    swin = partial(_swin, version)
    return [
        swin("shift"),
        swin("three-stages", depths=(2, 2, 2), num_heads=(2, 4, 8)),
        swin("padded-4", size=72, depths=(2, 2, 2), num_heads=(2, 4, 4)),
        swin("padded-7", size=72, depths=(2, 2, 2), num_heads=(2, 4, 4), window_size=7),
        swin("non-square", size=(64, 96)),
        swin("one-axis-shift", size=(32, 64), window_size=8),
        swin("flat-windows", window_size=(2, 4)),
        swin("windows-per-stage", size=48, window_size=((4, 3), (2, 4))),
        swin("odd-grids", size=(36, 52), depths=(1, 1, 2), num_heads=(2, 2, 4), window_size=3),
        swin("always-partition", size=40, window_size=7, always_partition=True),
        swin("dynamic", image=(72, 52), dynamic_img_size=True),
        swin("resized", size=32, image=(72, 48), prepare=lambda model: model.set_input_size((72, 48), window_size=5)),
        swin("no-biases", size=32, qkv_bias=False),
    ]


_ALL_SWINS = [
    *_swins(1),
    _swin(1, "shift-fused", fused=True),
    _swin(1, "padded-4-fused", size=72, fused=True),
    _swin(1, "wide-heads", size=32, head_dim=10),
    *_swins(2),
]
CASES: dict[str, Case] = {case.name: case for case in (*_ALL_VITS, *_ALL_SWINS)}
VITS = [case.name for case in _ALL_VITS]
SWINS = [case.name for case in _ALL_SWINS]
# One of everything that is a way of its own, for what is slow or does not depend on the geometry.
FEW = [
    "vit-class",
    "vit-avg",
    "vit-registers",
    "vit-distilled",
    "vit-layer-scale",
    "vit-res-post",
    "swin1-padded-7",
    "swin1-odd-grids",
    "swin2-padded-4",
    "swin2-odd-grids",
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(parameter: Tensor, std: float, rng: torch.Generator, mean: float = 0.0) -> None:
    parameter.copy_(mean + std * torch.randn(parameter.shape, generator=rng))


def enliven(model: nn.Module, seed: int, attention_gain: float = 2.0) -> nn.Module:
    """Give every parameter a value that matters: as initialised, biases are 0, gammas 1 and attention is uniform."""
    rng = generator(seed)
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, p in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if id(p) in norms and leaf == "weight":
                p.copy_(1 + torch.rand(p.shape, generator=rng) - 0.5)
            elif leaf == "gamma":
                _normal(p, 0.5, rng, 1.0)
            elif leaf == "logit_scale":
                _normal(p, 0.3, rng, math.log(6))
            elif leaf.endswith("table") or leaf in ("cls_token", "reg_token", "dist_token", "pos_embed", "latent"):
                _normal(p, 1.0, rng)
            elif p.dim() == 1:
                _normal(p, 0.3, rng)
            else:
                attends = "qkv" in name or "attn_pool.q." in name or "attn_pool.kv." in name
                gain = attention_gain if attends else 1.5
                _normal(p, gain / math.sqrt(p[0].numel()), rng)
    return model.eval()


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A lively model of a case, in eval mode."""
    case = CASES[name]
    # Built from the caller's random state, which stays as it was; every parameter is set afterwards anyway.
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own, when it resizes a position table
        model = case.build()
        if case.prepare is not None:
            case.prepare(model)
    enliven(model, seed, case.gain)
    if case.fused is not None:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = case.fused
    return model.to(dtype)


def images(case: Case, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise whose contrast and colour vary over the image, so that no two tokens have the same statistics."""
    rng = generator(1000 + seed)
    height, width = case.image
    rough = torch.randn(batch, 2, 5, 5, generator=rng, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")
    noise = torch.randn(batch, 3, height, width, generator=rng, dtype=torch.float64)
    return (noise * smooth[:, :1].exp() + smooth[:, 1:]).to(dtype)


@cache
def float32_model(name: str, seed: int = 0) -> nn.Module:
    """A float32 model, shared by tests that leave it as it is."""
    return build(name, seed, torch.float32)


def targets(batch: int, seed: int = 0) -> Tensor:
    """A target for every image, not the same for all of them."""
    return (torch.arange(batch) * 3 + 1 + seed) % CLASSES


def explain(method: GridAttribution, x: Tensor, target: Tensor | None = None) -> Relevance:
    """All of what a rule gives, not the grid alone: prefix tokens, padding and constant too."""
    return explain_batch(method, x, [target])[1]


# Said in full, so that what the tests compare does not hang on what the defaults are.
OPTIONS: dict[str, object] = {
    "residual": "deviation",
    "head_fusion": None,
    "merging": "uniform",
    "contrastive": False,
    "normalized": True,
}


def rule(model: nn.Module, name: str, x: Tensor, target: Tensor | None = None, **options: object) -> Relevance:
    """``explain`` for a rule by name."""
    return explain(LNStatAttribution(model, rule=name, **{**OPTIONS, **options}), x, target)  # type: ignore[arg-type]
