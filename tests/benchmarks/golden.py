"""Fingerprints of maps: whether a change of the code changed any bit of any map.

``python tests/benchmarks/golden.py FILE`` writes a SHA-256 of every map of twelve small models: all rules, all
baselines and the layer form, in float32 and float64. ``--compare FILE`` says which of those in a file are others now,
and ends with 1 if any is. The bits hang on the machine and on torch: write the file with the code before the change,
then compare with the code after it, on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import captum_lnstat
from captum_lnstat import (
    AttentionRollout,
    FrozenLayerNorm,
    GenericAttention,
    LayerLNStat,
    LNStatAttribution,
    RawAttention,
    zoo,
)
from captum_lnstat.topology import find_topology


def _timm(name: str, size: int = 32, **options: Any) -> tuple[Callable[[], nn.Module], int]:
    return lambda: timm.create_model(name, num_classes=5, img_size=size, **options), size


def _hugging_face() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


_SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
_SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 4}
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "zoo vit-mini": (lambda: zoo.load("vit-mini").model, 64),
    "zoo swin-mini": (lambda: zoo.load("swin-mini").model, 64),
    "vit": _timm("vit_tiny_patch16_224", **_SMALL),
    "deit distilled": _timm("deit_tiny_distilled_patch16_224", **_SMALL),
    "dinov2 registers": _timm("vit_small_patch14_reg4_dinov2", 32, **_SMALL),
    "siglip map pooling": _timm("vit_base_patch16_siglip_224", 32, **_SMALL),
    "vit average": _timm("vit_tiny_patch16_224", **_SMALL, global_pool="avg", class_token=False),
    "swin padded": _timm("swin_tiny_patch4_window7_224", 40, **_SWIN),
    "swin v2": _timm("swinv2_tiny_window8_256", 64, **_SWIN),
    "cait": _timm("cait_xxs24_224", 32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5),
        64,
    ),
    "hugging face vit": (_hugging_face, 32),
}


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A model whose parameters are all of some size, two images for it, and a class for each."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().to(torch.float64)
    if not name.startswith("zoo"):
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return model.to(dtype), images.to(dtype), torch.tensor([1, 0])


def maps(model: nn.Module, images: Tensor, targets: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every map of a model, by name."""
    for rule in ("lnstat", "evidence", "rollout", "gradient"):
        method = LNStatAttribution(model, rule=rule)
        yield rule, lambda method=method: method.attribute(images, target=targets)
    for share in ("deviation", "update", "half"):
        either = LNStatAttribution(model, residual=share, merging="uniform", head_fusion="max")
        yield f"lnstat {share}", lambda either=either: either.relevance(images, target=targets)
        raw = LNStatAttribution(model, rule="gradient", residual=share, normalized=False)
        yield f"gradient {share}", lambda raw=raw: raw.relevance(images, target=targets)
    contrastive = LNStatAttribution(model, rule="evidence", contrastive=True)
    yield "evidence contrastive", lambda: contrastive.relevance(images, target=targets)
    for rule in ("lnstat", "evidence"):
        every = LNStatAttribution(model, rule=rule)
        yield f"{rule} per target", lambda every=every: every.relevance_per_target(images, [0, 1, 1])
    for baseline in (RawAttention, AttentionRollout, GenericAttention, FrozenLayerNorm):
        known = baseline(model)
        yield baseline.__name__, lambda known=known: known.attribute(images, target=targets)
    transformer = find_topology(model).model
    blocks = [step.name for step in LNStatAttribution(model).describe(images).steps if step.kind == "attention"]
    for block in (blocks[0], blocks[-1]):
        for rule in ("lnstat", "evidence", "rollout"):
            layer = LayerLNStat(model, transformer.get_submodule(block), rule=rule)
            yield f"layer {block} {rule}", lambda layer=layer: layer.attribute(images, targets, None, True)


def fingerprints() -> dict[str, str]:
    """A SHA-256 of every map; of the message where it is refused."""
    found = {}
    for name in MODELS:
        for dtype in (torch.float32, torch.float64):
            model, images, targets = build(name, dtype)
            for what, explain in maps(model, images, targets):
                try:
                    content = explain().contiguous().numpy().tobytes()
                except RuntimeError as error:
                    content = f"{type(error).__name__}: {error}".encode()
                found[f"{name}, {str(dtype)[6:]}, {what}"] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "captum_lnstat": captum_lnstat.__version__}
    found = fingerprints()
    if not options.compare:
        options.file.write_text(json.dumps({"versions": versions, "maps": found}, indent=1) + "\n")
        print(f"{len(found)} maps")
        return 0
    before = json.loads(options.file.read_text())["maps"]
    others = [name for name in found if before.get(name) != found[name]]
    print("\n".join([*others, f"{len(found) - len(others)} of {len(found)} maps are the same bit for bit"]))
    return bool(others)


if __name__ == "__main__":
    sys.exit(main())
